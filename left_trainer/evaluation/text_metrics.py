"""From generated token ids to text, and from text to scores."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import EvalPrediction, PreTrainedTokenizerBase

from left_trainer.evaluation.named_metrics import SCORES, load_metric
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


METRICS_ATTRIBUTE = "metrics"  # of the function that `text_metrics` makes
TOKENIZER_ATTRIBUTE = "tokenizer"  # the same
DEFAULT_METRICS = ("rouge", "bleu", "chrf", "exact_match")


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: np.ndarray) -> list[str]:
    """Text of `(batch, sequence)` token ids; -100, which pads predictions and labels, is left out.

    The id -100 is not a token: decoding it as it stands overflows in fast tokenizers.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    cleaned = np.where(np.asarray(token_ids) < 0, pad, token_ids)
    return [text.strip() for text in tokenizer.batch_decode(cleaned, skip_special_tokens=True)]


def text_metrics(
    tokenizer: PreTrainedTokenizerBase, names: Sequence[str] = DEFAULT_METRICS
) -> Callable[[EvalPrediction], dict[str, float]]:
    """A `compute_metrics` for `predict_with_generate`.

    Predictions are compared with the text of the rows, where they were given as text, and else with the labels decoded.
    Of several sequences of a row the first one is scored.

    Args:
        tokenizer: Decodes predictions and labels.
        names: Metrics: `rouge`, `bleu`, `chrf`, `exact_match`, `distinct`, `accuracy`, `macro_f1`, or any name that
            `evaluate.load` knows.

    Returns:
        A function from predictions to scores in percent, with `generated_length`, the mean number of tokens that are
        not special.
    """
    others = {name: load_metric(name) for name in names if name not in SCORES}  # an unknown one is an error at once

    @functools.cache
    def metrics() -> list[Any]:
        return [others[name] if name in others else load_metric(name) for name in names]

    special = tokenizer.all_special_ids

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        token_ids = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        written = getattr(prediction, "references", None)
        references = decode(tokenizer, prediction.label_ids) if written is None else [text.strip() for text in written]
        token_ids = token_ids[:: max(1, len(token_ids) // max(1, len(references)))]
        predictions = decode(tokenizer, token_ids)
        scores: dict[str, float] = {}
        for metric in metrics():
            scores |= metric.compute(predictions=predictions, references=references) or {}
        # Beam search fills shorter rows with the end of sequence where the padding token's id is 0 (transformers 5.23).
        scores["generated_length"] = float(np.isin(token_ids, [*special, IGNORE_INDEX], invert=True).sum(axis=1).mean())
        return scores

    setattr(compute, METRICS_ATTRIBUTE, tuple(names))
    setattr(compute, TOKENIZER_ATTRIBUTE, tokenizer)
    return compute


def metrics_for(
    given: Callable[[EvalPrediction], dict[str, float]] | None, tokenizer: PreTrainedTokenizerBase
) -> Callable[[EvalPrediction], dict[str, float]]:
    """`given`, which decodes with `tokenizer` where `text_metrics` made it for another one; by default all metrics."""
    names = getattr(given, METRICS_ATTRIBUTE, DEFAULT_METRICS)
    is_other = getattr(given, TOKENIZER_ATTRIBUTE, tokenizer) is not tokenizer
    return text_metrics(tokenizer, names) if given is None or is_other else given
