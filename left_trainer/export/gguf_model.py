"""Tensors and settings of decoder-only models in GGUF, under the names of the `gguf` package."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from left_trainer.export.gguf_tokenizer import GgufTokenizer

BLOCK = 32  # numbers that share a scale in Q8_0
ROTATED = (".q_proj.", ".k_proj.")


@dataclass(frozen=True)
class Architecture:
    """How models of a type are stored.

    Args:
        name: In GGUF.
        interleaved: Whether llama.cpp rotates neighbouring features, and not the halves of a head as transformers does.
        is_rotary: Whether positions are rotations.
        norm_epsilon: The field of the config with it.
    """

    name: str
    interleaved: bool = False
    is_rotary: bool = True
    norm_epsilon: str = "rms_norm_eps"


ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True),
    "mistral": Architecture("llama", interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gpt2": Architecture("gpt2", is_rotary=False, norm_epsilon="layer_norm_epsilon"),
}


class GgufNames:
    """From names of transformers to those of GGUF, and the order of rows in there.

    Args:
        config: Of the model.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        import gguf

        self.config, self.architecture = config, ARCHITECTURES[config.model_type]
        kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture.name)
        self.names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)

    def of(self, name: str) -> str:
        """The name of a weight. Raises `ValueError` where GGUF has none."""
        found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"GGUF has no name for its weight {name}")
        return str(found)

    def rows(self, name: str, tensor: np.ndarray) -> np.ndarray:
        """`tensor`, its first dimension in the order that llama.cpp rotates features in.

        transformers rotates feature i of a head with feature i + half; llama.cpp, for some architectures, 2i with 2i+1.
        """
        if not self.architecture.interleaved or not any(part in name for part in ROTATED):
            return tensor
        config = self.config
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, precision: str, path: Path) -> None:
    """Write a whole model.

    Args:
        model: A decoder-only one, without an adapter.
        tokenizer: Its tokenizer.
        precision: `f32`, `f16`, `bf16` or `q8_0`, of the matrices; vectors stay in `f32`.
        path: Of the new file.

    Raises:
        ValueError: A weight, the tokenizer or a setting has no form in GGUF.
    """
    import gguf

    names = GgufNames(model.config)
    size = model.get_input_embeddings().weight.shape[0]
    vocabulary = GgufTokenizer.of(tokenizer, size)
    writer = gguf.GGUFWriter(str(path), names.architecture.name)
    _write_settings(writer, model, names.architecture)
    file_types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[file_types[precision]])
    vocabulary.write(writer, tokenizer)
    for name, tensor in _weights(model).items():
        data, kind = _stored(names.rows(name, tensor), precision)
        writer.add_tensor(names.of(name), data, raw_dtype=kind)
    factors = _rotation_factors(model.config)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    finish(writer)


def finish(writer: Any) -> None:
    """Write what `writer` holds to its file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _weights(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """Weights by name, each once, `(out, in)`, in float32."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    is_tied = tables[0].weight is tables[1].weight
    weights: dict[str, np.ndarray] = {}
    for place, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            if is_tied and module is tables[1]:
                continue  # llama.cpp takes the input embeddings where there are no others
            tensor = weight.detach().float().cpu()
            is_transposed = isinstance(module, Conv1D) and name == "weight"
            weights[f"{place}.{name}"] = (tensor.T if is_transposed else tensor).contiguous().numpy()
    return weights


def _stored(tensor: np.ndarray, precision: str) -> tuple[np.ndarray, Any]:
    import gguf

    kinds = gguf.GGMLQuantizationType
    if tensor.ndim < 2 or precision == "f32":
        return tensor, kinds.F32
    if precision == "f16" or (precision == "q8_0" and tensor.shape[-1] % BLOCK):
        return tensor.astype(np.float16), kinds.F16
    kind = kinds[precision.upper()]
    return gguf.quants.quantize(tensor, kind), kind


def _write_settings(writer: Any, model: PreTrainedModel, architecture: Architecture) -> None:
    config = model.config
    writer.add_name(Path(config._name_or_path or type(model).__name__).name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(model.get_input_embeddings().weight.shape[0])
    epsilon = getattr(config, architecture.norm_epsilon)
    if not architecture.is_rotary:
        writer.add_layer_norm_eps(epsilon)
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        return
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_layer_norm_rms_eps(epsilon)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    rotation = _rotation(config)
    writer.add_rope_freq_base(float(rotation["rope_theta"]))
    if rotation["rope_type"] == "linear":
        writer.add_rope_scaling_type("linear")
        writer.add_rope_scaling_factor(float(rotation["factor"]))


def _rotation(config: PreTrainedConfig) -> Mapping[str, Any]:
    """How positions are rotated. Raises `ValueError` where GGUF cannot say so."""
    rotation: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    rotation = {"rope_type": "default", "rope_theta": 10_000.0, **rotation}
    if rotation["rope_type"] not in ("default", "linear", "llama3"):
        raise ValueError(f"its positions are rotated as in {rotation['rope_type']!r}, which is not written here")
    if rotation.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("it rotates a part of each head alone, which is not written here")
    return rotation


def _rotation_factors(config: PreTrainedConfig) -> np.ndarray | None:
    """Divisors of the frequencies of Llama 3.1: 1 for short waves, `factor` for long ones, in between a line."""
    if not ARCHITECTURES[config.model_type].is_rotary or _rotation(config)["rope_type"] != "llama3":
        return None
    rotation = _rotation(config)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    waves = 2 * math.pi * torch.tensor(float(rotation["rope_theta"])) ** (torch.arange(0, size, 2) / size)
    length, factor = rotation["original_max_position_embeddings"], rotation["factor"]
    low, high = rotation["low_freq_factor"], rotation["high_freq_factor"]
    share = ((length / waves - low) / (high - low)).clamp(0, 1)
    factors: np.ndarray = (1 / (share + (1 - share) / factor)).float().numpy()
    return factors
