"""What computes the virtual tokens of a soft prompt in training.

PEFT saves the computed prompts only. P-tuning's MLP and the projection of prefixes are needed to train on: without them
resume and best-model restore put computed prompts where the input of the encoder belongs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import PeftModel

from left_trainer.adapters.training_state import TrainingState


def collect_prompt_encoder(model: PeftModel) -> dict[str, torch.Tensor]:
    """The encoder's weights; nothing where it is the prompts alone, which the adapter file holds."""
    state: dict[str, torch.Tensor] = model.prompt_encoder[model.active_adapter].state_dict()
    return {} if set(state) == {"embedding.weight"} else state


def restore_prompt_encoder(model: PeftModel, state: Mapping[str, torch.Tensor]) -> None:
    """Put back what `collect_prompt_encoder` gave."""
    model.prompt_encoder[model.active_adapter].load_state_dict(state)


PROMPT_ENCODER = TrainingState(collect_prompt_encoder, restore_prompt_encoder)
