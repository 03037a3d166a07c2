"""The size of a model: numbers of blocks, neurons and heads, what of them a user may ask for, and its parameters."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from left_trainer.compression.architecture import Architecture, architecture_of
from left_trainer.models.family import auto_class, model_family
from left_trainer.registry import did_you_mean

Target = Mapping[str, float | int | str]

MULTIPLE = 8  # of neurons, for widths of at least WIDE: the kernels of matrix products want it
WIDE = 64
LAYERS = ("layers", "encoder_layers", "decoder_layers")
SHARES = ("params", "ffn", "heads")
DIMENSIONS = ("params", *LAYERS, "ffn", "heads", "vocabulary")
TOLERANCE = 0.05  # of a head: 0.33 of 3 heads is one


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
    depth_field = architecture.cache_layers_field
    if depth_field and size.layers != size_of(config).layers:
        # `generate` makes T5 a cache as deep as the encoder, and fails where the decoder is deeper (transformers 5.23).
        setattr(smaller, depth_field, size.layers["decoder"])
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


def counted_parameters(model: PreTrainedModel | PeftModel) -> int:
    """Parameters apart from embeddings and output head: the measure of `params=`.

    Token and position tables (of encoder, decoder or both; tied or not) and the output head do not count, and neither
    does an adapter. T5's relative position bias belongs to an attention and counts.
    """
    if isinstance(model, PeftModel):
        model = skeleton_of(model.get_base_model().config)
    head = model.get_output_embeddings()
    tables = [module for name, module in model.named_modules() if _is_table(name, module)]
    left_out = {id(parameter) for module in [*tables, head] if module is not None for parameter in module.parameters()}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in left_out)


def _is_table(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and not name.endswith("relative_attention_bias")


def parameters_at(config: PreTrainedConfig, size: Size) -> int:
    """`counted_parameters` of a model with `config` once it has been shrunk to `size`, from shapes alone."""
    shallow = dict.fromkeys(size.layers, 1)
    rest = _counted(config, size, shallow)
    # All blocks of a stack but the first are alike: T5's first one has the position bias.
    further = {
        stack: _counted(config, size, {**shallow, stack: 2}) - rest for stack, count in size.layers.items() if count > 1
    }
    return rest + sum((size.layers[stack] - 1) * of_block for stack, of_block in further.items())


def _counted(config: PreTrainedConfig, size: Size, layers: Mapping[str, int]) -> int:
    smaller = config_at(config, replace(size, layers=layers))
    return _counted_once(smaller.model_type, smaller.to_json_string(use_diff=False))


@functools.lru_cache(maxsize=1024)
def _counted_once(model_type: str, text: str) -> int:
    """A search for the size of a share asks for many, of which few differ in width."""
    return counted_parameters(skeleton_of(AutoConfig.for_model(model_type).from_dict(json.loads(text))))


# What a user may ask for


def check_target(config: PreTrainedConfig, target: Target) -> None:
    """Raise `ValueError`, with the fix, where a model with `config` cannot be shrunk to `target`.

    Args:
        config: Of a model that is not loaded yet.
        target: What `shrink_to` says, parsed: values by dimension. `vocabulary` is checked elsewhere.
    """
    size = size_of(config)
    for name, value in target.items():
        if name not in DIMENSIONS:
            raise ValueError(
                f"shrink_to has the unknown dimension {name!r}.{did_you_mean(name, DIMENSIONS)} Expected one of "
                f"{', '.join(DIMENSIONS)}."
            )
        if name in SHARES and not _is_share(value):
            raise ValueError(
                f"shrink_to has {name}={value!r}: expected a share of what the model has, above 0 and at most 1."
            )
        if name in LAYERS:
            _check_layers(config, size, name, value)
    if "heads" in target:
        _check_heads(config, float(target["heads"]))
    if "params" in target:
        _check_parameters(config, target)


def _is_share(value: float | int | str) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1


def _check_layers(config: PreTrainedConfig, size: Size, name: str, value: float | int | str) -> None:
    architecture = architecture_of(config)
    if name not in architecture.dimensions:
        raise ValueError(
            f"shrink_to has {name}={value!r}, and a {config.model_type} model has "
            f"{'an encoder and a decoder' if len(architecture.stacks) > 1 else 'one stack of layers'}. Write "
            f"{' and '.join(f'{dimension}=' for dimension in architecture.dimensions)}."
        )
    stack = next(stack for stack in architecture.stacks if stack.dimension == name)
    count = size.layers[stack.name]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= count:
        raise ValueError(
            f"shrink_to has {name}={value!r}, and the model has {count}: expected a whole number from 1 to {count}."
        )


def possible_heads(config: PreTrainedConfig) -> tuple[int, ...]:
    """Numbers of heads, as `Size.heads` counts them, that a model with `config` can be shrunk to, in order.

    Empty where the class ties the number of heads to the width.
    """
    architecture, heads = architecture_of(config), size_of(config).heads
    if heads is None:
        return ()
    return tuple(
        count
        for count in range(1, heads + 1)
        if not (architecture.heads_divide_width and config.hidden_size % (count * queries_per_group(config)))
    )


def _check_heads(config: PreTrainedConfig, share: float) -> None:
    architecture, heads, possible = architecture_of(config), size_of(config).heads, possible_heads(config)
    if heads is None:
        raise ValueError(f"shrink_to: {architecture.why_heads_stay(config)}")
    if _whole(share * heads) not in possible:
        kind = "groups of heads" if queries_per_group(config) > 1 else "heads"
        divides = f" that divides the width {config.hidden_size}" if architecture.heads_divide_width else ""
        shares = ", ".join(f"{count / heads:.4g}" for count in possible)
        raise ValueError(
            f"shrink_to has heads={share:g}, which of {heads} {kind} leaves {share * heads:.4g}: expected a whole "
            f"number{divides}. Write one of heads={shares}."
        )


def _whole(number: float) -> int:
    """The whole number that `number` stands for; 0 where it stands for none."""
    return round(number) if abs(number - round(number)) <= TOLERANCE else 0


def _check_parameters(config: PreTrainedConfig, target: Target) -> None:
    whole, least = (parameters_at(config, size) for size in (size_of(config), smallest_size(config, target)))
    share = float(target["params"])
    if share * whole < least:
        raise ValueError(
            f"shrink_to has params={share:g}, and the smallest size that leaves a model of this class has "
            f"{least / whole:.2g} of the parameters apart from embeddings and output head. Write params= with at least "
            "that."
        )


def smallest_size(config: PreTrainedConfig, target: Target) -> Size:
    """The smallest size that keeps to the dimensions of `target`: one block a stack, and the least width."""
    size, named = size_of(config), size_for(config, target)
    architecture = architecture_of(config)
    return Size(
        layers={
            stack.name: named.layers[stack.name] if stack.dimension in target else 1 for stack in architecture.stacks
        },
        ffn=named.ffn if "ffn" in target else {stack: narrowed(width, 0) for stack, width in size.ffn.items()},
        heads=named.heads if "heads" in target else min(possible_heads(config), default=None),
    )


def size_for(config: PreTrainedConfig, target: Target) -> Size:
    """The size that the dimensions of `target` name; the others stay as they are. `params` is not looked at.

    Args:
        config: Of the model as it is.
        target: As `check_target` has let it pass.
    """
    size = size_of(config)
    layers = {
        stack.name: int(target.get(stack.dimension, size.layers[stack.name]))
        for stack in architecture_of(config).stacks
    }
    ffn, heads = float(target.get("ffn", 1)), float(target.get("heads", 1))
    return replace(
        size,
        layers=layers,
        ffn={stack: narrowed(width, ffn) for stack, width in size.ffn.items()},
        heads=None if size.heads is None else _whole(heads * size.heads),
    )


def narrowed(width: int, share: float) -> int:
    """The feed-forward width that is `share` of `width`, in multiples of 8 from a width of 64 on; never 0."""
    multiple = MULTIPLE if width >= WIDE else 1
    return min(width, max(multiple, round(share * width / multiple) * multiple)) if share < 1 else width
