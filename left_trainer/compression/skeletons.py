"""Models without weights, as the model to be shrunk is and as it shall be."""

from __future__ import annotations

import copy

import torch
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel

from left_trainer.methods.apply import with_named_targets
from left_trainer.methods.input_prompts import wrap
from left_trainer.models import without_adapter, without_upstream_warnings


def skeleton_like(model: PreTrainedModel | PeftModel, config: PreTrainedConfig) -> PreTrainedModel | PeftModel:
    """A model of the class of `model` with `config` and the adapters of `model`, on the meta device."""
    with torch.device("meta"):
        skeleton = type(without_adapter(model))(copy.deepcopy(config))
        if not isinstance(model, PeftModel):
            return skeleton
        with torch.random.fork_rng(devices=[]), without_upstream_warnings():
            (name, first), *others = model.peft_config.items()
            wrapped = wrap(skeleton, with_named_targets(skeleton, copy.deepcopy(first)), name)
            for name, other in others:
                wrapped.add_adapter(name, copy.deepcopy(other))
    return wrapped
