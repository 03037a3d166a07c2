r"""How much each block, feed-forward neuron and attention head of a model does on some batches.

With a gate $\gamma_u = 1$ that multiplies what a unit $u$ adds, `first_order` is the change of the loss to the first
order when the unit goes, summed over the tokens $t$ of the batches:

$$I(u) = \sum_t \left| \frac{\partial L}{\partial \gamma_{u, t}} \right| = \sum_t |g_t^\top a_t|$$

$a$ is the activation of a neuron, the output of a head, or what a block adds to its input, and $g$ the gradient of the
loss with respect to it (Michel et al., 2019, https://arxiv.org/abs/1905.10650; Molchanov et al., 2019,
https://arxiv.org/abs/1906.10771). So units of all kinds have one measure. `block_influence` of a block is
$1 - \cos(x, y)$ between its input and its output, the mean over tokens that are no padding (Men et al., 2024,
https://arxiv.org/abs/2403.03853). `magnitude` is the norm of a unit's weights, and `random` the control.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import distributed, nn
from torch.nn import functional
from transformers import PreTrainedModel

from left_trainer.compression.architecture import Architecture, Block, architecture_of
from left_trainer.compression.sizes import size_of
from left_trainer.models import without_adapter
from left_trainer.models.wrapping import evaluating
from left_trainer.token_mean import IGNORE_INDEX

BLOCK_INFLUENCE, FIRST_ORDER, MAGNITUDE, RANDOM = "block_influence", "first_order", "magnitude", "random"
FROM_BATCHES = (BLOCK_INFLUENCE, FIRST_ORDER)
Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Scores:
    """Importances of one kind, in float64 on the CPU.

    Args:
        layers: `(blocks,)` by stack.
        neurons: `(width,)` by the name of a feed-forward module; none of `block_influence`.
        heads: `(heads,)` by the name of an attention, as `Size.heads` counts them; none of `block_influence`, nor where
            the model has no heads that can go.
    """

    layers: Mapping[str, torch.Tensor]
    neurons: Mapping[str, torch.Tensor]
    heads: Mapping[str, torch.Tensor]


def importances(
    model: PreTrainedModel | PeftModel,
    kinds: Collection[str],
    batches: Iterable[Batch],
    loss: Callable[[nn.Module, dict[str, Any]], torch.Tensor],
    seed: int,
) -> dict[str, Scores]:
    """The importances of the parts of `model`, by kind; the same in all processes.

    The model draws no dropout meanwhile. Its gradients stay what they are.

    Args:
        model: Without the wrappers for several devices. Its weights may be frozen.
        kinds: `block_influence`, `first_order`, `magnitude` or `random`.
        batches: Of this process; not read for the last two kinds.
        loss: Of the model and a batch, summed over the target tokens, a scalar.
        seed: Of `random`.
    """
    parts = _Parts(model)
    found = {}
    if MAGNITUDE in kinds:
        found[MAGNITUDE] = _magnitudes(parts)
    if RANDOM in kinds:
        found[RANDOM] = _random(parts, seed)
    asked = [kind for kind in FROM_BATCHES if kind in kinds]
    if asked:
        sums = _Sums(parts, with_gradients=FIRST_ORDER in asked)
        with evaluating(model), torch.set_grad_enabled(FIRST_ORDER in asked), sums.watching():
            for batch in batches:
                sums.add(loss(model, dict(batch)), batch)
        scores = sums.scores()
        found |= {kind: scores[kind] for kind in asked}
    return found


class _Parts:
    """The modules of a model that its parts are seen at, by name."""

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self.base = without_adapter(model)
        self.config = self.base.config
        self.architecture: Architecture = architecture_of(self.config)
        self.size = size_of(self.config)
        self.blocks: list[Block] = list(self.architecture.blocks(self.config))

    def module(self, name: str) -> nn.Module:
        """The module called `name` in the base model, with what an adapter has put around it."""
        module: nn.Module = self.base
        for part in name.split("."):
            while part not in module._modules and "base_layer" in module._modules:
                module = module.base_layer  # type: ignore[assignment]
            module = module._modules[part]  # type: ignore[assignment]
        return module

    def neurons_of(self, block: Block) -> nn.Module:
        """The linear layer that reads the neurons of `block`."""
        return self.module(f"{block.feed_forward}.{self.architecture.feed_forward_output}")

    def heads_of(self, attention: str) -> nn.Module:
        """The linear layer that reads the heads of an attention."""
        return self.module(f"{attention}.{self.architecture.attention_output}")

    @property
    def attentions(self) -> list[str]:
        """Those whose heads can go."""
        return [name for block in self.blocks for name in block.attentions] if self.size.heads is not None else []


LAYER, NEURONS, HEADS = "layer", "neurons", "heads"  # a block may be its own feed-forward module


class _Sums:
    """Sums over tokens of what `first_order` and `block_influence` are made of, collected by hooks."""

    def __init__(self, parts: _Parts, with_gradients: bool) -> None:
        self.parts, self.with_gradients = parts, with_gradients
        self.layers = {block.name: _zeros(1) for block in parts.blocks}
        self.neurons = {block.feed_forward: _zeros(parts.size.ffn[block.stack]) for block in parts.blocks}
        self.heads = {name: _zeros(parts.size.heads or 0) for name in parts.attentions}
        self.similarities = {block.name: _zeros(2) for block in parts.blocks}  # sum of cosines, tokens
        self._seen: dict[tuple[str, str], torch.Tensor] = {}  # activations of a forward pass
        self._before: dict[str, torch.Tensor] = {}  # the inputs of the blocks that have run

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, a forward pass leaves the activations of every part."""
        with contextlib.ExitStack() as stack:
            for block in self.parts.blocks:
                module = self.parts.module(block.name)
                stack.callback(module.register_forward_pre_hook(self._enter(block.name), with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(self._leave(block.name)).remove)
                if self.with_gradients:
                    keep = self._keep((NEURONS, block.feed_forward))
                    stack.callback(self.parts.neurons_of(block).register_forward_pre_hook(keep).remove)
            for name in self.heads if self.with_gradients else ():
                keep = self._keep((HEADS, name))
                stack.callback(self.parts.heads_of(name).register_forward_pre_hook(keep).remove)
            yield

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if self.with_gradients and not hidden.requires_grad:
                hidden.requires_grad_()  # of a frozen model, the first activations depend on no trained weight
            self._before[name] = hidden.detach()

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._seen[LAYER, name] = output[0] if isinstance(output, tuple) else output

        return hook

    def _keep(self, key: tuple[str, str]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._seen[key] = args[0]

        return hook

    def add(self, loss: torch.Tensor, batch: Batch) -> None:
        """Add a batch whose forward pass was watched."""
        seen, self._seen = self._seen, {}
        for block in self.parts.blocks:
            self._add_similarity(block, seen[LAYER, block.name], batch)
        if not self.with_gradients:
            return
        gradients = torch.autograd.grad(loss, list(seen.values()), allow_unused=True)
        with torch.no_grad():
            for (kind, name), gradient in zip(seen, gradients, strict=True):
                if gradient is not None:
                    self._add_gradient(kind, name, gradient.float(), seen[kind, name].float())

    @torch.no_grad()
    def _add_similarity(self, block: Block, output: torch.Tensor, batch: Batch) -> None:
        cosines = functional.cosine_similarity(self._before[block.name].float(), output.float(), dim=-1)
        mask = _own_tokens(cosines, block.stack, bool(self.parts.config.is_encoder_decoder), batch)
        self.similarities[block.name] += torch.stack(((cosines * mask).sum(), mask.sum())).double().cpu()

    def _add_gradient(self, kind: str, name: str, gradient: torch.Tensor, value: torch.Tensor) -> None:
        if kind == LAYER:
            gates = (gradient * (value - self._before[name].float())).sum(-1, keepdim=True)
        elif kind == HEADS:
            gates = (gradient * value).unflatten(-1, (len(self.heads[name]), -1)).sum(-1)
        else:
            gates = gradient * value
        sums = {LAYER: self.layers, NEURONS: self.neurons, HEADS: self.heads}[kind]
        sums[name] += gates.abs().flatten(0, -2).sum(0).double().cpu()

    def scores(self) -> dict[str, Scores]:
        """Of all processes."""
        for sums in (self.layers, self.neurons, self.heads, self.similarities):
            _add_of_all_processes(sums, next(self.parts.base.parameters()).device)
        influences = {name: 1 - total / count.clamp(min=1) for name, (total, count) in self.similarities.items()}
        return {
            BLOCK_INFLUENCE: Scores(_by_stack(self.parts, influences), {}, {}),
            FIRST_ORDER: Scores(_by_stack(self.parts, self.layers), self.neurons, self.heads),
        }


def _zeros(number: int) -> torch.Tensor:
    return torch.zeros(number, dtype=torch.float64)


def _own_tokens(cosines: torch.Tensor, stack: str, has_encoder: bool, batch: Batch) -> torch.Tensor:
    """1 for tokens that are no padding, `(batch, sequence)`; virtual tokens before them count.

    A row of a decoder beside an encoder has as many tokens as its labels.
    """
    given = batch.get("attention_mask")
    if has_encoder and stack == "decoder":
        given = batch["labels"].ne(IGNORE_INDEX) if "labels" in batch else None
    mask = torch.ones_like(cosines)
    if given is not None and given.shape[0] == mask.shape[0] and given.dim() == 2:
        length = min(given.shape[1], mask.shape[1])
        mask[:, mask.shape[1] - length :] = given[:, given.shape[1] - length :].to(mask)
    return mask


def _by_stack(parts: _Parts, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`(blocks,)` by stack, of values by the names of blocks."""
    return {
        stack.name: torch.stack([values[block.name].reshape(()) for block in parts.blocks if block.stack == stack.name])
        for stack in parts.architecture.stacks
    }


def _add_of_all_processes(sums: dict[str, torch.Tensor], device: torch.device) -> None:
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return
    names = list(sums)
    if not names:
        return
    joined = torch.cat([sums[name] for name in names]).to(device)
    distributed.all_reduce(joined)
    for name, value in zip(names, joined.cpu().split([len(sums[name]) for name in names]), strict=True):
        sums[name] = value


@torch.no_grad()
def _magnitudes(parts: _Parts) -> Scores:
    """Norms of the base weights: a block is all of its weights, a neuron or head what is read from it."""
    layers = {
        block.name: torch.stack([weight.double().square().sum() for weight in parts.module(block.name).parameters()])
        .sum()
        .sqrt()
        .cpu()
        for block in parts.blocks
    }
    neurons = {block.feed_forward: _column_norms(parts.neurons_of(block)) for block in parts.blocks}
    heads = {
        name: _column_norms(parts.heads_of(name)).square().unflatten(0, (parts.size.heads or 1, -1)).sum(-1).sqrt()
        for name in parts.attentions
    }
    return Scores(_by_stack(parts, layers), neurons, heads)


def _column_norms(linear: nn.Module) -> torch.Tensor:
    """`(in,)`: the norm of the weights that read each input."""
    while "base_layer" in linear._modules:
        linear = linear.base_layer  # type: ignore[assignment]
    weight: Any = linear.weight
    return weight.double().norm(dim=0 if isinstance(linear, nn.Linear) else 1).cpu()  # type: ignore[no-any-return]


def _random(parts: _Parts, seed: int) -> Scores:
    generator = torch.Generator().manual_seed(seed)

    def drawn(number: int) -> torch.Tensor:
        return torch.rand(number, generator=generator, dtype=torch.float64)

    return Scores(
        {name: drawn(number) for name, number in parts.size.layers.items()},
        {block.feed_forward: drawn(parts.size.ffn[block.stack]) for block in parts.blocks},
        {name: drawn(parts.size.heads or 0) for name in parts.attentions},
    )
