"""Virtual tokens: how many a method learns unless it is told."""

from __future__ import annotations

NUM_VIRTUAL_TOKENS = 20
