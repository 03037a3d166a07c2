"""The whole model, in transformers' layout."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path

from left_trainer.export.formats import Answers, Trained
from left_trainer.export.greedy import hugging_face_answers
from left_trainer.export.verification import EXACT, HALF
from left_trainer.models import auto_class
from left_trainer.runs.merging import merge_adapter


def write(trained: Trained, folder: Path) -> None:
    """Merge the adapter, as `left-trainer merge` does."""
    options = trained.source.options
    dtype = options.get("dtype")
    merge_adapter(
        str(trained.path),
        folder / "merged",
        trained.source.trust_remote_code,
        str(dtype).removeprefix("torch.") if dtype else None,
    )
    for file in (folder / "merged").iterdir():
        shutil.move(file, folder / file.name)
    (folder / "merged").rmdir()


def answers(trained: Trained, folder: Path) -> Answers:
    """Those of plain transformers."""
    model = auto_class(trained.source.family).from_pretrained(
        folder, dtype="auto", trust_remote_code=trained.source.trust_remote_code
    )
    return hugging_face_answers(model.eval(), trained.reference)


def tolerance(trained: Trained) -> float:
    """That of weights that merging rounds once more, where they are in half precision."""
    return EXACT if trained.precision == "float32" else HALF


def runtime() -> str:
    """Name and version."""
    return f"transformers {version('transformers')}"


def usage(trained: Trained, folder: Path) -> str:
    """Code that loads it."""
    load = f"{auto_class(trained.source.family).__name__}.from_pretrained({str(folder)!r})"
    return load if trained.source.family == "encoder_decoder" else f"{load}\nvllm serve {folder}"
