"""How long a text may be for a model that has a vector for each position."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import PreTrainedConfig

# Their first token has the position behind that of the padding token, so that some of the table go unused.
COUNTING_FROM_PADDING = (
    "camembert",
    "data2vec-text",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)


class Limits(NamedTuple):
    """Most tokens of a row; `None` where nothing bounds them.

    Args:
        source: What the encoder reads; the whole sequence in a decoder-only model.
        target: What the decoder reads; the same as `source` in a decoder-only model.
    """

    source: int | None = None
    target: int | None = None

    def at_most(self, length: int | None) -> Limits:
        """These limits, and `length` for both where it is smaller."""
        return Limits(*(min((bound for bound in (limit, length) if bound), default=None) for limit in self))


def position_limits(config: PreTrainedConfig, with_rotary: bool = False) -> Limits:
    """Numbers of positions of a model, beyond which it has no embedding and raises an IndexError.

    Args:
        config: Of the model.
        with_rotary: Whether rotary positions count too. They have no last one, but a length the model was trained for.
    """
    if not config.is_encoder_decoder:
        whole = _positions(config.get_text_config(), ("max_position_embeddings",), with_rotary)
        return Limits(whole, whole)
    parts = {role: getattr(config, role, None) for role in ("encoder", "decoder")}
    encoder, decoder = (
        # Two models in one have a config each, LED has a field each.
        _positions(
            part if isinstance(part, PreTrainedConfig) else config,
            (f"max_{role}_position_embeddings", "max_position_embeddings"),
            with_rotary,
        )
        for role, part in parts.items()
    )
    return Limits(encoder, decoder)


def rotary_switch(config: PreTrainedConfig) -> int | None:
    """Tokens beyond which a batch is given other rotary frequencies, for all of its rows; `None` where it never is."""
    config = config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    return min((limit for limit in map(_switch_of, by_layer, [config] * len(by_layer)) if limit), default=None)


def _switch_of(rotary: dict[str, Any], config: PreTrainedConfig) -> int | None:
    kind = str(rotary.get("rope_type"))
    if kind == "longrope":
        return rotary.get("original_max_position_embeddings")
    return config.max_position_embeddings if "dynamic" in kind else None


def _positions(config: PreTrainedConfig, names: tuple[str, ...], with_rotary: bool) -> int | None:
    is_relative = getattr(config, "relative_attention_num_buckets", None) is not None
    is_rotary = bool(getattr(config, "rope_parameters", None))
    if is_relative or (is_rotary and not with_rotary):
        return None
    found = next((getattr(config, name) for name in names if getattr(config, name, None)), None)
    if found and config.model_type in COUNTING_FROM_PADDING:
        found -= (config.pad_token_id or 0) + 1
    return found if found and found > 0 else None  # XLNet says -1
