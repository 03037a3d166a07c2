"""Why methods do not work with something: reasons that several records share."""

from __future__ import annotations

from left_trainer.methods.method import Feature

NO_CONV1D: dict[Feature, str] = {
    "conv1d": "PEFT implements it for torch.nn.Linear, and this model stores its layers transposed (Conv1D, as GPT-2)."
}
NO_PACKING: dict[Feature, str] = {
    "packing": "virtual tokens stand before a sequence, and packing joins several rows into one."
}
NO_QUANTIZED: dict[Feature, str] = {"quantized_base": "it computes with the base weights themselves."}
UNTRIED_QUANTIZED: dict[Feature, str] = {"quantized_base": "it has not been tried there."}
LINEAR_ONLY: dict[Feature, str] = {**NO_CONV1D, **NO_QUANTIZED}
