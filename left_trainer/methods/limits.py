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
# Its packed base weights, of which no process can hold a part.
NOT_SHARDED: dict[Feature, str] = {
    "sharded": "it needs a quantized base, and sharding packed weights has not been tried."
}
LINEAR_ONLY: dict[Feature, str] = {**NO_CONV1D, **NO_QUANTIZED}
# Taking neurons and heads out of layers that the method is on.
MIXES_FEATURES: dict[Feature, str] = {
    "narrowing": "its tensors mix the features of a layer, so that single ones cannot be taken out of them."
}
SHARED_BY_LAYERS: dict[Feature, str] = {
    "narrowing": "its tensors serve several layers, which would keep different features."
}
BY_POSITION: dict[Feature, str] = {"narrowing": "it trains entries of a weight that it knows by their position there."}
