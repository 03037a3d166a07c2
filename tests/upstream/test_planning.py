"""The internals of torch, transformers, TRL and bitsandbytes that a plan is made with."""

from __future__ import annotations

import inspect
import warnings
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoModelForSeq2SeqLM, BitsAndBytesConfig, MT5Config, modeling_utils

from package_walk import home
from tiny import CONFIGS, tiny_model

aten = torch.ops.aten
OPERATORS = (
    "_coalesce",
    "_index_put_impl_",
    "_local_scalar_dense",
    "_sparse_addmm",
    "_sparse_mm",
    "_to_copy",
    "_to_dense",
    "_unique2",
    "_unsafe_view",
)
ATTENTION_OPERATORS = {
    "_scaled_dot_product_attention_math": (
        "attn_mask",
        "dropout_p",
        "is_causal",
        "dropout_mask",
        "scale",
        "enable_gqa",
    ),
    "_scaled_dot_product_efficient_attention": ("attn_bias", "compute_log_sumexp", "dropout_p", "is_causal", "scale"),
    "_scaled_dot_product_flash_attention": ("dropout_p", "is_causal", "return_debug_mask", "scale"),
    "_scaled_dot_product_flash_attention_for_cpu": ("dropout_p", "is_causal", "attn_mask", "scale"),
}


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        Doubled.modes = torch._C._len_torch_function_stack()
        return 2 * gradient


class Passing(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_that_a_plan_answers_for_is_there(name):
    assert hasattr(aten, name), f"torch has no operator aten.{name} any more, for which {home('known_values')} answers."


@pytest.mark.parametrize(("name", "arguments"), ATTENTION_OPERATORS.items())
def test_a_kernel_of_attention_takes_what_we_pass(name, arguments):
    taken = {argument.name for argument in getattr(aten, name).default._schema.arguments}
    assert not set(arguments) - taken, f"aten.{name} takes {sorted(taken)} now, and {home('device_kernels')} calls it."


def test_operators_on_meta_are_dispatched_with_their_schema():
    with Dispatches() as dispatches:
        x = torch.ones(2, 2, device="meta")
        x.add_(x.view(4).view(2, 2))
    added = dispatches.seen[-1]
    who = f"which {home('StepRecorder')} and {home('known_values')} read"
    assert added._overloadpacket is aten.add_, f"torch's _overloadpacket is not an operator's name any more, {who}."
    assert added._schema.is_mutable, f"torch's _schema does not tell what an operator changes any more, {who}."
    assert added._schema.arguments[0].alias_info.is_write, f"torch's alias_info tells no changed argument, {who}."


def test_a_storage_has_one_address_and_a_view_its_base():
    x = torch.ones(4, device="meta")
    view = x.view(2, 2)
    assert view.untyped_storage()._cdata == x.untyped_storage()._cdata != torch.ones(4).untyped_storage()._cdata, (
        f"torch's _cdata does not tell storages apart any more, by which {home('StepRecorder')} knows them."
    )
    assert view._base is x, f"torch's _base is not the base of a view any more, which {home('_lower')} reads."


def test_sparse_tensors_have_positions_and_values_on_meta():
    who = f"which {home('stored')} and {home('_sparse_mask')} use"
    positions, values = torch.zeros(2, 3, dtype=torch.int64, device="meta"), torch.ones(3, device="meta")
    sparse = torch.sparse_coo_tensor(positions, values, (4, 4), check_invariants=False)._coalesced_(True)
    assert sparse.is_coalesced(), f"torch's _coalesced_ does not say so of a tensor any more, {who}."
    assert sparse._values().shape == (3,), f"torch's _values are not those of a sparse tensor any more, {who}."


def test_trees_of_arguments_are_walked():
    who = f"which {home('known_values')} and {home('Disguise')} use"
    tree = (1, {"x": torch.ones(1)})
    assert len(tree_leaves(tree)) == 2, f"torch's tree_leaves walks no dicts any more, {who}."
    doubled = tree_map_only(torch.Tensor, lambda tensor: 2 * tensor, tree)
    assert doubled[1]["x"] == 2, f"torch's tree_map_only leaves tensors alone now, {who}."


def test_a_backward_pass_leaves_function_modes():
    x = torch.ones(1, requires_grad=True)
    with Passing():
        assert torch._C._len_torch_function_stack() == 1, (
            f"torch's _len_torch_function_stack does not count modes any more, which {home('inside')} reads."
        )
        Doubled.apply(x).backward()
    assert Doubled.modes == 0, (
        f"torch now keeps function modes in backward passes: remove the patches of {home('disguised')}."
    )


def test_the_engine_calls_the_apply_that_is_replaced():
    node = torch.autograd.function.BackwardCFunction
    plain, called = node.apply, []
    x = torch.ones(1, requires_grad=True)
    with patch.object(node, "apply", lambda *args: called.append(1) or plain(*args)):
        Doubled.apply(x).backward()
    assert called, f"torch no longer calls BackwardCFunction.apply in a backward pass, as {home('disguised')} expects."


def test_models_recompute_by_the_checkpoint_that_is_replaced():
    model, called = tiny_model("llama").train(), []
    plain = modeling_utils.checkpoint
    with patch.object(modeling_utils, "checkpoint", lambda *args, **kw: called.append(1) or plain(*args, **kw)):
        model.gradient_checkpointing_enable()
        model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert called, f"transformers no longer calls checkpoint of modeling_utils, which {home('disguised')} replaces."


@pytest.mark.skipif(torch.cuda.is_available(), reason="autocast turns itself off without a GPU alone")
def test_autocast_for_a_gpu_is_turned_off_without_one():
    common = "torch.cuda.amp.common.amp_definitely_not_available"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autocast("cuda", torch.bfloat16):
            is_on = torch.is_autocast_enabled("cuda")
        assert not is_on, (
            f"torch's autocast no longer turns itself off without a GPU: remove the patches of {home('disguised')}."
        )
    with (
        patch(common, return_value=False),
        patch("torch.cuda.is_bf16_supported", return_value=True),
        torch.autocast("cuda", torch.bfloat16),
    ):
        assert torch.is_autocast_enabled("cuda"), f"torch's autocast asks elsewhere now; mend {home('disguised')}."


def test_the_head_of_mt5_is_tied_until_weights_are_loaded():
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(MT5Config(**CONFIGS["t5"], tie_word_embeddings=False))
    assert model.lm_head.weight is model.get_input_embeddings().weight, (
        f"transformers now unties heads by the config: remove {home('has_own_output_head')}."
    )


def test_a_model_names_what_is_not_quantized():
    from transformers.quantizers.base import get_keys_to_not_convert

    model, who = tiny_model("llama"), f"which {home('quantize_on_meta')} reads"
    assert "lm_head" in get_keys_to_not_convert(model), f"get_keys_to_not_convert leaves out the output head, {who}."
    for model_type in ("t5", "llama"):
        assert hasattr(tiny_model(model_type), "_keep_in_fp32_modules"), f"_keep_in_fp32_modules is gone, {who}."


def test_the_loss_of_trl_reads_what_we_set():
    from trl import SFTTrainer

    text = inspect.getsource(SFTTrainer)
    for name in ("_metrics", "_total_train_tokens", "_tp_size", "aux_loss_enabled"):
        assert f"self.{name}" in text, f"SFTTrainer reads no {name} any more, which {home('_as_sft_trainer')} sets."


def test_a_4_bit_weight_is_made_of_packed_elements():
    nn = pytest.importorskip("bitsandbytes").nn.modules
    taken = inspect.signature(nn.Params4bit.__new__).parameters
    passed = {
        "requires_grad",
        "quant_state",
        "blocksize",
        "compress_statistics",
        "quant_type",
        "bnb_quantized",
        "module",
    }
    assert not passed - set(taken), f"Params4bit takes {list(taken)} now, and {home('_pack')} passes {sorted(passed)}."
    assert BitsAndBytesConfig(load_in_4bit=True).bnb_4bit_use_double_quant is False


def test_a_backward_pass_has_a_number():
    seen = []
    x = torch.ones(1, requires_grad=True)
    y = 2 * x
    y.register_hook(lambda _: seen.append(torch._C._current_graph_task_id()))
    y.backward()
    seen.append(torch._C._current_graph_task_id())
    assert seen[0] >= 0 > seen[1], (
        f"torch's _current_graph_task_id does not tell a backward pass any more, by which {home('StepWatch')} knows it."
    )


def test_the_engine_adds_no_gradients_in_place_under_a_dispatch_mode():
    x = torch.ones(4, requires_grad=True)
    with Dispatches() as dispatches:
        (x.exp() + x.sin()).sum().backward()
    assert aten.add.Tensor in dispatches.seen[-3:], (
        f"torch adds gradients in place under a dispatch mode now: {home('_end_of_sum')} can go, with its call."
    )
