"""What the benchmarks share: models with data, a trainer for one cell of a table, and tables that survive a kill."""

from __future__ import annotations

import functools
import json
import math
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, disable_progress_bars
from tqdm import tqdm
from transformers import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from left_trainer import (
    DataArguments,
    LeftTrainer,
    LeftTrainingArguments,
    get_method,
    get_task,
    load_task_data,
    load_tokenizer,
    text_metrics,
)
from left_trainer.data.prompts import to_prompts
from left_trainer.embedded import MODEL_PATHS
from left_trainer.models import ModelFamily, ModelSource

SHARED = Path(__file__).parents[2] / "shared"
RESULTS = Path(__file__).parent / "results"
SUBSET_SEED = 0
N_TOKENS = 64  # that trainable_tokens trains
N_ADAPTERS = 2  # that xlora mixes
ADAPTER_STEPS = 30


@dataclass(frozen=True)
class Setting:
    """A model with data: the embedded data where no folder is named, else a folder of JSONL files."""

    name: str
    family: ModelFamily
    model: str
    folder: str = ""
    columns: tuple[str, str] = ("document", "summary")
    prompt: str | None = None
    generated_tokens: int = 64


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("embedded/t5", "encoder_decoder", str(MODEL_PATHS["encoder_decoder"])),
        Setting("embedded/llama", "decoder_only", str(MODEL_PATHS["decoder_only"])),
        Setting(
            "aren-transliteration",
            "encoder_decoder",
            "models/aren-transliteration",
            "data/ar2en_transliteration",
            ("source", "target"),
            "{source}",
            generated_tokens=24,
        ),
        Setting(
            "stories260K",
            "decoder_only",
            "models/stories260K",
            "data/taskmaster4",
            ("dialogue", "response"),
            "{source}\n",
            generated_tokens=48,
        ),
    )
}


def make_trainer(
    setting: Setting,
    shared: Path,
    method: str,
    output_dir: str,
    *,
    steps: int,
    rows: int,
    eval_rows: int,
    seed: int,
    metric: str | None = None,
    **arguments: Any,
) -> LeftTrainer:
    """A trainer for a fixed budget on `setting`.

    Args:
        setting: Model and data.
        shared: The folder with `models/` and `data/`.
        method: Name of a registered method.
        output_dir: A temporary folder.
        steps: Number of optimizer steps.
        rows: Rows of a step.
        eval_rows: Number of validation rows.
        seed: Of the run.
        metric: Also generate in evaluation, and compute this metric.
        arguments: Further `LeftTrainingArguments`.
    """
    model = str(shared / setting.model)
    args = LeftTrainingArguments(
        output_dir=output_dir,
        peft_method=method,
        max_steps=steps,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=50,
        predict_with_generate=metric is not None,
        generation_max_length=setting.generated_tokens,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        **arguments,
    )
    tokenizer = load_tokenizer(model)
    data = load_data(setting, shared, get_method(method).positions(args.peft_options, setting.family).source)
    trainer = LeftTrainer(
        model,
        args,
        train_dataset=sample(data["train"], steps * rows),
        eval_dataset=sample(data["validation"], eval_rows),
        processing_class=tokenizer,
        compute_metrics=text_metrics(tokenizer, [metric]) if metric else None,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@functools.cache
def load_data(setting: Setting, shared: Path, reserved: int) -> DatasetDict:
    """The splits as prompts and completions, with `reserved` positions left for virtual tokens."""
    files = {f"{split}_file": str(shared / setting.folder / f"{split}.jsonl") for split in ("train", "validation")}
    source_column, target_column = setting.columns
    data = DataArguments(source_column=source_column, target_column=target_column, **(files if setting.folder else {}))
    task, model = get_task("summarization"), str(shared / setting.model)
    source = ModelSource.of(model)
    tokenizer = load_tokenizer(source)

    def prompts(rows: Dataset) -> Dataset:
        return to_prompts(rows, task, tokenizer, source, max_length=None, prompt=setting.prompt, reserved=reserved)

    return DatasetDict({split: prompts(rows) for split, rows in load_task_data(task, data).items()})


def sample(rows: Dataset, number: int) -> Dataset:
    """`number` rows at random, because files may be sorted; the same ones for every method."""
    return rows.shuffle(seed=SUBSET_SEED).select(range(min(number, len(rows))))


@functools.cache
def required_options(method: str, setting: Setting, shared: Path) -> dict[str, Any]:
    """Sensible values of the options that `method` requires and `LeftTrainer` does not find by itself."""
    options: dict[str, Callable[[], Any]] = {
        "adapters": lambda: train_adapters(setting, shared),
        "token_indices": lambda: frequent_tokens(setting, shared),
    }
    return {name: options[name]() for name in get_method(method).required if name in options}


def train_adapters(setting: Setting, shared: Path) -> dict[str, str]:
    """Folders of LoRA adapters, each trained shortly from another seed."""
    folders = {}
    for seed in range(N_ADAPTERS):
        folder = temporary_folder(f"{setting.name} {seed}").name
        budget = {"steps": ADAPTER_STEPS, "rows": 16, "eval_rows": 1, "seed": seed}
        trainer = make_trainer(setting, shared, "lora", folder, **budget, learning_rate=1e-3)
        trainer.train()
        trainer.save_model()
        folders[f"lora_{seed}"] = folder
    return folders


@functools.cache
def temporary_folder(key: str) -> tempfile.TemporaryDirectory:
    """A folder that lives as long as the process, one for each key."""
    return tempfile.TemporaryDirectory()


def frequent_tokens(setting: Setting, shared: Path) -> list[int]:
    """The tokens that the targets hold most often."""
    tokenizer = load_tokenizer(str(shared / setting.model))
    targets = [row["completion"] for row in load_data(setting, shared, 0)["train"]]
    counts = Counter(token for ids in tokenizer(targets, add_special_tokens=False)["input_ids"] for token in ids)
    return sorted(token for token, _ in counts.most_common(N_TOKENS))


Cell = dict[str, Any]


def finished_cells(file: Path) -> list[Cell]:
    """The records of a JSON lines file; none where it does not exist."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def find_record(cell: Cell, records: Sequence[Cell]) -> Cell | None:
    """The last of `records` that has every entry of `cell`."""
    found = [record for record in records if all(record.get(name) == value for name, value in cell.items())]
    return found[-1] if found else None


def run_cells(cells: Sequence[Cell], run: Callable[..., Cell], shared: Path, file: Path, jobs: int) -> None:
    """Run every cell that `file` holds no result of, and append what it gave at once. One that failed runs again.

    Args:
        cells: Keyword arguments of `run`; with them a record is recognised.
        run: A module's function, which gives further entries of the record; also takes `shared`.
        shared: Passed to `run`.
        file: JSON lines.
        jobs: Number of processes, of one thread each.
    """
    done = finished_cells(file)
    left = [cell for cell in cells if "error" in (find_record(cell, done) or {"error": "never run"})]
    file.parent.mkdir(exist_ok=True)
    # Spawned, because a forked child of a process that has used torch's threads can hang.
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), initializer=start_worker)
    try:
        futures = {pool.submit(run_safely, run, cell, shared): cell for cell in left}
        for future in tqdm(as_completed(futures), total=len(futures), desc="cells"):
            record = {**futures[future], **future.result()}
            with file.open("a") as output:
                output.write(json.dumps(record) + "\n")
    finally:
        pool.shutdown(cancel_futures=True)  # else an interrupt waits for all that is left


def start_worker() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    disable_progress_bar()
    disable_progress_bars()


def run_safely(run: Callable[..., Cell], cell: Cell, shared: Path) -> Cell:
    """What `run` gives for `cell`, JSON's way; or its error, because one method must not stop the others."""
    try:
        record = run(**cell, shared=shared)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    # JSON has no infinity and no NaN.
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in record.items()}
