"""The mechanism behind the registries of methods and tasks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from left_trainer.registry import Registry


@dataclass(frozen=True)
class Record:
    name: str
    aliases: tuple[str, ...] = ()


@pytest.fixture
def registry():
    registry = Registry("record", argument="record")
    for name in ("b", "a"):
        registry.register(Record(name))
    return registry


def test_a_temporary_record_is_taken_out_again(registry):
    before = registry.list()
    with registry.temporarily(Record("c", ("d",))):
        registry.register(Record("e"))
        assert [record.name for record in registry.list()] == ["b", "a", "c", "e"]
        assert registry.get("d").name == "c"
    assert registry.list() == before
    assert registry.find("d") is None


def test_also_after_an_error(registry):
    before = registry.list()
    with pytest.raises(RuntimeError, match="inside"), registry.temporarily(Record("c")):
        raise RuntimeError("inside")
    assert registry.list() == before
    with pytest.raises(ValueError, match="already taken"), registry.temporarily(Record("c"), Record("a")):
        pass
    assert registry.list() == before
