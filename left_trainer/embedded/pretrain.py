"""Make the embedded models: `python -m left_trainer.embedded.pretrain --family encoder_decoder --output_dir DIR`.

The corpus is endless and comes from the seeded grammar; no text contains a task's prompt. Training has two phases. In
the first a model learns the language and to find things in a text. In the second it learns that a sentinel marks what
has to be found, and that a text without one goes on:

- Encoder-decoder: gap sentences (Zhang et al., 2020, PEGASUS, arXiv 1912.08777, section 3.1) and span corruption
  (Raffel et al., 2020, arXiv 1910.10683, section 3.1.4); then also the continuation of a text without a gap.
- Decoder-only: the next token of passages; then gaps filled at the end of a passage (Bavarian et al., 2022, arXiv
  2207.14255), and the next token of unrelated texts in a row.

A phase that has been finished in DIR is not run again; the last one holds the model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import IterableDataset
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    set_seed,
)

from left_trainer.embedded import grammar

VOCABULARY_SIZE = 2048
N_SENTINELS = 16
SENTINELS = [f"<extra_id_{i}>" for i in range(N_SENTINELS)]


def passage(rng: Random) -> list[str]:
    """A passage of the corpus, as its segments: a news item, a dialogue, a sentence pair or a review.

    The last segment of each follows from the others, so that filling it in teaches to read them.
    """
    kind = rng.choices(("news", "dialogue", "pair", "review"), weights=(60, 15, 15, 10))[0]
    if kind == "news":
        item = grammar.news_item(rng)
        return [item.body, item.headline]
    if kind == "dialogue":
        turns = grammar.dialogue(rng)
        return turns[: rng.choice(range(2, len(turns) + 1, 2))]
    if kind == "pair":
        return list(grammar.sentence_pair(rng))
    text, feeling = grammar.review(rng)
    return [text, f"All in all, the impression was {feeling}."]


def train_tokenizer(seed: int, third: str) -> Tokenizer:
    """A byte-level BPE over the corpus: every string has a tokenization, none needs an unknown token.

    Args:
        seed: Of the texts.
        third: The special token beside padding and end.
    """
    rng = Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=["<pad>", "</s>", third, *SENTINELS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(("\n".join(passage(rng)) for _ in range(30_000)), trainer)
    return tokenizer


def build_tokenizer(family: str, seed: int) -> PreTrainedTokenizerFast:
    encoder_decoder = family == "encoder_decoder"
    third = "<unk>" if encoder_decoder else "<s>"  # no text needs it, and CTranslate2 asks for one
    backend = train_tokenizer(seed, third)
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>" if encoder_decoder else "<s> $A",
        special_tokens=[("</s>", 1), (third, 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token=None if encoder_decoder else third,
        unk_token=third if encoder_decoder else None,
        extra_special_tokens=SENTINELS,
        model_max_length=1024,
        padding_side="right" if encoder_decoder else "left",
        clean_up_tokenization_spaces=False,
    )


def build_model(family: str) -> PreTrainedModel:
    if family == "encoder_decoder":
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCABULARY_SIZE,
                d_model=128,
                d_kv=32,
                num_heads=4,
                d_ff=256,
                num_layers=3,
                num_decoder_layers=3,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                decoder_start_token_id=0,
                pad_token_id=0,
                eos_token_id=1,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=5,
            num_attention_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        )
    )


def gap_sentence(segments: list[str], rng: Random) -> tuple[str, str]:
    """One segment is cut out, most often the last; the target is that segment."""
    gap = len(segments) - 1 if rng.random() < 0.7 else rng.randrange(len(segments))
    source = "\n".join(SENTINELS[0] if i == gap else segment for i, segment in enumerate(segments))
    return source, f"{SENTINELS[0]}{segments[gap]}{SENTINELS[1]}"


def span_corruption(segments: list[str], rng: Random) -> tuple[str, str]:
    """About 20 percent of the words, in spans of one to five, are replaced by sentinels."""
    words = "\n".join(segments).split(" ")
    source: list[str] = []
    target: list[str] = []
    position = 0
    while position < len(words):
        n_spans = len(target)
        if n_spans < N_SENTINELS - 1 and rng.random() < 0.08:
            length = rng.randint(1, 5)
            source.append(SENTINELS[n_spans])
            target.append(SENTINELS[n_spans] + " ".join(words[position : position + length]))
            position += length
        else:
            source.append(words[position])
            position += 1
    return " ".join(source), "".join(target) + SENTINELS[len(target)]


def continuation(segments: list[str], rng: Random) -> tuple[str, str]:
    """Two unrelated texts in a row, cut after the first words of the second; the target is what follows."""
    _, text = unrelated_texts(segments, rng)
    first, _, second = text.rpartition("\n")
    words = second.split(" ")
    cut = rng.randrange(1, min(5, len(words)))
    return "\n".join([first, " ".join(words[:cut])]), " ".join(words[cut:])


def plain_text(segments: list[str], rng: Random) -> str:
    """Running text: a whole dialogue, or one segment alone, so that no text shows what its last segment answers."""
    return "\n".join(segments) if len(segments) > 2 else rng.choice(segments)


def whole_passage(segments: list[str], rng: Random) -> tuple[str, str]:
    """All segments in a row, all of them to be predicted."""
    return "", "\n".join(segments)


def unrelated_texts(segments: list[str], rng: Random) -> tuple[str, str]:
    """Running text of two passages in a row, all of it to be predicted."""
    return "", "\n".join(plain_text(part, rng) for part in (segments, passage(rng)))


Objective = Callable[[list[str], Random], tuple[str, str]]


@dataclass(frozen=True)
class Phase:
    """Steps of training with one mixture of objectives, each with its weight."""

    steps: int
    learning_rate: float
    mixture: Mapping[Objective, int]


PHASES = {
    "encoder_decoder": (
        Phase(7000, 2e-3, {gap_sentence: 70, span_corruption: 30}),
        Phase(1500, 1e-3, {gap_sentence: 40, span_corruption: 15, continuation: 45}),
    ),
    "decoder_only": (
        Phase(5000, 2e-3, {whole_passage: 100}),
        Phase(1500, 1e-3, {gap_sentence: 60, unrelated_texts: 40}),
    ),
}


class Corpus(IterableDataset[dict[str, list[int]]]):
    """An endless stream of tokenized training examples of one phase."""

    def __init__(self, family: str, tokenizer: PreTrainedTokenizerFast, phase: Phase, seed: int) -> None:
        self.family, self.tokenizer, self.phase, self.seed = family, tokenizer, phase, seed

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        rng = Random(self.seed)
        objectives, weights = list(self.phase.mixture), list(self.phase.mixture.values())
        while True:
            objective = rng.choices(objectives, weights)[0]
            source, target = objective(passage(rng), rng)
            start = self.tokenizer(source)["input_ids"]
            if self.family == "encoder_decoder":
                yield {"input_ids": start, "labels": self.tokenizer(target)["input_ids"]}
            else:
                end = self.tokenizer(target, add_special_tokens=False)["input_ids"]
                end.append(self.tokenizer.eos_token_id)
                yield {"input_ids": start + end, "labels": [-100] * len(start) + end}


def train_phase(
    model: PreTrainedModel, corpus: Corpus, output_dir: Path, batch_size: int, bf16: bool, seed: int
) -> None:
    """One phase, with its own warm-up and cosine decay; model and tokenizer are saved to `output_dir`."""
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(output_dir / "work"),
            max_steps=corpus.phase.steps,
            per_device_train_batch_size=batch_size,
            learning_rate=corpus.phase.learning_rate,
            warmup_steps=200,
            lr_scheduler_type="cosine",
            weight_decay=0.01,
            logging_steps=100,
            save_strategy="no",
            report_to="none",
            bf16=bf16,
            use_cpu=not torch.accelerator.is_available(),
            seed=seed,
        ),
        train_dataset=corpus,
        data_collator=DataCollatorForSeq2Seq(corpus.tokenizer),
    )
    trainer.train()
    model.config.use_cache = True  # the trainer switched it off
    model.save_pretrained(output_dir)
    corpus.tokenizer.save_pretrained(output_dir)


def main() -> None:
    """Run the phases of one family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=list(PHASES), required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    tokenizer, model = build_tokenizer(args.family, args.seed), build_model(args.family)
    for number, phase in enumerate(PHASES[args.family], 1):
        folder = args.output_dir / f"phase-{number}"
        if (folder / "config.json").is_file():
            model = type(model).from_pretrained(folder)
        else:
            corpus = Corpus(args.family, tokenizer, phase, args.seed + number)
            train_phase(model, corpus, folder, args.batch_size, args.bf16, args.seed)


if __name__ == "__main__":
    main()
