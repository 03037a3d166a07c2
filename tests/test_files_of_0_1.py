"""What left_trainer 0.1 wrote still loads: checkpoints, adapters, reports, comparisons."""

from __future__ import annotations

import csv
import json
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from left_trainer import LeftTrainer, LeftTrainingArguments, get_method
from left_trainer.cli.main import main
from left_trainer.comparison.attempt import Attempt
from left_trainer.comparison.cell import Cell
from left_trainer.comparison.results import read_cells, read_results
from left_trainer.methods.registry import METHODS
from left_trainer.runs.report import TrainingReport
from left_trainer.runs.tuning import Trial, TuningResult
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
    # 0.1 logged the penalty of a method in its loss.
    penalties = [entry.get("penalty", 0) for entry in trainer.state.log_history if "loss" in entry]
    penalties[:CHECKPOINT] = [0] * CHECKPOINT  # what 0.1 logged itself
    logged = [loss + penalty for loss, penalty in zip(losses(trainer), penalties, strict=True)]
    assert logged == pytest.approx(EXPECTED[method]["losses"], rel=1e-5)
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
    tuned = "tuned: best of 2 by rougeL on the validation split"
    for method, trials in (("lora", "0.0006: 31.1, 0.0018: 31.9"), ("p_tuning", "0.03: 33.1, 0.09: 49.8")):
        assert f"- summarization/{method}: {tuned} ({trials}), 8 steps, 1 s of training\n" in table
    with (folder / "again" / "table.csv").open() as file:
        assert [row["learning_rate_source"] for row in csv.DictReader(file)] == ["", "tuned", "tuned"]
    # What is written now is read now, and says the same.
    assert main(["report", str(folder / "again"), "--output_dir", str(folder / "third")]) == 0
    for name in ("table.csv", "results.jsonl"):
        assert (folder / "third" / name).read_text() == (folder / "again" / name).read_text()


def test_a_report_loads():
    content = json.loads((FILES / "trained" / "training_report.json").read_text())
    report = TrainingReport.read(FILES / "trained")
    assert report.learning_rate_source == "default"
    assert report.tuning is None
    assert report.to_json() == {**content, "learning_rate_source": "default", "cut_rows": {}, "processes": 1}


def test_every_result_of_a_comparison_loads_with_its_name():
    results = read_results(FILES / "compared")
    cells = read_cells(FILES / "compared")
    assert {result.cell.name for result in results} == set(cells)
    assert len(cells) == 7
    assert all(cells[result.cell.name] == result for result in results)
    lora = cells["summarization-lora-seed42-68e6c198"]
    assert lora.cell.tuning == lora.report.tuning
    assert lora.report.tuning == TuningResult("rougeL", 2, (Trial(6e-4, 31.1), Trial(1.8e-3, 31.9)), 8, 1.0)
    lines = (FILES / "compared" / "results.jsonl").read_text().splitlines()
    for result, line in zip(results, lines, strict=True):
        old, new = json.loads(line)["report"], result.report.to_json()
        for report in (old, new):
            for name in ("learning_rate_source", "learning_rate_factor", "tuning", "cut_rows", "processes"):
                report.pop(name, None)
        assert new == old


def test_a_cell_of_a_later_version_is_refused(tmp_path):
    cell = json.loads((FILES / "compared" / "cells" / "summarization-lora-seed42-68e6c198" / "cell.json").read_text())
    for changes, message in (
        ({"optimizer": "x"}, "'optimizer' is not known. A newer version wrote it"),
        ({"kind": "test"}, "'kind' must be one of base, method, trial, got 'test'"),
    ):
        (tmp_path / "cell.json").write_text(json.dumps({**cell, **changes}))
        with pytest.raises(ValueError, match=message):
            Cell.read(tmp_path)
    (tmp_path / "cell.json").write_text(json.dumps({**cell, "learning_rate_source": 5}))
    assert Cell.read(tmp_path).tuning is None


def test_a_comparison_is_resumed_and_not_run_again(folder, monkeypatch, capsys):
    default_of_0_1 = replace(get_method("p_tuning"), narrow_learning_rate=3e-2)
    monkeypatch.setitem(METHODS._records, "p_tuning", default_of_0_1)
    monkeypatch.setattr(Attempt, "run", lambda self, *_: pytest.fail(f"{self.cell.name} was run again"))
    small = ["--max_train_samples", "32", "--max_eval_samples", "4", "--per_device_train_batch_size", "8"]
    flags = ["--methods", "lora,p_tuning", "--tasks", "summarization", "--tune", "learning_rate"]
    flags += ["--tune_factors", "1", "3", "--output_dir", str(folder / "compared")]
    assert main(["compare", *flags, *small]) == 0
    assert "already contains 7 results" in capsys.readouterr().out
    assert "tuned: best of 2 by rougeL" in (folder / "compared" / "table.md").read_text()
