r"""NEFTune: noise on the embeddings of a model's input while it is trained (Jain et al., 2023, arXiv 2310.05914).

$$x' = x + \epsilon, \quad \epsilon \sim U\left(-\tfrac{\alpha}{\sqrt{L d}}, \tfrac{\alpha}{\sqrt{L d}}\right)$$

for $L$ tokens of $d$ features.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from left_trainer.models import unwrapped, without_adapter


class NeftuneCallback(TrainerCallback):
    """Adds the noise from the start of a training to its end.

    `Trainer` does so at `get_input_embeddings()`, which T5, BART and their relatives do not call: their encoder has an
    embedding module of its own, with the same weight (transformers 5.23).

    Args:
        alpha: Of the equation, `neftune_noise_alpha`.

    Raises:
        RuntimeError: After the first step, where the model has called none of the embeddings that are known.
    """

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        self.was_called = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Put the noise behind the embeddings."""
        self._remove()
        self.was_called = False
        for table in input_tables(unwrapped(model)):
            self.handles.append(table.register_forward_hook(self._add_noise))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Make sure that there was noise."""
        if not self.was_called:
            raise RuntimeError(
                f"neftune_noise_alpha={self.alpha:g} has no effect: {type(without_adapter(unwrapped(model))).__name__} "
                "does not call its embeddings as a module. Remove it."
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the noise away."""
        self._remove()

    def _add_noise(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        self.was_called = True
        if not module.training:
            return output
        bound = self.alpha / (output.shape[-2] * output.shape[-1]) ** 0.5
        return output + torch.zeros_like(output).uniform_(-bound, bound)

    def _remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []


def neftune_callbacks(args: TrainingArguments) -> list[TrainerCallback]:
    """What `neftune_noise_alpha` asks for."""
    return [] if args.neftune_noise_alpha is None else [NeftuneCallback(args.neftune_noise_alpha)]


def input_tables(model: PreTrainedModel | PeftModel) -> list[nn.Module]:
    """The modules of which one embeds the input: the model's, its encoder's own, or that which PEFT puts prompts on."""
    base = without_adapter(model)
    encoder = base.get_encoder() if base.config.is_encoder_decoder else None
    tables = [base.get_input_embeddings(), getattr(model, "word_embeddings", None)]
    if encoder is not None and hasattr(encoder, "get_input_embeddings"):
        tables.append(encoder.get_input_embeddings())
    return list({id(table): table for table in tables if table is not None}.values())
