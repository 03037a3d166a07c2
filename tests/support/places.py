"""Where files are."""

from __future__ import annotations

from pathlib import Path

SUPPORT = Path(__file__).parent
REPOSITORY = SUPPORT.parents[1]
# Real models and data, which are not part of the repository.
SHARED = REPOSITORY.parent / "shared"
