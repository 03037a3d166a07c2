r"""LoRA that starts from a part of the base weights instead of zero: PiSSA, OLoRA, CorDA, LoRA-GA.

With the initial factors $A_0, B_0$ the base keeps the residual $W - s B_0 A_0$, so that training starts at $W$. The
trained layer is $W + s (B A - B_0 A_0)$: a plain LoRA of twice the rank on the untouched base. It is saved as that,
because PEFT (0.21) loads such an adapter right only where it can repeat the initialisation: LoRA-GA's is put on the
unchanged base without a word, CorDA's is refused.
"""

from __future__ import annotations

import contextlib
import copy
import math
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import transpose
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from left_trainer.adapters.training_state import TRAINED, TrainingState, part_of, prefixed

INITIAL = "initial"  # the part of the training state with the initial factors


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """LoRA layers by their full name in `model`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def has_residual_base(model: nn.Module) -> bool:
    return bool(initial_adapter(model))


def initial_adapter(model: nn.Module) -> dict[str, torch.Tensor]:
    """$A_0$ and $B_0$ by their names in the adapter file; empty for a model whose base is untouched."""
    return getattr(model, "initial_adapter", {})


def remember_initial_adapter(model: PeftModel) -> None:
    """Take the present factors for $A_0, B_0$, which are already subtracted from the base weights.

    From then on `model.save_pretrained` writes the equivalent plain LoRA.
    """
    weights = get_peft_model_state_dict(model)
    model.initial_adapter = {name: tensor.detach().clone() for name, tensor in weights.items() if ".lora_" in name}
    model.save_pretrained = types.MethodType(_save_plain_lora, model)


@torch.no_grad()
def subtract_initial_adapter(model: PeftModel, factors: Mapping[str, torch.Tensor]) -> None:
    """Make the residual base of an earlier run from its $A_0, B_0$, on an untouched base."""
    adapter = model.active_adapter
    for name, layer in lora_layers(model).items():
        layer.lora_A[adapter].weight.copy_(factors[f"{name}.lora_A.weight"])
        layer.lora_B[adapter].weight.copy_(factors[f"{name}.lora_B.weight"])
    remember_initial_adapter(model)
    _add_initial_adapter(model, sign=-1)


def change_initial_adapter(
    model: PeftModel, rename: Callable[[str], str | None], change: Callable[[str, torch.Tensor], torch.Tensor]
) -> None:
    """Let $A_0$ and $B_0$ follow layers that have gone, moved or become narrower.

    Args:
        model: With a residual base or without one.
        rename: The name afterwards of a module or parameter; `None` for what goes.
        change: The tensor afterwards, from the name that its parameter had and the tensor.
    """
    adapter = model.active_adapter
    kept = {name: rename(name) for name in initial_adapter(model)}
    if kept:
        model.initial_adapter = {
            new_name: change(f"{name.removesuffix('.weight')}.{adapter}.weight", model.initial_adapter[name])
            for name, new_name in kept.items()
            if new_name is not None
        }


@contextlib.contextmanager
def original_base(model: nn.Module) -> Iterator[None]:
    """Inside, the base weights of a model with a residual base are the original ones."""
    if has_residual_base(model):
        _add_initial_adapter(model, sign=1)
    try:
        yield
    finally:
        if has_residual_base(model):
            _add_initial_adapter(model, sign=-1)


@torch.no_grad()
def original_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """Weights of an untouched base by their names there, of the layers that keep a residual; computed anew."""
    return {
        f"{name.removeprefix('base_model.model.')}.weight": _with_initial_adapter(model, name, layer, sign=1)
        for name, layer in (lora_layers(model).items() if has_residual_base(model) else ())
    }


def collect_residual_base(model: PeftModel) -> dict[str, torch.Tensor]:
    """The trained factors, and the initial ones, from which the base is made again; nothing on an untouched base."""
    if not has_residual_base(model):
        return {}
    return {**prefixed(TRAINED, get_peft_model_state_dict(model)), **prefixed(INITIAL, initial_adapter(model))}


def restore_residual_base(model: PeftModel, state: Mapping[str, torch.Tensor]) -> None:
    """Put back what `collect_residual_base` gave, on an untouched base or on the same residual one."""
    if not has_residual_base(model):
        subtract_initial_adapter(model, part_of(state, INITIAL))
    set_peft_model_state_dict(model, part_of(state, TRAINED))


RESIDUAL_BASE = TrainingState(collect_residual_base, restore_residual_base)


@torch.no_grad()
def _add_initial_adapter(model: PeftModel, sign: int) -> None:
    for name, layer in lora_layers(model).items():
        layer.get_base_layer().weight.copy_(_with_initial_adapter(model, name, layer, sign))


def _with_initial_adapter(model: PeftModel, name: str, layer: LoraLayer, sign: int) -> torch.Tensor:
    weight = layer.get_base_layer().weight
    first, second = (initial_adapter(model)[f"{name}.lora_{part}.weight"].to(weight.device) for part in "AB")
    product = transpose(second.float() @ first.float(), layer.fan_in_fan_out)
    if isinstance(weight, DTensor):  # this process has a part of it
        product = distribute_tensor(product, weight.device_mesh, weight.placements, src_data_rank=None)
    changed: torch.Tensor = weight.float() + sign * layer.scaling[model.active_adapter] * product
    return changed.to(weight.dtype)


def _save_plain_lora(
    model: PeftModel, save_directory: str | Path, state_dict: Mapping[str, Any] | None = None, **_: Any
) -> None:
    """Write the adapter as a LoRA of twice the rank on the original base; takes what PEFT's `save_pretrained` takes."""
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    trained, initial = get_peft_model_state_dict(model, state_dict=state_dict), initial_adapter(model)
    weights = {name: tensor.clone() for name, tensor in trained.items()}  # embeddings of added tokens may be shared
    for name, first in initial.items():
        is_a = ".lora_A." in name
        first = first.to(trained[name].device)
        weights[name] = torch.cat([trained[name], first if is_a else -first], dim=0 if is_a else 1).contiguous()
    config = _with_twice_the_rank(model.active_peft_config)
    config.inference_mode = True
    config.base_model_name_or_path = config.base_model_name_or_path or model.get_base_model().config._name_or_path
    model.create_or_update_model_card(str(folder))
    save_file(weights, folder / ADAPTER_SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def _with_twice_the_rank(config: LoraConfig) -> LoraConfig:
    """`config` with twice the rank at the same scaling: alpha / r, or alpha / sqrt(r) for rsLoRA."""
    config = copy.deepcopy(config)
    alpha_factor = math.sqrt(2) if config.use_rslora else 2
    config.r, config.lora_alpha = config.r * 2, config.lora_alpha * alpha_factor
    config.rank_pattern = {name: rank * 2 for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {name: alpha * alpha_factor for name, alpha in config.alpha_pattern.items()}
    config.init_lora_weights = True
    return config
