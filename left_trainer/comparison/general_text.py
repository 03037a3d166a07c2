"""How well a model still continues general text, of which the task's data has none: what fine-tuning made it forget."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from left_trainer.data.prompts import SPECIAL_TOKENS, cut_to_tokens, length_limit
from left_trainer.data.text_files import read_lines
from left_trainer.embedded import grammar
from left_trainer.models import unwrapped
from left_trainer.trainer import LeftTrainer

N_PASSAGES = 100
MAX_WORDS = 120
MIN_WORDS = 8
LONGEST_WORD = 15  # characters on average; where they are longer, text is written without spaces
RESERVED_POSITIONS = 64  # for the virtual tokens of any method, so that all see the same text
LEAST_READ = 0.5  # of the characters of a text that its tokens have to hold
PARAGRAPH_END = re.compile(r"\n\s*\n|<\|endoftext\|>")
TEXT_KEY = "text"


def general_rows(file: str | None) -> Dataset:
    """Passages cut in the middle: the first half is the prompt, the second the completion, for both model families.

    Args:
        file: Text in any lines. Paragraphs, which empty lines part, are passages: short ones are joined with those that
            follow, long ones are cut into several, and empty lines do not matter. Of a long file, passages from all of
            it are taken. A file that ends in `.jsonl` has a JSON object on each line, whose field `text` is a
            paragraph. In text without spaces, characters count as words. `None` takes generated English news.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is not UTF-8, or no such JSON, or has fewer than 8 words.
    """
    passages = _generated() if file is None else _passages(file)
    return Dataset.from_list([_halves(passage) for passage in passages])


def readable_rows(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The rows whose texts a tokenizer can hold; of letters that it lacks it makes unknown tokens, or none."""

    def is_read(text: str) -> bool:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        kept = tokenizer.decode(ids, skip_special_tokens=True).replace(tokenizer.unk_token or "\0", "")
        return len("".join(kept.split())) >= LEAST_READ * len("".join(text.split()))

    return rows.filter(lambda row: all(map(is_read, row.values())))


def why_unreadable(file: str | None, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why there is no general loss with this tokenizer; `None` where there is one. Raises as `general_rows` does."""
    if len(readable_rows(general_rows(file), tokenizer)):
        return None
    text = "generated English text" if file is None else repr(file)
    return f"the tokenizer lacks the letters of {text}. Pass --general_text_file with text that the model reads."


def general_loss(trainer: LeftTrainer, rows: Dataset) -> float:
    """Mean loss of the completions in nats per token.

    Prompt and completion are cut to half of the model's positions each.
    """
    tokenizer, config = trainer.processing_class, unwrapped(trainer.model).config
    limit = max(length_limit(config, tokenizer, None, RESERVED_POSITIONS) // 2 - SPECIAL_TOKENS, MIN_WORDS)
    rows = rows.map(lambda row: {name: cut_to_tokens(text, tokenizer, limit) for name, text in row.items()})
    return trainer.evaluate_loss(rows, metric_key_prefix="general")


@dataclass(frozen=True)
class Passage:
    """Words, or characters where there are no spaces, and what stands between them."""

    words: tuple[str, ...]
    separator: str


def _generated() -> list[Passage]:
    rng = Random("general text")
    return [Passage(tuple(grammar.news_item(rng).body.split()), " ") for _ in range(N_PASSAGES)]


def _passages(file: str) -> list[Passage]:
    lines = read_lines("general_text_file", file)
    paragraphs = _texts_of_json(lines, file) if file.endswith(".jsonl") else PARAGRAPH_END.split("\n".join(lines))
    found = list(_joined_and_cut(*_words(list(paragraphs))))
    if not found:
        raise ValueError(
            f"general_text_file={file!r} has no paragraph of at least {MIN_WORDS} words, nor several that have as many "
            "together. Pass more text."
        )
    step = max(1, len(found) // N_PASSAGES)
    return found[::step][:N_PASSAGES]


def _texts_of_json(lines: list[str], file: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield str(json.loads(line)[TEXT_KEY])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"Line {number} of general_text_file={file!r} is no JSON object with the field {TEXT_KEY!r}. Write "
                    '{"text": "..."} on each line, or pass plain text in a file that does not end in .jsonl.'
                ) from error


def _words(paragraphs: list[str]) -> tuple[list[list[str]], str]:
    """The words of each paragraph and what stands between them; characters where the text has no spaces."""
    words = [paragraph.split() for paragraph in paragraphs]
    lengths = [len(word) for paragraph in words for word in paragraph]
    if lengths and statistics.fmean(lengths) > LONGEST_WORD:
        return [list("".join(paragraph)) for paragraph in words], ""
    return words, " "


def _joined_and_cut(paragraphs: Iterable[list[str]], separator: str) -> Iterator[Passage]:
    """Passages of 8 to 120 words: what is too short waits for more, what is left over at an end is left out."""
    waiting: list[str] = []
    for paragraph in paragraphs:
        waiting = [*waiting, *paragraph]
        if len(waiting) < MIN_WORDS:
            continue
        parts = [waiting[start : start + MAX_WORDS] for start in range(0, len(waiting), MAX_WORDS)]
        yield from (Passage(tuple(part), separator) for part in parts if len(part) >= MIN_WORDS)
        waiting = []


def _halves(passage: Passage) -> dict[str, str]:
    words, separator = passage.words, passage.separator
    middle = len(words) // 2
    return {
        "prompt": separator.join(words[:middle]),
        "completion": separator + separator.join(words[middle:]),
    }
