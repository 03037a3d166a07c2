"""`TrainingReport`: what is written is what is read, and what is no report is refused by file and field."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from left_trainer.data.cut_rows import CutRows
from left_trainer.runs.json_records import from_json, to_json
from left_trainer.runs.report import REPORT_FILE, FastPathUse, Metrics, PeakMemory, Sample, TrainingReport
from left_trainer.runs.tuning import Trial, TuningResult

REPORT = TrainingReport(
    method="lora",
    peft_kwargs={"r": 4, "target_modules": ["q", "v"]},
    task="summarization",
    prompt="Summarize: {source}",
    base_model="m",
    trainable_parameters=10,
    total_parameters=1000,
    trainable_percent=1.0,
    matched_modules=("a.q", "a.v"),
    metrics=Metrics({"loss": 2.0}, {"loss": 1.0, "rougeL": 50.0}),
    learning_rate=6e-4,
    learning_rate_source="tuned",
    train_steps=4,
    train_batch_size=8,
    train_steps_per_second=2.0,
    train_samples_per_second=16.0,
    train_target_tokens_per_second=None,
    generation_samples_per_second=None,
    peak_memory_bytes=PeakMemory(train=100, eval=None),
    fast_paths={"gelu": FastPathUse(3, {"a reason": 1})},
    adapter_size_bytes=99,
    loss_history=((1, 2.5), (2, 2.0)),
    samples=(Sample("s", "r", before="b", after="a"),),
    seed=42,
    versions={"torch": "2.13.0", "trl": None},
    device="cpu",
    machine="a machine",
    tuning=TuningResult("rougeL", 2, (Trial(6e-4, 50.0, 4, 2.0), Trial(2e-3, None, 4, None)), 8, 2.0),
    cut_rows={"test": CutRows(65, sources=12)},
)
OPTIONAL = (
    "cut_rows",
    "diverged_at_step",
    "general_loss",
    "general_loss_reason",
    "majority_share",
    "planned",
    "processes",
    "shrinking",
    "teacher",
    "setting",
    "host",
    "data",
    "base_parameters",
    "model_size_bytes",
    "memory_before_model_bytes",
    "run_seconds",
    "score_interval",
    "test_rows",
    "tuning",
)


def test_what_is_written_is_read_back(tmp_path):
    for report in (REPORT, dataclasses.replace(REPORT, memory_before_model_bytes=7, general_loss=3.0, tuning=None)):
        assert report.write(tmp_path) == tmp_path / REPORT_FILE
        assert TrainingReport.read(tmp_path) == report
        assert [file.name for file in tmp_path.iterdir()] == [REPORT_FILE]


def test_the_file_has_one_key_for_each_field_and_none_for_what_was_not_asked_for():
    content = REPORT.to_json()
    fields = [field.name for field in dataclasses.fields(TrainingReport)]
    assert list(content) == [
        name for name in fields if name not in OPTIONAL or name in ("cut_rows", "tuning", "processes")
    ]
    assert content["samples"] == [{"source": "s", "reference": "r", "before": "b", "after": "a"}]
    assert content["peak_memory_bytes"] == {"train": 100, "eval": None}
    assert content["loss_history"] == [[1, 2.5], [2, 2.0]]


def test_a_number_that_is_not_finite_is_written_as_null(tmp_path):
    diverged = dataclasses.replace(REPORT, loss_history=((1, math.nan),), metrics=Metrics(None, {"loss": math.inf}))
    text = diverged.write(tmp_path).read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    read = TrainingReport.read(tmp_path)
    assert read.loss_history == ((1, None),)
    assert read.metrics == Metrics(None, {"loss": None})


def test_a_key_of_a_later_version_is_ignored():
    assert TrainingReport.from_json({**REPORT.to_json(), "energy_joules": 5.0}) == REPORT


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TrainingReport)])
def test_each_field_is_required_or_has_a_default(name):
    content = REPORT.to_json()
    content.pop(name, None)
    if name in OPTIONAL:
        assert TrainingReport.from_json(content)
    else:
        with pytest.raises(ValueError, match=f"the field '{name}' is missing"):
            TrainingReport.from_json(content)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["seed"], "42", "'seed' must be an integer, got '42'"),
        (["seed"], True, "'seed' must be an integer, got True"),
        (["seed"], None, "'seed' must be an integer, got None"),
        (["prompt"], 3, "'prompt' must be a string"),
        (["general_loss"], "low", "'general_loss' must be a number"),
        (["metrics"], [], "'metrics' must be a JSON object"),
        (["metrics", "after", "loss"], "x", "'metrics.after.loss' must be a number, got 'x'"),
        (["peak_memory_bytes"], {"train": 1}, "'peak_memory_bytes.eval' is missing"),
        (["fast_paths", "gelu", "fell_back", "why"], 1.5, "'fast_paths.gelu.fell_back.why' must be an integer"),
        (["loss_history"], [[1, 2.0, 3.0]], r"'loss_history\[0\]' must be a list of 2 values"),
        (["loss_history"], 5, "'loss_history' must be a list"),
        (["samples", 0, "source"], None, r"'samples\[0\].source' must be a string"),
        (
            ["learning_rate_source"],
            "somewhere",
            "'learning_rate_source' must be one of given, default, tuned, got 'somewhere'",
        ),
        (["tuning", "trials"], [{"score": 1.0}], r"'tuning.trials\[0\].learning_rate' is missing"),
    ],
)
def test_a_broken_report_is_refused_by_file_and_field(path, value, message, tmp_path):
    content = copy.deepcopy(REPORT.to_json())
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / REPORT_FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        TrainingReport.read(tmp_path)
    assert str(tmp_path / REPORT_FILE) in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '"text"', "{}", "\ufffd\x00"])
def test_a_foreign_file_is_refused(content, tmp_path):
    (tmp_path / REPORT_FILE).write_text(content)
    with pytest.raises(ValueError, match="is not a training report: "):
        TrainingReport.read(tmp_path)


def test_a_folder_without_a_report_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no training_report\.json"):
        TrainingReport.read(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["given", "default", "tuned: by hand", "3 x default"])
def test_only_what_version_0_1_wrote_is_upgraded(text):
    content = {**REPORT.to_json(), "learning_rate_source": text}
    if text in ("given", "default"):
        assert TrainingReport.from_json(content).learning_rate_source == text
    else:
        with pytest.raises(ValueError, match="'learning_rate_source' must be one of"):
            TrainingReport.from_json(content)


def test_a_failed_trial_of_version_0_1_still_counts():
    text = "tuned: best of 3 by chrf on the validation split (1e-05: 1.5), 20 steps, 1234 s of training"
    content = {**REPORT.to_json(), "learning_rate_source": text}
    assert TrainingReport.from_json(content).tuning == TuningResult("chrf", 3, (Trial(1e-5, 1.5),), 20, 1234.0)


def test_records_survive_json():
    @dataclasses.dataclass(frozen=True)
    class Record:
        flag: bool
        path: str = "x"
        note: str | None = None

    assert to_json(Record(True)) == {"flag": True, "path": "x"}
    assert from_json(Record, {"flag": False, "note": "n"}) == Record(False, "x", "n")
    with pytest.raises(ValueError, match="'flag' must be true or false, got 1"):
        from_json(Record, {"flag": 1})


def test_a_report_is_read_without_loading_torch():
    """The command line reads the prompt before it loads a model."""
    script = "import sys, left_trainer.runs.report; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2]).returncode == 0
