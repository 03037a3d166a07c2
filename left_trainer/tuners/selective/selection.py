"""Which parameters of a model a selective tuner trains: pure functions from names and modules to names."""

from __future__ import annotations

import math
import re

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from left_trainer.models.tables import unread_tables

# For each module, by name, the names of its own parameters.
Selection = dict[str, list[str]]

LAYERS_FORM = re.compile(r"(?P<end>first|last):(?P<size>[1-9]\d*)(?P<percent>%?)|\d+(,\d+)*")
# The attention's projections, by the last part of their names.
PROJECTIONS = {
    "query": ("q", "q_proj", "q_lin", "query"),
    "key": ("k", "k_proj", "k_lin", "key"),
    "value": ("v", "v_proj", "v_lin", "value"),
    "output": ("o", "o_proj", "out_proj", "out_lin", "c_proj", "dense"),
}
TYPES = ("attention", *PROJECTIONS, "feed_forward", "norms", "embeddings")


def parameter_owners(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the base model that directly own trainable parameters, by name; tuner layers are seen through."""
    owners: dict[str, nn.Module] = {}
    wrappers: tuple[str, ...] = ()
    unread = unread_tables(model) if isinstance(model, PreTrainedModel) else {}
    for name, module in model.named_modules():
        if not name or name.startswith(wrappers):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            wrappers += (f"{name}.",)
        if isinstance(module, AuxiliaryTrainingWrapper):
            continue
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        # The tables of sines of Marian and Pegasus are parameters that are never trained.
        if own_parameters(base) and "Sinusoidal" not in type(base).__name__ and name not in unread:
            owners[name] = base
    return owners


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module._parameters.items() if parameter is not None}


def is_norm(module: nn.Module) -> bool:
    """Every model has its own class of norm, so that only the name tells."""
    return "norm" in type(module).__name__.lower()


def select_biases(owners: dict[str, nn.Module], output_head: nn.Module | None) -> Selection:
    """All biases, and a new one for every linear layer and norm without, except for the output head."""
    selection = {}
    for name, module in owners.items():
        biases = [parameter for parameter in own_parameters(module) if parameter.endswith("bias")]
        takes_bias = isinstance(module, (nn.Linear, Conv1D)) or is_norm(module)
        if not biases and takes_bias and module is not output_head:
            biases = ["bias"]
        if biases:
            selection[name] = biases
    return selection


def select_layers(
    model: nn.Module, owners: dict[str, nn.Module], layers: str | int | list[int], stack: str, encoder_decoder: bool
) -> Selection:
    """Everything within the chosen blocks."""
    chosen: tuple[str, ...] = ()
    for part, name in block_stacks(model, encoder_decoder).items():
        if stack == "both" or stack == part:
            size = len(model.get_submodule(name))  # type: ignore[arg-type]
            chosen += tuple(f"{name}.{index}." for index in block_indices(layers, size, part))
    if not chosen:
        raise ValueError(
            f"stack={stack!r}: {type(model).__name__} is not an encoder-decoder model. Leave stack='both'."
        )
    return {name: list(own_parameters(module)) for name, module in owners.items() if name.startswith(chosen)}


def block_lists(model: nn.Module) -> list[str]:
    """The names of the outermost lists of modules: the stacks of blocks."""
    lists: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(tuple(f"{outer}." for outer in lists)):
            lists.append(name)
    return lists


def block_stacks(model: nn.Module, encoder_decoder: bool) -> dict[str, str]:
    """The names of the stacks, by `encoder` and `decoder`, or by `model` where there is only one."""
    parts = ("encoder", "decoder") if encoder_decoder else ("model",)
    stacks = {}
    for part in parts:
        names = [name for name in block_lists(model) if not encoder_decoder or part in name.split(".")]
        if len(names) != 1:
            raise ValueError(
                f"{type(model).__name__} has {len(names)} lists of modules in its {part} ({', '.join(names)}), where "
                "`layers` needs one list of blocks. Use parameter_types, with target_modules as a regular expression."
            )
        stacks[part] = names[0]
    return stacks


def block_indices(layers: str | int | list[int], size: int, part: str) -> list[int]:
    """The indices that `layers` asks for in a stack of `size` blocks. Raises `ValueError` beyond its end."""
    match = LAYERS_FORM.fullmatch(str(layers))
    if match and match["end"]:
        count = math.ceil(size * int(match["size"]) / 100) if match["percent"] else int(match["size"])
        first = 0 if match["end"] == "first" else size - count
        indices = list(range(first, first + count))
    else:
        indices = [int(index) for index in (layers if isinstance(layers, list) else str(layers).split(","))]
    if min(indices) < 0 or max(indices) >= size:
        raise ValueError(f"layers={layers!r} is out of range: the {part} has {size} blocks, 0 to {size - 1}.")
    return indices


def select_types(model: nn.Module, owners: dict[str, nn.Module], types: list[str]) -> Selection:
    """The parameters of the modules that belong to one of `types`."""
    blocks = block_lists(model)
    kinds = {}
    for name, module in owners.items():
        inside = [name.removeprefix(f"{block}.") for block in blocks if name.startswith(f"{block}.")]
        kinds[name] = module_types(module, inside[0] if inside else "")
    present = [kind for kind in TYPES if any(kind in of_module for of_module in kinds.values())]
    for kind in types:
        if kind not in present:
            raise ValueError(
                f"types={types!r}: {type(model).__name__} has no parameters of type {kind!r} of their own. "
                f"It has: {', '.join(present)}."
            )
    return {name: list(own_parameters(owners[name])) for name, found in kinds.items() if found.intersection(types)}


def module_types(module: nn.Module, name_in_block: str) -> set[str]:
    """What a module is to its model; none of the types for heads and poolers, which lie outside of the blocks."""
    if is_norm(module):
        return {"norms"}
    if "attn" in name_in_block.lower() or "attention" in name_in_block.lower():
        last = name_in_block.rpartition(".")[2]
        return {"attention", *(kind for kind, names in PROJECTIONS.items() if last in names)}
    if isinstance(module, nn.Embedding):
        return {"embeddings"}
    return {"feed_forward"} if name_in_block else set()
