"""A run whose loss or gradients are no longer finite stops, says so, and keeps what was good."""

from __future__ import annotations

import json
import math

import pytest
import torch
from datasets import Dataset

from left_trainer import LeftTrainer, TrainingDivergedError
from left_trainer.cli.main import main
from left_trainer.models import FAMILIES
from left_trainer.models.wrapping import without_adapter
from log_history import losses
from tiny import FAMILY_TYPES, tiny_model, tiny_rows

DIVERGES_AT = 3


@pytest.fixture(params=FAMILIES)
def make_trainer(request, make_args, tokenizers):
    family = request.param

    def make(**options):
        return LeftTrainer(
            tiny_model(FAMILY_TYPES[family]),
            make_args(save_strategy="steps", save_steps=1, logging_steps=1, **options),
            train_dataset=Dataset.from_list(tiny_rows()),
            processing_class=tokenizers[family],
        )

    return make


def spoil(trainer, what, value):
    """Make the loss or a gradient `value` from a step on."""
    true_step = trainer.compute_loss

    def compute_loss(*args, **kwargs):
        loss = true_step(*args, **kwargs)
        if trainer.state.global_step + 1 >= DIVERGES_AT and what == "loss":
            loss = loss * value
        return loss

    def gradient(grad):
        return torch.full_like(grad, value) if trainer.state.global_step + 1 >= DIVERGES_AT else grad

    trainer.compute_loss = compute_loss
    if what == "gradient":
        next(p for p in trainer.model.parameters() if p.requires_grad).register_hook(gradient)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_run_stops_before_the_step_and_keeps_the_checkpoint(make_trainer, what, value, tmp_path):
    trainer = make_trainer(learning_rate=0.25, lr_scheduler_type="constant", gradient_accumulation_steps=2)
    spoil(trainer, what, value)
    with pytest.raises(
        TrainingDivergedError, match=rf"diverged at step {DIVERGES_AT}: .*learning rate of 0.25"
    ) as error:
        trainer.train()
    assert (error.value.step, error.value.learning_rate) == (DIVERGES_AT, 0.25)
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    saved = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert saved == ["checkpoint-1", "checkpoint-2"]


def test_it_goes_on_where_the_user_wants_that(make_trainer):
    trainer = make_trainer(stop_on_divergence=False)
    spoil(trainer, "loss", math.nan)
    trainer.train()
    assert trainer.state.global_step == trainer.args.max_steps
    assert 0.0 in losses(trainer)


def test_a_skipped_step_of_the_scaler_of_float16_is_no_divergence(make_trainer):
    trainer = make_trainer()
    trainer.accelerator.scaler = object()
    trainer._divergence.check(trainer, torch.tensor(math.inf))
    trainer.optimizer = torch.optim.SGD(without_adapter(trainer.model).parameters(), lr=0.5)
    trainer._divergence.see_loss(torch.tensor(math.nan))
    with pytest.raises(TrainingDivergedError, match="the loss is nan"):
        trainer._divergence.check(trainer, torch.tensor(1.0))


def test_the_command_says_so_and_the_report_too(tmp_path, capsys):
    flags = ["--max_train_samples", "64", "--max_eval_samples", "4", "--learning_rate", "1e30", "--peft_method", "full"]
    assert main(["train", *flags, "--output_dir", str(tmp_path / "run")]) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("left-trainer: error: Training diverged at step ")
    report = json.loads((tmp_path / "run" / "training_report.json").read_text())
    assert report["diverged_at_step"] == report["train_steps"] + 1
    assert report["metrics"]["after"] is None
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"diverged at step {report['diverged_at_step']}" in card
    assert not list((tmp_path / "run").glob("*.safetensors"))
