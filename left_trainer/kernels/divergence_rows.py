"""Losses of rows of logits of a student beside its teacher's, with the gradient of their sum, in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from left_trainer.kernels.divergence import Divergence, TopTokens
from left_trainer.kernels.head_products import SMALLEST_EXPONENT


@dataclass(frozen=True)
class RowLosses:
    """Of some target tokens, `(rows,)` each.

    Args:
        cross_entropy: In nats.
        divergence: In nats, without the factor of the temperature.
        is_correct: Whether the target has the largest logit.
    """

    cross_entropy: torch.Tensor
    divergence: torch.Tensor
    is_correct: torch.Tensor

    @classmethod
    def empty(cls, rows: int, dtype: torch.dtype, device: torch.device) -> RowLosses:
        """To be filled."""
        losses = torch.empty(2, rows, dtype=dtype, device=device)
        return cls(losses[0], losses[1], torch.empty(rows, dtype=torch.bool, device=device))

    def fill(self, rows: slice, some: RowLosses) -> None:
        """Put those of some rows where they belong."""
        self.cross_entropy[rows], self.divergence[rows] = some.cross_entropy, some.divergence
        self.is_correct[rows] = some.is_correct


class DivergenceRows:
    r"""Cross-entropy and divergence of blocks of rows that fit into a CPU's cache, with buffers for one block.

    With $u = s / T$, the gradients of a divergence $D$ are

    $$\frac{\partial \, \text{forward\_kl}}{\partial u} = q - p, \qquad
      \frac{\partial \, \text{reverse\_kl}}{\partial u} = q \, (\log \tfrac{q}{p} - D), \qquad
      \frac{\partial \, \text{jsd}}{\partial u} = (1 - \beta) \, q \, (\log \tfrac{q}{m} - \mathrm{KL}(q \,\|\, m)).$$

    Args:
        n_words: Words over which the divergence is taken, the first ones of the student's.
        divergence: Which one.
        alpha: Between the cross-entropy (0) and the divergence (1).
        with_gradient: Whether it is wanted.
    """

    def __init__(self, n_words: int, divergence: Divergence, alpha: float, with_gradient: bool) -> None:
        self.n_words, self.divergence, self.alpha, self.with_gradient = n_words, divergence, alpha, with_gradient
        self._buffers: list[torch.Tensor] = []

    def items_of_a_row(self, vocabulary: int) -> int:
        """Numbers that the buffers hold for a row."""
        return vocabulary + self.n_words * (self._n_buffers - 1)

    @property
    def _n_buffers(self) -> int:
        return 4 if self.divergence.kind == "jsd" else 3

    def allocate(self, rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make room for blocks of up to `rows`."""
        sizes = [vocabulary, *[self.n_words] * (self._n_buffers - 1)]
        self._buffers = [torch.empty(rows, size, dtype=dtype, device=device) for size in sizes]

    def __call__(self, student: torch.Tensor, teacher: torch.Tensor | TopTokens, targets: torch.Tensor) -> RowLosses:
        """Losses of a block; the gradient of their weighted sum takes the place of the student's logits.

        Args:
            student: Logits `(rows, vocabulary)`.
            teacher: Logits `(rows, n_words)`, overwritten; or its best tokens.
            targets: `(rows,)`.
        """
        at = targets.unsqueeze(1)
        log_probs, tempered, *work = (buffer[: len(student)] for buffer in self._buffers)
        is_correct = (student.gather(1, at) >= student.amax(1, keepdim=True)).squeeze(1)
        torch.log_softmax(student, 1, out=log_probs)
        losses = -log_probs.gather(1, at).squeeze(1)
        torch.mul(student[:, : self.n_words], 1 / self.divergence.temperature, out=work[0])
        if isinstance(teacher, TopTokens):
            divergences = _from_top_tokens(work[0], teacher, tempered)
        else:
            torch.log_softmax(work[0], 1, out=tempered)
            torch.log_softmax(teacher.mul_(1 / self.divergence.temperature), 1, out=work[0])
            divergences = self._from_logits(tempered, work[0], teacher, *work[1:])
        if self.with_gradient:
            self._combine(student, log_probs, tempered, at)
        return RowLosses(losses, divergences, is_correct)

    def _from_logits(
        self, student: torch.Tensor, teacher: torch.Tensor, work: torch.Tensor, *more: torch.Tensor
    ) -> torch.Tensor:
        """Divergence of log-probabilities; its gradient takes the student's place, the others are overwritten."""
        if self.divergence.kind == "forward_kl":
            probs = torch.exp(_bounded(teacher), out=work)
            divergences = teacher.sub_(student).mul_(probs).sum(1)
            _bounded(student).exp_().sub_(probs)
        elif self.divergence.kind == "reverse_kl":
            gap = torch.sub(student, teacher, out=teacher)
            probs = _bounded(student).exp_()
            divergences = torch.mul(probs, gap, out=work).sum(1)
            probs.mul_(gap.sub_(divergences.unsqueeze(1)))
        else:
            beta, (mixture,) = self.divergence.beta, more
            teacher_probs = torch.exp(_bounded(teacher), out=work)
            torch.exp(_bounded(student), out=mixture).lerp_(teacher_probs, beta).log_()
            to_teacher = teacher.sub_(mixture).mul_(teacher_probs).sum(1)
            probs = torch.exp(student, out=work)
            gap = student.sub_(mixture)
            to_student = torch.mul(probs, gap, out=mixture).sum(1)
            divergences = beta * to_teacher + (1 - beta) * to_student
            gap.sub_(to_student.unsqueeze(1)).mul_(probs).mul_(1 - beta)
        return divergences

    def _combine(
        self, student: torch.Tensor, log_probs: torch.Tensor, of_divergence: torch.Tensor, at: torch.Tensor
    ) -> None:
        r"""Put $(1 - \alpha) (\mathrm{softmax}(s) - 1_y) + \alpha T \, \partial D / \partial u$ in the place of $s$."""
        own = 1 - self.alpha
        if own:
            torch.exp(_bounded(log_probs), out=student).mul_(own)
            student.scatter_add_(1, at, torch.full_like(student[:, :1], -own))
        else:
            student.zero_()
        student[:, : self.n_words].add_(of_divergence, alpha=self.alpha * self.divergence.temperature)


def _from_top_tokens(logits: torch.Tensor, teacher: TopTokens, gradient: torch.Tensor) -> torch.Tensor:
    """Divergence of tempered logits, which are overwritten, to a teacher's best tokens; `gradient` is filled."""
    top_log_probs, rest = teacher.log_probs.to(logits.dtype), teacher.rest(logits.shape[1], logits.dtype)
    top = logits.gather(1, teacher.token_ids)
    # Of the other tokens alone, so that their probability is exact however small it is. The number that stands for
    # "none" is finite, because no other token may be left.
    logits.scatter_(1, teacher.token_ids, torch.finfo(logits.dtype).min / 2)
    torch.log_softmax(logits, 1, out=gradient)
    others = logits.amax(1, keepdim=True) - gradient.amax(1, keepdim=True)
    total = torch.logaddexp(others, top.logsumexp(1, keepdim=True))
    top, others = top.sub_(total), others - total
    top_probs = top_log_probs.exp()
    divergences = (top_probs * (top_log_probs - top)).sum(1, keepdim=True)
    divergences += torch.xlogy(rest, rest) - rest * others
    whole = top_probs.sum(1, keepdim=True) + rest
    _bounded(gradient).exp_().mul_(others.exp() * whole - rest)
    gradient.scatter_(1, teacher.token_ids, top.exp() * whole - top_probs)
    return divergences.squeeze(1)


def _bounded(log_probs: torch.Tensor) -> torch.Tensor:
    """In place, without those whose exponentials are denormal numbers."""
    return log_probs.clamp_(min=SMALLEST_EXPONENT[log_probs.dtype])
