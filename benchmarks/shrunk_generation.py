"""How much faster is generation with half of the decoder layers?

    python benchmarks/shrunk_generation.py
    python benchmarks/shrunk_generation.py --shapes llama_small --pairs 7

Random weights, greedy decoding of rows of one length. The whole model and the one that lost layers take turns in one
process. The vocabulary, whose head costs the same on both sides, can be set with `--words`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import torch
from races import BART_BASE, LLAMA_SMALL, MT5_SMALL, Shape
from side import FIRST_ORDINARY_TOKEN, SEED, random_model
from transformers import PreTrainedModel

from left_trainer.compression.removal import kept_whole, remove_parts
from left_trainer.runs.measurements import machine_name

WANTED = 1.5
SHAPES = {"mt5_small": MT5_SMALL, "bart_base": BART_BASE, "llama_small": LLAMA_SMALL}
RESULTS = Path(__file__).parent / "results" / "shrunk_generation.json"


def shrunk(shape: Shape) -> PreTrainedModel:
    """The model without every second layer of its decoder."""
    model = random_model(shape, torch.float32, "cpu")
    kept = kept_whole(model)
    remove_parts(model, dataclasses.replace(kept, layers={**kept.layers, "decoder": kept.layers["decoder"][::2]}))
    return model


def seconds_of(model: PreTrainedModel, ids: torch.Tensor, tokens: int) -> float:
    """Of one `generate`."""
    start = time.perf_counter()
    model.generate(ids, do_sample=False, num_beams=1, min_new_tokens=tokens, max_new_tokens=tokens)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--words", type=int, default=32_000, help="of each vocabulary")
    parser.add_argument("--pairs", type=int, default=5, help="turns of each side that count")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--source_length", type=int, default=64)
    parser.add_argument("--target_length", type=int, default=64)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    records = {}
    for name in options.shapes:
        shape = dataclasses.replace(SHAPES[name], config={**SHAPES[name].config, "vocab_size": options.words})
        sides = [random_model(shape, torch.float32, "cpu").eval(), shrunk(shape).eval()]
        generator = torch.Generator().manual_seed(SEED)
        size = (options.batch_size, options.source_length)
        ids = torch.randint(FIRST_ORDINARY_TOKEN, options.words, size, generator=generator)
        turns = [[seconds_of(model, ids, options.target_length) for model in sides] for _ in range(options.pairs + 1)]
        whole, half = zip(*turns[1:], strict=True)  # the first is a warm-up
        ratios = [before / after for before, after in zip(whole, half, strict=True)]
        speed = statistics.median(ratios)
        rows = [options.batch_size / statistics.median(seconds) for seconds in (whole, half)]
        reached = "reached" if speed >= WANTED else "missed"
        print(
            f"{name}: {rows[0]:.2f} rows a second, with half of the decoder layers {rows[1]:.2f}; {speed:.2f} times as "
            f"fast ({min(ratios):.2f} to {max(ratios):.2f}); {WANTED} wanted: {reached}",
            flush=True,
        )
        records[name] = {"seconds": {"whole": whole, "half": half}, "median": speed, "wanted": WANTED}
    settings = {key: value for key, value in vars(options).items() if key not in ("results", "shapes")}
    content = {"shapes": records, "settings": settings, "machine": machine_name()}
    options.results.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
