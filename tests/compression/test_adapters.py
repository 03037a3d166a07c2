"""Every method follows its base model when that loses parts, or is refused with its reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from left_trainer import apply_method, get_method, list_methods
from left_trainer.adapters.residual_base import original_base, remember_initial_adapter
from left_trainer.compression.architecture import architecture_of
from left_trainer.compression.cuts import WRAPPERS, Index, Kept, size_left, spread
from left_trainer.compression.removal import kept_whole, remove_parts, why_not_shrinkable
from left_trainer.compression.sizes import Size, head_size, queries_per_group, size_of
from left_trainer.methods.saving import save_adapter
from left_trainer.models import without_upstream_warnings
from left_trainer.runs.inference import prepare_for_use
from method_settings import settings
from shrinkable import IDS, LABELS, shrinkable, some_parts
from tiny import FAMILY_TYPES

# SHiRA's layers compute with sparse matrices, which torch tells every program of once.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")
# Each method on one of its families, in turn; LoRA on both.
CASES = [
    *(
        (method.name, method.model_families[index % len(method.model_families)])
        for index, method in enumerate(list_methods())
    ),
    *(("lora", family) for family in get_method("lora").model_families),
]
LINEARS = {
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def with_method(name: str, family: str, folder: Any, **options: Any) -> PeftModel | PreTrainedModel:
    """A model with an adapter that does something."""
    record = get_method(name)
    model = shrinkable(FAMILY_TYPES[family])
    peft_kwargs = {**(settings(name, family, folder).get("peft_kwargs") or {}), **options}
    if name == "cpt":
        peft_kwargs |= record.derive_from_data(None, [5, 6, 7])
    model = apply_method(model, name, peft_kwargs, seed=0)
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += (0.1 * torch.randn(weight.shape, generator=generator)).to(weight.dtype)
    return model


def inputs(model: Any) -> dict[str, torch.Tensor]:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    batch = {"input_ids": IDS, "labels": LABELS if base.config.is_encoder_decoder else IDS}
    if isinstance(model, PeftModel) and model.active_peft_config.peft_type in ("POLY", "MULTITASK_PROMPT_TUNING"):
        batch["task_ids"] = torch.zeros(2, dtype=torch.long)
    return batch


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs(model)).logits


def masked_logits(model: Any, kept: Kept) -> torch.Tensor:
    """What is left once the neurons and heads that go reach no layer that reads them."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    architecture, config = architecture_of(base.config), base.config
    size, features = size_of(config), head_size(config) * queries_per_group(config)
    masks = {
        **{
            f"{name}.{architecture.feed_forward_output}": Index(indices, size.ffn[architecture.stack_of(name)])
            for name, indices in kept.neurons.items()
        },
        **{
            f"{name}.{architecture.attention_output}": spread(Index(indices, size.heads), features)
            for name, indices in kept.heads.items()
        },
    }
    handles = []
    for name, module in base.named_modules():
        index = masks.get(WRAPPERS.sub("", name))
        if index is not None and not name.endswith("base_layer"):
            mask = torch.zeros(index.size).index_fill(0, index.kept, 1.0)
            hook = lambda _, args, mask=mask: (args[0] * mask, *args[1:])  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
    try:
        return logits(model)
    finally:
        for handle in handles:
            handle.remove()


def plain_base(model: PeftModel) -> PreTrainedModel:
    """The base model as its own class makes it, with the weights that it had without the adapter."""
    base = model.get_base_model()
    prefix = next(name for name, module in model.named_modules() if module is base)
    with original_base(model):
        state = {
            WRAPPERS.sub("", name.removeprefix(f"{prefix}.")): tensor.clone()
            for name, tensor in model.state_dict().items()
            if "modules_to_save" not in name
        }
    built = type(base)(copy.deepcopy(base.config)).eval()
    built.load_state_dict({name: state[name] for name in built.state_dict()})
    return built


def check_it_loads_again(model: PeftModel, folder: Any) -> None:
    expected = logits(model)
    save_adapter(model, folder)
    with without_upstream_warnings():
        loaded = PeftModel.from_pretrained(plain_base(model), folder)
    prepare_for_use(loaded)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-3, atol=1e-4)


def check_it_trains_on(model: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model.train()(**inputs(model)).loss.backward()
    optimizer.step()
    assert torch.isfinite(logits(model)).all()


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    """The method's own or AdamW, after a step."""
    make = get_method(model.applied_method.name).optimizer
    if make is not None:
        options = dict(get_method(model.applied_method.name).hook_options)
        optimizer = make(model, torch.optim.AdamW, {"lr": 1e-4, "weight_decay": 0.0}, options)
    else:
        optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)
    check_it_trains_on(model, optimizer)
    return optimizer


def refused(model: Any, kept: Kept, feature: str) -> bool:
    """Whether the record refuses `feature`; the model then says why, and stays as it is."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    reason = why_not_shrinkable(model, size_left(base.config, kept))
    record = get_method(model.applied_method.name)
    if reason is None:
        return False
    assert record.unsupported["shrinking" if "shrinking" in record.unsupported else feature] in reason
    with pytest.raises(ValueError, match="peft_method="):
        remove_parts(model, kept)
    return True


@pytest.mark.parametrize(("method", "family"), sorted(set(CASES)))
def test_blocks_go_with_their_part_of_the_adapter(method, family, tmp_path):
    model = with_method(method, family, tmp_path)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    kept = some_parts(base.config, ffn=False, heads=False)
    if refused(model, kept, "shrinking"):
        return
    optimizer = optimizer_of(model)
    remove_parts(model, kept, optimizer)
    if isinstance(model, PeftModel):
        check_it_loads_again(model, tmp_path / "adapter")
    check_it_trains_on(model, optimizer)


@pytest.mark.parametrize(("method", "family"), sorted(set(CASES)))
def test_neurons_and_heads_go_with_their_part_of_the_adapter(method, family, tmp_path):
    model_type, fields = FAMILY_TYPES[family], getattr(get_method(method).config_class, "__dataclass_fields__", {})
    # Where a method can be on any linear layer, it is on all of them.
    is_free = "target_modules" in fields and get_method(method).family == "reparameterization"
    options = {"target_modules": LINEARS[model_type]} if is_free else {}
    model = with_method(method, family, tmp_path, **options)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    kept = some_parts(base.config, layers=False)
    if refused(model, kept, "narrowing"):
        return
    optimizer = optimizer_of(model)
    expected = masked_logits(model, kept)
    remove_parts(model, kept, optimizer)
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)
    if isinstance(model, PeftModel):
        check_it_loads_again(model, tmp_path / "adapter")
    check_it_trains_on(model, optimizer)


# What an adapter says of blocks by their numbers

FIRST_IN_ENCODER = "encoder.block.0.layer.0.SelfAttention.q"
BY_NUMBER = {
    "names": {"target_modules": ["decoder.block.1.layer.0.SelfAttention.q", FIRST_IN_ENCODER]},
    "ends of names": {"target_modules": ["block.2.layer.0.SelfAttention.q", "block.1.layer.0.SelfAttention.v"]},
    "a regular expression": {"target_modules": r"encoder\.block\.[12]\..*\.(q|wo)"},
    "layers_to_transform": {"target_modules": ["q", "v"], "layers_to_transform": [1, 2], "layers_pattern": "block"},
    "one layer": {"target_modules": ["q"], "layers_to_transform": 1},
    "patterns": {
        "target_modules": ["q", "v"],
        "rank_pattern": {r"block\.1\..*\.q": 3, "v": 2},
        "alpha_pattern": {"encoder.block.2.layer.0.SelfAttention.q": 5},
    },
    "modules_to_save": {"target_modules": ["q"], "modules_to_save": ["encoder.block.2.layer.1.DenseReluDense.wi"]},
    "excluded": {"target_modules": ["q"], "exclude_modules": r"encoder\.block\.[01]\..*"},
    "all of it": {"target_modules": ["q", "v"]},
}


def lora(options: dict[str, Any], adapter: str = "default") -> PeftModel:
    config = LoraConfig(r=4, task_type="SEQ_2_SEQ_LM", init_lora_weights=False, **copy.deepcopy(options))
    return get_peft_model(shrinkable("t5"), config, adapter)


@pytest.mark.parametrize("options", BY_NUMBER.values(), ids=BY_NUMBER)
def test_blocks_that_are_named_by_number_are_renumbered(options, tmp_path):
    model = lora(options)
    parts = some_parts(model.get_base_model().config, heads=False)
    remove_parts(model, parts)
    check_it_loads_again(model, tmp_path / "adapter")
    config = model.active_peft_config
    if options == BY_NUMBER["all of it"]:
        assert config.target_modules == {"q", "v"}
    modules = dict(model.get_base_model().named_modules())
    assert model.base_model.targeted_module_names
    assert all(name in modules for name in model.base_model.targeted_module_names)


def test_a_second_removal_starts_from_the_names_after_the_first(tmp_path):
    model = lora(BY_NUMBER["layers_to_transform"])
    for _ in range(2):
        whole = kept_whole(model)
        remove_parts(model, Kept({**whole.layers, "decoder": whole.layers["decoder"][1:]}))
    check_it_loads_again(model, tmp_path / "adapter")


def test_adapters_of_all_names_are_cut(tmp_path):
    model = lora({"target_modules": ["q", "wo"]}, "first")
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v", "wi"], init_lora_weights=False))
    kept = some_parts(model.get_base_model().config, layers=False)
    expected = {}
    for adapter in ("first", "second"):
        model.set_adapter(adapter)
        expected[adapter] = masked_logits(model, kept)
    remove_parts(model, kept)
    for adapter, wanted in expected.items():
        model.set_adapter(adapter)
        torch.testing.assert_close(logits(model), wanted, rtol=1e-3, atol=1e-4)


def test_an_adapter_is_not_left_without_layers():
    model = lora({"target_modules": [FIRST_IN_ENCODER]})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="on the layers that would go"):
        remove_parts(model, some_parts(model.get_base_model().config))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_the_options_of_a_method_count_and_not_its_name_alone():
    """DoRA's magnitudes are of whole rows, also where LoRA has been asked for it."""
    model = apply_method(shrinkable("t5"), "lora", {"use_dora": True, "target_modules": ["wo"]})
    config = model.get_base_model().config
    assert "'dora'" in why_not_shrinkable(model, size_left(config, some_parts(config)))
    assert why_not_shrinkable(model, size_left(config, some_parts(config, ffn=False))) is None


def test_an_adapter_elsewhere_does_not_keep_a_layer_from_being_cut():
    model = apply_method(shrinkable("llama"), "vera", {"r": 8})  # on queries and values
    config = model.get_base_model().config
    assert why_not_shrinkable(model, size_left(config, some_parts(config, heads=False))) is None
    assert "heads would cut" in why_not_shrinkable(model, size_left(config, some_parts(config)))
    assert "heads would cut" in why_not_shrinkable(model)
    assert why_not_shrinkable(model, Size({"decoder": 1}, size_of(config).ffn, size_of(config).heads)) is None


def test_a_residual_base_is_cut_with_what_was_taken_from_it():
    model = lora({"target_modules": LINEARS["t5"]})
    remember_initial_adapter(model)
    with original_base(model):
        original = {name: weight.clone() for name, weight in model.get_base_model().state_dict().items()}
    kept = some_parts(model.get_base_model().config)
    plain = shrinkable("t5")
    plain.load_state_dict({WRAPPERS.sub("", name): weight for name, weight in original.items() if "lora_" not in name})
    remove_parts(model, kept)
    remove_parts(plain, kept)
    torch.testing.assert_close(plain_base(model).state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)


def test_a_quantized_base_is_refused():
    model = shrinkable("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.to(torch.uint8), requires_grad=False)
    assert "quantized" in why_not_shrinkable(model)


def test_an_invertible_adapter_of_a_block_that_goes_is_not_left_out():
    model = apply_method(shrinkable("t5"), "pfeiffer_adapter", {"invertible": True})
    with pytest.raises(ValueError, match="would not load again"):
        remove_parts(model, some_parts(model.get_base_model().config))
