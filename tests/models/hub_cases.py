"""Cases of `test_hub.py`, which runs them with a hub: `pytest -p hub_plugin tests/models/hub_cases.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from hub import OTHER_TOKEN, OWNER_TOKEN, Hub
from hub_plugin import HUB
from left_trainer import LeftTrainer
from left_trainer.cli.main import main
from left_trainer.evaluation.named_metrics import load_metric
from left_trainer.models import FAMILIES, ModelSource, load_model, load_tokenizer
from left_trainer.models.hub import HubRefusalError
from left_trainer.runs.inference import Generator
from tiny import FAMILY_TYPES, tiny_model, tiny_tokenizer

TINY_RUN = [
    *("--max_steps", "2", "--disable_tqdm", "true", "--predict_with_generate", "false"),
    *("--report_plan", "false", "--eval_strategy", "no", "--logging_steps", "1"),
]
COLUMNS = ["--source_column", "document", "--target_column", "summary"]


def rows_of(number: int, word: str) -> bytes:
    lines = [{"document": f"text {word} {i} is here", "summary": f"sum {i}"} for i in range(number)]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


@pytest.fixture(scope="module", autouse=True)
def repositories(saved_models) -> None:
    """A model of each family, open, private and gated, in two versions; a data set likewise; a metric."""
    for family, folder in saved_models.items():
        older = folder.with_name(f"{folder.name}-older")
        tiny_model(FAMILY_TYPES[family], seed=1).save_pretrained(older)
        tiny_tokenizer(family).save_pretrained(older)
        HUB.add(f"owner/{family}", older, revision="v1")
        HUB.add(f"owner/{family}", folder)
        HUB.add(f"owner/{family}-private", folder, private=True)
        HUB.add(f"owner/{family}-gated", folder, gated=True)
    for name, access in (("rows", {}), ("rows-private", {"private": True}), ("rows-gated", {"gated": True})):
        HUB.add(f"owner/{name}", {"train.jsonl": rows_of(24, "old"), "test.jsonl": rows_of(8, "t")}, "dataset", "v1")
        HUB.add(f"owner/{name}", {"train.jsonl": rows_of(40, "new"), "test.jsonl": rows_of(8, "t")}, "dataset")
        vars(HUB.repositories["dataset", f"owner/{name}"]).update(access)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([weight.flatten() for weight in model.state_dict().values()])


def trained_adapter(family: str, make_args, rows, **options) -> LeftTrainer:
    trainer = LeftTrainer(f"owner/{family}", make_args(**options), train_dataset=rows)
    trainer.train()
    trainer.save_model()
    return trainer


# Loading


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_loaded_and_trained_by_name(family, hub, make_args, rows, saved_models):
    trainer = LeftTrainer(f"owner/{family}", make_args(), train_dataset=rows)
    trainer.train()
    loaded = trainer.model.get_base_model().get_input_embeddings().weight
    saved = load_model(str(saved_models[family])).get_input_embeddings().weight
    assert torch.equal(loaded, saved)
    assert trainer.base_model_name == f"owner/{family}"
    assert hub.seen("GET", "/lfs/")  # weights come from another host


@pytest.mark.parametrize("family", FAMILIES)
def test_a_revision_is_loaded_and_an_adapter_stays_on_it(family, hub, make_args, rows, tmp_path):
    older = weights(load_model(ModelSource.of(f"owner/{family}", {"revision": "v1"})))
    assert not torch.equal(older, weights(load_model(f"owner/{family}")))
    trained_adapter(family, make_args, rows, model_init_kwargs={"revision": "v1"})
    source = ModelSource.of(str(tmp_path / "run"))
    assert source.options["revision"] == "v1"
    assert torch.equal(weights(load_model(source)), older)


def test_a_token_reaches_the_hub_and_not_the_host_of_the_weights(hub, make_args, rows, tmp_path):
    options = {"token": OWNER_TOKEN, "cache_dir": str(tmp_path / "cache")}
    trainer = LeftTrainer("owner/decoder_only-private", make_args(model_init_kwargs=options), train_dataset=rows)
    trainer.train()
    trainer.save_model()
    assert {request.token for request in hub.seen("HEAD", "model.safetensors")} == {OWNER_TOKEN}
    assert {request.token for request in hub.seen("GET", "/lfs/")} == {None}
    written = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert written
    assert not any(OWNER_TOKEN.encode() in file.read_bytes() for file in written)


REFUSED = {
    "private, nobody": ("owner/decoder_only-private", {}, "check the name, and for a private one pass a token"),
    "private, another": ("owner/decoder_only-private", {"token": OTHER_TOKEN}, "for a private one pass a token"),
    "gated, nobody": ("owner/decoder_only-gated", {}, "ask for access at http://127.0.0.1"),
    "gated, another": ("owner/decoder_only-gated", {"token": OTHER_TOKEN}, "ask for access at http://127.0.0.1"),
    "no such token": ("owner/decoder_only-private", {"token": "hf_wrongwrong"}, "a token that http.* does not know"),
    "no such model": ("owner/nothing", {}, "is neither a directory with a config.json nor the name of a model"),
    "no such revision": ("owner/decoder_only", {"revision": "v9"}, "has no revision 'v9': pass a branch"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_hub_refuses_says_what_to_do(case, hub, make_args, rows, no_weights):
    name, options, message = REFUSED[case]
    with pytest.raises(HubRefusalError, match=f"^model='{name}' .*{message}") as raised:
        LeftTrainer(name, make_args(model_init_kwargs=options), train_dataset=rows)
    assert "\n" not in str(raised.value)
    if case not in ("no such token", "no such revision"):  # of which the student's model is the first to hear
        args = make_args(model_init_kwargs=options, teacher_model=name)
        with pytest.raises(ValueError, match=f"^teacher_model='{name}' .*{message}"):
            LeftTrainer("owner/decoder_only", args, train_dataset=rows)


def test_a_hub_with_too_many_requests_is_asked_again_and_then_named(hub, make_args, rows, tmp_path):
    options = {"cache_dir": str(tmp_path / "cache")}
    hub.limited = 2
    LeftTrainer("owner/decoder_only", make_args(model_init_kwargs=options), train_dataset=rows)
    options = {"cache_dir": str(tmp_path / "other_cache")}
    for attribute, message in (("limited", "too many requests from here .429.: wait"), ("broken", "answered 500")):
        setattr(hub, attribute, 10_000)
        with pytest.raises(HubRefusalError, match=message):
            LeftTrainer("owner/decoder_only", make_args(model_init_kwargs=options), train_dataset=rows)
        setattr(hub, attribute, 0)


def test_an_interrupted_download_goes_on_where_it_stopped(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)  # what arrives is kept in pieces of this size
    source = ModelSource.of("owner/decoder_only", {"cache_dir": str(tmp_path)})
    hub.cut[:] = [1000, *[0] * 10]
    with pytest.raises(HubRefusalError, match=r"could not be read from .* the connection failed: .* are kept"):
        load_model(source)
    assert {request.range for request in hub.seen("GET", "/lfs/")} == {None, "bytes=1000-"}
    hub.cut.clear()
    hub.requests.clear()
    hub.cut[:] = [500]
    loaded = weights(load_model(source))
    assert [request.range for request in hub.seen("GET", "/lfs/")] == [None, "bytes=500-"]
    assert torch.equal(loaded, weights(load_model("owner/decoder_only")))


# Adapters


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_used_and_trained_further_by_name(family, hub, make_args, rows, tmp_path):
    method = {"encoder_decoder": "p_tuning", "decoder_only": "lora"}[family]
    trained_adapter(family, make_args, rows, peft_method=method, predict_with_generate=True)
    hub.add(f"owner/{family}-adapter", tmp_path / "run")
    prompts = [row["prompt"] for row in rows][:3]
    expected = Generator(str(tmp_path / "run"))(prompts)
    assert Generator(f"owner/{family}-adapter")(prompts) == expected
    further = LeftTrainer(f"owner/{family}-adapter", make_args(output_dir=str(tmp_path / "on")), train_dataset=rows)
    assert further.source.title == f"owner/{family}-adapter"
    assert further.method.name == method
    assert further.base_model_name == f"owner/{family}"
    further.train()


def test_an_adapter_has_a_revision_and_a_folder_of_its_own(hub, make_args, rows, tmp_path):
    """Both are of the adapter, and its base keeps the revision that it was trained on."""
    trained_adapter("decoder_only", make_args, rows, model_init_kwargs={"revision": "v1"})
    files = {f"inside/{file.name}": file.read_bytes() for file in (tmp_path / "run").iterdir() if file.is_file()}
    hub.add("owner/nested", {**files, "checkpoint-1/optimizer.pt": b"0" * 9}, revision="first")
    hub.add("owner/nested", {"inside/nothing": b""})
    source = ModelSource.of("owner/nested", {"revision": "first", "subfolder": "inside"})
    assert source.adapter is not None
    assert (source.base_name, source.options["revision"]) == ("owner/decoder_only", "v1")
    assert "subfolder" not in source.options
    load_tokenizer(source)
    assert not list(Path(constants.HF_HUB_CACHE, "models--owner--nested").rglob("optimizer.pt"))


def test_an_adapter_of_a_private_base_takes_the_token(hub, make_args, rows, tmp_path):
    options = {"token": OWNER_TOKEN}
    trainer = LeftTrainer("owner/decoder_only-private", make_args(model_init_kwargs=options), train_dataset=rows)
    trainer.save_model()
    hub.add("owner/secret", tmp_path / "run", private=True)
    assert Generator("owner/secret", hub=options)(["Repeat 1 now:"])
    with pytest.raises(HubRefusalError, match="for a private one pass a token"):
        Generator("owner/secret")


def test_a_teacher_is_loaded_by_name(hub, make_args, rows, tmp_path):
    trained_adapter("decoder_only", make_args, rows)
    hub.add("owner/teacher", tmp_path / "run")
    for teacher in ("owner/decoder_only", "owner/teacher"):
        output = str(tmp_path / teacher.replace("/", "-"))
        LeftTrainer(
            "owner/decoder_only", make_args(teacher_model=teacher, output_dir=output), train_dataset=rows
        ).train()


# Data sets and metrics


def train(tmp_path: Path, *words: str) -> int:
    return main(["train", *words, *TINY_RUN, "--output_dir", str(tmp_path / "out")])


@pytest.mark.parametrize(("revision", "n_rows"), [(None, 38), ("v1", 22)])
def test_a_data_set_is_loaded_by_name_and_revision(revision, n_rows, hub, tmp_path, capsys):
    words = ["--dataset_revision", revision] if revision else []
    assert train(tmp_path, "--dataset_name", "owner/rows", *words, *COLUMNS) == 0
    assert len(hub.seen("GET", "train.jsonl")) >= 1


def test_a_private_data_set_is_streamed_with_a_token(hub, tmp_path, capsys):
    words = ["--dataset_name", "owner/rows-private", "--token", OWNER_TOKEN, "--streaming", *COLUMNS]
    assert train(tmp_path, *words) == 0
    assert {request.token for request in hub.seen("GET", "train.jsonl")} == {OWNER_TOKEN}


DATA_REFUSED = {
    "private": (["owner/rows-private"], "for a private one pass a token"),
    "gated": (["owner/rows-gated", "--token", OTHER_TOKEN], "ask for access at http://127.0.0.1"),
    "missing": (["owner/nothing"], "is neither a folder nor the name of a data set"),
    "revision": (["owner/rows", "--dataset_revision", "v9"], "has no revision 'v9'"),
}


@pytest.mark.parametrize("case", DATA_REFUSED)
def test_what_the_hub_refuses_of_a_data_set(case, hub, tmp_path, capsys):
    words, message = DATA_REFUSED[case]
    with pytest.raises(SystemExit):
        train(tmp_path, "--dataset_name", *words, *COLUMNS)
    said = capsys.readouterr().err
    assert f"left-trainer: error: dataset_name='{words[0]}'" in said
    assert message in said
    assert "of a library" not in said


def test_a_metric_of_the_hub_is_found_by_name(hub):
    code = """
import datasets
import evaluate

class Lengths(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"rows": float(len(predictions))}
"""
    hub.add("evaluate-metric/lengths", {"lengths.py": code.encode()}, "space")
    assert load_metric("lengths").compute(predictions=["a"], references=["b"]) == {"rows": 1.0}
    with pytest.raises(ValueError, match=r"metric='rogue' is neither one of ours .* Did you mean 'rouge'"):
        load_metric("rogue")


# Pushing


def pushed(hub: Hub, name: str) -> dict[str, bytes]:
    files = hub.repositories["model", name].files()
    assert not any(OWNER_TOKEN.encode() in content for content in files.values())
    assert not [path for path in files if Path(path).name.startswith(".") and path != ".gitattributes"]
    return files


def test_a_run_pushes_adapter_card_and_report(hub, tmp_path, capsys, monkeypatch):
    """Once, with the results in the card; from then on it is used by its name."""
    words = ["--push_to_hub", "--hub_model_id", "owner/run", "--hub_token", OWNER_TOKEN, "--hub_private_repo", "true"]
    assert train(tmp_path, "--model_name_or_path", "owner/encoder_decoder", "--max_train_samples", "16", *words) == 0
    repository = hub.repositories["model", "owner/run"]
    assert repository.private
    assert repository.messages == ["initial commit", "End of training"]
    files = pushed(hub, "owner/run")
    assert {"adapter_model.safetensors", "training_report.json", "run_settings.json", "loss.png"} <= files.keys()
    assert b"## Results on summarization" in files["README.md"]
    assert files["README.md"] == (tmp_path / "out" / "README.md").read_bytes()
    capsys.readouterr()
    monkeypatch.setenv("HF_TOKEN", OWNER_TOKEN)
    (tmp_path / "texts").write_text("A text.\n")
    (tmp_path / "test.jsonl").write_bytes(rows_of(3, "x"))
    assert main(["generate", "--adapter", "owner/run", "--input_file", str(tmp_path / "texts")]) == 0
    test_file = ["--test_file", str(tmp_path / "test.jsonl"), *COLUMNS, "--generation_max_length", "4"]
    assert main(["evaluate", "--adapter", "owner/run", *test_file]) == 0
    assert main(["merge", "--adapter", "owner/run", "--output_dir", str(tmp_path / "merged")]) == 0


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_checkpoints_are_pushed_whole(strategy, hub, make_args, rows):
    """P-tuning trains more than its adapter file holds, which belongs to what is pushed after each save."""
    name = f"owner/run-{strategy}"
    args = make_args(
        push_to_hub=True,
        hub_model_id=name,
        hub_token=OWNER_TOKEN,
        hub_strategy=strategy,
        hub_always_push=True,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        peft_method="p_tuning",
    )
    trainer = LeftTrainer("owner/decoder_only", args, train_dataset=rows)
    trainer.train()
    files = pushed(hub, name)
    of_model = {"adapter_model.safetensors", "adapter_training_state.safetensors", "run_settings.json"}
    checkpoints = {path.partition("/")[0] for path in files if "/" in path}
    expected = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-2", "checkpoint-4"}}
    assert checkpoints == expected.get(strategy, set())
    assert (of_model <= files.keys()) == (strategy != "end")
    assert "optimizer.pt" not in files
    trainer.push_to_hub(tags="own")
    files = pushed(hub, name)
    assert of_model <= files.keys()
    assert b"- own\n" in files["README.md"]
    Generator(name)


def test_who_pushes_is_asked_before_weights_are_loaded(hub, make_args, rows, no_weights):
    with pytest.raises(ValueError, match="push_to_hub=True needs to know who pushes"):
        LeftTrainer("owner/decoder_only", make_args(push_to_hub=True), train_dataset=rows)


def test_a_push_into_the_place_of_another_is_refused(hub, make_args, rows):
    args = make_args(push_to_hub=True, hub_model_id="owner/x", hub_token=OTHER_TOKEN)
    with pytest.raises(HubRefusalError, match="hub_model_id='owner/x' is closed to this token"):
        LeftTrainer("owner/decoder_only", args, train_dataset=rows)


def test_a_run_that_cannot_be_pushed_is_saved(hub, tmp_path, capsys, monkeypatch):
    words = ["--push_to_hub", "--hub_model_id", "owner/lost", "--hub_token", OWNER_TOKEN]
    monkeypatch.setattr(
        "left_trainer.trainer.pushing._warn_of_local_base", lambda trainer: setattr(hub, "broken", 10_000)
    )
    assert train(tmp_path, "--max_train_samples", "16", *words) == 1
    assert "Adapter and report are in" in capsys.readouterr().err
    assert (tmp_path / "out" / "training_report.json").is_file()


# Offline


OFFLINE = """
import sys
from left_trainer.cli.main import main
from left_trainer import LeftTrainer, LeftTrainingArguments
from left_trainer.runs.inference import Generator
from tiny import tiny_rows
from datasets import Dataset

rows = Dataset.from_list(tiny_rows())
args = {"max_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
for family in ("encoder_decoder", "decoder_only"):
    args["output_dir"] = sys.argv[1] + family
    LeftTrainer("owner/" + family, LeftTrainingArguments(**args), train_dataset=rows).train()
assert Generator("owner/warm")(["Repeat 1 now:"])
try:
    LeftTrainer("owner/cold", LeftTrainingArguments(**args), train_dataset=rows)
except ValueError as error:
    assert "model='owner/cold' is neither a directory" in str(error), error
    assert "load it once with HF_HUB_OFFLINE=0" in str(error), error
else:
    raise AssertionError("nothing was refused")
words = ["train", "--max_steps", "1", "--report_plan", "false", "--predict_with_generate", "false"]
words += ["--source_column", "document", "--target_column", "summary", "--output_dir", sys.argv[1] + "data"]
assert main([*words, "--dataset_name", "owner/rows"]) == 0
main([*words, "--dataset_name", "owner/cold", "--overwrite_output_dir"])
"""


def test_a_warm_cache_is_all_that_is_needed_offline(hub, make_args, rows, tmp_path, capsys):
    trained_adapter("decoder_only", make_args, rows)
    hub.add("owner/warm", tmp_path / "run")
    LeftTrainer("owner/encoder_decoder", make_args(output_dir=str(tmp_path / "a")), train_dataset=rows)
    Generator("owner/warm")
    train(tmp_path, "--dataset_name", "owner/rows", *COLUMNS)
    hub.requests.clear()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", OFFLINE, str(tmp_path / "offline-")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "dataset_name='owner/cold' is neither a folder nor the name of a data set" in result.stderr
    assert not hub.requests
