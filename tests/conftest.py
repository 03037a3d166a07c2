"""Fixtures of all tests; the functions and models that they share with the tests are in support/."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import os
import shutil
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CI", "1")  # keeps TRL from reporting usage
# The user's own is left alone, and is not read. Workers have that of the process that has started them.
os.environ.setdefault("HF_DATASETS_CACHE", f"{tempfile.gettempdir()}/left-trainer-tests-{os.getpid()}")

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import datasets
import jinja2
import pytest
import torch
from datasets import Dataset, disable_progress_bars
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from fork_server import start_server
from left_trainer.models import FAMILIES
from left_trainer.training_args import LeftTrainingArguments
from processes import ENVIRONMENT
from tiny import FAMILY_TYPES, tiny_model, tiny_rows, tiny_tokenizer

disable_progress_bars()
logging.disable_progress_bar()
torch.set_num_threads(1)
# A training of a tiny model spends half its time on these, and no test is about them: datasets hashes what it maps, to
# find the result of an earlier process; accelerate collects garbage; the template of PEFT's model card is compiled for
# each adapter that is saved, and the versions of packages are looked up for each card of ours.
datasets.fingerprint.update_fingerprint = lambda *_: datasets.fingerprint.generate_random_fingerprint()
datasets.arrow_dataset.update_fingerprint = datasets.fingerprint.update_fingerprint
accelerate.utils.memory.gc = SimpleNamespace(collect=lambda: 0)
jinja2.Environment.compile = functools.lru_cache(jinja2.Environment.compile)
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)
importlib.metadata.version = functools.cache(importlib.metadata.version)


def pytest_collection_finish() -> None:
    """Keep what was imported and collected out of every later search for garbage."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """Remove the cache, in the process that has named it."""
    if os.environ["HF_DATASETS_CACHE"].endswith(f"left-trainer-tests-{os.getpid()}"):
        shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture
def rows() -> Dataset:
    return Dataset.from_list(tiny_rows())


@pytest.fixture
def make_args(tmp_path: Path) -> Callable[..., LeftTrainingArguments]:
    """Arguments for a run of a few seconds."""

    def make(**overrides: Any) -> LeftTrainingArguments:
        options: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "seed": 7,
            **overrides,
        }
        return LeftTrainingArguments(**options)

    return make


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {family: tiny_tokenizer(family) for family in FAMILIES}


@pytest.fixture(scope="session")
def saved_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model with its tokenizer on disk, one for each family."""
    paths = {}
    for family, model_type in FAMILY_TYPES.items():
        paths[family] = tmp_path_factory.mktemp(family)
        tiny_model(model_type).save_pretrained(paths[family])
        tiny_tokenizer(family).save_pretrained(paths[family])
    return paths


@pytest.fixture(scope="session")
def python() -> Iterator[str]:
    """What starts a Python process that is tested from outside: an interpreter that has the libraries imported.

    With `TEST_FRESH_PROCESSES=1` it is `sys.executable`, as it is where forking is not safe.
    """
    if os.environ.get("TEST_FRESH_PROCESSES") or sys.platform != "linux" or torch.cuda.is_available():
        yield sys.executable
        return
    # Not below tmp_path: the path of a socket may have some hundred characters.
    with tempfile.TemporaryDirectory() as folder:
        server, executable = start_server(Path(folder), ENVIRONMENT)
        with server:
            yield str(executable)
            server.stdin.close()


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test when weights are loaded: what is tested has to be refused earlier."""

    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded before the check")

    for name in ("load_model", "load_trained"):
        monkeypatch.setattr(f"left_trainer.trainer.preparation.{name}", refuse)
