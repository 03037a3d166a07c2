"""What the arguments ask for and cannot be had here is refused before weights are loaded."""

from __future__ import annotations

import pytest

from left_trainer import LeftTrainer
from tiny import tiny_model


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"report_to": "mlflow"}, "report_to='mlflow' needs a package"),
        ({"optim": "galore_adamw"}, "optim='galore_adamw' needs a package"),
        ({"optim_args": "x"}, "optim_args='x' cannot be used"),
        ({"use_liger_kernel": True}, "needs the package liger-kernel"),
        ({"resume_from_checkpoint": "nowhere"}, "resume_from_checkpoint='nowhere' does not exist"),
        ({"resume_from_checkpoint": "false"}, "resume_from_checkpoint='false' names no checkpoint"),
        ({"generation_num_beams": 500}, "must be below the 300 tokens"),
        ({"generation_config": "nowhere"}, "generation_config='nowhere' does not exist"),
        ({"predict_with_generate": True, "metric_for_best_model": "rougel"}, "Did you mean 'rougeL'"),
        ({"metric_for_best_model": "f1"}, "metric_for_best_model='f1' is not computed"),
        ({"peft_kwargs": {"r": 1000}}, "r=1000 is more than the largest side"),
        ({"peft_kwargs": {"target_modules": ["shared"]}}, "would never be used"),
        ({"peft_method": "c3a", "peft_kwargs": {"block_size": 3}}, "peft_method='c3a' does not fit the model"),
    ],
)
def test_refused_before_weights_load(values, message, rows, make_args, saved_models, no_weights):
    with pytest.raises((ValueError, OSError), match=message):
        LeftTrainer(str(saved_models["encoder_decoder"]), make_args(**values), train_dataset=rows, eval_dataset=rows)


def test_answers_longer_than_the_positions_of_the_decoder(rows, make_args, tmp_path, tokenizers, no_weights):
    tiny_model("bart").save_pretrained(tmp_path / "bart")
    tokenizers["encoder_decoder"].save_pretrained(tmp_path / "bart")
    with pytest.raises(ValueError, match=r"generation_max_length=4000 .* must be below the 128 positions"):
        LeftTrainer(str(tmp_path / "bart"), make_args(generation_max_length=4000), train_dataset=rows)


def test_fields_that_are_set_after_construction_are_checked_too(rows, make_args, saved_models, no_weights):
    args = make_args()
    args.num_train_epochs = -1
    with pytest.raises(ValueError, match="num_train_epochs=-1 must be above 0"):
        LeftTrainer(str(saved_models["encoder_decoder"]), args, train_dataset=rows)
