"""From generated token ids to text, and from text to scores."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import EvalPrediction, PreTrainedTokenizerBase

from left_trainer.evaluation.named_metrics import SCORES, load_metric, score_names
from left_trainer.token_mean import IGNORE_INDEX


class TextPrediction(EvalPrediction):
    """An `EvalPrediction` that also knows the text of the references.

    Args:
        args: Those of `EvalPrediction`: predictions, labels, inputs and losses.
        references: Of each row, as the user wrote it; `None` where the rows were given as tokens.
    """

    def __init__(self, *args: Any, references: Sequence[str] | None = None) -> None:
        super().__init__(*args)
        self.references = references


DEFAULT_METRICS = ("rouge", "bleu", "chrf", "exact_match")


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: np.ndarray) -> list[str]:
    """Text of `(batch, sequence)` token ids; -100, which pads predictions and labels, is left out.

    The id -100 is not a token: decoding it as it stands overflows in fast tokenizers.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    cleaned = np.where(np.asarray(token_ids) < 0, pad, token_ids)
    return [text.strip() for text in tokenizer.batch_decode(cleaned, skip_special_tokens=True)]


class TextMetrics:
    """A `compute_metrics` for `predict_with_generate`; arguments as in `text_metrics`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, names: Sequence[str], main: str | None) -> None:
        self.tokenizer, self.names, self.main = tokenizer, tuple(names), main
        self._others = {name: load_metric(name) for name in names if name not in SCORES}  # an unknown one is an error

    @functools.cached_property
    def _metrics(self) -> list[Any]:
        return [self._others[name] if name in self._others else load_metric(name) for name in self.names]

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """The scores."""
        token_ids = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        written = getattr(prediction, "references", None)
        of_labels = functools.partial(decode, self.tokenizer, prediction.label_ids)
        references = of_labels() if written is None else [text.strip() for text in written]
        token_ids = token_ids[:: max(1, len(token_ids) // max(1, len(references)))]
        predictions = decode(self.tokenizer, token_ids)
        scores: dict[str, float] = {}
        for metric in self._metrics:
            scores |= metric.compute(predictions=predictions, references=references) or {}
        return {**scores, "generated_length": generated_length(token_ids, self.tokenizer)}


def known_scores(compute_metrics: Any, generates: bool) -> tuple[str, ...] | None:
    """Names of the scores that an evaluation gives; `None` where only the user knows.

    Args:
        compute_metrics: As `LeftTrainer` takes it; `None` for the default.
        generates: Whether the evaluation generates text.
    """
    if compute_metrics is None:
        return score_names(DEFAULT_METRICS if generates else ())
    return score_names(compute_metrics.names) if isinstance(compute_metrics, TextMetrics) else None


def generated_length(token_ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> float:
    """Mean number of tokens in rows of `(batch, sequence)` that are not special."""
    # Beam search fills shorter rows with the end of sequence where the padding token's id is 0 (transformers 5.23).
    no_text = [*tokenizer.all_special_ids, IGNORE_INDEX]
    return float(np.isin(token_ids, no_text, invert=True).sum(axis=1).mean())


def text_metrics(
    tokenizer: PreTrainedTokenizerBase, names: Sequence[str] = DEFAULT_METRICS, main: str | None = None
) -> TextMetrics:
    """A `compute_metrics` for `predict_with_generate`.

    Predictions are compared with the text of the rows, where they were given as text, and else with the labels decoded.
    Of several sequences of a row the first one is scored.

    Args:
        tokenizer: Decodes predictions and labels.
        names: Metrics: `rouge`, `bleu`, `chrf`, `exact_match`, `distinct`, `accuracy`, `macro_f1`, or any name that
            `evaluate.load` knows.
        main: The score among theirs that says how good a model is, for pictures.

    Returns:
        A function from predictions to scores in percent, with `generated_length`, the mean number of tokens that are
        not special.
    """
    return TextMetrics(tokenizer, names, main)


def metrics_for(
    given: Callable[[EvalPrediction], dict[str, float]] | None, tokenizer: PreTrainedTokenizerBase
) -> Callable[[EvalPrediction], dict[str, float]]:
    """`given`, which decodes with `tokenizer` where `text_metrics` made it for another one; by default all metrics."""
    if given is None:
        return text_metrics(tokenizer)
    if isinstance(given, TextMetrics) and given.tokenizer is not tokenizer:
        return text_metrics(tokenizer, given.names, given.main)
    return given
