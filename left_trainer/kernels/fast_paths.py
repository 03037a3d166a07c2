"""What a run says about its fast paths."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

COMPILED_BLOCKS = "compiled_blocks"
LINEAR_CROSS_ENTROPY = "linear_cross_entropy"
LORA_LINEAR = "lora_linear"
GELU = "gelu"
RMS_NORM = "rms_norm"
GATED_MLP = "gated_mlp"
COMPACT_DROPOUT = "compact_dropout"
SHARED_ENCODER = "shared_encoder"
SORTED_GENERATION = "sorted_generation"
REGROUPED_GENERATION = "regrouped_generation"
SHARED_PROMPT_PREFIX = "shared_prompt_prefix"


@dataclass
class FastPath:
    """How often a fast path was taken, and how often it was not, by reason.

    Args:
        ran: Number of calls that took it.
        fell_back: Number of calls that took the plain path instead, by reason.
    """

    ran: int = 0
    fell_back: Counter[str] = field(default_factory=Counter)

    def record(self, reason: str | None) -> None:
        """Count a call that fell back for `reason`, or one that took the fast path."""
        if reason is None:
            self.ran += 1
        else:
            self.fell_back[reason] += 1

    def report(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"ran": self.ran, "fell_back": dict(self.fell_back)}


def first_reason(reasons: Mapping[str, Any]) -> str | None:
    """The first key whose value holds, in the order of the mapping."""
    return next((reason for reason, holds in reasons.items() if holds), None)


# What the compiled code that runs has to say, and `None` outside of it. Compiled code can add to a list that is empty
# when it begins; for a counter, it would be compiled anew for each of its values.
_NOTES: list[tuple[str, str | None]] | None = None


def note_in_graph(name: str, reason: str | None) -> None:
    """As `FastPath.record` of the fast path `name`, for code that is compiled."""
    if _NOTES is not None:
        _NOTES.append((name, reason))


@contextlib.contextmanager
def noted_in_graph(paths: Mapping[str, FastPath]) -> Iterator[None]:
    """Inside, compiled code runs that has fast paths in it; what it notes is counted by `paths` at the end."""
    global _NOTES
    _NOTES = []
    try:
        yield
    finally:
        notes, _NOTES = _NOTES, None
    for name, reason in notes:
        paths[name].record(reason)
