"""What a model reaches that learned nothing from its input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from left_trainer.evaluation.labels import as_labels


def majority_share(references: Sequence[str]) -> float | None:
    """Percent of the references that are the most frequent label: the accuracy of always answering with it.

    Labels are told apart as accuracy tells them apart, without regard to case. `None` for no references.
    """
    counts = Counter(as_labels(references))
    return 100 * max(counts.values()) / len(references) if counts else None
