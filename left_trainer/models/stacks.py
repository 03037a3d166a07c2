"""How many layers a model has, by stack."""

from __future__ import annotations

from transformers import PreTrainedConfig


def stack_layers(config: PreTrainedConfig) -> dict[str, int]:
    """Numbers of layers of `encoder` and `decoder`, from the config alone; of a decoder-only model the latter.

    The encoder's number is what transformers calls `num_hidden_layers`; the decoder's has a name of its own.
    """
    if not config.is_encoder_decoder:
        return {"decoder": config.get_text_config(decoder=True).num_hidden_layers}
    encoder = config.num_hidden_layers
    named = (getattr(config, name, None) for name in ("decoder_layers", "num_decoder_layers"))
    return {"encoder": encoder, "decoder": next((number for number in named if number), encoder)}
