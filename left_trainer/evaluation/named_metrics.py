"""Metrics by name, without what computes them: importing `evaluate`, `rouge_score` and `sacrebleu` takes a second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from left_trainer.evaluation.intervals import Interval, over_rows
from left_trainer.models.hub import asking_hub
from left_trainer.registry import did_you_mean

if TYPE_CHECKING:
    import evaluate

# Scores of each metric of `left_trainer.evaluation.metrics`.
SCORES: Mapping[str, tuple[str, ...]] = {
    "rouge": ("rouge1", "rouge2", "rougeL"),
    "bleu": ("bleu",),
    "chrf": ("chrf",),
    "exact_match": ("exact_match",),
    "distinct": ("distinct1", "distinct2"),
    "accuracy": ("accuracy",),
    "macro_f1": ("macro_f1",),
}


def load_metric(name: str) -> evaluate.Metric:
    """Our metric of that name, else the one that the Hugging Face hub or a local path has.

    Raises:
        ValueError: There is none, or the hub cannot be asked.
    """
    if name in SCORES:
        from left_trainer.evaluation.metrics import METRICS

        return METRICS[name]()
    import evaluate

    try:
        with asking_hub("metric", name, "space"):
            return evaluate.load(name)
    except FileNotFoundError as error:
        raise ValueError(
            f"metric={name!r} is neither one of ours ({', '.join(SCORES)}) nor one of the Hugging Face hub that can be "
            f"read here.{did_you_mean(name, SCORES)}"
        ) from error


def score_names(names: Sequence[str]) -> tuple[str, ...] | None:
    """The scores that metrics compute, `rougeL` of `rouge`; `None` where one of them is not ours."""
    if any(name not in SCORES for name in names):
        return None
    return tuple(score for name in names for score in SCORES[name])


def score_interval(names: Sequence[str], score: str, predictions: list[str], references: list[str]) -> Interval | None:
    """95 % interval of one score over the rows of an evaluation.

    Args:
        names: Of metrics.
        score: One that they compute, such as `rougeL` of `rouge`.
        predictions: Texts, one for each row.
        references: Theirs.

    Returns:
        `None` for a score of the hub's metrics, which can be had of all rows only, and for fewer than two rows.
    """
    from left_trainer.evaluation.metrics import METRICS, TextMetric

    for name in (name for name in names if score in SCORES.get(name, ())):
        metric = METRICS[name]()
        scorer = metric.row_scorers(predictions, references).get(score) if isinstance(metric, TextMetric) else None
        return None if scorer is None else over_rows(scorer, len(predictions))
    return None
