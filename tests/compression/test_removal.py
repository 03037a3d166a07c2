"""Taking parts out of a model: the rest computes what it computed, loads anywhere, and its training goes on."""

from __future__ import annotations

import copy
import dataclasses
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Adafactor, PreTrainedModel

from left_trainer.compression.architecture import ARCHITECTURES, architecture_of
from left_trainer.compression.cuts import Index, spread
from left_trainer.compression.removal import Kept, kept_whole, remove_parts
from left_trainer.compression.sizes import head_size, queries_per_group, size_of
from shrinkable import IDS, LABELS, SHRINKABLE, logits, shrinkable, some_parts

FAMILIES = ("t5_gated", "llama_biases")


@pytest.fixture(params=SHRINKABLE)
def model(request) -> PreTrainedModel:
    return shrinkable(request.param)


def test_every_supported_type_is_tried():
    assert {shrinkable(name).config.model_type for name in SHRINKABLE} == set(ARCHITECTURES)


def test_keeping_everything_changes_nothing(model):
    before, state, config = logits(model), copy.deepcopy(model.state_dict()), model.config.to_dict()
    remove_parts(model, kept_whole(model))
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(logits(model), before)
    assert model.config.to_dict() == config


def silence(model: PreTrainedModel, kept: Kept) -> None:
    """Set to zero what the neurons and heads that `kept` leaves out write."""
    architecture, config = architecture_of(model.config), model.config
    size, features = size_of(config), head_size(config) * queries_per_group(config)
    for name, indices in kept.neurons.items():
        width = size.ffn[architecture.stack_of(name)]
        keep_inputs(model.get_submodule(f"{name}.{architecture.feed_forward_output}"), Index(indices, width))
    for name, indices in kept.heads.items():
        heads = spread(Index(indices, size.heads), features)
        keep_inputs(model.get_submodule(f"{name}.{architecture.attention_output}"), heads)


def keep_inputs(layer: Any, index: Index) -> None:
    mask = torch.zeros(index.size).index_fill(0, index.kept, 1.0)
    layer.weight.data *= mask if isinstance(layer, nn.Linear) else mask[:, None]


def test_parts_that_write_nothing_are_not_missed(model):
    kept = some_parts(model.config, layers=False)
    silence(model, kept)
    before = logits(model)
    remove_parts(model, kept)
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-4)


def test_a_removed_block_is_as_if_it_had_never_been(model):
    kept = some_parts(model.config, ffn=False, heads=False)
    state = copy.deepcopy(model.state_dict())
    remove_parts(model, kept)
    built = type(model)(copy.deepcopy(model.config)).eval()
    expected = {}
    for name in built.state_dict():
        source = name
        for stack in architecture_of(model.config).stacks:
            found = re.match(rf"{re.escape(stack.blocks)}\.(\d+)\.", name)
            if found and "relative_attention_bias" not in name:
                source = f"{stack.blocks}.{kept.layers[stack.name][int(found[1])]}.{name[found.end() :]}"
        expected[name] = state[source]
    built.load_state_dict(expected)
    assert torch.equal(logits(built), logits(model))


def test_what_the_shrunk_model_says_of_itself_is_what_its_class_says(model):
    remove_parts(model, some_parts(model.config))
    built = dict(type(model)(copy.deepcopy(model.config)).named_modules())
    for name, module in model.named_modules():
        other = {key: value for key, value in vars(built[name]).items() if isinstance(value, (int, float, tuple))}
        assert {key: vars(module)[key] for key in other if key != "training"} == {
            key: value for key, value in other.items() if key != "training"
        }
        assert str(module).partition("(")[0] == str(built[name]).partition("(")[0]
    assert {name: weight.shape for name, weight in model.named_parameters()} == {
        name: weight.shape for name, weight in type(model)(copy.deepcopy(model.config)).named_parameters()
    }


def test_it_generates_with_a_cache_as_without(model):
    remove_parts(model, some_parts(model.config))
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    cached, fresh = (model.generate(IDS, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached, fresh)


LOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
ids, labels = torch.arange(5, 21).view(2, 8), torch.arange(30, 40).view(2, 5)
for folder in sys.argv[1:]:
    is_pair = json.load(open(folder + "/config.json")).get("is_encoder_decoder")
    model = (AutoModelForSeq2SeqLM if is_pair else AutoModelForCausalLM).from_pretrained(folder).eval()
    with torch.no_grad():
        torch.save(model(input_ids=ids, **({"labels": labels} if is_pair else {})).logits, folder + "/logits.pt")
assert not any(name.startswith("left_trainer") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """For each model: its logits after a removal, and those of a process that knows transformers alone."""
    folders, expected = {}, {}
    for name in SHRINKABLE:
        model = shrinkable(name)
        remove_parts(model, some_parts(model.config))
        folders[name], expected[name] = tmp_path_factory.mktemp(name), logits(model)
        model.save_pretrained(folders[name])
    subprocess.run([sys.executable, "-c", LOAD, *map(str, folders.values())], check=True)
    return {name: (expected[name], torch.load(folder / "logits.pt")) for name, folder in folders.items()}


@pytest.mark.parametrize("name", SHRINKABLE)
def test_a_fresh_process_without_the_package_loads_it(loaded, name):
    expected, found = loaded[name]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-5)


# Training goes on


def loss(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS, labels=LABELS if model.config.is_encoder_decoder else IDS).loss


def train(model: PreTrainedModel, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_goes_on(name):
    gradients = []
    for use_checkpoints in (False, True):
        model = shrinkable(name).train()
        remove_parts(model, some_parts(model.config))
        if use_checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss(model).backward()
        gradients.append({key: weight.grad for key, weight in model.named_parameters()})
    torch.testing.assert_close(*gradients)


OPTIMIZERS = {
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=1e-2, amsgrad=True),
    "sgd": lambda weights: torch.optim.SGD(weights, lr=1e-2, momentum=0.9),
    "rmsprop": lambda weights: torch.optim.RMSprop(weights, lr=1e-2, centered=True),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_goes_on_with_the_state_of_what_is_kept(make, name):
    """These treat each entry for itself, so that its step is the same whether the others are there or not."""
    model = shrinkable(name)
    optimizer = make(model.parameters())
    train(model, optimizer)
    whole = copy.deepcopy(model)
    other = make(whole.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    weights, whole_weights = dict(model.named_parameters()), dict(whole.named_parameters())
    places = kept_places(model, some_parts(model.config))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    remove_parts(model, some_parts(model.config), optimizer)
    assert {id(weight) for weight in model.parameters()} == {id(weights[key]) for key in places}
    assert {id(weight) for group in optimizer.param_groups for weight in group["params"]} == {
        id(weight) for weight in model.parameters()
    }
    generator = torch.Generator().manual_seed(2)
    for key, place in places.items():
        weights[key].grad = torch.randn(place.shape, generator=generator)
        whole_weights[key].grad = torch.zeros_like(whole_weights[key])
        whole_weights[key].grad.view(-1)[place] = weights[key].grad
    optimizer.step()
    scheduler.step()
    other.step()
    for key, place in places.items():
        assert weights[key].shape == place.shape
        assert torch.equal(weights[key], whole_weights[key].flatten()[place]), key


def kept_places(model: PreTrainedModel, kept: Kept) -> dict[str, torch.Tensor]:
    """For each parameter that stays, by its name before: where its entries stood in it."""
    numbered = copy.deepcopy(model)
    weights = dict(numbered.named_parameters())
    for weight in weights.values():
        weight.data = torch.arange(weight.numel(), dtype=weight.dtype).view(weight.shape)
    remove_parts(numbered, kept)
    left = {id(weight) for weight in numbered.parameters()}
    return {key: weight.data.long() for key, weight in weights.items() if id(weight) in left}


def test_gradients_follow_their_parameters():
    model = shrinkable("llama")
    loss(model).backward()
    weights, gradients = dict(model.named_parameters()), {k: w.grad.clone() for k, w in model.named_parameters()}
    kept = some_parts(model.config)
    places = kept_places(model, kept)
    remove_parts(model, kept)
    for key, place in places.items():
        assert torch.equal(weights[key].grad, gradients[key].flatten()[place])


@pytest.mark.parametrize("name", FAMILIES)
def test_adafactor_goes_on_with_its_factors(name):
    model = shrinkable(name)
    optimizer = Adafactor(model.parameters(), lr=1e-3, relative_step=False, scale_parameter=False)
    train(model, optimizer)
    before = {weight: copy.deepcopy(optimizer.state[weight]) for weight in model.parameters()}
    weights, kept = dict(model.named_parameters()), some_parts(model.config)
    places = kept_places(model, kept)
    remove_parts(model, kept, optimizer)
    for key, place in places.items():
        if place.dim() == 2:
            columns, row = before[weights[key]]["exp_avg_sq_row"].shape[0], before[weights[key]]["exp_avg_sq_row"]
            width = before[weights[key]]["exp_avg_sq_col"].shape[0]
            assert columns * width >= place.max()
            rows, cols = place[:, 0] // width, place[0] % width
            assert torch.equal(optimizer.state[weights[key]]["exp_avg_sq_row"], row[rows])
            assert torch.equal(
                optimizer.state[weights[key]]["exp_avg_sq_col"], before[weights[key]]["exp_avg_sq_col"][cols]
            )
    train(model, optimizer, steps=1)


def test_an_optimizer_with_state_of_another_kind_is_refused_before_anything_changes():
    model = shrinkable("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    train(model, optimizer)
    optimizer.state[model.model.layers[1].mlp.up_proj.weight]["packed"] = torch.zeros(3, dtype=torch.uint8)
    state, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    with pytest.raises(ValueError, match="'packed' of SGD"):
        remove_parts(model, some_parts(model.config), optimizer)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert model.config.to_dict() == config


# What is refused


def test_parts_that_do_not_fit_are_refused_before_anything_changes():
    model = shrinkable("t5")
    whole = kept_whole(model)
    ffn, heads = "encoder.block.1.layer.1.DenseReluDense", "encoder.block.1.layer.0.SelfAttention"
    refused = {
        "the stacks are": {"layers": {"encoder": (0,)}},
        r"Kept.layers\['decoder'\] is \[\]": {"layers": {"encoder": (0,), "decoder": ()}},
        r"is \[1, 0\]: expected": {"layers": {"encoder": (1, 0), "decoder": (0,)}},
        r"is \[3\]: expected .* from 0 to 2": {"layers": {"encoder": (3,), "decoder": (0,)}},
        "Kept.neurons has 'encoder'": {"neurons": {"encoder": torch.arange(3)}},
        "from 0 to 31": {"neurons": {ffn: torch.tensor([32])}},
        "keep different widths": {"neurons": {ffn: torch.arange(8)}},
        "share one relative position bias": {"heads": {heads: torch.arange(2)}},
    }
    state = copy.deepcopy(model.state_dict())
    for message, parts in refused.items():
        with pytest.raises(ValueError, match=message):
            remove_parts(model, dataclasses.replace(whole, **parts))
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_heads_are_refused_where_the_class_ties_them_to_the_width():
    model = shrinkable("bart")
    name = "model.encoder.layers.0.self_attn"
    with pytest.raises(ValueError, match="heads= does not work for model type 'bart'"):
        remove_parts(model, dataclasses.replace(kept_whole(model), heads={name: torch.tensor([0])}))
