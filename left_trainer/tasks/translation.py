"""Translation: translate a text into another language."""

from __future__ import annotations

from random import Random

from left_trainer.embedded import grammar
from left_trainer.tasks.registry import register_task
from left_trainer.tasks.task import HubDataset, Task


def pair_row(rng: Random) -> dict[str, str]:
    """A generated English sentence and its French translation."""
    english, french = grammar.sentence_pair(rng)
    return {"source": english, "target": french}


register_task(
    Task(
        name="translation",
        summary="translate a text into another language",
        source_column="source",
        target_column="target",
        prompt="Translate: {source}\nTranslation:",
        metrics=("bleu", "chrf"),
        main_metric="chrf",
        max_new_tokens=64,
        num_beams=4,
        generate_row=pair_row,
        embedded_splits={"train": 2000, "validation": 100, "test": 100},
        hub_dataset=HubDataset("Helsinki-NLP/opus_books", "translation.en", "translation.fr", config_name="en-fr"),
    )
)
