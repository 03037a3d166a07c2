"""Hold plans of memory against published measurements: `python benchmarks/memory_plan.py [peft|founding]`.

`peft` plans the runs of PEFT's method comparison on MetaMathQA as that comparison trains: a plain loop, a base in
bfloat16, adapters in float32, full logits, AdamW. What it publishes is `torch.cuda.max_memory_reserved`, so that what
the allocator holds is planned. One length stands for the longest batch of all runs. `founding` plans the five runs of
the table that this project began with, mt0-large in float32, with the trainer's fast paths off.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from transformers import LlamaConfig, MT5Config

from left_trainer import LeftTrainingArguments, plan_training
from left_trainer.fast_path_args import STEP_SWITCHES
from left_trainer.models import auto_class
from left_trainer.planning import known_values
from left_trainer.planning.disguise import disguised
from left_trainer.planning.known_values import on_meta
from left_trainer.planning.rehearsal import BatchShape, tensors_of_state
from left_trainer.recording.allocator import held_bytes
from left_trainer.recording.modules import ModuleTracker
from left_trainer.recording.recorder import Recording, StepRecorder
from left_trainer.recording.storage_bytes import CUDA

PUBLISHED = Path(__file__).parents[2] / "shared" / "published" / "peft_metamathqa.jsonl"
GIB, MIB = 2**30, 2**20
# Found on plain LoRA's row, one of 33: PEFT's data hold up to 768 tokens a row and do not say which batch was longest.
LONGEST_ROW = 702
LLAMA_3B = LlamaConfig(
    vocab_size=128256,
    hidden_size=3072,
    num_hidden_layers=28,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=8192,
    tie_word_embeddings=True,
    max_position_embeddings=131072,
)
MT0_LARGE = MT5Config(
    vocab_size=250112,
    d_model=1024,
    d_kv=64,
    d_ff=2816,
    num_layers=24,
    num_decoder_layers=24,
    num_heads=16,
    feed_forward_proj="gated-gelu",
    name_or_path="bigscience/mt0-large",
    attn_implementation="eager",  # T5 had no other in 2023
)
FOUNDING_MIB = {"lora": 9392, "prompt_tuning": 9768, "p_tuning": 9800, "prefix_tuning": 6144, "ia3": 9658}


def plan_plain_loop(row: dict[str, Any], length: int) -> Recording:
    """A step of PEFT's own training loop, on shapes."""
    features = BatchShape(row["batch_size"], 0, length).features(False, LLAMA_3B.vocab_size)
    tracker = ModuleTracker()
    recorder = StepRecorder("meta", CUDA.rounding, known_values.compute, tracker)
    with disguised(torch.device("cpu")), recorder, torch.device("meta"):
        model: Any = auto_class("decoder_only").from_config(LLAMA_3B, dtype=torch.bfloat16)
        config = peft_config(row)
        model = get_peft_model(model, config) if config else model
    tracker.add(model)
    with disguised(torch.device("cuda")), recorder, tracker:
        if row["optimizer"] == "lora-fa":
            optimizer = create_lorafa_optimizer(model, r=config.r, lora_alpha=config.lora_alpha, lr=1e-4)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        model.train()
        recorder.label_model(model)
        recorder.recording.operations.clear()  # those that build the model are not of the step
        recorder.begin("forward")
        outputs = model(**{name: on_meta(tensor) for name, tensor in features.items()})
        recorder.begin("backward")
        torch.autograd.backward(outputs.loss)  # the loop keeps the outputs, logits included, up to the next step
        tracker.leave_backward()
        recorder.label_model(model)
        recorder.begin("optimizer")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recorder.label(tensors_of_state(optimizer), "optimizer state")
    return recorder.recording


def published_rows(only: str = "") -> list[dict[str, Any]]:
    """PEFT's runs, those with `only` in their name."""
    rows = [json.loads(line) for line in PUBLISHED.read_text().splitlines()]
    return [row for row in rows if only in row["experiment"]]


def peft_config(row: dict[str, Any]) -> Any:
    """The config of a published run; fields of later versions of PEFT are left out."""
    given = dict(row["peft_config"] or {})
    if "peft_type" not in given:
        return None
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[given.pop("peft_type")]
    known = {item.name for item in dataclasses.fields(config_class)}
    return config_class(**{"task_type": "CAUSAL_LM", **{name: each for name, each in given.items() if name in known}})


def compare_with_peft(length: int, only: str) -> None:
    pairs = []
    print(f"{'run':48} {'measured':>9} {'planned':>9} {'error':>7}   GiB, rows of {length} tokens")
    for row in published_rows(only):
        planned = held_bytes(plan_plain_loop(row, length), CUDA.workspaces)
        measured = row["memory_max_bytes"]
        pairs.append((measured, planned))
        error = planned / measured - 1
        print(f"{row['experiment'][:48]:48} {measured / GIB:9.2f} {planned / GIB:9.2f} {error:+7.1%}", flush=True)
    if len(pairs) < 2:
        return
    errors = sorted(abs(planned / measured - 1) for measured, planned in pairs)
    print(f"median error {statistics.median(errors):.1%}, largest {errors[-1]:.1%}, Spearman {spearman(pairs):.3f}")


def compare_with_founding_table() -> None:
    print(f"{'method':16} {'measured':>9} {'planned':>9} {'error':>7}   MiB")
    for method, measured in FOUNDING_MIB.items():
        args = LeftTrainingArguments(
            output_dir="unused",
            peft_method=method,
            peft_kwargs={"r": 8} if method == "lora" else {"num_virtual_tokens": 20} if method != "ia3" else None,
            per_device_train_batch_size=8,
            **dict.fromkeys(STEP_SWITCHES, False),
            report_to="none",
        )
        plan = plan_training(MT0_LARGE, args, source_tokens=128, target_tokens=8)
        planned = (plan.held_bytes + CUDA.context_bytes) / MIB
        print(f"{method:16} {measured:9} {planned:9.0f} {planned / measured - 1:+7.1%}", flush=True)


def spearman(pairs: list[tuple[int, int]]) -> float:
    """Correlation of ranks; ties do not occur in bytes."""
    ranks = [{value: rank for rank, value in enumerate(sorted(side))} for side in zip(*pairs, strict=True)]
    n = len(pairs)
    distance = sum((ranks[0][left] - ranks[1][right]) ** 2 for left, right in pairs)
    return 1 - 6 * distance / (n * (n * n - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", nargs="?", choices=["peft", "founding"], default="peft")
    parser.add_argument(
        "--length", type=int, default=LONGEST_ROW, help="tokens of the longest row (default: %(default)s)"
    )
    parser.add_argument("--only", default="", help="runs whose name has this in it")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.table == "peft":
        compare_with_peft(options.length, options.only)
    else:
        compare_with_founding_table()


if __name__ == "__main__":
    main()
