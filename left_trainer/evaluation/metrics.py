"""Text metrics as `evaluate.Metric` classes that need no hub: `evaluate.load("rouge")` would download code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
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


class Distinct(TextMetric):
    """Distinct-1 and distinct-2 of the predictions, in percent: different n-grams over all n-grams of the corpus.

    Words are what white space separates. The references are not looked at: the score says whether a model has more
    to say than one answer to everything. It falls as a corpus grows, so compare equal numbers of rows only.
    """

    description = "distinct-1, distinct-2 in percent, over all predictions together"
    citation = "Li et al., 2016, arXiv 1510.03055"

    def _compute(self, predictions: list[str], references: list[str], **options: Any) -> dict[str, float]:
        words = [prediction.split() for prediction in predictions]
        scores = {}
        for size in (1, 2):
            ngrams = [tuple(row[i : i + size]) for row in words for i in range(len(row) - size + 1)]
            scores[f"distinct{size}"] = 100 * len(set(ngrams)) / max(1, len(ngrams))
        return scores


def _labels(texts: list[str]) -> list[str]:
    """Texts as labels. Case and white space around do not matter: a model has chosen the label all the same."""
    return [text.strip().casefold() for text in texts]


def most_frequent_share(texts: Sequence[str]) -> float:
    """Percent of `texts` that are their most frequent label: the accuracy of always answering with it."""
    return 100 * max(Counter(_labels(list(texts))).values()) / len(texts)


class Accuracy(TextMetric):
    """Percent of predictions that are the label of the reference; any other text is wrong."""

    description = "accuracy in percent, case ignored"

    def _compute(self, predictions: list[str], references: list[str], **options: Any) -> dict[str, float]:
        matches = [
            prediction == reference
            for prediction, reference in zip(_labels(predictions), _labels(references), strict=True)
        ]
        return {"accuracy": 100 * float(np.mean(matches))}


class MacroF1(TextMetric):
    """F1 of each label that occurs in the references, 2 TP / (2 TP + FP + FN), and their mean in percent.

    A prediction that is no label is a false negative of its reference's label and a false positive of none.
    """

    description = "macro-averaged F1 in percent over the labels of the references, case ignored"

    def _compute(self, predictions: list[str], references: list[str], **options: Any) -> dict[str, float]:
        predicted, expected = _labels(predictions), _labels(references)
        matches = Counter(label for label, other in zip(expected, predicted, strict=True) if label == other)
        n_expected, n_predicted = Counter(expected), Counter(predicted)
        scores = [2 * matches[label] / (n_expected[label] + n_predicted[label]) for label in n_expected]
        return {"macro_f1": 100 * float(np.mean(scores))}


METRICS: dict[str, Callable[[], evaluate.Metric]] = {
    "rouge": Rouge,
    "bleu": Bleu,
    "chrf": Chrf,
    "exact_match": ExactMatch,
    "distinct": Distinct,
    "accuracy": Accuracy,
    "macro_f1": MacroF1,
}


def load_metric(name: str) -> evaluate.Metric:
    """Our metric of that name, else the one that the Hugging Face hub or a local path has."""
    return METRICS[name]() if name in METRICS else evaluate.load(name)
