"""Tokens and passwords: which arguments hold them, and how they stay out of what is saved or shown.

They travel by the environment, as `HF_TOKEN`, which the hub's client reads and child processes inherit.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

TOKEN_VARIABLE = "HF_TOKEN"
HUB_TOKENS = ("token", "hub_token", "push_to_hub_token", "use_auth_token")
HIDDEN = "***"
LEAST_LENGTH = 6  # of a value that is looked for in texts: a shorter one is a word of them
# Whole names of arguments, and ends of names. `pad_token` and the like are tokens of a vocabulary.
SECRET_NAME = re.compile(
    r"token|key|sig|authorization|cookie"
    r"|.*(?:auth|hub|hf|access|api|bearer|session|refresh|sas|security)[_-]?token"
    r"|.*(?:access|api|account|auth|private|secret)[_-]?key"
    r"|.*(?:password|passwd|secret|credentials?|connection_string|signature)",
    re.IGNORECASE,
)
URL_LOGIN = re.compile(r"(?<=://)[^\s/?#'\"@]+(?:@[^\s/?#'\"@]+)*@")
URL_PARAMETER = re.compile(r"(?<=[?&])([\w.-]+)=([^\s&#'\"]+)")
TOKEN_OF_THE_HUB = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_seen: set[str] = set()


def is_secret(name: str) -> bool:
    """Whether an argument of this name holds a token, a password or a key."""
    return SECRET_NAME.fullmatch(name) is not None


def without_secrets(value: Any) -> Any:
    """A copy of `value` that may be saved: secret texts in dicts are left out, others are `masked`, at any depth."""
    if type(value) is str:
        return masked(value)
    if isinstance(value, dict):
        return {name: without_secrets(item) for name, item in value.items() if not _is_secret_item(name, item)}
    if type(value) in (list, tuple):
        return type(value)(without_secrets(item) for item in value)
    return value


def masked(text: str) -> str:
    """`text` with `***` for logins and tokens in its URLs, for tokens of the hub, and for every value `remember`ed.

    `https://user:password@host/data?token=abc` becomes `https://***@host/data?token=***`.
    """
    for value in sorted({*_seen, os.environ.get(TOKEN_VARIABLE, "").strip()}, key=len, reverse=True):
        if len(value) >= LEAST_LENGTH:
            text = text.replace(value, HIDDEN)
    text = URL_LOGIN.sub(f"{HIDDEN}@", text)
    text = URL_PARAMETER.sub(lambda found: f"{found[1]}={HIDDEN if is_secret(found[1]) else found[2]}", text)
    return TOKEN_OF_THE_HUB.sub(HIDDEN, text)


def remember(arguments: Mapping[str, Any]) -> None:
    """Let `masked` know the secrets in `arguments` from now on: an upstream error may repeat them."""
    _seen.update(_secrets(arguments))


def take_tokens(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`arguments` without tokens of the hub, which become `HF_TOKEN` of this process and of those that it starts.

    Raises:
        ValueError: The tokens differ: the environment has room for one.
    """
    remember(arguments)
    tokens = {item for name, item in _items(arguments) if name in HUB_TOKENS and isinstance(item, str)}
    if len(tokens) > 1:
        raise ValueError(
            f"Several tokens are given, as {', '.join(HUB_TOKENS[:2])} or in model_init_kwargs. The runs of a "
            "comparison all get one, by the environment: pass one that may read everything they load."
        )
    for token in tokens:
        os.environ[TOKEN_VARIABLE] = token
    return without_hub_tokens(arguments)  # type: ignore[no-any-return]


def without_hub_tokens(value: Any) -> Any:
    """A copy of `value` without the entries of `HUB_TOKENS`, at any depth, in JSON objects of flags too."""
    if isinstance(value, Mapping):
        return {name: without_hub_tokens(item) for name, item in value.items() if name not in HUB_TOKENS}
    content = _json_object(value)
    if content is None:
        return value
    public = without_hub_tokens(content)
    return value if public == content else json.dumps(public)


def shown_command(words: Sequence[str]) -> str:
    """A command line as it may be shown and recorded."""
    return shlex.join(public_words(words))


def public_words(words: Sequence[str]) -> list[str]:
    """The words of a command line without the flags that hold secrets, and without secrets in JSON or URLs."""
    kept: list[str] = []
    is_value_of_secret = False
    for word in words:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if is_secret(flag.lstrip("-").replace("-", "_")):
            is_value_of_secret = not equals
        elif not flag and is_value_of_secret:
            is_value_of_secret = False
        else:
            is_value_of_secret = False
            kept.append(f"{flag}{equals}{_public(value)}")
    return kept


def _public(text: str) -> str:
    """A value on a command line, which may be a JSON object."""
    content = _json_object(text)
    public = without_secrets(content)
    return masked(text) if public == content else json.dumps(public)


def _json_object(value: Any) -> dict[str, Any] | None:
    """The JSON object that a text is; `None` for any other value."""
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return None
    try:
        return dict(json.loads(value))
    except (ValueError, RecursionError):
        return None


def _is_secret_item(name: Any, item: Any) -> bool:
    return isinstance(name, str) and isinstance(item, str | bytes) and is_secret(name)


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    """Pairs of the dicts in `value`, at any depth, those of JSON objects in texts too."""
    value = _json_object(value) or value
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield name, item
            yield from _items(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _items(item)


def _secrets(arguments: Mapping[str, Any]) -> Iterator[str]:
    for name, item in _items(arguments):
        if _is_secret_item(name, item):
            yield str(item).strip()
        elif isinstance(item, str):
            yield from (login.rstrip("@").rpartition(":")[2] for login in URL_LOGIN.findall(item))
            yield from (value for key, value in URL_PARAMETER.findall(item) if is_secret(key))
