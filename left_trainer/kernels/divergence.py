r"""How far a student's next token is from its teacher's: the definitions, and their values on full logits.

With the student's and the teacher's logits $s$ and $t$, temperature $T$, $q = \mathrm{softmax}(s / T)$ and
$p = \mathrm{softmax}(t / T)$, a target token has one of

$$\begin{aligned}
\text{forward\_kl} &= \mathrm{KL}(p \,\|\, q) = \sum_j p_j \log \frac{p_j}{q_j} \\
\text{reverse\_kl} &= \mathrm{KL}(q \,\|\, p) \\
\text{jsd} &= \beta \, \mathrm{KL}(p \,\|\, m) + (1 - \beta) \, \mathrm{KL}(q \,\|\, m)
\end{aligned}$$

with $m = \beta p + (1 - \beta) q$

(Hinton et al. 2015, https://arxiv.org/abs/1503.02531; Agarwal et al. 2023, https://arxiv.org/abs/2306.13649). For
$\beta \to 0$ the last divided by $\beta$ becomes forward_kl; for $\beta \to 1$, divided by $1 - \beta$, reverse_kl.
The loss of a target token $y$ is

$$(1 - \alpha) \, (-\log \mathrm{softmax}(s)_y) + \alpha \, T^2 \, \text{divergence}.$$
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch.nn import functional

from left_trainer.kernels.linear_cross_entropy import TokenLoss
from left_trainer.token_mean import IGNORE_INDEX

DivergenceKind = Literal["forward_kl", "reverse_kl", "jsd"]


@dataclass(frozen=True)
class Divergence:
    """Which divergence, and at which temperature.

    Args:
        kind: `forward_kl`, from the teacher to the student; `reverse_kl`, from the student to the teacher; `jsd`, the
            generalised Jensen-Shannon divergence.
        beta: Weight of the teacher in the mixture of `jsd`, between 0 and 1, which are not allowed themselves.
        temperature: Both models' logits are divided by it; the value is multiplied by its square, so that gradients
            keep their size.

    Raises:
        ValueError: One of them is not allowed.
    """

    kind: DivergenceKind = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(DivergenceKind):
            raise ValueError(f"kind={self.kind!r}: expected one of {', '.join(get_args(DivergenceKind))}.")
        if not 0 < self.beta < 1:
            raise ValueError(
                f"beta={self.beta}: must be between 0 and 1, without the two. Their limits are kind='forward_kl' and "
                "kind='reverse_kl'."
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: must be above 0.")


@dataclass(frozen=True)
class TopTokens:
    r"""What a teacher that was run before says: its best tokens at each target position.

    The other tokens are one bucket with the rest of the probability. The forward divergence of this coarser
    distribution is, with $r = 1 - \sum_k p_k$,

    $$\sum_k p_k \log \frac{p_k}{q_k} + r_p \log \frac{r_p}{r_q}.$$

    Args:
        token_ids: `(..., k)`, int64, in front of the dimension of tokens the shape of the labels.
        log_probs: `(..., k)`, float32, at the temperature of the divergence.
    """

    token_ids: torch.Tensor
    log_probs: torch.Tensor

    def at(self, rows: torch.Tensor | slice) -> TopTokens:
        """Those of some positions."""
        return TopTokens(self.token_ids[rows], self.log_probs[rows])

    def rest(self, n_words: int, dtype: torch.dtype) -> torch.Tensor:
        """Probability of all other of `n_words` tokens, `(..., 1)`."""
        rest = (1 - self.log_probs.to(dtype).exp().sum(-1, keepdim=True)).clamp(min=0)
        return rest if self.token_ids.shape[-1] < n_words else torch.zeros_like(rest)


class DistillationLoss(NamedTuple):
    r"""What student and teacher say about the target tokens of a batch.

    Args:
        loss_sum: $(1 - \alpha)$ times the cross-entropy plus $\alpha T^2$ times the divergence, in nats, summed over
            the target tokens; a scalar, with a gradient for the student.
        divergence_sum: $T^2$ times the divergence, summed over the target tokens, without a gradient.
        tokens: The student's cross-entropy, without a gradient.
    """

    loss_sum: torch.Tensor
    divergence_sum: torch.Tensor
    tokens: TokenLoss


def divergence_of_logits(
    student_logits: torch.Tensor,
    teacher: torch.Tensor | TopTokens,
    labels: torch.Tensor,
    *,
    divergence: Divergence,
    alpha: float,
    n_words: int | None = None,
) -> DistillationLoss:
    """The loss of `linear_divergence` on full logits, by autograd: for heads that it cannot compute.

    Args:
        student_logits: `(..., vocabulary)`.
        teacher: Logits `(..., vocabulary)`, of which no gradient is taken, or its best tokens.
        labels: `(...)`, with -100 where nothing is predicted.
        divergence: What to compute.
        alpha: Between the cross-entropy (0) and the divergence (1).
        n_words: As in `linear_divergence`.

    Raises:
        ValueError: As in `linear_divergence`.
    """
    valid = labels.ne(IGNORE_INDEX)
    targets, student = labels[valid], _in_float32(student_logits[valid])
    if isinstance(teacher, TopTokens):
        n_words = shared_words(student.shape[-1], None, n_words)
        log_probs = _tempered(student, divergence, n_words)
        check_top_tokens(divergence)
        divergences = _divergence_from_top_tokens(log_probs, teacher.at(valid))
    else:
        n_words = shared_words(student.shape[-1], teacher.shape[-1], n_words)
        teacher_log_probs = _tempered(_in_float32(teacher[valid].detach()), divergence, n_words)
        divergences = _divergence(_tempered(student, divergence, n_words), teacher_log_probs, divergence)
    divergence_sum = divergence.temperature**2 * divergences.sum()
    losses = functional.cross_entropy(student, targets, reduction="none")
    n_correct = (student.argmax(-1) == targets).sum() if targets.numel() else valid.sum()
    loss_sum = (1 - alpha) * losses.sum() + alpha * divergence_sum
    losses = losses.detach()
    return DistillationLoss(
        loss_sum, divergence_sum.detach(), TokenLoss(losses.sum(), valid.sum(), n_correct, losses, valid)
    )


def shared_words(student: int, teacher: int | None, n_words: int | None) -> int:
    """The number of words over which two vocabularies are compared; `teacher` is `None` with `TopTokens`.

    Raises:
        ValueError: It is not given where the vocabularies differ, or is larger than one of them.
    """
    smallest = student if teacher is None else min(student, teacher)
    if n_words is None and teacher not in (None, student):
        raise ValueError(
            f"The student's head has {student} words and the teacher's {teacher}. Give n_words, the number of words "
            "at the start of both that are the same."
        )
    if n_words is not None and not 1 <= n_words <= smallest:
        raise ValueError(f"n_words={n_words}: must be at least 1 and at most {smallest}, the words of the heads.")
    return n_words or smallest


def check_top_tokens(divergence: Divergence) -> None:
    """Raise `ValueError` where a teacher's best tokens do not say enough for `divergence`."""
    if divergence.kind != "forward_kl":
        raise ValueError(
            f"kind={divergence.kind!r} needs the teacher's whole distribution. With the best tokens of a teacher only "
            "kind='forward_kl' can be computed."
        )


def _in_float32(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _tempered(logits: torch.Tensor, divergence: Divergence, n_words: int) -> torch.Tensor:
    return functional.log_softmax(logits[:, :n_words] / divergence.temperature, -1)


def _divergence(student: torch.Tensor, teacher: torch.Tensor, divergence: Divergence) -> torch.Tensor:
    """Of log-probabilities, `(rows, words)` each; `(rows,)`."""
    if divergence.kind == "forward_kl":
        return _kl(teacher, student)
    if divergence.kind == "reverse_kl":
        return _kl(student, teacher)
    beta = torch.tensor(divergence.beta, dtype=student.dtype, device=student.device)
    mixture = torch.logaddexp(teacher + beta.log(), student + (-beta).log1p())
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(of: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    return (of.exp() * (of - to)).sum(-1)


def _divergence_from_top_tokens(student: torch.Tensor, teacher: TopTokens) -> torch.Tensor:
    """Of log-probabilities, `(rows, words)`, and the teacher's best tokens; `(rows,)`."""
    top = _kl(teacher.log_probs.to(student.dtype), student.gather(-1, teacher.token_ids))
    rest = teacher.rest(student.shape[-1], student.dtype).squeeze(-1)
    # Where there are no other tokens, a finite number, which 0 can be multiplied by.
    smallest = torch.finfo(student.dtype).min / 2
    others = student.scatter(-1, teacher.token_ids, smallest).logsumexp(-1)
    return top + torch.xlogy(rest, rest) - rest * others
