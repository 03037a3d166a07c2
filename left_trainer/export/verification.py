"""Whether an export writes what the trained model writes: the same prompts, greedy, answer by answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from left_trainer.export.greedy import Reference
from left_trainer.shown_text import one_line

VERIFICATION_FILE = "verification.json"
# Nats by which the trained model may prefer its own token to the one that an export writes instead. Sums in another
# order decide near ties; rounded weights move more, and then not every row has to hold to it.
EXACT, HALF, ROUNDED = 0.01, 0.25, 2.0
SHARE_BEYOND = 0.1
SHOWN = 5


@dataclass(frozen=True)
class Difference:
    """A prompt that an export answers otherwise.

    Args:
        row: Among the prompts.
        expected: What the trained model writes.
        written: What the export writes.
        gap: How much the trained model prefers its own token where the two part, in nats.
    """

    row: int
    expected: str
    written: str
    gap: float


@dataclass(frozen=True)
class Verification:
    """Of an export on test rows.

    Args:
        rows: That were compared.
        equal: Of these, with the same answer.
        tolerance: In nats; a difference with a smaller gap is one of rounding.
        differences: The others.
        runtime: That wrote the answers, with its version.
    """

    rows: int
    equal: int
    tolerance: float
    differences: tuple[Difference, ...]
    runtime: str

    @property
    def holds(self) -> bool:
        """Whether the differences can come from rounding alone."""
        beyond = sum(not difference.gap <= self.tolerance for difference in self.differences)  # nor may it be NaN
        return beyond <= (SHARE_BEYOND * self.rows if self.tolerance > EXACT else 0)

    @property
    def differs_often(self) -> bool:
        """Whether so many answers differ, if only by rounding, that a user should score the export."""
        return self.rows - self.equal > SHARE_BEYOND * self.rows

    def warning(self, precision: str) -> str:
        """What to do about `differs_often`.

        Args:
            precision: Of the weights.
        """
        return (
            f"Warning: {self.rows - self.equal} of {self.rows} answers are not those of the trained model. Weights in "
            f"{precision} explain that, as the model hardly prefers its own token where the answers part, but the "
            "scores of the run are not those of the export. Score its answers before you serve it, or keep more bits "
            "with --quantization."
        )

    def __str__(self) -> str:
        lines = [f"{self.equal} of {self.rows} answers are those of the trained model ({self.runtime}, greedy)."]
        for difference in self.differences[:SHOWN]:
            lines += [
                f"  row {difference.row}, where the model prefers its own token by {difference.gap:.3g} nats:",
                f"    trained:  {one_line(difference.expected)}",
                f"    exported: {one_line(difference.written)}",
            ]
        if len(self.differences) > SHOWN:
            lines.append(f"  and {len(self.differences) - SHOWN} more, in {VERIFICATION_FILE}")
        return "\n".join(lines)


def verify(reference: Reference, answers: Sequence[Sequence[int]], tolerance: float, runtime: str) -> Verification:
    """Compare what an export answered with what the trained model does.

    Args:
        reference: The trained model's answers.
        answers: Token ids that the export wrote for the same prompts, without start and end.
        tolerance: `EXACT`, `HALF` or `ROUNDED`.
        runtime: That wrote them.
    """
    pairs = zip(reference.texts(reference.answers), reference.texts(answers), strict=True)
    differences = [
        Difference(row, expected, written, reference.gap(row, answers[row]))
        for row, (expected, written) in enumerate(pairs)
        if expected != written
    ]
    rows = len(reference.inputs)
    return Verification(rows, rows - len(differences), tolerance, tuple(differences), runtime)
