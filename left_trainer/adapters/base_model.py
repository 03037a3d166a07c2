"""The base model of an adapter, where it is no longer the one that its name loads: smaller, or of fewer tokens.

An adapter fits that base alone, so that it is saved beside it, in the folder `base`.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.adaption_prompt.layer import AdaptedAttention, AdaptedAttentionGPT
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from left_trainer.adapters.residual_base import original_weights

BASE_FOLDER = "base"
CHANGED = "base_was_changed"  # attribute of a model, with or without an adapter


def mark_changed(model: PreTrainedModel | PeftModel) -> None:
    """Note that the weights of `model` are no longer those that its name loads, so that they are saved beside adapters.

    PEFT would take the other size of the vocabulary for tokens that were added, and save all embeddings.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    setattr(base, CHANGED, True)
    base.name_or_path = base.config._name_or_path = ""
    for config in model.peft_config.values() if isinstance(model, PeftModel) else ():
        config.base_model_name_or_path = ""


def is_changed(model: nn.Module) -> bool:
    """Whether `mark_changed` was called with `model`, or with its base."""
    return bool(getattr(model.get_base_model() if isinstance(model, PeftModel) else model, CHANGED, False))


def plain_base(model: PeftModel) -> PreTrainedModel:
    """The base model of `model` as its class makes it, without adapters, on the same tensors.

    Its weights are those that the adapter was put on. They are not copied, but for those of which a method has moved a
    part into the adapter.
    """
    base = model.get_base_model()
    with torch.device("meta"):
        plain = type(base)(copy.deepcopy(base.config))
    tensors = {name: _tensor(base, name).detach() for name in plain.state_dict()}
    tensors |= {name: weight for name, weight in original_weights(model).items() if name in tensors}
    plain.load_state_dict(tensors, assign=True)
    plain.tie_weights()
    plain.generation_config = base.generation_config
    return plain


def base_bytes(model: nn.Module) -> int:
    """Bytes that `write_base` writes."""
    weights = model.get_base_model().parameters() if isinstance(model, PeftModel) and is_changed(model) else ()
    return sum(weight.nbytes for weight in weights)


def write_base(model: nn.Module, directory: str | Path, place: str | Path) -> None:
    """Write the base beside a saved adapter, and its place into the adapter's config, where it was changed.

    Args:
        model: With the adapter.
        directory: Where the adapter was saved. `PeftModel.from_pretrained(base, directory)` loads it.
        place: Where that will be in the end.
    """
    config_file = Path(directory) / CONFIG_NAME
    if not isinstance(model, PeftModel) or not is_changed(model) or not config_file.is_file():
        return
    plain_base(model).save_pretrained(Path(directory) / BASE_FOLDER)
    config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": str(Path(place).absolute() / BASE_FOLDER), "revision": None}
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _tensor(base: nn.Module, name: str) -> torch.Tensor:
    """The tensor that is called `name` in the base model without its adapter."""
    *path, last = name.split(".")
    module = _without_tuner(base)
    for part in path:
        module = _without_tuner(getattr(module, part))
    tensor: torch.Tensor = getattr(module, last)
    return tensor


def _without_tuner(module: nn.Module) -> Any:
    while True:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        elif isinstance(module, AdaptedAttention | AdaptedAttentionGPT):
            module = module.model
        else:
            return module
