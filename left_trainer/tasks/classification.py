"""Classification: generate the label of a text."""

from __future__ import annotations

from random import Random

from left_trainer.embedded import grammar
from left_trainer.tasks.registry import register_task
from left_trainer.tasks.task import HubDataset, Task


def review_row(rng: Random) -> dict[str, str]:
    """A generated review and its sentiment."""
    text, label = grammar.long_review(rng)
    return {"text": text, "label": label}


register_task(
    Task(
        name="classification",
        summary="generate the label of a text",
        source_column="text",
        target_column="label",
        prompt="Classify: {source}\n",
        metrics=("accuracy", "macro_f1"),
        main_metric="accuracy",
        max_new_tokens=8,
        generate_row=review_row,
        embedded_splits={"train": 2400, "validation": 100, "test": 100},
        hub_dataset=HubDataset("cornell-movie-review-data/rotten_tomatoes", "text", "label"),
    )
)
