"""The settings of a comparison, each a method with arguments of its own and perhaps a name, and how a user writes them.

On the command line a setting is `METHOD`, `METHOD+FIELD=VALUE` or `NAME=METHOD+FIELD=VALUE+FIELD=VALUE`; in YAML it is
that text or a mapping, `{name: NAME, peft_method: METHOD, FIELD: VALUE}`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from left_trainer.comparison.cell import BASE, COMPRESSION_FIELDS, OTHER_TEACHERS, REFERRING, referred
from left_trainer.comparison.flags import DECIDED, argument_names, flags_of, parse_flags
from left_trainer.comparison.launcher import check_launcher
from left_trainer.comparison.rows import MAJORITY
from left_trainer.embedded import DEFAULT_MODEL, MODEL_NAMES
from left_trainer.methods import get_method
from left_trainer.registry import did_you_mean
from left_trainer.shown_text import one_line

METHOD, NAME, LAUNCHER = "peft_method", "name", "launcher"
LONGEST_NAME = 80
# Arguments whose values tables put beside the name of a method where rows differ in them.
SHOWN = (
    *COMPRESSION_FIELDS,
    "peft_kwargs",
    "learning_rate",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "model_name_or_path",
)
QUOTES, BRACKETS = "\"'", {"{": "}", "[": "]", "(": ")"}
FIELD = re.compile(r"\+\s*[A-Za-z_][\w-]*\s*=")


@dataclass(frozen=True)
class Setting:
    """A method with arguments of `left-trainer train` for it alone.

    Args:
        method: Name of the method.
        arguments: Those that are not at their defaults.
        name: What tables, plots, page and folders call it; `None` for the name of the method, with what sets it apart.
        launcher: What starts the processes of its runs, in the place of `python`.
    """

    method: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    name: str | None = None
    launcher: str | None = None

    @property
    def label(self) -> str:
        """What other settings refer to it by."""
        return self.method if self.name is None else self.name


def read_setting(entry: Any) -> Setting:
    """The setting that a user wrote.

    Raises:
        ValueError: It names no method, an argument that no run has, or a name that no table can show.
    """
    given = _mapping_of(entry) if isinstance(entry, str) else entry
    if not isinstance(given, Mapping) or METHOD not in given:
        raise ValueError(
            f"{entry!r} has no {METHOD}. Write a name, or a mapping such as {{{METHOD}: NAME, ...}} with further "
            "arguments."
        )
    arguments = {key: value for key, value in given.items() if key not in (METHOD, NAME, LAUNCHER)}
    _check_names(arguments, entry)
    decided = [key for key in DECIDED if key != "peft_kwargs"]
    name = _checked_name(given[NAME]) if given.get(NAME) is not None else None
    _check_method(str(given[METHOD]), entry)
    launcher = check_launcher(given[LAUNCHER]) if given.get(LAUNCHER) is not None else None
    return Setting(str(given[METHOD]), parse_flags(flags_of(arguments), decided), name, launcher)


def split_settings(text: str) -> list[str]:
    """The settings in a text that separates them by commas; commas in quotes and in brackets separate none.

    Raises:
        ValueError: A quote or a bracket that is not closed.
    """
    return [part for part in (part.strip() for part in _split(text, re.compile(","))) if part]


def check_labels(settings: Sequence[Setting]) -> None:
    """Raise `ValueError` unless each name stands for one setting."""
    labels = [setting.label for setting in settings]
    for setting in settings:
        if setting.name is not None and labels.count(setting.name) > 1:
            raise ValueError(f"{setting.name!r} is the name of several settings in methods. Give each its own name.")


def check_told_apart(settings: Sequence[Setting]) -> None:
    """Raise `ValueError` for settings without names that a table would show as several seeds of one."""
    seen: dict[str, Setting] = {}
    for setting in settings:
        if setting.name is None:
            shown = {key: value for key, value in setting.arguments.items() if key in SHOWN}
            other = seen.setdefault(str((setting.method, sorted(shown.items()))), setting)
            if other is not setting:
                names = {key for one in (setting, other) for key in one.arguments if key not in SHOWN}
                raise ValueError(
                    f"Two settings of {setting.method} differ in {', '.join(sorted(names))} alone, which tables do not "
                    f"show. Give each a name: NAME={setting.method}+..., or in YAML {{name: NAME, peft_method: "
                    f"{setting.method}, ...}}."
                )


def check_references(settings: Sequence[Setting], shared: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless every reference leads to one setting, and none to itself.

    Args:
        settings: All of them.
        shared: Arguments that all of them have.
    """
    labels = [setting.label for setting in settings]
    targets = {setting.label: list(references({**shared, **setting.arguments}).values()) for setting in settings}
    for label, names in targets.items():
        for name in names:
            if labels.count(name) != 1:
                raise ValueError(_about_reference(label, name, labels))
    for label in targets:
        path = [label]
        while following := [name for name in targets[path[-1]] if name == label or name not in path]:
            path.append(following[0])
            if path[-1] == label:
                raise ValueError(
                    f"The settings refer to each other in a circle: {' -> '.join(path)}. A setting that others refer "
                    "to runs before them."
                )
    _check_braces(settings, labels)


def references(arguments: Mapping[str, Any]) -> dict[str, str]:
    """The arguments that refer to another setting, as `teacher_model: "{teacher}"` does, with that setting's name."""
    found = {key: referred(arguments.get(key)) for key in REFERRING}
    return {key: name for key, name in found.items() if name is not None}


def level(setting: Setting, settings: Sequence[Setting], shared: Mapping[str, Any]) -> int:
    """How many settings run before this one, one after the other: 0 where it refers to none. References are checked."""
    names = set(references({**shared, **setting.arguments}).values())
    before = [level(other, settings, shared) for other in settings if other.label in names]
    return 1 + max(before) if before else 0


def stand_in(arguments: Mapping[str, Any], settings: Iterable[Setting], shared: Mapping[str, Any]) -> dict[str, Any]:
    """`arguments` with the model that a setting starts from for each reference to its result.

    The result is not there before the setting has run. What starts from the same model can be checked with that.

    Args:
        arguments: Of a run, its references checked.
        settings: All of them.
        shared: Arguments that all of them have.
    """
    by_label = {setting.label: setting for setting in settings}

    def model(name: str) -> Any:
        its = {**shared, **by_label[name].arguments}
        found = its.get("model_name_or_path") or DEFAULT_MODEL
        further = referred(found)
        return MODEL_NAMES.get(found, found) if further is None else model(further)

    return {**arguments, **{key: model(name) for key, name in references(arguments).items()}}


def _mapping_of(text: str) -> dict[str, str]:
    """`NAME=METHOD+FIELD=VALUE` as a mapping."""
    head, *fields = _split(text, FIELD)
    name, equals, method = (part.strip() for part in _partition(head))
    found = {NAME: _unquoted(name), METHOD: _unquoted(method)} if equals else {METHOD: _unquoted(name)}
    if not found[METHOD] or "+" in found[METHOD]:
        raise ValueError(
            f"{text!r} is not a setting. Write METHOD, or NAME=METHOD+FIELD=VALUE, such as "
            "'distill=full+teacher_model=PATH'; a value that contains a comma or a plus sign before a name stands in "
            "quotes."
        )
    for field in fields:
        key, _, value = (part.strip() for part in field.removeprefix("+").partition("="))
        if key in found:
            raise ValueError(f"{text!r} has {key} twice. Write it once.")
        found[key] = _unquoted(value)
    return found


def _split(text: str, separator: re.Pattern[str]) -> Iterator[str]:
    """Parts of `text` that begin where `separator` matches outside of quotes and brackets; a lone comma is dropped."""
    closing: list[str] = []
    start = 0
    for position, character in enumerate(text):
        if closing:
            if character == closing[-1] and text[position - 1] != "\\":
                closing.pop()
            elif closing[-1] not in QUOTES:
                _open(character, closing, text, position)
        elif separator.match(text, position):
            yield text[start:position]
            start = position + (character == ",")
        else:
            _open(character, closing, text, position)
    if closing:
        raise ValueError(f"{text!r} has a quote or a bracket that is not closed: {closing[-1]} is missing.")
    yield text[start:]


def _open(character: str, closing: list[str], text: str, position: int) -> None:
    """Note what closes a quote or a bracket that opens here. An apostrophe inside of a word opens nothing."""
    if character in QUOTES and (position == 0 or not text[position - 1].isalnum()):
        closing.append(character)
    elif character in BRACKETS:
        closing.append(BRACKETS[character])


def _partition(head: str) -> tuple[str, str, str]:
    """Name, `=` and method; the name may stand in quotes that contain `=`."""
    parts = list(_split(head, re.compile("=")))
    return (parts[0], "=", "".join(parts[1:]).removeprefix("=")) if len(parts) > 1 else (head, "", "")


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] in QUOTES and text[-1] == text[0] else text


def _check_method(name: str, entry: Any) -> None:
    try:
        get_method(name)
    except ValueError as error:
        if not isinstance(entry, str) or entry == name:
            raise
        raise ValueError(f"{error} It stands in {entry!r}; a value that contains a comma needs quotes.") from error


def _check_names(arguments: Mapping[str, Any], entry: Any) -> None:
    known = argument_names()
    for key in arguments:
        if key not in known:
            raise ValueError(
                f"The setting {entry!r} has {key!r}, which is no argument of `left-trainer train`."
                f"{did_you_mean(str(key), [*known, NAME, LAUNCHER])}"
            )


def _checked_name(value: Any) -> str:
    name = str(value).strip() if isinstance(value, str | int | float) and not isinstance(value, bool) else ""
    if not name or len(name) > LONGEST_NAME or one_line(name) != name:
        raise ValueError(
            f"name={value!r} of a setting must be a text of one line, with 1 to {LONGEST_NAME} characters that can be "
            "shown."
        )
    if name in (BASE, MAJORITY):
        raise ValueError(f"name={name!r} is that of a row which every table has. Choose another name for the setting.")
    return name


def _about_reference(label: str, name: str, labels: Sequence[str]) -> str:
    if name in labels:
        return f"The setting {label!r} refers to {name!r}, which is the method of several settings. Give one a name."
    return (
        f"The setting {label!r} refers to {name!r}, which is no setting of this comparison."
        f"{did_you_mean(name, labels)} Expected one of {', '.join(labels)}."
    )


def _check_braces(settings: Sequence[Setting], labels: Sequence[str]) -> None:
    """Refuse a teacher that is called like a setting and is none: what was meant is that setting's result."""
    for setting in settings:
        teacher = setting.arguments.get("teacher_model")
        if teacher in labels and teacher not in OTHER_TEACHERS:
            raise ValueError(
                f"The setting {setting.label!r} has teacher_model={teacher!r}, which is the name of a setting. Write "
                f"teacher_model={{{teacher}}} to learn from its result, or ./{teacher} for a folder."
            )
