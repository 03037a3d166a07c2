r"""The loss of a model that learns from a teacher too.

A target token has the loss $(1 - \alpha) \ell + \alpha T^2 D$, see `compression_options.DistillationOptions`, and the
mean is over the target tokens of the whole accumulated batch of all ranks, as for every loss here. The logged `loss` is
the task's $\ell$; `teacher_loss` is $T^2 D$, and `hidden_state_loss` that of `compression.hidden_states`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from left_trainer.compression.hidden_states import HiddenStateLoss
from left_trainer.compression.teacher import Lesson, Teacher, hidden_states
from left_trainer.compression.teacher_cache import TeacherCache
from left_trainer.compression.teacher_key import recognised_by
from left_trainer.compression_options import DistillationOptions
from left_trainer.kernels.linear_divergence import (
    DistillationLoss,
    Divergence,
    Head,
    TopTokens,
    divergence_of_logits,
    linear_divergence,
)
from left_trainer.methods.apply import find_method, seeded
from left_trainer.models import unwrapped, without_adapter
from left_trainer.models.stacks import stack_layers
from left_trainer.token_mean import IGNORE_INDEX
from left_trainer.trainer.checks import Request
from left_trainer.trainer.losses import LossHost, Tokens, at_output_head, loss_ranks, outputs_with_logits
from left_trainer.trainer.preparation import Preparation

PROJECTIONS_FILE = "hidden_state_projections.safetensors"
TEACHER_LOSS, HIDDEN_STATE_LOSS = "teacher_loss", "hidden_state_loss"


class Teaching:
    """Computes the loss of a student beside its teacher.

    Args:
        teacher: Loaded.
        options: How to learn from it.
        hidden: Compares hidden states; `None` where they are not compared.
    """

    def __init__(self, teacher: Teacher, options: DistillationOptions, hidden: HiddenStateLoss | None = None) -> None:
        self.teacher, self.options, self.hidden = teacher, options, hidden
        self.recognised_by = recognised_by(teacher)  # while its weights are there
        self.divergence = Divergence(options.loss, options.beta, options.temperature)
        self.cache: TeacherCache | None = None  # of what it says of the training rows
        self.answers_are_kept = False
        self.on_policy = False  # whether the step is one on texts that the student has written

    def loss(
        self, host: LossHost, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, num_items: Tokens
    ) -> tuple[torch.Tensor, Any]:
        """The share of a micro-batch in the loss of the accumulated batch. Arguments as in `losses.compute_loss`."""
        with host.accelerator.autocast():
            lesson = self.lesson(inputs)
        inputs = {**inputs, "output_hidden_states": True} if self.hidden else inputs
        outputs, distilled = self._distilled(host, model, inputs, return_outputs, lesson)
        tokens = distilled.tokens
        number = tokens.n_tokens if num_items is None else torch.as_tensor(num_items, device=tokens.n_tokens.device)
        factor = loss_ranks(host) / number.clamp(min=1) if num_items is not None else 1 / number.clamp(min=1)
        loss = distilled.loss_sum * factor
        host.added_terms.add(TEACHER_LOSS, distilled.divergence_sum * factor, loss - tokens.loss_sum * factor)
        if self.hidden is not None:
            difference = self._hidden_state_loss(host, model, outputs, inputs, lesson) * factor
            term = self.options.hidden_weight * difference
            host.added_terms.add(HIDDEN_STATE_LOSS, difference, term)
            loss = loss + term
        host.log_token_metrics(tokens.n_tokens, tokens.n_correct, inputs)
        return loss, outputs

    def lesson(self, inputs: dict[str, Any]) -> Lesson:
        """What the teacher says of a batch."""
        if self.cache is not None:
            return self.cache.lesson(inputs)
        return self.teacher.lesson(inputs, wants_hidden_states=self.hidden is not None)

    def save(self, folder: str) -> None:
        """Write the projections of hidden states into a checkpoint, where there are any."""
        if self.hidden is not None and len(self.hidden.projections):
            save_file(self.hidden.state_dict(), Path(folder) / PROJECTIONS_FILE)

    def load(self, folder: str) -> None:
        """Read them again."""
        if self.hidden is not None and len(self.hidden.projections):
            self.hidden.load_state_dict(load_file(Path(folder) / PROJECTIONS_FILE))

    @property
    def identity(self) -> dict[str, Any]:
        """The teacher, and how it is learned from: what a checkpoint belongs to."""
        without_effect = ("teacher_dtype", "teacher_quantization_config")
        options = {name: value for name, value in asdict(self.options).items() if name not in without_effect}
        return {"name": self.teacher.title, "weights": self.recognised_by, **options}

    @property
    def is_on(self) -> bool:
        """Whether the step needs what the teacher says."""
        return self.alpha > 0 or self.hidden is not None

    @property
    def alpha(self) -> float:
        """Weight of the teacher in the step. The student's own texts are no targets of the task."""
        return 1.0 if self.on_policy else self.options.weight

    def _distilled(
        self, host: LossHost, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, lesson: Lesson
    ) -> tuple[Any, DistillationLoss]:
        """Outputs of the student and the loss of its target tokens, without stored logits where that is exact."""
        encoder_decoder = host.family == "encoder_decoder"
        workspace_bytes = host.args.linear_cross_entropy_workspace_bytes

        def distill(student: Head, labels: torch.Tensor) -> DistillationLoss:
            labels, teacher = _aligned(labels, lesson, shifted=not encoder_decoder)
            if isinstance(teacher, torch.Tensor):
                return divergence_of_logits(student.full_logits(), teacher, labels, **self._how(student, teacher))
            how = self._how(student, teacher)
            return linear_divergence(student, teacher, labels, **how, workspace_bytes=workspace_bytes)

        fast = at_output_head(host, model, inputs, return_outputs, distill)
        if fast is not None:
            assert fast[1].distilled is not None
            return fast[0], fast[1].distilled
        outputs, labels = outputs_with_logits(host, model, inputs), inputs["labels"]
        logits = outputs.logits if encoder_decoder else outputs.logits[:, :-1]
        labels, teacher = _aligned(labels if encoder_decoder else labels[:, 1:], lesson, shifted=not encoder_decoder)
        if isinstance(teacher, Head):
            teacher = teacher.full_logits()
        return outputs, divergence_of_logits(logits, teacher, labels, **self._how(logits, teacher))

    def _how(self, student: Head | torch.Tensor, teacher: Head | TopTokens | torch.Tensor) -> dict[str, Any]:
        """Arguments of the divergence. Heads may be padded to different numbers of words."""
        n_words = self.cache.n_words if self.cache else None
        if not isinstance(teacher, TopTokens):
            numbers = [len(side.weight) if isinstance(side, Head) else side.shape[-1] for side in (student, teacher)]
            n_words = min(numbers) if len(set(numbers)) > 1 else None
        return {"divergence": self.divergence, "alpha": self.alpha, "n_words": n_words}

    def _hidden_state_loss(
        self, host: LossHost, model: nn.Module, outputs: Any, inputs: dict[str, Any], lesson: Lesson
    ) -> torch.Tensor:
        assert self.hidden is not None
        states = hidden_states(without_adapter(unwrapped(model)), outputs, inputs)
        shifted = host.family == "decoder_only"
        result: torch.Tensor = self.hidden(
            states, lesson.hidden_states, inputs["labels"], inputs.get("attention_mask"), shifted
        )
        return result


def _aligned(
    labels: torch.Tensor, lesson: Lesson, shifted: bool
) -> tuple[torch.Tensor, Head | TopTokens | torch.Tensor]:
    """Labels, and what the teacher says at each of them.

    Virtual tokens that a method puts before those of a decoder-only model have no part in either. The first token of a
    text, which only a student with virtual tokens predicts, is no target.

    Args:
        labels: `(batch, target)`, of a decoder-only model those behind each position.
        lesson: Of all positions.
        shifted: Whether the last position predicts no label.
    """
    n_before = labels.shape[1] - (lesson.length - 1 if shifted else lesson.length)
    if n_before:
        labels = labels.clone()
        labels[:, :n_before] = IGNORE_INDEX
    return labels, lesson.moved(n_before, -1 if shifted else None)


class TeachingCallback(TrainerCallback):
    """Does for the projections, which are no part of the model, what is done for the gradients of that.

    They are averaged over the processes, and set to zero after a step.
    """

    def __init__(self, hidden: HiddenStateLoss) -> None:
        self.hidden = hidden

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.world_size > 1:
            # One of a layer that was removed has no gradient.
            for parameter in filter(lambda parameter: parameter.grad is not None, self.hidden.parameters()):
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad.div_(args.world_size)  # type: ignore[union-attr]

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.hidden.zero_grad()


def make_teaching(request: Request, ready: Preparation) -> Teaching | None:
    """What a run needs of its teacher; `None` where it has none."""
    teacher, options, student = ready.teacher, request.args.distillation, ready.model
    if teacher is None:
        return None
    hidden = None
    if options.hidden_weight:
        configs = without_adapter(student).config, without_adapter(teacher.model).config
        widths = tuple(config.get_text_config(decoder=True).hidden_size for config in configs)
        layers = [stack_layers(config) for config in configs]
        numbers = {stack: (number, layers[1][stack]) for stack, number in layers[0].items()}
        with seeded(request.args.seed):
            hidden = HiddenStateLoss(options.layer_map, widths, numbers)  # type: ignore[arg-type]
    return Teaching(teacher, options, hidden)


def callbacks_of(teaching: Teaching | None) -> list[TrainerCallback]:
    """What acts during the training beside the loss."""
    has_projections = teaching is not None and teaching.hidden is not None and len(teaching.hidden.projections) > 0
    return [TeachingCallback(teaching.hidden)] if has_projections else []  # type: ignore[union-attr,arg-type]


def with_projections(
    optimizer: torch.optim.Optimizer, teaching: Teaching | None, device: torch.device
) -> torch.optim.Optimizer:
    """`optimizer`, which also trains the projections of hidden states."""
    projections = list(teaching.hidden.to(device).parameters()) if teaching and teaching.hidden else []
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if projections and id(projections[0]) not in held:
        optimizer.add_param_group({"params": projections})
    return optimizer


@contextlib.contextmanager
def answering_as_teacher(trainer: Any, compute_metrics: Any) -> Iterator[None]:
    """Inside, `trainer` evaluates and predicts with its teacher, one with weights and a tokenizer of its own.

    Args:
        trainer: Before its training.
        compute_metrics: With the teacher's tokenizer.
    """
    teacher: Teacher = trainer.teaching.teacher
    values = {
        "model": teacher.model,
        "model_wrapped": teacher.model,
        "processing_class": teacher.tokenizer,
        "method": find_method(teacher.model),
        "compute_metrics": compute_metrics,
    }
    held = {name: getattr(trainer, name) for name in values}
    if not getattr(teacher.model, "is_quantized", False):
        teacher.model.to(trainer.args.device)
    vars(trainer).update(values)
    try:
        yield
    finally:
        vars(trainer).update(held)
