"""Cross-entropy at the output head: ours beside full logits, TRL, Liger and cut-cross-entropy.

    python benchmarks/loss_kernels.py                     # needs a GPU
    python benchmarks/loss_kernels.py --device cpu --tiny # shows that all that are installed agree

Forward and backward with a frozen head, gradients of the hidden states only, as LoRA trains. Each row has a target.
Time is the median of `--repeats` runs, which take turns; memory is what a run needs above its inputs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from side import timed
from torch.nn import functional

from left_trainer.callbacks.memory_counters import memory_counter
from left_trainer.kernels.linear_cross_entropy import linear_cross_entropy
from left_trainer.runs.measurements import machine_name

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-4}


@dataclass(frozen=True)
class Head:
    """An output head and a batch: `rows` target positions of `width`, `words` in the vocabulary."""

    name: str
    rows: int
    width: int
    words: int
    dtype: str = "bfloat16"


HEADS = (
    Head("mt0-large, 8 x 32 targets", 256, 1024, 250_112),
    Head("Llama-3-8B, 4 x 256 targets", 1024, 4096, 128_256),
    Head("Llama-3-8B, 8 x 1024 targets", 8192, 4096, 128_256),
    Head("Gemma-2-2B, 8 x 512 targets", 4096, 2304, 256_000),
)
TINY = (Head("tiny", 64, 32, 500, "float32"),)


def full_logits(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """As transformers computes it: logits in the model's dtype, their float32 copy, cross-entropy."""
    return functional.cross_entropy((hidden @ weight.T).float(), targets)


def ours(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return linear_cross_entropy(hidden, weight, targets).mean


def trl(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """What `SFTTrainer` runs by default, with what it reports of each token (trl 1.16)."""
    from trl.trainer import utils

    outputs = ("log_probs", "entropy", "is_top1")
    size = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    found = utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, size, None, 1.0, outputs)
    return -found[0].mean()


def liger(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, targets)


def cut_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    from cut_cross_entropy import linear_cross_entropy as cut

    return cut(hidden, weight, targets)


LOSSES: Mapping[str, Loss] = {
    "full logits": full_logits,
    "left_trainer": ours,
    "trl": trl,
    "liger": liger,
    "cut-cross-entropy": cut_cross_entropy,
}


def measure(head: Head, device: str, repeats: int) -> dict[str, dict[str, Any]]:
    """Milliseconds, MiB above the inputs and the largest relative error of the gradient of each loss."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, head.dtype)
    options: dict[str, Any] = {"device": device, "generator": generator}
    hidden = torch.randn(head.rows, head.width, **options).to(dtype).requires_grad_()
    weight = (torch.randn(head.words, head.width, **options) * head.width**-0.5).to(dtype)
    targets = torch.randint(head.words, (head.rows,), **options)
    reference = exact_gradient(hidden, weight, targets)
    counter = memory_counter(torch.device(device))
    found: dict[str, dict[str, Any]] = {}

    def run(loss: Loss) -> float:
        hidden.grad = None
        value = loss(hidden, weight, targets)
        value.backward()
        return float(value.detach())

    for name, loss in LOSSES.items():
        try:
            run(loss)
        except Exception as error:  # one that is missing or does not fit must not stop the others
            found[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
            hidden.grad = None
            continue
        run(loss)  # compiled kernels are ready now
        hidden.grad = None
        counter.reset_peak()
        before = counter.current()
        value = run(loss)
        above = counter.peak() - before
        error = float((hidden.grad.double() - reference).norm() / reference.norm())
        found[name] = {"loss": value, "gradient_error": error, "mib": above / 2**20, "seconds": []}
    for _ in range(repeats):
        for name, figures in found.items():
            if "error" not in figures:
                figures["seconds"].append(timed(lambda loss=LOSSES[name]: run(loss))[0])
    counter.close()
    return found


def exact_gradient(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The gradient of the mean in float32 products, rows at a time; `(rows, width)`, float64."""
    gradient = torch.empty(hidden.shape, dtype=torch.float64, device=hidden.device)
    exact_weight = weight.float()
    for first in range(0, len(hidden), 256):
        some = hidden[first : first + 256].detach().float().requires_grad_()
        loss = functional.cross_entropy(some @ exact_weight.T, targets[first : first + 256], reduction="sum")
        (part,) = torch.autograd.grad(loss, some)
        gradient[first : first + 256] = part.double() / len(hidden)
    return gradient


def table(head: Head, found: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures of one head in Markdown."""
    lines = [
        f"\n**{head.name}** ({head.words:,} words, {head.dtype})\n",
        "| loss | ms | MiB above the inputs | value | relative error of the gradient |",
        "|---|---|---|---|---|",
    ]
    for name, figures in found.items():
        if "error" in figures:
            lines.append(f"| {name} | not run: {figures['error']} | | | |")
            continue
        milliseconds = 1000 * statistics.median(figures["seconds"])
        lines.append(
            f"| {name} | {milliseconds:.2f} | {figures['mib']:.0f} | {figures['loss']:.5f} "
            f"| {figures['gradient_error']:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a toy size: shows that they agree, not how fast they are")
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each (default: 20)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("needs a GPU; --device cpu --tiny shows that the losses agree")
    records, wrong = [], []
    for head in TINY if options.tiny else HEADS:
        found = measure(head, options.device, options.repeats)
        print(table(head, found), flush=True)
        records.append({"head": vars(head), "machine": machine_name(), "losses": found})
        wrong += [name for name, figures in found.items() if figures.get("gradient_error", 0) > TOLERANCE[head.dtype]]
    print(f"\n{machine_name()}, torch {torch.__version__}")
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    if wrong:
        sys.exit(f"The gradients of {', '.join(wrong)} are off by more than rounding.")


if __name__ == "__main__":
    main()
