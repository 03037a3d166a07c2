"""Text metrics as `evaluate.Metric` classes that need no hub: `evaluate.load("rouge")` would download code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from rouge_score import rouge_scorer
from sacrebleu.metrics import BLEU, CHRF

from left_trainer.evaluation.intervals import RowScorer
from left_trainer.evaluation.labels import as_labels

TEXT_PAIR = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})


class TextMetric(evaluate.Metric):
    """A metric over pairs of predicted and reference text, each score between 0 and 100.

    A subclass gives `row_scorers`, or `_compute` where its scores cannot be had of some of the rows.
    """

    description = ""
    citation = ""

    def row_scorers(self, predictions: list[str], references: list[str]) -> dict[str, RowScorer]:
        """For each score, what computes it for any of the rows: what can be done once for each row is done here."""
        return {}

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description, citation=self.citation, inputs_description="", features=TEXT_PAIR
        )

    def _compute(self, predictions: list[str], references: list[str], **options: Any) -> dict[str, float]:
        rows = np.arange(len(predictions))
        return {name: scorer(rows) for name, scorer in self.row_scorers(predictions, references).items()}


class Rouge(TextMetric):
    """ROUGE-1, ROUGE-2 and ROUGE-L: F1 of n-gram overlap and of the longest common subsequence, in percent."""

    description = "ROUGE-1, ROUGE-2, ROUGE-L F1 in percent, Porter-stemmed"
    citation = "Lin, 2004. ROUGE: A Package for Automatic Evaluation of Summaries."

    def row_scorers(self, predictions: list[str], references: list[str]) -> dict[str, RowScorer]:
        """Means over rows."""
        names = ["rouge1", "rouge2", "rougeL"]
        scorer = rouge_scorer.RougeScorer(names, use_stemmer=True)
        scores = [
            scorer.score(reference, prediction) for reference, prediction in zip(references, predictions, strict=True)
        ]
        return {name: _mean_percent([score[name].fmeasure for score in scores]) for name in names}


class Bleu(TextMetric):
    """Corpus BLEU in percent, as sacreBLEU computes it (13a tokenization, exponential smoothing)."""

    description = "corpus BLEU, sacreBLEU defaults"
    citation = "Post, 2018, arXiv 1804.08771"

    def row_scorers(self, predictions: list[str], references: list[str]) -> dict[str, RowScorer]:
        """Of the counts of n-grams summed over rows."""
        return {"bleu": _of_summed_counts(BLEU(), predictions, references)}


class Chrf(TextMetric):
    """Corpus chrF in percent: F-score of character n-grams, recall weighted twice."""

    description = "corpus chrF, sacreBLEU defaults"
    citation = "Popovic, 2015, W15-3049"

    def row_scorers(self, predictions: list[str], references: list[str]) -> dict[str, RowScorer]:
        """Of the counts of n-grams summed over rows."""
        return {"chrf": _of_summed_counts(CHRF(), predictions, references)}


class ExactMatch(TextMetric):
    """Percent of predictions that equal their reference, ignoring white space around them."""

    description = "exact match in percent"

    def row_scorers(self, predictions: list[str], references: list[str]) -> dict[str, RowScorer]:
        """The mean over rows."""
        pairs = zip(predictions, references, strict=True)
        return {
            "exact_match": _mean_percent([prediction.strip() == reference.strip() for prediction, reference in pairs])
        }


class Distinct(TextMetric):
    """Distinct-1 and distinct-2 of the predictions, in percent: different n-grams over all n-grams of the corpus.

    Words are what white space separates. The references are not looked at: the score says whether a model has more
    to say than one answer to everything. It falls as a corpus grows, so compare equal numbers of rows only. It has no
    interval over rows: rows that are drawn twice repeat their n-grams, so every resample scores less than the rows do.
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


class Accuracy(TextMetric):
    """Percent of predictions that are the label of the reference; any other text is wrong."""

    description = "accuracy in percent, case ignored"

    def row_scorers(self, predictions: list[str], references: list[str]) -> dict[str, RowScorer]:
        """The mean over rows."""
        pairs = zip(as_labels(predictions), as_labels(references), strict=True)
        return {"accuracy": _mean_percent([prediction == reference for prediction, reference in pairs])}


class MacroF1(TextMetric):
    """F1 of each label that occurs in the references, 2 TP / (2 TP + FP + FN), and their mean in percent.

    A prediction that is no label is a false negative of its reference's label and a false positive of none.
    """

    description = "macro-averaged F1 in percent over the labels of the references, case ignored"

    def row_scorers(self, predictions: list[str], references: list[str]) -> dict[str, RowScorer]:
        """Of the counts of labels."""
        predicted, expected = as_labels(predictions), as_labels(references)
        numbers = {label: number for number, label in enumerate(dict.fromkeys(expected))}
        no_label = len(numbers)
        reference_ids = np.array([numbers[label] for label in expected], dtype=int)
        prediction_ids = np.array([numbers.get(label, no_label) for label in predicted], dtype=int)

        def score(rows: np.ndarray) -> float:
            given, wanted = prediction_ids[rows], reference_ids[rows]
            n_wanted, n_given, n_matches = (
                np.bincount(ids, minlength=no_label + 1) for ids in (wanted, given, wanted[wanted == given])
            )
            labels = np.flatnonzero(n_wanted)
            return 100 * float(np.mean(2 * n_matches[labels] / (n_wanted[labels] + n_given[labels])))

        return {"macro_f1": score}


def _mean_percent(values: Sequence[float]) -> RowScorer:
    figures = np.array(values, dtype=float)
    return lambda rows: 100 * float(np.mean(figures[rows]))


def _of_summed_counts(metric: Any, predictions: list[str], references: list[str]) -> RowScorer:
    """A corpus score of sacreBLEU; its public interface counts the n-grams of all rows again for every score."""
    counts = np.array(metric._extract_corpus_statistics(predictions, [references]))
    return lambda rows: float(metric._compute_score_from_stats(counts[rows].sum(axis=0).tolist()).score)


METRICS: dict[str, Callable[[], evaluate.Metric]] = {
    "rouge": Rouge,
    "bleu": Bleu,
    "chrf": Chrf,
    "exact_match": ExactMatch,
    "distinct": Distinct,
    "accuracy": Accuracy,
    "macro_f1": MacroF1,
}
