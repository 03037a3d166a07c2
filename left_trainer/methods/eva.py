"""EVA: LoRA whose A and ranks come from the principal components of the inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, initialize_lora_eva_weights
from safetensors.torch import load_file
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from left_trainer.adapters.residual_base import lora_layers
from left_trainer.methods.lora_defaults import DEFAULTS, LOW_RANK
from left_trainer.methods.method import Batches, PeftMethod
from left_trainer.methods.targets import query_value
from left_trainer.token_mean import IGNORE_INDEX

# Keys and values of cross-attention are made of what the encoder put out.
CROSS_ATTENTION_SOURCE = re.compile(r"(EncDecAttention|encoder_attn|crossattention)\.(k|v|key|value)")


def initialize_eva(model: PeftModel, batches: Batches, options: Mapping[str, Any]) -> None:
    """Set A, and how the ranks are spread over the layers, from `calibration_batches` batches of inputs.

    Raises:
        ValueError: No batch has as many tokens as components are needed; PEFT would wait for one for ever.
    """
    rows = [dict(batch) for batch in batches(options["calibration_batches"])]
    has_encoder = model.get_base_model().config.is_encoder_decoder
    config = model.active_peft_config
    components = round(config.r * config.eva_config.rho)
    tokens = max(
        (min(int(_token_mask(row, target).sum()) for target in (False, has_encoder)) for row in rows), default=0
    )
    if tokens < components:
        raise ValueError(
            f"peft_method='eva' needs {components} tokens in a batch for {components} components, and the largest of "
            f"the first {len(rows)} batches has {tokens}. Raise per_device_train_batch_size, or lower r in peft_kwargs."
        )

    def layer_inputs(layer_input: Any, batch: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        hidden = layer_input if isinstance(layer_input, torch.Tensor) else layer_input[0]
        reads_target = has_encoder and "decoder." in name and not CROSS_ATTENTION_SOURCE.search(name)
        return hidden[_token_mask(batch, reads_target)]

    # PEFT's own masks every layer by the source (peft 0.21), but a decoder of its own reads the target.
    initialize_lora_eva_weights(
        model, rows, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=layer_inputs, show_progress_bar=False
    )


def _token_mask(batch: Mapping[str, torch.Tensor], of_target: bool) -> torch.Tensor:
    """Which positions of the source or of the target are no padding, `(batch, positions)`."""
    return batch["labels"].ne(IGNORE_INDEX) if of_target else batch["attention_mask"].bool()


def restore_eva(model: PeftModel, directory: str) -> None:
    """Give the layers the ranks that they have in the adapter saved in `directory`."""
    saved = load_file(Path(directory) / ADAPTER_SAFE_WEIGHTS_NAME)
    ranks = {
        name: saved.get(f"{name}.lora_A.weight", layer.lora_A[model.active_adapter].weight[:0])
        for name, layer in lora_layers(model).items()
    }
    initialize_lora_eva_weights(model, eva_state_dict=ranks)


EVA = PeftMethod(
    name="eva",
    family="reparameterization",
    summary="LoRA whose A and ranks come from the principal components of the inputs",
    paper="Paischer et al., 2024, arXiv 2410.07170",
    config_class=LoraConfig,
    narrow_learning_rate=9e-4,
    learning_rate=2e-4,
    learning_rate_source="that of lora",
    equation=LOW_RANK + r", \quad A_0 = V_r^\top, \; X = U \Sigma V^\top, \; \textstyle\sum_\ell r_\ell = L r",
    when_to_use="Ranks where the data vary most, for the same number of ranks in all.",
    defaults=DEFAULTS,
    preset={"init_lora_weights": "eva"},
    resolve_targets=query_value,
    hook_options={"calibration_batches": 32},
    initialize=initialize_eva,
    restore=restore_eva,
    mergeable=True,
)
