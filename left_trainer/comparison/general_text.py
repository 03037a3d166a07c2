"""How well a model still continues general text, of which the task's data has none: what fine-tuning made it forget."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

from datasets import Dataset

from left_trainer.data.loading import SPECIAL_TOKENS, cut_to_tokens, length_limit
from left_trainer.embedded import grammar
from left_trainer.models import unwrapped
from left_trainer.trainer import LeftTrainer

N_PASSAGES = 100
MAX_WORDS = 120
MIN_WORDS = 8
RESERVED_POSITIONS = 64  # for the virtual tokens of any method, so that all see the same text
PARAGRAPH_END = re.compile(r"\n\s*\n|<\|endoftext\|>")


def general_rows(file: str | None) -> Dataset:
    """Passages cut in the middle: the first half is the prompt, the second the completion, for both model families.

    Args:
        file: Plain text, a passage to a paragraph; paragraphs are parted by empty lines. Of a long file, passages
            from all of it are taken. `None` takes generated English news.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It has no paragraph of at least 8 words.
    """
    passages = _generated() if file is None else _paragraphs(file)
    return Dataset.from_list([_halves(words) for words in passages])


def general_loss(trainer: LeftTrainer, rows: Dataset) -> float:
    """Mean loss of the completions in nats per token.

    Prompt and completion are cut to half of the model's positions each.
    """
    tokenizer, config = trainer.processing_class, unwrapped(trainer.model).config
    limit = max(length_limit(config, tokenizer, None, RESERVED_POSITIONS) // 2 - SPECIAL_TOKENS, MIN_WORDS)
    rows = rows.map(lambda row: {name: cut_to_tokens(text, tokenizer, limit) for name, text in row.items()})
    return trainer.evaluate_loss(rows, metric_key_prefix="general")


def _generated() -> list[list[str]]:
    rng = Random("general text")
    return [grammar.news_item(rng).body.split() for _ in range(N_PASSAGES)]


def _paragraphs(file: str) -> list[list[str]]:
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"general_text_file={file!r} does not exist. Check the path; it is read from {Path.cwd()}."
        )
    paragraphs = [part.split()[:MAX_WORDS] for part in PARAGRAPH_END.split(path.read_text(encoding="utf-8"))]
    usable = [words for words in paragraphs if len(words) >= MIN_WORDS]
    if not usable:
        raise ValueError(
            f"general_text_file={file!r} has no paragraph of at least {MIN_WORDS} words. Pass plain text with empty "
            "lines between paragraphs."
        )
    step = max(1, len(usable) // N_PASSAGES)
    return usable[::step][:N_PASSAGES]


def _halves(words: list[str]) -> dict[str, str]:
    middle = len(words) // 2
    return {"prompt": " ".join(words[:middle]), "completion": " " + " ".join(words[middle:])}
