"""P-tuning v2 for any model whose attention goes through transformers' attention interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from left_trainer.tuners.p_tuning_v2.attention import (
    calls_attention_interface,
    check_attention_implementation,
    key_value_shape,
)
from left_trainer.tuners.p_tuning_v2.config import PTuningV2Config
from left_trainer.tuners.p_tuning_v2.layer import PTuningV2Layer


class PTuningV2Model(BaseTuner):
    """Trained key and value prefixes in every attention layer.

    P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks,
    Liu et al. 2021, https://arxiv.org/abs/2110.07602; without its optional reparameterization.

    Encoder self-attention, decoder self-attention and cross-attention each get their own prefix, where PEFT's prefix
    tuning reaches the decoder's self-attention alone. Nothing is put into the cache and no position is taken, so
    gradient checkpointing, padding on either side, cached generation and beam search work as in the base model.
    With `output_attentions=True` the weights' first columns belong to the prefix.

    Args:
        model (`nn.Module`): The model to adapt, with eager or sdpa attention.
        peft_config (`PTuningV2Config`): Its options.
        adapter_name (`str`): Name of the adapter.
        low_cpu_mem_usage (`bool`): Create the prefixes on the meta device, to be loaded into.

    Raises:
        ValueError: The model's attention does not go through the attention interface; it is neither eager nor sdpa;
            or `target_modules` names something that is not an attention module.
    """

    prefix = "p_tuning_v2_"
    tuner_layer_cls = PTuningV2Layer

    def _prepare_adapter_config(self, peft_config: PTuningV2Config, model_config: dict[str, Any]) -> PTuningV2Config:
        if peft_config.target_modules is None:
            names = _attention_module_names(self.model)
            if not names:
                raise ValueError(
                    f"model_type={model_config.get('model_type')!r}: none of its modules calls transformers' attention "
                    "interface, which P-tuning v2 works through. Use prefix_tuning, or another model."
                )
            peft_config.target_modules = names
        return peft_config

    def _prepare_model(self, peft_config: PTuningV2Config, model: nn.Module) -> None:
        for name, module in model.named_modules():
            if isinstance(module, PTuningV2Layer) or not self._check_target_module_exists(peft_config, name):
                continue
            if not calls_attention_interface(module):
                raise ValueError(
                    f"target_modules={peft_config.target_modules} matches {name}, a {type(module).__name__}, which "
                    "does not call transformers' attention interface. Leave target_modules out for every attention "
                    f"layer, or choose from {_attention_module_names(model)}."
                )
            check_attention_implementation(module, module.config)
            key_value_shape(module)  # raises here, before any module is replaced

    def _create_and_replace(
        self,
        peft_config: PTuningV2Config,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if isinstance(target, PTuningV2Layer):
            target.update_layer(adapter_name, peft_config)
        else:
            layer = PTuningV2Layer(target, adapter_name, peft_config)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own looks for a weight, which attention modules lack.
        setattr(parent, child_name, new_module)

    @torch.no_grad()
    def start_from_text(self, adapter_name: str, inputs: Mapping[str, torch.Tensor]) -> None:
        """Set the prefixes of an adapter to the keys and values that the base model computes from a text.

        Args:
            adapter_name: Of the adapter.
            inputs: One row, with at least as many tokens as the prefixes have, for encoder and decoder alike.
        """
        layers = [module for module in self.model.modules() if isinstance(module, PTuningV2Layer)]
        for layer in layers:
            layer.base_layer.config.attended = []
        self.disable_adapter_layers()
        self.model(**inputs, use_cache=False)
        self.enable_adapter_layers()
        for layer in layers:
            attended, layer.base_layer.config.attended = layer.base_layer.config.attended, None
            prefix = layer.p_tuning_v2_prefix[adapter_name]
            prefix.copy_(torch.cat(attended)[:, :, : prefix.shape[2]])

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "P-tuning v2 adds keys and values, not weights, so it cannot be merged into the base model. "
            "Keep the adapter and load it with PeftModel.from_pretrained(base_model, path)."
        )


def _attention_module_names(model: nn.Module) -> list[str]:
    """Last parts of the names of all attention modules, such as `self_attn` and `encoder_attn`."""
    names = [name for name, module in model.named_modules() if calls_attention_interface(module)]
    return sorted({name.removesuffix(".base_layer").rpartition(".")[2] for name in names})
