"""Runs a script as `accelerate launch` does where there are GPUs: with FSDP2, if that is asked for, on the CPU."""

from __future__ import annotations

import runpy
import sys

from fsdp_on_cpu import allow_fsdp_on_cpu

if __name__ == "__main__":
    allow_fsdp_on_cpu()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
