"""A model is looked at once, before its weights are loaded."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import BertConfig, BertForMaskedLM

from left_trainer import LeftTrainer, apply_method, get_task
from left_trainer.embedded import MODEL_NAMES, MODEL_PATHS
from left_trainer.models import FAMILIES, ModelSource, load_model, load_tokenizer
from left_trainer.runs.fine_tuning import set_up, training_parser
from tiny import tiny_model, tiny_rows

# Each of these asks the hub, or parses what the user wrote; a run does it once.
ONCE = ("AutoConfig.from_pretrained", "model_family", "parse_peft_kwargs")


class CallCounter:
    """Counts calls by the qualified name of the function while it is entered."""

    def __enter__(self):
        self.calls = Counter()
        sys.setprofile(self.count)
        return self.calls

    def __exit__(self, *error):
        sys.setprofile(None)

    def count(self, frame, event, argument):
        if event == "call" and frame.f_code.co_qualname in ONCE:
            self.calls[frame.f_code.co_qualname] += 1


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_names_of_embedded_models_are_known_wherever_a_model_is_named(name):
    source = ModelSource.of(name)
    assert source.base_name == MODEL_NAMES[name]
    assert load_tokenizer(source).name_or_path == MODEL_NAMES[name]


@pytest.fixture
def adapters(saved_models, tmp_path):
    """A saved adapter for each family."""
    paths = {}
    for family in FAMILIES:
        paths[family] = tmp_path / f"adapter-{family}"
        apply_method(load_model(str(saved_models[family])), "lora", {"r": 2}).save_pretrained(paths[family])
    return paths


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["name", "path", "model", "adapter"])
def test_a_trainer_looks_once(form, family, make_args, saved_models, adapters, tokenizers):
    path = saved_models[family]
    model = {"name": str(path), "path": path, "adapter": adapters[family], "model": load_model(str(path))}[form]
    rows = Dataset.from_list(tiny_rows())
    with CallCounter() as calls:
        args = make_args(peft_kwargs="r=2")
        trainer = LeftTrainer(model, args, train_dataset=rows)
    assert calls == {name: 1 for name in ONCE if not (form == "model" and name.startswith("Auto"))}
    assert trainer.source.family == family
    assert trainer.base_model_name == str(path)


@pytest.mark.parametrize("model", ["embedded/t5", "embedded/llama"])
def test_a_run_looks_once(model, tmp_path):
    parser = training_parser(output_dir=str(tmp_path))
    flags = ["--model_name_or_path", model, "--max_train_samples", "20", "--max_eval_samples", "4"]
    with CallCounter() as calls:
        arguments = parser.parse_args_and_config([*flags, "--peft_kwargs", "r=4"])
        set_up(get_task("summarization"), *arguments)
    assert calls == dict.fromkeys(ONCE, 1)


def test_what_there_is_to_know(saved_models, adapters):
    path = saved_models["encoder_decoder"]
    source = ModelSource.of(path, {"dtype": "bfloat16", "revision": "main", "dropout_rate": 0.25})
    assert (source.model, source.base_name, source.family) == (str(path), str(path), "encoder_decoder")
    assert (source.adapter, source.is_loaded, source.is_quantized) == (None, False, False)
    # A field of the config is set there, and what is left goes to the weights.
    assert source.config.dropout_rate == 0.25
    assert source.options == {"dtype": "bfloat16", "revision": "main"}
    assert source.hub_options == {"revision": "main"}
    model = load_model(source)
    assert (str(model.dtype), model.config.dropout_rate) == ("torch.bfloat16", 0.25)
    assert ModelSource.of(source) is source
    carried = ModelSource.of(adapters["encoder_decoder"])
    assert (carried.base_name, carried.adapter.r) == (str(path), 2)
    assert load_tokenizer(carried).get_vocab() == load_tokenizer(path).get_vocab()


def test_a_loaded_model_is_known_by_its_class_where_it_has_no_name():
    model = tiny_model("t5")
    source = ModelSource.of(model)
    assert (source.base_name, source.title, source.is_loaded) == ("T5ForConditionalGeneration",) * 2 + (True,)
    wrapped = ModelSource.of(apply_method(model, "lora"))
    assert (wrapped.family, wrapped.adapter.peft_type.value) == ("encoder_decoder", "LORA")
    assert wrapped.config is model.config


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (3, TypeError, "model is a int. Pass a hub name"),
        (None, TypeError, "model is a NoneType"),
        ("no/such-model", ValueError, "model='no/such-model' is neither a directory"),
        (
            BertForMaskedLM(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)),
            ValueError,
            "encoder-only",
        ),
    ],
)
def test_what_is_no_model_is_refused(model, error, message, make_args):
    with pytest.raises(error, match=message):
        LeftTrainer(model, make_args())


@pytest.mark.parametrize("model_type", ["t5", "bart", "llama", "gpt2", "marian", "pegasus"])
@pytest.mark.parametrize("is_saved", [True, False])
def test_a_missing_tokenizer_says_what_to_pass(model_type, is_saved, make_args, tmp_path):
    model = tiny_model(model_type)
    if is_saved:
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="processing_class="):
        LeftTrainer(str(tmp_path) if is_saved else model, make_args(), train_dataset=Dataset.from_list(tiny_rows()))


def test_the_embedded_models_are_known_by_path():
    for family, path in MODEL_PATHS.items():
        assert ModelSource.of(Path(path)).family == family
