"""Dropout with a byte per element is torch's, and the fast masks have the right share of ones."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn import functional

from left_trainer import LeftTrainer
from left_trainer.kernels.dropout import compact_dropout, draw_as_torch, draw_fast
from left_trainer.kernels.fast_paths import FastPath
from log_history import losses
from tiny import tiny_model

P = 0.3
SHAPES = {"plain": (4, 6, 8), "transposed": (4, 6, 8), "sliced": (4, 6, 8), "one": (1,), "scalar": (), "empty": (0, 3)}


def tensor(form: str, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(SHAPES[form]).to(dtype)
    x = x.transpose(0, 2) if form == "transposed" else x[:, ::2] if form == "sliced" else x
    return x.requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", SHAPES)
def test_results_gradients_and_random_state_are_those_of_torch(form, dtype):
    x = tensor(form, dtype)
    path, found = FastPath(), []
    for context in (warnings.catch_warnings(), compact_dropout(path, draw_as_torch)):
        torch.manual_seed(1)
        with context:
            y = functional.dropout(x, P)
            (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
        found.append((y, gradient, torch.get_rng_state()))
    for plain, ours in zip(*found, strict=True):
        assert torch.equal(plain, ours)
    assert found[0][0].stride() == found[1][0].stride()
    assert path.ran == (x.numel() > 0)


def test_a_byte_per_element_is_kept():
    x, kept = torch.randn(64, 64, requires_grad=True), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each)
    with compact_dropout(FastPath(), draw_as_torch), hooks:
        functional.dropout(x, P)
    assert [each.dtype for each in kept] == [torch.uint8]


def test_modules_functions_and_attention_go_through_it_and_evaluation_does_not():
    path = FastPath()
    x = torch.randn(2, 2, 8, 4, requires_grad=True)
    with compact_dropout(path, draw_as_torch):
        torch.nn.Dropout(P)(x)
        functional.dropout(x, P)
        functional.scaled_dot_product_attention(x, x, x, dropout_p=P)
        assert path.ran == 3
        torch.nn.Dropout(P).eval()(x)
        functional.dropout(x, 0.0)
        assert path.report() == {"ran": 3, "fell_back": {}}
        assert torch.equal(functional.dropout(x, 1.0), torch.zeros_like(x))
        assert path.fell_back == {"p is 1": 1}
    functional.dropout(x, P)
    assert path.ran == 3


def test_it_ends_with_an_error():
    path = FastPath()
    with pytest.raises(ZeroDivisionError), compact_dropout(path, draw_as_torch):
        raise ZeroDivisionError
    functional.dropout(torch.randn(4), P)
    assert path.ran == 0


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_fast_masks_have_the_right_share_and_follow_the_seed(p):
    x = torch.ones(300, 301, requires_grad=True)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with compact_dropout(FastPath(), draw_fast):
            found.append(functional.dropout(x, p))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    kept = found[0] != 0
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(float(kept.float().mean()) - (1 - p)) < 4 * deviation
    torch.testing.assert_close(found[0][kept], torch.full_like(found[0][kept], 1 / (1 - p)))
    assert torch.equal(torch.autograd.grad(found[0].sum(), x)[0], found[0])
    columns = kept.float()  # neighbours do not depend on each other
    both = float((columns[:, 1:] * columns[:, :-1]).mean())
    assert abs(both - (1 - p) ** 2) < 6 * deviation


def with_dropout(model_type: str):
    model = tiny_model(model_type)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = P
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = P
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model_type", ["t5", "bart", "gpt2", "opt"])
def test_a_training_is_the_same_with_it(model_type, checkpointing, rows, make_args, tokenizers):
    """Of models whose dropout is in modules, in functions, or in attention."""
    found = {}
    for use in (False, True):
        model = with_dropout(model_type)
        options = {"use_compact_dropout": use, "gradient_checkpointing": checkpointing, "max_steps": 4}
        tokenizer = tokenizers["encoder_decoder" if model.config.is_encoder_decoder else "decoder_only"]
        trainer = LeftTrainer(model, make_args(**options), train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        found[use] = losses(trainer)
        path = trainer.fast_paths["compact_dropout"]
        assert (path.ran > 0) == use
        assert path.fell_back == ({} if use else {"use_compact_dropout=False": 1})
    assert found[True] == found[False]


def test_fast_masks_train_and_can_be_had_again(rows, make_args, tokenizers):
    found = []
    for options in ({}, {}, {"fast_dropout": False}):
        arguments = {"max_steps": 4, "gradient_checkpointing": True, "fast_dropout": True, **options}
        trainer = LeftTrainer(
            with_dropout("t5"),
            make_args(overwrite_output_dir=True, **arguments),
            train_dataset=rows,
            processing_class=tokenizers["encoder_decoder"],
        )
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("option", "text"),
    [({"use_compact_dropout": False}, "leaves dropout to torch"), ({"torch_compile": True}, "to the compiler")],
)
def test_fast_masks_are_refused_where_nothing_would_draw_them(option, text, rows, make_args):
    with pytest.raises(ValueError, match=rf"fast_dropout=True has no effect: .*{text}. Remove it"):
        LeftTrainer(tiny_model("t5"), make_args(fast_dropout=True, **option), train_dataset=rows)
