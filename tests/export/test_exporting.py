"""`left-trainer export`: on the run's own rows, whole or absent, and refused with what to do instead."""

from __future__ import annotations

import hashlib
import json
import shutil
from random import Random

import pytest
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from exports import export, make_base, make_run, write_rows
from left_trainer import DataArguments, LeftTrainingArguments, ModelArguments, get_method, get_task, list_methods
from left_trainer.cli.main import main
from left_trainer.embedded import MODEL_PATHS, pretrain
from left_trainer.export.exporting import Export, Exported, check_method
from left_trainer.export.formats import FORMATS
from left_trainer.export.rows import RowsAsked, prompts_of_run
from left_trainer.export.verification import EXACT, HALF, ROUNDED, Difference, Verification
from left_trainer.models import FAMILIES, ModelSource, load_tokenizer
from left_trainer.runs.fine_tuning import fine_tune, set_up
from tiny import FAMILY_TYPES

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Model (has|with) (the )?`tie_word_embeddings=True`"),
]
# Of 300 seeded passages, as they were before the tokenizer had an unknown token.
IDS_OF_PASSAGES = "1ed652e674e983497f99fe9c7454ac16fd69da3f24ee0e8399b0c6c7d8f7c5a5"
WEIGHTS = "fdad83216196adfbef772f5a41e502426efeae7828c811f9aaabce802ddeaf91"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A short run of each family on a file of rows, by `left-trainer train`'s own functions."""
    place = tmp_path_factory.mktemp("runs")
    rows = write_rows(place, 8)
    folders = {}
    for family in FAMILIES:
        base = make_base(place / family, FAMILY_TYPES[family])
        folders[family] = place / f"{family}-run"
        options = {"max_steps": 2, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        args = LeftTrainingArguments(
            output_dir=str(folders[family]), predict_with_generate=True, generation_max_length=6, **options
        )
        data = DataArguments(train_file=str(rows), test_file=str(rows), max_eval_samples=5)
        fine_tune(set_up(get_task("summarization"), ModelArguments(model_name_or_path=str(base)), data, args))
    return folders


def refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as exit_info:
        main(["export", *map(str, arguments)])
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_is_exported_on_its_own_test_rows(family, runs, tmp_path, capsys):
    report = json.loads((runs[family] / "training_report.json").read_text())
    assert report["data"]["max_eval_samples"] == 5
    template, prompts = prompts_of_run(str(runs[family]), RowsAsked(number=50))
    assert len(prompts) == 5
    assert template == get_task("summarization").prompt
    output = tmp_path / "out"
    assert main(["export", "--adapter", str(runs[family]), "--to", "merged", "--output_dir", str(output)]) == 0
    said = capsys.readouterr().out
    assert "5 of 5 answers are those of the trained model (transformers " in said
    assert str(output) in said
    kind = AutoModelForSeq2SeqLM if family == "encoder_decoder" else AutoModelForCausalLM
    assert kind.from_pretrained(output).num_parameters() > 0
    assert json.loads((output / "verification.json").read_text())["equal"] == 5


def test_the_folder_is_named_after_run_and_format(runs, tmp_path, capsys):
    run = shutil.copytree(runs["decoder_only"], tmp_path / "run")
    assert main(["export", "--adapter", f"{run}/", "--to", "lora", "--verify_rows", "2"]) == 0
    assert (tmp_path / "run-lora" / "adapter_config.json").is_file()
    assert "vllm serve" in capsys.readouterr().out
    assert "is not empty" in refused(capsys, "--adapter", run, "--to", "lora")


def test_rows_that_are_gone_or_unknown_are_asked_for(runs, tmp_path, capsys):
    run = shutil.copytree(runs["decoder_only"], tmp_path / "run")
    report = json.loads((run / "training_report.json").read_text())
    (run / "training_report.json").write_text(json.dumps(report | {"data": {"test_file": "gone.jsonl"}}))
    assert "Pass rows with --test_file" in refused(capsys, "--adapter", run, "--to", "lora")
    (run / "training_report.json").unlink()
    assert "Pass rows with --test_file" in refused(capsys, "--adapter", run, "--to", "lora")
    rows = write_rows(tmp_path)
    assert "Pass --task" in refused(capsys, "--adapter", run, "--to", "lora", "--test_file", rows)


def test_parts_of_a_run_have_its_rows_and_an_interrupted_one_names_its_checkpoint(runs, tmp_path, capsys):
    run = shutil.copytree(runs["decoder_only"], tmp_path / "run")
    for part in ("base", "checkpoint-2"):
        (run / part).mkdir()
        assert prompts_of_run(str(run / part), RowsAsked()) == prompts_of_run(str(run), RowsAsked())
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (run / name).rename(run / "checkpoint-2" / name)
    message = refused(capsys, "--adapter", run, "--to", "lora")
    assert f"or export its last checkpoint: --adapter {run / 'checkpoint-2'}" in message


def test_many_other_answers_are_not_passed_over(runs, tmp_path, capsys, monkeypatch):
    pairs = [(0, ""), (1, "Warning: 1 of 5 answers are not those of the trained model. Weights in int8 explain that")]
    for number, message in pairs:
        found = Verification(5, 5 - number, ROUNDED, (Difference(0, "a", "b", 1.5),) * number, "a runtime")
        exported = Exported(tmp_path, "int8", found, "usage")
        monkeypatch.setattr("left_trainer.export.exporting.export_model", lambda asked, exported=exported: exported)
        assert main(["export", "--adapter", str(runs["decoder_only"]), "--to", "ctranslate2"]) == 0
        assert capsys.readouterr().err.startswith(message)


UNMERGEABLE = [method.name for method in list_methods() if method.config_class and not method.mergeable]


@pytest.mark.parametrize("method", UNMERGEABLE)
def test_what_merges_into_no_weight_is_refused_before_weights_load(method, runs, no_weights):
    """With the reason, and what serves it."""
    record, run = get_method(method), str(runs[get_method(method).model_families[0]])
    source = ModelSource.of(run)
    for to in FORMATS:
        if to == "lora" and record.config_class is LoraConfig:
            check_method(FORMATS[to], record, source, Export(run, to))
            continue
        with pytest.raises(ValueError, match=r"adds inputs or layers.*PeftModel\.from_pretrained"):
            check_method(FORMATS[to], record, source, Export(run, to))


def test_other_refusals(runs, tmp_path, capsys, monkeypatch):
    run = runs["decoder_only"]
    assert "Did you mean 'ctranslate2'?" in refused(capsys, "--adapter", run, "--to", "ctranslate")
    assert "pip install vllm && vllm serve" in refused(capsys, "--adapter", run, "--to", "vllm")
    assert "optimum-cli export onnx" in refused(capsys, "--adapter", run, "--to", "optimum")
    assert "does not exist" in refused(capsys, "--adapter", tmp_path / "nowhere", "--to", "lora")
    assert "Allowed: f32, bf16, f16, q8_0" in refused(
        capsys, "--adapter", run, "--to", "gguf", "--quantization", "int8", "--output_dir", tmp_path / "out"
    )
    assert "has one form alone" in refused(capsys, "--adapter", run, "--to", "merged", "--as_adapter")
    assert "is for decoder-only models" in refused(capsys, "--adapter", runs["encoder_decoder"], "--to", "gguf")
    assert "must be a rank" in refused(capsys, "--adapter", run, "--to", "lora", "--rank", "1.5")
    monkeypatch.setattr("left_trainer.export.formats.find_spec", lambda name: None)
    for name, record in FORMATS.items():
        if record.packages:
            assert f"pip install 'left_trainer[{name}]'" in refused(capsys, "--adapter", run, "--to", name)


def test_models_of_other_types_are_refused(tmp_path):
    base = make_base(tmp_path / "base", "opt")
    with pytest.raises(ValueError, match=r"--to gguf knows llama, .* holds a opt"):
        export(make_run(tmp_path / "run", base), "gguf", tmp_path / "out")


def test_a_whole_model_is_exported_as_it_is(tmp_path):
    pytest.importorskip("ctranslate2")
    base = make_base(tmp_path / "base", "t5")
    assert export(base, "ctranslate2", tmp_path / "out").verification.equal == 4
    for to in ("merged", "lora"):
        with pytest.raises(ValueError, match="holds a whole model and no adapter"):
            export(base, to, tmp_path / "other")


@pytest.mark.long
@pytest.mark.parametrize("model_type", ["t5", "bart", "marian", "llama", "gpt2"])
def test_onnx(model_type, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    base = make_base(tmp_path / "base", model_type)
    exported = export(make_run(tmp_path / "run", base), "onnx", tmp_path / "out")
    assert exported.verification.equal == 4


@pytest.mark.parametrize(
    ("tolerance", "gaps", "holds"),
    [
        (EXACT, [], True),
        (EXACT, [0.005], True),
        (EXACT, [0.02], False),
        (HALF, [0.3], True),
        (HALF, [0.3, 0.3], False),
        (ROUNDED, [1.9] * 10, True),
        (ROUNDED, [2.1, 2.1], False),
        (ROUNDED, [float("nan")] * 3, False),
    ],
)
def test_what_counts_as_rounding(tolerance, gaps, holds):
    differences = tuple(Difference(row, "a", "b", gap) for row, gap in enumerate(gaps))
    assert Verification(10, 10 - len(gaps), tolerance, differences, "a runtime").holds == holds


def test_the_embedded_t5_has_an_unknown_token_that_changes_nothing():
    """Without one CTranslate2 does not load it."""
    tokenizer, rng = load_tokenizer(MODEL_PATHS["encoder_decoder"]), Random(0)
    texts = ["\n".join(pretrain.passage(rng)) for _ in range(300)]
    ids = tokenizer(texts)["input_ids"]
    assert hashlib.sha256(json.dumps(ids).encode()).hexdigest() == IDS_OF_PASSAGES
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == texts
    assert (tokenizer.unk_token, tokenizer.unk_token_id) == ("<unk>", 2)
    assert not any(tokenizer.unk_token_id in row for row in ids)
    weights = (MODEL_PATHS["encoder_decoder"] / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == WEIGHTS


def test_the_embedded_models_load_in_ctranslate2(tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2")
    for family, path in MODEL_PATHS.items():
        exported = export(path, "ctranslate2", tmp_path / family)
        assert exported.verification.equal == 4
    assert ctranslate2.Translator(str(tmp_path / "encoder_decoder")).compute_type == "float32"
