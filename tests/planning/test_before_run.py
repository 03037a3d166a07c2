"""What a run says of its needs before it loads weights, and where it stops."""

from __future__ import annotations

import psutil
import pytest
from datasets import Dataset
from peft import LoraConfig

from left_trainer import LeftTrainer, LeftTrainingArguments, apply_method, build_report, get_task
from left_trainer.cli.main import main
from left_trainer.models import auto_class
from left_trainer.planning import before_run
from left_trainer.planning.before_run import DoesNotFitError
from left_trainer.planning.devices import _record_of
from left_trainer.planning.lengths import row_lengths
from left_trainer.runs.report import TrainingReport
from left_trainer.runs.report_text import format_report, results_section
from tiny import tiny_model, tiny_tokenizer

FAMILIES = ("encoder_decoder", "decoder_only")
ROWS = Dataset.from_list([{"prompt": "a b " * size, "completion": " c" * (1 + size % 5)} for size in range(1, 13)])


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family, model_type in zip(FAMILIES, ("t5", "llama"), strict=True):
        tiny_model(model_type).save_pretrained(folder / family)
        tiny_tokenizer(family).save_pretrained(folder / family)
    return {family: str(folder / family) for family in FAMILIES}


@pytest.fixture
def small_machine(monkeypatch):
    memory = psutil.virtual_memory()._replace(available=2**16)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def trainer_of(model, folder, **options) -> LeftTrainer:
    given = {"report_plan": True, "report_to": "none", "per_device_train_batch_size": 4, "use_cpu": True, **options}
    return LeftTrainer(model, LeftTrainingArguments(str(folder), **given), train_dataset=ROWS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_says_what_it_needs_for_its_longest_rows(family, paths, tmp_path, capsys):
    trainer = trainer_of(paths[family], tmp_path)
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    targets = [sum(label != -100 for label in labels) for labels in trainer.train_dataset["labels"]]
    planned = trainer.planned
    total = planned.source_tokens if family == "encoder_decoder" else planned.source_tokens + planned.target_tokens
    assert (total, planned.target_tokens) == (max(lengths), max(targets))
    assert capsys.readouterr().out.count("Plan: the run needs ") == 1


def test_a_trainer_says_nothing_unless_asked(paths, tmp_path, capsys, small_machine):
    assert trainer_of(paths["encoder_decoder"], tmp_path, report_plan=False).planned is None
    assert "Plan" not in capsys.readouterr().out


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_that_does_not_fit_stops_before_weights_are_loaded(
    family, paths, tmp_path, capsys, small_machine, monkeypatch
):
    def load(*args, **kwargs):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr("left_trainer.trainer.preparation.load_model", load)
    with pytest.raises(DoesNotFitError, match=r"needs .* of the 64\.0 KiB of this CPU.* --.*--ignore_plan"):
        trainer_of(paths[family], tmp_path, peft_method="full")
    with pytest.raises(AssertionError, match="weights are loaded"):
        trainer_of(paths[family], tmp_path, ignore_plan=True)


def test_the_command_stops_with_advice_in_one_paragraph(tmp_path, capsys, small_machine):
    flags = ["--output_dir", str(tmp_path / "run"), "--max_train_samples", "8", "--use_cpu"]
    with pytest.raises(SystemExit) as caught:
        main(["train", *flags])
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert caught.value.code == 2
    assert text.startswith("left-trainer: error: The run needs ")
    assert "--gradient_checkpointing true" in text


def test_a_plan_that_fails_stops_nothing(paths, tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no such kernel\nsecond line")

    monkeypatch.setattr(before_run, "plan_training", fail)
    assert trainer_of(paths["encoder_decoder"], tmp_path).planned is None
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Plan")]
    assert lines == ["Plan: this run could not be planned, and goes on without. no such kernel second line"]


@pytest.mark.parametrize("kind", ["adapter", "peft_config", "loaded"])
def test_whatever_is_passed_as_a_model_is_planned(kind, paths, tmp_path, capsys):
    family = "decoder_only"
    model = paths[family]
    if kind == "adapter":
        model = str(tmp_path / "adapter")
        wrapped = apply_method(auto_class(family).from_pretrained(paths[family]), "lora", {"r": 2})
        wrapped.save_pretrained(model)
        tiny_tokenizer(family).save_pretrained(model)
    if kind == "loaded":
        model = auto_class(family).from_pretrained(model)
    args = LeftTrainingArguments(str(tmp_path / "run"), report_plan=True, report_to="none", use_cpu=True)
    config = LoraConfig(task_type="CAUSAL_LM", r=2) if kind == "peft_config" else None
    trainer = LeftTrainer(model, args, train_dataset=ROWS, processing_class=tiny_tokenizer(family), peft_config=config)
    assert trainer.planned is not None, capsys.readouterr().out
    assert trainer.planned.peak_bytes > 0


def test_the_report_has_the_plan_beside_the_measurement(paths, tmp_path):
    trainer = trainer_of(paths["encoder_decoder"], tmp_path)
    report = build_report(trainer, get_task("summarization"), None, None)
    assert TrainingReport.from_json(report.to_json()).planned == trainer.planned
    measured = TrainingReport.from_json(
        {**report.to_json(), "peak_memory_bytes": {"train": 9, "eval": None, "step": 3 * 2**20}}
    )
    for text in (format_report(measured, "run"), results_section(measured)):
        assert "planned, most in its" in text
        assert "3.0 MiB measured" in text


@pytest.mark.parametrize("family", FAMILIES)
def test_lengths_of_tokens_and_of_text_are_the_same(family, paths, tmp_path):
    trainer = trainer_of(paths[family], tmp_path)
    tokens = row_lengths(trainer.train_dataset, family, None)
    text = row_lengths(ROWS, family, tiny_tokenizer(family))
    assert tokens == text


def test_lengths_of_a_stream_are_not_read():
    assert row_lengths(ROWS.to_iterable_dataset(), "decoder_only", tiny_tokenizer("decoder_only")) is None


@pytest.mark.parametrize(
    ("driver", "record"),
    [
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("Tesla T4", "t4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_drivers_names_of_devices_are_known(driver, record):
    found = _record_of(driver)
    assert (found and found.name) == record
