"""Every recipe runs as a user starts it, on the embedded default, on real data, with every method."""

from __future__ import annotations

import json
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from left_trainer import list_methods
from left_trainer.methods.registry import METHODS
from left_trainer.runs.inference import Generator
from places import REPOSITORY, SHARED
from processes import ENVIRONMENT

REPORT_KEYS = {
    "method", "task", "base_model", "trainable_parameters", "total_parameters", "metrics", "train_steps_per_second",
    "train_samples_per_second", "generation_samples_per_second", "peak_memory_bytes", "adapter_size_bytes", "versions",
    "seed", "learning_rate_source", "train_target_tokens_per_second",
}  # fmt: skip


SMALL = ("--max_train_samples=64", "--max_eval_samples=8")


@pytest.fixture
def accelerate(python) -> list[str]:
    """The command `accelerate`, which starts the recipe with the same `python`."""
    return [python, "-m", "accelerate.commands.accelerate_cli"]


def run_recipe(accelerate: list[str], recipe: str, output_dir: Path, *flags: str) -> str:
    """What a user sees of `accelerate launch recipes/RECIPE`."""
    launcher = [*accelerate, "launch", "--num_processes=1", "--num_machines=1", "--mixed_precision=no"]
    command = [*launcher, "--dynamo_backend=no", str(REPOSITORY / "recipes" / recipe), "--output_dir", str(output_dir)]
    result = subprocess.run([*command, *flags], capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


def launch(accelerate: list[str], recipe: str, output_dir: Path, *flags: str) -> tuple[dict, str]:
    output = run_recipe(accelerate, recipe, output_dir, *flags)
    return read_report(output_dir), output


def read_report(folder: Path) -> dict:
    return json.loads((folder / "training_report.json").read_text())


def run_here(monkeypatch: pytest.MonkeyPatch, recipe: str, output_dir: Path, *flags: str) -> None:
    """Run a recipe without the seconds that a process of its own takes to start."""
    monkeypatch.setattr(sys, "argv", [recipe, "--output_dir", str(output_dir), *SMALL, *flags])
    with METHODS.temporarily():
        try:
            runpy.run_path(str(REPOSITORY / "recipes" / recipe), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise


def check_files(folder: Path, report: dict) -> None:
    assert set(report) >= REPORT_KEYS
    assert {"train", "eval", "step"} == set(report["peak_memory_bytes"])
    assert all(value > 0 for value in report["peak_memory_bytes"].values())
    assert report["adapter_size_bytes"] > 0
    weights = "model.safetensors" if report["method"] == "full" else "adapter_model.safetensors"
    for name in (weights, "README.md", "tokenizer.json", "memory.png", "loss.png"):
        assert (folder / name).is_file(), name


def check_run(folder: Path, report: dict, method: str, task: str) -> None:
    check_files(folder, report)
    assert (report["method"], report["task"]) == (method, task)
    before, after = report["metrics"]["before"], report["metrics"]["after"]
    assert before.keys() == after.keys()
    assert all(math.isfinite(value) for value in (*before.values(), *after.values()))
    assert after["loss"] != before["loss"]
    assert all(math.isfinite(loss) for _, loss in report["loss_history"])


# An embedding prompt, a prefix, a vector, a low-rank update, one with a schedule, one with data before its first step.
ONE_OF_EACH_KIND = ("p_tuning", "prefix_tuning", "ia3", "lora", "adalora", "corda", "houlsby_adapter", "bitfit", "full")


@pytest.mark.timeout(600)
def test_the_demo_reaches_its_figures(tmp_path):
    accelerate = [str(Path(sys.executable).with_name("accelerate"))]  # the command itself, from its very start
    report, output = launch(accelerate, "lora_summarization.py", tmp_path)
    check_files(tmp_path, report)
    assert report["metrics"]["before"]["rougeL"] <= 35
    assert report["metrics"]["after"]["rougeL"] >= 70
    for shown in ("Trainable parameters: lora", "Memory on cpu", "Sample 3", "Test scores", "100%"):
        assert shown in output
    assert len(report["samples"]) == 3


# Beside lora_summarization.py, which the demo covers: the recipe, its method and its task.
RECIPES = [
    ("prefix_tuning_translation.py", "prefix_tuning", "translation"),
    ("p_tuning_dialogue.py", "p_tuning", "dialogue"),
    ("prompt_tuning_classification.py", "prompt_tuning", "classification"),
    ("ia3_summarization.py", "ia3", "summarization"),
    ("qlora_dialogue.py", "qlora", "dialogue"),
    ("bottleneck_adapter_translation.py", "houlsby_adapter", "translation"),
    ("full_finetuning.py", "full", "summarization"),
    ("your_own_method.py", "cross_attention_lora", "summarization"),
    ("trim_vocabulary.py", "lora", "summarization"),
    ("distill_summarization.py", "lora", "summarization"),
]


@pytest.mark.parametrize(("recipe", "method", "task"), RECIPES, ids=[recipe for recipe, *_ in RECIPES])
def test_a_recipe_runs(recipe, method, task, accelerate, tmp_path):
    report, output = launch(accelerate, recipe, tmp_path, *SMALL)
    check_run(tmp_path, report, method, task)
    assert f"Test scores, {task} with {method}" in output
    assert len(report["samples"]) == 3


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_trimmed_vocabulary_is_used_and_found_again(family, monkeypatch, tmp_path, capsys):
    run_here(monkeypatch, "trim_vocabulary.py", tmp_path, f"--model_name_or_path=embedded/{family}")
    report, (line, again) = read_report(tmp_path), re.findall(r"Vocabulary: 2,048 -> .*", capsys.readouterr().out)
    assert line == again
    size = json.loads((tmp_path / "base" / "config.json").read_text())["vocab_size"]
    assert f"-> {size:,} tokens" in line
    prompts = [sample["source"] for sample in report["samples"]]
    answers = Generator(str(tmp_path))([report["prompt"].format(source=prompt) for prompt in prompts])
    assert answers == [sample["after"] for sample in report["samples"]]


OTHER_METHODS = {
    "prefix_tuning_translation.py": "p_tuning_v2",
    "p_tuning_dialogue.py": "bitfit",
    "prompt_tuning_classification.py": "lora_plus",
    "ia3_summarization.py": "dora",
    "qlora_dialogue.py": "loftq",
    "bottleneck_adapter_translation.py": "parallel_adapter",
    "full_finetuning.py": "adalora",
    "your_own_method.py": "prompt_tuning",
    "trim_vocabulary.py": "full",
    "distill_summarization.py": "ia3",
}


@pytest.mark.parametrize(
    ("recipe", "task"),
    [
        pytest.param(
            recipe,
            task,
            id=recipe,
            # The one with most settings of its own, and the one that changes the registry, stand for the others.
            marks=() if recipe in ("full_finetuning.py", "your_own_method.py") else pytest.mark.long,
        )
        for recipe, _, task in RECIPES
    ],
)
def test_a_recipe_takes_another_method(recipe, task, monkeypatch, tmp_path):
    method = OTHER_METHODS[recipe]
    run_here(monkeypatch, recipe, tmp_path, "--peft_method", method)
    check_run(tmp_path, read_report(tmp_path), method, task)


@pytest.mark.parametrize("method", ["lora", pytest.param("prefix_tuning", marks=pytest.mark.long)])
def test_the_callbacks_work_on_a_plain_trainer(method, accelerate, tmp_path):
    flags = [*SMALL, "--peft_method", method]
    output = run_recipe(accelerate, "callbacks_on_your_trainer.py", tmp_path, *flags)
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert math.isfinite(results["eval_loss"])
    assert results["eval_loss"] != results["eval_loss_before"]
    assert (tmp_path / "memory.png").is_file()
    for adapter in ("step-2", "step-4", "best"):
        assert (tmp_path / "adapters" / adapter / "adapter_model.safetensors").is_file(), adapter
    assert f"Trainable parameters: {method}" in output
    assert "Memory on cpu" in output


@pytest.mark.parametrize("method", ["lora_plus", "adalora", "eva", "qlora", "full"])
def test_a_plain_trainer_gets_no_method_that_needs_ours(method, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_here(monkeypatch, "callbacks_on_your_trainer.py", tmp_path, "--peft_method", method)
    assert stop.value.code == 2
    assert f"--peft_method {method} does more than wrap the model. Use it with LeftTrainer." in capsys.readouterr().err


def test_your_own_method_says_what_it_cannot_do(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_here(monkeypatch, "your_own_method.py", tmp_path, "--model_name_or_path", "embedded/llama")
    assert stop.value.code == 2
    assert "'cross_attention_lora': it has no cross-attention" in capsys.readouterr().err


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
def test_real_summaries_with_every_method(method, accelerate, tmp_path):
    files = [f"--{split}_file={SHARED}/data/scitldr/{split}.jsonl" for split in ("train", "validation", "test")]
    flags = [*files, "--peft_method", method, "--max_train_samples=24", "--max_eval_samples=4", "--max_length=128"]
    report, _ = launch(accelerate, "lora_summarization.py", tmp_path, *flags, "--per_device_train_batch_size=8")
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
def test_real_models(model, data, columns, accelerate, tmp_path):
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
    report, _ = launch(accelerate, "lora_summarization.py", tmp_path, *flags)
    check_files(tmp_path, report)
    assert report["base_model"].endswith(model)


@pytest.mark.real
@pytest.mark.skipif(not SHARED.exists(), reason="real data are not here")
@pytest.mark.parametrize(
    ("recipe", "data", "columns"),
    [
        ("prefix_tuning_translation.py", "tatoeba_en_fr", ("source", "target")),
        ("qlora_dialogue.py", "sgd", ("dialogue", "response")),
    ],
)
def test_recipes_on_real_data(recipe, data, columns, monkeypatch, tmp_path):
    files = {split: SHARED / "data" / data / f"{split}.jsonl" for split in ("train", "validation", "test")}
    flags = [f"--{split}_file={path}" for split, path in files.items()]
    flags += [f"--source_column={columns[0]}", f"--target_column={columns[1]}"]
    run_here(monkeypatch, recipe, tmp_path, *flags, "--max_length=128", "--generation_max_length=16")
    report = read_report(tmp_path)
    check_run(tmp_path, report, *next((method, task) for name, method, task in RECIPES if name == recipe))
    first_row = json.loads(files["test"].read_text().splitlines()[0])
    assert report["samples"][0]["reference"] == first_row[columns[1]]


def test_every_recipe_is_short_and_tested():
    text = Path(__file__).read_text()
    for recipe in (REPOSITORY / "recipes").glob("*.py"):
        assert f'"{recipe.name}"' in text, f"{recipe.name} has no test"
        assert len(recipe.read_text().splitlines()) <= 95
