"""Taking blocks, neurons and heads out of a model for good.

What changes is read off two skeletons on the meta device, of the model as it is and as it shall be: a tensor whose
shape differs between them is cut along that axis, and an attribute that differs (`num_heads`, `in_features`,
`layer_idx`) takes the new value. So nothing here knows the classes of a model's or an adapter's layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from left_trainer.compression.architecture import architecture_of
from left_trainer.compression.cuts import Cuts, cuts_of
from left_trainer.compression.optimizer_state import check_optimizer, cut_state, forget
from left_trainer.compression.skeletons import skeleton_like
from left_trainer.models import without_adapter


@dataclass(frozen=True)
class Kept:
    """What stays of a model. Names are full module names in the base model as it is before, without an adapter's.

    Args:
        layers: Indices of the blocks that stay, in order, by stack.
        neurons: For a feed-forward module (`Block.feed_forward`), the indices of the neurons that stay, in order, as a
            vector of integers. All stay where a module has no entry; entries of blocks that go are not looked at.
        heads: For an attention module (`Block.attentions`), the indices of the heads that stay, counted as `Size.heads`
            counts them.
    """

    layers: Mapping[str, tuple[int, ...]]
    neurons: Mapping[str, torch.Tensor] = field(default_factory=dict)
    heads: Mapping[str, torch.Tensor] = field(default_factory=dict)


def kept_whole(model: PreTrainedModel | PeftModel) -> Kept:
    """All of `model`: what `dataclasses.replace` makes another choice of."""
    config = without_adapter(model).config
    stacks = architecture_of(config).stacks
    return Kept(layers={stack.name: tuple(range(getattr(config, stack.layers_field))) for stack in stacks})


def why_not_shrinkable(model: PreTrainedModel | PeftModel) -> str | None:
    """Why parts cannot be taken out of `model`, in a sentence; `None` where they can."""
    try:
        architecture_of(without_adapter(model).config)
    except ValueError as error:
        return str(error)
    return None


def remove_parts(
    model: PreTrainedModel | PeftModel, kept: Kept, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Take out of `model`, in place, all that `kept` does not name.

    Parameters stay the objects they are, so that an optimizer goes on with them: its state is cut as they are, and what
    is gone leaves its groups. Schedulers that hold it stay valid. Wrappers that have recorded shapes, such as
    `DistributedDataParallel`, have to be made anew.

    Args:
        model: Without or with an adapter; the tensors of adapters are cut along with the layers that they belong to.
        kept: What stays.
        optimizer: Whose state goes on.

    Raises:
        ValueError: `kept` does not fit the model, leaves widths that differ where the class has one for all, or the
            model, its adapter or the optimizer holds what cannot be cut. Nothing has been changed then.
    """
    reason = why_not_shrinkable(model)
    if reason:
        raise ValueError(reason)
    base = without_adapter(model)
    cuts = cuts_of(base.config, kept.layers, kept.neurons, kept.heads)
    before, after = skeleton_like(model, base.config), skeleton_like(model, cuts.config)
    axes = _axes(model, before, after, cuts)
    if optimizer is not None:
        check_optimizer(optimizer, {parameter for parameter in axes if isinstance(parameter, nn.Parameter)})
    attributes = list(_changed_attributes(model, before, after, cuts))
    gone = {parameter for name, parameter in model.named_parameters() if cuts.renamed(name) is None}
    _move_shared(base, cuts)
    _delete_blocks(base, cuts)
    for tensor, (axis, index) in axes.items():
        _cut(tensor, axis, index)
        if optimizer is not None and tensor in optimizer.state:
            cut_state(optimizer.state[tensor], tensor, axis, index)
    for owner, name, value in attributes:
        setattr(owner, name, value)
    if optimizer is not None:
        forget(optimizer, gone)


def _axes(
    model: nn.Module, before: nn.Module, after: nn.Module, cuts: Cuts
) -> dict[torch.Tensor, tuple[int, torch.Tensor]]:
    """Each tensor of `model` that is cut, with the axis and the indices that stay."""
    shapes = [
        {name: tensor.shape for name, tensor in _named_tensors(skeleton, remove_duplicate=False)}
        for skeleton in (before, after)
    ]
    axes = {}
    for name, tensor in _named_tensors(model):
        new_name = cuts.renamed(name)
        old, new = shapes[0].get(name), shapes[1].get(new_name) if new_name is not None else None
        if old is None or new is None or old == new:
            continue
        index = cuts.index(name)
        differing = [axis for axis, sizes in enumerate(zip(old, new, strict=True)) if sizes[0] != sizes[1]]
        if index is None or len(differing) != 1 or (old[differing[0]], new[differing[0]]) != index.sizes:
            raise ValueError(
                f"shrink_to cannot cut {name!r} from {tuple(old)} to {tuple(new)}: its entries do not belong to "
                "single neurons or heads."
            )
        axes[tensor] = (differing[0], index.kept)
    return axes


def _named_tensors(module: nn.Module, **options: Any) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(**options), *module.named_buffers(**options)]


def _changed_attributes(
    model: nn.Module, before: nn.Module, after: nn.Module, cuts: Cuts
) -> list[tuple[Any, str, Any]]:
    """Plain attributes of modules and configs that differ between the skeletons, with their new values."""
    olds, news = (dict(skeleton.named_modules(remove_duplicate=False)) for skeleton in (before, after))
    changed = []
    for name, module in model.named_modules():
        new_name = cuts.renamed(name)
        old, new = olds.get(name), news.get(new_name) if new_name is not None else None
        if old is None or new is None:
            continue
        changed += [(module, *item) for item in _differences(vars(old), vars(new))]
        if hasattr(new, "config") and "config" in vars(module):
            changed += [(module.config, *item) for item in _differences(vars(old.config), vars(new.config))]
    return changed


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [
        (name, value)
        for name, value in new.items()
        if isinstance(value, (int, float, str, list, tuple)) and name in old and old[name] != value
    ]


def _cut(tensor: torch.Tensor, axis: int, index: torch.Tensor) -> None:
    """Keep of `tensor` and its gradient what `index` names along `axis`, in place."""
    index = index.to(tensor.device)
    gradient, tensor.grad = tensor.grad, None
    tensor.data = tensor.data.index_select(axis, index)
    if gradient is not None:
        tensor.grad = gradient.index_select(axis, index)


def _move_shared(base: PreTrainedModel, cuts: Cuts) -> None:
    """Give what only the first block of a stack has to the block that becomes the first."""
    architecture = cuts.architecture
    if architecture.first_block_only is None:
        return
    path, _, child = architecture.first_block_only.rpartition(".")
    for stack in architecture.stacks:
        blocks = base.get_submodule(stack.blocks)
        first = cuts.layers[stack.name][0]
        if first:
            setattr(blocks[first].get_submodule(path), child, blocks[0].get_submodule(f"{path}.{child}"))


def _delete_blocks(base: PreTrainedModel, cuts: Cuts) -> None:
    for stack in cuts.architecture.stacks:
        blocks = base.get_submodule(stack.blocks)
        for index in reversed(range(len(blocks))):
            if index not in cuts.layers[stack.name]:
                del blocks[index]
