"""The one mechanism behind the two registries, of methods and of tasks."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from typing import Generic, Protocol, TypeVar

from left_trainer.plugins import load_installed_plugins


class Named(Protocol):
    """A record with a name and further names."""

    @property
    def name(self) -> str: ...

    @property
    def aliases(self) -> tuple[str, ...]: ...


RecordT = TypeVar("RecordT", bound=Named)


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for a near miss, an empty string otherwise."""
    close = difflib.get_close_matches(name.lower().replace("-", "_"), list(allowed), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


class Registry(Generic[RecordT]):
    """Records by name and alias. Whoever looks for one finds those of installed packages too.

    Args:
        kind: What the records are, as it appears in errors: `method`, `task`.
        argument: The user's argument that names one: `peft_method`, `task`.
    """

    def __init__(self, kind: str, argument: str) -> None:
        self.kind, self.argument = kind, argument
        self._records: dict[str, RecordT] = {}

    def register(self, record: RecordT) -> RecordT:
        """Add `record` under its name and aliases. Raises `ValueError` when one of them is taken."""
        names = (record.name, *record.aliases)
        for name in names:
            if name in self._records:
                raise ValueError(
                    f"The {self.kind} name {name!r} of {record!r} is already taken by {self._records[name]!r}. "
                    "Choose another name."
                )
        self._records.update(dict.fromkeys(names, record))
        return record

    @contextlib.contextmanager
    def temporarily(self, *records: RecordT) -> Iterator[None]:
        """Inside, `records` are registered too. Afterwards the registry is what it was before, also after an error.

        What is registered inside by other means is taken out as well. For tests and documentation.
        """
        load_installed_plugins()
        before = dict(self._records)
        try:
            for record in records:
                self.register(record)
            yield
        finally:
            self._records = before

    def get(self, name: str) -> RecordT:
        """The record called `name`. Raises `ValueError`, with the allowed names, when there is none."""
        if self.find(name) is None:
            allowed = [record.name for record in self.list()]
            raise ValueError(
                f"{self.argument}={name!r} is not a known {self.kind}.{did_you_mean(name, self._records)} "
                f"Allowed: {', '.join(allowed)}."
            )
        return self._records[name]

    def find(self, name: str) -> RecordT | None:
        """The record called `name`, or `None`."""
        load_installed_plugins()
        return self._records.get(name)

    def list(self) -> list[RecordT]:
        """Every record once, in the order of registration."""
        load_installed_plugins()
        return list({record.name: record for record in self._records.values()}.values())
