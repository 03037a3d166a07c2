"""Summarization: generate a short summary of a document."""

from __future__ import annotations

from random import Random

from left_trainer.embedded import grammar
from left_trainer.tasks.registry import register_task
from left_trainer.tasks.task import HubDataset, Task


def news_row(rng: Random) -> dict[str, str]:
    """A generated news item and its headline."""
    item = grammar.news_item(rng)
    return {"document": item.body, "summary": item.headline}


register_task(
    Task(
        name="summarization",
        summary="generate a short summary of a document",
        source_column="document",
        target_column="summary",
        prompt="Summarize: {source}\nSummary:",
        metrics=("rouge", "bleu", "chrf", "exact_match"),
        main_metric="rougeL",
        max_new_tokens=64,
        generate_row=news_row,
        embedded_splits={"train": 4000, "validation": 100, "test": 100},
        hub_dataset=HubDataset("abisee/cnn_dailymail", "article", "highlights", config_name="3.0.0"),
    )
)
