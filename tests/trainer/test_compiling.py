"""A run with `torch_compile` ends as one without, by the same fast paths."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch._dynamo.eval_frame import OptimizedModule

from left_trainer import LeftTrainer
from left_trainer.kernels.compiled_blocks import CACHED, is_compiled, repeated_blocks
from left_trainer.models import auto_class, model_family
from log_history import gradient_norms, losses
from method_settings import CASES, BaseModels, model_argument, settings
from tiny import tiny_model

# torch hides the warning that it reads the gradient of a block's input, but not where warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

# Found by Dynamo to be what it cannot trace; the loss of these runs is still taken at the output head.
NOT_COMPILED = ("frod", "loha", "lokr", "poly", "shira", "vblora", "waveft", "xlora")
# Their start, or their least directions, are nothing but rounding, as in tests/parity/test_sharded.py.
TOLERANCE = {"deft": 3e-2, "fourierft": 1e-2}
CACHES = ("cartridge", "prefix_tuning")


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def trained(
    model: Any, rows: Any, make_args: Any, tokenizers: Any, checkpoint: Path | None = None, **options: Any
) -> LeftTrainer:
    arguments = {"max_steps": 2, "max_grad_norm": 1e9, "pad_to_multiple_of": 64, "overwrite_output_dir": True}
    args = make_args(**{**arguments, "train_sampling_strategy": "sequential", **options})
    family = model_family(model.config if hasattr(model, "config") else model)
    trainer = LeftTrainer(model, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizers[family])
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return trainer


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "full, t5": ("t5", {"dropout": 0.1}),
    "lora, bart": ("bart", {"peft_method": "lora", "dropout": 0.1}),
    "lora, accumulated": ("llama", {"peft_method": "lora", "gradient_accumulation_steps": 2}),
    "lora, taught": ("llama", {"peft_method": "lora", "teacher_model": "base", "distillation_kwargs": {"alpha": 0.5}}),
    "packed": ("gpt2", {"packing": True, "max_length": 32, "pad_to_multiple_of": None}),
    "started from rows": ("gemma", {"peft_method": "lora_ga"}),
    "logits": ("t5", {"use_linear_cross_entropy": False}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_compiled_run_ends_as_a_plain_one(name, rows, make_args, tokenizers):
    model_type, options = RUNS[name]
    options = dict(options)
    dropout = options.pop("dropout", 0.0)
    found = []
    for compiled in ({}, {"torch_compile_backend": "eager"}):
        model = tiny_model(model_type, dropout=dropout)
        trainer = trained(model, rows, make_args, tokenizers, **options, **compiled)
        found.append((losses(trainer), gradient_norms(trainer)))
    assert found[1] == (pytest.approx(found[0][0], rel=1e-5), pytest.approx(found[0][1], rel=1e-5))
    paths = {path_name: path.report() for path_name, path in trainer.fast_paths.items()}
    assert paths["compiled_blocks"]["ran"]
    assert not paths["compiled_blocks"]["fell_back"]
    if name != "logits":
        assert not paths["linear_cross_entropy"]["fell_back"]
    if options.get("peft_method"):
        assert paths["lora_linear"]["ran"]
        assert not paths["lora_linear"]["fell_back"] or name == "started from rows"  # whose rows are watched by hooks
    assert not any(isinstance(module, OptimizedModule) for module in trainer.model_wrapped.modules())


def test_it_saves_evaluates_generates_and_goes_on_as_a_plain_run(rows, make_args, tokenizers, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "predict_with_generate": True, "generation_max_length": 4}
    found = {}
    for name, compiled in (("plain", {}), ("compiled", {"torch_compile_backend": "eager"})):
        options = {**saving, **compiled, "output_dir": str(tmp_path / name), "peft_method": "lora"}
        trainer = trained(tiny_model("llama"), rows, make_args, tokenizers, **options)
        scores = trainer.evaluate()
        found[name] = (*losses(trainer), scores["eval_loss"], scores["eval_chrf"])
        trainer.save_model()
    assert found["compiled"] == pytest.approx(found["plain"], rel=1e-5)
    assert set(trainer.fast_paths["compiled_blocks"].fell_back) == {CACHED}
    keys = [
        list(safe_open(tmp_path / name / "adapter_model.safetensors", "pt").keys()) for name in ("plain", "compiled")
    ]
    assert keys[0] == keys[1]
    for start in found:
        options = {**saving, "output_dir": str(tmp_path / start), "peft_method": "lora"}
        going_on = trained(
            tiny_model("llama"), rows, make_args, tokenizers, tmp_path / start / "checkpoint-1", **options, **compiled
        )
        assert losses(going_on)[-1] == pytest.approx(found["plain"][1], rel=1e-5)
        assert going_on.fast_paths["compiled_blocks"].ran


def test_what_the_environment_asks_for_is_compiled(rows, make_args, tokenizers, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")  # as `accelerate launch --dynamo_backend` sets it
    trainer = trained(tiny_model("llama"), rows, make_args, tokenizers)
    assert trainer.fast_paths["compiled_blocks"].ran == 4
    assert not trainer.fast_paths["linear_cross_entropy"].fell_back


def test_a_model_is_compiled_no_longer_where_that_is_not_asked_for(rows, make_args, tokenizers):
    model = tiny_model("llama")
    blocks = list(repeated_blocks(model))
    for options, expected in (({"torch_compile": True}, True), ({}, False)):
        args = make_args(peft_method="full", overwrite_output_dir=True, **options)
        trainer = LeftTrainer(model, args, train_dataset=rows, processing_class=tokenizers["decoder_only"])
        assert all(is_compiled(block) == expected for block in blocks)
    assert "compiled_blocks" not in trainer.fast_paths


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # FRoD has a sparse core
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # SuperTuning calls one
def test_every_method_trains_compiled_as_it_does_plain(rows, make_args, tokenizers, tmp_path):
    bases = BaseModels(tmp_path)
    for method, family in CASES:
        torch.compiler.reset()
        found = []
        for compiled in ({}, {"torch_compile_backend": "eager"}):
            model = model_argument(method, bases[method, family], auto_class(family).from_pretrained)
            args = make_args(
                **{
                    **settings(method, family, tmp_path),
                    "peft_method": method,
                    "max_steps": 2,
                    "pad_to_multiple_of": 64,
                    "train_sampling_strategy": "sequential",
                    "overwrite_output_dir": True,
                    **compiled,
                }
            )
            trainer = LeftTrainer(model, args, train_dataset=rows, processing_class=tokenizers[family])
            trainer.train()
            found.append((losses(trainer), gradient_norms(trainer)))
        for plain, own in zip(*found, strict=True):
            assert own == pytest.approx(plain, rel=TOLERANCE.get(method, 1e-4)), f"{method}, {family}"
        path = trainer.fast_paths["compiled_blocks"]
        is_whole = method not in (*NOT_COMPILED, *CACHES)
        assert bool(path.fell_back) != is_whole, f"{method}, {family}: {path.fell_back}"


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("model_type", ["t5", "llama"])
def test_compiled_by_inductor(model_type, rows, make_args, tokenizers):
    found = []
    for compiled in ({}, {"torch_compile": True}):
        options = {"peft_method": "lora", "peft_kwargs": {"lora_dropout": 0.0}, **compiled}
        trainer = trained(tiny_model(model_type), rows, make_args, tokenizers, **options)
        found.append(losses(trainer))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert not trainer.fast_paths["compiled_blocks"].fell_back
