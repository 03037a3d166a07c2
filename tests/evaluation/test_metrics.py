"""Scores of known texts, and decoding of padded ids."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score
from transformers import EvalPrediction

from left_trainer import text_metrics
from left_trainer.evaluation.metrics import METRICS
from left_trainer.evaluation.named_metrics import SCORES, load_metric
from left_trainer.evaluation.text_metrics import decode


@pytest.mark.parametrize("name", sorted(set(METRICS) - {"distinct"}))
def test_a_perfect_prediction_scores_100_and_a_wrong_one_little(name):
    texts = ["the cat sat on the mat today", "a dog barked at the moon all night"]
    perfect = load_metric(name).compute(predictions=texts, references=texts)
    wrong = load_metric(name).compute(predictions=["xyz", "qqq"], references=texts)
    for key, value in perfect.items():
        assert value == pytest.approx(100)
        assert wrong[key] < 5


def test_rouge_against_a_value_worked_out_by_hand():
    # "the cat sat" against "the cat ran away": 2 unigrams of 3 and 4, 1 bigram of 2 and 3, common subsequence of 2.
    scores = load_metric("rouge").compute(predictions=["the cat sat"], references=["the cat ran away"])
    assert scores["rouge1"] == pytest.approx(100 * 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert scores["rouge2"] == pytest.approx(100 * 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert scores["rougeL"] == pytest.approx(scores["rouge1"])


def test_exact_match_ignores_white_space_around():
    scores = load_metric("exact_match").compute(predictions=[" a ", "b"], references=["a", "c"])
    assert scores == {"exact_match": 50.0}


def test_distinct_counts_ngrams_over_all_predictions():
    # 6 words of which 4 differ, 3 pairs of which 2 differ; the last row has no pair.
    texts = ["I do not", "I do", "know"]
    scores = load_metric("distinct").compute(predictions=texts, references=["x", "y", "z"])
    assert scores == {"distinct1": pytest.approx(100 * 4 / 6), "distinct2": pytest.approx(100 * 2 / 3)}
    assert load_metric("distinct").compute(predictions=[""], references=["x"]) == {"distinct1": 0, "distinct2": 0}


def test_classification_scores_equal_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    references = rng.choice(["good", "bad", "mixed"], 200, p=[0.6, 0.3, 0.1]).tolist()
    written = ["good", "bad", "mixed", "never a reference", ""]
    predictions = [ref if rng.random() < 0.5 else rng.choice(written) for ref in references]
    expected = f1_score(references, predictions, labels=sorted(set(references)), average="macro")
    assert load_metric("macro_f1").compute(predictions=predictions, references=references) == {
        "macro_f1": pytest.approx(100 * expected)
    }
    assert load_metric("accuracy").compute(predictions=predictions, references=references) == {
        "accuracy": pytest.approx(100 * accuracy_score(references, predictions))
    }


def test_labels_ignore_case_and_white_space_around_and_nothing_else():
    pairs = {"predictions": [" Good ", "BAD", "goodness"], "references": ["good", "bad", "good"]}
    assert load_metric("accuracy").compute(**pairs)["accuracy"] == pytest.approx(200 / 3)


def test_padding_ids_are_decoded_safely(tokenizers):
    tokenizer = tokenizers["encoder_decoder"]
    ids = tokenizer("and so on", add_special_tokens=False)["input_ids"]
    padded = np.array([[*ids, 1, -100, -100], [*ids, 0, 0, -100]])
    assert decode(tokenizer, padded) == ["and so on", "and so on"]
    scores = text_metrics(tokenizer)(EvalPrediction(predictions=padded, label_ids=padded))
    assert scores["exact_match"] == 100
    assert scores["generated_length"] == len(ids)


def test_the_scores_of_each_metric_are_known_without_it():
    assert SCORES.keys() == METRICS.keys()
    for name, scores in SCORES.items():
        assert tuple(load_metric(name).compute(predictions=["a", "b"], references=["a", "b"])) == scores
