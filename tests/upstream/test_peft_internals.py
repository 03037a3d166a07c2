"""The internals of PEFT that left_trainer overrides or imports."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PolyConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from torch import nn

from package_walk import home
from tiny import tiny_model

# What PEFT has to call for our tuners to be heard, with the arguments that they take.
OVERRIDDEN = {
    "_prepare_adapter_config": ("peft_config", "model_config"),
    "_prepare_model": ("peft_config", "model"),
    "_check_target_module_exists": ("peft_config", "key"),
    "_create_and_replace": (
        "peft_config",
        "adapter_name",
        "target",
        "target_name",
        "parent",
        "current_key",
        "parameter_name",
    ),
    "_replace_module": ("parent", "child_name", "new_module", "child"),
    "_check_merge_allowed": (),
    "_unload_and_optionally_merge": ("merge", "progressbar", "safe_merge", "adapter_names"),
    "_remove_adapter_name_from_key": ("key", "adapter_name"),
}


def config() -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])


@pytest.fixture(scope="module")
def calls(tmp_path_factory) -> dict[str, list[inspect.BoundArguments]]:
    """What wrapping, saving, loading and merging call on a tuner."""
    seen: dict[str, list[Any]] = {name: [] for name in OVERRIDDEN}
    patch = pytest.MonkeyPatch()

    def record(name: str) -> None:
        kind, original = inspect.getattr_static(LoraModel, name), getattr(LoraModel, name)
        is_method = not isinstance(kind, (staticmethod, classmethod))
        parameters = [inspect.Parameter(each, 1, default=None) for each in OVERRIDDEN[name]]

        def call(*args: Any, **kwargs: Any) -> Any:
            seen[name].append(inspect.Signature(parameters).bind(*args[is_method:], **kwargs))
            return original(*args, **kwargs)

        patch.setattr(LoraModel, name, call if is_method else staticmethod(call))

    for name in OVERRIDDEN:
        record(name)
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(tiny_model("llama"), config()).save_pretrained(folder)
    PeftModel.from_pretrained(tiny_model("llama"), folder).merge_and_unload()
    patch.undo()
    return seen


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_peft_calls_what_our_tuners_override(name, calls):
    assert calls[name], f"PEFT no longer calls a tuner's {name}, which our tuners override, such as {home(name)}."


def test_putting_a_module_back_needs_a_weight():
    tuner, parent, child = get_peft_model(tiny_model("llama"), config()).base_model, nn.Module(), Layer()
    is_put_back = False
    with contextlib.suppress(AttributeError):
        BaseTuner._replace_module(tuner, parent, "child", nn.Sequential(), child)
        is_put_back = True
    assert not is_put_back, (
        f"PEFT now unloads layers around modules without a weight: remove _replace_module of "
        f"{home('BottleneckModel')} and of {home('PTuningV2Model')}."
    )


class Layer(nn.Module, BaseTunerLayer):
    adapter_layer_names = ("parts",)

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Sequential(nn.Linear(2, 2, dtype=torch.float64))
        self.parts = nn.ModuleDict({"default": nn.Linear(2, 2)})

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        weight = next(base_layer.parameters())
        return weight.device, weight.dtype


def test_an_adapter_follows_what_a_layer_says_of_its_base():
    layer = Layer()
    layer._move_adapter_to_device_of_base_layer("default")
    assert layer.parts["default"].weight.dtype == torch.float64, (
        "PEFT's _move_adapter_to_device_of_base_layer no longer asks _get_base_layer_device_and_dtype, which "
        f"{home('_get_base_layer_device_and_dtype')} and the other layers override."
    )


def test_a_layer_keeps_its_active_adapters_where_we_set_them():
    layer = Layer()
    layer._active_adapter = ["first", "second"]
    assert layer.active_adapters == ["first", "second"], (
        f"PEFT's layers no longer keep their active adapters in _active_adapter, which {home('SelectiveLayer')} and "
        f"{home('PTuningV2Layer')} set."
    )


def test_new_names_of_methods_are_refused():
    is_refused = False
    try:
        register_peft_method(name="no_such_method", config_cls=LoraConfig, model_cls=LoraModel)
    except ValueError:
        is_refused = True
    assert is_refused, f"PEFT now registers new names: remove {home('peft_type')}."


# Imports that are no public API: module, name, who uses it, and the parameters that we pass.
IMPORTS: list[tuple[str, str, str, tuple[str, ...]]] = [
    ("peft.tuners.tuners_utils", "BaseTuner", "SelectiveModel", ("model", "peft_config", "adapter_name")),
    ("peft.tuners.tuners_utils", "BaseTunerLayer", "SelectiveLayer", ()),
    ("peft.tuners.tuners_utils", "check_target_module_exists", "SelectiveModel", ("config", "key")),
    ("peft.tuners.tuners_utils", "check_adapters_to_merge", "SelectiveLayer", ("module", "adapter_names")),
    ("peft.tuners.adaption_prompt.layer", "AdaptedAttention", "_without_tuner", ()),
    ("peft.tuners.adaption_prompt.layer", "AdaptedAttentionGPT", "_without_tuner", ()),
    ("peft.tuners.lora", "LoraLayer", "lora_layers", ()),
    ("peft.tuners.adalora.layer", "SVDLinear", "_factors", ()),
    ("peft.tuners.lora", "Linear", "FusedLinear", ()),
    ("peft.tuners.lora.bnb", "Linear4bit", "_fused_quantized", ()),
    ("peft.tuners.lora.bnb", "Linear8bitLt", "_fused_quantized", ()),
    ("peft.tuners.lora.config", "CordaConfig", "initialize_corda", ("corda_method",)),
    ("peft.tuners.lora.config", "LoraGAConfig", "initialize_lora_ga", ()),
    ("peft.tuners.lora.corda", "preprocess_corda", "initialize_corda", ("model", "lora_config", "run_model")),
    ("peft.tuners.lora.loraga", "preprocess_loraga", "initialize_lora_ga", ("model", "lora_config", "train_step")),
    ("peft.utils.loftq_utils", "_SafetensorLoader", "initialize_loftq", ("peft_model", "model_path")),
    ("peft.utils.other", "AuxiliaryTrainingWrapper", "parameter_owners", ()),
    ("peft.utils.other", "TrainableTokensWrapper", "has_adapter", ()),
    ("peft.utils.other", "transpose", "_add_initial_adapter", ("weight", "fan_in_fan_out")),
]


@pytest.mark.parametrize(("module", "name", "user", "parameters"), IMPORTS, ids=[name for _, name, *_ in IMPORTS])
def test_what_we_import_is_there_and_takes_what_we_pass(module, name, user, parameters):
    if module.endswith("bnb"):
        pytest.importorskip("bitsandbytes")
    place = home(user)
    found: Callable[..., Any] | None = getattr(importlib.import_module(module), name, None)
    assert found is not None, f"{module} has no {name} any more, which {place} uses."
    taken = [each for each in inspect.signature(found).parameters if each != "self"]
    assert not set(parameters) - set(taken), f"{name} takes {taken} now, and {place} passes {list(parameters)}."


def test_the_types_of_adaption_prompts_are_a_mapping():
    from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG

    assert {"llama", "mistral", "gpt2"} <= set(TRANSFORMERS_MODEL_CONFIG), (
        f"PEFT's TRANSFORMERS_MODEL_CONFIG no longer maps model types, which {home('every_layer')} reads."
    )


def test_a_router_of_poly_is_called_with_tasks_and_rows():
    from peft.tuners.poly.router import PolyRouter

    model, passed = get_peft_model(tiny_model("t5"), PolyConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q"])), []
    for module in model.modules():
        if isinstance(module, PolyRouter):
            module.register_forward_pre_hook(lambda _, args, kwargs: passed.append(kwargs), with_kwargs=True)
    ids = torch.tensor([[5, 6]])
    model(input_ids=ids, labels=ids, task_ids=torch.zeros(1, dtype=torch.long))
    assert passed, f"PEFT's Poly has no PolyRouter any more, which {home('repeat_task_ids')} hooks."
    assert {"task_ids", "input_ids"} <= set(passed[0]), (
        f"PEFT's PolyRouter is no longer called with task_ids and input_ids, which {home('repeat_task_ids')} changes."
    )


def test_names_of_an_adapter_are_converted_for_transformers():
    """What PEFT does to a file before it loads it; our comparison of names has to do the same."""
    model = get_peft_model(tiny_model("llama"), config())
    state = get_peft_model_state_dict(model)
    converted = convert_peft_adapter_state_dict_for_transformers(model, model.active_peft_config, state, "default")
    assert set(converted) == set(state), f"PEFT converts names in another way: see {home('_differences')}."
