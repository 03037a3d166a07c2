"""CTranslate2, through its own converter for models of transformers."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from left_trainer.export.formats import Answers, Trained

# What the converter (ctranslate2 4.8) reads from the config of BART and its relatives, and transformers 5 no longer
# writes: whether norms stand before the layers, and whether there is one behind the embeddings.
BART_SHAPES = {
    "bart": {"normalize_before": False, "normalize_embedding": True},
    "mbart": {"normalize_before": True, "normalize_embedding": True},
    "pegasus": {"normalize_before": True, "normalize_embedding": False},
}
CONFIG_FILE = "config.json"
START = "decoder_start_token"


def write(trained: Trained, folder: Path) -> None:
    """Convert the merged model, with the tokenizer beside it, which CTranslate2 leaves to the caller."""
    from ctranslate2.converters import TransformersConverter

    embeddings = trained.source.config.get_text_config().vocab_size

    class Converter(TransformersConverter):
        """Takes our tokenizer, lets the config say what the converter asks, and keeps the size of the heads."""

        def _load(self) -> Any:
            spec = super()._load()
            _set_head_size(spec, trained.source.config.get_text_config())
            return spec

        def load_model(self, model_class: Any, model_name_or_path: str, **options: Any) -> Any:
            _complete(options["config"])
            return super().load_model(model_class, model_name_or_path, **options)

        def load_tokenizer(self, *_: Any, **__: Any) -> PreTrainedTokenizerBase:
            return _complete_tokenizer(trained.reference.tokenizer, embeddings)

    try:
        Converter(str(trained.plain), trust_remote_code=trained.source.trust_remote_code).convert(
            str(folder), quantization=trained.precision, force=True
        )
    except (ValueError, NotImplementedError, KeyError, AttributeError) as error:
        raise ValueError(
            f"CTranslate2's converter does not take the model in {str(trained.path)!r}: {error}. Export it with --to "
            "merged or onnx."
        ) from error
    trained.reference.tokenizer.save_pretrained(folder / "tokenizer")


def answers(trained: Trained, folder: Path) -> Answers:
    """Those of CTranslate2 on the CPU."""
    import ctranslate2

    tokenizer, search = trained.reference.tokenizer, trained.reference.search
    prompts = [tokenizer.convert_ids_to_tokens(ids) for ids in trained.reference.inputs]
    words = set(_vocabulary(folder))
    options: dict[str, Any] = {
        "beam_size": 1,
        "suppress_sequences": [
            [token] for token in tokenizer.convert_ids_to_tokens(list(search.never)) if token in words
        ],
        "end_token": tokenizer.convert_ids_to_tokens(list(search.ends)) or None,
    }
    if trained.source.family == "encoder_decoder":
        prefix, forced = _prefix(trained, folder), len(search.start) - 1
        results = ctranslate2.Translator(str(folder), device="cpu", intra_threads=1).translate_batch(
            prompts,
            target_prefix=[prefix] * len(prompts) if prefix else None,
            max_decoding_length=search.max_new_tokens + forced,
            **options,
        )
        written = [tokenizer.convert_tokens_to_ids(result.hypotheses[0][forced:]) for result in results]
    else:
        results = ctranslate2.Generator(str(folder), device="cpu", intra_threads=1).generate_batch(
            prompts, max_length=search.max_new_tokens, include_prompt_in_result=False, sampling_topk=1, **options
        )
        written = [result.sequences_ids[0] for result in results]
    return [search.answer(ids) for ids in written]


def runtime() -> str:
    """Name and version."""
    return f"CTranslate2 {version('ctranslate2')}"


def usage(trained: Trained, folder: Path) -> str:
    """Code that loads it."""
    tokens = f"AutoTokenizer.from_pretrained({str(folder / 'tokenizer')!r})"
    if trained.source.family == "decoder_only":
        return f"ctranslate2.Generator({str(folder)!r}) on the tokens of {tokens}"
    prefix = _prefix(trained, folder)
    return f"ctranslate2.Translator({str(folder)!r}) on the tokens of {tokens}" + (
        f", with target_prefix=[{prefix}]" if prefix else ""
    )


def _complete(config: PreTrainedConfig) -> None:
    for name, value in BART_SHAPES.get(config.model_type, {}).items():
        if not hasattr(config, name):
            setattr(config, name, value)


def _set_head_size(spec: Any, config: PreTrainedConfig) -> None:
    """Of a decoder-only model whose heads are not as wide as its width and their number make them: one of fewer heads.

    Its loaders (ctranslate2 4.8) leave that out for Llama, Mistral and Qwen2, and CTranslate2 computes something else.
    """
    size = getattr(config, "head_dim", None)
    if size and size * config.num_attention_heads != config.hidden_size:
        for layer in spec.decoder.layer:
            attention = layer.self_attention  # which takes no new attributes the ordinary way
            object.__setattr__(attention, "head_dim", np.dtype("int32").type(size))


def _complete_tokenizer(tokenizer: PreTrainedTokenizerBase, embeddings: int) -> PreTrainedTokenizerBase:
    """`tokenizer` with one token for each embedding, and an unknown token, without which CTranslate2 loads no model.

    A tokenizer of bytes has none and knows every text, so that the end of a text can stand for it.
    """
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    vocabulary = {by_id.get(number, f"<unused_{number}>"): number for number in range(embeddings)}

    class Complete:
        unk_token = tokenizer.unk_token or tokenizer.eos_token

        def get_vocab(self) -> dict[str, int]:
            return vocabulary

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    return Complete()  # type: ignore[return-value]


def _prefix(trained: Trained, folder: Path) -> list[str]:
    """What the decoder is given to begin with, beside the token that the exported config starts it with."""
    start = trained.reference.tokenizer.convert_ids_to_tokens(list(trained.reference.search.start))
    own = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get(START)
    return list(start) if own is None else list(start[1:])


def _vocabulary(folder: Path) -> list[str]:
    file = next(iter(sorted(folder.glob("*vocabulary.json"))))
    return list(json.loads(file.read_text(encoding="utf-8")))
