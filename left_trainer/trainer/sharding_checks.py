"""What can be refused, before any weight is loaded, of runs whose weights are sharded."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from left_trainer.training_args import LeftTrainingArguments

if TYPE_CHECKING:
    from left_trainer.trainer.checks import Request

# What is asked for, and what to do instead, in the error about a method.
SHARDED = (
    "a model whose weights are sharded (FSDP, DeepSpeed ZeRO-3)",
    "start with recipes/accelerate/ddp.yaml, so that each process holds the whole model, or choose another",
)


def uses_fsdp(args: LeftTrainingArguments) -> bool:
    """Whether FSDP is asked for, by the arguments or by `accelerate launch`."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def uses_deepspeed(args: LeftTrainingArguments) -> bool:
    """Whether DeepSpeed is asked for, by the arguments or by `accelerate launch`."""
    return bool(args.deepspeed) or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def shards_weights(args: LeftTrainingArguments) -> bool:
    """Whether a process holds a part of the weights only: FSDP, and stage 3 of DeepSpeed's ZeRO."""
    return uses_fsdp(args) or is_deepspeed_zero3_enabled()


def check_sharding(request: Request) -> None:
    """Refuse what does not go together with sharded weights.

    Raises:
        ValueError: FSDP of version 1, or a quantized base.
    """
    args = request.args
    if not shards_weights(args):
        return
    version = (args.fsdp_plugin_args or {}).get("fsdp_version") or os.environ.get("FSDP_VERSION", "1")
    if uses_fsdp(args) and int(version) != 2:
        raise ValueError(
            f"FSDP of version {version} is asked for, which flattens weights, so that most methods cannot train theirs "
            "apart from the base. Use version 2: fsdp_config={'version': 2}, or for `accelerate launch` "
            "`fsdp_version: 2` in the config file (recipes/accelerate/fsdp2.yaml), or --fsdp_version 2."
        )
    if request.is_quantized:
        raise ValueError(
            "The base model is quantized, and FSDP or DeepSpeed ZeRO-3 would shard its weights, which has not been "
            "tried. Load it unquantized, or run processes that each hold the quantized model: accelerate launch "
            "--config_file recipes/accelerate/ddp.yaml."
        )
