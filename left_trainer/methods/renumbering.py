"""What a PEFT config says of blocks by their numbers, once some blocks are gone and the others have moved up."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from left_trainer.methods.patterns import BY_TARGET

# Options that choose blocks by number, with the value that leaves the choice to `target_modules`.
CHOICES_OF_BLOCKS = {
    "layers_to_transform": None,
    "layers_pattern": None,
    "exclude_modules": None,
    "layers": "first:100%",
}
NUMBER = re.compile(r"(^|\.)\d+(\.|$)")


def targets_of(model: PeftModel, adapter: str) -> list[str]:
    """Full names, in the base model, of the modules that have a layer of `adapter`."""
    return [
        re.sub(r"\.base_layer\b", "", name)
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, BaseTunerLayer)
        and any(adapter in getattr(module, attribute, ()) for attribute in module.adapter_layer_names)
    ]


def renumber(config: PeftConfig, targets: Sequence[str], rename: Callable[[str], str | None]) -> dict[str, Any]:
    """Options of `config` that change when blocks go, with their new values.

    Args:
        config: Of an adapter.
        targets: What `targets_of` says of it, before.
        rename: The name afterwards of a module; `None` where it goes.
    """
    changed: dict[str, Any] = {}
    if targets and any(_names_blocks(config, option) for option in ("target_modules", *CHOICES_OF_BLOCKS)):
        changed = {option: value for option, value in CHOICES_OF_BLOCKS.items() if hasattr(config, option)}
        changed["target_modules"] = {name for target in targets if (name := rename(target)) is not None}
    for option in BY_TARGET:
        if _names_blocks(config, option):
            changed[option] = _by_new_name(getattr(config, option), targets, rename)
    if _names_blocks(config, "modules_to_save"):
        changed["modules_to_save"] = [name for old in config.modules_to_save if (name := rename(old)) is not None]
    return changed


def _names_blocks(config: PeftConfig, option: str) -> bool:
    """Whether `option` may say something of single blocks."""
    value = getattr(config, option, None)
    if option in ("layers", "layers_to_transform"):
        return value is not None
    if isinstance(value, str) or option in BY_TARGET:  # regular expressions
        return bool(re.search(r"\d", "".join(value or ())))
    return any(NUMBER.search(name) for name in value or ())


def _by_new_name(values: dict[str, Any], targets: Sequence[str], rename: Callable[[str], str | None]) -> dict[str, Any]:
    """A mapping from regular expressions, spelled out for each target that is left; names of parameters stay such."""
    spelled_out = {}
    for target in targets:
        key = next((key for key in values if re.fullmatch(rf"(.*\.)?({key})", target)), None)  # as PEFT reads it
        name = rename(target)
        if key is not None and name is not None:
            spelled_out[name] = values[key]
    parameters = {
        name: value
        for key, value in values.items()
        if any(key.startswith(f"{target}.") for target in targets) and (name := rename(key)) is not None
    }
    return {**spelled_out, **parameters}
