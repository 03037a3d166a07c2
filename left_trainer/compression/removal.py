"""Taking blocks, neurons and heads out of a model for good.

What changes is read off two skeletons on the meta device, of the model as it is and as it shall be: a tensor whose
shape differs between them is cut along that axis, and an attribute that differs (`num_heads`, `in_features`,
`layer_idx`) takes the new value. So nothing here knows the classes of a model's or an adapter's layers.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel

from left_trainer.adapters.residual_base import change_initial_adapter
from left_trainer.compression.architecture import architecture_of
from left_trainer.compression.cuts import WRAPPERS, Cuts, Kept, cuts_of
from left_trainer.compression.optimizer_state import check_optimizer, cut_state, forget
from left_trainer.compression.sizes import Size, size_of
from left_trainer.compression.skeletons import Change, Skeletons
from left_trainer.methods.apply import find_method, method_name
from left_trainer.methods.method import PeftMethod
from left_trainer.methods.registry import METHODS
from left_trainer.methods.renumbering import renumber, targets_of
from left_trainer.models import without_adapter

__all__ = ["Kept", "kept_whole", "remove_parts", "why_not_shrinkable"]

PLAIN = (int, float, str, tuple)  # types of attributes that say a size


def kept_whole(model: PreTrainedModel | PeftModel) -> Kept:
    """All of `model`: what `dataclasses.replace` makes another choice of."""
    layers = size_of(without_adapter(model).config).layers
    return Kept(layers={stack: tuple(range(count)) for stack, count in layers.items()})


def why_not_shrinkable(model: PreTrainedModel | PeftModel, size: Size | None = None) -> str | None:
    """Why parts cannot be taken out of `model`, in a sentence; `None` where they can.

    Args:
        model: Without or with an adapter.
        size: What the model is to be shrunk to. By default all of its parts are to be cut.
    """
    base = without_adapter(model)
    try:
        now = size_of(base.config)
    except ValueError as error:
        return str(error)
    quantized = next((name for name, weight in base.named_parameters() if not weight.is_floating_point()), None)
    if quantized is not None:
        return f"The base model is quantized ({quantized!r}), and packed weights cannot be cut. Load it unquantized."
    if not isinstance(model, PeftModel):
        return None
    narrowed = _narrowed(model, now, size)
    for method in _records(model):
        if not method.supports("shrinking"):
            return f"peft_method={method.name!r} does not work with shrink_to: {method.unsupported['shrinking']}"
        if narrowed and not method.supports("narrowing"):
            return (
                f"peft_method={method.name!r} is on layers that {' and '.join(narrowed)} would cut, and does not work "
                f"with that: {method.unsupported['narrowing']}"
            )
    return None


def _records(model: PeftModel) -> list[PeftMethod]:
    """The records of the adapters of `model`: by what it was wrapped with, and by the options of each config."""
    by_config = (METHODS.find(method_name(config)) for config in model.peft_config.values())
    return [method for method in (find_method(model), *by_config) if method is not None]


def _narrowed(model: PeftModel, now: Size, size: Size | None) -> list[str]:
    """`ffn` and `heads`, where what they would cut has a layer of an adapter."""
    config = without_adapter(model).config
    targets = {target for adapter in model.peft_config for target in targets_of(model, adapter)}
    cut = {"ffn": size is None or size.ffn != now.ffn, "heads": size is None or size.heads != now.heads}
    return [name for name, is_cut in cut.items() if is_cut and any(_is_of(name, config, each) for each in targets)]


def _is_of(option: str, config: PreTrainedConfig, name: str) -> bool:
    """Whether a cut of `ffn` or `heads` touches the module `name` or what is in it."""
    architecture = architecture_of(config)
    linears = (*architecture.feed_forward_inputs, architecture.feed_forward_output)
    for block in architecture.blocks(config):
        cut = block.attentions if option == "heads" else tuple(f"{block.feed_forward}.{linear}" for linear in linears)
        if any(name == path or name.startswith(f"{path}.") for path in cut):
            return option == "ffn" or architecture.has_free_heads
    return False


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
    base = without_adapter(model)
    cuts = cuts_of(base.config, kept)
    if reason := why_not_shrinkable(model, size_of(cuts.config)):
        raise ValueError(reason)
    options = _new_options(model, cuts)
    if any(changed.get("target_modules") == set() for changed in options.values()):
        raise ValueError("The adapter is on the layers that would go, and on no other. Keep one of them.")
    skeletons = Skeletons(model, _with_options(model, options), cuts)
    _check_names(skeletons)
    axes = {change.it: found for change in skeletons.tensors() if (found := _axis(change, cuts))}
    gone = {parameter for name, parameter in model.named_parameters() if cuts.renamed(name) is None}
    if optimizer is not None:
        check_optimizer(optimizer, axes)
    named_axes = {name: axes[weight] for name, weight in model.named_parameters() if weight in axes}
    attributes = [each for change in skeletons.modules() for each in _new_attributes(change)]
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
    if isinstance(model, PeftModel):
        _renumber_adapters(model, options, cuts)
        change_initial_adapter(
            model, cuts.renamed, lambda name, weight: _selected(weight, *named_axes.get(name, (0, None)))
        )


# What changes


def _new_options(model: PreTrainedModel | PeftModel, cuts: Cuts) -> dict[str, dict[str, Any]]:
    """Options of the configs of the adapters of `model` that change, by adapter."""
    if not isinstance(model, PeftModel):
        return {}
    return {name: renumber(config, targets_of(model, name), cuts.renamed) for name, config in model.peft_config.items()}


def _with_options(model: PreTrainedModel | PeftModel, options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    configs = {name: copy.deepcopy(model.peft_config[name]) for name in options}
    for name, changed in options.items():
        for option, value in changed.items():
            setattr(configs[name], option, value)
    return configs


def _check_names(skeletons: Skeletons) -> None:
    """Refuse an adapter that would not load again: one made anew on the smaller model has other tensors."""
    if not skeletons.has_adapters:
        return
    names = {name for name, _ in skeletons.model.named_parameters(remove_duplicate=False)}
    left = {new_name for name in names if (new_name := skeletons.cuts.renamed(name)) is not None}
    differing = left ^ {name for name, _ in skeletons.after.named_parameters(remove_duplicate=False)}
    if differing:
        raise ValueError(
            f"The adapter cannot be shrunk with the model: {sorted(differing)[0]!r} depends on which blocks there are, "
            "so that the adapter would not load again."
        )


def _axis(change: Change, cuts: Cuts) -> tuple[int, torch.Tensor] | None:
    """The axis along which a tensor is cut, with the indices that stay; `None` where it is left as it is."""
    if change.before is None and cuts.indices_for(change.name):
        raise ValueError(f"shrink_to cannot cut {change.name!r}: what of it belongs to which feature is not known.")
    if change.before is None or change.after is None:
        return None
    old, new = change.before.shape, change.after.shape
    if old == new:
        return None
    differing = [axis for axis, sizes in enumerate(zip(old, new, strict=True)) if sizes[0] != sizes[1]]
    fitting = [
        index
        for index in cuts.indices_for(change.name)
        if len(differing) == 1 and index.sizes == (old[differing[0]], new[differing[0]])
    ]
    if not fitting or change.it.shape[differing[0]] != fitting[0].size:
        raise ValueError(
            f"shrink_to cannot cut {change.name!r} from {tuple(old)} to {tuple(new)}: its entries do not belong to "
            "single neurons or heads."
        )
    return differing[0], fitting[0].kept


def _new_attributes(change: Change) -> list[tuple[Any, str, Any]]:
    """Plain attributes of a module and its config that differ between the skeletons, with their new values."""
    if change.before is None or change.after is None:
        return []
    changed = [(change.it, *item) for item in _differences(change.before, change.after, PLAIN)]
    config = vars(change.it).get("config")
    if isinstance(config, PreTrainedConfig) and "config" in vars(change.before):
        changed += [(config, *item) for item in _differences(change.before.config, change.after.config, (*PLAIN, list))]
    return changed


def _differences(old: Any, new: Any, types: tuple[type, ...]) -> list[tuple[str, Any]]:
    return [
        (name, value)
        for name, value in vars(new).items()
        if isinstance(value, types) and (name not in vars(old) or vars(old)[name] != value)
    ]


# Changing it


def _cut(tensor: torch.Tensor, axis: int, index: torch.Tensor) -> None:
    """Keep of `tensor` and its gradient what `index` names along `axis`, in place."""
    gradient, tensor.grad = tensor.grad, None
    tensor.data = _selected(tensor.data, axis, index)
    if gradient is not None:
        tensor.grad = _selected(gradient, axis, index)


def _selected(tensor: torch.Tensor, axis: int, index: torch.Tensor | None) -> torch.Tensor:
    return tensor if index is None else tensor.index_select(axis, index.to(tensor.device))


def _move_shared(base: PreTrainedModel, cuts: Cuts) -> None:
    """Give what only the first block of a stack has to the block that becomes the first."""
    architecture = cuts.architecture
    if architecture.first_block_only is None:
        return
    modules = {WRAPPERS.sub("", name): module for name, module in base.named_modules()}
    path, _, child = architecture.first_block_only.rpartition(".")
    for stack in architecture.stacks:
        first = cuts.layers[stack.name][0]
        if first:
            old, new = (modules[f"{stack.blocks}.{index}.{path}"] for index in (0, first))
            setattr(new, child, getattr(old, child))


def _delete_blocks(base: PreTrainedModel, cuts: Cuts) -> None:
    for stack in cuts.architecture.stacks:
        blocks: Any = base.get_submodule(stack.blocks)
        for index in reversed(range(len(blocks))):
            if index not in cuts.layers[stack.name]:
                del blocks[index]


def _renumber_adapters(model: PeftModel, options: Mapping[str, Mapping[str, Any]], cuts: Cuts) -> None:
    """Give the records of what an adapter is on the names that modules have now."""
    for name, changed in options.items():
        for option, value in changed.items():
            setattr(model.peft_config[name], option, value)
    tuner: Any = model.base_model
    if hasattr(tuner, "targeted_module_names"):
        tuner.targeted_module_names = _renamed(tuner.targeted_module_names, cuts)
    applied = vars(model).get("applied_method")
    if applied is not None:
        model.applied_method = dataclasses.replace(
            applied, matched_modules=tuple(_renamed(applied.matched_modules, cuts))
        )


def _renamed(names: Any, cuts: Cuts) -> list[str]:
    return [new_name for name in names if (new_name := cuts.renamed(name)) is not None]
