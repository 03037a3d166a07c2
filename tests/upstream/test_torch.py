"""The internals of torch and of the standard library that left_trainer uses, and what torch still warns about."""

from __future__ import annotations

import argparse
import enum
import inspect
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from package_walk import home

HOOKS = {
    "_forward_hooks": "register_forward_hook",
    "_forward_pre_hooks": "register_forward_pre_hook",
    "_backward_hooks": "register_full_backward_hook",
    "_backward_pre_hooks": "register_full_backward_pre_hook",
}


@pytest.mark.parametrize(("name", "register"), HOOKS.items())
def test_modules_keep_their_hooks_in_dicts(name, register):
    module = nn.Linear(2, 2)
    assert not getattr(module, name, True), (
        f"torch's {name} is not empty without hooks, which {home('has_torch_hooks')} reads."
    )
    getattr(module, register)(lambda *args: None)
    assert getattr(module, name), f"torch's {name} holds no hooks any more, which {home('has_torch_hooks')} reads."


def test_modules_keep_their_parameters_in_a_dict():
    module = nn.Linear(2, 2, bias=False)
    assert module._parameters == {"weight": module.weight, "bias": None}, (
        f"torch's _parameters is no longer the dict of a module's parameters, which {home('own_parameters')} reads."
    )


def test_a_compiled_module_is_known_by_its_call(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, *args, **kwargs: call)
    module = nn.Linear(2, 2)
    who = f"by which {home('why_not_at_output_head')} knows a compiled module"
    assert module._compiled_call_impl is None, f"torch's _compiled_call_impl is no longer None at first, {who}."
    module.compile()
    assert module._compiled_call_impl is not None, f"torch's compile does not set _compiled_call_impl any more, {who}."


def test_a_change_in_place_raises_the_version_of_a_tensor():
    x = torch.zeros(2)
    before = x._version
    x.add_(1)
    assert x._version > before, (
        f"torch's _version does not count changes in place any more, which {home('_cast')} reads."
    )


def test_the_memory_of_a_gpu_can_be_recorded():
    memory, who = torch.cuda.memory, f"which {home('MemoryProfilerCallback')} uses"
    for name in ("_record_memory_history", "_dump_snapshot"):
        assert hasattr(memory, name), f"torch.cuda.memory has no {name} any more, {who}."
    inspect.signature(memory._dump_snapshot).bind("memory_snapshot.pickle")
    if torch.cuda.is_available():
        memory._record_memory_history(max_entries=10)
        memory._record_memory_history(enabled=None)


def test_pinned_memory_without_an_accelerator_is_warned_of():
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(DataLoader([torch.zeros(1)], pin_memory=True))
    assert any("pin_memory" in str(warning.message) for warning in caught), (
        "torch no longer warns of pinned memory without an accelerator: remove dataloader_pin_memory from "
        f"{home('LeftTrainingArguments')}."
    )


def test_a_parser_keeps_its_defaults_where_we_clear_them():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.set_defaults(seed=2, other=3)
    parser._defaults.clear()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    assert vars(parser.parse_args([])) == {}, (
        f"argparse keeps defaults elsewhere than in _defaults and _actions, which {home('parse_flags')} clears."
    )


def test_an_enum_finds_a_member_that_is_added_as_its_own_are():
    class Kind(str, enum.Enum):  # noqa: UP042
        LORA = "LORA"

    member = str.__new__(Kind, "NEW")
    member._name_, member._value_ = "NEW", "NEW"
    Kind._member_map_["NEW"] = Kind._value2member_map_["NEW"] = member
    Kind._member_names_.append("NEW")
    type.__setattr__(Kind, "NEW", member)
    assert Kind("NEW") is Kind["NEW"] is Kind.NEW is list(Kind)[-1], (
        f"Python's enums keep their members elsewhere now, to which {home('peft_type')} adds."
    )


def test_torch_save_does_not_tell_why_it_could_not_write():
    with pytest.raises(RuntimeError) as found:
        torch.save(torch.zeros(2**16), "/dev/full")
    assert not isinstance(found.value, OSError), f"torch.save raises OSError now: remove {home('OF_TORCH_SAVE')}."


def test_dropout_on_a_cpu_keeps_a_number_per_element():
    x, kept = torch.randn(8, 8, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        nn.functional.dropout(x, 0.5)
    assert any(each.dtype == x.dtype for each in kept), (
        f"torch's dropout keeps bytes: remove {home('compact_dropout')}."
    )
