"""A tokenizer of each kind, trained on a few texts, and texts of every sort."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    LlamaTokenizer,
    MBartTokenizer,
    NllbTokenizer,
    PegasusTokenizer,
    PreTrainedTokenizerFast,
    T5Tokenizer,
    XLMRobertaTokenizer,
)

NAMED = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
SPECIALS = list(NAMED.values())
BYTES = [f"<0x{number:02X}>" for number in range(256)]
WORDS = "the quick brown fox jumps over lazy dogs while other foxes were jumping quickly lower lowest newer newest"
FOREIGN = "größer naïve 東京 は 大きい привет мир مرحبا ελληνικά ação 12 3456 3.14 don't x=y+1 🙂"


def corpus(seed: int = 0, size: int = 200) -> list[str]:
    """Texts to train a tokenizer on: words in many languages, with punctuation."""
    rng, words = Random(seed), WORDS.split() * 3 + FOREIGN.split()
    return [
        " ".join(rng.choices(words, k=rng.randint(1, 12))) + rng.choice(["", ".", "!", "\n", " ?"]) for _ in range(size)
    ]


def random_texts(seed: int = 0, size: int = 200) -> list[str]:
    """Texts of characters from all over Unicode, and of words and parts of them."""
    rng, characters = Random(seed), sorted(set(" ".join(corpus())))
    ranges = ((32, 127), (160, 600), (0x400, 0x460), (0x4E00, 0x4F00), (0x1F600, 0x1F640), (0x10000, 0x10100))
    texts = []
    for _ in range(size):
        low, high = rng.choice(ranges)
        anything = "".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 12)))
        seen = "".join(rng.choices(characters, k=rng.randint(1, 20)))
        texts.append(rng.choice((anything, seen, f"{anything} {seen}", rng.choice(corpus()))))
    return texts


def _unigram(specials: list[str], size: int = 300) -> list[tuple[str, float]]:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=specials, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(corpus(), trainer)
    return [(piece, score) for piece, score in json.loads(backend.to_str())["model"]["vocab"]]


def _bpe(specials: list[str], pre_tokenizer: Any, **options: Any) -> dict[str, Any]:
    backend = Tokenizer(models.BPE(**{name: options.pop(name) for name in ("end_of_word_suffix",) if name in options}))
    backend.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials, show_progress=False, **options)
    backend.train_from_iterator(corpus(), trainer)
    return json.loads(backend.to_str())["model"]


def byte_level(**options: Any) -> PreTrainedTokenizerFast:
    """As of GPT-2; with `ignore_merges`, of Llama 3."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model = _bpe(SPECIALS, pre_tokenizers.ByteLevel(), initial_alphabet=alphabet)
    merges = [tuple(pair) for pair in model["merges"]]
    backend = Tokenizer(models.BPE(vocab=model["vocab"], merges=merges, **options))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", model["vocab"]["</s>"])]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=128, **NAMED)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.add_tokens(["newword"])
    turn = "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}<|im_end|>"
    tokenizer.chat_template = f"{{% for message in messages %}}{turn}{{% endfor %}}"
    return tokenizer


def llama(**options: Any) -> LlamaTokenizer:
    """Byte-pair encoding of whole texts, that spells unknown characters in bytes."""
    model = _bpe(["<unk>", "<s>", "</s>", *BYTES], pre_tokenizers.Metaspace())
    tokenizer = LlamaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], **options)
    tokenizer.pad_token = "</s>"
    return tokenizer


def t5() -> T5Tokenizer:
    return T5Tokenizer(vocab=_unigram(["<pad>", "</s>", "<unk>"]), extra_ids=10)


def mbart() -> MBartTokenizer:
    return MBartTokenizer(vocab=_unigram(["<s>", "<pad>", "</s>", "<unk>"]), src_lang="en_XX", tgt_lang="de_DE")


def pegasus() -> PegasusTokenizer:
    return PegasusTokenizer(vocab=_unigram(["<pad>", "</s>", "<mask_1>", "<mask_2>", "<unk>"]), offset=5)


def xlm_roberta() -> XLMRobertaTokenizer:
    return XLMRobertaTokenizer(vocab=_unigram(["<s>", "<pad>", "</s>", "<unk>"]))


def nllb() -> NllbTokenizer:
    model = _bpe(["<s>", "<pad>", "</s>", "<unk>"], pre_tokenizers.Metaspace())
    merges = [tuple(pair) for pair in model["merges"]]
    return NllbTokenizer(vocab=model["vocab"], merges=merges, src_lang="eng_Latn", tgt_lang="deu_Latn")


def unigram_with_bytes() -> PreTrainedTokenizerFast:
    """As mT5's: pieces of bytes stand in for unknown characters."""
    vocabulary = _unigram([*SPECIALS, *BYTES], 600)
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=SPECIALS.index("<unk>"), byte_fallback=True))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    backend.enable_padding(pad_id=SPECIALS.index("<pad>"), pad_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **NAMED)


def word_piece() -> PreTrainedTokenizerFast:
    """As of BERT."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=SPECIALS, show_progress=False)
    backend.train_from_iterator(corpus(), trainer)
    backend.decoder = decoders.WordPiece()
    numbers = [(token, backend.token_to_id(token)) for token in ("</s>", "<s>")]
    backend.post_processor = processors.BertProcessing(*numbers)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **NAMED)


def word_ends() -> PreTrainedTokenizerFast:
    """Byte-pair encoding that marks the ends of words, as of CLIP."""
    model = _bpe(SPECIALS, pre_tokenizers.Whitespace(), end_of_word_suffix="</w>")
    merges = [tuple(pair) for pair in model["merges"]]
    backend = Tokenizer(models.BPE(model["vocab"], merges, end_of_word_suffix="</w>", unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **NAMED)


def word_level() -> PreTrainedTokenizerFast:
    """Whole words, which nothing spells."""
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(corpus(), trainers.WordLevelTrainer(special_tokens=SPECIALS, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **NAMED)


KINDS: dict[str, Callable[[], Any]] = {
    "byte_level": byte_level,
    "byte_level_whole_words": lambda: byte_level(ignore_merges=True),
    "llama": llama,
    "t5": t5,
    "mbart": mbart,
    "pegasus": pegasus,
    "xlm_roberta": xlm_roberta,
    "nllb": nllb,
    "unigram_with_bytes": unigram_with_bytes,
    "word_piece": word_piece,
    "word_ends": word_ends,
    "word_level": word_level,
}
