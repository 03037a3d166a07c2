"""The size of a model: numbers of blocks, neurons and heads, what of them a user may ask for, and its parameters."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from left_trainer.compression.architecture import Architecture, architecture_of
from left_trainer.models.family import auto_class, model_family

MULTIPLE = 8  # of neurons, for widths of at least WIDE: kernels of matrix products want it
WIDE = 64


@dataclass(frozen=True)
class Size:
    """What of a model can shrink.

    Args:
        layers: Number of blocks, by stack.
        ffn: Width of the feed-forward modules, by stack; T5 has one for both.
        heads: Number of key and value heads in each attention: where queries share them, a head counts with all of
            its queries. `None` where the class ties the number of heads to the width of the model.
    """

    layers: Mapping[str, int]
    ffn: Mapping[str, int]
    heads: int | None


def size_of(config: PreTrainedConfig) -> Size:
    """The size of a model with this config.

    Raises:
        ValueError: As `architecture_of`.
    """
    architecture = architecture_of(config)
    return Size(
        layers={stack.name: getattr(config, stack.layers_field) for stack in architecture.stacks},
        ffn={stack.name: _ffn_width(config, stack.ffn_field) for stack in architecture.stacks},
        heads=_groups(architecture, config) if architecture.has_free_heads else None,
    )


def _ffn_width(config: PreTrainedConfig, field: str) -> int:
    return getattr(config, field) or 4 * config.hidden_size  # GPT-2's n_inner may be None


def _groups(architecture: Architecture, config: PreTrainedConfig) -> int:
    """How many heads can be removed each for itself, with the queries that share it."""
    return getattr(config, architecture.groups_field or architecture.stacks[0].heads_field)


def queries_per_group(config: PreTrainedConfig) -> int:
    """Attention heads that share a key and value head; 1 without grouped queries."""
    architecture = architecture_of(config)
    return getattr(config, architecture.stacks[0].heads_field) // _groups(architecture, config)


def head_size(config: PreTrainedConfig) -> int:
    """Features of a head."""
    architecture = architecture_of(config)
    size = getattr(config, architecture.head_size_field, None) if architecture.head_size_field else None
    return size or config.hidden_size // getattr(config, architecture.stacks[0].heads_field)


def config_at(
    config: PreTrainedConfig, size: Size, kept_layers: Mapping[str, Sequence[int]] | None = None
) -> PreTrainedConfig:
    """A copy of `config` for a model of `size`.

    Args:
        kept_layers: Which blocks stay, by stack, for lists with an entry for each block; by default the first ones.
    """
    architecture = architecture_of(config)
    smaller = copy.deepcopy(config)
    for stack in architecture.stacks:
        kept = (kept_layers or {}).get(stack.name, range(size.layers[stack.name]))
        n_blocks = getattr(config, stack.layers_field)
        if getattr(config, "max_window_layers", n_blocks) < n_blocks:
            smaller.max_window_layers = sum(index < config.max_window_layers for index in kept)
        for field in architecture.per_layer_fields:
            if entries := getattr(config, field, None):
                setattr(smaller, field, [entries[index] for index in kept])
        setattr(smaller, stack.layers_field, size.layers[stack.name])
        if size.ffn[stack.name] != _ffn_width(config, stack.ffn_field):
            setattr(smaller, stack.ffn_field, size.ffn[stack.name])
    if size.heads is not None and size.heads != _groups(architecture, config):
        assert architecture.head_size_field is not None
        setattr(smaller, architecture.head_size_field, head_size(config))
        for stack in architecture.stacks:
            setattr(smaller, stack.heads_field, size.heads * queries_per_group(config))
        if architecture.groups_field:
            setattr(smaller, architecture.groups_field, size.heads)
    return smaller


def skeleton_of(config: PreTrainedConfig) -> PreTrainedModel:
    """A model with this config and its output head, without a weight, on the meta device."""
    with torch.device("meta"):
        return auto_class(model_family(config)).from_config(copy.deepcopy(config))


def counted_parameters(model: PreTrainedModel) -> int:
    """Parameters apart from embeddings and output head: the measure of `params=`.

    Token and position tables (of encoder, decoder or both; tied or not) and the output head do not count. T5's
    relative position bias belongs to an attention and counts.
    """
    head = model.get_output_embeddings()
    tables = [module for name, module in model.named_modules() if _is_table(name, module)]
    left_out = {id(parameter) for module in [*tables, head] if module is not None for parameter in module.parameters()}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in left_out)


def _is_table(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and not name.endswith("relative_attention_bias")


def parameters_at(config: PreTrainedConfig, size: Size) -> int:
    """`counted_parameters` of a model with `config` once it has been shrunk to `size`, from shapes alone."""
    return counted_parameters(skeleton_of(config_at(config, size)))


def check_target(config: PreTrainedConfig, target: Mapping[str, float | int | str]) -> None:
    """Raise `ValueError`, with the fix, where a model with `config` cannot be shrunk to `target`.

    Args:
        target: What `shrink_to` says, parsed: `params`, `layers`, `encoder_layers`, `decoder_layers`, `ffn`, `heads`;
            `vocabulary` is checked elsewhere.
    """
    raise NotImplementedError


def size_for(config: PreTrainedConfig, target: Mapping[str, float | int | str]) -> Size:
    """The size that the dimensions of `target` name; the others stay as they are. `params` is not looked at."""
    raise NotImplementedError
