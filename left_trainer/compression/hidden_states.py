r"""The difference of a student's hidden states from its teacher's.

With the hidden states $h_l$ of the student's layer $l$, those $g_{m(l)}$ of the teacher's layer that it is mapped to,
and a learned projection $P_l$ where the two have different widths, a token has the loss

$$\frac{1}{L} \sum_l \frac{1}{d} \lVert P_l h_l - g_{m(l)} \rVert^2$$

(Romero et al., 2015, https://arxiv.org/abs/1412.6550; Jiao et al., 2020, https://arxiv.org/abs/1909.10351).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from left_trainer.token_mean import IGNORE_INDEX

Pairs = Sequence[Sequence[int]]
States = Mapping[str, Sequence[torch.Tensor]]


def layer_pairs(layer_map: str | Pairs, n_student: int, n_teacher: int, stack: str) -> list[tuple[int, int]]:
    """Pairs of a student's layer and the teacher's that it is compared with, counted from 1.

    Args:
        layer_map: `uniform`, `last` or the pairs themselves.
        n_student: Layers of the student's stack.
        n_teacher: Layers of the teacher's.
        stack: `encoder` or `decoder`, for messages.

    Raises:
        ValueError: A layer that one of them does not have.
    """
    if layer_map == "uniform":
        return [(layer, max(1, round(layer * n_teacher / n_student))) for layer in range(1, n_student + 1)]
    if layer_map == "last":
        first = max(0, n_student - n_teacher)
        return [(layer, layer + n_teacher - n_student) for layer in range(first + 1, n_student + 1)]
    pairs = [(int(pair[0]), int(pair[1])) for pair in layer_map]
    for student, teacher in pairs:
        if student > n_student or teacher > n_teacher:
            raise ValueError(
                f"distillation_kwargs has layer_map={list(layer_map)!r}, and the {stack} of the student has "
                f"{n_student} layers, that of the teacher {n_teacher}. Name layers that both have, or use "
                "layer_map='uniform'."
            )
    return pairs


class HiddenStateLoss(nn.Module):
    """Compares hidden states. Its projections are trained with the student, and are no part of it.

    Args:
        layer_map: As in `layer_pairs`.
        widths: Of student and teacher.
        layers: Number of layers of student and teacher, by stack.
    """

    def __init__(self, layer_map: str | Pairs, widths: tuple[int, int], layers: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        self.layer_map = layer_map
        self.projections = nn.ModuleDict()
        if widths[0] != widths[1]:
            for stack, numbers in layers.items():
                for student, _ in layer_pairs(layer_map, *numbers, stack):
                    self.projections[f"{stack}_{student}"] = nn.Linear(*widths, bias=False)

    def forward(
        self, student: States, teacher: States, labels: torch.Tensor, attention_mask: torch.Tensor | None, shifted: bool
    ) -> torch.Tensor:
        """Loss summed over the target tokens, a scalar.

        A decoder's states count where a token is predicted from them. Those of an encoder count as their mean over the
        row's source tokens, once for each of its target tokens, so that the split into micro-batches changes nothing.

        Args:
            student: Hidden states by stack, after the embeddings and after each layer, `(batch, length, width)`.
            teacher: The same.
            labels: `(batch, target)`.
            attention_mask: `(batch, source)`; `None` where no token is padding.
            shifted: Whether a label stands one position behind the state that predicts it.
        """
        is_target = labels.ne(IGNORE_INDEX)
        if shifted:
            is_target = torch.nn.functional.pad(is_target[:, 1:], (0, 1))
        targets_of_row = is_target.sum(1)
        total = labels.new_zeros((), dtype=torch.float32)
        n_pairs = 0
        for stack, states in student.items():
            for at, to in layer_pairs(self.layer_map, len(states) - 1, len(teacher[stack]) - 1, stack):
                n_pairs += 1
                own, name = states[at], f"{stack}_{at}"
                if name in self.projections:
                    own = self.projections[name](own.float())
                difference = (own.float() - teacher[stack][to].float()).pow(2).mean(-1)
                if stack == "decoder":
                    total = total + difference[is_target].sum()
                else:
                    mask = torch.ones_like(difference) if attention_mask is None else attention_mask.float()
                    row_means = (difference * mask).sum(1) / mask.sum(1).clamp(min=1)
                    total = total + (row_means * targets_of_row).sum()
        return total / n_pairs
