"""The loss of a student beside its teacher, on full logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from left_trainer.kernels.linear_cross_entropy import TokenLoss

DEFAULT = 128 * 2**20


@dataclass(frozen=True)
class Head:
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class TopTokens:
    token_ids: torch.Tensor
    log_probs: torch.Tensor


@dataclass(frozen=True)
class Divergence:
    kind: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0


class DistillationLoss(NamedTuple):
    loss_sum: torch.Tensor
    divergence_sum: torch.Tensor
    tokens: TokenLoss


def _logits(head):
    z = torch.nn.functional.linear(head.hidden, head.weight.to(head.hidden.dtype))
    if head.bias is not None:
        z = z + head.bias
    return head.softcap * torch.tanh(z / head.softcap) if head.softcap else z


def linear_divergence(student, teacher, labels, *, divergence, alpha, n_words=None, workspace_bytes=DEFAULT):
    return divergence_of_logits(
        _logits(student),
        _logits(teacher) if isinstance(teacher, Head) else teacher,
        labels,
        divergence=divergence,
        alpha=alpha,
        n_words=n_words,
    )


def divergence_of_logits(s, t, labels, *, divergence, alpha, n_words=None):
    valid = labels.ne(-100)
    s = s[valid].float()
    y = labels[valid]
    T = divergence.temperature
    ce = torch.nn.functional.cross_entropy(s, y, reduction="none")
    q = torch.log_softmax(s[:, :n_words] / T, -1)
    p = torch.log_softmax(t[valid].float()[:, :n_words] / T, -1)
    d = (p.exp() * (p - q)).sum(-1) if divergence.kind == "forward_kl" else (q.exp() * (q - p)).sum(-1)
    d = d * T * T
    tokens = TokenLoss(ce.sum().detach(), valid.sum(), (s.argmax(-1) == y).sum(), ce.detach(), valid)
    return DistillationLoss((1 - alpha) * ce.sum() + alpha * d.sum(), d.sum().detach(), tokens)
