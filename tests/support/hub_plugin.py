"""A plugin of pytest, `-p hub_plugin`: the tests that it runs with have a hub of their own.

`huggingface_hub` reads `HF_ENDPOINT` when it is imported, so that this has to come before the tests' own `conftest.py`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import tempfile
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from hub import Hub, serving

_stack = contextlib.ExitStack()
atexit.register(_stack.close)
HUB = _stack.enter_context(serving(Hub()))
HOME = _stack.enter_context(tempfile.TemporaryDirectory())
os.environ.update(HF_ENDPOINT=HUB.address, HF_HOME=HOME, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1")
for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(name, None)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub. Nothing goes wrong in it at first, and clients do not wait before they ask again."""
    from huggingface_hub import file_download
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http, "time", SimpleNamespace(**{**vars(_http.time), "sleep": lambda seconds: None}))
    monkeypatch.setattr(file_download, "time", _http.time)
    HUB.requests.clear()
    yield HUB
    HUB.cut.clear()
    HUB.limited = HUB.broken = 0
