"""Which modules of a model a method replaces, where neither the user nor PEFT says, and what their shapes allow."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

QUERY_VALUE_NAMES = (
    ("q_proj", "v_proj"),
    ("q", "v"),
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("query_key_value",),
    ("qkv_proj",),
    ("c_attn",),
    ("Wqkv",),
)
VALUE_NAMES = (("v_proj",), ("v",), ("value",), ("v_lin",))
KEY_VALUE_FEEDFORWARD_NAMES = (
    ("k_proj", "v_proj", "down_proj"),
    ("k_proj", "v_proj", "fc2"),
    ("k", "v", "wo"),
    ("key", "value", "output.dense"),
    ("query_key_value", "dense_4h_to_h"),
    ("c_attn", "mlp.c_proj"),
)


def is_conv1d(model: nn.Module) -> bool:
    """Whether the model stores its linear layers transposed, as GPT-2 does."""
    return any(isinstance(module, Conv1D) for module in model.modules())


def count_matches(names: Iterable[str], pattern: re.Pattern[str] | str) -> int:
    """How many of `names` are `pattern`, or end in it after a dot; with a regular expression, match it in full."""
    if isinstance(pattern, re.Pattern):
        return sum(pattern.fullmatch(name) is not None for name in names)
    return sum(name == pattern or name.endswith(f".{pattern}") for name in names)


def first_present(
    candidates: Sequence[Sequence[str]], options: Callable[[list[str]], Mapping[str, Any]] | None = None
) -> Callable[[PreTrainedModel], Mapping[str, Any]]:
    """A target resolver that takes the first of `candidates` whose modules all exist in the model.

    Args:
        candidates: Tuples of names that modules end in.
        options: The options that such a tuple becomes; by default `target_modules`.
    """

    def resolve(model: PreTrainedModel) -> Mapping[str, Any]:
        names = tuple(name for name, _ in model.named_modules())
        for candidate in candidates:
            if all(count_matches(names, pattern) for pattern in candidate):
                return options(list(candidate)) if options else {"target_modules": list(candidate)}
        return {}

    return resolve


query_value = first_present(QUERY_VALUE_NAMES)
value = first_present(VALUE_NAMES)
key_value_feedforward = first_present(
    KEY_VALUE_FEEDFORWARD_NAMES, lambda names: {"target_modules": names, "feedforward_modules": [names[-1]]}
)


def norms(model: PreTrainedModel) -> Mapping[str, Any]:
    """Every normalization layer that has a weight."""
    names = [
        name
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False))
    ]
    return {"target_modules": names}


def peft_targets(model: PreTrainedModel, config: PeftConfig) -> Sequence[str] | str | None:
    """PEFT's default target modules for this model type; `None` where it has none."""
    mapping = getattr(PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type), "target_module_mapping", None) or {}
    return mapping.get(model.config.model_type)


def targeted(model: PreTrainedModel, config: PeftConfig) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    """The modules of `model` that `config` targets, with PEFT's default for the model type where it names none."""
    patterns = config.target_modules
    if patterns is None:
        patterns = peft_targets(model, config) or ()
    if isinstance(patterns, str):
        patterns = [re.compile(".*" if patterns == "all-linear" else patterns)]
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        is_linear = isinstance(module, (nn.Linear, Conv1D)) and module is not head
        if is_linear and any(count_matches((name,), pattern) for pattern in patterns):
            yield name, module


def features(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """Input and output features of a linear layer."""
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def smallest_feature(model: PreTrainedModel, config: PeftConfig) -> int:
    """The smallest input or output dimension among the targeted layers."""
    return min(min(features(module)) for _, module in targeted(model, config))


def common_divisor(model: PreTrainedModel, config: PeftConfig, largest: int) -> int:
    """The largest number up to `largest` that divides every input and output dimension of the targeted layers."""
    shared = math.gcd(*(size for _, module in targeted(model, config) for size in features(module)))
    return max(size for size in range(1, min(shared, largest) + 1) if shared % size == 0)


def rank_within_shapes(model: PreTrainedModel, config: PeftConfig) -> dict[str, Any]:
    """A rank cannot exceed the smaller side of a matrix."""
    return {"r": min(config.r, smallest_feature(model, config))}
