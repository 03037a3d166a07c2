"""Text metrics as `evaluate.Metric` classes that need no hub: `evaluate.load("rouge")` would download code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import numpy as np
import sacrebleu
from rouge_score import rouge_scorer

TEXT_PAIR = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})


class TextMetric(evaluate.Metric):
    """A metric over pairs of predicted and reference text, each score between 0 and 100."""

    description = ""
    citation = ""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description, citation=self.citation, inputs_description="", features=TEXT_PAIR
        )


class Rouge(TextMetric):
    """ROUGE-1, ROUGE-2 and ROUGE-L: F1 of n-gram overlap and of the longest common subsequence, in percent."""

    description = "ROUGE-1, ROUGE-2, ROUGE-L F1 in percent, Porter-stemmed"
    citation = "Lin, 2004. ROUGE: A Package for Automatic Evaluation of Summaries."

    def _compute(self, predictions: list[str], references: list[str], **options: Any) -> dict[str, float]:
        names = ["rouge1", "rouge2", "rougeL"]
        scorer = rouge_scorer.RougeScorer(names, use_stemmer=True)
        scores = [
            scorer.score(reference, prediction) for reference, prediction in zip(references, predictions, strict=True)
        ]
        return {name: 100 * float(np.mean([score[name].fmeasure for score in scores])) for name in names}


class Bleu(TextMetric):
    """Corpus BLEU in percent, as sacreBLEU computes it (13a tokenization, exponential smoothing)."""

    description = "corpus BLEU, sacreBLEU defaults"
    citation = "Post, 2018, arXiv 1804.08771"

    def _compute(self, predictions: list[str], references: list[str], **options: Any) -> dict[str, float]:
        return {"bleu": sacrebleu.corpus_bleu(predictions, [references]).score}


class Chrf(TextMetric):
    """Corpus chrF in percent: F-score of character n-grams, recall weighted twice."""

    description = "corpus chrF, sacreBLEU defaults"
    citation = "Popovic, 2015, W15-3049"

    def _compute(self, predictions: list[str], references: list[str], **options: Any) -> dict[str, float]:
        return {"chrf": sacrebleu.corpus_chrf(predictions, [references]).score}


class ExactMatch(TextMetric):
    """Percent of predictions that equal their reference, ignoring white space around them."""

    description = "exact match in percent"

    def _compute(self, predictions: list[str], references: list[str], **options: Any) -> dict[str, float]:
        matches = [
            prediction.strip() == reference.strip()
            for prediction, reference in zip(predictions, references, strict=True)
        ]
        return {"exact_match": 100 * float(np.mean(matches))}


METRICS: dict[str, Callable[[], evaluate.Metric]] = {
    "rouge": Rouge,
    "bleu": Bleu,
    "chrf": Chrf,
    "exact_match": ExactMatch,
}


def load_metric(name: str) -> evaluate.Metric:
    """Our metric of that name, else the one that the Hugging Face hub or a local path has."""
    return METRICS[name]() if name in METRICS else evaluate.load(name)
