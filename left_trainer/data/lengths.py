"""Rows that are too long: cut, and counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from left_trainer.data.cut_rows import CutRows
from left_trainer.data.dataset_types import AnyDataset
from left_trainer.token_mean import IGNORE_INDEX

# Columns of a row that say whether its texts were cut.
SOURCE_CUT, TARGET_CUT = CUTS = "source_was_cut", "target_was_cut"
SLICES = {"keep_start": lambda limit: slice(None, limit), "keep_end": lambda limit: slice(-limit, None)}


def count_cut_rows(rows: Dataset, n_rows: int | None = None) -> CutRows:
    """The counts of what the columns `CUTS` say; rows without them were not cut.

    Args:
        rows: After the cut.
        n_rows: Before some were dropped.
    """
    sources, targets = (sum(rows[name]) if name in rows.column_names else 0 for name in CUTS)
    total = len(rows) if n_rows is None else n_rows
    return CutRows(total, sources, targets, total - len(rows))


def cut_sequences(dataset: AnyDataset, limit: int | None, mode: str, keeps_prompts: bool = False) -> AnyDataset:
    """Rows of a decoder-only model with at most `limit` tokens, and in `CUTS` what of them was cut.

    Args:
        dataset: With `input_ids` and `labels`, which have -100 at the prompt. Columns of `CUTS` are added to.
        limit: Number of tokens; `None` cuts nothing.
        mode: TRL's `truncation_mode`.
        keeps_prompts: Whether a row that would be left without prompt or target keeps the end of its prompt, which can
            be continued but has no loss.
    """
    if limit is None:
        return dataset

    def cut(row: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: list(row[name])[SLICES[mode](limit)] for name in ("input_ids", "labels")}
        before, after = (_number_of_targets(labels) for labels in (row["labels"], kept["labels"]))
        has_both = after and kept["labels"][0] == IGNORE_INDEX
        prompt = _prompt(row)[-limit:]
        if keeps_prompts and len(row["labels"]) > limit and prompt and not has_both:
            kept, after = {"input_ids": prompt, "labels": [IGNORE_INDEX] * len(prompt)}, 0
        source_cut = len(row["labels"]) - before > len(kept["labels"]) - after
        return {
            **kept,
            SOURCE_CUT: bool(row.get(SOURCE_CUT)) or source_cut,
            TARGET_CUT: bool(row.get(TARGET_CUT)) or before > after,
        }

    return dataset.map(cut, **({"desc": "Truncating"} if isinstance(dataset, Dataset) else {}))


def has_target(row: Mapping[str, Any]) -> bool:
    """Whether a row has something to learn."""
    return _number_of_targets(row["labels"]) > 0


def _prompt(row: Mapping[str, Any]) -> list[int]:
    """The tokens before the first that has a label."""
    end = next((place for place, label in enumerate(row["labels"]) if label != IGNORE_INDEX), None)
    return list(row["input_ids"][:end])


def _number_of_targets(labels: list[int]) -> int:
    return len(labels) - labels.count(IGNORE_INDEX)
