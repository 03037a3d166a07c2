"""Rows to features: which form a dataset has, and tokenization for encoder-decoder models.

Decoder-only models are tokenized by TRL, whose forms (`prompt`/`completion`, `text`, `messages`) pass through.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from left_trainer.adapters.task_ids import TASK_IDS
from left_trainer.data.columns import first_blank, holds_text
from left_trainer.data.dataset_types import AnyDataset, is_lazy
from left_trainer.data.encoding import token_ids
from left_trainer.data.lengths import SOURCE_CUT, TARGET_CUT, target_counts
from left_trainer.data.mapping import Columns, add_columns
from left_trainer.models import ModelFamily
from left_trainer.models.positions import Limits
from left_trainer.token_mean import IGNORE_INDEX

FORMS: dict[ModelFamily, tuple[tuple[str, ...], ...]] = {
    "encoder_decoder": (("input_ids", "labels"), ("prompt", "completion")),
    "decoder_only": (("input_ids",), ("prompt", "completion"), ("messages",), ("conversations",), ("text",)),
}


FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "attention_mask": List(Value("int8")),
        "labels": List(Value("int64")),
        SOURCE_CUT: Value("bool"),
        TARGET_CUT: Value("bool"),
    }
)
# Columns from which TRL makes labels.
MASKS = ("completion_mask", "assistant_masks")


def dataset_form(dataset: AnyDataset, family: ModelFamily, argument: str, text_field: str = "text") -> tuple[str, ...]:
    """The columns by which `dataset` is recognised: the first entry of `FORMS` that it has.

    Args:
        dataset: A dataset whose first row can be read.
        family: The model's family.
        argument: The user's argument that holds the dataset, for errors.
        text_field: Name of the column with plain text, TRL's `dataset_text_field`.

    Raises:
        ValueError: The dataset is empty, has no known form, or its first rows have an empty target.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"{argument} is empty. Pass a dataset with at least one row.")
    forms = [tuple(text_field if column == "text" else column for column in form) for form in FORMS[family]]
    for form in forms:
        if set(form) <= set(first):
            if is_lazy(dataset):
                _check_lazy(first, argument)
            else:
                _check_targets(dataset, form, argument)
            return form
    described = "; or ".join(" and ".join(repr(column) for column in form) for form in forms)
    raise ValueError(
        f"{argument} has the columns {', '.join(map(repr, first))}. For {family.replace('_', '-')} models LeftTrainer "
        f"needs {described}. Rename your columns, for example "
        f"dataset.rename_columns({{{next(iter(first))!r}: 'prompt', ...}})."
    )


def _check_targets(dataset: AnyDataset, form: tuple[str, ...], argument: str) -> None:
    """Raise `ValueError` on the first row without a target: it would train on nothing, or divide by zero."""
    if not isinstance(dataset, Dataset) or form[-1] not in ("completion", "labels"):
        return
    index = _first_without_target(dataset, form[-1])
    if index is not None:
        raise ValueError(
            f"Row {index} of {argument} has an empty {form[-1]!r}, so it has nothing to learn. Remove such rows, "
            f"for example dataset.filter(lambda row: row[{form[-1]!r}])."
        )


def _first_without_target(dataset: Dataset, column: str) -> int | None:
    if column == "labels":
        return next(iter(np.flatnonzero(target_counts(dataset) == 0).tolist()), None)
    if holds_text(dataset.features[column]):
        return first_blank(dataset, column)
    return next((index for index, target in enumerate(dataset[column]) if not _text_of(target).strip()), None)


def _check_lazy(first: Mapping[str, Any], argument: str) -> None:
    """Raise `ValueError` unless rows that are computed when they are read come as tokens: nothing else is done to them.

    Mapping such rows would keep what they are computed to once, a random augmentation too.
    """
    if not {"input_ids", "labels"} <= set(first):
        raise ValueError(
            f"{argument} computes its rows when they are read (set_transform, or a torch Dataset), and they hold "
            f"{', '.join(map(repr, first))}. Let them hold 'input_ids' and 'labels', or pass rows that are stored: "
            "datasets.Dataset.from_list([dataset[i] for i in range(len(dataset))])."
        )


def columns_of_other_forms(columns: Sequence[str], form: Sequence[str], text_field: str) -> list[str]:
    """Columns beside those of `form` by which TRL would take the rows for another form.

    It would then put the end of the sequence onto another column than the completion (trl 1.16).
    """
    known = {column for forms in FORMS.values() for each in forms for column in each} | {text_field}
    known |= {"chosen", "rejected"}
    return [column for column in columns if column in known and column not in form]


def _text_of(target: Any) -> str:
    """The text of a completion, plain or as chat messages (whose content may be absent beside tool calls)."""
    return target if isinstance(target, str) else str(target or "")


def _columns(rows: AnyDataset) -> set[str]:
    is_stored = isinstance(rows, Dataset) and not is_lazy(rows)
    return set(rows.column_names if is_stored else next(iter(rows), {}))


def are_prompts(rows: AnyDataset) -> bool:
    """Whether the rows that a user gave are text prompts alone, with nothing to compare an answer with."""
    columns = _columns(rows)
    return "prompt" in columns and not {"completion", "input_ids"} & columns


def have_no_labels(rows: AnyDataset) -> bool:
    """Whether the rows that a user gave are token ids alone. A model that generates continues them."""
    columns = _columns(rows)
    return "input_ids" in columns and not {"labels", *MASKS} & columns


def completion_texts(rows: AnyDataset) -> list[str] | None:
    """The text of the completions as the user wrote it; `None` where there is none: in rows of tokens, or of prompts.

    Of a completion of chat messages it is what they say.
    """
    columns = _columns(rows)
    if "completion" not in columns or "input_ids" in columns:
        return None
    plain = rows.with_format(None) if isinstance(rows, Dataset) else None
    completions = plain["completion"] if plain else (row["completion"] for row in rows)
    return [
        text if isinstance(text, str) else "\n".join(str(message.get("content") or "") for message in text)
        for text in completions
    ]


def tokenize_pairs(
    dataset: AnyDataset,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    truncation_mode: str = "keep_start",
    num_proc: int | None = None,
) -> AnyDataset:
    """Prompt/completion rows to `input_ids`, `attention_mask` and `labels`; other columns but `task_ids` are dropped.

    Rows without a completion get no labels.

    Args:
        dataset: Rows with the text columns `prompt` and `completion`.
        tokenizer: Of an encoder-decoder model. Labels end with its end-of-sequence token, cut ones too.
        limits: Most tokens of source and of target.
        truncation_mode: `keep_start` or `keep_end` of the source.
        num_proc: Number of processes. By default one, in which a fast tokenizer uses a thread a core.

    Returns:
        Rows with the columns `CUTS` beside, which say what of a row was cut.
    """
    first = next(iter(dataset))
    for column in ("prompt", "completion"):
        if not isinstance(first.get(column, ""), str):
            raise ValueError(
                f"The column {column!r} holds {type(first[column]).__name__}; encoder-decoder models need text. Render "
                "chat messages to text first."
            )
    end = [] if _ends_targets(tokenizer) or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    has_targets = "completion" in first
    cuts = (SOURCE_CUT, TARGET_CUT) if has_targets else (SOURCE_CUT,)

    def tokenize(rows: Columns) -> dict[str, list[Any]]:
        features, was_cut = _sources(rows["prompt"], tokenizer, limits.source, truncation_mode)
        columns, cut = {"input_ids": features["input_ids"], "attention_mask": features["attention_mask"]}, [was_cut]
        if has_targets:
            # A completion starts with the space that parts it from the prompt; a decoder of its own needs none.
            completions = [completion.strip() for completion in rows["completion"]]
            room = None if limits.target is None else limits.target - len(end)
            targets, was_cut = _tokenize(tokenizer, "text_target", completions, room, "right")
            columns["labels"] = [ids if ids[-1:] == end else [*ids, *end] for ids in targets]
            cut.append(was_cut)
        for name, now in zip(cuts, cut, strict=True):
            columns[name] = [bool(a or b) for a, b in zip(now, rows.get(name, now), strict=True)]
        return columns

    reads = [name for name in ("prompt", "completion", *cuts) if name in first]
    makes = Features(
        {name: kind for name, kind in FEATURES.items() if has_targets or name not in ("labels", TARGET_CUT)}
    )
    removes = [name for name in first if name != TASK_IDS]
    return add_columns(dataset, tokenize, reads, makes, removes, desc="Tokenizing", num_proc=num_proc)


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, argument: str, texts: list[str], limit: int | None, side: str
) -> tuple[list[list[int]], list[bool]]:
    """Tokens of `texts`, and which of these were cut, on which side. Texts are passed as `text` or `text_target`."""
    ids = token_ids(tokenizer, texts, argument)
    too_long = [number for number, row in enumerate(ids) if limit is not None and len(row) > limit]
    if too_long:
        tokenizer.truncation_side, previous = side, tokenizer.truncation_side
        longest = [texts[number] for number in too_long]
        cut = tokenizer(**{argument: longest}, truncation=True, max_length=limit)["input_ids"]
        tokenizer.truncation_side = previous
        for number, row in zip(too_long, cut, strict=True):
            ids[number] = row
    was_cut = set(too_long)
    return ids, [number in was_cut for number in range(len(texts))]


def _ends_targets(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `tokenizer` adds the end of the sequence to a target by itself, after it or, as mBART, near its end."""
    target, text = (tokenizer(text_target="a", add_special_tokens=add)["input_ids"] for add in (True, False))
    starts = (start for start in range(len(target)) if target[start : start + len(text)] == text)
    return tokenizer.eos_token_id in target[next(starts, 0) + len(text) :]


def tokenize_prompts(rows: AnyDataset, tokenizer: PreTrainedTokenizerBase, **template: Any) -> AnyDataset:
    """Rows of prompts alone to `input_ids` and, for TRL's collator, `labels` of -100, for a decoder-only model.

    Args:
        rows: With the column `prompt`: text or chat messages, and perhaps `tools`; or with `input_ids` alone.
        tokenizer: Of the model.
        template: For the tokenizer's chat template.
    """

    def tokenize(row: Mapping[str, Any]) -> dict[str, Any]:
        if "input_ids" in row:
            ids = row["input_ids"]
        elif isinstance(row["prompt"], str):
            ids = tokenizer(row["prompt"])["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(
                row["prompt"], tools=row.get("tools"), add_generation_prompt=True, return_dict=False, **template
            )
        return {"input_ids": ids, "labels": [IGNORE_INDEX] * len(ids)}

    return rows.map(tokenize)


def tokenize_sources(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int | None, truncation_mode: str = "keep_start"
) -> dict[str, Any]:
    """What the encoder reads of each text: `input_ids` and `attention_mask`; arguments as for `tokenize_pairs`."""
    return _sources(texts, tokenizer, max_length, truncation_mode)[0]


def _sources(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, limit: int | None, truncation_mode: str
) -> tuple[dict[str, Any], list[bool]]:
    """As `tokenize_sources`, and which texts were cut."""
    side = {"keep_start": "right", "keep_end": "left"}[truncation_mode]
    ids, cut = _tokenize(tokenizer, "text", texts, limit, side)
    return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}, cut


def without_appended_end(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """`tokenizer`, or a copy that does not append the end-of-sequence token where it does (`add_eos_token=True`).

    A decoder-only model continues its prompt. After an end of sequence there is nothing to continue, and behind a
    completion, which ends with one already, it would be a second one.

    Raises:
        ValueError: The tokenizer appends it in a way that cannot be switched off.
    """
    if not _appends_end(tokenizer):
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    backend = getattr(changed, "backend_tokenizer", None)
    if backend is None:
        changed.add_eos_token = False
    else:
        content = json.loads(backend.to_str())
        _remove_end(content["post_processor"], tokenizer.eos_token)
        backend.post_processor = type(backend).from_str(json.dumps(content)).post_processor
    if _appends_end(changed):
        raise ValueError(
            f"processing_class ({type(tokenizer).__name__}) appends {tokenizer.eos_token!r} to every text, after which "
            "a decoder-only model has nothing to continue. Load it with add_eos_token=False."
        )
    return changed


def _appends_end(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = tokenizer("a")["input_ids"]
    return tokenizer.eos_token_id is not None and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id


def _remove_end(processor: dict[str, Any], token: str) -> None:
    """Take `token` out of the end of a fast tokenizer's template; `processor` may be a sequence of several."""
    for part in processor.get("processors", ()):
        _remove_end(part, token)
    template = processor.get("single", [])
    if isinstance(template, list) and template and template[-1].get("SpecialToken", {}).get("id") == token:
        template.pop()


def first_row_ids(dataset: AnyDataset, tokenizer: PreTrainedTokenizerBase, text_field: str = "text") -> list[int]:
    """Token ids of the first row, the prompt and what follows it joined."""
    row = next(iter(dataset))
    if "input_ids" in row:
        return list(row["input_ids"])
    messages = row.get("messages") or row.get("conversations")
    if messages:
        return list(tokenizer.apply_chat_template(messages, return_dict=False))
    text = row["prompt"] + row["completion"] if "prompt" in row else row[text_field]
    return list(tokenizer(text)["input_ids"])


def named_datasets(train: Any, evaluation: Any) -> dict[str, Any]:
    """The given datasets under the names of their arguments."""
    named = {"train_dataset": train}
    if isinstance(evaluation, dict):
        named |= {f"eval_dataset[{name!r}]": dataset for name, dataset in evaluation.items()}
    else:
        named["eval_dataset"] = evaluation
    return {name: dataset for name, dataset in named.items() if dataset is not None}
