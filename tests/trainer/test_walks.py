"""The quick walks see what torch's see, in the same order, and are gone after the training."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from left_trainer import LeftTrainer, apply_method
from left_trainer.models import without_adapter
from left_trainer.trainer.walks import modules, quick_walks
from tiny import CONFIGS, FAMILY_TYPES, tiny_model

METHODS = ("lora", "dora", "prompt_tuning", "houlsby_adapter", "full")
QUICK = ("train", "parameters", "num_parameters")


def ids(items):
    return [id(item) for item in items]


def seen(model):
    """What is walked over, and numbers of parameters."""
    base = without_adapter(model)
    numbers = [base.num_parameters(only, without) for only in (False, True) for without in (False, True)]
    return ids(model.parameters()), ids(model.parameters(recurse=False)), numbers


@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_same_modules_parameters_and_numbers(model_type):
    model = tiny_model(model_type)
    expected, order = seen(model), ids(model.modules())
    with quick_walks(model, model):
        assert seen(model) == expected
        assert ids(modules(model)) == order
    assert not set(QUICK) & set(vars(model))


@pytest.mark.parametrize("family", FAMILY_TYPES)
@pytest.mark.parametrize("method", METHODS)
def test_the_same_with_an_adapter(method, family):
    model = apply_method(tiny_model(FAMILY_TYPES[family]), method)
    expected = seen(model)
    with quick_walks(model, without_adapter(model)):
        assert seen(model) == expected


def test_gradients_are_cleared():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    with quick_walks(model, model):
        model.zero_grad(set_to_none=False)
        assert all(not parameter.grad.any() for parameter in model.parameters())
        model.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_part_in_evaluation_mode_is_found():
    model = nn.Sequential(nn.Sequential(nn.Dropout()), nn.Dropout())
    model[0][0].eval()
    with quick_walks(model, model):
        assert model.train() is model
        assert model[0][0].training
        model.train(False)
    assert not any(module.training for module in model.modules())


def test_what_a_module_does_in_its_own_method_is_done():
    class Counting(nn.Module):
        calls = 0

        def train(self, mode=True):
            self.calls += 1
            return super().train(mode)

    model = nn.Sequential(Counting())
    with quick_walks(model, model):
        model.train()
    assert model[0].calls == 1


def test_a_copy_walks_over_itself():
    model = tiny_model("t5")
    with quick_walks(model, model):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for each in copies:
            assert not set(ids(each.parameters())) & set(ids(model.parameters()))
            assert ids(each.parameters()) == ids(nn.Module.parameters(each))


@pytest.mark.parametrize("family", FAMILY_TYPES)
def test_a_training_has_them_and_leaves_none(family, rows, make_args, tokenizers):
    class Look(TrainerCallback):
        found = ()

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.found = [name for name in QUICK if name in {**vars(model), **vars(without_adapter(model))}]

    look = Look()
    trainer = LeftTrainer(
        tiny_model(FAMILY_TYPES[family]),
        make_args(peft_method="lora", max_steps=2),
        train_dataset=rows,
        processing_class=tokenizers[family],
        callbacks=[look],
    )
    trainer.train()
    assert look.found == list(QUICK)
    assert not set(QUICK) & set(vars(trainer.model)) | set(QUICK) & set(vars(without_adapter(trainer.model)))
