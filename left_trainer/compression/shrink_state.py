"""How far a run has shrunk its model: what its checkpoints hold beside the weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from left_trainer.compression.cuts import Kept
from left_trainer.compression.sizes import Size

SHRINKING_FILE = "shrinking.json"


@dataclass(frozen=True)
class SizeStep:
    """A size that the model has had.

    Args:
        step: Optimizer steps before it had it.
        parameters: Apart from embeddings and output head.
        share: Of the parameters that the model began with.
        size: Numbers of blocks, neurons and heads.
    """

    step: int
    parameters: int
    share: float
    size: Size


@dataclass(frozen=True)
class ShrinkState:
    """What a run that shrinks goes on from.

    Args:
        kept: What is left of the model that the run began with; `None` while that is all.
        progress: Share of all that is to be removed that is gone.
        history: The sizes, from the first.
        start_score: Of the whole model, where `keep` compares with it.
        held_step: The step at whose end the last size that `keep` allows was left; `None` where there is none yet.
        is_final: Whether `keep` has ended the shrinking.
        last: The size at the end, where it is chosen by importance at the start; `None` where it is not.
    """

    kept: Kept | None = None
    progress: float = 0.0
    history: tuple[SizeStep, ...] = ()
    start_score: float | None = None
    held_step: int | None = None
    is_final: bool = False
    last: Size | None = None

    def write(self, folder: str | Path) -> None:
        """Write `shrinking.json` into `folder`, which is put in its place later."""
        content = {**vars(self), "history": [dataclasses.asdict(step) for step in self.history]}
        content["last"] = None if self.last is None else dataclasses.asdict(self.last)
        content["kept"] = None if self.kept is None else _plain(self.kept)
        (Path(folder) / SHRINKING_FILE).write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def read(cls, folder: str | Path) -> ShrinkState | None:
        """The state in `folder`; `None` where there is none."""
        path = Path(folder) / SHRINKING_FILE
        if not path.is_file():
            return None
        content: dict[str, Any] = json.loads(path.read_bytes())
        kept, last = content.pop("kept"), content.pop("last")
        history = tuple(SizeStep(**{**step, "size": Size(**step["size"])}) for step in content.pop("history"))
        return cls(
            kept=None if kept is None else _kept(kept),
            last=None if last is None else Size(**last),
            history=history,
            **content,
        )


def _plain(kept: Kept) -> dict[str, Any]:
    return {
        "layers": {name: list(indices) for name, indices in kept.layers.items()},
        "neurons": {name: indices.tolist() for name, indices in kept.neurons.items()},
        "heads": {name: indices.tolist() for name, indices in kept.heads.items()},
    }


def _kept(content: Mapping[str, Any]) -> Kept:
    return Kept(
        layers={name: tuple(indices) for name, indices in content["layers"].items()},
        neurons={name: torch.tensor(indices) for name, indices in content["neurons"].items()},
        heads={name: torch.tensor(indices) for name, indices in content["heads"].items()},
    )


def same_parts(first: Kept | None, second: Kept | None) -> bool:
    """Whether two records keep the same parts."""
    if first is None or second is None:
        return first is second
    return _plain(first) == _plain(second)
