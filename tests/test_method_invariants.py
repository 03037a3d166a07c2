"""What has to hold for every registered method on every model family that it claims."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import losses, tiny_rows, tiny_tokenizer
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback

from left_trainer import LeftTrainer, LeftTrainingArguments, get_method, list_methods
from left_trainer.models import auto_class

CASES = [(method.name, family) for method in list_methods() for family in method.model_families]
# Options that make a method learn something on models of a few thousand parameters, in a few steps.
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"learning_rate": 2e-2},
    "ia3": {"learning_rate": 5e-2},
    "prompt_tuning": {"peft_kwargs": {"num_virtual_tokens": 4}, "learning_rate": 3e-1},
    "p_tuning": {"peft_kwargs": {"num_virtual_tokens": 4, "encoder_hidden_size": 16}, "learning_rate": 2e-2},
    "prefix_tuning": {"peft_kwargs": {"num_virtual_tokens": 4}, "learning_rate": 1e-1},
    "full": {"learning_rate": 1e-2},
}
TOTAL_STEPS = 8
SCORES = ("rouge1", "rouge2", "rougeL", "bleu", "chrf", "exact_match")
RELOAD = """
import json, sys, torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
torch.set_num_threads(1)
logits = {}
for case in json.loads(sys.argv[1]):
    auto = AutoModelForSeq2SeqLM if case["family"] == "encoder_decoder" else AutoModelForCausalLM
    if case["adapter"]:
        model = PeftModel.from_pretrained(auto.from_pretrained(case["base"]), case["path"])
    else:
        model = auto.from_pretrained(case["path"])
    inputs = {name: torch.tensor(value) for name, value in case["inputs"].items()}
    with torch.no_grad():
        logits[case["name"]] = model.eval()(**inputs).logits.contiguous()
save_file(logits, sys.argv[2])
"""


def make_trainer(method: str, family: str, output_dir: Path, saved: Path, **overrides: Any) -> LeftTrainer:
    options: dict[str, Any] = {
        "output_dir": str(output_dir),
        "peft_method": method,
        "max_steps": TOTAL_STEPS,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 4,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
        "lr_scheduler_type": "constant",
        **SETTINGS[method],
        **overrides,
    }
    rows = Dataset.from_list(tiny_rows())
    return LeftTrainer(
        auto_class(family).from_pretrained(saved),
        LeftTrainingArguments(**options),
        train_dataset=rows,
        eval_dataset=rows.select(range(8)),
        processing_class=tiny_tokenizer(family),
    )


def example(family: str) -> dict[str, list[list[int]]]:
    inputs = {"input_ids": [[5, 6, 7, 8, 9]], "attention_mask": [[1, 1, 1, 1, 1]]}
    return inputs | ({"decoder_input_ids": [[0, 11, 12]]} if family == "encoder_decoder" else {})


def logits_of(trainer: LeftTrainer) -> torch.Tensor:
    inputs = {name: torch.tensor(value) for name, value in example(trainer.family).items()}
    with torch.no_grad():
        return trainer.model.eval()(**inputs).logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory, saved_models):
    """Every case trained once, saved, with the logits it gave."""
    runs = {}
    for method, family in CASES:
        trainer = make_trainer(method, family, tmp_path_factory.mktemp(f"{method}-{family}"), saved_models[family])
        before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
        trainer.train()
        trainer.save_model()
        runs[method, family] = (trainer, before, logits_of(trainer))
    return runs


def test_every_method_has_settings():
    assert {method.name for method in list_methods()} == set(SETTINGS)


@pytest.mark.parametrize(("method", "family"), CASES)
def test_exactly_the_methods_parameters_move(method, family, trained):
    trainer, before, _ = trained[method, family]
    for name, parameter in trainer.model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        # A sinusoidal table or an unused embedding row can stand still; frozen weights must.
        assert moved == parameter.requires_grad, name
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32


@pytest.mark.parametrize(("method", "family"), CASES)
def test_loss_falls(method, family, trained, tmp_path, saved_models):
    trainer = make_trainer(method, family, tmp_path, saved_models[family], max_steps=30, save_strategy="no")
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < first - 0.02


def test_adapters_reload_in_a_fresh_process(trained, tmp_path, saved_models):
    cases = [
        {
            "name": f"{method}-{family}",
            "family": family,
            "adapter": get_method(method).config_class is not None,
            "base": str(saved_models[family]),
            "path": trainer.args.output_dir,
            "inputs": example(family),
        }
        for (method, family), (trainer, _, _) in trained.items()
    ]
    output = tmp_path / "logits.safetensors"
    subprocess.run([sys.executable, "-c", RELOAD, json.dumps(cases), str(output)], check=True, capture_output=True)
    reloaded = load_file(output)
    for (method, family), (_, _, expected) in trained.items():
        torch.testing.assert_close(reloaded[f"{method}-{family}"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("method", "family"), CASES)
def test_resumed_run_equals_uninterrupted_run(method, family, trained, tmp_path, saved_models):
    expected, _, logits = trained[method, family]
    interrupted = make_trainer(method, family, tmp_path, saved_models[family])
    interrupted.add_callback(StopAt(5))
    interrupted.train()
    assert interrupted.state.global_step == 5
    resumed = make_trainer(method, family, tmp_path, saved_models[family])
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == TOTAL_STEPS
    assert losses(resumed) == pytest.approx(losses(expected), rel=1e-6)
    torch.testing.assert_close(logits_of(resumed), logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("method", "family"), CASES)
def test_best_model_is_the_one_that_was_measured(method, family, tmp_path, saved_models):
    trainer = make_trainer(
        method,
        family,
        tmp_path,
        saved_models[family],
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        # The reward for the highest loss makes an early step the best one, so that restoring is not a no-op.
        greater_is_better=True,
        metric_for_best_model="eval_loss",
    )
    trainer.train()
    assert trainer.state.best_global_step < TOTAL_STEPS
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)


@pytest.mark.parametrize(("method", "family"), CASES)
def test_generation_during_evaluation(method, family, tmp_path, saved_models):
    trainer = make_trainer(
        method, family, tmp_path, saved_models[family], predict_with_generate=True, generation_max_length=5
    )
    greedy, beam = trainer.evaluate(), trainer.evaluate(num_beams=2)
    for scores in (greedy, beam):
        assert {"eval_rouge1", "eval_rouge2", "eval_rougeL", "eval_bleu", "eval_chrf", "eval_exact_match"} <= set(
            scores
        )
        assert scores["eval_generated_length"] <= 6
    assert greedy["eval_loss"] == beam["eval_loss"]


@pytest.mark.filterwarnings("ignore:Unmerge result can be inaccurate")
@pytest.mark.parametrize(("method", "family"), CASES)
def test_merge_changes_no_logit(method, family, trained):
    trainer, _, expected = trained[method, family]
    if not isinstance(trainer.model, PeftModel):
        return
    if not get_method(method).mergeable:
        assert trainer.model.active_peft_config.is_prompt_learning
        return
    trainer.model.merge_adapter()
    torch.testing.assert_close(logits_of(trainer), expected, rtol=0, atol=1e-4)
    trainer.model.unmerge_adapter()
    torch.testing.assert_close(logits_of(trainer), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("method", "family"), CASES)
def test_gradient_checkpointing_trains_the_same_or_is_refused(method, family, trained, tmp_path, saved_models):
    if not get_method(method).gradient_checkpointing:
        with pytest.raises(ValueError, match="gradient_checkpointing=True does not work with"):
            make_trainer(method, family, tmp_path, saved_models[family], gradient_checkpointing=True)
        return
    trainer = make_trainer(method, family, tmp_path, saved_models[family], gradient_checkpointing=True)
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(trained[method, family][0]), rel=1e-5)


class StopAt(TrainerCallback):
    """Ends the training after a step, as a kill after a checkpoint would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step
