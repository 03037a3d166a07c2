"""`peft_kwargs`: parsing the forms a user may write, and checking them against the method's PEFT config."""

from __future__ import annotations

import dataclasses
import enum
import json
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from left_trainer.methods.method import PeftMethod
from left_trainer.methods.option_ranges import check_numbers
from left_trainer.ranges import check_regex, shown_value
from left_trainer.registry import did_you_mean

PYTHON_CONSTANTS = {"true": True, "false": False, "none": None, "null": None}
# Options in which PEFT reads a text as a regular expression. So it does in the keys of mappings called *_pattern.
PATTERNS = ("target_modules", "feedforward_modules", "exclude_modules", "target_parameters", "layers_pattern")
# Set by PEFT or by us, never by a user.
RESERVED_OPTIONS = {"peft_type", "task_type", "inference_mode", "auto_mapping", "peft_version"}


def parse_peft_kwargs(value: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Options of a method as a dict, see `parse_options`."""
    return parse_options("peft_kwargs", value, "r=16,lora_alpha=32")


def parse_options(
    argument: str, value: str | Mapping[str, Any] | None, example: str = "name=value,other=value"
) -> dict[str, Any]:
    """Options as a dict, from a mapping, a JSON object, or `r=16,target_modules=q,v`.

    Args:
        argument: What the user calls them.
        value: What the user wrote.
        example: Of pairs, for messages.

    Raises:
        ValueError: The text is none of these.
        TypeError: The value is neither a text nor a mapping.
    """
    if value is None:
        return {}
    if not isinstance(value, (str, Mapping)):
        raise TypeError(
            f"{argument}={shown_value(value)} ({type(value).__name__}) must be a dict, a JSON object, or {example!r}."
        )
    if not isinstance(value, str):
        wrong = next((name for name in value if not isinstance(name, str)), None)
        if wrong is not None:
            raise TypeError(f"{argument} has {wrong!r}, which is not the name of an option.")
        return dict(value)
    text, name_of_example = value.strip(), example.partition("=")[0]
    if text.startswith("{"):
        try:
            return dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{argument}={value!r} is not a valid JSON object: {error}. Write '{{\"{name_of_example}\": ...}}'."
            ) from error
    options: dict[str, Any] = {}
    for part in filter(None, re.split(r",(?=\s*\w+\s*=)", text)):
        name, equals, item = part.partition("=")
        if not equals or not name.strip().isidentifier():
            raise ValueError(
                f"{argument}={value!r} cannot be read at {part!r}. Write a JSON object, or name=value pairs, "
                f"{example!r}."
            )
        options[name.strip()] = _parse_value(item.strip())
    return options


def _parse_value(text: str) -> Any:
    if text.lower() in PYTHON_CONSTANTS:
        return PYTHON_CONSTANTS[text.lower()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return [_parse_value(item.strip()) for item in text.split(",")] if "," in text else text


def option_types(config_class: type) -> dict[str, Any]:
    """Name and type of every option that a user may set."""
    hints = typing.get_type_hints(config_class)
    fields = {field.name for field in dataclasses.fields(config_class) if field.init}
    return {name: hints[name] for name in sorted(fields - RESERVED_OPTIONS)}


def nested_config(hint: Any) -> type | None:
    """The config class that an option of the type `Optional[SomeConfig]` holds."""
    classes = [argument for argument in (hint, *get_args(hint)) if dataclasses.is_dataclass(argument)]
    return classes[0] if classes else None  # type: ignore[return-value]


def with_nested_configs(options: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """`options` with the mappings that stand for config objects, as in JSON, turned into them."""
    return {
        name: nested(**value) if isinstance(value, Mapping) and (nested := nested_config(known[name])) else value
        for name, value in options.items()
    }


def plain_options(value: Any) -> Any:
    """`value`, options or one of them, in the types of JSON: a set becomes a list, a config the dict it stands for."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {item.name: getattr(value, item.name) for item in dataclasses.fields(value) if item.init}
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, Mapping):
        return {str(key): plain_options(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((plain_options(item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [plain_options(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def matches(value: Any, hint: Any) -> bool:
    """Whether `value` is of type `hint`, as far as plain options need it: unions, literals, containers, numbers."""
    origin, arguments = get_origin(hint), get_args(hint)
    nested = nested_config(hint)
    if nested and isinstance(value, Mapping):
        return set(value) <= set(option_types(nested))
    if origin in (Union, types.UnionType):
        return any(matches(value, argument) for argument in arguments)
    if origin is Literal:
        return _is_choice(value, arguments)
    if origin in (list, set, tuple):
        return isinstance(value, (list, set, tuple)) and all(
            any(matches(item, argument) for argument in arguments if argument is not ...) for item in value
        )
    return isinstance(value, Mapping) if origin is dict else _is_plain(value, hint)


def _is_choice(value: Any, choices: tuple[Any, ...]) -> bool:
    """Whether `value` is one of `choices`. PEFT writes an open-ended one as 'pissa_niter_[number of iters]'."""
    open_ended = tuple(str(choice).partition("[")[0] for choice in choices if "[" in str(choice))
    return value in choices or str(value).startswith(open_ended)


def _is_plain(value: Any, hint: Any) -> bool:
    """Whether `value` is of a type without arguments. An integer is a float, a truth value is no number."""
    if hint is Any or isinstance(hint, typing.TypeVar):
        return True
    if hint is None:
        return value is None
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, hint) or (issubclass(hint, str) and isinstance(value, str))


def check_peft_kwargs(method: PeftMethod, peft_kwargs: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """The options as a dict, every name and type checked against `method`'s PEFT config and hooks.

    Needs no model, so that a typo is reported before any weight is loaded. Raises `ValueError`.
    """
    options = parse_peft_kwargs(peft_kwargs)
    known = known_options(method)
    if options and not known:
        raise ValueError(
            f"peft_kwargs={options!r}, but peft_method={method.name!r} has no options. Remove peft_kwargs."
        )
    for name, value in options.items():
        if name not in known:
            raise ValueError(
                f"peft_kwargs has {name!r}, which is not an option of peft_method={method.name!r}."
                f"{did_you_mean(name, known)} Allowed: {', '.join(known)}."
            )
        if name in method.preset and value != method.preset[name]:
            raise ValueError(
                f"peft_kwargs has {name}={value!r}, but {name}={method.preset[name]!r} defines "
                f"peft_method={method.name!r}. Remove it, or choose another method; `left-trainer methods` lists them."
            )
        if isinstance(value, str) and name in ("target_modules", "feedforward_modules") and value.isidentifier():
            # PEFT reads a string as a regular expression over full paths; a bare name would match nothing.
            options[name] = [value]
        elif not matches(value, known[name]):
            expected = str(known[name]).replace("typing.", "").replace("<class '", "").replace("'>", "")
            raise ValueError(
                f"peft_kwargs has {name}={value!r} ({type(value).__name__}), but this option of "
                f"peft_method={method.name!r} has the type {expected}. Pass a value of that type."
            )
    check_numbers(method, options)
    _check_regexes(options)
    return options


def _check_regexes(options: Mapping[str, Any]) -> None:
    """Refuse a pattern that is no regular expression, in the options that PEFT reads as one."""
    for name, value in options.items():
        patterns = [value] if name in PATTERNS and isinstance(value, str) else []
        patterns += list(value) if name.endswith("_pattern") and isinstance(value, Mapping) else []
        for pattern in patterns:
            check_regex(f"peft_kwargs {name}", str(pattern))


def known_options(method: PeftMethod) -> dict[str, Any]:
    """Name and type of every option of `method`: those of its PEFT config and those of its hooks."""
    of_hooks = {name: type(value) for name, value in method.hook_options.items()}
    return {**(option_types(method.config_class) if method.config_class else {}), **of_hooks}


def check_required(method: PeftMethod, options: Mapping[str, Any]) -> None:
    """Raise `ValueError`, with what to pass, when an option without a default is missing."""
    for name, advice in method.required.items():
        if options.get(name) is None:
            raise ValueError(f"peft_method={method.name!r} needs peft_kwargs={{{name!r}: ...}}: {advice}")
