"""What prompts begin with in common: read by the model once, and not for each row and beam anew.

Prompts are padded on the left. The first columns of a batch are therefore the padding of a row, which nothing attends
to, and the first tokens of its prompt. Where these are the same for all rows, the keys and values of the columns are
put together from one row that was read before, and the model reads the columns behind them alone. Every token stays in
its column and keeps its position, so that masks, windows and biases that count either count right.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from left_trainer.evaluation.decoded_rows import cache_layers
from left_trainer.kernels.fast_paths import FastPath

LEAST_TOKENS = 16  # below them another pass, of one row, is hardly less work
OF_PROMPTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")


@dataclass(frozen=True)
class Prompts:
    """The prompts of a batch as a decoder-only model takes them.

    Args:
        inputs: Those of `OF_PROMPTS` that there are, each `(rows, width, ...)`, padded on the left. `generate` leaves
            out the mask where there is no padding.
    """

    inputs: Mapping[str, torch.Tensor]

    @property
    def tokens(self) -> torch.Tensor:
        """Ids, `(rows, width)`, or embeddings, `(rows, width, hidden)`."""
        return self.inputs["input_ids" if "input_ids" in self.inputs else "inputs_embeds"]

    @property
    def padding(self) -> torch.Tensor:
        """Columns of padding of each row, `(rows,)`."""
        mask = self.inputs.get("attention_mask")
        return self.tokens.new_zeros(len(self.tokens), dtype=torch.long) if mask is None else mask.argmax(dim=1)

    def longest(self) -> Prompts:
        """The row with the least padding, without it."""
        row = int(self.padding.argmin())
        start = int(self.padding[row])
        return Prompts({name: value[row : row + 1, start:] for name, value in self.inputs.items()})

    def columns(self, start: int, stop: int | None = None) -> dict[str, torch.Tensor]:
        """Some columns, and the mask from the first one on."""
        return {name: value[:, 0 if name == "attention_mask" else start : stop] for name, value in self.inputs.items()}

    def begin_like(self, first: torch.Tensor) -> int:
        """With how many tokens of `first`, ids or embeddings of one prompt, all prompts begin."""
        tokens, rows = self.tokens, torch.arange(len(self.tokens), device=self.tokens.device)
        places = torch.arange(min(len(first), tokens.shape[1]), device=tokens.device) + self.padding[:, None]
        found = tokens[rows[:, None], places.clamp(max=tokens.shape[1] - 1)]
        is_equal = (found == first[: places.shape[1]]).reshape(*places.shape, -1).all(dim=-1)
        is_equal &= places < tokens.shape[1]
        return int(is_equal.all(dim=0).int().cumprod(dim=0).sum())


class PromptReader:
    """Reads the prompts of the batches of one evaluation.

    Args:
        path: Counts the batches.
    """

    def __init__(self, path: FastPath) -> None:
        self.path = path
        self.known: torch.Tensor | None = None  # tokens of a prompt
        self.layers: list[Any] = []  # their keys and values

    def read(self, model: PreTrainedModel, arguments: Mapping[str, Any], copies: int) -> Any:
        """Outputs of `model` for whole prompts, `(rows * copies, ...)`.

        Args:
            model: A decoder-only one.
            arguments: Its own for the first pass, with an empty cache.
            copies: How many rows with the same prompt follow each other: the beams.
        """
        given = {name: arguments[name] for name in OF_PROMPTS if arguments.get(name) is not None}
        further = {name: value for name, value in arguments.items() if name not in OF_PROMPTS}
        rows = len(Prompts(given).tokens)
        prompts = Prompts({name: value.expand(rows, *value.shape[1:])[::copies] for name, value in given.items()})
        length = self._known_columns(model, prompts, further)
        self.path.record(
            None if length else f"the prompts of a batch have fewer than {LEAST_TOKENS} first tokens in common"
        )
        if length:
            self._fill(further["past_key_values"], prompts.padding, length)
        outputs = model(**prompts.columns(length), **further, return_dict=True)
        outputs.past_key_values.batch_repeat_interleave(copies)
        outputs.logits = outputs.logits[:, -1:].repeat_interleave(copies, dim=0)
        return outputs

    def _known_columns(self, model: PreTrainedModel, prompts: Prompts, further: Mapping[str, Any]) -> int:
        """How many columns the model need not read. What the prompts have in common is read here, in one row."""
        longest, cache = prompts.longest(), further["past_key_values"]
        # One column has to be left. A layer with a window keeps no more than is in it.
        windows = [layer.sliding_window for layer in cache.layers if layer.is_sliding]
        in_common = min(
            [prompts.begin_like(longest.tokens[0]), *(length - 1 for length in (prompts.tokens.shape[1], *windows))]
        )
        known = 0 if self.known is None else min(in_common, longest.begin_like(self.known))
        if in_common >= LEAST_TOKENS and 2 * known < in_common:
            own = {**further, "past_key_values": copy.deepcopy(cache)}
            outputs = model(**longest.columns(0, in_common), **own, return_dict=True)
            self.known, self.layers = longest.tokens[0, :in_common], list(cache_layers(outputs.past_key_values))
            known = in_common
        return known if known >= LEAST_TOKENS else 0

    def _fill(self, cache: Any, padding: torch.Tensor, length: int) -> None:
        """Give `cache` the first `length` columns of rows with `padding`, `(rows,)`."""
        places = (torch.arange(length, device=padding.device) - padding[:, None]).clamp(min=0)
        for index, layer in enumerate(self.layers):
            keys, values = (known[0][:, places].transpose(0, 1) for known in (layer.keys, layer.values))
            cache.update(keys, values, index)
