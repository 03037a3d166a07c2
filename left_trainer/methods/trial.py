"""Trying a method on the shapes of a model, before its weights are loaded."""

from __future__ import annotations

import copy

import torch
from peft import PeftConfig
from transformers import PreTrainedModel

from left_trainer.methods.apply import with_named_targets
from left_trainer.methods.input_prompts import wrap
from left_trainer.models import without_upstream_warnings


def check_shapes(skeleton: PreTrainedModel, config: PeftConfig, method: str) -> None:
    """Raise `ValueError` where PEFT refuses the options of `config` for the shapes of a model.

    What cannot be computed without weights, such as a decomposition of them, raises errors of other types and is left
    to the model itself.

    Args:
        skeleton: On the meta device. It has the adapter afterwards, so that it is of no further use.
        config: With its targets resolved.
        method: Name of the method, for the message.
    """
    try:
        with torch.random.fork_rng(devices=[]), without_upstream_warnings():
            wrap(skeleton, with_named_targets(skeleton, copy.deepcopy(config)))
    except ValueError as error:
        raise ValueError(f"peft_method={method!r} does not fit the model with these peft_kwargs: {error}") from error
    except Exception:
        pass
