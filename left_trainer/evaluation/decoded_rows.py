"""Rows that are generated for step by step: what the model has of them, to be taken apart and put together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
# Arguments of a model that are known to belong to rows, or to be the same for all of them.
OF_ROWS = ("past_key_values", "encoder_outputs", "attention_mask", "position_ids")
OF_ALL = ("use_cache", "logits_to_keep")
ONCE = ("inputs_embeds",)  # read by the first pass of a decoder-only model


def why_not_row_by_row(model: PreTrainedModel, inputs: Mapping[str, Any]) -> str | None:
    """Why rows cannot be taken out of what `model` reads in generation; `None` where they can."""
    further = sorted(name for name in inputs if inputs[name] is not None and name not in (*OF_ROWS, *OF_ALL, *ONCE))
    if further:
        return f"the model is given {further[0]}"
    if not inputs.get("use_cache"):
        return "there is no cache"
    given = inputs.get("past_key_values")
    return why_not_divisible(given) or ("a cache is given" if given is not None and given.get_seq_length() else None)


def why_not_divisible(cache: Any) -> str | None:
    """Why rows cannot be taken out of `cache`, one that the model is given or has filled; `None` where they can."""
    for part in _caches(cache):
        kinds = [type(part), *map(type, getattr(part, "layers", ()))]
        other = [kind.__name__ for kind in kinds if kind not in (DynamicCache, *LAYERS)]
        if other:
            return f"the cache is a {other[0]}"
    return None


@dataclass
class DecodedRows:
    """Rows with equally many new tokens, and what the model and the search have of them.

    Args:
        keys: By which the caller knows each row.
        copies: Rows of the model for each of these: the beams.
        new_tokens: That each row has.
        state: Of the search; the first dimension is that of `keys`.
        inputs: Of the model; the first dimension is `keys` times `copies`. The masks of an encoder-decoder model belong
            to the source, on the right of which there may be padding; those of a decoder-only model to all tokens, on
            the left of which there may be.
    """

    keys: list[int]
    copies: int
    new_tokens: int
    state: dict[str, torch.Tensor]
    inputs: dict[str, Any]

    @property
    def has_encoder(self) -> bool:
        """Whether the model is an encoder-decoder model."""
        return self.inputs.get("encoder_outputs") is not None

    @property
    def width(self) -> int:
        """Tokens that each row holds in memory."""
        source = self.inputs["encoder_outputs"][0].shape[1] if self.has_encoder else 0
        return int(source + self.inputs["past_key_values"].get_seq_length())

    def add_token(self, outputs: Any) -> None:
        """Another token was computed, with `outputs` of the model."""
        self.new_tokens += 1
        self.inputs["past_key_values"] = outputs.past_key_values
        mask, positions = (self.inputs.get(name) for name in ("attention_mask", "position_ids"))
        if mask is not None and not self.has_encoder:
            self.inputs["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        if positions is not None:
            self.inputs["position_ids"] = positions[:, -1:] + 1  # those before it are in the cache

    def kept(self, is_kept: torch.Tensor) -> DecodedRows:
        """The rows for which `is_kept`, `(rows,)`, holds. These here are used up."""
        chosen = is_kept.nonzero().flatten()
        flat = is_kept.repeat_interleave(self.copies).nonzero().flatten()
        for layer in cache_layers(self.inputs["past_key_values"]):
            layer.keys, layer.values = layer.keys[flat], layer.values[flat]
        inputs = dict(self.inputs)
        if self.has_encoder:
            inputs["encoder_outputs"] = type(inputs["encoder_outputs"])(inputs["encoder_outputs"][0][flat])
        for name in ("attention_mask", "position_ids"):
            if inputs.get(name) is not None:
                inputs[name] = inputs[name].expand(len(self.keys) * self.copies, -1)[flat]
        keys = [self.keys[row] for row in chosen.tolist()]
        return DecodedRows(keys, self.copies, self.new_tokens, {k: v[chosen] for k, v in self.state.items()}, inputs)


def join_rows(parts: Sequence[DecodedRows]) -> DecodedRows:
    """All rows of `parts`, which have equally many new tokens, as one. The parts are used up."""
    first, others = parts[0], parts[1:]
    if not others:
        return first
    inputs = dict(first.inputs)
    inputs |= _joined_sources(parts) if first.has_encoder else _joined_prompts(parts)
    state = {name: torch.cat([part.state[name] for part in parts]) for name in first.state}
    keys = [key for part in parts for key in part.keys]
    return DecodedRows(keys, first.copies, first.new_tokens, state, inputs)


def _joined_sources(parts: Sequence[DecodedRows]) -> dict[str, Any]:
    """Joined inputs of an encoder-decoder model: the sources have like widths, what is decoded has already."""
    hidden = [part.inputs["encoder_outputs"][0] for part in parts]
    masks = [_source_mask(part) for part in parts]
    longest = max(_last_column(mask) + 1 for mask in masks)
    width = longest if all(mask.shape == states.shape[:2] for mask, states in zip(masks, hidden, strict=True)) else None

    def join(tensors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
        to = width or max(tensor.shape[dim] for tensor in tensors)
        sides = [0, 0] * (tensors[0].ndim - 1 - dim)
        return torch.cat([pad(tensor, (*sides, 0, to - tensor.shape[dim])) for tensor in tensors])

    caches = [part.inputs["past_key_values"] for part in parts]
    for layer, *others in zip(*(cache.self_attention_cache.layers for cache in caches), strict=True):
        layer.keys = torch.cat([layer.keys, *(other.keys for other in others)])
        layer.values = torch.cat([layer.values, *(other.values for other in others)])
    for layer, *others in zip(*(cache.cross_attention_cache.layers for cache in caches), strict=True):
        layer.keys = join([layer.keys, *(other.keys for other in others)], dim=2)
        layer.values = join([layer.values, *(other.values for other in others)], dim=2)
    outputs = type(parts[0].inputs["encoder_outputs"])
    return {"attention_mask": join(masks, dim=1), "encoder_outputs": outputs(join(hidden, dim=1))}


def _last_column(mask: torch.Tensor) -> int:
    """Of those that some row attends to; the first where all sources are empty."""
    columns = mask.ne(0).any(dim=0).nonzero()
    return int(columns[-1]) if len(columns) else 0


def _source_mask(part: DecodedRows) -> torch.Tensor:
    mask, states = part.inputs.get("attention_mask"), part.inputs["encoder_outputs"][0]
    return states.new_ones(states.shape[:2], dtype=torch.long) if mask is None else mask


def _joined_prompts(parts: Sequence[DecodedRows]) -> dict[str, Any]:
    """Joined inputs of a decoder-only model: what is narrower has more padding on its left."""
    caches = [part.inputs["past_key_values"] for part in parts]
    masks = []
    for part, cache in zip(parts, caches, strict=True):
        mask = part.inputs.get("attention_mask")
        ones = torch.ones(len(part.keys) * part.copies, cache.get_seq_length() + 1, dtype=torch.long)
        masks.append(ones.to(part.inputs["past_key_values"].layers[0].keys.device) if mask is None else mask)
    width = max(mask.shape[1] - int(mask.ne(0).any(dim=0).nonzero()[0]) for mask in masks)
    for layer, *others in zip(*(cache.layers for cache in caches), strict=True):
        # A layer with a window holds no more than the tokens in it.
        to = min(width - 1, layer.sliding_window - 1) if layer.is_sliding else width - 1
        every = [layer, *others]
        layer.keys = torch.cat([pad(one.keys, (0, 0, to - one.keys.shape[-2], 0)) for one in every])
        layer.values = torch.cat([pad(one.values, (0, 0, to - one.values.shape[-2], 0)) for one in every])
        if layer.is_sliding:
            layer.cumulative_length = width - 1
    joined = {"attention_mask": torch.cat([pad(mask, (width - mask.shape[1], 0)) for mask in masks])}
    if parts[0].inputs.get("position_ids") is not None:
        positions = [part.inputs["position_ids"].expand(len(part.keys) * part.copies, -1) for part in parts]
        joined["position_ids"] = torch.cat(positions)
    return joined


def reorder_copies(cache: Any, rows: torch.Tensor) -> None:
    """Put the rows of the model's cache into another order, in which copies of a row stay copies of it.

    That order changes nothing of the cross-attention, which reads the same source for each copy.
    """
    for layer in _caches(cache)[0].layers:
        layer.reorder_cache(rows)


def _caches(cache: Any) -> list[Any]:
    """Parts of a cache: of the self-attention first."""
    is_pair = type(cache) is EncoderDecoderCache
    return [cache.self_attention_cache, cache.cross_attention_cache] if is_pair else [cache]


def cache_layers(cache: Any) -> Iterator[Any]:
    """Layers of a cache: of the self-attention first."""
    return (layer for part in _caches(cache) for layer in part.layers)
