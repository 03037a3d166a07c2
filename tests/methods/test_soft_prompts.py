"""Prompts and prefixes stand beside what the model computes from ids."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel

from left_trainer import LeftTrainer, apply_method, get_method, list_methods
from left_trainer.adapters.task_ids import task_inputs
from left_trainer.evaluation.generation import generate_completions
from left_trainer.methods.saving import save_adapter
from left_trainer.methods.training_text import text_inputs
from left_trainer.models import input_embeddings, model_family
from left_trainer.models.decoder_inputs import with_decoder_inputs
from left_trainer.runs.inference import Generator, prepare_for_use
from left_trainer.tuners.p_tuning_v2.layer import PTuningV2Layer
from tiny import CONFIGS, EMBEDDING_CONFIGS, tiny_model, tiny_rows, tiny_tokenizer

SOURCE = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 0, 0, 0]])
INPUT_PROMPTS = [
    method.name for method in list_methods() if method.virtual_tokens and method.virtual_tokens.place == "input"
]
PREFIXES = [
    method.name for method in list_methods() if method.virtual_tokens and method.virtual_tokens.place != "input"
]
# Scaled outside of the table, in it and not at all; tables of the encoder's own; narrower than the model.
SCALED = ("marian", "pegasus", "m2m_100", "own_table", "own_table_marian", "fsmt", "gemma", "gemma2", "xglm", "biogpt")
EMBEDDING_TYPES = (*SCALED, "bart", "t5", "bloom", "narrow_opt", "gpt2", "llama")


def scaled_model(model_type: str) -> Any:
    has_scale = "scale_embedding" in {**CONFIGS, **EMBEDDING_CONFIGS}[model_type]
    return tiny_model(model_type, **({"scale_embedding": True} if has_scale else {}))


def batch(model: Any) -> dict[str, torch.Tensor]:
    mask = SOURCE.ne(0).long()
    labels = torch.tensor([[20, 21, 22, 1], [23, 1, -100, -100]])
    if not model.config.is_encoder_decoder:
        labels = SOURCE.masked_fill(SOURCE.eq(0), -100)
    return with_decoder_inputs(model, {"input_ids": SOURCE, "attention_mask": mask, "labels": labels})


def without_tokens(method: str) -> dict[str, Any]:
    if method == "cpt":
        return {"cpt_token_ids": [], "cpt_mask": [], "cpt_tokens_type_mask": []}
    return {"num_virtual_tokens": 0, **({"num_frozen_tokens": 0} if method == "cartridge" else {})}


def generated(model: Any) -> torch.Tensor:
    arguments = {"max_new_tokens": 5, "num_beams": 2, "do_sample": False}
    if model.config.is_encoder_decoder:
        inputs = {"input_ids": SOURCE, "attention_mask": SOURCE.ne(0).long(), **task_inputs(model, len(SOURCE))}
        return model.generate(**inputs, **arguments)
    return generate_completions(model, [row[row.ne(0)] for row in SOURCE], 0, **arguments)


@pytest.mark.parametrize("model_type", EMBEDDING_TYPES)
@pytest.mark.parametrize("method", [*INPUT_PROMPTS, *PREFIXES])
def test_without_virtual_tokens_loss_and_texts_are_the_base_models(method, model_type, monkeypatch):
    # Nothing to train is refused elsewhere; here it shows what stands around the prompts.
    monkeypatch.setattr("left_trainer.methods.options.check_numbers", lambda *_: None)
    model = scaled_model(model_type)
    if model_family(model) not in get_method(method).model_families:
        pytest.skip("not for this family")
    if method == "cpt":
        pytest.skip("PEFT's loss needs a context")
    inputs = batch(model)
    with torch.no_grad():
        loss, texts = model(**inputs).loss, generated(model)
        prompted = apply_method(model, method, without_tokens(method), seed=0).eval()
        assert prompted(**inputs, **task_inputs(prompted, 2)).loss.item() == pytest.approx(loss.item(), abs=1e-6)
        assert torch.equal(generated(prompted), texts)


@pytest.mark.parametrize("model_type", EMBEDDING_TYPES)
def test_embeddings_compute_what_ids_do(model_type):
    model = scaled_model(model_type)
    inputs = batch(model)
    ids = inputs.pop("input_ids")
    with torch.no_grad():
        loss = model(input_ids=ids, **inputs).loss
        if model_type == "fsmt":  # which masks the decoder where it sees ids
            encoded = model.get_encoder()(input_ids=None, inputs_embeds=input_embeddings(model)(ids), **masked(inputs))
            inputs |= {"encoder_outputs": encoded, "input_ids": ids}
        else:
            inputs["inputs_embeds"] = input_embeddings(model)(ids)
        assert model(**inputs).loss.item() == pytest.approx(loss.item(), abs=1e-6)


def masked(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"attention_mask": inputs["attention_mask"]}


@pytest.mark.parametrize("model_type", ["t5", "marian", "own_table", "fsmt", "llama", "gpt2", "gemma"])
@pytest.mark.parametrize("method", INPUT_PROMPTS)
def test_a_row_in_a_batch_is_the_row_alone(method, model_type):
    model = scaled_model(model_type)
    if model_family(model) not in get_method(method).model_families:
        pytest.skip("not for this family")
    options = {"num_virtual_tokens": 3}
    if method == "cpt":
        options = dict(get_method(method).derive_from_data(None, [5, 6, 7]))
    prompted = apply_method(model, method, options, seed=0).eval()
    inputs = batch(prompted.get_base_model())
    alone = {name: value[1:] for name, value in inputs.items()}
    alone |= {name: alone[name][:, :3] for name in ("input_ids", "attention_mask")}
    if not model.config.is_encoder_decoder:
        alone["labels"] = alone["labels"][:, :3]
    with torch.no_grad():
        together = prompted(**inputs, **task_inputs(prompted, 2)).logits[1]
        expected = prompted(**alone, **task_inputs(prompted, 1)).logits[0]
    torch.testing.assert_close(together[: len(expected)], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [name for name in INPUT_PROMPTS if name != "cpt"])
def test_prompts_behind_the_source_leave_its_positions_and_are_hidden_from_the_decoder(method):
    prompted = apply_method(scaled_model("bart"), method, {"num_virtual_tokens": 3}, seed=0).eval()
    assert prompted.active_peft_config.prompt_position == "after"
    seen: list[dict[str, Any]] = []
    base = prompted.get_base_model()
    layer = base.get_encoder().layers[0]
    layer.register_forward_pre_hook(lambda module, args: seen.append({"hidden": args[0]}))
    with torch.no_grad():
        base(**batch(base))
        outputs = prompted(**batch(base), **task_inputs(prompted, 2))
    of_ids, of_prompts = (call["hidden"] for call in seen)
    torch.testing.assert_close(of_prompts[0, :6], of_ids[0])
    torch.testing.assert_close(of_prompts[1, :3], of_ids[1, :3])
    assert not torch.equal(of_prompts[1, 3:6], of_ids[1, 3:6])
    assert outputs.encoder_last_hidden_state.shape[1] == SOURCE.shape[1]


@pytest.mark.parametrize(("model_type", "expected"), [("t5", "before"), ("bart", "after"), ("marian", "after")])
def test_the_model_decides_where_prompts_stand_unless_the_user_does(model_type, expected):
    def position(**options: Any) -> str:
        model = apply_method(scaled_model(model_type), "prompt_tuning", {"num_virtual_tokens": 2, **options})
        return model.active_peft_config.prompt_position

    assert position() == expected
    assert [position(prompt_position=chosen) for chosen in ("before", "after")] == ["before", "after"]


@pytest.mark.parametrize("model_type", ["t5", "own_table", "marian"])
@pytest.mark.parametrize("position", ["before", "after"])
def test_a_saved_prompt_is_used_as_it_was_trained(model_type, position, tmp_path):
    folder = tmp_path / "base"
    scaled_model(model_type).save_pretrained(folder)
    tiny_tokenizer("encoder_decoder").save_pretrained(folder)
    options = {"num_virtual_tokens": 3, "prompt_position": position}
    trained = apply_method(type(scaled_model(model_type)).from_pretrained(folder), "prompt_tuning", options).eval()
    torch.nn.init.normal_(trained.prompt_encoder["default"].embedding.weight, std=3)
    save_adapter(trained, tmp_path / "adapter")
    tiny_tokenizer("encoder_decoder").save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["prompt_position"] == position
    loaded = PeftModel.from_pretrained(type(scaled_model(model_type)).from_pretrained(folder), tmp_path / "adapter")
    prepare_for_use(loaded)
    generator = Generator(str(tmp_path / "adapter"), device="cpu", max_new_tokens=5)
    inputs = batch(trained.get_base_model())
    with torch.no_grad():
        expected = trained(**inputs).loss
        for model in (loaded.eval(), generator.model):
            assert model(**inputs).loss.item() == pytest.approx(expected.item(), abs=1e-6)
            assert torch.equal(generated(model), generated(trained))


@pytest.mark.parametrize("method", ["prompt_tuning", "multitask_prompt_tuning"])
@pytest.mark.parametrize("model_type", ["t5", "marian", "own_table", "llama"])
def test_prompts_start_from_tokens_of_the_training_data(method, model_type, make_args):
    model = scaled_model(model_type)
    args = make_args(peft_method=method, max_steps=1, learning_rate=0.0, peft_kwargs={"num_virtual_tokens": 8})
    tokenizer = tiny_tokenizer(model_family(model))
    trainer = LeftTrainer(model, args, train_dataset=Dataset.from_list(tiny_rows()), processing_class=tokenizer)
    trainer.train()
    prompted = trainer.model
    prompts = prompted.get_prompt(batch_size=1, **task_inputs(prompted, 1))[0]
    table = prompted.word_embeddings(torch.arange(prompted.word_embeddings.num_embeddings))
    distances = (prompts[:, None] - table).abs().amax(dim=-1)
    assert distances.min(dim=1).values.max() < 1e-5
    tokens = distances[:8].argmin(dim=1).tolist()
    text = "".join(row["prompt"] + row["completion"] for row in tiny_rows())
    assert set(tokens) <= set(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert len(set(tokens)) == 8


def started(method: str, model_type: str, make_args: Any, **options: Any) -> LeftTrainer:
    """A trainer whose adapter has started and not moved."""
    model, options = scaled_model(model_type), {"num_virtual_tokens": 6, **options}
    args = make_args(peft_method=method, max_steps=1, learning_rate=0.0, peft_kwargs=options)
    rows, tokenizer = Dataset.from_list(tiny_rows()), tiny_tokenizer(model_family(model))
    trainer = LeftTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return trainer


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("method", [*PREFIXES, "p_tuning_v2"])
def test_prefixes_start_as_the_keys_and_values_of_text(method, model_type, make_args):
    """A row after the prefix is the row after the text, for all methods whose prefixes take the text's positions."""
    trainer = started(method, model_type, make_args)
    model = trainer.model.eval()
    text = text_inputs(model.get_base_model(), trainer._first_batches, 6)["input_ids"]
    assert text.shape == (1, 6)
    with torch.no_grad():
        if method == "p_tuning_v2":
            layer = next(module for module in model.modules() if isinstance(module, PTuningV2Layer))
            with model.disable_adapter():
                cache = model(input_ids=text, use_cache=True).past_key_values
            expected = torch.cat([cache.layers[0].keys, cache.layers[0].values])
            torch.testing.assert_close(layer.p_tuning_v2_prefix["default"], expected, rtol=0, atol=1e-5)
            return
        logits = model(input_ids=SOURCE[:1], attention_mask=torch.ones_like(SOURCE[:1])).logits
        joined = model.get_base_model()(input_ids=torch.cat([text, SOURCE[:1]], dim=1)).logits[:, 6:]
    torch.testing.assert_close(logits, joined, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", [*PREFIXES, "p_tuning_v2"])
def test_the_user_chooses_how_prefixes_start(method, make_args):
    def prefix(model_type: str, **options: Any) -> torch.Tensor:
        model = started(method, model_type, make_args, **options).model
        return next(parameter for parameter in model.parameters() if parameter.requires_grad).detach().clone()

    for model_type, automatic, other in (("llama", "text", "random"), ("t5", "random", "text")):
        assert torch.equal(prefix(model_type), prefix(model_type, prefix_start=automatic))
        assert not torch.equal(prefix(model_type), prefix(model_type, prefix_start=other))
    with pytest.raises(ValueError, match="expected one of auto, text, random"):
        prefix("llama", prefix_start="word")


def test_a_projected_prefix_starts_at_random(make_args):
    trainer = started("prefix_tuning", "llama", make_args, prefix_projection=True, encoder_hidden_size=8)
    before = trainer.model.prompt_encoder["default"].embedding.weight.clone()
    trainer.hooks.initialize(trainer.model, trainer._first_batches, seed=7)
    assert torch.equal(trainer.model.prompt_encoder["default"].embedding.weight, before)
