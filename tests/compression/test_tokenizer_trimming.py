"""A tokenizer of every kind, trimmed: the same tokens for the data, and every text as whole as before."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from left_trainer.compression.tokenizer_trimming import as_json, needed_ids
from left_trainer.compression.tokenizer_trimming import trimmed as trimmed_content
from left_trainer.compression.vocabulary import TrimmedVocabulary, trim_tokenizer
from left_trainer.models.languages import has_languages
from places import SHARED
from processes import ENVIRONMENT
from tokenizer_kinds import KINDS, NAMED, byte_level, corpus, llama, mbart, random_texts, t5, word_level

DATA = [
    *corpus(seed=1, size=8),
    "  two  spaces",
    "größer naïve 東京 🙂",
    "lowest<|im_end|>",
    "\u200d unknown \U00010001",
]


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return {name: make() for name, make in KINDS.items()}


@pytest.fixture(scope="module")
def trimmed(whole) -> dict[str, TrimmedVocabulary]:
    return {name: trim_tokenizer(tokenizer, DATA) for name, tokenizer in whole.items()}


def tokens_of(tokenizer: Any, texts: list[str]) -> list[list[str]]:
    return [tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) for text in texts]


@pytest.mark.parametrize("kind", KINDS)
def test_the_data_are_cut_into_the_same_tokens(kind, whole, trimmed):
    smaller = trimmed[kind].tokenizer
    assert tokens_of(smaller, DATA) == tokens_of(whole[kind], DATA)
    assert [trimmed[kind].kept_ids[number] for number in smaller(DATA[0])["input_ids"]] == whole[kind](DATA[0])[
        "input_ids"
    ]
    if has_languages(smaller):
        of_targets = [each(text_target=DATA[0])["input_ids"] for each in (smaller, whole[kind])]
        assert [trimmed[kind].kept_ids[number] for number in of_targets[0]] == of_targets[1]


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_comes_back_as_it_did(kind, whole, trimmed):
    smaller = trimmed[kind].tokenizer
    for text in random_texts(seed=2):
        before, after = (each.decode(each(text)["input_ids"]) for each in (whole[kind], smaller))
        assert after == before


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_go_and_all_settings_stay(kind, whole, trimmed):
    before, after = whole[kind], trimmed[kind].tokenizer
    assert (len(after) < len(before)) == (kind != "word_level")
    assert sorted(after.get_vocab().values()) == list(range(len(after)))
    assert trimmed[kind].kept_ids == sorted(trimmed[kind].kept_ids)
    assert type(after) is type(before)
    for name in ("special_tokens_map", "padding_side", "truncation_side", "model_max_length", "chat_template"):
        assert getattr(after, name) == getattr(before, name), name
    content = [as_json(each.backend_tokenizer) for each in (before, after)]
    for name in ("normalizer", "pre_tokenizer", "decoder", "truncation"):
        assert content[1][name] == content[0][name], name
    assert {token["content"] for token in content[1]["added_tokens"]} >= {
        token["content"] for token in content[0]["added_tokens"]
    }


def test_a_fresh_process_loads_them(trimmed, tmp_path, python):
    """With transformers alone."""
    for kind, vocabulary in trimmed.items():
        vocabulary.tokenizer.save_pretrained(tmp_path / kind)
    code = (
        "import json, sys; from pathlib import Path; from transformers import AutoTokenizer\n"
        "texts = json.loads(sys.stdin.read()); folders = sorted(Path(sys.argv[1]).iterdir())\n"
        "print(json.dumps({each.name: AutoTokenizer.from_pretrained(each)(texts)['input_ids'] for each in folders}))"
    )
    texts = [*DATA, *random_texts(seed=3, size=20)]
    done = subprocess.run(
        [python, "-c", code, str(tmp_path)], input=json.dumps(texts), capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {kind: vocabulary.tokenizer(texts)["input_ids"] for kind, vocabulary in trimmed.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [10, 11])
def test_other_data_too(kind, seed, whole):
    """Trimming checks its own promise, so that it would raise."""
    texts = random_texts(seed, size=30)
    smaller = trim_tokenizer(whole[kind], iter(texts)).tokenizer
    assert tokens_of(smaller, texts) == tokens_of(whole[kind], texts)


def test_trimming_again_changes_nothing(trimmed):
    again = trim_tokenizer(trimmed["t5"].tokenizer, DATA)
    assert again.tokenizer.get_vocab() == trimmed["t5"].tokenizer.get_vocab()


def test_what_was_set_on_the_tokenizer_stays():
    tokenizer = mbart()
    tokenizer.src_lang, tokenizer.tgt_lang, tokenizer.padding_side = "fr_XX", "ro_RO", "left"
    smaller = trim_tokenizer(tokenizer, DATA).tokenizer
    assert (smaller.src_lang, smaller.tgt_lang, smaller.padding_side) == ("fr_XX", "ro_RO", "left")
    assert tokens_of(smaller, ["a"]) == tokens_of(tokenizer, ["a"])
    assert smaller.convert_tokens_to_ids("zh_CN") != smaller.unk_token_id


def test_words_of_the_chat_template_stay():
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ 'jumping quickly ' + messages[0]['content'] }}"
    kept = trim_tokenizer(tokenizer, ["the"]).tokenizer
    texts = ["jumping quickly "]
    assert tokens_of(kept, texts) == tokens_of(tokenizer, texts)


# What the proofs in the module stand on


def bpe(merges: list[tuple[str, str]], **options: Any) -> Any:
    letters = sorted({letter for pair in merges for part in pair for letter in part})
    tokens = dict.fromkeys([*letters, *("".join(pair) for pair in merges)])
    return Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges, **options))


def test_tokens_on_the_way_stay():
    """`abc` is merged from `bc`, whose only use that is."""
    backend = bpe([("b", "c"), ("a", "bc"), ("a", "b"), ("c", "a")])
    kept = needed_ids(as_json(backend), backend.encode("abc").ids)
    assert {backend.id_to_token(number) for number in kept} == {"a", "b", "c", "bc", "abc"}


def test_a_dropped_merge_lets_no_other_one_in():
    """Without `ab`, of the first rank, `abcd` would be cut into other tokens; it is needed by `abc`."""
    backend = bpe([("a", "b"), ("b", "c"), ("ab", "c"), ("c", "d")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    smaller = trim_tokenizer(tokenizer, ["abcd"]).tokenizer
    assert smaller.tokenize("abcd") == tokenizer.tokenize("abcd") == ["abc", "d"]
    assert smaller.tokenize("bcd") == ["b", "c", "d"] != tokenizer.tokenize("bcd")


def test_the_lowest_score_stays():
    """Unknown characters score a constant below it, here just less than what a known piece of two loses."""
    pieces = [("<unk>", 0.0), ("a", -1.0), ("b", -1.0), ("xa", -20.0), ("rare", -30.0)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(pieces, 0)), unk_token="<unk>")
    smaller = trim_tokenizer(tokenizer, ["xab"]).tokenizer
    assert smaller.tokenize("xab") == tokenizer.tokenize("xab") == ["xa", "b"]
    assert "rare" in smaller.get_vocab()


def test_a_piece_with_a_character_of_its_own_alone_stays():
    """`x` is in no other piece, so that `xa` is the only way to spell it."""
    pieces = [("<unk>", 0.0), ("a", -1.0), ("b", -1.0), ("ab", -1.5), ("xa", -3.0)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(pieces, 0)), unk_token="<unk>")
    assert set(trim_tokenizer(tokenizer, ["a"]).tokenizer.get_vocab()) == {"<unk>", "a", "b", "xa"}


# What cannot be trimmed


def drawing() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=bpe([("a", "b")], dropout=0.1), **NAMED)


class Renumbered(PreTrainedTokenizerFast):
    """Adds a token whenever it is loaded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_tokens([f"<{len(self)}>"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (ByT5Tokenizer, "not one of the tokenizers library"),
        (drawing, "draws segmentations at random"),
        (lambda: Renumbered(tokenizer_object=byte_level().backend_tokenizer, **NAMED), "other ids"),
    ],
)
def test_what_cannot_be_trimmed_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        trim_tokenizer(make(), ["ab"])


def test_words_that_nothing_spells_all_stay():
    assert trim_tokenizer(word_level(), ["the"]).size_after == len(word_level())


def test_llama_like_tokenizers_spell_in_bytes():
    smaller = trim_tokenizer(llama(), ["the"]).tokenizer
    assert smaller.decode(smaller("\u0c85 the")["input_ids"], skip_special_tokens=True) == "\u0c85 the"


def test_sentinels_stay():
    smaller = trim_tokenizer(t5(), ["the"]).tokenizer
    assert smaller.tokenize("the <extra_id_9>")[-1] == "<extra_id_9>"


def test_the_tokenizer_itself_is_not_changed():
    tokenizer = t5()
    before = tokenizer.backend_tokenizer.to_str()
    trim_tokenizer(tokenizer, ["the"])
    assert tokenizer.backend_tokenizer.to_str() == before


@pytest.mark.parametrize("name", ["aren-transliteration", "stories260K"])
def test_tokenizers_of_real_models(name):
    if not (SHARED / "models" / name).is_dir():
        pytest.skip("needs the shared models")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / name)
    texts = ["Once upon a time, there was a little girl.", "محمد", "muhammad"]
    smaller = trim_tokenizer(tokenizer, texts).tokenizer
    assert tokens_of(smaller, texts) == tokens_of(tokenizer, texts)
    for text in random_texts(seed=4, size=50):
        assert smaller.decode(smaller(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])


def test_merges_of_old_files():
    """They are one string each."""
    content = as_json(bpe([("a", "b")]))
    content["model"]["merges"] = ["a b"]
    assert needed_ids(content, {2}) == {0, 1, 2}
    assert trimmed_content(content, {0: 0, 1: 1, 2: 2})["model"]["merges"] == [["a", "b"]]
