"""What left_trainer 0.1 wrote still loads: checkpoints, adapters, reports, comparisons."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from left_trainer import LeftTrainer, LeftTrainingArguments
from left_trainer.cli.main import main
from log_history import losses
from tiny import tiny_rows

FILES = Path(__file__).parent / "fixtures" / "left_trainer_0_1"
EXPECTED = json.loads((FILES / "expected.json").read_text())
MAKE = runpy.run_path(str(FILES / "make.py"))
CHECKPOINT, INPUTS, STEPS = (MAKE[name] for name in ("CHECKPOINT", "INPUTS", "STEPS"))


@pytest.fixture
def folder(tmp_path):
    """A copy in which files name each other where they are."""
    copy = tmp_path / "left_trainer_0_1"
    shutil.copytree(FILES, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for file in copy.rglob("*.json"):
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace("FOLDER/", f"{copy}/"), encoding="utf-8")
    return copy


def make_trainer(method: str, folder: Path, model: Path) -> LeftTrainer:
    return LeftTrainer(
        str(model),
        LeftTrainingArguments(
            output_dir=str(folder / "runs" / method),
            peft_method=method,
            max_steps=STEPS,
            per_device_train_batch_size=4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=3,
            lr_scheduler_type="constant",
            overwrite_output_dir=True,
            **EXPECTED[method]["options"],
        ),
        train_dataset=Dataset.from_list(tiny_rows()),
    )


def logits(trainer: LeftTrainer, method: str) -> torch.Tensor:
    inputs = dict(INPUTS)
    if trainer.family == "encoder_decoder":
        inputs["labels"] = torch.tensor([[11, 12, 1]])
    if method == "multitask_prompt_tuning":
        inputs["task_ids"] = torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        return trainer.model.eval()(**inputs).logits[0, -1, :16]


@pytest.mark.parametrize("method", EXPECTED)
def test_a_run_goes_on_from_a_checkpoint(method, folder):
    trainer = make_trainer(method, folder, folder / "base" / EXPECTED[method]["family"])
    trainer.train(resume_from_checkpoint=str(folder / "runs" / method / f"checkpoint-{CHECKPOINT}"))
    assert losses(trainer) == pytest.approx(EXPECTED[method]["losses"], rel=1e-5)
    assert logits(trainer, method).tolist() == pytest.approx(EXPECTED[method]["logits"], abs=1e-5)


@pytest.mark.parametrize("method", [method for method in EXPECTED if method != "full"])
def test_an_adapter_loads(method, folder):
    path = folder / "runs" / method
    for file in (folder / "base" / EXPECTED[method]["family"]).glob("token*"):
        shutil.copy(file, path)
    trainer = make_trainer(method, folder, path)
    assert logits(trainer, method).tolist() == pytest.approx(EXPECTED[method]["logits"], abs=1e-5)


def test_arguments_load(folder):
    file = folder / "runs" / "lora" / f"checkpoint-{CHECKPOINT}" / "training_args.bin"
    args = torch.load(file, weights_only=False)
    assert isinstance(args, LeftTrainingArguments)
    assert (args.peft_method, args.learning_rate) == ("lora", 2e-2)


def test_a_comparison_becomes_the_same_table(folder, capsys):
    assert main(["report", str(folder / "compared"), "--output_dir", str(folder / "again")]) == 0
    printed = capsys.readouterr().out
    table = (folder / "again" / "table.md").read_text()
    assert "| p_tuning | 44.7 |" in table
    assert "summarization/lora: tuned: best of 2 by rougeL on the validation split" in table
    assert "untrained" not in printed
