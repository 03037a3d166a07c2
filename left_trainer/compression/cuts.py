"""Which entries of which tensor stay, and what a module is called afterwards."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from left_trainer.compression.architecture import Architecture, architecture_of
from left_trainer.compression.sizes import Size, config_at, head_size, queries_per_group, size_of

# Parts of a name that an adapter puts between a module and what the base model holds in it.
WRAPPERS = re.compile(r"\.(?:base_layer|original_module|modules_to_save\.[^.]+)(?=\.|$)")


@dataclass(frozen=True)
class Index:
    """Entries that stay of an axis.

    Args:
        kept: Their indices, in order.
        size: Of the axis before.
    """

    kept: torch.Tensor
    size: int

    @property
    def sizes(self) -> tuple[int, int]:
        return self.size, len(self.kept)


@dataclass(frozen=True)
class Cuts:
    """A removal in terms of names.

    Args:
        architecture: Of the model.
        config: Of the model afterwards.
        layers: Indices of the blocks that stay, by stack.
        indices: The features that stay, by full name of a linear layer in the base model; by name of the attention for
            tables with an entry for each head.
    """

    architecture: Architecture
    config: PreTrainedConfig
    layers: Mapping[str, tuple[int, ...]]
    indices: Mapping[str, Index]

    def renamed(self, name: str) -> str | None:
        """The name afterwards of a module or tensor, with or without an adapter's names around; `None` if it goes."""
        for stack in self.architecture.stacks:
            found = re.search(rf"(?:^|\.){re.escape(stack.blocks)}\.(\d+)(?=\.|$)", name)
            if found is None:
                continue
            index, kept = int(found[1]), self.layers[stack.name]
            shared = self.architecture.first_block_only
            if index == 0 and shared and name[found.end() + 1 :].startswith(shared):
                return name
            if index not in kept:
                return None
            return f"{name[: found.start(1)]}{kept.index(index)}{name[found.end(1) :]}"
        return name

    def index(self, name: str) -> Index | None:
        """The entries that stay of a tensor along the axis that is cut; `None` where it is of no cut module."""
        parts = WRAPPERS.sub("", name).split(".")
        paths = (".".join(parts[start:end]) for end in range(len(parts), 0, -1) for start in range(end))
        return next((self.indices[path] for path in paths if path in self.indices), None)


def cuts_of(
    config: PreTrainedConfig,
    layers: Mapping[str, tuple[int, ...]],
    neurons: Mapping[str, torch.Tensor],
    heads: Mapping[str, torch.Tensor],
) -> Cuts:
    """The cuts that leave these parts of a model with `config`; see `Kept`.

    Raises:
        ValueError: The parts do not fit the model, or the widths that they leave differ.
    """
    architecture, size = architecture_of(config), size_of(config)
    indices: dict[str, Index] = {}
    widths: dict[str, set[int]] = {stack.name: set() for stack in architecture.stacks}
    groups: set[int] = set()
    for block in architecture.blocks(config):
        if block.index not in layers[block.stack]:
            continue
        width = size.ffn[block.stack]
        kept = neurons.get(block.feed_forward, torch.arange(width))
        widths[block.stack].add(len(kept))
        for linear in (*architecture.feed_forward_inputs, architecture.feed_forward_output):
            indices[f"{block.feed_forward}.{linear}"] = Index(kept, width)
        if size.heads is not None:
            for attention in block.attentions:
                kept = heads.get(attention, torch.arange(size.heads))
                groups.add(len(kept))
                indices |= _attention_indices(architecture, config, attention, Index(kept, size.heads))
    for stack in architecture.stacks if groups and architecture.shared_bias else ():
        first = layers[stack.name][0]
        indices[f"{stack.blocks}.0.{architecture.shared_bias}"] = indices[
            f"{stack.blocks}.{first}.{architecture.shared_bias}"
        ]
    smaller = Size(
        layers={name: len(kept) for name, kept in layers.items()},
        ffn={name: next(iter(found)) for name, found in widths.items()},
        heads=next(iter(groups)) if groups else None,
    )
    return Cuts(architecture, config_at(config, smaller, layers), layers, indices)


def _attention_indices(
    architecture: Architecture, config: PreTrainedConfig, attention: str, groups: Index
) -> dict[str, Index]:
    keys = _spread(groups, head_size(config))
    queries = _spread(groups, head_size(config) * queries_per_group(config))
    return {
        attention: _spread(groups, queries_per_group(config)),
        f"{attention}.{architecture.queries}": queries,
        f"{attention}.{architecture.attention_output}": queries,
        f"{attention}.{architecture.keys}": keys,
        f"{attention}.{architecture.values}": keys,
    }


def _spread(index: Index, count: int) -> Index:
    """Of entries that each stand for `count` neighbours, those neighbours."""
    kept = (index.kept[:, None] * count + torch.arange(count)).flatten()
    return Index(kept, index.size * count)
