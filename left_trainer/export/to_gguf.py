"""GGUF, through the package of llama.cpp's own converter: a whole model, or an adapter for `--lora`."""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from left_trainer.export.formats import Answers, Trained
from left_trainer.export.gguf_model import GgufNames, finish, write_model
from left_trainer.export.greedy import hugging_face_answers
from left_trainer.export.to_lora import factors_of
from left_trainer.methods.plain_lora import PlainLora
from left_trainer.models import load_model

MODEL, ADAPTER = "model.gguf", "adapter.gguf"
MARGIN = 8  # positions beside prompt and answer


def write(trained: Trained, folder: Path) -> None:
    """Write `model.gguf`, or `adapter.gguf`."""
    try:
        if trained.as_adapter:
            _write_adapter(trained, folder / ADAPTER)
        else:
            model = AutoModelForCausalLM.from_pretrained(trained.plain, dtype=torch.float32)
            write_model(model, trained.reference.tokenizer, trained.precision, folder / MODEL)
    except ValueError as error:
        raise ValueError(
            f"The model in {str(trained.path)!r} cannot be written as GGUF: {error}. Export it with --to merged, and "
            "try llama.cpp's own convert_hf_to_gguf.py on the result."
        ) from error


def answers(trained: Trained, folder: Path) -> Answers:
    """Those of llama.cpp where it is installed; else those of what transformers or PEFT read from the file."""
    if _has_llama_cpp():
        return _llama_cpp_answers(trained, folder)
    if trained.as_adapter:
        with tempfile.TemporaryDirectory() as place:
            _read_adapter(trained, folder / ADAPTER).write(place, trained.source.base_name, "CAUSAL_LM")
            model = PeftModel.from_pretrained(load_model(trained.source), place)
            return hugging_face_answers(model.eval(), trained.reference)
    # transformers does not read every setting back, GPT-2's number of positions say.
    config = AutoConfig.from_pretrained(str(trained.plain))
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=MODEL, config=config, dtype=torch.float32)
    return hugging_face_answers(model.eval(), trained.reference)


def runtime() -> str:
    """Name and version."""
    if _has_llama_cpp():
        return f"llama.cpp in llama-cpp-python {version('llama-cpp-python')}"
    return f"transformers {version('transformers')}, since llama-cpp-python is not installed"


def usage(trained: Trained, folder: Path) -> str:
    """Code that loads it."""
    if trained.as_adapter:
        return f"llama-cli -m BASE.gguf --lora {folder / ADAPTER}"
    return f"llama-cli -m {folder / MODEL}"


def _has_llama_cpp() -> bool:
    return find_spec("llama_cpp") is not None


def _write_adapter(trained: Trained, path: Path) -> None:
    import gguf

    lora, names = factors_of(trained), GgufNames(trained.source.config)
    if lora.embeddings:
        raise ValueError("it changes embeddings, which llama.cpp takes no adapter for")
    writer = gguf.GGUFWriter(str(path), names.architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(lora.rank))
    for name, (a, b) in lora.uniform().items():
        place = names.of(f"{name}.weight")
        writer.add_tensor(f"{place}.lora_a", a.numpy())
        writer.add_tensor(f"{place}.lora_b", names.rows(f"{name}.weight", b.numpy()))
    finish(writer)


def _read_adapter(trained: Trained, path: Path) -> PlainLora:
    import gguf

    tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(str(path)).tensors}
    lora, names = factors_of(trained), GgufNames(trained.source.config)
    factors = {}
    for name in lora.factors:
        a, b = (torch.from_numpy(tensors[f"{names.of(f'{name}.weight')}.lora_{part}"]) for part in "ab")
        order = names.rows(f"{name}.weight", np.arange(b.shape[0]))
        factors[name] = (a, b[torch.from_numpy(order).argsort()])
    return PlainLora(factors, lora.embeddings, lora.is_conv1d, lora.is_exact)


def _llama_cpp_answers(trained: Trained, folder: Path) -> Answers:
    """From llama.cpp's own tokens of each prompt, unless the prompt was too long and cut."""
    import llama_cpp

    reference, search = trained.reference, trained.reference.search
    with tempfile.TemporaryDirectory() as place:
        model_path, adapter = folder / MODEL, None
        if trained.as_adapter:
            model_path, adapter = Path(place) / MODEL, str(folder / ADAPTER)
            base = load_model(trained.source)
            write_model(
                base.dequantize() if trained.source.is_quantized else base, reference.tokenizer, "f32", model_path
            )
        longest = max(map(len, reference.inputs)) + search.max_new_tokens + MARGIN
        llama = llama_cpp.Llama(
            str(model_path),
            n_ctx=longest,
            n_threads=torch.get_num_threads(),
            lora_path=adapter,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            verbose=False,
        )

        def allowed(_: Any, logits: Any) -> Any:
            logits[list(search.never)] = -np.inf
            return logits

        written = []
        for prompt, ids in zip(reference.prompts, reference.inputs, strict=True):
            is_whole = list(reference.tokenizer(prompt)["input_ids"]) == ids
            tokens = llama.tokenize(prompt.encode(), add_bos=True, special=True) if is_whole else ids
            new: list[int] = []
            stream = llama.generate(
                tokens, top_k=1, temp=0.0, repeat_penalty=1.0, logits_processor=llama_cpp.LogitsProcessorList([allowed])
            )
            for token in stream:
                new.append(token)
                if token in search.ends or len(new) >= search.max_new_tokens:
                    break
            written.append(search.answer(new))
        llama.close()
    return written
