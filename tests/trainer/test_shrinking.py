"""Runs whose model shrinks: sizes, checkpoints, going on, returning, several processes, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from left_trainer import LeftTrainer, LeftTrainingArguments, text_metrics
from left_trainer.compression.architecture import ARCHITECTURES
from left_trainer.compression.shrink_state import ShrinkState
from left_trainer.compression.sizes import counted_parameters, size_of
from left_trainer.models import model_family, without_adapter
from left_trainer.trainer import kept_sizes
from left_trainer.trainer.checkpoints import checkpoints_in, step_of
from left_trainer.trainer.held_size import NAME
from log_history import losses
from processes import ENVIRONMENT
from tiny import CONFIGS, ENCODER_DECODER_TYPES, tiny_model, tiny_rows, tiny_tokenizer

ROWS = Dataset.from_list(tiny_rows())
STEPS = 6
LAYERS = {"t5": "encoder_layers=1,decoder_layers=1", "llama": "layers=1"}
BOTH = pytest.mark.parametrize("model_type", ["t5", "llama"])


def make_trainer(folder, model_type="t5", model=None, **options) -> LeftTrainer:
    args = {
        "output_dir": str(folder),
        "peft_method": "full",
        "shrink_to": "params=0.5",
        "learning_rate": 5e-3,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
        "use_cpu": True,
        **options,
    }
    kwargs = args.get("shrink_kwargs", {})
    evaluates = "eval_strategy" in options or "keep" in kwargs or "keep_sizes" in kwargs
    family = "encoder_decoder" if model_type in ENCODER_DECODER_TYPES else "decoder_only"
    return LeftTrainer(
        tiny_model(model_type, dropout=0.1) if model is None else model,
        LeftTrainingArguments(**args),
        train_dataset=ROWS,
        eval_dataset=ROWS.select(range(4)) if evaluates else None,
        processing_class=tiny_tokenizer(family),
    )


def weights_of(trainer: LeftTrainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def shares(trainer: LeftTrainer) -> list[tuple[int, float]]:
    return [(size.step, round(size.share, 2)) for size in trainer.shrinking.state.history]


def assert_goes_on(folder: Path, whole: LeftTrainer, make) -> LeftTrainer:
    """A run that goes on from any of the checkpoints in `folder` ends as the run that wrote them; the last such run."""
    expected = weights_of(whole)
    for checkpoint in reversed(checkpoints_in(folder)):
        again = make(folder)
        again.train(resume_from_checkpoint=str(checkpoint))
        assert losses(again) == losses(whole)
        torch.testing.assert_close(weights_of(again), expected, rtol=0, atol=0)
        assert again.shrinking.state.history == whole.shrinking.state.history
    return again


def logits_of(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


def loaded_plainly(folder: Path, family: str):
    auto = AutoModelForSeq2SeqLM if family == "encoder_decoder" else AutoModelForCausalLM
    if (folder / "adapter_config.json").is_file():
        return PeftModel.from_pretrained(auto.from_pretrained(folder / "base"), folder)
    return auto.from_pretrained(folder)


# What is left


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_smaller_model_loads_anywhere(model_type, method, tmp_path):
    trainer = make_trainer(tmp_path, model_type, peft_method=method, max_steps=3, shrink_kwargs={"schedule": [1, 2]})
    whole = counted_parameters(tiny_model(model_type))
    trainer.train()
    trainer.save_model()
    base = without_adapter(trainer.model)
    loaded = loaded_plainly(tmp_path, trainer.family)
    size = size_of(base.config)
    assert size_of(without_adapter(loaded).config) == size == trainer.shrinking.state.history[-1].size
    plain = counted_parameters(type(base)(base.config))
    assert plain == trainer.shrinking.state.history[-1].parameters
    assert 0.35 * whole < plain <= 0.5 * whole
    batch = {"input_ids": torch.tensor([[5, 9, 7]])}
    if trainer.family == "encoder_decoder":
        batch["labels"] = batch["input_ids"]
    torch.testing.assert_close(logits_of(loaded, batch), logits_of(trainer.model, batch), rtol=1e-5, atol=1e-5)
    loaded.generate(input_ids=batch["input_ids"], max_new_tokens=3)


@pytest.mark.parametrize("method", ["full", "lora"])
@BOTH
def test_one_shot_is_made_before_the_optimizer(model_type, method, tmp_path):
    options = {"shrink_to": LAYERS[model_type], "shrink_kwargs": {"schedule": "at_start"}, "peft_method": method}
    trainer = make_trainer(tmp_path, model_type, max_steps=2, teacher_model="self", **options)
    teacher = trainer.teaching.teacher
    assert teacher.title == "self"
    trainer.train()
    assert set(size_of(without_adapter(trainer.model).config).layers.values()) == {1}
    assert set(size_of(without_adapter(teacher.model).config).layers.values()) == {2}
    held = {id(weight) for group in trainer.optimizer.param_groups for weight in group["params"]}
    assert held == {id(weight) for weight in trainer.model.parameters() if weight.requires_grad}


@BOTH
def test_the_size_is_in_the_log(model_type, tmp_path):
    trainer = make_trainer(tmp_path, model_type, shrink_kwargs={"schedule": "linear", "n_shrinks": 2, "end": 1.0})
    trainer.train()
    logged = [entry["size/share"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == STEPS
    assert logged[0] == 1
    assert logged == sorted(logged, reverse=True)
    assert logged[-1] == trainer.shrinking.state.history[-1].share <= 0.5


def test_each_importance_chooses(tmp_path):
    left = {}
    for importance in (None, "block_influence", "first_order", "magnitude", "random"):
        kwargs = {"schedule": "at_start", **({"importance": importance} if importance else {})}
        trainer = make_trainer(
            tmp_path / str(importance), "llama", max_steps=1, shrink_to="ffn=0.5", shrink_kwargs=kwargs
        )
        trainer.train()
        kept = trainer.shrinking.state.kept
        left[importance] = [indices.tolist() for indices in kept.neurons.values()]
        assert all(len(indices) == 16 for indices in left[importance])
    assert left[None] == left["block_influence"] == left["first_order"]
    assert left["first_order"] != left["magnitude"] != left["random"]


def test_a_fresh_model_of_each_training_shrinks(tmp_path):
    args = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "max_steps": 2}
    trainer = LeftTrainer(
        args=LeftTrainingArguments(
            output_dir=str(tmp_path),
            peft_method="full",
            shrink_to="layers=1",
            shrink_kwargs={"schedule": "at_start"},
            **args,
        ),
        model_init=lambda: tiny_model("llama"),
        train_dataset=ROWS,
        processing_class=tiny_tokenizer("decoder_only"),
    )
    for _ in range(2):
        trainer.train()
        assert trainer.model.config.num_hidden_layers == len(trainer.model.model.layers) == 1


def test_a_second_training_goes_on_with_the_smaller_model(tmp_path):
    trainer = make_trainer(tmp_path, "llama", shrink_kwargs={"schedule": [2]})
    trainer.train()
    once = counted_parameters(trainer.model)
    trainer.train()
    assert counted_parameters(trainer.model) == once
    assert shares(trainer) == [(0, 0.49)]


def test_gradients_are_recomputed_in_a_smaller_model(tmp_path):
    plain, recomputed = (
        make_trainer(
            tmp_path / str(value),
            "llama",
            model=tiny_model("llama"),
            gradient_checkpointing=value,
            shrink_kwargs={"schedule": [2]},
        )
        for value in (False, True)
    )
    for trainer in (plain, recomputed):
        trainer.train()
    assert losses(recomputed) == pytest.approx(losses(plain), rel=1e-5)


# Going on


@pytest.mark.parametrize("method", ["full", "lora"])
@BOTH
def test_a_run_goes_on_from_each_of_its_checkpoints(model_type, method, tmp_path):
    """Also from those of before a removal, as after a kill between it and the next checkpoint."""

    def make(folder):
        kwargs = {"schedule": [1, 3, 4]}
        return make_trainer(
            folder, model_type, peft_method=method, save_strategy="steps", save_steps=2, shrink_kwargs=kwargs
        )

    whole = make(tmp_path)
    whole.train()
    assert len(shares(whole)) >= 3
    for checkpoint in checkpoints_in(tmp_path):
        state = ShrinkState.read(checkpoint)
        due = [size for size in whole.shrinking.state.history if size.step <= step_of(checkpoint)]
        assert state.history == tuple(due)
    assert_goes_on(tmp_path, whole, make)


def test_a_run_that_shrank_at_the_start_goes_on(tmp_path):
    def make(folder):
        kwargs = {"schedule": "at_start"}
        return make_trainer(folder, "llama", save_strategy="steps", save_steps=3, shrink_kwargs=kwargs)

    whole = make(tmp_path)
    whole.train()
    assert_goes_on(tmp_path, whole, make)


def test_another_size_is_another_run(tmp_path):
    make_trainer(tmp_path, "llama", save_strategy="steps", save_steps=6).train()
    for options in ({"shrink_to": "params=0.6"}, {"shrink_kwargs": {"n_shrinks": 2}}):
        with pytest.raises(ValueError, match="belongs to another run"):
            make_trainer(tmp_path, "llama", **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_a_trainer_cannot_go_back_to_a_larger_model(tmp_path):
    trainer = make_trainer(tmp_path, "llama", save_strategy="steps", save_steps=1, shrink_kwargs={"schedule": [3]})
    trainer.train()
    with pytest.raises(ValueError, match="holds a larger model"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_best_model_is_one_of_the_last_size(method, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(
        tmp_path,
        "llama",
        peft_method=method,
        load_best_model_at_end=True,
        learning_rate=1.0,  # so that the loss rises
        stop_on_divergence=False,
        save_only_model=True,
        shrink_kwargs={"schedule": [3]},
        **options,
    )
    trainer.train()
    best = trainer.state.best_global_step
    assert best >= 3
    assert trainer.state.best_metric == min(
        entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry and entry["step"] >= 3
    )
    loaded = loaded_plainly(tmp_path / f"checkpoint-{best}", "decoder_only")
    batch = {"input_ids": torch.tensor([[5, 9, 7]])}
    torch.testing.assert_close(logits_of(trainer.model, batch), logits_of(loaded, batch), rtol=1e-4, atol=1e-4)


# Until quality


def keeping(folder, model_type, method="full", smallest=0.6, **kwargs) -> LeftTrainer:
    """A run whose quality falls where less than `smallest` of the model is left."""
    trainer = make_trainer(
        folder,
        model_type,
        peft_method=method,
        shrink_to="params=0.4",
        shrink_kwargs={"schedule": "linear", "n_shrinks": 3, "end": 0.7, "keep": "chrf>=0.95", **kwargs},
        predict_with_generate=True,
        generation_max_length=2,
        max_steps=8,
        save_strategy="steps",
        save_steps=1,
    )
    evaluate = trainer.evaluate

    def scripted(*args, **options):
        scores = evaluate(*args, **options)
        share = trainer.shrinking.state.history[-1].share
        return {**scores, "size_chrf": 50.0 if share >= smallest else 40.0}

    trainer.evaluate = scripted
    return trainer


@pytest.mark.parametrize(("model_type", "method"), [("t5", "full"), ("t5", "lora"), ("llama", "full")])
def test_a_run_returns_to_the_last_size_that_held(model_type, method, tmp_path):
    whole = keeping(tmp_path, model_type, method)
    whole.train()
    sizes = [size.parameters for size in whole.shrinking.state.history]
    assert sizes[-1] == sizes[-3] > sizes[-2]
    assert whole.shrinking.state.history[-1].share >= 0.6 > whole.shrinking.state.history[-2].share
    assert size_of(without_adapter(whole.model).config) == whole.shrinking.state.history[-1].size
    for checkpoint in checkpoints_in(tmp_path)[::2]:
        shutil.rmtree(checkpoint)
    again = assert_goes_on(tmp_path, whole, lambda folder: keeping(folder, model_type, method))
    assert list(tmp_path.glob(f"{NAME}-*"))  # for the checkpoints
    for checkpoint in checkpoints_in(tmp_path):
        shutil.rmtree(checkpoint)
    again.shrinking.end(8)
    assert not list(tmp_path.glob(f"{NAME}-*"))


def test_a_size_that_holds_is_kept(tmp_path):
    trainer = keeping(tmp_path, "llama", smallest=0.0)
    trainer.train()
    assert trainer.shrinking.state.history[-1].share <= 0.4
    assert trainer.shrinking.state.is_final
    assert trainer.shrinking.state.start_score == 50


def test_a_returned_run_has_the_optimizer_of_that_size(tmp_path):
    trainer = keeping(tmp_path, "t5")
    trainer.train()
    trained = {weight for weight in trainer.model.parameters() if weight.requires_grad}
    held = [weight for group in trainer.optimizer.param_groups for weight in group["params"]]
    assert set(held) == trained
    assert len(held) == len(trained)
    for weight in held:
        assert trainer.optimizer.state[weight]["exp_avg"].shape == weight.shape


@pytest.mark.parametrize("method", ["full", "lora"])
def test_each_size_is_left(method, tmp_path):
    trainer = make_trainer(
        tmp_path,
        "llama",
        peft_method=method,
        shrink_to="params=0.4",
        shrink_kwargs={"schedule": [2, 4], "keep_sizes": True},
    )
    trainer.train()
    sizes = trainer.shrinking.state.history
    assert len(sizes) == 3
    for size in sizes:
        folder = tmp_path / "sizes" / f"{size.parameters}-params"
        written = json.loads((folder / "size.json").read_text())
        assert written["parameters"] == size.parameters
        assert written["scores"]["loss"] > 0
        config = without_adapter(loaded_plainly(folder, "decoder_only")).config if size.step else None
        assert config is None or size_of(config) == size.size
    assert (tmp_path / "sizes" / "quality.png").stat().st_size > 1000


@pytest.mark.parametrize(("main", "drawn"), [("rougeL", "rougeL"), (None, "rouge1"), ("no-such-score", "rouge1")])
def test_the_picture_of_sizes_is_of_the_main_score(main, drawn, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(kept_sizes, "draw_sizes", lambda points, score, path: seen.append(score))
    trainer = make_trainer(
        tmp_path, "t5", shrink_to="params=0.5", shrink_kwargs={"schedule": [1], "keep_sizes": True},
        peft_method="full", predict_with_generate=True, generation_max_length=3,
    )  # fmt: skip
    trainer.compute_metrics = text_metrics(trainer.processing_class, ("rouge",), main)
    trainer.train()
    assert seen
    assert set(seen) == {drawn}


# Several processes


def test_two_processes_shrink_alike(python, tmp_path):
    script = Path(__file__).with_name("shrinking_script.py")
    launch = [python, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    found = []
    for command, batch_size in (([python], 8), (launch, 4)):
        output = tmp_path / f"{batch_size}.json"
        subprocess.run(
            [*command, str(script), "full", str(batch_size), str(output)],
            check=True,
            capture_output=True,
            env=ENVIRONMENT,
        )
        found.append(json.loads(output.read_text()))
    one, two = found
    assert json.loads((tmp_path / "4.json.1").read_text()) == two
    assert two["history"] == one["history"]
    assert len(one["history"]) == 3
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-3)


# What is refused

GENERATES = {"predict_with_generate": True, "eval_strategy": "epoch"}
REFUSED = {
    "does not support the model type 'bloom'": {"model_type": "bloom"},
    "the model has 2": {"shrink_to": "layers=3"},
    "a llama model has one stack": {"shrink_to": "encoder_layers=1"},
    "training ends after 6 steps": {"shrink_kwargs": {"schedule": [2, 7]}},
    "there is none": {"shrink_kwargs": {"keep": "rougeL>=0.9"}, "without_rows": True},
    "set predict_with_generate=True": {"shrink_kwargs": {"keep": "rougeL>=0.9"}},
    "'rougel' is not computed by this run. Did you mean 'rougeL'": {
        "shrink_kwargs": {"keep": "rougel>=0.9"},
        **GENERATES,
    },
    "less of loss is better": {"shrink_kwargs": {"keep": "loss>=0.9"}},
    "removes parts during the training, and torch_compile=True": {"torch_compile": True},
    "layer_map=": {"teacher_model": "self", "distillation_kwargs": {"hidden_weight": 1.0, "layer_map": [[1, 1]]}},
    "the base with the adapter off": {"peft_method": "lora", "teacher_model": "base"},
    "quantized base model": {"peft_method": "qlora"},
    "optim='paged_adamw_8bit'": {"optim": "paged_adamw_8bit", "shrink_to": "ffn=0.5"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_refused_before_weights_load(message, tmp_path, monkeypatch):
    options = dict(REFUSED[message])
    model_type = options.pop("model_type", "llama")
    tiny_model(model_type).config.save_pretrained(tmp_path / "model")  # without weights
    monkeypatch.setattr("left_trainer.trainer.run_checks.check_has_weights", lambda name: None)
    monkeypatch.setattr("left_trainer.trainer.preparation.load_model", lambda *args, **kwargs: pytest.fail("loaded"))
    if options.pop("without_rows", False):
        monkeypatch.setattr(Dataset, "select", lambda self, rows: None)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make_trainer(tmp_path / "run", model_type, model=str(tmp_path / "model"), **options)


def test_a_t5_generates_with_fewer_layers_in_its_encoder(tmp_path):
    """The cache is as deep as the decoder, here and where the model is loaded again."""
    trainer = make_trainer(tmp_path / "run", "t5", shrink_to="encoder_layers=1", shrink_kwargs="schedule=at_start")
    trainer.train()
    trainer.save_model()
    inputs = torch.arange(3, 13).view(2, 5)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run")
    assert (again.config.num_layers, again.config.num_decoder_layers) == (1, 2)
    expected = trainer.model.eval().generate(inputs, max_new_tokens=4, num_beams=2)
    torch.testing.assert_close(again.generate(inputs, max_new_tokens=4, num_beams=2), expected)


def test_every_supported_type_is_a_tiny_one():
    assert set(ARCHITECTURES) <= set(CONFIGS)
    assert {model_family(tiny_model(name)) for name in ("t5", "llama")} == {"encoder_decoder", "decoder_only"}
