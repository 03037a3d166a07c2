"""Run the blocks of a model as `torch.compile` makes them, and everything around them as it is.

The blocks are the layers that a model repeats. Blocks of one class share what is compiled, so that compiling takes as
long for two of them as for forty. Embeddings, the loss at the output head and what other code does to the model between
its blocks stay outside.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from peft import PeftModel
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from left_trainer.kernels.fast_paths import COMPILED_BLOCKS, FastPath, noted_in_graph
from left_trainer.models import without_adapter
from left_trainer.training_args import LeftTrainingArguments

# Forms of the blocks of a class: stacks, first and other layers, training and evaluation, lengths, masks. torch's 8 are
# too few for T5, whose encoder and decoder have blocks of one class.
MAX_FORMS = 64
CACHED = "the block reads or writes a cache, as generation and prefixes have it do"
REDRAWN = "the backend 'eager' draws other dropout masks when it computes a checkpointed block again"  # torch 2.13
NO_BLOCKS = "the model has no list of blocks"
REPLACED = "the forward pass of the block is replaced, as offloading does"
EXPLANATION = "Explanation: "
ADVICE = "Consider annotating your code using torch._check*(). "

logger = logging.getLogger(__name__)


def compile_options(args: LeftTrainingArguments) -> Mapping[str, Any] | None:
    """Arguments of `torch.compile`, as accelerate takes them from the arguments and the environment.

    `None` where nothing is to be compiled.
    """
    plugin = TorchDynamoPlugin(
        backend=args.torch_compile_backend,
        mode=args.torch_compile_mode,
        dynamic=False if args.torch_compile_backend == "neuron" else None,  # as in transformers
    )
    if plugin.backend == DynamoBackend.NO:
        return None
    return {"backend": plugin.backend.value.lower(), "mode": plugin.mode, "dynamic": plugin.dynamic}


def use_compiled_blocks(
    model: PreTrainedModel | PeftModel, options: Mapping[str, Any] | None, paths: Mapping[str, FastPath]
) -> None:
    """Have the blocks of `model` compiled when they are first called, or as they were.

    A block that torch cannot compile as a whole, without a break, runs as it is, with all others of its class.

    Args:
        model: Changed in place: its blocks get a `forward` of their own, and nothing else.
        options: Of `torch.compile`; `None` to take the compiled blocks out.
        paths: What counts the calls of blocks, and those of the fast paths inside of them.
    """
    run = None if options is None else _Compiler(options, paths).run
    blocks = list(repeated_blocks(without_adapter(model)))
    if run is not None and not blocks:
        paths[COMPILED_BLOCKS].record(NO_BLOCKS)
    for block in blocks:
        if is_compiled(block):
            del block.forward
        if run is None:
            continue
        if "forward" in vars(block):
            paths[COMPILED_BLOCKS].record(REPLACED)
        else:
            block.forward = MethodType(_compiled_forward(run), block)  # copied with the block, unlike a closure of it


def is_compiled(block: nn.Module) -> bool:
    """Whether `block` has what `use_compiled_blocks` gives it."""
    return hasattr(vars(block).get("forward"), "runs_compiled")


def repeated_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The members of lists of modules of one class, or of blocks as transformers has them, but not what one holds.

    A hybrid model, such as Jamba, has blocks of several classes in its list.
    """
    for child in module.children():
        if isinstance(child, nn.ModuleList) and (_are_of_one_class(child) or _are_blocks(child)):
            yield from child
        else:
            yield from repeated_blocks(child)


def _are_of_one_class(modules: nn.ModuleList) -> bool:
    return len({type(module) for module in modules}) == 1


def _are_blocks(modules: nn.ModuleList) -> bool:
    return len(modules) > 0 and all(isinstance(module, GradientCheckpointingLayer) for module in modules)


def _compiled_forward(run: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # pickle finds a method by the name of its function
        return run(self, *args, **kwargs)

    forward.runs_compiled = True  # type: ignore[attr-defined]
    return forward


class _Compiler:
    """Compiles the forward passes of the classes of blocks."""

    def __init__(self, options: Mapping[str, Any], paths: Mapping[str, FastPath]) -> None:
        self.paths = paths
        self.options: dict[str, Any] = {"fullgraph": True, **options}
        if "recompile_limit" in inspect.signature(torch.compile).parameters:  # newer ones of torch
            self.options |= {"recompile_limit": MAX_FORMS, "isolate_recompiles": True}
        self.failed: dict[type[nn.Module], str] = {}

    def run(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The forward pass of `block`."""
        kind = type(block)  # FSDP2 changes it after the blocks were found
        is_checkpointed = block.training and getattr(block, "gradient_checkpointing", False)
        reason = self.failed.get(kind) or (CACHED if _has_cache(args, kwargs) else None)
        reason = reason or (REDRAWN if is_checkpointed and self.options["backend"] == "eager" else None)
        if reason is None:
            if is_checkpointed:
                _checkpoint_as_a_whole(block)
            try:
                with noted_in_graph(self.paths):
                    compiled = _compiled_class(kind, **self.options)  # type: ignore[arg-type]
                    result = compiled(block, *args, **kwargs)
            except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
                reason = self.failed[kind] = _why(error, kind.__name__)
                logger.warning("%s. It runs as without torch_compile.", reason)
        self.paths[COMPILED_BLOCKS].record(reason)
        return kind.forward(block, *args, **kwargs) if reason else result


@functools.cache
def _compiled_class(kind: Any, **options: Any) -> Callable[..., Any]:
    """The forward pass of a class of blocks; made once, so that the models of a search share what is compiled."""
    _configure(torch._dynamo.config)
    compiled: Callable[..., Any] = torch.compile(kind.forward, **options)
    return compiled


def _configure(config: Any) -> None:
    """Have graphs of blocks compiled as they are, and the notes of a checkpointed block made by its forward pass."""
    # It would cut graphs into DistributedDataParallel's buckets, and takes none with a gradient of its own.
    config.optimize_ddp = False
    if hasattr(config, "skip_fwd_side_effects_in_bwd_under_checkpoint"):  # newer ones of torch
        config.skip_fwd_side_effects_in_bwd_under_checkpoint = True


def _checkpoint_as_a_whole(block: nn.Module) -> None:
    """Leave the checkpointing of `block` to itself: what it holds need not know of it.

    T5's attention has a tensor require a gradient that none is used of, for the reentrant form (transformers 5.23).
    """
    options = getattr(block._gradient_checkpointing_func, "keywords", {})
    for part in block.modules():
        if part is not block and getattr(part, "gradient_checkpointing", False):
            part.gradient_checkpointing = bool(options.get("use_reentrant", True))  # type: ignore[assignment]


def _has_cache(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether one of the arguments is a cache of keys and values. Compiled for it, each layer would be a form."""
    return any(isinstance(value, Cache) for value in (*args, *kwargs.values()))


def _why(error: Exception, name: str) -> str:
    """Why blocks of the class `name` are not compiled, in one sentence."""
    if isinstance(error, torch._dynamo.exc.FailOnRecompileLimitHit):
        return f"{name} has more forms than torch.compile makes in a process"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    explained = [line.removeprefix(EXPLANATION) for line in lines if line.startswith(EXPLANATION)]
    why = (explained or lines)[0].removeprefix(ADVICE).partition(" (")[0].partition(". ")[0].removesuffix(".")
    return f"torch cannot compile {name}: {why}"
