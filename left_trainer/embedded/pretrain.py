"""Make the embedded models: `python -m left_trainer.embedded.pretrain --family encoder_decoder --output_dir DIR`.

The corpus is endless and comes from the seeded grammar. The encoder-decoder model learns to fill in a gap sentence
(Zhang et al., 2020, PEGASUS, arXiv 1912.08777, section 3.1), span corruption (Raffel et al., 2020, arXiv 1910.10683,
section 3.1.4) and to go on with a text. The decoder-only model learns to predict the next token of running text and of
passages whose gap is filled at their end (Bavarian et al., 2022, arXiv 2207.14255). No text contains a task's prompt.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random

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
MAX_CONTINUATION_WORDS = 25
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


def train_tokenizer(seed: int) -> Tokenizer:
    """A byte-level BPE over the corpus: every string has a tokenization, none needs an unknown token."""
    rng = Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=["<pad>", "</s>", "<s>", *SENTINELS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(("\n".join(passage(rng)) for _ in range(30_000)), trainer)
    return tokenizer


def build_tokenizer(family: str, seed: int) -> PreTrainedTokenizerFast:
    backend = train_tokenizer(seed)
    encoder_decoder = family == "encoder_decoder"
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>" if encoder_decoder else "<s> $A",
        special_tokens=[("</s>", 1), ("<s>", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token=None if encoder_decoder else "<s>",
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
    return source, segments[gap]


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
    """Running text, cut at the end of a sentence or between two words; the target is what follows."""
    text = plain_text(segments, rng)
    sentences = re.split(r"(?<=[.?!])\s", text)
    parts = sentences if len(sentences) > 1 and rng.random() < 0.7 else text.split(" ")
    cut = rng.randrange(1, len(parts))
    return " ".join(parts[:cut]), " ".join(" ".join(parts[cut:]).split(" ")[:MAX_CONTINUATION_WORDS])


def plain_text(segments: list[str], rng: Random) -> str:
    """Running text: a whole dialogue, or one segment alone, so that no text shows what its last segment answers."""
    return "\n".join(segments) if len(segments) > 2 else rng.choice(segments)


class Corpus(IterableDataset[dict[str, list[int]]]):
    """An endless stream of tokenized training examples."""

    def __init__(self, family: str, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.family, self.tokenizer, self.seed = family, tokenizer, seed

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        rng = Random(self.seed)
        while True:
            segments = passage(rng)
            if self.family == "encoder_decoder":
                objective = rng.choices((gap_sentence, span_corruption, continuation), weights=(45, 20, 35))[0]
                source, target = objective(segments, rng)
                labels = self.tokenizer(target)["input_ids"]
                yield {"input_ids": self.tokenizer(source)["input_ids"], "labels": labels}
            elif rng.random() < 0.6:
                source, target = gap_sentence(segments, rng)
                start = self.tokenizer(source + SENTINELS[0])["input_ids"]
                end = self.tokenizer(target + SENTINELS[1], add_special_tokens=False)["input_ids"]
                end.append(self.tokenizer.eos_token_id)
                yield {"input_ids": start + end, "labels": [-100] * len(start) + end}
            else:
                text = "\n".join(plain_text(part, rng) for part in (segments, passage(rng)))
                tokens = [*self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id]
                yield {"input_ids": tokens, "labels": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("encoder_decoder", "decoder_only"), required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_steps", type=int, default=8000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    tokenizer = build_tokenizer(args.family, args.seed)
    model = build_model(args.family)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(args.output_dir / "work"),
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            warmup_steps=200,
            lr_scheduler_type="cosine",
            weight_decay=0.01,
            logging_steps=100,
            save_strategy="no",
            report_to="none",
            bf16=args.bf16,
            use_cpu=True,
            seed=args.seed,
        ),
        train_dataset=Corpus(args.family, tokenizer, args.seed + 1),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    model.config.use_cache = True  # the trainer switched it off
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
