"""Which parts of a model stay: those that do most, at a size that is given or found for a number of parameters."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from left_trainer.compression.architecture import Stack, architecture_of
from left_trainer.compression.importance import Scores
from left_trainer.compression.removal import Kept
from left_trainer.compression.sizes import MULTIPLE, WIDE, Size, parameters_at, possible_heads, size_of

SLICES = 16  # into which the width of the feed-forward modules is cut where nothing else says how finely


def best_parts(config: PreTrainedConfig, size: Size, layers: Scores, parts: Scores) -> Kept:
    """The most important parts of a model, of each kind as many as `size` has.

    Args:
        config: Of the model as it is.
        size: That it is to have.
        layers: Importances of its blocks.
        parts: Importances of its neurons and heads.
    """
    architecture, now = architecture_of(config), size_of(config)
    kept_layers = {name: tuple(_best(scores, size.layers[name])) for name, scores in layers.layers.items()}
    neurons: dict[str, torch.Tensor] = {}
    heads: dict[str, torch.Tensor] = {}
    blocks = [block for block in architecture.blocks(config) if block.index in kept_layers[block.stack]]
    for block in blocks:
        if size.ffn[block.stack] < now.ffn[block.stack]:
            neurons[block.feed_forward] = torch.tensor(_best(parts.neurons[block.feed_forward], size.ffn[block.stack]))
    staying = {name for block in blocks for name in block.attentions}
    for names in architecture.equal_heads(config) if size.heads != now.heads else ():
        counted = [parts.heads[name] for name in names if name in staying]
        if counted and size.heads is not None:
            best = torch.tensor(_best(torch.stack(counted).sum(0), size.heads))
            heads |= {name: best for name in names if name in staying}
    return Kept(kept_layers, neurons, heads)


def _best(scores: torch.Tensor, number: int) -> list[int]:
    """Indices of the `number` highest scores, in order; of equal ones the first."""
    ranked = sorted(range(len(scores)), key=lambda index: (-float(scores[index]), index))
    return sorted(ranked[:number])


def size_between(config: PreTrainedConfig, first: Size, last: Size, progress: float) -> Size:
    """The size of a model with `config` when `progress`, from 0 to 1, of what lies between two sizes is done."""

    def between(start: int, end: int) -> int:
        return start - round((start - end) * progress)

    heads = None
    if first.heads is not None and last.heads is not None:
        least = between(first.heads, last.heads)
        heads = next(number for number in possible_heads(config) if number >= least)
    layers = {name: between(start, last.layers[name]) for name, start in first.layers.items()}
    return Size(
        layers=layers,
        ffn={name: _rounded(between(start, last.ffn[name]), last.ffn[name]) for name, start in first.ffn.items()},
        heads=heads,
    )


def _rounded(width: int, at_least: int) -> int:
    return max(at_least, width - width % MULTIPLE) if width >= WIDE else width


def smaller_of(first: Size, second: Size) -> Size:
    """The lesser of each dimension."""
    return _each(min, first, second)


def _larger_of(first: Size, second: Size) -> Size:
    return _each(max, first, second)


def _each(choose: Callable[[int, int], int], first: Size, second: Size) -> Size:
    return Size(
        layers={name: choose(number, second.layers[name]) for name, number in first.layers.items()},
        ffn={name: choose(width, second.ffn[name]) for name, width in first.ffn.items()},
        heads=None if first.heads is None or second.heads is None else choose(first.heads, second.heads),
    )


# A size for a number of parameters


def sizes_down_to(config: PreTrainedConfig, scores: Scores, parameters: int) -> list[tuple[Size, int]]:
    """Ever smaller sizes with their numbers of parameters, the last of which has at most `parameters`.

    In each step goes the unit that takes the least importance with it for each parameter: a block of a stack, a slice
    of the feed-forward width of all blocks that share it, or a head of every attention. A unit that leaves fewer than
    `parameters` goes only where all do; then it is the smallest, and the feed-forward modules of the last size are as
    wide as they may be. A block, a slice and a head always stay.

    Args:
        config: Of the model as it is.
        scores: Its importances, all of one kind that knows blocks, neurons and heads.
        parameters: Apart from embeddings and head, as `counted_parameters` counts them.
    """
    count, losses = _counter(config), _Losses(config, scores)
    size = size_of(config)
    now, path = count(size), []
    while now > parameters:
        steps = [_Step(unit, now - count(unit), losses.of(size, unit)) for unit in _smaller_units(config, size)]
        if not steps:
            break
        fitting = [step for step in steps if now - step.parameters >= parameters]
        chosen = min(fitting, key=_Step.cost) if fitting else min(steps, key=lambda step: step.parameters)
        size, now = chosen.size, now - chosen.parameters
        path.append(size)
    last = _widened(config, size, parameters, count)
    path = [_larger_of(each, last) for each in path]  # nothing goes that the last size has
    return [(each, count(each)) for each in path]


def _widened(config: PreTrainedConfig, size: Size, parameters: int, count: Callable[[Size], int]) -> Size:
    """`size` with the widest feed-forward modules that `parameters` allow."""
    whole = size_of(config)
    for stacks in _stacks_by_width(config):
        names = [stack.name for stack in stacks]
        multiple = MULTIPLE if whole.ffn[names[0]] >= WIDE else 1
        widths = [size.ffn[names[0]], *range(size.ffn[names[0]] + multiple, whole.ffn[names[0]] + 1, multiple)]

        def with_width(width: int, size: Size = size, names: Sequence[str] = names) -> Size:
            return dataclasses.replace(size, ffn={**size.ffn, **dict.fromkeys(names, width)})

        number = bisect.bisect_right(widths, parameters, key=lambda width: count(with_width(width)))
        size = with_width(widths[max(0, number - 1)])
    return size


@dataclass(frozen=True)
class _Step:
    size: Size
    parameters: int
    importance: float

    def cost(self) -> float:
        """Importance that goes with each parameter."""
        return self.importance / self.parameters


def _smaller_units(config: PreTrainedConfig, size: Size) -> list[Size]:
    """The sizes that are one unit less than `size`."""
    found = [
        dataclasses.replace(size, layers={**size.layers, name: number - 1})
        for name, number in size.layers.items()
        if number > 1
    ]
    original = size_of(config)
    for stacks in _stacks_by_width(config):
        names = [stack.name for stack in stacks]
        width, whole = size.ffn[names[0]], original.ffn[names[0]]
        slice_width = max(1, whole // SLICES)
        if whole >= WIDE:
            slice_width = max(MULTIPLE, slice_width - slice_width % MULTIPLE)
        if width > slice_width:
            found.append(dataclasses.replace(size, ffn={**size.ffn, **dict.fromkeys(names, width - slice_width)}))
    fewer = [number for number in possible_heads(config) if number < (size.heads or 0)]
    return [*found, *(dataclasses.replace(size, heads=number) for number in fewer[-1:])]


def _stacks_by_width(config: PreTrainedConfig) -> list[list[Stack]]:
    """Stacks that share one field for the width of their feed-forward modules, as T5's do."""
    found: dict[str, list[Stack]] = {}
    for stack in architecture_of(config).stacks:
        found.setdefault(stack.ffn_field, []).append(stack)
    return list(found.values())


class _Losses:
    """The importance that a unit takes with it."""

    def __init__(self, config: PreTrainedConfig, scores: Scores) -> None:
        self.architecture, self.config = architecture_of(config), config
        self.layers = {name: values.sort().values.tolist() for name, values in scores.layers.items()}
        # From the least important on; running sums, so that a slice is a difference.
        self.ranked = {
            name: sorted(range(len(values)), key=lambda index: -float(values[index]))
            for name, values in scores.layers.items()
        }
        self.neurons = {name: values.sort().values.cumsum(0) for name, values in scores.neurons.items()}
        self.heads = {name: values.sort().values.cumsum(0) for name, values in scores.heads.items()}

    def of(self, before: Size, after: Size) -> float:
        """What is lost between two sizes that are one unit apart."""
        whole, lost = size_of(self.config), 0.0
        for name, number in before.layers.items():
            gone = whole.layers[name] - number
            lost += sum(self.layers[name][gone : whole.layers[name] - after.layers[name]])
        for block in self.architecture.blocks(self.config):
            if block.index not in self.ranked[block.stack][: before.layers[block.stack]]:
                continue
            sums, width = self.neurons[block.feed_forward], whole.ffn[block.stack]
            lost += _between(sums, width - before.ffn[block.stack], width - after.ffn[block.stack])
            if whole.heads is not None:
                first, last = (whole.heads - (size.heads or 0) for size in (before, after))
                lost += sum(_between(self.heads[name], first, last) for name in block.attentions)
        return lost


def _between(sums: torch.Tensor, first: int, last: int) -> float:
    """The sum of entries `first` to `last`, of running sums."""
    return float(sums[last - 1] if last else 0) - float(sums[first - 1] if first else 0)


def _counter(config: PreTrainedConfig) -> Callable[[Size], int]:
    """As `parameters_at`, which makes a skeleton each time. Here a few small ones do.

    A block has a number of parameters that grows evenly with its width and its heads, and the blocks of a stack are
    alike; what remains grows evenly with the heads.
    """
    whole = size_of(config)
    least = Size(dict.fromkeys(whole.layers, 1), dict.fromkeys(whole.ffn, 1), None if whole.heads is None else 1)
    widths = [[stack.name for stack in stacks] for stacks in _stacks_by_width(config)]

    def line(layers: Mapping[str, int]) -> Callable[[Size], int]:
        first = dataclasses.replace(least, layers=layers)
        base = parameters_at(config, first)

        def slope(end: Size, number: int) -> int:
            return (parameters_at(config, end) - base) // (number - 1) if number > 1 else 0

        slopes = [
            slope(
                dataclasses.replace(first, ffn={**first.ffn, **{name: whole.ffn[name] for name in names}}),
                whole.ffn[names[0]],
            )
            for names in widths
        ]
        of_heads = slope(dataclasses.replace(first, heads=whole.heads), whole.heads or 1)

        def value(size: Size) -> int:
            of_widths = sum(each * (size.ffn[names[0]] - 1) for each, names in zip(slopes, widths, strict=True))
            return base + of_widths + of_heads * ((size.heads or 1) - 1)

        return value

    one = line(least.layers)
    more = {name: line({**least.layers, name: 2}) for name, number in whole.layers.items() if number > 1}
    return lambda size: one(size) + sum((size.layers[name] - 1) * (two(size) - one(size)) for name, two in more.items())


# One removal after another


def composed(first: Kept | None, second: Kept, config: PreTrainedConfig) -> Kept:
    """What two removals, one after the other, leave of the model before the first.

    Args:
        first: Names and indices of the model as it was; `None` where nothing had been removed.
        second: Those of the model after the first.
        config: Of the model as it was.
    """
    if first is None:
        return second
    architecture = architecture_of(config)
    layers = {name: tuple(first.layers[name][index] for index in kept) for name, kept in second.layers.items()}
    neurons: dict[str, torch.Tensor] = {}
    heads: dict[str, torch.Tensor] = {}
    for block in architecture.blocks(config):
        if block.index not in layers[block.stack]:
            continue
        place = first.layers[block.stack].index(block.index)
        stack = architecture.stack(block.stack)
        prefix, later = f"{stack.blocks}.{block.index}", f"{stack.blocks}.{place}"
        for name in (block.feed_forward,):
            _compose(neurons, name, first.neurons, second.neurons, later + name.removeprefix(prefix))
        for name in block.attentions:
            _compose(heads, name, first.heads, second.heads, later + name.removeprefix(prefix))
    return Kept(layers, neurons, heads)


def _compose(
    into: dict[str, torch.Tensor],
    name: str,
    first: Mapping[str, torch.Tensor],
    second: Mapping[str, torch.Tensor],
    later_name: str,
) -> None:
    old, new = first.get(name), second.get(later_name)
    if old is not None or new is not None:
        into[name] = new if old is None else old if new is None else old[new]  # type: ignore[assignment]


def relative(kept: Kept, to: Kept, config: PreTrainedConfig) -> Kept:
    """The removal that leaves `kept` of a model of which `to` is left; both name parts of the model with `config`.

    Raises:
        ValueError: `to` lacks a part of `kept`.
    """
    architecture = architecture_of(config)
    layers = {name: _places(indices, to.layers[name]) for name, indices in kept.layers.items()}
    neurons: dict[str, torch.Tensor] = {}
    heads: dict[str, torch.Tensor] = {}
    for block in architecture.blocks(config):
        if block.index not in kept.layers[block.stack]:
            continue
        stack = architecture.stack(block.stack)
        place = to.layers[block.stack].index(block.index)
        prefix, later = f"{stack.blocks}.{block.index}", f"{stack.blocks}.{place}"
        for name, old, new, found in (
            (block.feed_forward, to.neurons, kept.neurons, neurons),
            *((name, to.heads, kept.heads, heads) for name in block.attentions),
        ):
            if name in old and name not in new:
                raise ValueError(f"{name} has lost parts that are to stay.")
            if name in new:
                indices = new[name].tolist()
                places = _places(indices, old[name].tolist()) if name in old else tuple(indices)
                found[later + name.removeprefix(prefix)] = torch.tensor(places)
    return Kept(layers, neurons, heads)


def _places(indices: Sequence[int], among: Sequence[int]) -> tuple[int, ...]:
    where = {index: place for place, index in enumerate(among)}
    if not where.keys() >= set(indices):
        raise ValueError("Parts that are to stay are gone.")
    return tuple(where[index] for index in indices)
