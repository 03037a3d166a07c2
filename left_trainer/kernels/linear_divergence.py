"""Divergence of two linear output heads without stored logits: distillation of a student from its teacher."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from left_trainer.kernels.divergence import (
    DistillationLoss,
    Divergence,
    TopTokens,
    check_top_tokens,
    divergence_of_logits,
    shared_words,
)
from left_trainer.kernels.divergence_rows import DivergenceRows, RowLosses
from left_trainer.kernels.head_products import HeadGradients, sum_dtype
from left_trainer.kernels.head_tiles import Head, HeadTile, TopTokensTile, even_part, rows_of_a_block
from left_trainer.kernels.linear_cross_entropy import DEFAULT_WORKSPACE_BYTES, TokenLoss, linear_cross_entropy
from left_trainer.token_mean import IGNORE_INDEX

__all__ = [
    "DistillationLoss",
    "Divergence",
    "Head",
    "TopTokens",
    "divergence_of_logits",
    "linear_divergence",
]

# Blocks may take so much of the workspace; the rest is for tiles.
BLOCKS_PART_OF_WORKSPACE = 4


def linear_divergence(
    student: Head,
    teacher: Head | TopTokens,
    labels: torch.Tensor,
    *,
    divergence: Divergence,
    alpha: float,
    n_words: int | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> DistillationLoss:
    r"""Cross-entropy and divergence summed over the rows that have a label, with the student's gradients.

    The module `divergence` defines them. A tile of logits is as wide as the vocabulary and holds as many rows as fit:
    one product with each head gives the student's and the teacher's, blocks of it that fit into the cache are turned
    into the gradient in place, and one more product gives that of the student's hidden states. Cross-entropy and
    divergence share all three. The teacher gets no gradient.

    Under autocast the products are in autocast's dtype. Softmax and sums are in float32 for bfloat16 and float16.

    With `alpha=0` the loss is that of `linear_cross_entropy`, to the last digit.

    Args:
        student: Its head.
        teacher: Its head, or its best tokens.
        labels: `(...)`, with -100 where nothing is predicted; such rows are never multiplied.
        divergence: What to compute.
        alpha: Between the cross-entropy (0) and the divergence (1).
        n_words: Number of words at the start of both vocabularies that are the same, where heads are padded to
            different sizes. The divergence is that of the two distributions over these words; the cross-entropy is
            over all words of the student.
        workspace_bytes: Bound on the memory for logits and what is computed from them. One row is always allowed. Each
            tile reads both weights, so more than the default is a little faster: with 256 MiB the float32 step of 256
            rows at 250,000 words takes 0.9 of the time.

    Raises:
        ValueError: The vocabularies differ and `n_words` is not given or does not fit, or the teacher's best tokens
            do not say enough for the divergence.
    """
    valid = labels.ne(IGNORE_INDEX)
    given: Head | TopTokens
    if isinstance(teacher, TopTokens):
        check_top_tokens(divergence)
        n_words = shared_words(student.n_words, None, n_words)
        given = teacher.at(valid)
    else:
        n_words = shared_words(student.n_words, teacher.n_words, n_words)
        given = teacher.at(valid).detached(n_words)
    with_gradient = alpha > 0 and torch.is_grad_enabled()
    head, targets = student.at(valid), labels[valid]
    task = _Task(head, given, targets, n_words, divergence, alpha, workspace_bytes)
    loss_sum, divergence_sum, losses, n_correct = _LinearDivergence.apply(
        head.hidden, head.weight, head.bias, task, with_gradient
    )
    tokens = TokenLoss(losses.sum(), valid.sum(), n_correct, losses, valid)
    if alpha == 0:
        tokens = linear_cross_entropy(student.hidden, student.weight, labels, student.bias, softcap=student.softcap)
        loss_sum, tokens = tokens.loss_sum, tokens._replace(loss_sum=tokens.loss_sum.detach())
    return DistillationLoss(loss_sum, divergence_sum, tokens)


@dataclass(frozen=True)
class _Task:
    """What to compute: arguments of `linear_divergence`, with the rows that have a label alone."""

    student: Head
    teacher: Head | TopTokens
    targets: torch.Tensor
    n_words: int
    divergence: Divergence
    alpha: float
    workspace_bytes: int


class _LinearDivergence(torch.autograd.Function):
    """Computes the gradients in the forward pass; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        task: _Task,
        with_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        wanted = [with_gradient and needed for needed in ctx.needs_input_grad[:3]]
        gradients = HeadGradients(hidden, weight, bias, wanted)
        with torch.autocast(hidden.device.type, enabled=False):
            found = _losses(task, gradients, any(wanted))
        ctx.save_for_backward(*gradients.finished())
        losses, n_correct = found.cross_entropy, found.is_correct.sum()
        divergence_sum = task.divergence.temperature**2 * found.divergence.sum()
        ctx.mark_non_differentiable(divergence_sum, losses, n_correct)
        loss_sum = (1 - task.alpha) * losses.sum() + task.alpha * divergence_sum
        return loss_sum, divergence_sum, losses, n_correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        # In place, because the weight's gradient is as large as the weight. autograd refuses a second pass by itself.
        scaled = (None if saved is None else saved.mul_(gradient.to(saved.dtype)) for saved in ctx.saved_tensors)
        return (*scaled, None, None)


def _losses(task: _Task, gradients: HeadGradients, with_gradient: bool) -> RowLosses:
    """Losses of all rows; their gradients are added to `gradients`."""
    dtype = sum_dtype(task.student.hidden.dtype)
    head = replace(task.student, weight=gradients.product_weight) if with_gradient else task.student
    student = HeadTile(head, dtype, with_slopes=with_gradient)
    if isinstance(task.teacher, TopTokens):
        teacher: HeadTile | TopTokensTile = TopTokensTile(task.teacher)
    else:
        teacher = HeadTile(task.teacher, dtype, with_slopes=False)
    row_losses = DivergenceRows(task.n_words, task.divergence, task.alpha, with_gradient)
    n_rows, vocabulary, device = len(task.targets), task.student.n_words, task.student.hidden.device
    block_row_bytes = student.block_row_bytes + teacher.block_row_bytes
    block_row_bytes += row_losses.items_of_a_row(vocabulary) * dtype.itemsize
    block = rows_of_a_block(vocabulary * dtype.itemsize, device)
    block = max(1, min(block, n_rows, task.workspace_bytes // BLOCKS_PART_OF_WORKSPACE // block_row_bytes))
    fitting = (task.workspace_bytes - block * block_row_bytes) // (student.row_bytes + teacher.row_bytes)
    rows = even_part(n_rows, max(1, fitting))
    student.allocate(rows, block)
    teacher.allocate(rows, block)
    row_losses.allocate(block, vocabulary, dtype, device)

    losses = RowLosses.empty(n_rows, dtype, device)
    for first in range(0, n_rows, rows):
        some = slice(first, min(first + rows, n_rows))
        student.multiply(some)
        teacher.multiply(some)
        for start in range(some.start, some.stop, block):
            part = slice(start, min(start + block, some.stop))
            logits, slopes = student.logits(part)
            losses.fill(part, row_losses(logits, teacher.logits(part)[0], task.targets[part]))
            if with_gradient:
                if slopes is not None:
                    logits.mul_(slopes)
                gradients.add_to_bias(logits)
                student.replace(part, logits)
        if with_gradient:
            gradients.add(some, student.products)
    return losses
