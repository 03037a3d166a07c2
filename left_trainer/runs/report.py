"""What a run leaves in its folder: the report, the loss curve and the model card."""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_NAME

from left_trainer.adapters.files import TRAINING_STATE_FILE
from left_trainer.callbacks.memory_profiler import MemoryProfilerCallback
from left_trainer.callbacks.step_timer import StepTimerCallback
from left_trainer.callbacks.tables import format_table
from left_trainer.callbacks.trainable_parameters import count_parameters
from left_trainer.evaluation.scores import is_score, without_prefix
from left_trainer.evaluation.text_metrics import decode
from left_trainer.models import unwrapped
from left_trainer.tasks import Task
from left_trainer.token_mean import IGNORE_INDEX
from left_trainer.trainer import LeftTrainer
from left_trainer.trainer.model_card import package_versions

REPORT_FILE = "training_report.json"


def collect_samples(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, predictions: Mapping[str, np.ndarray], number: int
) -> list[dict[str, str]]:
    """The first `number` rows with what the model wrote.

    Args:
        rows: With the columns `source` and `target`.
        tokenizer: Decodes the predictions.
        predictions: Token ids `(rows, sequence)`, by the key that their text gets: `before`, `after`.
        number: How many.
    """
    first = rows.select(range(min(number, len(rows))))
    texts = {name: decode(tokenizer, token_ids[: len(first)]) for name, token_ids in predictions.items()}
    return [
        {"source": row["source"], "reference": row["target"], **{name: texts[name][index] for name in texts}}
        for index, row in enumerate(first)
    ]


def build_report(
    trainer: LeftTrainer,
    task: Task,
    before: Mapping[str, float] | None,
    after: Mapping[str, float] | None,
    prompt: str | None = None,
    samples: Sequence[Mapping[str, str]] = (),
) -> dict[str, Any]:
    """Everything there is to say about a finished run, as plain JSON values.

    Args:
        trainer: After `train()` and `save_model()`.
        task: The task.
        before: Metrics of the untrained model on the test split, with any prefix; `None` where it was not scored.
        after: Those of the trained model; the same.
        prompt: Template used instead of the task's.
        samples: Rows with `source`, `reference`, `before` and `after`.

    Returns:
        Keys with units in their names; `None` where a figure was not measured.
    """
    args, state = trainer.args, trainer.state
    count = count_parameters(unwrapped(trainer.model))
    timer = _callback(trainer, StepTimerCallback)
    memory = _callback(trainer, MemoryProfilerCallback)
    seconds = timer.seconds_per_step if timer else None
    summary = memory.summary if memory else None
    batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    target_tokens = target_tokens_per_row(trainer.train_dataset)
    return {
        "method": trainer.method.name if trainer.method else count.method,
        "peft_kwargs": args.peft_kwargs,
        "task": task.name,
        "prompt": prompt or task.prompt,
        "base_model": trainer.base_model_name,
        "trainable_parameters": count.trainable,
        "total_parameters": count.total,
        "trainable_percent": count.percent,
        "matched_modules": list(count.matched_modules),
        "metrics": {
            "before": None if before is None else without_prefix(before),
            "after": None if after is None else without_prefix(after),
        },
        "learning_rate": args.learning_rate,
        "learning_rate_source": learning_rate_source(trainer),
        "train_steps": state.global_step,
        "train_batch_size": batch_size,
        "train_steps_per_second": 1 / seconds if seconds else None,
        "train_samples_per_second": batch_size / seconds if seconds else None,
        "train_target_tokens_per_second": target_tokens * batch_size / seconds if target_tokens and seconds else None,
        "generation_samples_per_second": trainer.generation_speed.rows_per_second,
        "peak_memory_bytes": {
            "train": summary.train_peak_bytes if summary else None,
            "eval": summary.eval_peak_bytes if summary else None,
        },
        "fast_paths": {name: path.report() for name, path in trainer.fast_paths.items()},
        "adapter_size_bytes": saved_bytes(Path(args.output_dir)),
        "loss_history": [[entry["step"], entry["loss"]] for entry in state.log_history if "loss" in entry],
        "samples": [dict(sample) for sample in samples],
        "seed": args.seed,
        "versions": package_versions(),
        "device": str(args.device),
        "machine": machine_name(),
    }


def machine_name() -> str:
    """Processor, cores and GPU of this machine."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {device}"


def learning_rate_source(trainer: LeftTrainer) -> str:
    """Where the learning rate comes from: `given`, or the method's default, as it is or for an embedded model."""
    if trainer.learning_rate_source == "scaled_default":
        return f"{trainer.source.learning_rate_factor:g} x default (embedded model)"
    return trainer.learning_rate_source


def target_tokens_per_row(dataset: Any) -> float | None:
    """Mean number of tokens that a row's loss is taken over; `None` for a dataset that is streamed or has no labels."""
    if not isinstance(dataset, Dataset) or "labels" not in dataset.column_names:
        return None
    return float(np.mean([np.not_equal(labels, IGNORE_INDEX).sum() for labels in dataset["labels"]]))


def write_report(trainer: LeftTrainer, report: Mapping[str, Any]) -> Path:
    """Write `loss.png`, the model card and, last, `training_report.json` into the run's folder.

    A folder with a report is that of a finished run: the file appears whole or not at all.
    """
    folder = Path(trainer.args.output_dir)
    if any("loss" in entry or "eval_loss" in entry for entry in trainer.state.log_history):
        draw_losses(trainer.state.log_history, folder / "loss.png", report["method"])
    trainer.create_model_card(tags=[report["task"]])
    card = folder / "README.md"
    card.write_text(f"{card.read_text(encoding='utf-8').rstrip()}\n\n{results_section(report)}", encoding="utf-8")
    path = folder / REPORT_FILE
    write_json(path, report)
    return path


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole."""
    write_whole(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a text file that a kill leaves as it was or as it shall be, never in between."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def finite(value: Any) -> Any:
    """`value` with `None` for every number that is not finite, because JSON has neither NaN nor infinity."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def results_section(report: Mapping[str, Any]) -> str:
    """The report's main figures, and how to use the model, as sections of the model card."""
    lines = [
        f"## Results on {report['task']}",
        "",
        "| metric | before | after |",
        "|---|---|---|",
        *(f"| {name} | {before:.2f} | {after:.2f} |" for name, before, after in _score_rows(report)),
        "",
        f"{report['trainable_parameters']:,} of {report['total_parameters']:,} parameters trained "
        f"({report['trainable_percent']:.3f} %), {report['train_steps']} steps of {report['train_batch_size']} rows at "
        f"a learning rate of {report['learning_rate']:g}, seed {report['seed']}.",
        "",
        f"The prompt was `{report['prompt']!r}`; this uses it:",
        "",
        "```bash",
        "echo 'Your text' | left-trainer generate --adapter THIS_FOLDER",
        "```",
        "",
    ]
    return "\n".join(lines)


def format_report(report: Mapping[str, Any], folder: str) -> str:
    """Scores before and after, samples, and where the files are, for the terminal."""
    rows = [(name, f"{before:.2f}", f"{after:.2f}") for name, before, after in _score_rows(report)]
    blocks = [
        f"Sample {number}\n  source:    {_shorten(sample['source'])}\n  reference: {sample['reference']}\n"
        f"  before:    {_shorten(sample['before'])}\n  after:     {_shorten(sample['after'])}\n"
        for number, sample in enumerate(report["samples"], 1)
    ]
    table = format_table(f"Test scores, {report['task']} with {report['method']}", ("metric", "before", "after"), rows)
    speed = report["train_steps_per_second"]
    pace = f"Trained {report['train_steps']} steps at {speed:.2f} steps/s. " if speed else ""
    what = "Model" if report["method"] == "full" else "Adapter"
    return "\n".join(["", *blocks, table, "", f"{pace}{what}, report, model card and plots are in {folder}"])


def _score_rows(report: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """The loss and the task's metrics, without timings and what a trainer counts beside them."""
    before, after = report["metrics"]["before"], report["metrics"]["after"]
    return [(name, before[name], after[name]) for name in after if name in before and is_score(name)]


def draw_losses(log_history: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw training and evaluation loss over steps to a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="optimizer step", ylabel="loss per target token (nats)", title=title)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def saved_bytes(folder: Path) -> int:
    """Bytes of the saved adapter, or of the whole model where all of it was trained."""
    names = (ADAPTER_SAFE_WEIGHTS_NAME, TRAINING_STATE_FILE)
    adapter = [folder / name for name in names if (folder / name).is_file()]
    files = adapter or list(folder.glob(f"{Path(SAFE_WEIGHTS_NAME).stem}*.safetensors"))
    return sum(file.stat().st_size for file in files)


def _callback(trainer: LeftTrainer, kind: type[Any]) -> Any:
    return next((item for item in trainer.callback_handler.callbacks if isinstance(item, kind)), None)


def _shorten(text: str, limit: int = 400) -> str:
    return text if len(text) <= limit else f"{text[:limit].rstrip()} ..."
