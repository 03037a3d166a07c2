"""Which entries of which tensor stay, and what a module is called afterwards."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig

from left_trainer.compression.architecture import Architecture, architecture_of
from left_trainer.compression.sizes import Size, config_at, head_size, queries_per_group, size_of

# Parts of a name that an adapter puts between a module and what the base model holds in it.
WRAPPERS = re.compile(r"\.(?:base_layer|original_module|modules_to_save\.[^.]+)(?=\.|$)")


@dataclass(frozen=True)
class Kept:
    """What stays of a model. Names are full module names in the base model as it is before, without an adapter's.

    Args:
        layers: Indices of the blocks that stay, in order, by stack.
        neurons: For a feed-forward module (`Block.feed_forward`), the indices of the neurons that stay, in order, as a
            vector of integers. All stay where a module has no entry; entries of blocks that go are not looked at.
        heads: For an attention module (`Block.attentions`), the indices of the heads that stay, counted as `Size.heads`
            counts them.
    """

    layers: Mapping[str, tuple[int, ...]]
    neurons: Mapping[str, torch.Tensor] = field(default_factory=dict)
    heads: Mapping[str, torch.Tensor] = field(default_factory=dict)


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
            tables with an entry for each head, or each head of keys and values.
    """

    architecture: Architecture
    config: PreTrainedConfig
    layers: Mapping[str, tuple[int, ...]]
    indices: Mapping[str, tuple[Index, ...]]

    def renamed(self, name: str) -> str | None:
        """The name afterwards of a module or tensor, with or without an adapter's names around; `None` if it goes."""
        for stack in self.architecture.stacks:
            found = re.search(rf"(?:^|\.){re.escape(stack.blocks)}\.(\d+)(?=\.|$)", name)
            if found is None:
                continue
            index, kept = int(found[1]), self.layers[stack.name]
            shared = self.architecture.first_block_only
            if index == 0 and shared and WRAPPERS.sub("", name)[found.end() + 1 :].startswith(shared):
                return name
            if index not in kept:
                return None
            return f"{name[: found.start(1)]}{kept.index(index)}{name[found.end(1) :]}"
        return name

    def indices_for(self, name: str) -> tuple[Index, ...]:
        """The entries that may stay of a tensor along the axis that is cut; none where it is of no cut module."""
        parts = WRAPPERS.sub("", name).split(".")
        paths = (".".join(parts[start:end]) for end in range(len(parts), 0, -1) for start in range(end))
        found = next((self.indices[path] for path in paths if path in self.indices), ())
        return tuple(index for index in found if len(index.kept) < index.size)


def cuts_of(config: PreTrainedConfig, kept: Kept) -> Cuts:
    """The cuts that leave `kept` of a model with `config`.

    Raises:
        ValueError: `kept` does not fit the model, or the widths that it leaves differ.
    """
    architecture, size = architecture_of(config), size_of(config)
    _check_kept(architecture, config, size, kept)
    indices: dict[str, tuple[Index, ...]] = {}
    for block in architecture.blocks(config):
        width = size.ffn[block.stack]
        neurons = Index(kept.neurons.get(block.feed_forward, torch.arange(width)).cpu(), width)
        for linear in (*architecture.feed_forward_inputs, architecture.feed_forward_output):
            indices[f"{block.feed_forward}.{linear}"] = (neurons,)
        for attention in block.attentions if size.heads else ():
            heads = Index(kept.heads.get(attention, torch.arange(size.heads or 0)).cpu(), size.heads or 0)
            indices |= _attention_indices(architecture, config, attention, heads)
    for stack in architecture.stacks:
        # A table that moves to another block is cut as the heads there are.
        shared = f"{stack.blocks}.{{}}.{architecture.shared_bias}"
        if shared.format(0) in indices:
            indices[shared.format(0)] = indices[shared.format(kept.layers[stack.name][0])]
    return Cuts(architecture, config_at(config, size_left(config, kept), kept.layers), kept.layers, indices)


def size_left(config: PreTrainedConfig, kept: Kept) -> Size:
    """The size of a model with `config` of which `kept` has been left.

    Raises:
        ValueError: The blocks that stay would differ in width.
    """
    architecture, size = architecture_of(config), size_of(config)
    blocks = [block for block in architecture.blocks(config) if block.index in kept.layers[block.stack]]
    fields = {stack.name: stack.ffn_field for stack in architecture.stacks}
    widths: dict[str, set[int]] = {}
    heads: set[int] = set()
    for block in blocks:
        neurons = kept.neurons.get(block.feed_forward, range(size.ffn[block.stack]))
        widths.setdefault(fields[block.stack], set()).add(len(neurons))
        if size.heads is not None:
            heads |= {len(kept.heads.get(name, range(size.heads))) for name in block.attentions}
    return Size(
        layers={name: len(layers) for name, layers in kept.layers.items()},
        ffn={stack: _one(widths[field], field) for stack, field in fields.items()},
        heads=_one(heads, architecture.stacks[0].heads_field) if heads else None,
    )


def _one(widths: set[int], field: str) -> int:
    if len(widths) != 1:
        raise ValueError(
            f"The modules would keep different widths, {sorted(widths)}, and {field} of the config is one for all. "
            "Keep as many in each."
        )
    return next(iter(widths))


def _check_kept(architecture: Architecture, config: PreTrainedConfig, size: Size, kept: Kept) -> None:
    if set(kept.layers) != set(size.layers):
        raise ValueError(f"Kept.layers has {sorted(kept.layers)}, and the stacks are {sorted(size.layers)}.")
    for stack, layers in kept.layers.items():
        _check_indices(f"Kept.layers[{stack!r}]", layers, size.layers[stack])
    blocks = list(architecture.blocks(config))
    widths = {block.feed_forward: size.ffn[block.stack] for block in blocks}
    heads = {name: size.heads for block in blocks for name in block.attentions}
    if kept.heads and not architecture.has_free_heads:
        raise ValueError(architecture.why_heads_stay(config))
    for option, chosen, sizes in (("neurons", kept.neurons, widths), ("heads", kept.heads, heads)):
        for name, indices in chosen.items():
            if name not in sizes:
                raise ValueError(f"Kept.{option} has {name!r}. The modules are {', '.join(sizes)}.")
            _check_indices(f"Kept.{option}[{name!r}]", indices.tolist(), sizes[name])
    for names in architecture.equal_heads(config):
        left = [name for name in names if architecture.block_of(name) in kept.layers[architecture.stack_of(name)]]
        choices = {tuple(kept.heads[name].tolist()) if name in kept.heads else None for name in left}
        if len(choices) > 1:
            raise ValueError(
                f"{left[0]!r} and {left[-1]!r} keep different heads, and the self-attentions of a stack share one "
                "relative position bias with a column for each head. Keep the same heads in all of them."
            )


def _check_indices(what: str, indices: Iterable[int], size: int | None) -> None:
    found = list(indices)
    if not found or found != sorted(set(found)) or found[0] < 0 or found[-1] >= (size or 0):
        raise ValueError(f"{what} is {found}: expected at least one index from 0 to {(size or 0) - 1}, in order.")


def _attention_indices(
    architecture: Architecture, config: PreTrainedConfig, attention: str, groups: Index
) -> dict[str, tuple[Index, ...]]:
    keys = spread(groups, head_size(config))
    queries = spread(groups, head_size(config) * queries_per_group(config))
    return {
        attention: (spread(groups, queries_per_group(config)), groups),
        f"{attention}.{architecture.queries}": (queries,),
        f"{attention}.{architecture.attention_output}": (queries,),
        f"{attention}.{architecture.keys}": (keys,),
        f"{attention}.{architecture.values}": (keys,),
    }


def spread(index: Index, count: int) -> Index:
    """Of entries that each stand for `count` neighbours, those neighbours."""
    kept = (index.kept[:, None] * count + torch.arange(count)).flatten()
    return Index(kept, index.size * count)
