"""The record that describes one task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from string import Formatter

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class HubDataset:
    """A Hub dataset for a task, with the columns to read.

    Args:
        name: Name of the dataset, as in `--dataset_name`.
        source_column: Column that the model reads. A dot selects a nested column, `translation.en`.
        target_column: Column that the model writes.
        config_name: Configuration of the dataset.
    """

    name: str
    source_column: str
    target_column: str
    config_name: str | None = None


@dataclass(frozen=True)
class Task:
    """Format of the data and metrics of a task. One frozen record per task.

    Args:
        name: Name of the task, as in `--task`.
        summary: One line for tables.
        source_column: Column that the model reads, unless the user passes another.
        target_column: Column that the model writes, unless the user passes another.
        prompt: Template of the prompt, with `{source}` in place of the text. The same for both model families: an
            encoder-decoder model reads the prompt, a decoder-only model continues it.
        metrics: Names of metrics in `evaluation`.
        main_metric: The score of these metrics that is shown as quality in tables.
        max_new_tokens: Maximum length of the generated text, in tokens.
        num_beams: Number of beams for generation; 1 is greedy decoding.
        generate_row: Makes one row of the embedded data from a seeded generator; `None` for a task without such data.
        embedded_splits: Number of rows in each split of the embedded data: `train`, `validation` and `test`.
        hub_dataset: A Hub dataset for the task. If the user passes its name, its configuration and columns are used.
        aliases: Other names.
        lower_is_better: Scores of these metrics of which less is better. Error rates of the Hub, such as `wer`, `cer`
            and `perplexity`, are known and need not be listed.
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
    lower_is_better: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_prompt(self.prompt)
        if self.generate_row is not None and set(self.embedded_splits) != set(SPLITS):
            raise ValueError(
                f"embedded_splits={dict(self.embedded_splits)!r} of the task {self.name!r} needs a number of rows for "
                f"each of {', '.join(SPLITS)}, for example {dict.fromkeys(SPLITS, 100)!r}."
            )

    def render(self, source: str, target: str, prompt: str | None = None) -> dict[str, str]:
        """One prompt/completion row. The space between them is part of the completion, as in BPE tokens."""
        return {"prompt": (prompt or self.prompt).format(source=source), "completion": f" {target.strip()}"}


def check_prompt(prompt: str) -> None:
    """Raise `ValueError` unless `{source}` is the only field of `prompt`."""
    try:
        parts = [part for part in Formatter().parse(prompt) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"prompt={prompt!r} is not a template: {error}. Write braces as {{{{ and }}}}.") from error
    fields = [name for _, name, _, _ in parts]
    formatted = any(form or conversion for _, _, form, conversion in parts)
    if fields != ["source"] or formatted:
        if fields == ["source"]:
            raise ValueError(
                f"prompt={prompt!r} formats its field. Write {{source}} and nothing more between the braces."
            )
        raise ValueError(
            f"prompt={prompt!r} has the fields {fields}; it needs {{source}} once and no other. "
            "For example: 'Summarize: {source}\\nSummary:'."
        )
