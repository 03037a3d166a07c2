"""The model that a student learns from: which one it is, how it is loaded, and what it says of a batch."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from left_trainer.adapters.task_ids import TASK_IDS
from left_trainer.compression_options import BASE_TEACHER, SELF_TEACHER, DistillationOptions
from left_trainer.evaluation.generation import adapter_disabled
from left_trainer.kernels.linear_divergence import Head, TopTokens
from left_trainer.kernels.output_head import input_of_output_head, why_not_at_output_head
from left_trainer.methods.saving import adapter_method, load_trained
from left_trainer.models import ModelSource, without_adapter
from left_trainer.models.decoder_inputs import with_decoder_inputs
from left_trainer.models.wrapping import evaluating

# What a batch has for the method of the student alone.
OF_THE_STUDENT = (TASK_IDS,)


@dataclass(frozen=True)
class Lesson:
    """What a teacher says of a batch, at the positions of the labels.

    Args:
        said: The teacher's output head with what goes into it, where its logits need not be stored; its best tokens,
            where they are all that was kept; or its logits, `(batch, target, vocabulary)`.
        hidden_states: By stack, `encoder` and `decoder`: after the embeddings and each layer, `(batch, length, width)`.
    """

    said: Head | TopTokens | torch.Tensor
    hidden_states: Mapping[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Number of positions."""
        if isinstance(self.said, torch.Tensor):
            return self.said.shape[1]
        return (self.said.hidden if isinstance(self.said, Head) else self.said.token_ids).shape[1]

    def moved(self, n_before: int, stop: int | None) -> Head | TopTokens | torch.Tensor:
        """What was said, behind `n_before` empty positions and up to the position `stop`."""

        def move(values: torch.Tensor) -> torch.Tensor:
            return pad(values[:, :stop], (0, 0, n_before, 0))

        if isinstance(self.said, Head):
            return replace(self.said, hidden=move(self.said.hidden))
        if isinstance(self.said, TopTokens):
            return replace(self.said, token_ids=move(self.said.token_ids), log_probs=move(self.said.log_probs))
        return move(self.said)


class Teacher:
    """A frozen model in evaluation mode.

    Args:
        title: What it is called in reports.
        model: The model itself; the student's, where the teacher is its base.
        tokenizer: Its own.
        is_base: Whether it is the student with its adapter off.
    """

    def __init__(
        self,
        title: str,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        is_base: bool = False,
    ) -> None:
        self.title, self.tokenizer, self.is_base = title, tokenizer, is_base
        self._model: PreTrainedModel | PeftModel | None = model
        if not is_base:
            model.requires_grad_(False)
            model.eval()

    @property
    def model(self) -> PreTrainedModel | PeftModel:
        """The model itself. Raises `RuntimeError` once it is released."""
        if self._model is None:
            raise RuntimeError(
                f"The weights of the teacher {self.title!r} were released when all was kept of it that the training "
                "needs. Ask it for something else before train()."
            )
        return self._model

    def release(self) -> None:
        """Free the memory of its weights, unless they are the student's. A model of the user goes to the CPU."""
        if self.is_base or self._model is None:
            return
        if not getattr(self._model, "is_quantized", False):
            self._model.to("cpu")
        self._model = None

    @classmethod
    def of(
        cls,
        teacher: ModelSource | str,
        student: PreTrainedModel | PeftModel,
        options: DistillationOptions,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> Teacher:
        """Load a teacher.

        Args:
            teacher: A model, or `base` or `self`.
            student: As it starts.
            options: Of the distillation.
            tokenizer: The teacher's, which for `base` and `self` is the student's.
        """
        if teacher == BASE_TEACHER:
            return cls(BASE_TEACHER, student, tokenizer, is_base=True)
        if teacher == SELF_TEACHER:
            return cls(SELF_TEACHER, copy.deepcopy(student), tokenizer)
        assert isinstance(teacher, ModelSource)
        if teacher.is_loaded:
            return cls(teacher.base_name, teacher.model, tokenizer)  # type: ignore[arg-type]
        dtype = options.teacher_dtype or str(without_adapter(student).dtype).removeprefix("torch.")
        source = replace(teacher, options={**teacher.options, "dtype": dtype})
        model = load_trained(source, is_trainable=False, quantization_config=options.teacher_quantization_config)
        method = adapter_method(source)
        if isinstance(model, PeftModel) and method and method.prepare:
            method.prepare(model)
        return cls(str(teacher.model), model, tokenizer)

    @contextlib.contextmanager
    def speaking(self, device: torch.device) -> Iterator[PreTrainedModel | PeftModel]:
        """Inside, the model computes as the teacher, without gradients and on `device`."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self.is_base:
                stack.enter_context(adapter_disabled(self.model))
                stack.enter_context(evaluating(self.model))
            elif self.model.device != device and not getattr(self.model, "is_quantized", False):
                self.model.to(device)
            # PEFT's own call of the base goes through what a soft prompt has put there.
            yield without_adapter(self.model) if self.is_base else self.model

    def lesson(self, inputs: Mapping[str, Any], wants_hidden_states: bool = False) -> Lesson:
        """What the teacher says of a batch.

        Args:
            inputs: A batch of the student's, with labels.
            wants_hidden_states: Whether these are compared.
        """
        labels = inputs["labels"]
        given = {name: value for name, value in inputs.items() if name not in OF_THE_STUDENT}
        if wants_hidden_states:
            given["output_hidden_states"] = True
        with self.speaking(labels.device) as model:
            base = without_adapter(model)
            if not base.config.is_encoder_decoder:
                given["use_cache"] = False
            if why_not_at_output_head(base) is None:
                with input_of_output_head(base) as captured:
                    outputs = model(**given)
                length = labels.shape[1]
                assert captured.head is not None
                head = replace(captured.head, hidden=captured.head.hidden[:, -length:])
                return Lesson(head, hidden_states(base, outputs, inputs))
            given = with_decoder_inputs(base, given)  # of the labels, with which the model would compute a loss
            del given["labels"]
            outputs = model(**given)
            return Lesson(outputs.logits[:, -labels.shape[1] :], hidden_states(base, outputs, inputs))


def hidden_states(
    base: PreTrainedModel, outputs: Any, inputs: Mapping[str, Any]
) -> dict[str, tuple[torch.Tensor, ...]]:
    """Hidden states by stack, those of virtual tokens cut off; empty where the model was not asked for any."""
    length = inputs["input_ids"].shape[1]
    if not base.config.is_encoder_decoder:
        found: dict[str, Any] = {"decoder": [state[:, -length:] for state in outputs.hidden_states or ()]}
    else:
        encoder = [state[:, -length:] for state in outputs.encoder_hidden_states or ()]
        found = {"encoder": encoder, "decoder": outputs.decoder_hidden_states or ()}
    return {name: tuple(states) for name, states in found.items() if states}
