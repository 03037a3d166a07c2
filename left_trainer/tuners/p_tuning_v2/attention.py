"""Attention over a prefix and the sequence, through transformers' attention interface."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import AttentionInterface, PreTrainedConfig

IMPLEMENTATION = "p_tuning_v2"
# Their masks have one column per key, so that columns for the prefix can be put in front.
SUPPORTED_IMPLEMENTATIONS = ("eager", "sdpa")

# Model families name these differently. A head count on the module holds for encoders and decoders that differ.
HEAD_DIM_NAMES = ("head_dim", "key_value_proj_dim")
HEAD_COUNT_NAMES = ("num_heads", "n_heads")


class RoutedConfig:
    """The config of one attention module, all but for its attention implementation, which is ours.

    The module alone is routed through [`prefix_attention`]: the model's own config keeps saying what it said, so
    masks are built as before, other modules are left alone and `set_attn_implementation` goes on working.

    Args:
        original (`PreTrainedConfig`): Where all else is read, at every access.
    """

    _attn_implementation = IMPLEMENTATION

    def __init__(self, original: PreTrainedConfig) -> None:
        self.original = original
        # Where set, what the module attends to without its prefix is put there: keys and values.
        self.attended: list[torch.Tensor] | None = None

    def __getattr__(self, name: str) -> Any:
        if name in ("original", "attended"):  # copy and pickle ask before there is one
            raise AttributeError(name)
        return getattr(self.original, name)


def calls_attention_interface(module: nn.Module) -> bool:
    """Whether the module's class hands its query, key and value to transformers' attention interface."""
    code = getattr(_forward(module), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and hasattr(module, "config")


def check_attention_implementation(module: nn.Module, config: PreTrainedConfig) -> None:
    """Refuse what prefixes cannot be exact with.

    Raises:
        ValueError: Flash or flex attention, whose masks have no columns for a prefix; or GPT-2's upcast attention,
            which bypasses the attention interface.
    """
    implementation = config._attn_implementation
    if implementation not in SUPPORTED_IMPLEMENTATIONS:
        raise ValueError(
            f"attn_implementation={implementation!r}: P-tuning v2 works with {' and '.join(SUPPORTED_IMPLEMENTATIONS)} "
            'attention. Load the model with attn_implementation="sdpa".'
        )
    if implementation == "eager" and getattr(module, "reorder_and_upcast_attn", False):
        raise ValueError(
            "reorder_and_upcast_attn=True with eager attention bypasses the attention interface, so prefixes cannot "
            'reach it. Load the model with attn_implementation="sdpa" or reorder_and_upcast_attn=False.'
        )


def key_value_shape(attention: nn.Module) -> tuple[int, int]:
    """Number of key/value heads and their dimension.

    Raises:
        ValueError: The module does not tell.
    """
    head_dim = next((getattr(attention, name) for name in HEAD_DIM_NAMES if hasattr(attention, name)), None)
    default = getattr(attention.config, "num_attention_heads", None)
    heads = next((getattr(attention, name) for name in HEAD_COUNT_NAMES if hasattr(attention, name)), default)
    if head_dim is None or heads is None:
        raise ValueError(
            f"{type(attention).__name__} does not give the shape of its keys and values: P-tuning v2 reads "
            f"{' or '.join(HEAD_DIM_NAMES)}, and {' or '.join(HEAD_COUNT_NAMES)}. Leave it out with exclude_modules."
        )
    return heads // getattr(attention, "num_key_value_groups", 1), head_dim


def prefix_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    key_value_prefix: torch.Tensor | None,
    position_bias: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend to a prefix and the sequence with the model's own attention function.

    Every query sees the whole prefix, without a position bias. Caches hold the sequence alone, since they are
    updated before.

    Args:
        module: The attention module; its config is a [`RoutedConfig`].
        query: `(batch, heads, queries, head_dim)`.
        key: `(batch, key/value heads, keys, head_dim)`.
        value: `(batch, key/value heads, keys, head_dim)`.
        attention_mask: `(batch or 1, heads or 1, queries or 1, keys)`; boolean or added to the scores.
        key_value_prefix: `(2, key/value heads, tokens, head_dim)`; `None` for the base model's attention. It has no
            default: a module that drops it on the way here shall fail.
        position_bias: `(batch or 1, heads, queries, keys)`; T5's.
        is_causal: Overrides the module's, as it does in transformers.

    Returns:
        The outputs `(batch, queries, heads, head_dim)`; the weights over prefix and keys, or `None`.
    """
    config: Any = module.config.original
    check_attention_implementation(module, config)
    modeling = _forward(module).__globals__
    attend: Callable[..., Any] = modeling["ALL_ATTENTION_FUNCTIONS"].get_interface(
        config._attn_implementation, modeling["eager_attention_forward"]
    )
    # T5 and its kin alone know a position bias: the others' eager functions would take it for an unknown option.
    if position_bias is not None:
        kwargs["position_bias"] = position_bias
    if is_causal is not None:
        kwargs["is_causal"] = is_causal
    if module.config.attended is not None:
        module.config.attended[:] = [key, value]
    if key_value_prefix is None:
        return attend(module, query, key, value, attention_mask, **kwargs)

    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    queries, keys, tokens = query.shape[2], key.shape[2], key_value_prefix.shape[2]
    if attention_mask is None and causal and queries > 1 and config._attn_implementation == "sdpa":
        # sdpa reads "no mask" as "causal", and counts from the first key, which is now the prefix's.
        attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=key.device).tril()[None, None]
    if attention_mask is not None:
        attention_mask = pad(attention_mask, (tokens, 0), value=attention_mask.dtype == torch.bool)
    if position_bias is not None:
        kwargs["position_bias"] = pad(position_bias, (tokens, 0))
    key_prefix, value_prefix = key_value_prefix.to(key.dtype)[:, None].expand(-1, key.shape[0], -1, -1, -1)
    key = torch.cat([key_prefix, key], dim=2)
    value = torch.cat([value_prefix, value], dim=2)
    return attend(module, query, key, value, attention_mask, **kwargs)


def _forward(module: nn.Module) -> Callable[..., Any]:
    return inspect.unwrap(type(module).forward)


AttentionInterface.register(IMPLEMENTATION, prefix_attention)
