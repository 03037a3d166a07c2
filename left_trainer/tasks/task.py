"""The record that describes one task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from string import Formatter

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class HubDataset:
    """A data set of the hub that suits a task, and what to read from it.

    Args:
        name: What a user writes in `--dataset_name`.
        source_column: Column that a model reads; a dot goes into a nested one, `translation.en`.
        target_column: Column that a model writes.
        config_name: Its configuration.
    """

    name: str
    source_column: str
    target_column: str
    config_name: str | None = None


@dataclass(frozen=True)
class Task:
    """What the data look like and how the result is judged. One frozen record per task.

    Args:
        name: What a user writes in `--task`.
        summary: One line for tables.
        source_column: Column that a model reads, unless the user names another.
        target_column: Column that a model writes.
        prompt: Template of the prompt, with `{source}` where the text goes. One form for both model families: an
            encoder-decoder model reads it, a decoder-only model continues it.
        metrics: Names of metrics in `evaluation`.
        main_metric: The score among theirs that stands for quality in tables. Larger is better.
        max_new_tokens: Length limit of what is generated, in tokens.
        num_beams: Beams of the search when generating; 1 is greedy.
        generate_row: Makes one row of the embedded data from a seeded generator; `None` for a task without them.
        embedded_splits: Number of rows in each split of the embedded data: `train`, `validation` and `test`.
        hub_dataset: A data set of the hub that suits; naming it brings its configuration and columns.
        aliases: Further names.
    """

    name: str
    summary: str
    source_column: str
    target_column: str
    prompt: str
    metrics: tuple[str, ...]
    main_metric: str
    max_new_tokens: int
    num_beams: int = 1
    generate_row: Callable[[Random], dict[str, str]] | None = None
    embedded_splits: Mapping[str, int] = field(default_factory=dict)
    hub_dataset: HubDataset | None = None
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_prompt(self.prompt)
        if self.generate_row is not None and set(self.embedded_splits) != set(SPLITS):
            raise ValueError(
                f"embedded_splits={dict(self.embedded_splits)!r} of the task {self.name!r} needs a number of rows for "
                f"each of {', '.join(SPLITS)}, for example {dict.fromkeys(SPLITS, 100)!r}."
            )

    def render(self, source: str, target: str, prompt: str | None = None) -> dict[str, str]:
        """One prompt/completion row. The space between them belongs to the completion, as in BPE tokens."""
        return {"prompt": (prompt or self.prompt).format(source=source), "completion": f" {target.strip()}"}


def check_prompt(prompt: str) -> None:
    """Raise `ValueError` unless `prompt` has the field `{source}` and no other."""
    try:
        fields = [name for _, name, _, _ in Formatter().parse(prompt) if name is not None]
    except ValueError as error:
        raise ValueError(f"prompt={prompt!r} is not a template: {error}. Write braces as {{{{ and }}}}.") from error
    if fields != ["source"]:
        raise ValueError(
            f"prompt={prompt!r} has the fields {fields}; it needs {{source}} once and no other. "
            "For example: 'Summarize: {source}\\nSummary:'."
        )
