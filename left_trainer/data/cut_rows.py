"""How many rows were too long, as a record and in a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class CutRows:
    """How many rows of a split were too long.

    Args:
        rows: All of the split.
        sources: Of which the source, or the prompt, was cut.
        targets: Of which the target was cut.
        dropped: That were left without a target, and are not used.
    """

    rows: int
    sources: int = 0
    targets: int = 0
    dropped: int = 0

    def __bool__(self) -> bool:
        """Whether there is anything to say."""
        return bool(self.sources or self.targets or self.dropped)

    def __str__(self) -> str:
        """`12 of 65 sources, 1 of 65 targets`."""
        parts = [
            f"{count} of {self.rows} {name}"
            for name, count in (("sources", self.sources), ("targets", self.targets))
            if count
        ]
        dropped = f" ({self.dropped} rows dropped, which kept no target)" if self.dropped else ""
        return ", ".join(parts) + dropped


def describe_cuts(counts: Mapping[str, CutRows]) -> str | None:
    """One sentence on all splits in which something was cut; `None` where there is none."""
    told = [f"{counted} of the {split} rows" for split, counted in counts.items() if counted]
    return f"Texts that are too long were cut: {'; '.join(told)}." if told else None
