"""Dialogue: generate the assistant's next turn."""

from __future__ import annotations

from random import Random

from left_trainer.embedded import grammar
from left_trainer.tasks.registry import register_task
from left_trainer.tasks.task import HubDataset, Task

SPEAKERS = ("User", "Assistant")


def response_row(rng: Random) -> dict[str, str]:
    """A generated dialogue, one turn per line, up to one of the assistant's turns."""
    turns = grammar.dialogue(rng)
    n_before = rng.randrange(1, len(turns), 2)
    lines = [f"{SPEAKERS[i % 2]}: {turn}" for i, turn in enumerate(turns[:n_before])]
    return {"dialogue": "\n".join(lines), "response": turns[n_before]}


register_task(
    Task(
        name="dialogue",
        summary="generate the assistant's next turn in a dialogue",
        source_column="dialogue",
        target_column="response",
        prompt="Dialogue:\n{source}\nAssistant:",
        metrics=("rouge", "bleu", "distinct"),
        main_metric="rougeL",
        max_new_tokens=64,
        generate_row=response_row,
        embedded_splits={"train": 2000, "validation": 100, "test": 100},
        hub_dataset=HubDataset("allenai/prosocial-dialog", "context", "response"),
    )
)
