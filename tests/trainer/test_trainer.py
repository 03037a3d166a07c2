"""The front door, and the forms of models, data and arguments it takes."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
)
from trl import SFTConfig, SFTTrainer

from left_trainer import LeftSeq2SeqTrainer, LeftSFTTrainer, LeftTrainer, apply_method, get_method
from left_trainer.adapters.files import TRAINING_STATE_FILE
from left_trainer.models import FAMILIES
from log_history import gradient_norms, losses
from tiny import FAMILY_TYPES, tiny_model, tiny_rows


def test_front_door_chooses_and_isinstance_holds(rows, make_args, tokenizers, saved_models):
    for family, concrete, parent in (
        ("encoder_decoder", LeftSeq2SeqTrainer, Seq2SeqTrainer),
        ("decoder_only", LeftSFTTrainer, SFTTrainer),
    ):
        trainer = LeftTrainer(str(saved_models[family]), make_args(), train_dataset=rows)
        assert type(trainer) is concrete
        assert isinstance(trainer, LeftTrainer)
        order = type(trainer).__mro__
        assert order.index(concrete) < order.index(LeftTrainer) < order.index(parent) < order.index(Trainer)
        trainer.train()
        assert len(losses(trainer)) == 4


def test_each_init_runs_once(rows, make_args, tokenizers, monkeypatch):
    calls = []
    original = Trainer.__init__
    monkeypatch.setattr(
        Trainer, "__init__", lambda self, *a, **k: (calls.append(type(self)), original(self, *a, **k))[1]
    )
    LeftTrainer(tiny_model("llama"), make_args(), train_dataset=rows, processing_class=tokenizers["decoder_only"])
    assert calls == [LeftSFTTrainer]


def test_extending_the_front_door_is_refused():
    with pytest.raises(TypeError, match=r"class Mine\(LeftSeq2SeqTrainer\)"):

        class Mine(LeftTrainer):
            pass


def test_extending_a_concrete_class_works(rows, make_args, tokenizers):
    class Mine(LeftSeq2SeqTrainer):
        def compute_loss(self, *args, **kwargs):
            return 2 * super().compute_loss(*args, **kwargs)

    results = []
    for cls in (LeftSeq2SeqTrainer, Mine):
        trainer = cls(
            tiny_model("t5"),
            make_args(max_steps=1),
            train_dataset=rows,
            processing_class=tokenizers["encoder_decoder"],
        )
        trainer.train()
        results.append(losses(trainer)[0])
    assert results[1] == pytest.approx(2 * results[0], rel=1e-5)


def test_arguments_of_hugging_face_and_trl_are_kept(rows, tokenizers, tmp_path):
    given = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path / "a"), learning_rate=3e-3, weight_decay=0.1, report_to="none", use_cpu=True
    )
    trainer = LeftTrainer(tiny_model("t5"), given, train_dataset=rows, processing_class=tokenizers["encoder_decoder"])
    assert (trainer.args.learning_rate, trainer.args.weight_decay) == (3e-3, 0.1)
    assert trainer.args.max_length is None
    given = SFTConfig(output_dir=str(tmp_path / "b"), bf16=False, max_length=77, report_to="none", use_cpu=True)
    trainer = LeftTrainer(tiny_model("llama"), given, train_dataset=rows, processing_class=tokenizers["decoder_only"])
    assert (trainer.args.max_length, trainer.args.learning_rate) == (77, given.learning_rate)
    assert trainer.args.gradient_checkpointing is True


def test_learning_rate_is_the_methods_own_and_the_users_arguments_stay_as_they_are(rows, make_args, tokenizers):
    args = make_args(peft_method="ia3")
    trainer = LeftTrainer(tiny_model("t5"), args, train_dataset=rows, processing_class=tokenizers["encoder_decoder"])
    assert trainer.args.learning_rate == trainer.method.narrow_learning_rate
    assert args.learning_rate is None


def test_an_explicit_config_beats_the_method(rows, make_args, tokenizers):
    config = LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=["k"])
    trainer = LeftTrainer(
        tiny_model("t5"),
        make_args(peft_method="ia3"),
        train_dataset=rows,
        processing_class=tokenizers["encoder_decoder"],
        peft_config=config,
    )
    assert trainer.method.name == "lora"
    assert trainer.model.applied_method.match_table == {"k": 6}
    assert trainer.args.learning_rate == get_method("lora").narrow_learning_rate


def test_a_peft_model_is_trained_further(rows, make_args, tokenizers, saved_models, tmp_path):
    trainer = LeftTrainer(str(saved_models["encoder_decoder"]), make_args(peft_method="p_tuning"), train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / TRAINING_STATE_FILE).is_file()
    further = LeftTrainer(str(tmp_path / "adapter"), make_args(), train_dataset=rows, eval_dataset=rows)
    assert further.method.name == "p_tuning"
    assert further.evaluate()["eval_loss"] == pytest.approx(trainer.evaluate(rows)["eval_loss"], abs=1e-6)
    further.train()
    assert max(gradient_norms(further)) > 0

    model = apply_method(tiny_model("t5"), "lora", seed=0)
    started = LeftTrainer(model, make_args(), train_dataset=rows, processing_class=tokenizers["encoder_decoder"])
    assert started.model is model
    started.train()


@pytest.mark.parametrize("form", ["text", "messages", "tokenized"])
def test_trl_forms_on_decoder_only_models(form, rows, make_args, tokenizers):
    tokenizer = copy.deepcopy(tokenizers["decoder_only"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    data = {
        "text": [{"text": row["prompt"] + row["completion"]} for row in rows],
        "messages": [
            {
                "messages": [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["completion"]},
                ]
            }
            for row in rows
        ],
        "tokenized": [{"input_ids": [2, 5, 6, 7], "labels": [-100, -100, 6, 7]} for _ in rows],
    }[form]
    trainer = LeftTrainer(
        tiny_model("llama"), make_args(), train_dataset=Dataset.from_list(data), processing_class=tokenizer
    )
    trainer.train()
    assert max(gradient_norms(trainer)) > 0


def test_tokenized_features_on_encoder_decoder_models(make_args, tokenizers):
    features = Dataset.from_list([{"input_ids": [5, 6, 1], "labels": [7] * (1 + i % 3) + [1]} for i in range(8)])
    trainer = LeftTrainer(
        tiny_model("bart"), make_args(), train_dataset=features, processing_class=tokenizers["encoder_decoder"]
    )
    trainer.train()
    assert max(gradient_norms(trainer)) > 0


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "full"])
def test_trainable_parameters_of_a_half_precision_model_are_float32(method):
    model = apply_method(tiny_model("bart").half(), method)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}


@pytest.mark.parametrize("family", sorted(FAMILY_TYPES))
def test_bf16_trains_on_a_cpu(family, rows, make_args, tokenizers):
    """As float32 does within the rounding; the weights stay float32."""
    runs = []
    for bf16, precision in ((True, "bf16"), (False, "no")):
        trainer = LeftTrainer(
            tiny_model(FAMILY_TYPES[family]),
            make_args(bf16=bf16, use_cpu=True, overwrite_output_dir=True),
            train_dataset=rows,
            processing_class=tokenizers[family],
        )
        assert trainer.accelerator.mixed_precision == precision
        trainer.train()
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
        assert max(gradient_norms(trainer)) > 0
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=1e-2)
    assert runs[0] != runs[1]


def test_checkpoints_of_an_earlier_run_are_not_overwritten(rows, make_args, saved_models):
    def trainer(**options):
        args = make_args(save_strategy="steps", save_steps=2, **options)
        return LeftTrainer(str(saved_models["encoder_decoder"]), args, train_dataset=rows)

    trainer().train()
    with pytest.raises(FileExistsError, match=r"train\(resume_from_checkpoint=True\)"):
        trainer().train()
    trainer(overwrite_output_dir=True, max_steps=2).train()
    names = {path.name for path in Path(trainer().args.output_dir).glob("checkpoint-*")}
    assert names == {"checkpoint-2"}  # the longer run's last checkpoint must not be what a resume finds


def test_resume_skips_a_checkpoint_that_was_cut_off(rows, make_args, saved_models):
    def trainer():
        args = make_args(save_strategy="steps", save_steps=2)
        return LeftTrainer(str(saved_models["encoder_decoder"]), args, train_dataset=rows)

    first = trainer()
    first.train()
    Path(first.args.output_dir, "checkpoint-4", "trainer_state.json").unlink()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == pytest.approx(losses(first), rel=1e-6)


def test_blenderbot_with_fewer_encoder_layers(rows, make_args, tokenizers):
    model = tiny_model("blenderbot", encoder_layers=1, decoder_layers=3)
    args = make_args(peft_method="prefix_tuning", peft_kwargs={"num_virtual_tokens": 2})
    trainer = LeftTrainer(model, args, train_dataset=rows, processing_class=tokenizers["encoder_decoder"])
    trainer.train()
    assert trainer.model.active_peft_config.num_layers == 3


def test_model_cards(rows, make_args, saved_models):
    for path in saved_models.values():
        trainer = LeftTrainer(str(path), make_args(overwrite_output_dir=True), train_dataset=rows)
        trainer.save_model()
        trainer.create_model_card(model_name="mine")
        card = Path(trainer.args.output_dir, "README.md").read_text()
        data = ModelCard(card).data
        assert {"left_trainer", "lora"} <= set(data.tags)
        assert data.base_model is None  # a path is no name on the hub
        assert card.count("# mine") == 1
        assert f'from_pretrained("{path}")' in card


def test_trackers_receive_our_figures(rows, make_args, saved_models):
    from transformers import TrainerCallback

    from left_trainer import TrainableParametersCallback

    class Tracker(TrainerCallback):
        seen: list[str] = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.extend(logs)

    trainer = LeftTrainer(
        str(saved_models["encoder_decoder"]),
        make_args(max_steps=1),
        train_dataset=rows,
        callbacks=[Tracker(), TrainableParametersCallback()],
    )
    trainer.train()
    assert "parameters/trainable" in Tracker.seen


def test_multiple_evaluation_sets(rows, make_args, saved_models):
    for path in saved_models.values():
        evaluation = {"first": rows.select(range(4)), "second": rows.select(range(4, 8))}
        trainer = LeftTrainer(str(path), make_args(), train_dataset=rows, eval_dataset=evaluation)
        metrics = trainer.evaluate()
        assert {"eval_first_loss", "eval_second_loss"} <= set(metrics)


def test_without_adapter_is_the_base_model(make_args, saved_models):
    data = Dataset.from_list(tiny_rows(6))
    for family, path in saved_models.items():
        args = make_args(
            peft_method="prompt_tuning", predict_with_generate=True, generation_max_length=6, overwrite_output_dir=True
        )
        trainer = LeftTrainer(str(path), args, train_dataset=data)
        with trainer.without_adapter():
            disabled = trainer.predict(data)
        enabled = trainer.predict(data)
        assert isinstance(trainer.model, PeftModel)
        base = LeftTrainer(
            str(path),
            make_args(
                peft_method="full", predict_with_generate=True, generation_max_length=6, overwrite_output_dir=True
            ),
            train_dataset=data,
        ).predict(data)
        assert (disabled.predictions == base.predictions).all(), family
        assert disabled.metrics["test_loss"] == pytest.approx(base.metrics["test_loss"], abs=1e-6)
        assert enabled.metrics["test_loss"] != pytest.approx(base.metrics["test_loss"], abs=1e-6)


def test_push_to_hub_uploads_the_adapter_with_its_card(rows, make_args, saved_models, monkeypatch):
    """The hub is out of reach; what would be sent to it is not."""

    class Hub:
        uploaded: dict[str, object] = {}

        def whoami(self, token=None):
            return {"name": "me"}

        def create_repo(self, name, **kwargs):
            return type("Url", (), {"repo_id": name})()

        def upload_folder(self, **kwargs):
            self.uploaded = {**kwargs, "files": {path.name for path in Path(kwargs["folder_path"]).iterdir()}}

    hub = Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    monkeypatch.setattr("left_trainer.trainer.pushing.HfApi", lambda: hub)
    for family, path in saved_models.items():
        args = make_args(push_to_hub=True, hub_model_id="me/mine", overwrite_output_dir=True, max_steps=1)
        trainer = LeftTrainer(str(path), args, train_dataset=rows)
        trainer.train()
        trainer.push_to_hub(dataset_name="me/rows", language="en")
        assert hub.uploaded["repo_id"] == "me/mine"
        assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= hub.uploaded["files"]
        card = ModelCard.load(Path(trainer.args.output_dir) / "README.md")
        assert card.data.datasets == ["me/rows"], family
        assert card.text.lstrip().startswith("# mine")


REMOTE_MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM

class NovelConfig(LlamaConfig):
    model_type = "novel"

class NovelForCausalLM(LlamaForCausalLM):
    config_class = NovelConfig
"""


def test_a_model_with_its_own_code(rows, make_args, tmp_path, saved_models, monkeypatch):
    """As the hub's models with `trust_remote_code=True`; their class is in no mapping of transformers."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "novel"
    shutil.copytree(saved_models["decoder_only"], folder)
    (folder / "modeling_novel.py").write_text(REMOTE_MODEL)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "modeling_novel.NovelConfig", "AutoModelForCausalLM": "modeling_novel.NovelForCausalLM"}
    config |= {"model_type": "novel", "architectures": ["NovelForCausalLM"], "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    args = make_args(trust_remote_code=True, max_steps=1)
    trainer = LeftTrainer(str(folder), args, train_dataset=rows)
    trainer.train()
    assert type(trainer) is LeftSFTTrainer
    assert type(trainer.model.get_base_model()).__name__ == "NovelForCausalLM"
    with pytest.raises(ValueError, match="contains custom code"):
        LeftTrainer(str(folder), make_args(max_steps=1), train_dataset=rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_arguments_stay_as_they_were(family, make_args, tokenizers):
    """What the method, the model and an evaluation decide is in the trainer's own copy."""
    args = make_args(predict_with_generate=True, peft_method="cpt" if family == "decoder_only" else "lora")
    before = copy.deepcopy(args.to_dict())
    rows = Dataset.from_list(tiny_rows(4))
    model = tiny_model("t5" if family == "encoder_decoder" else "llama")
    trainer = LeftTrainer(model, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizers[family])
    own = trainer.args
    values = own.to_dict()
    assert own.learning_rate == trainer.method.default_learning_rate(trainer.source.width)
    trainer.train()
    trainer.evaluate()
    loss = trainer.evaluate_loss(rows, "general")
    assert loss == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)
    assert trainer.args is own
    assert own.to_dict() == values
    assert args.to_dict() == before
