"""What a model computes from token ids, as something that it takes as `inputs_embeds`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from left_trainer.models.wrapping import evaluating

# Two different tokens, in an order that positions do not have.
PROBE = (3, 1)
MULTIPLICATIONS = frozenset(("mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"))


class InputEmbeddings(nn.Module):
    r"""What the encoder, or a decoder-only model, computes from token ids before it adds positions: $E(x) = s\,T_x$.

    `model(inputs_embeds=E(ids))` computes what `model(input_ids=ids)` does. The table $T$ is the one that reads the
    ids, which is not the decoder's where each has its own. $s$ is what the model multiplies rows of the table by and
    `inputs_embeds` not, such as $\sqrt{d}$ in Marian and Pegasus.

    Args:
        table: Embeds ids of `(batch, sequence)`.
        factors: Their product is $s$.
    """

    def __init__(self, table: nn.Module, factors: tuple[Any, ...] = ()) -> None:
        super().__init__()
        self.table, self.factors = table, factors

    @property
    def weight(self) -> torch.Tensor:
        """The table, without the factors, `(vocabulary, width)`."""
        return self.table.weight  # type: ignore[return-value]

    @property
    def num_embeddings(self) -> int:
        """Rows of the table."""
        return int(self.weight.shape[0])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of `input_ids`, `(..., width)`."""
        embeddings = self.table(input_ids)
        for factor in self.factors:
            embeddings = embeddings * factor
        return embeddings


def input_embeddings(model: PreTrainedModel) -> InputEmbeddings:
    """The `InputEmbeddings` of `model`, found by watching what it does with two ids and with their embeddings.

    Args:
        model: Without an adapter; may be on the meta device.

    Raises:
        ValueError: The model takes no embeddings in place of ids.
    """
    stack: Any = model.get_encoder() if model.config.is_encoder_decoder else model
    ids = torch.tensor([PROBE], device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):  # dropout may draw
        of_ids = _Factors()
        hooks = [module.register_forward_hook(partial(of_ids.start_at_table, ids)) for module in stack.modules()]
        try:
            with of_ids:
                stack(input_ids=ids)
        finally:
            for hook in hooks:
                hook.remove()
        of_embeddings = _Factors(of_ids.rows)
        try:
            with of_embeddings:
                stack(input_ids=None, inputs_embeds=of_ids.rows)
        except (TypeError, NotImplementedError) as error:
            raise ValueError(
                f"{type(model).__name__} takes no embeddings in place of token ids, so virtual tokens cannot stand "
                "beside its input. Choose p_tuning_v2, or a method of another family; `left-trainer methods` lists "
                "them."
            ) from error
    return InputEmbeddings(of_ids.table, tuple(of_ids.found[: len(of_ids.found) - len(of_embeddings.found)]))


def has_absolute_positions(model: PreTrainedModel) -> bool:
    """Whether the encoder of `model` adds something to embeddings that depends on where they stand.

    Without, two equal tokens alone are equal in its output too, whatever bias attention has for distances. A model on
    the meta device has no values to tell by.
    """
    if model.device.type == "meta":
        return False
    encoder: Any = model.get_encoder()
    ids = torch.tensor([PROBE[:1] * 2], device=model.device)
    with torch.no_grad(), evaluating(encoder):
        first, second = encoder(input_ids=ids).last_hidden_state[0, :2].float()
    return not torch.allclose(first, second, rtol=1e-2, atol=1e-3 * float(first.abs().max()))


class _Factors(TorchFunctionMode):
    """Inside, collects the numbers that embeddings are multiplied by, one after the other.

    Args:
        rows: The embeddings, `(batch, sequence, width)`; without any, those of the first module that reads ids.
    """

    table: nn.Module

    def __init__(self, rows: torch.Tensor | None = None) -> None:
        super().__init__()
        self.rows = self.product = rows
        self.found: list[Any] = []

    def start_at_table(self, ids: torch.Tensor, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward hook: `module` is the table if it is the first to make embeddings of `ids`."""
        if self.rows is not None or not args or not all(isinstance(value, torch.Tensor) for value in (args[0], output)):
            return
        is_of_ids = args[0].shape == ids.shape and (ids.is_meta or torch.equal(args[0], ids))
        if is_of_ids and output.shape[:-1] == ids.shape:
            self.table, self.rows, self.product = module, output, output

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.product is not None and getattr(func, "__name__", "") in MULTIPLICATIONS:
            others = [factor for factor in args if factor is not self.product]
            if len(others) == 1 and (not isinstance(others[0], torch.Tensor) or others[0].numel() == 1):
                self.found.append(others[0])
                self.product = result
        return result
