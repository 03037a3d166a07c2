"""One run of a comparison, in a process of its own: `python -m left_trainer.comparison.cell FOLDER CELLS`.

The folder holds `cell.json`, which says what to run; the process leaves `training_report.json` or `failure.json` there.
Several processes, as `accelerate launch` or `torchrun` start them, run one cell together.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import hashlib
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from datasets import Dataset, disable_progress_bars
from transformers import HfArgumentParser
from transformers.utils.logging import disable_progress_bar

from left_trainer.adapters.text_files import write_whole
from left_trainer.callbacks.memory_counters import memory_counter
from left_trainer.callbacks.memory_profiler import MemoryProfilerCallback
from left_trainer.comparison.general_text import general_loss, general_rows, readable_rows, why_unreadable
from left_trainer.comparison.progress import ProgressFileCallback, write_progress
from left_trainer.compression_options import BASE_TEACHER, NO_TEACHER, SELF_TEACHER
from left_trainer.data.arguments import DataArguments, ModelArguments
from left_trainer.evaluation.named_metrics import score_interval
from left_trainer.evaluation.text_metrics import decode
from left_trainer.plugins import load_plugins
from left_trainer.runs.build_report import build_report, collect_samples, majority_share
from left_trainer.runs.files_of_0_1 import upgrade_tuning
from left_trainer.runs.fine_tuning import TASK_DEFAULTS, score, score_teacher, set_up
from left_trainer.runs.json_records import from_json, read_json, write_json
from left_trainer.runs.report import FastPathUse, TrainingReport
from left_trainer.runs.tuning import TuningResult
from left_trainer.secret_values import masked, without_hub_tokens
from left_trainer.tasks import Task, get_task
from left_trainer.trainer import LeftTrainer
from left_trainer.training_args import LeftTrainingArguments

EXIT_WITH_PARENT = "--exit_with_parent"
FORKED, NOT_FORKED = "--forked", "--not_forked"
FORKED_RUN = "forked_run"  # among the fast paths of a report
CELL_FILE, FAILURE_FILE, PREDICTIONS_FILE = "cell.json", "failure.json", "predictions.jsonl"
LEARNING_RATE_SOURCE_OF_0_1 = "learning_rate_source"
BASE = "base"
OF_PLANS = ("report_plan", "ignore_plan")  # they decide whether a cell runs, and not what it gives
N_SAMPLES = 8
# Arguments that may refer to the result of another setting, as `{NAME}`.
REFERRING = ("model_name_or_path", "teacher_model")
COMPRESSION_FIELDS = ("teacher_model", "distillation_kwargs", "shrink_to", "shrink_kwargs")
# Teachers that are the untrained model, and none.
OTHER_TEACHERS = (BASE_TEACHER, SELF_TEACHER, NO_TEACHER)
REFERENCE = re.compile(r"\s*\{\s*(.+?)\s*\}\s*")
UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")  # of a folder's name, on some file system
LONGEST_LABEL = 40
# Fields that version 0.1 did not have. They are part of a cell's name only where they are set.
LATER_FIELDS = ("setting", "after", "launcher")
NOT_IN_NAME = ("tuning", "plugins")
# Nothing but steps happens between the first step and the last; scores come from the trained model.
CELL_DEFAULTS: dict[str, Any] = {
    **TASK_DEFAULTS,
    "report_plan": False,  # cells are planned before the first of them runs
    "eval_strategy": "no",
    "logging_steps": 0.05,
    "disable_tqdm": True,
}
Kind = Literal["base", "method", "trial"]


@dataclass(frozen=True)
class Cell:
    """What one process runs.

    Args:
        kind: `base` scores the model as it is, `method` trains it and scores it on the test split, `trial` trains it
            and scores it on the validation split.
        task: Name of the task.
        arguments: Those of `left-trainer train` that are not at their defaults, without `output_dir`.
        conditions: What it is measured on, which has to be equal for scores to be comparable, see `conditions.py`.
        general_text_file: Held-out text; by default generated.
        tuning: The trials that the learning rate was chosen from; not part of what identifies the cell.
        save_adapter: Keep what was trained.
        setting: Name of the setting, where the user gave it one.
        after: Names of the cells whose results the arguments refer to, by the name of their setting.
        plugins: Files and modules that bring methods and tasks; not part of what identifies the cell.
        launcher: What starts the process, or several of them, in the place of `python`.
    """

    kind: Kind
    task: str
    arguments: Mapping[str, Any]
    conditions: Mapping[str, Any]
    general_text_file: str | None = None
    tuning: TuningResult | None = None
    save_adapter: bool = False
    setting: str | None = None
    after: Mapping[str, str] | None = None
    plugins: tuple[str, ...] = ()
    launcher: str | None = None

    @property
    def name(self) -> str:
        """A folder's name that tells people what this is, and that no other cell has."""
        # All fields as version 0.1 had them: a new one would give every cell a new name, and run it again.
        content = {key: value for key, value in asdict(self).items() if key not in NOT_IN_NAME}
        content = {key: value for key, value in content.items() if key not in LATER_FIELDS or value is not None}
        content["arguments"] = {key: value for key, value in content["arguments"].items() if key not in OF_PLANS}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
        parts = [
            self.task,
            UNSAFE.sub("_", self.label)[:LONGEST_LABEL],
            *(["trial"] if self.kind == "trial" else []),
            f"seed{self.seed}",
            digest,
        ]
        return "-".join(parts)

    @property
    def title(self) -> str:
        """What this is, for people."""
        label = "untrained" if self.kind == BASE else self.label
        trial = f", learning rate {self.arguments['learning_rate']:g}" if self.kind == "trial" else ""
        return f"{self.task}, {label}, seed {self.seed}{trial}"

    @property
    def label(self) -> str:
        """What tables call it: the name of the setting, or of the method."""
        return BASE if self.kind == BASE else self.setting or self.method

    @property
    def method(self) -> str:
        return str(self.arguments.get("peft_method", LeftTrainingArguments.peft_method))

    @property
    def seed(self) -> int:
        return int(self.arguments.get("seed", LeftTrainingArguments.seed))

    def parse(self, output_dir: Path) -> tuple[ModelArguments, DataArguments, LeftTrainingArguments]:
        """The arguments of the run. Raises `ValueError` or `TypeError` on those that no run can have."""
        parser = HfArgumentParser((ModelArguments, DataArguments, LeftTrainingArguments))
        arguments = {**CELL_DEFAULTS, **self.arguments, "output_dir": str(output_dir)}
        model_args, data_args, args = parser.parse_dict(arguments)
        return model_args, data_args, args

    def placed(self, cells: Path) -> Cell:
        """The cell with folders below `cells` where its arguments refer to the results of other cells."""
        if not self.after:
            return self
        named = {key: referred(self.arguments.get(key)) for key in REFERRING}
        folders = {key: str(cells / self.after[name]) for key, name in named.items() if name is not None}
        return replace(self, arguments={**self.arguments, **folders})

    def write(self, folder: Path) -> None:
        """Write `cell.json` into `folder`, whole."""
        write_json(folder / CELL_FILE, self)

    @classmethod
    def read(cls, folder: Path) -> Cell:
        """The cell in `folder`. Raises `ValueError` where the file is not a cell; the message names file and field."""
        path = folder / CELL_FILE
        try:
            return cls.from_json(read_json(path))
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is not a cell of a comparison: {error}") from error

    @classmethod
    def from_json(cls, content: Any) -> Cell:
        """From JSON values, those of version 0.1 included.

        Raises:
            ValueError: A field is missing, has another type or is not known. An unknown field is not ignored, as it
                may be part of what identifies the cell.
        """
        cell = from_json(cls, without_hub_tokens(content))  # version 0.1 kept tokens
        known = (*(field.name for field in fields(cls)), LEARNING_RATE_SOURCE_OF_0_1)
        unknown = next((key for key in content if key not in known), None)
        if unknown:
            raise ValueError(f"the field {unknown!r} is not known. A newer version wrote it: update left_trainer.")
        return cell if cell.tuning else replace(cell, tuning=upgrade_tuning(content.get(LEARNING_RATE_SOURCE_OF_0_1)))


def referred(value: Any) -> str | None:
    """The setting that an argument refers to, `teacher` for `{teacher}`; `None` for any other value."""
    found = REFERENCE.fullmatch(value) if isinstance(value, str) else None
    return found[1] if found else None


def run_cell(cell: Cell, folder: Path, cells: Path | None = None) -> TrainingReport:
    """Train and score, or score alone. Returns the report, with what only a comparison asks for.

    Args:
        cell: What to run.
        folder: Where to.
        cells: Where the results of other cells are; by default the parent of `folder`.
    """
    model_args, data_args, args = cell.placed(cells or folder.parent).parse(folder)
    counter = memory_counter(args.device)
    memory_before = counter.current()
    counter.close()
    is_main = args.process_index == 0  # of several processes this one writes
    say = functools.partial(write_progress, folder) if is_main else lambda text: None
    say("loading")
    run = set_up(get_task(cell.task), model_args, data_args, args)
    trainer = run.trainer
    trainer.add_callback(ProgressFileCallback(folder))
    teacher = score_teacher(run) if scores_teacher(cell) else None
    if cell.kind != BASE:
        trainer.train()
        trainer.save_model()
    release_training_memory(trainer)
    split = "validation" if cell.kind == "trial" else "test"
    rows = run.data[split]
    say(f"scoring {len(rows)} rows")
    predictions = score(trainer, rows)
    before, after = (predictions.metrics, None) if cell.kind == BASE else (None, predictions.metrics)
    token_ids = predictions.predictions
    texts = None if token_ids is None else decode(trainer.processing_class, token_ids)
    samples = collect_samples(rows, trainer.processing_class, {"prediction": token_ids}, N_SAMPLES)
    share = majority_share(run.task, rows["target"])
    report = build_report(trainer, run.task, before, after, run.prompt, samples, share, teacher)
    trainer.accelerator.wait_for_everyone()  # until all have counted what was saved
    if not cell.save_adapter and is_main:
        remove_weights(folder)
    if cell.kind == BASE:
        report = as_untrained(report)
    if cell.tuning:
        report = replace(report, learning_rate_source="tuned", tuning=cell.tuning)
    report = replace(report, setting=cell.setting, memory_before_model_bytes=memory_before, host=socket.gethostname())
    report = replace(report, **judged(run.task, texts, rows["target"]))
    if cell.kind == "trial":
        return report
    if texts is not None and is_main:
        write_predictions(folder, rows, texts)
    say("measuring the loss on general text")
    return replace(report, **forgetting(trainer, cell.general_text_file))


def scores_teacher(cell: Cell) -> bool:
    """Whether a run scores its teacher: where no other row of the comparison does."""
    teacher = cell.arguments.get("teacher_model")
    return cell.kind == "method" and teacher not in (None, *OTHER_TEACHERS) and referred(teacher) is None


def judged(task: Task, predictions: list[str] | None, references: list[str]) -> dict[str, Any]:
    """What there is to know about the scores of a split, as fields of the report; `None` for what was not generated."""
    interval = None
    if predictions is not None:
        interval = score_interval(task.metrics, task.main_metric, predictions, references)
    return {
        "test_rows": len(references),
        "score_interval": interval,
    }


def forgetting(trainer: LeftTrainer, file: str | None) -> dict[str, Any]:
    """The loss on general text, or why there is none, as fields of the report: no run is lost for it."""
    try:
        rows = readable_rows(general_rows(file), trainer.processing_class)
        if not len(rows):
            return {"general_loss_reason": why_unreadable(file, trainer.processing_class)}
        return {"general_loss": general_loss(trainer, rows)}
    except Exception as error:
        return {"general_loss_reason": _said(error)}


def _said(error: Exception) -> str:
    """What an error says. Its traceback goes to the log."""
    print(masked(traceback.format_exc()), file=sys.stderr)
    return masked(f"{type(error).__name__}: {error}")


def write_predictions(folder: Path, rows: Dataset, predictions: list[str]) -> None:
    """Write `predictions.jsonl`: each row of the test split, in order, with what the model wrote."""
    pairs = zip(rows["source"], rows["target"], predictions, strict=True)
    lines = [
        {"row": number, "source": source, "reference": reference, "prediction": prediction}
        for number, (source, reference, prediction) in enumerate(pairs)
    ]
    write_whole(folder / PREDICTIONS_FILE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def as_untrained(report: TrainingReport) -> TrainingReport:
    """The report of a model that was scored as it is."""
    return replace(report, method=BASE, trainable_parameters=None, trainable_percent=None, learning_rate=None)


def release_training_memory(trainer: LeftTrainer) -> None:
    """Let go of gradients, optimizer and teacher, so that the memory of generation is that of generation."""
    handler = trainer.callback_handler
    if trainer.teaching is not None:
        trainer.teaching.teacher.release()
    trainer.optimizer = trainer.lr_scheduler = handler.optimizer = handler.lr_scheduler = None
    trainer.model.zero_grad(set_to_none=True)
    trainer.accelerator.free_memory()
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # glibc keeps what was freed, and a CPU's counter is the process's own size
    for callback in handler.callbacks:
        if isinstance(callback, MemoryProfilerCallback):
            callback.reset_eval_peak()


def remove_weights(folder: Path) -> None:
    """Their size is in the report; the weights of a whole grid would fill a disk."""
    for file in (*folder.rglob("*.safetensors"), *folder.rglob("*.bin")):
        file.unlink()


def has_weights(folder: Path) -> bool:
    """Whether what a cell trained is still in its folder."""
    return any(list(folder.glob(pattern)) for pattern in ("*.safetensors", "*model*.bin"))


def exit_with_parent() -> None:
    """End this process when the one that started it ends, however that ends: it holds the other end of our stdin."""

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="left-trainer-parent").start()


def main(words: Sequence[str]) -> int:
    """Run the cell of the folder that the words of the command line name."""
    options = _parser().parse_args(words)
    if options.exit_with_parent:
        exit_with_parent()
    disable_progress_bar()
    disable_progress_bars()
    folder = options.folder
    try:
        began = time.perf_counter()
        cell = Cell.read(folder)
        load_plugins(cell.plugins)
        report = run_cell(cell, folder, options.cells)
        paths = {**report.fast_paths, **_how_started(options)}
        report = replace(report, run_seconds=time.perf_counter() - began, fast_paths=paths)
    except Exception as error:
        write_json(folder / FAILURE_FILE, {"reason": _said(error)})
        return 1
    if PartialState().is_main_process:
        report.write(folder)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m left_trainer.comparison.cell", allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="holds cell.json, and receives the result")
    parser.add_argument("cells", type=Path, nargs="?", help="holds the results of other cells")
    parser.add_argument(EXIT_WITH_PARENT, action="store_true", help="end when the standard input does")
    parser.add_argument(FORKED, action="store_true", help="the process was forked from one with all imports")
    parser.add_argument(NOT_FORKED, metavar="REASON", help="why it was not")
    return parser


def _how_started(options: argparse.Namespace) -> dict[str, FastPathUse]:
    """For the report's `fast_paths`; empty where a cell is run by hand."""
    fell_back = {options.not_forked: 1} if options.not_forked else {}
    if not options.forked and not fell_back:
        return {}
    return {FORKED_RUN: FastPathUse(int(options.forked), fell_back)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
