"""Intervals over seeds and over rows, against scipy and against what each resample scores when it is scored anew."""

from __future__ import annotations

import random
import statistics

import numpy as np
import pytest

from left_trainer.evaluation.baselines import majority_share
from left_trainer.evaluation.intervals import (
    N_RESAMPLES,
    RESAMPLING_SEED,
    Interval,
    over_rows,
    over_seeds,
    student_quantile,
)
from left_trainer.evaluation.metrics import METRICS
from left_trainer.evaluation.named_metrics import load_metric, score_interval

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "mat", "moon", "night", "good", "bad"]
REFERENCES = [" ".join(random.Random(row).choices(WORDS, k=1 + row % 6)) for row in range(60)]
PREDICTIONS = [text if row % 3 else " ".join(reversed(text.split())) for row, text in enumerate(REFERENCES)]


def test_quantiles_are_those_of_students_t_for_any_number_of_seeds():
    stats = pytest.importorskip("scipy.stats", reason="comes with scikit-learn")
    for degrees in (*range(1, 121), 1000, 1001):
        assert student_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-6)


def test_an_interval_over_seeds():
    values = [50.0, 60.0, 70.0]
    half = 4.302652730 * statistics.stdev(values) / 3**0.5
    assert over_seeds(values) == Interval(pytest.approx(60 - half), pytest.approx(60 + half))
    assert over_seeds(values[:1]) is over_seeds([]) is None


@pytest.mark.parametrize("name", sorted(set(METRICS) - {"distinct"}))
def test_a_resample_scores_what_its_rows_score_together(name):
    """Corpus scores too: BLEU, chrF and macro F1 are not the means of their rows."""
    scorers = METRICS[name]().row_scorers(PREDICTIONS, REFERENCES)
    rows = np.random.default_rng(1).integers(len(REFERENCES), size=len(REFERENCES))
    drawn = {"predictions": [PREDICTIONS[row] for row in rows], "references": [REFERENCES[row] for row in rows]}
    assert {key: scorer(rows) for key, scorer in scorers.items()} == pytest.approx(load_metric(name).compute(**drawn))


def test_an_interval_over_rows_is_the_percentile_bootstrap():
    rng = np.random.default_rng(RESAMPLING_SEED)
    draws = [rng.integers(60, size=60) for _ in range(N_RESAMPLES)]
    correct = np.array([a == b for a, b in zip(PREDICTIONS, REFERENCES, strict=True)])
    low, high = np.percentile([100 * correct[rows].mean() for rows in draws], [2.5, 97.5])
    interval = score_interval(["rouge", "exact_match"], "exact_match", PREDICTIONS, REFERENCES)
    assert interval == Interval(pytest.approx(low), pytest.approx(high))
    assert interval.low < 100 * correct.mean() < interval.high


def test_what_cannot_be_resampled_has_no_interval():
    assert score_interval(["distinct"], "distinct1", PREDICTIONS, REFERENCES) is None
    assert score_interval(["bertscore"], "f1", PREDICTIONS, REFERENCES) is None
    assert over_rows(lambda rows: 1.0, 1) is None


def test_the_majority_label_is_counted_as_accuracy_counts():
    references = ["good", "Good ", "bad", "mixed"]
    always = load_metric("accuracy").compute(predictions=["good"] * 4, references=references)["accuracy"]
    assert majority_share(references) == always == 50
    assert majority_share([]) is None
