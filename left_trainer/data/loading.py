"""Loading a task's rows: from the hub, from files, or from the embedded grammar."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from left_trainer.data.arguments import DataArguments
from left_trainer.data.columns import text_columns
from left_trainer.data.lengths import SOURCE_CUT, TARGET_CUT
from left_trainer.methods import get_method
from left_trainer.models.languages import set_languages
from left_trainer.models.positions import position_limits
from left_trainer.models.source import ModelSource
from left_trainer.tasks import HubDataset, Task
from left_trainer.tasks.task import SPLITS, check_prompt
from left_trainer.training_args import LeftTrainingArguments, loading_options

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
HELD_OUT_FRACTION = 0.05
SPLIT_SEED = 0
SPECIAL_TOKENS = 4  # room for what a tokenizer adds around prompt and completion
MIN_SOURCE_TOKENS = 8
MAX_DRAWS_PER_ROW = 10


def load_task_data(task: Task, data: DataArguments, token: str | None = None) -> DatasetDict:
    """The splits `train`, `validation` and `test` of a task's data, with the text columns `source` and `target`.

    Args:
        task: Names the columns, and generates the data when `data` names none.
        data: What the user asked for. The task's own `hub_dataset` brings its configuration and columns.
        token: Hub token for private data.

    Raises:
        ValueError: A missing column, an empty split, a row without a target, an unknown file format.
        FileNotFoundError: A file that does not exist.
    """
    if data.prompt is not None:
        check_prompt(data.prompt)
    files = {"train": data.train_file, "validation": data.validation_file, "test": data.test_file}
    given = {split: _checked_file(split, path) for split, path in files.items() if path is not None}
    if data.dataset_name is not None and given:
        raise ValueError(
            f"dataset_name={data.dataset_name!r} and {next(iter(given))}_file are both given. Pass one of them."
        )
    known = _known_columns(task, data)
    if data.dataset_name is not None:
        rows = _load(data.dataset_name, data.dataset_config_name or known.config_name, token)
    elif given:
        if "train" not in given:
            raise ValueError(f"{next(iter(given))}_file is given without train_file. Pass --train_file.")
        rows = DatasetDict({split: _read(path) for split, path in given.items()})
    else:
        rows = embedded_data(task)
    splits = _complete_splits(rows, data.dataset_name or "the data")
    columns = _columns(data, known)
    limits = {"train": data.max_train_samples, "validation": data.max_eval_samples, "test": data.max_eval_samples}
    return DatasetDict(
        {split: text_columns(_first(splits[split], limits[split], split), columns, split) for split in SPLITS}
    )


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
    splits = load_task_data(task, data, token=source.options.get("token"))
    reserved = get_method(args.peft_method).positions(args.peft_options, source.family).source

    def prompts(name: str, rows: Dataset) -> Dataset:
        answers = (args.generation_max_length or 0) if args.predict_with_generate and name != "train" else 0
        return to_prompts(rows, task, tokenizer, source, args.max_length, data.prompt, reserved, answers)

    return DatasetDict({name: prompts(name, rows) for name, rows in splits.items()})


def load_test_rows(task: Task, data: DataArguments) -> Dataset:
    """The rows of `data.test_file` alone, with the text columns `source` and `target`.

    Raises:
        ValueError: As `load_task_data`.
        FileNotFoundError: The file does not exist.
    """
    if data.prompt is not None:
        check_prompt(data.prompt)
    rows = _first(_read(_checked_file("test", str(data.test_file))), data.max_eval_samples, "test")
    return text_columns(rows, _columns(data, _known_columns(task, data)), "test")


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


def _checked_file(split: str, path: str) -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"{split}_file={path!r} does not exist. Check the path; it is read from {Path.cwd()}.")
    if file.suffix not in FILE_FORMATS:
        raise ValueError(f"{split}_file={path!r} ends in {file.suffix!r}. Allowed: {', '.join(FILE_FORMATS)}.")
    return file


def _load(name: str, config_name: str | None, token: str | None) -> DatasetDict:
    try:
        return load_dataset(name, config_name, token=token)
    except DatasetGenerationError as error:
        lines = str(error.__cause__ or error).strip().splitlines()
        cause = " ... ".join(dict.fromkeys((lines[0], lines[-1])))
        raise ValueError(
            f"dataset_name={name!r} cannot be read: {cause}. Files with different columns do not form one dataset: "
            "pass them with --train_file, --validation_file and --test_file."
        ) from error


def _read(file: Path) -> Dataset:
    if file.stat().st_size == 0:
        raise ValueError(f"{str(file)!r} is empty. Pass a file with at least one row.")
    try:
        return load_dataset(FILE_FORMATS[file.suffix], data_files=str(file), split="train")
    except Exception as error:  # the readers of three formats raise as many kinds of errors
        cause = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"{str(file)!r} cannot be read as {FILE_FORMATS[file.suffix]}: {cause}") from error


def _complete_splits(rows: DatasetDict, name: str) -> DatasetDict:
    if "train" not in rows:
        raise ValueError(f"{name} has the splits {', '.join(map(str, rows))} and no 'train'. Pass files instead.")
    if "validation" not in rows:
        if len(rows["train"]) < 2:
            raise ValueError(f"{name} has one training row and no validation rows. Pass --validation_file.")
        n_held_out = max(1, int(len(rows["train"]) * HELD_OUT_FRACTION))
        held_out = rows["train"].train_test_split(test_size=n_held_out, seed=SPLIT_SEED)
        rows["train"], rows["validation"] = held_out["train"], held_out["test"]
    if "test" not in rows:
        rows["test"] = rows["validation"]
    return rows


def _first(rows: Dataset, limit: int | None, split: str) -> Dataset:
    """The first `limit` rows, or all."""
    if len(rows) == 0:
        raise ValueError(f"The {split} rows are empty. Pass data with at least one row.")
    return rows.select(range(min(len(rows), limit or len(rows))))


@dataclass(frozen=True)
class PromptFormat:
    """The template of prompts, and how long one may be.

    A source that is too long is cut at its end, so that the words of the prompt after it survive.

    Args:
        template: With `{source}`.
        tokenizer: Of the model.
        limit: Most tokens of a prompt together with those that a call reserves.
    """

    template: str
    tokenizer: PreTrainedTokenizerBase
    limit: int

    @functools.cached_property
    def overhead(self) -> int:
        """Tokens of a prompt beside its source."""
        return len(self.tokenizer(self.template.format(source=""))["input_ids"]) + SPECIAL_TOKENS

    def fit(self, source: str, reserved: int = 0) -> str:
        """`source`, cut so that its prompt and `reserved` further tokens keep the limit.

        Raises:
            ValueError: There is no room for a source.
        """
        used = self.overhead + reserved
        if self.limit - used < MIN_SOURCE_TOKENS:
            raise ValueError(
                f"Prompt and target take {used} tokens and max_length is {self.limit}, which leaves no room for the "
                "source. Raise max_length, or remove rows with such long targets."
            )
        return cut_to_tokens(source, self.tokenizer, self.limit - used)

    def source_of(self, prompt: str) -> str | None:
        """The source of a prompt that was made with the template; `None` for any other text."""
        before, _, after = self.template.format(source="\0").partition("\0")
        if not (prompt.startswith(before) and prompt.endswith(after) and len(prompt) >= len(before) + len(after)):
            return None
        return prompt[len(before) : len(prompt) - len(after)]


def room_for_answers(limit: int, positions: int, max_new_tokens: int) -> int:
    """Tokens of `limit` that a decoder-only model's prompt leaves free for what is generated.

    Args:
        limit: Most tokens of a prompt with its target.
        positions: Of the model, of which those beyond `limit` are free anyway.
        max_new_tokens: That are generated.

    Returns:
        Never more than half of `limit`.
    """
    return min(max(0, max_new_tokens - (positions - limit)), limit // 2)


def to_prompts(
    rows: Dataset,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    source: ModelSource,
    max_length: int | None,
    prompt: str | None = None,
    reserved: int = 0,
    max_new_tokens: int = 0,
) -> Dataset:
    """Rows with `source` and `target` to rows that also have `prompt` and `completion`.

    A source that is too long is cut at its end, so that the words of the prompt after it, and the completion, survive.
    A target is cut where it would leave no room for a source. The columns `CUTS` say what of a row was cut.

    Args:
        rows: From `load_task_data`.
        task: Gives the prompt.
        tokenizer: Of the model.
        source: The model; its number of positions bounds the length.
        max_length: Further bound in tokens: prompt and completion together for decoder-only models, the prompt for
            encoder-decoder models.
        prompt: Template that replaces the task's.
        reserved: Positions of the sequence, or of the encoder, that the method takes.
        max_new_tokens: That will be generated for each row; a decoder-only model's prompt leaves room for them.

    Raises:
        ValueError: A prompt that leaves no room for a source.
    """
    shares_room = source.family == "decoder_only"
    limit = length_limit(source.config, tokenizer, max_length, reserved)
    prompts = PromptFormat(prompt or task.prompt, tokenizer, limit)
    answer = room_for_answers(limit, length_limit(source.config, tokenizer, None, reserved), max_new_tokens)

    def render(row: dict[str, str]) -> dict[str, Any]:
        target, used = row["target"], 0
        if shares_room:
            target = cut_to_tokens(target, tokenizer, limit - prompts.overhead - MIN_SOURCE_TOKENS)
            used = max(len(tokenizer(target, add_special_tokens=False)["input_ids"]), answer)
        text = prompts.fit(row["source"], used)
        cuts = {SOURCE_CUT: text != row["source"], TARGET_CUT: target != row["target"]}
        return {**task.render(text, target, prompts.template), **cuts}

    return rows.map(render, desc="Prompts")


def length_limit(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, max_length: int | None, reserved: int = 0
) -> int:
    """The smallest of the bounds that model (less `reserved` positions), tokenizer and user set, in tokens."""
    positions = model_positions(config, reserved)
    return min(bound for bound in (max_length, positions, tokenizer.model_max_length) if bound)


def model_positions(config: PreTrainedConfig, reserved: int = 0) -> int | None:
    """Positions of the encoder or the whole model, less `reserved` ones; `None` where their number is not bounded."""
    positions = position_limits(config, with_rotary=True).source
    return positions - reserved if positions else None


def cut_to_tokens(text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> str:
    """The longest start of `text` of at most `max_tokens` tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return text if len(ids) <= max_tokens else tokenizer.decode(ids[:max_tokens], skip_special_tokens=True)
