"""Every recipe runs as a user starts it, on the embedded default, on real data, with every method."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, SHARED

from left_trainer import list_methods

REPORT_KEYS = {
    "method", "task", "base_model", "trainable_parameters", "total_parameters", "metrics", "train_steps_per_second",
    "train_samples_per_second", "generation_samples_per_second", "peak_memory_bytes", "adapter_size_bytes", "versions",
    "seed", "learning_rate_source", "train_target_tokens_per_second",
}  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def launch(recipe: str, output_dir: Path, *flags: str) -> tuple[dict, str]:
    accelerate = Path(sys.executable).with_name("accelerate")
    launcher = [str(accelerate), "launch", "--num_processes=1", "--num_machines=1", "--mixed_precision=no"]
    command = [*launcher, "--dynamo_backend=no", str(REPOSITORY / "recipes" / recipe), "--output_dir", str(output_dir)]
    result = subprocess.run([*command, *flags], capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((output_dir / "training_report.json").read_text()), result.stdout + result.stderr


def check_files(folder: Path, report: dict) -> None:
    assert set(report) >= REPORT_KEYS
    assert {"train", "eval"} == set(report["peak_memory_bytes"])
    assert all(value > 0 for value in report["peak_memory_bytes"].values())
    assert report["adapter_size_bytes"] > 0
    for name in ("README.md", "tokenizer.json", "memory.png", "loss.png"):
        assert (folder / name).is_file(), name


# An embedding prompt, a prefix, a vector, a low-rank update, one with a schedule, one with data before its first step.
ONE_OF_EACH_KIND = ("p_tuning", "prefix_tuning", "ia3", "lora", "adalora", "corda", "houlsby_adapter", "bitfit", "full")


@pytest.mark.timeout(600)
def test_the_demo_reaches_its_figures(tmp_path):
    report, output = launch("lora_summarization.py", tmp_path)
    check_files(tmp_path, report)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert report["metrics"]["before"]["rougeL"] <= 35
    assert report["metrics"]["after"]["rougeL"] >= 70
    for shown in ("Trainable parameters: lora", "Memory on cpu", "Sample 3", "Test scores", "100%"):
        assert shown in output
    assert len(report["samples"]) == 3


@pytest.mark.real
@pytest.mark.skipif(not SHARED.exists(), reason="real data are not here")
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method.name, marks=() if method.name in ONE_OF_EACH_KIND else pytest.mark.long)
        for method in list_methods()
        if not method.required or method.derive_from_data
    ],
)
def test_real_summaries_with_every_method(method, tmp_path):
    files = [f"--{split}_file={SHARED}/data/scitldr/{split}.jsonl" for split in ("train", "validation", "test")]
    flags = [*files, "--peft_method", method, "--max_train_samples=24", "--max_eval_samples=4", "--max_length=128"]
    report, _ = launch("lora_summarization.py", tmp_path, *flags, "--per_device_train_batch_size=8")
    check_files(tmp_path, report)
    assert report["method"] == method
    assert report["train_steps"] == 3


@pytest.mark.real
@pytest.mark.skipif(not SHARED.exists(), reason="real models are not here")
@pytest.mark.parametrize(
    ("model", "data", "columns"),
    [
        ("stories260K", "taskmaster4", ("dialogue", "response")),
        ("aren-transliteration", "ar2en_transliteration", ("source", "target")),
    ],
)
def test_real_models(model, data, columns, tmp_path):
    flags = [
        f"--model_name_or_path={SHARED}/models/{model}",
        f"--train_file={SHARED}/data/{data}/train.jsonl",
        f"--source_column={columns[0]}",
        f"--target_column={columns[1]}",
        "--prompt={source}\n" if model == "stories260K" else "--prompt={source}",
        "--max_train_samples=64",
        "--max_eval_samples=8",
        "--generation_max_length=16",
    ]
    report, _ = launch("lora_summarization.py", tmp_path, *flags)
    check_files(tmp_path, report)
    assert report["base_model"].endswith(model)


def test_every_recipe_is_short_and_tested():
    text = Path(__file__).read_text()
    for recipe in (REPOSITORY / "recipes").glob("*.py"):
        assert f'"{recipe.name}"' in text, f"{recipe.name} has no test"
        assert len(recipe.read_text().splitlines()) <= 85
