"""What torch and transformers still do that compiled blocks go around, and their names that these use."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.t5.modeling_t5 import T5Attention

from left_trainer.kernels.compiled_blocks import repeated_blocks
from package_walk import home
from tiny import tiny_model


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_the_eager_backend_draws_other_masks_in_the_backward_pass():
    x = torch.ones(100, requires_grad=True)
    dropout = torch.compile(
        lambda x: checkpoint(lambda x: nn.functional.dropout(x) * x, x, use_reentrant=False), backend="eager"
    )
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = dropout(x)
    y.sum().backward()
    is_kept = y.detach() != 0
    assert not torch.equal(x.grad != 0, is_kept), f"torch draws the same masks now: {home('REDRAWN')} can go."


def test_the_attention_of_t5_has_zeros_require_a_gradient():
    source = inspect.getsource(T5Attention.forward)
    assert "position_bias.requires_grad = True" in source, (
        f"T5 can be compiled with checkpointing as it is now: {home('_checkpoint_as_a_whole')} can go."
    )


def test_blocks_keep_the_function_that_checkpoints_them():
    model = tiny_model("t5")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for block in repeated_blocks(model):
        assert block._gradient_checkpointing_func.keywords["use_reentrant"] is False, (
            f"transformers' _gradient_checkpointing_func is another, which {home('_checkpoint_as_a_whole')} reads."
        )


def test_the_compiler_has_its_names():
    who = f"which {home('_Compiler')} uses"
    errors = torch._dynamo.exc
    for name in ("Unsupported", "BackendCompilerFailed", "UserError"):
        assert issubclass(getattr(errors, name), errors.TorchDynamoException), f"torch._dynamo.exc has moved, {who}."
    assert not issubclass(errors.FailOnRecompileLimitHit, errors.TorchDynamoException), f"{home('_Compiler')} names it."
    for name in ("optimize_ddp", "skip_fwd_side_effects_in_bwd_under_checkpoint"):
        assert hasattr(torch._dynamo.config, name), f"torch._dynamo.config has no {name} any more, {who}."
