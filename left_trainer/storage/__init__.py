"""Files on disk: whole or absent, one run to a folder, and one sentence when the disk says no. Loads no torch."""
