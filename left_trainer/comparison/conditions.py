"""What a cell is measured on: what has to be equal for scores to be comparable."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import DatasetDict

from left_trainer.comparison.cell import Cell
from left_trainer.embedded import MODEL_NAMES
from left_trainer.runs.fine_tuning import with_task_settings
from left_trainer.tasks import get_task


def conditions(cell: Cell, data: Mapping[str, Any], output_dir: Path) -> dict[str, Any]:
    """What a cell is measured on, the same on every machine: model, data, prompt, generation settings.

    Args:
        cell: The cell, with conditions that are not read.
        data: `data_sha256` of its task.
        output_dir: Of the comparison.
    """
    model_args, data_args, args = cell.parse(output_dir)
    task = get_task(cell.task)
    args = with_task_settings(task, args)
    return {
        "base_model": model_title(model_args.source(args).base_name),
        "prompt": data_args.prompt or task.prompt,
        "max_new_tokens": args.generation_max_length,
        "num_beams": args.generation_num_beams,
        **data,
    }


def model_title(name_or_path: str) -> str:
    """What a model is called on every machine: its hub name, `embedded/t5`, or the last part of a path."""
    embedded = {path: name for name, path in MODEL_NAMES.items()}
    path = Path(name_or_path)
    return embedded.get(name_or_path) or (path.resolve().name if path.exists() else name_or_path)


def data_sha256(data: DatasetDict) -> str:
    """Of the texts of all splits: the same on every machine, wherever the files lie."""
    digest = hashlib.sha256()
    for split in sorted(data):
        for column in ("source", "target"):
            for text in data[split][column]:
                digest.update(text.encode())
                digest.update(b"\0")
    return digest.hexdigest()
