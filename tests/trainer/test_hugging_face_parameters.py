"""Parameters of Hugging Face's trainers: the same names, in the same order, with the same effect."""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
from pathlib import Path

import optuna
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from left_trainer import LeftSeq2SeqTrainer, LeftSFTTrainer, LeftTrainer, get_method
from left_trainer.models import FAMILIES
from log_history import losses
from tiny import FAMILY_TYPES, tiny_model

PARENTS = {LeftSeq2SeqTrainer: Seq2SeqTrainer, LeftSFTTrainer: SFTTrainer}
FOREIGN = {"encoder_decoder": Seq2SeqTrainingArguments, "decoder_only": SFTConfig}


@pytest.fixture
def foreign_args(tmp_path):
    def make(family, cls=None, **options):
        cls = cls or FOREIGN[family]
        if cls is SFTConfig:
            options = {"bf16": False, "activation_checkpointing": False, **options}
        return cls(
            output_dir=str(tmp_path / "foreign"),
            **{
                "max_steps": 2,
                "report_to": "none",
                "save_strategy": "no",
                "use_cpu": True,
                "logging_steps": 1,
                **options,
            },
        )

    return make


@pytest.fixture
def make_trainer(rows, make_args, tokenizers):
    """A trainer of a family's tiny model, or of what else is given."""

    def make(family, model=None, args=None, **options):
        if model is None and "model_init" not in options:
            model = tiny_model(FAMILY_TYPES[family])
        data = {"train_dataset": rows, "eval_dataset": rows, "processing_class": tokenizers[family]}
        return LeftTrainer(model, args or make_args(max_steps=2), **{**data, **options})

    return make


def positional(function):
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, item in inspect.signature(function).parameters.items() if item.kind in kinds]


@pytest.mark.parametrize("ours", PARENTS)
@pytest.mark.parametrize("name", ["__init__", "create_model_card", "train", "evaluate", "predict", "log"])
def test_positional_arguments_stand_in_the_order_of_the_parent(ours, name):
    theirs = inspect.signature(getattr(PARENTS[ours], name)).parameters
    mine = inspect.signature(getattr(ours, name)).parameters
    order = positional(getattr(ours, name))
    assert order == list(theirs)[: len(order)]
    takes_all = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in mine.values())
    assert set(theirs) <= set(mine) or takes_all


def test_all_that_the_parents_have_in_common_may_be_positional():
    both = zip(*(positional(parent.__init__) for parent in PARENTS.values()), strict=False)
    common = itertools.takewhile(lambda pair: pair[0] == pair[1], both)
    assert positional(LeftTrainer.__init__) == [name for name, _ in common]


@pytest.mark.parametrize("cls", [TrainingArguments, Seq2SeqTrainingArguments, SFTConfig])
@pytest.mark.parametrize("family", FAMILIES)
def test_arguments_of_others_mean_full_fine_tuning(family, cls, foreign_args, make_trainer):
    args = foreign_args(family, cls)
    trainer = make_trainer(family, args=args)
    assert trainer.method.name == "full"
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    assert (trainer.args.learning_rate, trainer.learning_rate_source) == (args.learning_rate, "given")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_beside_arguments_of_others_is_trained_at_their_rate(family, foreign_args, make_trainer):
    args = foreign_args(family)
    trainer = make_trainer(family, args=args, peft_config=LoraConfig(r=2))
    assert trainer.method.name == "lora"
    assert trainer.args.learning_rate == args.learning_rate


@pytest.mark.parametrize("family", FAMILIES)
def test_a_method_may_be_an_argument_of_the_trainer(family, foreign_args, make_trainer, make_args, caplog):
    args = foreign_args(family)
    trainer = make_trainer(family, args=args, peft_method="lora", peft_kwargs={"r": 2})
    assert trainer.model.active_peft_config.r == 2
    assert (trainer.args.learning_rate, trainer.learning_rate_source) == (get_method("lora").learning_rate, "default")
    assert "suits full fine-tuning" in caplog.text
    given = make_trainer(family, args=foreign_args(family, learning_rate=1e-3), peft_method="lora")
    assert (given.args.learning_rate, given.learning_rate_source) == (1e-3, "given")
    beaten = make_trainer(family, args=make_args(peft_method="lora"), peft_method="ia3")
    assert beaten.method.name == "ia3"
    with pytest.raises(ValueError, match="Did you mean 'lora'"):
        make_trainer(family, args=args, peft_method="lorra")
    with pytest.raises(ValueError, match="'r', which is not an option of peft_method='ia3'"):
        make_trainer(family, args=make_args(peft_kwargs={"r": 2}), peft_method="ia3")
    with pytest.raises(ValueError, match="name different methods"):
        make_trainer(family, args=args, peft_method="ia3", peft_config=LoraConfig())
    with pytest.raises(ValueError, match=r"peft_kwargs=\{'r': 3\} would have no effect"):
        make_trainer(family, args=make_args(peft_kwargs={"r": 3}), peft_config=LoraConfig(r=2))


@pytest.mark.parametrize("method", ["full", "lora", "pissa", "adalora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_model_init_makes_a_model_for_each_training(family, method, make_trainer, make_args):
    options = {"init_r": 4, "target_r": 2} if method == "adalora" else {}
    args = make_args(max_steps=4, peft_method=method, peft_kwargs=options)
    trainer = make_trainer(family, args=args, model_init=lambda: tiny_model(FAMILY_TYPES[family]))
    trainer.train()
    first, model = losses(trainer), trainer.model
    trainer.train()
    assert losses(trainer) == pytest.approx(first, rel=1e-6)
    assert trainer.model is not model
    assert trainer.method.name == method
    once = make_trainer(family, args=args)
    once.train()
    assert losses(once) == pytest.approx(first, rel=1e-5)
    with pytest.raises(ValueError, match="model and model_init are both given"):
        make_trainer(family, model=tiny_model(FAMILY_TYPES[family]), model_init=lambda: None)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_search_varies_arguments_and_options_of_the_method(family, make_trainer, make_args):
    seen = []

    def model_init(trial):
        return tiny_model(FAMILY_TYPES[family])

    def search(space, choices, **options):
        trainer = make_trainer(family, args=make_args(max_steps=2, **options), model_init=model_init)
        trainer.add_callback(type("Seen", (Callback,), {"trainer": trainer}))
        sampler = optuna.samplers.GridSampler(choices)
        return trainer.hyperparameter_search(space, n_trials=2, direction="minimize", sampler=sampler)

    class Callback(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            config = model.active_peft_config
            seen.append((self.trainer.method.name, getattr(config, "r", None), args.learning_rate))

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for as_dict in (False, True):

        def space(trial, as_dict=as_dict):
            options = {"r": trial.suggest_categorical("r", [2, 4])}
            rate = {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-3)}
            return rate | ({"peft_kwargs": options} if as_dict else options)

        best = search(space, {"r": [2, 4], "learning_rate": [1e-3]}, peft_kwargs={"lora_alpha": 32})
        assert {(name, r) for name, r, _ in seen} == {("lora", 2), ("lora", 4)}
        assert best.hyperparameters["r"] in (2, 4)
        seen.clear()
    search(lambda trial: {"peft_method": trial.suggest_categorical("m", ["ia3", "lora"])}, {"m": ["ia3", "lora"]})
    assert {(name, rate) for name, _, rate in seen} == {
        (name, get_method(name).learning_rate) for name in ("ia3", "lora")
    }
    with pytest.raises(ValueError, match="'ranks', which is neither a field"):
        search(lambda trial: {"ranks": trial.suggest_categorical("ranks", [2])}, {"ranks": [2]})


@pytest.mark.parametrize("method", ["lora", "lora_plus", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_class_of_the_optimizer_is_the_users(family, method, make_trainer, make_args):
    args = make_args(max_steps=1, peft_method=method, learning_rate=3e-3)
    trainer = make_trainer(family, args=args, optimizer_cls_and_kwargs=(torch.optim.SGD, {"momentum": 0.5}))
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is torch.optim.SGD
    assert {group["momentum"] for group in optimizer.param_groups} == {0.5}
    assert optimizer.defaults["lr"] == 3e-3
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in trainer.model.parameters() if parameter.requires_grad}
    given = make_trainer(family, args=args, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.5}))
    given.train()
    assert given.optimizer.optimizer.defaults["lr"] == 0.5


@pytest.mark.parametrize("method", ["lora", "pissa", "lora_ga", "adalora", "prompt_tuning", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_training_goes_on_from_the_first(family, method, make_trainer, make_args):
    options = {"init_r": 4, "target_r": 2} if method == "adalora" else {}
    args = make_args(max_steps=4, peft_method=method, peft_kwargs=options, save_strategy="steps", save_steps=4)
    trainer = make_trainer(family, args=args)
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    weights = copy.deepcopy(trainer.model.state_dict())
    started = []

    def on_train_begin(*_, model=None, **__):
        started.append(all(torch.equal(value, weights[name]) for name, value in model.state_dict().items()))

    trainer.add_callback(type("Started", (TrainerCallback,), {"on_train_begin": staticmethod(on_train_begin)}))
    trainer.train()
    assert started == [True]
    assert trainer.evaluate()["eval_loss"] != after
    assert [path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")] == ["checkpoint-4"]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_tokens_with_a_collator_need_no_tokenizer(family, make_args, tokenizers):
    features = Dataset.from_list([{"input_ids": [5, 6, 7, 1], "labels": [5, 6, 7, 1]} for _ in range(8)])
    collators = {
        "encoder_decoder": default_data_collator,
        "decoder_only": DataCollatorForLanguageModeling(pad_token_id=0),
    }
    trainer = LeftTrainer(
        tiny_model(FAMILY_TYPES[family]), make_args(max_steps=2), collators[family], features, features
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.save_model()
    assert trainer.processing_class is None
    assert not list(Path(trainer.args.output_dir).glob("tokenizer*"))
    with pytest.raises(ValueError, match="There is no tokenizer"):
        LeftTrainer(tiny_model(FAMILY_TYPES[family]), make_args(overwrite_output_dir=True), train_dataset=features)
    without_pad = copy.deepcopy(tokenizers[family])
    without_pad.pad_token = None
    args = make_args(max_steps=1, overwrite_output_dir=True)
    LeftTrainer(tiny_model(FAMILY_TYPES[family]), args, collators[family], features, None, without_pad).train()


@pytest.mark.parametrize("ours", PARENTS)
def test_a_model_card_takes_the_arguments_of_the_parent(ours, make_trainer):
    trainer = make_trainer(ours.family)
    names = positional(PARENTS[ours].create_model_card)[1:]
    trainer.create_model_card(*(f"the {name}" for name in names))
    card = ModelCard.load(Path(trainer.args.output_dir) / "README.md")
    assert card.text.lstrip().startswith("# the model_name")
    assert "the tags" in card.data.tags
    assert card.data.datasets == [f"the {'dataset_tags' if 'dataset_tags' in names else 'dataset_name'}"]
    if "language" in names:
        assert (card.data.language, card.data.license) == ("the language", "the license")
        assert "the tasks" in card.data.tags
        assert "Data: the dataset the dataset_args." in card.text
        assert "the finetuned_from" in card.text


@pytest.mark.parametrize("family", FAMILIES)
def test_options_of_loading_are_used_or_refused(family, make_args, rows, saved_models, make_trainer, caplog):
    args = make_args(model_init_kwargs={"dtype": "bfloat16"})
    with caplog.at_level(logging.WARNING):
        trainer = LeftTrainer(str(saved_models[family]), args, train_dataset=rows)
    assert "will be ignored" not in caplog.text
    assert trainer.model.get_base_model().dtype == torch.bfloat16
    assert trainer.args.model_init_kwargs == {"dtype": "bfloat16"}
    with pytest.raises(ValueError, match=r"model_init_kwargs=.* has no effect on a model that is loaded already"):
        make_trainer(family, args=args)
    with pytest.raises(ValueError, match=r"quantization_config=.* has no effect on a model that is loaded already"):
        make_trainer(family, quantization_config={"load_in_4bit": True})


@pytest.mark.parametrize("method", ["lora", "bitfit", "layers", "prompt_tuning", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_optimizer_that_trains_nothing_is_refused(family, method, make_trainer, make_args):
    model = tiny_model(FAMILY_TYPES[family])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options = {"args": make_args(peft_method=method, max_steps=1), "optimizers": (optimizer, None)}
    if method == "full":
        trainer = make_trainer(family, model, **options)
        trainer.train()
        assert trainer.optimizer.optimizer is optimizer
        return
    with pytest.raises(ValueError, match=r"optimizer_cls_and_kwargs=\(torch\.optim\.AdamW, \{'lr': 0\.001\}\)"):
        make_trainer(family, model, **options)


def test_optimizers_that_exclude_something_are_refused(make_trainer, make_args, saved_models, no_weights):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    path = str(saved_models["encoder_decoder"])
    for options, message in (
        ({"optimizer_cls_and_kwargs": (torch.optim.SGD, {})}, "each define the optimizer"),
        ({"model_init": lambda: tiny_model("t5")}, "model_init makes a new one"),
        ({"model": path, "peft_method": "lora_plus"}, "which is what the method is"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer("encoder_decoder", optimizers=(optimizer, None), **options)
