r"""An adapter as a plain LoRA of one rank and scaling 1, which is what serving engines read.

LoRA and the methods that differ from it in their start or their training are one already: $s B A$, with the scaling in
$B$ and, for AdaLoRA, its singular values in $A$. Of others PEFT decomposes the change of each weight. Engines take one
rank and one scaling for all layers, so that ranks are filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, convert_to_lora
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from left_trainer.methods.apply import find_method
from left_trainer.methods.method import PeftMethod
from left_trainer.models import without_upstream_warnings

Kind = Literal["exact", "approximate"]
ENERGY = 0.9999  # of the squares of a weight's change, which the rank is to hold where the user names none
PREFIX = "base_model.model."
SINGLE_WEIGHT = (torch.nn.Linear, torch.nn.Embedding, Conv1D)  # other layers, of experts say, have several


@dataclass(frozen=True)
class PlainLora:
    """Factors of each adapted layer: the weight changes by `b @ a`.

    Args:
        factors: `a`, `(rank, in)`, and `b`, `(out, rank)`, by the name of the layer in the base model.
        embeddings: Names of those that are embeddings.
        is_conv1d: Whether the base keeps its weights transposed, as GPT-2 does.
        is_exact: Whether nothing is lost.
    """

    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    embeddings: frozenset[str]
    is_conv1d: bool
    is_exact: bool

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(a.shape[0] for a, _ in self.factors.values())

    def uniform(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The factors with one rank, filled up with zeros."""
        return {
            name: (
                torch.nn.functional.pad(a, (0, 0, 0, self.rank - a.shape[0])).contiguous(),
                torch.nn.functional.pad(b, (0, self.rank - b.shape[1])).contiguous(),
            )
            for name, (a, b) in self.factors.items()
        }

    def config(self, base: str, task_type: str | None) -> LoraConfig:
        """For `PeftModel.from_pretrained`.

        Args:
            base: Name or path of the base model.
            task_type: As PEFT writes it.
        """
        return LoraConfig(
            task_type=task_type,
            base_model_name_or_path=base,
            r=self.rank,
            lora_alpha=self.rank,
            target_modules=sorted(self.factors),
            fan_in_fan_out=self.is_conv1d,
            inference_mode=True,
        )

    def write(self, folder: str | Path, base: str, task_type: str | None) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`; arguments as `config`."""
        weights: dict[str, torch.Tensor] = {}
        for name, factors in self.uniform().items():
            parts = ("embedding_A", "embedding_B") if name in self.embeddings else ("A.weight", "B.weight")
            weights |= {f"{PREFIX}{name}.lora_{part}": factor for part, factor in zip(parts, factors, strict=True)}
        save_file(weights, Path(folder) / ADAPTER_SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        self.config(base, task_type).save_pretrained(str(folder))


def lora_kind(model: PeftModel) -> Kind | None:
    """How the adapter of `model` can be written as a plain LoRA; `None` where it cannot. No weights are read."""
    if not may_be_lora(find_method(model)):
        return None
    layers = _tuner_layers(model)
    if not layers:
        return None
    if all(_is_plain(layer, model.active_adapter) for layer in layers.values()):
        return "exact"
    if any(isinstance(layer, LoraLayer) for layer in layers.values()):
        return None  # DoRA, of which PEFT would leave out the magnitudes (peft 0.21)
    return "approximate" if all(layer.supports_lora_conversion() for layer in layers.values()) else None


@torch.no_grad()
def plain_lora(model: PeftModel, rank: int | float | None = None) -> PlainLora:
    """The active adapter of `model` as a plain LoRA.

    Args:
        model: With its weights.
        rank: Of what has to be approximated: a number, or the share of the squared singular values to hold.

    Raises:
        ValueError: The adapter changes something else than the weights of single layers, or `rank` does not fit.
    """
    kind, adapter = lora_kind(model), model.active_adapter
    if kind is None:
        raise ValueError("it changes weights in a way that two low-rank factors cannot hold")
    layers = _tuner_layers(model)
    if kind == "exact":
        factors = {name: _factors(layer, adapter) for name, layer in layers.items()}
    else:
        factors = _converted(model, ENERGY if rank is None else rank)
    bases = {name: layers[name].get_base_layer() for name in factors}
    embeddings = frozenset(name for name, base in bases.items() if isinstance(base, torch.nn.Embedding))
    is_conv1d = any(isinstance(base, Conv1D) for base in bases.values())
    return PlainLora(factors, embeddings, is_conv1d, kind == "exact")


def other_weights(names: Iterable[str], model: PeftModel) -> list[str]:
    """Of the weights in an adapter file those of the base itself: added tokens, whole modules, biases.

    Args:
        names: As they are saved.
        model: With the adapter.
    """
    named = (name for name, _ in model.get_base_model().named_parameters())
    of_base = {name.replace(".base_layer.", ".").replace(".original_module.", ".") for name in named}
    return sorted(name for name in names if name.removeprefix(PREFIX) in of_base or ".modules_to_save." in name)


def may_be_lora(method: PeftMethod | None) -> bool:
    """Whether an adapter of `method` can be one, as far as its record tells: it merges, or it is a LoRA."""
    if method is None or method.config_class is None:
        return False
    return method.mergeable or method.config_class is LoraConfig


def _tuner_layers(model: PeftModel) -> dict[str, BaseTunerLayer]:
    named = model.get_base_model().named_modules()
    return {name: module for name, module in named if isinstance(module, BaseTunerLayer)}


def _is_plain(layer: BaseTunerLayer, adapter: str) -> bool:
    if not isinstance(layer, LoraLayer) or not isinstance(layer.get_base_layer(), SINGLE_WEIGHT):
        return False
    return isinstance(layer, SVDLinear) or not (layer.lora_variant.get(adapter) or layer.lora_bias.get(adapter))


def _factors(layer: LoraLayer, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(layer, SVDLinear):
        scaling = layer.scaling[adapter] / (layer.ranknum[adapter].item() + 1e-5)  # as in PEFT's own forward
        a, b = layer.lora_A[adapter] * layer.lora_E[adapter], layer.lora_B[adapter]
    elif adapter in layer.lora_A:
        scaling, a, b = layer.scaling[adapter], layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    else:
        scaling, a, b = layer.scaling[adapter], layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return a.detach().float().cpu().clone(), (b.detach().float() * scaling).cpu().contiguous()


def _converted(model: PeftModel, rank: int | float) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    with without_upstream_warnings():
        try:
            config, weights = convert_to_lora(model, rank=rank, adapter_name=model.active_adapter)
        except (TypeError, NotImplementedError) as error:
            raise ValueError(f"PEFT cannot decompose it: {error}") from error
    if config.modules_to_save:
        raise ValueError(f"it trained whole modules ({', '.join(config.modules_to_save)}), which no low rank can hold")
    names = sorted({name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in weights})
    return {
        name: tuple(weights[f"{PREFIX}{name}.lora_{part}.weight"].float().cpu() for part in "AB")  # type: ignore[misc]
        for name in names
    }
