"""What a run saved is what it trained and scored: generated, evaluated, loaded, merged."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tokenizers import processors

from left_trainer import DataArguments, LeftTrainer, LeftTrainingArguments, ModelArguments, list_tasks
from left_trainer.adapters.run_settings import SETTINGS_FILE
from left_trainer.cli.main import main
from left_trainer.evaluation.text_metrics import decode
from left_trainer.models import FAMILIES, auto_class, load_model, model_family
from left_trainer.runs.evaluation import Evaluation, evaluate_saved
from left_trainer.runs.fine_tuning import fine_tune, set_up
from left_trainer.runs.inference import Generator
from left_trainer.runs.merging import merge_adapter
from tiny import FAMILY_TYPES, tiny_model, tiny_rows, tiny_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in someone/model"),
    pytest.mark.filterwarnings("ignore:Found missing adapter keys"),
    pytest.mark.filterwarnings("ignore:Model (has|with) (the )?`tie_word_embeddings=True`"),
]
QUICK = {"max_steps": 4, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "learning_rate": 2e-2}
SCORED = {"predict_with_generate": True, "generation_num_beams": 3, "generation_max_length": 6}
LONG = "a red and a green and a blue one " * 12


def base_model(folder: Path, family: str, dtype: torch.dtype = torch.float32, **config: object) -> Path:
    tiny_model(FAMILY_TYPES[family], **config).to(dtype).save_pretrained(folder)
    tiny_tokenizer(family).save_pretrained(folder)
    return folder


def train(base: object, folder: Path, tokenizer: object = None, **options: object) -> LeftTrainer:
    args = LeftTrainingArguments(output_dir=str(folder), **{**QUICK, **SCORED, **options})
    rows = Dataset.from_list(tiny_rows())
    trainer = LeftTrainer(base, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return trainer


def loss_of(model: object, tokenizer: object = None, rows: Dataset | None = None, **options: object) -> float:
    rows = rows or Dataset.from_list(tiny_rows())
    with tempfile.TemporaryDirectory() as folder:
        args = LeftTrainingArguments(output_dir=folder, **{**QUICK, **options})
        return LeftTrainer(model, args, train_dataset=rows, processing_class=tokenizer).evaluate(rows)["eval_loss"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", list_tasks(), ids=lambda task: task.name)
def test_a_saved_run_answers_and_scores_as_it_reported(family, task, saved_models, tmp_path):
    """Long sources included, from the words that a user has; with four beams, which no default says."""
    texts = [LONG + str(number) if number % 2 else f"one red {number}" for number in range(6)]
    rows = [{task.source_column: text, task.target_column: "red and blue"} for text in texts]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    run = set_up(
        task,
        ModelArguments(model_name_or_path=str(saved_models[family])),
        DataArguments(train_file=str(file), validation_file=str(file), test_file=str(file)),
        LeftTrainingArguments(
            output_dir=str(tmp_path / "run"), **{**QUICK, **SCORED, "generation_num_beams": 4, "max_length": 100}
        ),
    )
    report = fine_tune(run)
    assert any(
        row["prompt"] != task.prompt.format(source=text) for row, text in zip(run.data["test"], texts, strict=True)
    )
    scored = decode(run.trainer.processing_class, run.trainer.predict(run.data["test"]).predictions)
    generator = Generator(str(tmp_path / "run"))
    assert generator([task.prompt.format(source=text) for text in texts]) == scored
    assert generator(run.data["test"]["prompt"]) == scored
    evaluated = evaluate_saved(Evaluation(path=str(tmp_path / "run"), data=DataArguments(test_file=str(file))))
    untimed = {name for name in report.metrics.after if not name.endswith(("_second", "runtime", "_time"))}
    assert {name: evaluated.metrics[name] for name in untimed} == pytest.approx(
        {name: report.metrics.after[name] for name in untimed}, abs=1e-5
    )
    assert (evaluated.num_beams, evaluated.max_new_tokens, evaluated.test_rows) == (4, 6, 6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_keeps_the_settings_it_was_scored_with(family, saved_models, tmp_path):
    trainer = train(str(saved_models[family]), tmp_path / "run", peft_method="full", max_length=12)
    prompts = [row["prompt"] for row in tiny_rows()]
    scored = decode(trainer.processing_class, trainer.predict(Dataset.from_list(tiny_rows())).predictions)
    plain = auto_class(family).from_pretrained(tmp_path / "run").generation_config
    assert (plain.num_beams, plain.max_new_tokens) == (3, 6)
    if family == "encoder_decoder":  # of a decoder-only row, whose completion counts too, max_length leaves no prompt
        assert Generator(str(tmp_path / "run"))(prompts) == scored
    one = Generator(str(tmp_path / "run"), num_beams=1, max_new_tokens=2).generation_config
    assert (one.num_beams, one.max_new_tokens) == (1, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_beyond_the_positions_are_cut_and_counted(family, saved_models, tmp_path, caplog):
    base = saved_models[family]
    train(str(base), tmp_path / "run", peft_method="lora")
    generator = Generator(str(tmp_path / "run"), prompt="Text: {source}\nSummary:")
    with caplog.at_level("WARNING"):
        answers = generator(["Text: " + "red " * 12016 + "\nSummary:", "Text: red\nSummary:", "green " * 12016])
    assert len(answers) == 3
    assert "2 of 3 prompts are too long" in caplog.text


def test_a_cut_prompt_begins_as_a_text_and_ends_as_it_did(saved_models, tmp_path, monkeypatch):
    """As in the evaluations of the run, which keep the token that begins a text."""
    train(str(saved_models["decoder_only"]), tmp_path / "run", peft_method="lora")
    generator, asked = Generator(str(tmp_path / "run")), []
    monkeypatch.setattr(generator, "_answer", lambda features: asked.extend(features["input_ids"]) or [])
    long = "green " * 200 + "and red:"
    generator([long, "red"])
    whole, begin = generator.tokenizer(long)["input_ids"], generator.tokenizer.bos_token_id
    assert asked[0] == [begin, *whole[1 - generator.limits.tokens :]]
    assert asked[1] == generator.tokenizer("red")["input_ids"]


@pytest.mark.parametrize("kind", ["add_eos_token", "template"])
def test_a_tokenizer_that_ends_every_text_does_not_end_prompts(kind, saved_models, tmp_path):
    tokenizer = tiny_tokenizer("decoder_only")
    if kind == "add_eos_token":
        tokenizer.add_bos_token = tokenizer.add_eos_token = True
    else:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("</s>", 1), ("<s>", 2)]
        )
    assert tokenizer("red")["input_ids"][-1] == tokenizer.eos_token_id
    trainer = train(str(saved_models["decoder_only"]), tmp_path / "run", tokenizer)
    usual = train(str(saved_models["decoder_only"]), tmp_path / "usual")
    assert trainer.train_dataset["input_ids"] == usual.train_dataset["input_ids"]
    assert tokenizer("red")["input_ids"][-1] == tokenizer.eos_token_id
    rows = tiny_rows()
    scored = decode(tokenizer, trainer.predict(Dataset.from_list(rows)).predictions)
    assert Generator(str(tmp_path / "run"))([row["prompt"] for row in rows]) == scored


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "pissa", "p_tuning", "ia3"])
def test_added_tokens_come_back_with_the_adapter(method, family, saved_models, tmp_path):
    """Following the advice to resize the embeddings."""
    tokenizer = tiny_tokenizer(family)
    tokenizer.add_tokens(["<new>"])
    model = auto_class(family).from_pretrained(saved_models[family])
    model.resize_token_embeddings(len(tokenizer))
    options = {"num_virtual_tokens": 3, "encoder_hidden_size": 8} if method == "p_tuning" else None
    trainer = train(model, tmp_path / "run", tokenizer, peft_method=method, peft_kwargs=options)
    rows = Dataset.from_list([{**row, "prompt": f"<new>{row['prompt']}"} for row in tiny_rows(4)])
    trained = trainer.evaluate(rows)["eval_loss"]
    assert loss_of(str(tmp_path / "run"), rows=rows) == pytest.approx(trained, abs=1e-5)
    scored = decode(tokenizer, trainer.predict(rows).predictions)
    assert Generator(str(tmp_path / "run"))(rows["prompt"]) == scored
    if method in ("lora", "pissa", "ia3"):
        merge_adapter(str(tmp_path / "run"), tmp_path / "merged")
        merged = auto_class(family).from_pretrained(tmp_path / "merged")
        assert loss_of(merged, tokenizer, rows, peft_method="full") == pytest.approx(trained, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trained_in", [torch.float32, torch.bfloat16])
def test_an_adapter_is_used_and_merged_in_the_dtype_it_was_trained_in(trained_in, family, tmp_path):
    base = base_model(tmp_path / "base", family, torch.bfloat16)
    model = auto_class(family).from_pretrained(base, dtype=trained_in)
    trainer = train(model, tmp_path / "run", tiny_tokenizer(family))
    trained = trainer.evaluate(Dataset.from_list(tiny_rows()))["eval_loss"]
    assert loss_of(str(tmp_path / "run")) == pytest.approx(trained, abs=1e-5)
    assert Generator(str(tmp_path / "run")).model.get_base_model().dtype == trained_in
    assert merge_adapter(str(tmp_path / "run"), tmp_path / "merged") == trained_in
    merged = auto_class(family).from_pretrained(tmp_path / "merged")
    assert merged.dtype == trained_in
    tolerance = 1e-5 if trained_in == torch.float32 else 2e-2
    assert loss_of(merged, tiny_tokenizer(family), peft_method="full") == pytest.approx(trained, abs=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_options_that_change_the_base_model_are_repeated(family, saved_models, tmp_path):
    names = ("num_layers", "num_decoder_layers") if family == "encoder_decoder" else ("num_hidden_layers",)
    options = dict.fromkeys(names, 1)
    trainer = train(str(saved_models[family]), tmp_path / "run", model_init_kwargs=options)
    trained = trainer.evaluate(Dataset.from_list(tiny_rows()))["eval_loss"]
    assert loss_of(str(tmp_path / "run")) == pytest.approx(trained, abs=1e-5)


def test_the_revision_of_the_base_model_is_recorded_and_loaded(tmp_path, monkeypatch):
    """Two revisions in a cache of the Hub; `main` is another model than the one trained on."""
    cache = tmp_path / "hub" / "models--someone--model"
    for number, revision in enumerate(("main", "v1")):
        commit = str(number) * 40
        snapshot = cache / "snapshots" / commit
        tiny_model("llama", seed=number).save_pretrained(snapshot)
        tiny_tokenizer("decoder_only").save_pretrained(snapshot)
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / revision).write_text(commit)
    where = {"cache_dir": str(tmp_path / "hub")}
    trainer = train("someone/model", tmp_path / "run", model_init_kwargs={"revision": "v1", **where})
    assert trainer.model.active_peft_config.revision == "v1"
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["revision"] == "v1"
    trained = trainer.evaluate(Dataset.from_list(tiny_rows()))["eval_loss"]
    assert loss_of(str(tmp_path / "run"), model_init_kwargs=where) == pytest.approx(trained, abs=1e-5)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_an_adapter_that_does_not_fit_is_refused(change, saved_models, tmp_path, capsys):
    train(str(saved_models["decoder_only"]), tmp_path / "run")
    file = tmp_path / "run" / "adapter_model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[0]
    tensor = weights.pop(name) if change != "unexpected" else weights[name]
    weights |= {
        "unexpected": {name.replace("layers.0", "layers.7"): tensor.clone()},
        "shape": {name: tensor[:, :3]},
    }.get(change, {})
    save_file({key: value.contiguous() for key, value in weights.items()}, file, metadata={"format": "pt"})
    for use in (Generator, loss_of, lambda path: merge_adapter(path, tmp_path / "merged")):
        with pytest.raises(ValueError, match="does not fit") as error:
            use(str(tmp_path / "run"))
        assert "layers.0" in str(error.value) or "layers.7" in str(error.value)
    with pytest.raises(SystemExit):
        main(["merge", "--adapter", str(tmp_path / "run"), "--output_dir", str(tmp_path / "merged")])
    assert "does not fit" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_model_with_weights_missing_is_refused(family, saved_models, tmp_path):
    shutil.copytree(saved_models[family], tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    name = sorted(name for name in weights if "layer" in name)[0]
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=name):
        load_model(str(tmp_path / "base"))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_an_adapter_on_one_of_two_tied_embeddings_merges_into_untied_ones(model_type, tmp_path):
    tiny_model(model_type, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    tiny_tokenizer("decoder_only").save_pretrained(tmp_path / "base")
    target = "wte" if model_type == "gpt2" else "embed_tokens"
    trainer = train(str(tmp_path / "base"), tmp_path / "run", peft_kwargs={"target_modules": [target]})
    trained = trainer.evaluate(Dataset.from_list(tiny_rows()))["eval_loss"]
    merge_adapter(str(tmp_path / "run"), tmp_path / "merged")
    merged = auto_class("decoder_only").from_pretrained(tmp_path / "merged")
    assert not torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight)
    assert loss_of(merged, tiny_tokenizer("decoder_only"), peft_method="full") == pytest.approx(trained, abs=1e-5)


@pytest.mark.parametrize("model_type", ["t5", "bart", "llama", "gpt2"])
def test_trained_tokens_of_tied_embeddings_merge_into_tied_ones(model_type, tmp_path):
    model = tiny_model(model_type, tie_word_embeddings=True)
    family = model_family(model)
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer(family).save_pretrained(tmp_path / "base")
    options = {"peft_method": "trainable_tokens", "peft_kwargs": {"token_indices": list(range(3, 200))}}
    trainer = train(str(tmp_path / "base"), tmp_path / "run", **options)
    trained = trainer.evaluate(Dataset.from_list(tiny_rows()))["eval_loss"]
    merge_adapter(str(tmp_path / "run"), tmp_path / "merged")
    merged = auto_class(family).from_pretrained(tmp_path / "merged")
    assert merged.config.tie_word_embeddings
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert not torch.equal(merged.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert loss_of(merged, tiny_tokenizer(family), peft_method="full") == pytest.approx(trained, abs=1e-5)


def test_a_broken_record_of_the_run_is_named(saved_models, tmp_path):
    train(str(saved_models["decoder_only"]), tmp_path / "run")
    (tmp_path / "run" / SETTINGS_FILE).write_text("[")
    with pytest.raises(ValueError, match=SETTINGS_FILE):
        Generator(str(tmp_path / "run"))


def test_evaluate_on_the_command_line(saved_models, tmp_path, capsys):
    train(str(saved_models["decoder_only"]), tmp_path / "run")
    rows = [{"document": row["prompt"], "summary": row["completion"]} for row in tiny_rows(4)]
    file = tmp_path / "test.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    flags = ["--adapter", str(tmp_path / "run"), "--test_file", str(file)]
    columns = ["--task", "summarization", "--source_column", "document", "--target_column", "summary"]

    def fails(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            main(["evaluate", *arguments])
        return capsys.readouterr().err

    assert "Pass --task" in fails(*flags)
    assert "Did you mean" in fails(*flags, "--task", "sumarization")
    assert "does not exist" in fails("--adapter", str(tmp_path / "run"), "--test_file", "nowhere.jsonl", *columns[:2])
    assert "does not exist" in fails("--adapter", "nowhere", "--test_file", str(file))
    assert "no column 'x'" in fails(*flags, *columns[:2], "--source_column", "x")
    assert main(["evaluate", *flags, *columns, "--output_dir", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "evaluation_report.json").read_text())
    assert (report["test_rows"], report["num_beams"], report["max_new_tokens"]) == (4, 3, 6)
    assert "rougeL" in shown
    assert "3 beams" in shown
    assert "already holds" in fails(*flags, *columns, "--output_dir", str(tmp_path / "out"))
    merge_adapter(str(tmp_path / "run"), tmp_path / "merged")
    whole = ["--model_name_or_path", str(tmp_path / "merged"), "--test_file", str(file), *columns]
    assert main(["evaluate", *whole, "--output_dir", str(tmp_path / "whole")]) == 0
    merged = json.loads((tmp_path / "whole" / "evaluation_report.json").read_text())
    assert merged["metrics"]["loss"] == pytest.approx(report["metrics"]["loss"], abs=1e-5)
    assert merged["samples"] == report["samples"]


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_base_model_with_its_own_code_is_used_where_the_user_trusts_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base)
    tiny_tokenizer("decoder_only").save_pretrained(base)
    (base / "modeling_own.py").write_text(OWN_CODE)
    config = json.loads((base / "config.json").read_text())
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (base / "config.json").write_text(json.dumps({**config, "model_type": "own_llama", "auto_map": classes}))
    trainer = train(str(base), tmp_path / "run", trust_remote_code=True)
    trained = trainer.evaluate(Dataset.from_list(tiny_rows()))["eval_loss"]
    (tmp_path / "texts").write_text("red\n")
    run, merged = ["--adapter", str(tmp_path / "run")], ["--output_dir", str(tmp_path / "merged")]
    generate = ["generate", *run, "--prompt", "Say {source}", "--input_file", str(tmp_path / "texts")]
    for command in (generate, ["merge", *run, *merged]):
        with pytest.raises(SystemExit):
            main(command)
        assert "trust_remote_code" in capsys.readouterr().err
        assert main([*command, "--trust_remote_code"]) == 0
    loaded = auto_class("decoder_only").from_pretrained(tmp_path / "merged", trust_remote_code=True)
    assert type(loaded).__name__ == "OwnForCausalLM"
    tokenizer = tiny_tokenizer("decoder_only")
    assert loss_of(loaded, tokenizer, peft_method="full") == pytest.approx(trained, abs=1e-5)
