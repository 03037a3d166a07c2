"""Distillation without `left_trainer`: the losses, and trainers of the plain stack that compute them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from races import Lesson
from torch.nn import functional
from transformers import PreTrainedModel, Seq2SeqTrainer
from trl import SFTTrainer
from trl.trainer import distillation_trainer

TRL_BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


def divergence_of_full_logits(
    student: torch.Tensor, teacher: torch.Tensor, kind: str, temperature: float
) -> torch.Tensor:
    """As it is written without a kernel: mean over the rows of logits, `(rows, vocabulary)`, in float32."""
    ours = functional.log_softmax(student.float() / temperature, -1)
    theirs = functional.log_softmax(teacher.float() / temperature, -1)
    return temperature**2 * DIVERGENCES[kind](theirs, ours)


def kl(of: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    """Mean divergence of log-probabilities from others."""
    return functional.kl_div(to, of, log_target=True, reduction="batchmean")


def jsd(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """With half of each in the mixture."""
    mixture = torch.logaddexp(teacher, student) - torch.tensor(2.0).log()
    return (kl(teacher, mixture) + kl(student, mixture)) / 2


DIVERGENCES: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "forward_kl": kl,
    "reverse_kl": lambda teacher, student: kl(student, teacher),
    "jsd": jsd,
}


def trl_divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_weight: torch.Tensor,
    kind: str,
    temperature: float,
) -> torch.Tensor:
    """What `DistillationTrainer` computes of hidden states `(batch, length, width)` and heads (trl 1.16)."""
    mask = torch.ones(student.shape[:2], device=student.device)
    beta = TRL_BETAS[kind]
    return distillation_trainer._chunked_divergence_loss(
        student, teacher, student_weight, teacher_weight, mask, beta, temperature=temperature
    )[0]


class FullLogitsTrainer(Seq2SeqTrainer):
    """With the divergence from a teacher on full logits; all targets have the same length."""

    teacher: PreTrainedModel
    lesson: Lesson

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        outputs = model(**inputs)
        with torch.no_grad():
            teacher = self.teacher(**inputs).logits
        lesson, logits = self.lesson, (outputs.logits.flatten(0, 1), teacher.flatten(0, 1))
        divergence = divergence_of_full_logits(*logits, lesson.loss, lesson.temperature)
        return (1 - lesson.alpha) * outputs.loss + lesson.alpha * divergence


class TrlDivergenceTrainer(SFTTrainer):
    """With the loss of `DistillationTrainer`, on completions that are given; all have the same length (trl 1.16)."""

    teacher: PreTrainedModel
    lesson: Lesson

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        student = self.accelerator.unwrap_model(model).get_base_model()
        n_prompt = int(inputs["labels"][0].eq(-100).sum())
        read = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        ours = student.model(**read, use_cache=False).last_hidden_state[:, n_prompt - 1 : -1]
        with torch.no_grad():
            theirs = self.teacher.model(**read, use_cache=False).last_hidden_state[:, n_prompt - 1 : -1]
        heads = student.lm_head.weight, self.teacher.lm_head.weight
        return trl_divergence(ours, theirs, *heads, self.lesson.loss, self.lesson.temperature)
