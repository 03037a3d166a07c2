"""Texts that stand for a class."""

from __future__ import annotations

from collections.abc import Iterable


def as_labels(texts: Iterable[str]) -> list[str]:
    """Texts as labels. Case and white space around do not matter: a model has chosen the label all the same."""
    return [text.strip().casefold() for text in texts]
