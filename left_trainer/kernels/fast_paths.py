"""What a run says about its fast paths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LINEAR_CROSS_ENTROPY = "linear_cross_entropy"
LORA_LINEAR = "lora_linear"
GELU = "gelu"
RMS_NORM = "rms_norm"
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
