"""What is loaded from a hub and pushed to it, with the real client against a hub on loopback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from processes import ENVIRONMENT

CASES = Path(__file__).with_name("hub_cases.py")


@pytest.mark.timeout(900)
def test_a_hub_that_answers():
    """The cases have a process of their own, as the client reads the hub's address when it is imported."""
    environment = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "hub_plugin", str(CASES)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=CASES.parent)
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-4_000:]
