"""The Hugging Face hub: copies of adapters that it holds, and its refusals in words that say what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

ADAPTER_CONFIG_FILE = "adapter_config.json"
# Which version of a repository, and how it is read.
OF_THE_REPOSITORY = ("revision", "subfolder")
ACCESS = ("token", "cache_dir", "local_files_only")
# Of a repository with an adapter: what training wrote beside it, and weights of whole models.
NOT_OF_AN_ADAPTER = (
    "*checkpoint*/*", "runs/*", "wandb/*", "*.png", "optimizer.*", "model*.safetensors", "pytorch_model*.bin", "*.gguf",
    "*.onnx", "*.h5", "*.msgpack",
)  # fmt: skip
A_TOKEN = (
    "pass a token that may: `hf auth login`, the environment variable HF_TOKEN, or --token "
    "(model_init_kwargs={'token': ...} in Python)"
)
NEITHER = {
    "model": "is neither a directory with a config.json nor the name of a model on the Hugging Face hub",
    "dataset": "is neither a folder nor the name of a data set on the Hugging Face hub",
    "space": "is neither a metric of ours nor the name of one on the Hugging Face hub",
}
PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}
NOT_IN_CACHE = (OfflineModeIsEnabled, LocalEntryNotFoundError)
# Whatever library carries the requests of `huggingface_hub`.
CONNECTION_LIBRARIES = ("httpx", "httpcore", "requests", "urllib3", "aiohttp")

Kind = Literal["model", "dataset", "space"]


class HubRefusalError(ValueError):
    """The hub does not give what was asked for, or cannot be asked; the message says what to do."""


def is_hub_name(name: str) -> bool:
    """Whether the hub can have a repository of this name, and no file or folder here is called so."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


@contextlib.contextmanager
def asking_hub(argument: str, name: str, kind: Kind = "model", revision: str | None = None) -> Iterator[None]:
    """Turn what libraries raise inside, where the hub is the cause, into an error that says what to do.

    Args:
        argument: That holds the name, for the message.
        name: Of the repository.
        kind: Of the repository.
        revision: That was asked for.

    Raises:
        HubRefusalError: In place of what the hub's client raises.
    """
    try:
        yield
    except Exception as error:  # libraries wrap the hub's errors in errors of many classes
        reason = why_refused(error, name, kind, revision)
        if reason is None:
            raise
        raise HubRefusalError(f"{argument}={name!r} {reason}") from error


def why_refused(error: BaseException, name: str, kind: Kind = "model", revision: str | None = None) -> str | None:
    """What the hub says and what to do, as the end of a sentence about `name`; `None` where it is not the cause."""
    causes = list(_causes(error))
    url = f"{constants.ENDPOINT}/{PREFIXES[kind]}{name}"
    for cause in causes:
        if isinstance(cause, GatedRepoError):
            return f"is for those whom its owner lets in: ask for access at {url}, then {A_TOKEN}."
        if isinstance(cause, RevisionNotFoundError):
            return f"has no revision {revision!r}: pass a branch, a tag or a commit of those at {url}/commits/main."
        if isinstance(cause, RepositoryNotFoundError):
            return (
                f"{NEITHER[kind]} that may be read from here, {url}: check the name, and for a private one {A_TOKEN}."
            )
    answered = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    if answered is not None:
        is_without_file = isinstance(answered, EntryNotFoundError)
        return None if is_without_file else _about_status(answered.response.status_code, url)
    if any(isinstance(cause, NOT_IN_CACHE) for cause in causes) and constants.is_offline_mode():
        return (
            f"{NEITHER[kind]} whose files are all in its cache, and HF_HUB_OFFLINE=1 keeps from asking for them: load "
            "it once with HF_HUB_OFFLINE=0, or pass a folder."
        )
    if any(type(cause).__module__.startswith(CONNECTION_LIBRARIES) for cause in causes):
        return (
            f"is no folder here, and could not be read from {url}, as the connection failed: check both and start "
            "again. Files that have arrived whole are kept."
        )
    return None


def _about_status(status: int, url: str) -> str:
    if status == 401:
        return (
            f"was asked for with a token that {constants.ENDPOINT} does not know: pass another one, or log in again "
            "with `hf auth login`."
        )
    if status == 403:
        return f"is closed to this token, for reading or for writing: give it the permission, or {A_TOKEN}."
    if status == 429:
        return (
            f"could not be read, as {constants.ENDPOINT} had too many requests from here (429): wait some minutes and "
            "start again, with a token, for which the limit is higher. Files that have arrived whole are kept."
        )
    return f"could not be read: {url} answered {status}. Start again later. Files that have arrived whole are kept."


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def adapter_folder(name: str, options: Mapping[str, Any], argument: str = "model") -> str | None:
    """A local copy of the adapter that the hub has under `name`; `None` where `name` is a path or a whole model's.

    Args:
        name: As the user wrote it.
        options: `revision` and `subfolder` of the adapter, and access: `token`, `cache_dir`, `local_files_only`.
        argument: That holds the name, for errors.

    Raises:
        HubRefusalError: The hub refuses, or cannot be asked.
    """
    if not is_hub_name(name):
        return None
    access = {key: options[key] for key in ACCESS if options.get(key) is not None}
    revision, inside = options.get("revision"), options.get("subfolder") or None
    with asking_hub(argument, name, revision=revision):
        try:
            hf_hub_download(name, ADAPTER_CONFIG_FILE, revision=revision, subfolder=inside, **access)
        except EntryNotFoundError:  # a whole model's; or the hub cannot be asked, and the cache may hold one
            return None
    patterns = [f"{inside}/{pattern}" for pattern in NOT_OF_AN_ADAPTER] if inside else list(NOT_OF_AN_ADAPTER)
    with asking_hub(argument, name, revision=revision):
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=[f"{inside}/*"] if inside else None,
            ignore_patterns=patterns,
            **access,
        )
    return str(Path(folder) / inside) if inside else folder


def check_readable(argument: str, name: str, kind: Kind, revision: str | None, token: str | None) -> None:
    """Ask the hub whether the files of a repository may be read, where a library does not say why it read none.

    Raises:
        HubRefusalError: They may not, or the hub cannot be asked.
    """
    if is_hub_name(name):
        with asking_hub(argument, name, kind, revision), contextlib.suppress(RemoteEntryNotFoundError):
            hf_hub_download(name, "README.md", repo_type=kind, revision=revision, token=token)


def used_folder(name: str, options: Mapping[str, Any], argument: str = "model") -> str:
    """`name`, or the local copy of the adapter that the hub has under it.

    Raises:
        HubRefusalError: As `adapter_folder`.
    """
    return adapter_folder(name, options, argument) or name
