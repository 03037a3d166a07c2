"""Loading a task's rows: from the hub, from files, or from the embedded grammar."""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from random import Random

import yaml
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from transformers import PreTrainedTokenizerBase

from left_trainer.data.arguments import DataArguments
from left_trainer.data.columns import text_columns
from left_trainer.data.dataset_types import AnyDataset
from left_trainer.data.files import read_file, stored_rows, stream_file
from left_trainer.data.prompts import to_prompts
from left_trainer.data.splits import first_rows, stored_splits, streamed_splits
from left_trainer.methods import get_method
from left_trainer.models.hub import asking_hub, check_readable
from left_trainer.models.languages import set_languages
from left_trainer.models.source import ModelSource
from left_trainer.tasks import HubDataset, Task
from left_trainer.tasks.task import SPLITS, check_prompt
from left_trainer.training_args import LeftTrainingArguments, loading_options

logger = logging.getLogger(__name__)

MAX_DRAWS_PER_ROW = 10
HUB_NAME = re.compile(r"[\w.-]*\w(/[\w.-]*\w)?")


def load_task_data(task: Task, data: DataArguments, token: str | None = None) -> DatasetDict:
    """The splits `train`, `validation` and `test` of a task's data, with the text columns `source` and `target`.

    Args:
        task: Names the columns, and generates the data when `data` names none.
        data: What the user asked for. The task's own `hub_dataset` brings its configuration and columns. With
            `streaming`, the training rows are an `IterableDataset`, and the splits a plain dict.
        token: Hub token for private data.

    Raises:
        ValueError: A missing column, an empty split, a row without a target, an unknown file format.
        FileNotFoundError: A file that does not exist.
    """
    if data.prompt is not None:
        check_prompt(data.prompt)
    files = {"train": data.train_file, "validation": data.validation_file, "test": data.test_file}
    given = {split: path for split, path in files.items() if path is not None}
    if data.dataset_name is not None and given:
        raise ValueError(
            f"dataset_name={data.dataset_name!r} and {next(iter(given))}_file are both given. Pass one of them."
        )
    if given and "train" not in given:
        raise ValueError(f"{next(iter(given))}_file is given without train_file. Pass --train_file.")
    known = _known_columns(task, data)
    columns = _columns(data, known)
    if given:
        rows = {split: _read(split, path, columns, data) for split, path in given.items()}
    else:
        name, config_name = data.dataset_name, data.dataset_config_name or known.config_name
        loaded = embedded_data(task) if name is None else _load(name, config_name, token, data)
        rows = {split: text_columns(loaded[split], columns, split) for split in SPLITS if split in loaded}
        if name is None and not data.streaming:
            rows = {split: stored_rows(texts) for split, texts in rows.items()}
    limits = {"train": data.max_train_samples, "validation": data.max_eval_samples, "test": data.max_eval_samples}
    name = data.dataset_name or "the data"
    return streamed_splits(rows, limits, name) if data.streaming else stored_splits(rows, limits, name)


def prepare_task_data(
    task: Task,
    data: DataArguments,
    model: str | ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    args: LeftTrainingArguments,
) -> DatasetDict:
    """`load_task_data` and `to_prompts` in one: the splits, ready for `LeftTrainer`.

    Args:
        task: The task.
        data: What the user asked for.
        model: Name or path, or what was made of one; its config bounds the length.
        tokenizer: Of the model. The languages that `data` names are set on it.
        args: `max_length` and the loading options of the model are read.

    Raises:
        ValueError: As `load_task_data` and `to_prompts`, or languages that the tokenizer does not know.
        FileNotFoundError: A file that does not exist.
    """
    set_languages(tokenizer, data.source_lang, data.target_lang)
    source = ModelSource.of(model, loading_options(args))
    if data.streaming and args.max_steps <= 0:
        raise ValueError(
            "streaming=True does not know how many rows there are, so a run needs max_steps. Pass for example "
            "--max_steps 1000."
        )
    splits = load_task_data(task, data, token=source.options.get("token"))
    if data.streaming:
        seed = args.seed if args.data_seed is None else args.data_seed
        splits["train"] = splits["train"].shuffle(seed=seed, buffer_size=data.shuffle_buffer_size)
    reserved = get_method(args.peft_method).positions(args.peft_options, source.family).source

    def prompts(name: str, rows: AnyDataset) -> AnyDataset:
        answers = (args.generation_max_length or 0) if args.predict_with_generate and name != "train" else 0
        return to_prompts(rows, task, tokenizer, source, args.max_length, data.prompt, reserved, answers)

    return type(splits)({name: prompts(name, rows) for name, rows in splits.items()})


def load_test_rows(task: Task, data: DataArguments) -> Dataset:
    """The rows of `data.test_file` alone, with the text columns `source` and `target`.

    Raises:
        ValueError: As `load_task_data`.
        FileNotFoundError: The file does not exist.
    """
    if data.prompt is not None:
        check_prompt(data.prompt)
    columns = _columns(data, _known_columns(task, data))
    return first_rows(_read("test", str(data.test_file), columns, data), data.max_eval_samples, "test")


def _columns(data: DataArguments, known: HubDataset) -> dict[str, str]:
    return {"source": data.source_column or known.source_column, "target": data.target_column or known.target_column}


def embedded_data(task: Task) -> DatasetDict:
    """The task's generated rows; the same on every machine, and no source is in two splits.

    Raises:
        ValueError: The task generates no rows, or too few different sources to fill the splits.
    """
    generate_row = task.generate_row
    if generate_row is None:
        raise ValueError(f"The task {task.name!r} has no data of its own. Pass --train_file or --dataset_name.")
    splits: dict[str, Dataset] = {}
    taken: set[str] = set()
    for split in reversed(SPLITS):  # so that a small supply of sources is short in training, not in the test
        rng = Random(f"{task.name}/{split}")
        drawn = (generate_row(rng) for _ in range(MAX_DRAWS_PER_ROW * task.embedded_splits[split]))
        new = (row for row in drawn if row[task.source_column] not in taken)
        rows = list(islice(new, task.embedded_splits[split]))
        if len(rows) < task.embedded_splits[split]:
            raise ValueError(
                f"generate_row of the task {task.name!r} has too few different sources: after "
                f"{MAX_DRAWS_PER_ROW} draws a row, {split} has {len(rows)} of {task.embedded_splits[split]} rows that "
                "are in no other split. Lower embedded_splits, or vary the sources more."
            )
        splits[split] = Dataset.from_list(rows)
        taken.update(splits[split][task.source_column])
    return DatasetDict({split: splits[split] for split in SPLITS})


def _known_columns(task: Task, data: DataArguments) -> HubDataset:
    """Configuration and columns of the task's hub data set where the user named that one, else the task's columns."""
    if task.hub_dataset is not None and task.hub_dataset.name == data.dataset_name:
        return task.hub_dataset
    return HubDataset(data.dataset_name or "", task.source_column, task.target_column)


def _read(split: str, path: str, columns: Mapping[str, str], data: DataArguments) -> AnyDataset:
    if data.streaming and split == "train":
        return stream_file("train_file", path, columns, data.encoding)
    return read_file(f"{split}_file", path, columns, data.encoding, data.overwrite_cache)


def _load(name: str, config_name: str | None, token: str | None, data: DataArguments) -> Mapping[str, AnyDataset]:
    revision = data.dataset_revision
    if Path(name).exists():
        _check_folder(name)
        if revision is not None:
            raise ValueError(
                f"dataset_revision={revision!r} has no effect on dataset_name={name!r}, which is a folder here. Remove "
                "it."
            )
    try:
        with asking_hub("dataset_name", name, "dataset", revision):
            return load_dataset(name, config_name, token=token, streaming=data.streaming, revision=revision)
    except (DatasetNotFoundError, ConnectionError):
        check_readable("dataset_name", name, "dataset", revision, token)
        raise
    except (RuntimeError, yaml.YAMLError) as error:  # a loading script, or a tag of YAML that would make objects
        raise ValueError(
            f"dataset_name={name!r} cannot be read: {' '.join(str(error).split())}. Code that comes with a data set is "
            "not run: pass its files with --train_file."
        ) from error
    except DatasetGenerationError as error:
        lines = str(error.__cause__ or error).strip().splitlines()
        cause = " ... ".join(dict.fromkeys((lines[0], lines[-1])))
        raise ValueError(
            f"dataset_name={name!r} cannot be read: {cause}. Files with different columns do not form one dataset: "
            "pass them with --train_file, --validation_file and --test_file."
        ) from error


def _check_folder(name: str) -> None:
    """Refuse what `datasets` would take for something else than the folder of that name."""
    path = Path(name).absolute()
    if path.is_file():
        raise ValueError(f"dataset_name={name!r} is a file. Pass it with --train_file.")
    if glob.has_magic(str(path)) or "::" in str(path):
        raise ValueError(
            f"dataset_name={name!r} is the folder {str(path)!r}, and datasets takes the characters *, ?, [ and "
            ":: in it for a pattern of several names. Rename it, or pass its files with --train_file, ..."
        )
    if HUB_NAME.fullmatch(name):
        logger.warning("dataset_name=%r is read from the folder %r, not from the Hub.", name, str(path))
