"""Fixtures of the tests of exports."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True)
def without_garbage_collection(monkeypatch):
    """Converters collect garbage after each layer, which takes most of the time of a tiny model's export."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
