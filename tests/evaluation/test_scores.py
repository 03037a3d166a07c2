"""One answer to which metrics are scores."""

from __future__ import annotations

from transformers import TrainerState

from left_trainer import LeftTrainingArguments
from left_trainer.evaluation.scores import is_quality, is_score, without_prefix
from left_trainer.trainer.model_card import build_model_card

LOGGED = {
    "epoch": 1.0,
    "step": 3,
    "eval_loss": 2.0,
    "eval_rougeL": 50.0,
    "eval_generated_length": 7.0,
    "eval_precisions": [1.0, 2.0],
    "eval_runtime": 1.0,
    "eval_samples_per_second": 4.0,
    "eval_num_tokens": 9.0,
    "eval_mean_token_accuracy": 0.5,
    "memory/eval_peak_bytes": 1,
}


def test_scores_are_told_from_timings_counters_and_figures_of_callbacks():
    metrics = without_prefix(LOGGED)
    assert [name for name in metrics if is_score(name)] == ["loss", "rougeL", "generated_length"]
    assert [name for name in metrics if is_quality(name)] == ["rougeL"]
    assert not is_score("memory/eval_peak_bytes")


def test_the_prefix_may_have_several_words():
    assert without_prefix({"my_split_runtime": 1.0, "my_split_loss": 2.0}) == {"runtime": 1.0, "loss": 2.0}
    assert without_prefix({"loss": 2.0}) == {"loss": 2.0}


def test_the_model_card_shows_the_scores(tmp_path):
    state = TrainerState(log_history=[{"loss": 3.0, "step": 3}, LOGGED])
    card = build_model_card(
        model_name="m",
        base_model="b",
        family="encoder_decoder",
        method=None,
        args=LeftTrainingArguments(output_dir=str(tmp_path), learning_rate=1e-3),
        log_history=state.log_history,
    )
    shown = str(card).split("Last evaluation, at step 3:")[1].split("Versions")[0].strip().splitlines()
    assert [line.split("|")[1].strip() for line in shown[2:]] == ["loss", "rougeL", "generated_length"]
