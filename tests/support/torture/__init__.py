"""The campaign against what a user may lose: kills, damaged files, full disks, bad input, code in files.

`make torture` runs all of it, `tests/test_torture.py` a share. Each module of `MODULES` lists its cases.
"""
