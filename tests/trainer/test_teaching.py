"""What a student learns from its teacher beside the task."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerFast

from left_trainer import LeftTrainer, LeftTrainingArguments
from left_trainer.compression.teacher import Teacher
from left_trainer.compression_options import DistillationOptions
from left_trainer.kernels.output_head import DECODER_ONLY_TYPES, ENCODER_DECODER_TYPES
from left_trainer.methods import get_method
from left_trainer.models import model_family, without_adapter
from left_trainer.trainer.teaching import HIDDEN_STATE_LOSS, PROJECTIONS_FILE, TEACHER_LOSS
from log_history import gradient_norms, losses
from method_settings import CASES, apply_or_skip
from tiny import CONFIGS, FAMILY_TYPES, VOCABULARY_SIZE, tiny_model, tiny_tokenizer

FAMILIES_TYPES = ["t5", "bart", "llama", "gpt2"]
LOSSES = ("forward_kl", "reverse_kl", "jsd")
WIDER = {
    "t5": {"d_model": 24},
    "bart": {"d_model": 24},
    "llama": {"hidden_size": 24, "num_hidden_layers": 3},
    "gpt2": {"n_embd": 24},
}
HIDDEN = {"alpha": 0.5, "hidden_weight": 0.3}


def make_trainer(model_type, make_args, rows, teacher=None, options=None, **overrides) -> LeftTrainer:
    model = tiny_model(model_type)
    settings = {"peft_method": "full", "learning_rate": 1e-3, "max_steps": 3, "overwrite_output_dir": True}
    args = make_args(**{**settings, **overrides}, distillation_kwargs=options)
    tokenizer = tiny_tokenizer(model_family(model))
    return LeftTrainer(model, args, train_dataset=rows, processing_class=tokenizer, teacher_model=teacher)


def figures(trainer) -> torch.Tensor:
    trainer.train()
    logged = [
        [entry[name] for entry in trainer.state.log_history if name in entry]
        for name in (TEACHER_LOSS, HIDDEN_STATE_LOSS)
    ]
    return [losses(trainer), gradient_norms(trainer), *logged]


def assert_same(one, other, rel=1e-6) -> None:
    for left, right in zip(one, other, strict=True):
        assert left == pytest.approx(right, rel=rel)


@pytest.mark.parametrize("model_type", ["t5", "llama"])
def test_alpha_0_is_plain_training(model_type, make_args, rows):
    plain = figures(make_trainer(model_type, make_args, rows))
    for teacher in ("self", tiny_model(model_type, seed=4)):
        assert_same(figures(make_trainer(model_type, make_args, rows, teacher, {"alpha": 0.0})), plain, rel=0)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model_type", FAMILIES_TYPES)
def test_splits_of_a_batch_agree(model_type, loss, make_args, rows):
    """With hidden states of another width, whose loss counts tokens too."""
    results = []
    for batch_size, accumulation in ((8, 1), (2, 4), (1, 8)):
        teacher = tiny_model(model_type, seed=4, **WIDER[model_type])
        trainer = make_trainer(
            model_type,
            make_args,
            rows,
            teacher,
            {**HIDDEN, "loss": loss},
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            max_grad_norm=1e9,
        )
        results.append(figures(trainer))
    for result in results[1:]:
        assert_same(result, results[0], rel=2e-5)
    assert all(all(values) for values in results[0])


@pytest.mark.parametrize(
    "model_type", sorted((ENCODER_DECODER_TYPES | DECODER_ONLY_TYPES) & CONFIGS.keys(), key=list(CONFIGS).index)
)
def test_no_stored_logits_change_nothing(model_type, make_args, rows):
    """Of the student, or of the teacher, whose head may have more words."""
    results = []
    for use in (True, False):
        teacher = tiny_model(model_type, seed=4, vocab_size=VOCABULARY_SIZE + 8)
        options = {"alpha": 0.7, "temperature": 1.5}
        trainer = make_trainer(model_type, make_args, rows, teacher, options, use_linear_cross_entropy=use)
        results.append(figures(trainer))
        assert bool(trainer.fast_paths["linear_cross_entropy"].ran) == use
    assert_same(*results, rel=2e-4)


@pytest.mark.parametrize(("method", "family"), CASES)
def test_the_base_of_every_adapter_is_a_teacher(method, family, tmp_path):
    """It says what the model says without an adapter, however far that was trained."""
    batch = {"input_ids": torch.arange(3, 33).view(2, 15), "labels": torch.arange(5, 35).view(2, 15)}
    model_type = FAMILY_TYPES[family]
    model = apply_or_skip(method, model_type, tmp_path, seed=0)
    if not isinstance(model, PeftModel):
        pytest.skip(f"{method} has no adapter")
    if get_method(method).prepare:
        get_method(method).prepare(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    plain = Teacher("plain", tiny_model(model_type)).lesson(batch, wants_hidden_states=True)
    lesson = Teacher("base", model.train(), is_base=True).lesson(batch, wants_hidden_states=True)
    if isinstance(lesson.said, torch.Tensor):  # an adapter on the head
        torch.testing.assert_close(lesson.said, plain.said.hidden @ plain.said.weight.T, rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(lesson.said.hidden, plain.said.hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(lesson.hidden_states), dict(plain.hidden_states), rtol=1e-4, atol=1e-5)
    assert model.training


@pytest.mark.parametrize("model_type", ["t5", "llama"])
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning", "p_tuning_v2", "lora"])
def test_virtual_tokens_have_no_part(method, model_type, make_args, rows):
    """The loss beside a base at the first step is that of the task and of the two distributions, at the same tokens."""
    settings = {"peft_method": method, "max_steps": 1, "learning_rate": 1e-2}
    results = [
        figures(
            make_trainer(
                model_type, make_args, rows, "base", {"hidden_weight": 0.1}, use_linear_cross_entropy=use, **settings
            )
        )
        for use in (True, False)
    ]
    assert_same(*results, rel=1e-4)
    assert results[0][0] == pytest.approx(figures(make_trainer(model_type, make_args, rows, **settings))[0], rel=1e-5)


@pytest.mark.parametrize("model_type", ["t5", "llama"])
def test_resuming_is_exact(model_type, make_args, rows, tmp_path):
    """Projections and their part of the optimizer included; they are no part of what is saved."""

    def make(folder, **options):
        teacher = tiny_model(model_type, seed=4, **WIDER[model_type])
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path / folder)}
        return make_trainer(model_type, make_args, rows, teacher, HIDDEN, **{**settings, **options})

    whole = make("whole")
    whole.train()
    again = make("whole")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(again)[-2:] == pytest.approx(losses(whole)[-2:], rel=1e-6)
    torch.testing.assert_close(again.model.state_dict(), whole.model.state_dict())
    torch.testing.assert_close(again.teaching.hidden.state_dict(), whole.teaching.hidden.state_dict())
    again.save_model()
    assert (tmp_path / "whole" / "checkpoint-2" / PROJECTIONS_FILE).is_file()
    assert not any("projection" in name for name in again.model.state_dict())
    for seed, options in ((4, {**HIDDEN, "alpha": 0.25}), (5, HIDDEN)):
        with pytest.raises(ValueError, match="belongs to another run"):
            make_trainer(
                model_type,
                make_args,
                rows,
                tiny_model(model_type, seed=seed, **WIDER[model_type]),
                options,
                output_dir=str(tmp_path / "whole"),
            ).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


@pytest.mark.parametrize("family", FAMILY_TYPES)
def test_a_path_is_a_teacher(family, saved_models, make_args, rows, tmp_path):
    """A whole model, or the folder of an adapter, in its own dtype; it is frozen and draws no dropout."""
    path = str(saved_models[family])
    first = LeftTrainer(path, make_args(peft_method="lora", learning_rate=1e-2), train_dataset=rows)
    first.train()
    first.save_model(str(tmp_path / "adapter"))
    for teacher in (path, str(tmp_path / "adapter")):
        args = make_args(teacher_model=teacher, distillation_kwargs={"teacher_dtype": "bfloat16"}, max_steps=1)
        trainer = LeftTrainer(path, args.replaced(overwrite_output_dir=True), train_dataset=rows)
        trainer.train()
        model = trainer.teaching.teacher.model
        assert without_adapter(model).dtype == torch.bfloat16
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert trainer.state.log_history[0][TEACHER_LOSS] > 0 or teacher == path


def other_vocabulary(family: str) -> PreTrainedTokenizerFast:
    """The tokenizer of the tests with two tokens exchanged."""
    tokenizer = tiny_tokenizer(family)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    backend = type(tokenizer.backend_tokenizer).from_str(json.dumps(content))
    special = {"pad_token": tokenizer.pad_token, "eos_token": tokenizer.eos_token}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.mark.parametrize("family", FAMILY_TYPES)
def test_refused_before_weights_load(family, saved_models, make_args, rows, tmp_path, monkeypatch):
    path, other = str(saved_models[family]), str(next(p for name, p in saved_models.items() if name != family))
    renamed = tmp_path / "renamed"
    tiny_model(FAMILY_TYPES[family]).save_pretrained(renamed)
    other_vocabulary(family).save_pretrained(renamed)

    def load(*args, **kwargs):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr("left_trainer.trainer.preparation.load_model", load)
    monkeypatch.setattr("left_trainer.compression.teacher.load_trained", load)
    for options, message in (
        ({"teacher_model": other}, "tokens do not stand at the same positions"),
        ({"teacher_model": str(renamed)}, "has another vocabulary"),
        ({"teacher_model": str(tmp_path / "nowhere")}, "teacher_model=.*is neither"),
        ({"teacher_model": "base", "peft_method": "full"}, "makes none"),
        ({"distillation_kwargs": {"alpha": 0.3}}, "no effect without a teacher"),
        ({"teacher_model": path, "label_smoothing_factor": 0.1}, "each define the loss"),
        ({"teacher_model": path, "peft_method": "cpt"}, "define the loss|does not work"),
        (
            {"teacher_model": path, "distillation_kwargs": {"hidden_weight": 1, "layer_map": [[1, 9]]}},
            "layers, that of the teacher",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            LeftTrainer(path, make_args(**options), train_dataset=rows)
    with pytest.raises(ValueError, match="given twice"):
        LeftTrainer(path, make_args(teacher_model="self"), train_dataset=rows, teacher_model=path)
    with pytest.raises(ValueError, match="each define the loss"):
        LeftTrainer(path, make_args(teacher_model="self"), train_dataset=rows, compute_loss_func=lambda *args, **kw: 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "at most 1"),
        ({"temperature": 0}, "above 0"),
        ({"beta": 1}, "below 1"),
        ({"los": "jsd"}, "Did you mean 'loss'"),
        ({"loss": "kl"}, "Expected one of forward_kl"),
        ({"alpha": "much"}, "must have the type"),
        ({"layer_map": [[0, 1]]}, "at least 1"),
        ({"layer_map": [[1, 2, 3]]}, "pairs of a student's layer"),
        ({"layer_map": "first"}, "uniform"),
        ({"cache_teacher": 4, "loss": "jsd"}, "Remove one of them"),
        ({"cache_teacher": 4, "hidden_weight": 1.0}, "Remove one of them"),
        ({"cache_teacher": 4, "on_policy_fraction": 0.5}, "Remove one of them"),
        ("alpha", "cannot be read at"),
    ],
)
def test_options_no_run_can_have(options, message):
    with pytest.raises(ValueError, match=message):
        LeftTrainingArguments(output_dir="run", teacher_model="self", distillation_kwargs=options)


def test_alpha_has_a_default():
    assert DistillationOptions().weight == 0.5
    assert DistillationOptions(sequence_level=True).weight == 0
    assert not DistillationOptions(sequence_level=True).runs_teacher
