"""What PEFT's comparison measures as memory, at one length and at many: `python benchmarks/peft_loop_on_gpu.py`.

`accelerator_memory_max` of that comparison is `torch.cuda.max_memory_reserved`: what the allocator holds, and not what
tensors take. This trains Llama-3.2-3B, with random weights, in the same loop (a base in bfloat16, 4 rows a step, AdamW,
the allocator's cache emptied every 10 steps), first with rows of one length, then with rows of many lengths up to that
one, sorted in buckets of 80 rows as PEFT's loader does, and prints allocated and reserved memory of both. The GPU needs
40 GiB for full fine-tuning and 24 for the rest.
"""

from __future__ import annotations

import argparse
import gc
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from memory_plan import LLAMA_3B, peft_config, plan_plain_loop, published_rows
from peft import get_peft_model
from peft.optimizers import create_lorafa_optimizer

from left_trainer.models import auto_class
from left_trainer.planning.rehearsal import BatchShape
from left_trainer.recording.storage_bytes import CUDA
from left_trainer.recording.timeline import peak

GIB = 2**30
RUNS = (
    "lora--llama-3.2-3B-rank32",
    "lora--llama-3.2-3B-rank32-lorafa",
    "prefixtuning--llama-3.2-3B-lr_0.001",
    "ln_tuning--llama-3.2-3B-default",
    "prompt_tuning--llama-3.2-3B-lr_0.001",
    "full-finetuning--llama-3.2-3B-lr_0.00001",
)
BUCKET = 20  # batches
MEAN_LOG, SPREAD_LOG = 5.22, 0.5  # of the lengths of MetaMathQA's rows: 210 tokens on average


def lengths(longest: int, n_batches: int, rows: int, seed: int = 0) -> list[int]:
    """The longest row of each batch, as buckets give them."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n_batches * rows, generator=generator)
    every = (MEAN_LOG + SPREAD_LOG * noise).exp().clamp(16, longest).int()
    every[:rows] = longest
    buckets = every.split(BUCKET * rows)
    return [int(batch[0]) for bucket in buckets for batch in bucket.sort(descending=True).values.split(rows)]


def counters() -> dict[str, int]:
    """Of the allocator; they begin anew."""
    torch.cuda.synchronize()
    read = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    torch.cuda.reset_peak_memory_stats()
    return read


def train(row: dict[str, Any], sequence: list[int]) -> dict[str, int]:
    """The most memory of steps on batches of these lengths."""
    config = peft_config(row)
    with torch.device("cuda"):
        model: Any = auto_class("decoder_only").from_config(LLAMA_3B, dtype=torch.bfloat16)
    model = get_peft_model(model, config) if config else model
    if row["optimizer"] == "lora-fa":
        optimizer: Any = create_lorafa_optimizer(model, r=config.r, lora_alpha=config.lora_alpha, lr=1e-6)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    model.train()
    torch.cuda.empty_cache()
    counters()
    for step, length in enumerate(sequence, 1):
        features = BatchShape(row["batch_size"], 0, length).features(False, LLAMA_3B.vocab_size)
        optimizer.zero_grad()
        outputs = model(**{name: tensor.cuda() for name, tensor in features.items()})
        outputs.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        outputs.loss.item()
        if step % 10 == 0:
            torch.cuda.empty_cache()
    return counters()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=572, help="of the longest row (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="on many lengths (default: %(default)s)")
    parser.add_argument("--only", default="", help="runs whose name has this in it")
    parser.add_argument("--output", type=Path, default=Path("peft_loop_on_gpu.json"), help="(default: %(default)s)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    found = {}
    print(f"{'run':40} {'planned':>8} {'one length':>19} {'many lengths':>19} {'published':>9}   GiB")
    for row in published_rows(options.only):
        name = row["experiment"]
        if name not in RUNS:
            continue
        planned = peak(plan_plain_loop(row, options.length)).n_bytes + CUDA.workspace_bytes
        one = train(row, [options.length] * 4)
        gc.collect()
        many = train(row, lengths(options.length, options.steps, row["batch_size"]))
        gc.collect()
        found[name] = {"planned": planned, "one": one, "many": many, "published": row["memory_max_bytes"]}
        sizes = (one["allocated"], one["reserved"], many["allocated"], many["reserved"], row["memory_max_bytes"])
        print(f"{name[:40]:40} {planned / GIB:8.2f} " + " ".join(f"{size / GIB:9.2f}" for size in sizes), flush=True)
        options.output.write_text(json.dumps(found, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
