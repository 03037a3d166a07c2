"""Tokenizers that mark texts with languages: asked for, and generated in."""

from __future__ import annotations

import string

import pytest
import torch
from datasets import Dataset
from transformers import MBart50Tokenizer, MBartTokenizer, NllbTokenizer

from left_trainer import DataArguments, LeftTrainer, get_task, prepare_task_data
from left_trainer.models.decoder_inputs import decoder_input_ids
from left_trainer.models.languages import check_languages, has_languages, set_languages
from left_trainer.runs.inference import Generator
from tiny import CONFIGS, TINY_BART, tiny_model, tiny_rows

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
LETTERS = ("▁", *string.ascii_letters, *string.digits, ":")


class ShortCodes(NllbTokenizer):
    """Names languages by short codes that stand for longer tokens, as M2M100's tokenizer does."""

    lang_code_to_token = {"en": "eng_Latn", "fr": "fra_Latn"}

    def set_src_lang_special_tokens(self, src_lang):
        super().set_src_lang_special_tokens(self.lang_code_to_token.get(src_lang, src_lang))

    def set_tgt_lang_special_tokens(self, lang):
        super().set_tgt_lang_special_tokens(self.lang_code_to_token[lang])


def nllb(kind=NllbTokenizer):
    return kind(vocab={token: number for number, token in enumerate((*SPECIAL, *LETTERS))}, merges=[])


def mbart(kind):
    return kind(vocab=[(token, 0.0) for token in SPECIAL] + [(token, -1.0) for token in LETTERS])


# Tokenizer, model type, languages, and whether the target's language is what the decoder starts with.
KINDS = {
    "nllb": (nllb, "m2m_100", ("eng_Latn", "fra_Latn"), False),
    "m2m100": (lambda: nllb(ShortCodes), "m2m_100", ("en", "fr"), False),
    "mbart50": (lambda: mbart(MBart50Tokenizer), "mbart", ("en_XX", "fr_XX"), False),
    "mbart": (lambda: mbart(MBartTokenizer), "mbart", ("en_XX", "fr_XX"), True),
    "plbart": (lambda: mbart(MBartTokenizer), "plbart", ("en_XX", "fr_XX"), True),
}


@pytest.fixture(params=list(KINDS))
def kind(request, monkeypatch):
    make_tokenizer, model_type, languages, starts_with_it = KINDS[request.param]
    monkeypatch.setitem(CONFIGS, model_type, {**TINY_BART, "decoder_start_token_id": 2})
    tokenizer = make_tokenizer()
    ids = {"pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0}
    return tokenizer, tiny_model(model_type, vocab_size=len(tokenizer), **ids), languages, starts_with_it


def test_languages_are_asked_for_before_weights_load(kind, rows, make_args, tmp_path, no_weights):
    tokenizer, model, languages, _ = kind
    model.save_pretrained(tmp_path)
    tokenizer.src_lang = languages[0]
    with pytest.raises(ValueError, match=r"its tgt_lang is not set. Pass --source_lang .*tokenizer.tgt_lang ="):
        LeftTrainer(str(tmp_path), make_args(), train_dataset=rows, processing_class=tokenizer)
    tokenizer.tgt_lang = "xx"
    with pytest.raises(ValueError, match=r"tokenizer.tgt_lang='xx' is no language of this .*Tokenizer|ShortCodes"):
        LeftTrainer(str(tmp_path), make_args(), train_dataset=rows, processing_class=tokenizer)


def test_what_is_generated_begins_as_the_targets_do(kind, make_args):
    tokenizer, model, languages, starts_with_it = kind
    set_languages(tokenizer, *languages)
    rows = Dataset.from_list(tiny_rows(4))
    args = make_args(max_steps=1, predict_with_generate=True, generation_max_length=6, per_device_eval_batch_size=4)
    trainer = LeftTrainer(
        model, args, train_dataset=rows, processing_class=tokenizer, compute_metrics=lambda prediction: {}
    )
    labels = torch.tensor([trainer.train_dataset[0]["labels"]])
    language = tokenizer.convert_tokens_to_ids(getattr(tokenizer, "lang_code_to_token", {}).get("fr", languages[1]))
    assert language in labels
    trainer.train()
    learned = torch.cat([decoder_input_ids(model, labels)[:, :1], labels], dim=1)[0].tolist()
    generated = trainer.predict(rows).predictions[0].tolist()
    n_fixed = 1 if starts_with_it else 2
    assert generated[:n_fixed] == learned[:n_fixed]
    assert language == generated[n_fixed - 1]
    assert learned.count(language) == 2 if starts_with_it else 1
    config = model.generation_config
    assert config.forced_bos_token_id == (None if starts_with_it else language)


def test_the_saved_tokenizer_keeps_the_languages(kind, make_args, tmp_path):
    tokenizer, model, languages, _ = kind
    if type(tokenizer) is ShortCodes:
        pytest.skip("a class of this test, which no folder names")
    model.save_pretrained(tmp_path / "base")
    set_languages(tokenizer, *languages)
    rows = Dataset.from_list(tiny_rows(4))
    trainer = LeftTrainer(
        str(tmp_path / "base"), make_args(max_steps=1), train_dataset=rows, processing_class=tokenizer
    )
    trainer.save_model(str(tmp_path / "run"))
    generator = Generator(str(tmp_path / "run"))
    assert (generator.tokenizer.src_lang, generator.tokenizer.tgt_lang) == languages
    for name in ("forced_bos_token_id", "decoder_start_token_id"):
        expected = getattr(trainer.model.get_base_model().generation_config, name)
        assert getattr(generator.model.get_base_model().generation_config, name) == expected


def test_languages_of_the_command_line(make_args, tmp_path, tokenizers):
    tokenizer = nllb()
    rows = [{"source": "one cat", "target": "un chat"}] * 4
    Dataset.from_list(rows).to_json(str(tmp_path / "rows.jsonl"))
    model = tiny_model("bart", vocab_size=len(tokenizer))

    def prepare(tokenizer, **languages):
        data = DataArguments(train_file=str(tmp_path / "rows.jsonl"), **languages)
        return prepare_task_data(get_task("translation"), data, model, tokenizer, make_args())

    prepare(tokenizer, source_lang="deu_Latn", target_lang="fra_Latn")
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == ("deu_Latn", "fra_Latn")
    with pytest.raises(ValueError, match=r"source_lang='deu_Latn' is given alone. Pass both"):
        prepare(tokenizer, source_lang="deu_Latn")
    with pytest.raises(ValueError, match=r"target_lang='fra' is no language .*It knows ace_Arab"):
        prepare(tokenizer, source_lang="deu_Latn", target_lang="fra")
    with pytest.raises(ValueError, match=r"source_lang='en' has no effect: a .* does not mark texts"):
        prepare(tokenizers["encoder_decoder"], source_lang="en", target_lang="fr")


def test_tokenizers_without_languages_are_left_alone(tokenizers):
    for tokenizer in tokenizers.values():
        assert not has_languages(tokenizer)
        check_languages(tokenizer)
