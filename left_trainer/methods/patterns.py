"""What a PEFT config names in a model: modules, parameters, layers and tokens. All of it has to be there.

PEFT raises only where nothing matches at all; one name that misses among several is a typo that trains less than was
asked, and some options are passed over in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from peft import PeftConfig
from transformers import PreTrainedModel

from left_trainer.methods.targets import count_matches, peft_targets, targeted
from left_trainer.models.tables import bypassed_tables, unread_tables

MAX_NAMES_SHOWN = 40
# Options that name modules, as PEFT reads them: a regular expression, or ends of names.
MODULES = ("target_modules", "feedforward_modules", "modules_to_save", "exclude_modules")
# Options that name parameters by the ends of their names.
PARAMETERS = ("target_parameters",)
# Options that map regular expressions for the ends of the names of targets to values.
BY_TARGET = ("rank_pattern", "alpha_pattern", "lambda_pattern", "block_size_pattern", "n_frequency_pattern")
# Options that hold ids of tokens, of the input embeddings or of modules by name.
TOKENS = ("trainable_token_indices", "token_indices", "cpt_token_ids")
# Options that are the rank of an update, and what is still common on small models.
COMMON_RANK = 256
RANKS = ("r", "init_r", "target_r", "bottleneck_size")
LAYERS = ("layers_to_transform", "layers_pattern")


def check_patterns(model: PreTrainedModel, config: PeftConfig) -> None:
    """Raise `ValueError` where an option of `config` names something that `model` does not have.

    Args:
        model: May be on the meta device.
        config: With its targets resolved.
    """
    unread = unread_tables(model)
    names = tuple(name for name, _ in model.named_modules() if name not in unread)
    for option in MODULES:
        for pattern in patterns_of(config, option):
            if not count_matches(names, pattern):
                hint = _not_read(unread, pattern) or known_modules(model)
                raise ValueError(f"{option} has {text_of(pattern)!r}, which matches no module. {hint}")
    targets = target_names(model, config, names)
    _check_in_forward_pass(model, config, targets)
    _check_excluded(config, targets)
    parameters = tuple(name for name, _ in model.named_parameters())
    for option in PARAMETERS:
        for pattern in getattr(config, option, None) or ():
            if not count_matches(parameters, pattern):
                raise ValueError(f"{option} has {pattern!r}, which matches no parameter. {_known_parameters(model)}")
    for option in BY_TARGET:
        for pattern, value in (getattr(config, option, None) or {}).items():
            # AdaLoRA keeps there which of the ranks are left, by the names of its factors.
            if not isinstance(value, list) and not _matches_end((*targets, *parameters), pattern):
                raise ValueError(
                    f"{option} has {pattern!r}, which matches none of the targets. Targets are, for example, "
                    f"{', '.join(targets[:3])}."
                )
    _check_layers(config, targets)
    _check_tokens(model, config, unread)
    _check_ranks(model, config, targets)


def _check_in_forward_pass(model: PreTrainedModel, config: PeftConfig, targets: Sequence[str]) -> None:
    """Refuse a layer on the shared table that encoder and decoder read the weight of, past the module."""
    if hasattr(config, "token_indices") or getattr(config, "target_modules", None) in (None, "all-linear"):
        return
    passed = bypassed_tables(model)
    found = next((name for name in targets if name in passed), None)
    if found is not None:
        raise ValueError(
            f"target_modules has {found!r}, whose weight encoder and decoder read directly: an adapter on it would "
            "never be used. Name encoder.embed_tokens and decoder.embed_tokens, or train tokens with "
            "trainable_token_indices."
        )


def target_names(model: PreTrainedModel, config: PeftConfig, names: Sequence[str]) -> tuple[str, ...]:
    """The modules that `target_modules` names; all modules where neither the config nor PEFT says."""
    value = getattr(config, "target_modules", None)
    if value is None:
        value = peft_targets(model, config)
    if value is None:
        return tuple(names)
    if value == "all-linear":
        return tuple(name for name, _ in targeted(model, config))
    patterns = [re.compile(value)] if isinstance(value, str) else list(value)
    return tuple(name for name in names if any(count_matches((name,), pattern) for pattern in patterns))


def _check_excluded(config: PeftConfig, targets: Sequence[str]) -> None:
    for pattern in patterns_of(config, "exclude_modules"):
        if not count_matches(targets, pattern):
            raise ValueError(
                f"exclude_modules has {text_of(pattern)!r}, which matches none of the targets, so that it excludes "
                f"nothing. Targets are, for example, {', '.join(targets[:3])}."
            )


def _check_layers(config: PeftConfig, targets: Sequence[str]) -> None:
    """As PEFT reads them: the index is the number behind the name of the list of layers."""
    wanted = getattr(config, "layers_to_transform", None)
    wanted = [wanted] if isinstance(wanted, int) else wanted
    given = getattr(config, "layers_pattern", None) or []
    lists = [given] if isinstance(given, str) else list(given)
    for name in lists:
        if not _indices(targets, rf".*\.{name}\.(\d+)\."):
            raise ValueError(
                f"layers_pattern has {name!r}, which is no list of layers with a target. Targets are, for example, "
                f"{', '.join(targets[:3])}."
            )
    found = _indices(targets, *([rf".*\.{name}\.(\d+)\." for name in lists] or [r".*\.[^.]*\.(\d+)\."]))
    missing = sorted(set(wanted or ()) - found)
    if missing:
        raise ValueError(
            f"layers_to_transform has {missing[0]}, and no target is in a layer of that number. Layers with targets: "
            f"{', '.join(map(str, sorted(found)))}."
        )


def _check_ranks(model: PreTrainedModel, config: PeftConfig, targets: Sequence[str]) -> None:
    """Refuse a rank above every side of every target's weight: an update of that rank is the weight many times over."""
    weights = [getattr(model.get_submodule(name), "weight", None) for name in targets]
    largest = max((max(weight.shape) for weight in weights if weight is not None and weight.dim() > 1), default=0)
    for name in RANKS:
        rank = getattr(config, name, None)
        if largest and isinstance(rank, int) and rank > max(largest, COMMON_RANK):
            raise ValueError(
                f"{name}={rank} is more than the largest side, {largest}, of the weights that the method adapts. "
                "Common ranks are 4 to 64."
            )


def _indices(names: Iterable[str], *patterns: str) -> set[int]:
    return {int(match[1]) for name in names for pattern in patterns if (match := re.match(pattern, name))}


def _check_tokens(model: PreTrainedModel, config: PeftConfig, unread: Iterable[str]) -> None:
    for option in TOKENS:
        value = getattr(config, option, None)
        if value is None:
            continue
        for module_name, ids in value.items() if isinstance(value, dict) else [(None, value)]:
            size = _number_of_tokens(model, config, option, module_name, unread)
            beyond = [token for token in ids if not 0 <= token < size]
            if beyond:
                raise ValueError(
                    f"{option} has {beyond[0]}, and the embeddings have the tokens 0 to {size - 1}. For new ones, call "
                    "model.resize_token_embeddings(len(tokenizer)) first."
                )


def _number_of_tokens(
    model: PreTrainedModel, config: PeftConfig, option: str, module_name: str | None, unread: Iterable[str]
) -> int:
    if module_name is None:
        table = model.get_input_embeddings()
        stands_for_shared = option == "trainable_token_indices" or getattr(config, "target_modules", ()) is None
        if stands_for_shared and any(model.get_submodule(name) is table for name in unread):
            raise ValueError(
                f"{option} without a name stands for the shared embeddings, which {type(model).__name__} does not "
                "read: encoder and decoder have their own. Name them, encoder.embed_tokens and decoder.embed_tokens, "
                f"{'as keys of ' + option if option == 'trainable_token_indices' else 'in target_modules'}."
            )
        return int(table.weight.shape[0])
    found = [
        module
        for name, module in model.named_modules()
        if name not in unread and count_matches((name,), module_name) and hasattr(module, "weight")
    ]
    if not found:
        raise ValueError(f"{option} has {module_name!r}, which matches no module. {known_modules(model)}")
    return min(int(module.weight.shape[0]) for module in found)


def _matches_end(names: Iterable[str], pattern: str) -> bool:
    return any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)


def patterns_of(config: PeftConfig, option: str) -> list[re.Pattern[str] | str]:
    """What `option` names: one compiled regular expression, as PEFT reads a string, or names that modules end in."""
    value = getattr(config, option, None)
    if isinstance(value, str):
        return [] if value == "all-linear" else [re.compile(value)]
    return sorted(value or ())


def text_of(pattern: re.Pattern[str] | str) -> str:
    """A pattern as the user wrote it."""
    return pattern.pattern if isinstance(pattern, re.Pattern) else pattern


def _not_read(unread: Iterable[str], pattern: re.Pattern[str] | str) -> str:
    if not count_matches(unread, pattern):
        return ""
    return (
        "The embeddings of that name are not read: encoder and decoder have their own, encoder.embed_tokens and "
        "decoder.embed_tokens."
    )


def known_modules(model: PreTrainedModel) -> str:
    """A sentence with the last parts of the names of the modules that have weights of their own."""
    leaves = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if not any(True for _ in module.children()) and any(True for _ in module.parameters())
    }
    shown = sorted(leaf for leaf in leaves if not leaf.isdigit())[:MAX_NAMES_SHOWN]
    example = next(name for name, _ in model.named_modules() if name.endswith(f".{shown[0]}") or name == shown[0])
    return f"{type(model).__name__} has modules named {', '.join(shown)} (in full, for example, {example})."


def _known_parameters(model: PreTrainedModel) -> str:
    shown: list[Any] = sorted({".".join(name.split(".")[-2:]) for name, _ in model.named_parameters()})
    return f"{type(model).__name__} has parameters named {', '.join(shown[:MAX_NAMES_SHOWN])}."
