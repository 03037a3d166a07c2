"""Which of the figures that an evaluation returns are scores, for reports, model cards and comparisons alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# What Trainer and SFTTrainer add to the metrics of an evaluation.
BOOKKEEPING = (
    "runtime",
    "samples_per_second",
    "steps_per_second",
    "tokens_per_second",
    "model_preparation_time",
    "num_tokens",
    "entropy",
    "mean_token_accuracy",
)
# Figures beside the metrics of a task, of which more is not better.
NOT_QUALITY = ("loss", "generated_length")
# Scores of metrics on the hub of which less is better.
LOWER_IS_BETTER: tuple[str, ...] = ("loss", "wer", "cer", "mer", "wil", "ter", "perplexity", "mean_perplexity")
LOWER_IS_BETTER += ("mse", "rmse", "mae", "mape", "smape", "mase", "brier_score", "toxicity_ratio", "max_toxicity")


def is_score(name: str) -> bool:
    """Whether a metric, named without its prefix, says how good the model is.

    Timings and counters do not, nor do the figures of callbacks, whose keys have a group: `memory/...`.
    """
    return name not in BOOKKEEPING and "/" not in name


def is_quality(name: str) -> bool:
    """Whether a metric, named without its prefix, is a score by which models are compared."""
    return is_score(name) and name not in NOT_QUALITY


def is_lower_better(name: str, lower_is_better: Sequence[str] = ()) -> bool:
    """Whether less of a score, named without its prefix, is better.

    Args:
        name: Of the score.
        lower_is_better: Those of the task, beside the error rates that are known.
    """
    return name in lower_is_better or name in LOWER_IS_BETTER


def without_prefix(metrics: Mapping[str, Any], prefix: str | None = None) -> dict[str, float]:
    """The numbers among the metrics of one evaluation, without the prefix that `evaluate` puts before each name.

    Args:
        metrics: As `evaluate` or `predict` returns or logs them. Names without the prefix are left out, and so is what
            is not a number: some metrics of the hub return lists.
        prefix: `eval_`, `test_`, ...; by default that of the runtime, which is always there.
    """
    if prefix is None:
        prefix = next((name.removesuffix("runtime") for name in metrics if name.endswith("_runtime")), "")
    return {
        name.removeprefix(prefix): value
        for name, value in metrics.items()
        if name.startswith(prefix) and isinstance(value, (int, float))
    }
