"""How much faster is generation with half of the decoder layers?

    python benchmarks/shrunk_generation.py
    python benchmarks/shrunk_generation.py --shapes llama_small --pairs 7

Greedy decoding of rows of one length by the embedded models, and by models with random weights, whose vocabulary can be
set with `--words`: its head costs the same on both sides. The whole model and the one that lost layers take turns in
one process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import torch
from races import BART_BASE, LLAMA_SMALL, MT5_SMALL
from side import FIRST_ORDINARY_TOKEN, SEED, random_model
from transformers import PreTrainedModel

from left_trainer.compression.removal import kept_whole, remove_parts
from left_trainer.embedded import MODEL_NAMES
from left_trainer.models import ModelSource, auto_class
from left_trainer.runs.measurements import machine_name

WANTED = 1.5
SHAPES = {"mt5_small": MT5_SMALL, "bart_base": BART_BASE, "llama_small": LLAMA_SMALL}
RESULTS = Path(__file__).parent / "results" / "shrunk_generation.json"


def whole(name: str, words: int) -> PreTrainedModel:
    """The model of a name."""
    if name in MODEL_NAMES:
        source = ModelSource.of(name)
        return auto_class(source.family).from_pretrained(source.base_name)
    shape = SHAPES[name]
    return random_model(dataclasses.replace(shape, config={**shape.config, "vocab_size": words}), torch.float32, "cpu")


def shrunk(model: PreTrainedModel) -> PreTrainedModel:
    """The model without every second layer of its decoder, beginning with the first."""
    kept = kept_whole(model)
    remove_parts(model, dataclasses.replace(kept, layers={**kept.layers, "decoder": kept.layers["decoder"][1::2]}))
    return model


def seconds_of(model: PreTrainedModel, ids: torch.Tensor, tokens: int) -> float:
    """Of one `generate`."""
    start = time.perf_counter()
    model.generate(ids, do_sample=False, num_beams=1, min_new_tokens=tokens, max_new_tokens=tokens)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=[*MODEL_NAMES, *SHAPES], default=[*MODEL_NAMES, *SHAPES])
    parser.add_argument("--words", type=int, default=32_000, help="of the vocabularies of random models")
    parser.add_argument("--pairs", type=int, default=5, help="turns of each side that count")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--source_length", type=int, default=64)
    parser.add_argument("--target_length", type=int, default=64)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    records = {}
    for name in options.shapes:
        sides = [whole(name, options.words).eval(), shrunk(whole(name, options.words)).eval()]
        generator = torch.Generator().manual_seed(SEED)
        size = (options.batch_size, options.source_length)
        ids = torch.randint(FIRST_ORDINARY_TOKEN, sides[0].config.vocab_size, size, generator=generator)
        turns = [[seconds_of(model, ids, options.target_length) for model in sides] for _ in range(options.pairs + 1)]
        before, after = zip(*turns[1:], strict=True)  # the first is a warm-up
        ratios = [first / second for first, second in zip(before, after, strict=True)]
        speed = statistics.median(ratios)
        rows = [options.batch_size / statistics.median(seconds) for seconds in (before, after)]
        reached = "reached" if speed >= WANTED else "missed"
        print(
            f"{name}: {rows[0]:.2f} rows a second, with half of the decoder layers {rows[1]:.2f}; {speed:.2f} times as "
            f"fast ({min(ratios):.2f} to {max(ratios):.2f}); {WANTED} wanted: {reached}",
            flush=True,
        )
        records[name] = {"seconds": {"whole": before, "half": after}, "median": speed, "wanted": WANTED}
    settings = {key: value for key, value in vars(options).items() if key not in ("results", "shapes")}
    content = {"shapes": records, "settings": settings, "machine": machine_name()}
    options.results.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
