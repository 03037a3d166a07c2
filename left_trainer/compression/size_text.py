"""A size in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class HasSize(Protocol):
    """Numbers of blocks, neurons and heads, by stack."""

    @property
    def layers(self) -> Mapping[str, int]: ...

    @property
    def ffn(self) -> Mapping[str, int]: ...

    @property
    def heads(self) -> int | None: ...


def described(before: HasSize, after: HasSize) -> str:
    """`4+4 layers, ffn 512 -> 3+4 layers, ffn 384`: what two sizes differ in."""
    differing = [pair for pair in zip(_shown(before), _shown(after), strict=True) if pair[0] != pair[1]]
    return " -> ".join(", ".join(texts) for texts in zip(*differing, strict=True)) or "the same size"


def _shown(size: HasSize) -> tuple[str, str, str]:
    layers, widths = ("+".join(str(number) for number in each) for each in (size.layers.values(), _widths(size)))
    return _counted(layers, "layer"), f"ffn {widths}", _counted(str(size.heads), "head")


def _counted(number: str, noun: str) -> str:
    return f"{number} {noun}" if number == "1" else f"{number} {noun}s"


def _widths(size: HasSize) -> list[int]:
    widths = list(size.ffn.values())
    return widths if len(set(widths)) > 1 else widths[:1]
