"""Calling the model inside of a tuner, where the tuner's own forward does not fit."""

from __future__ import annotations

from peft import PeftModel


def call_inner_model(model: PeftModel) -> None:
    """Make the tuner's forward that of the model inside, as it is at each call.

    AdaLoRA's own adds the regularizer to the loss of every forward pass: in evaluation too, and k times in k
    accumulation steps; `orthogonality_penalty` adds it once a step. Adaption prompts keep the forward that the model
    had when it was wrapped, so that a trainer which replaces it later, as TRL's does, is not heard (peft 0.21).
    """
    inner = model.base_model.model
    model.base_model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
