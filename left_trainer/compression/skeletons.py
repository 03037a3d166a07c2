"""The shapes and attributes of a model with its adapters, as it is and as it shall be."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from left_trainer.compression.cuts import WRAPPERS, Cuts
from left_trainer.methods.apply import with_named_targets
from left_trainer.methods.input_prompts import wrap
from left_trainer.models import without_adapter, without_upstream_warnings


@dataclass(frozen=True)
class Change:
    """Something of a model, as it is and as it shall be.

    Args:
        name: Its name in the model as it is.
        it: The tensor or module.
        before: The same of a skeleton; `None` where the skeleton lacks it.
        after: As it shall be.
    """

    name: str
    it: Any
    before: Any
    after: Any


class Skeletons:
    """A model beside two without weights: as it is, and with what is cut taken out.

    Adapters are made anew on both. Where that cannot be done without weights, the skeletons are of the base model.

    Args:
        model: To be shrunk.
        configs: Of its adapters, as they shall be.
        cuts: What goes.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, configs: Mapping[str, PeftConfig], cuts: Cuts) -> None:
        self.model, self.cuts = model, cuts
        base = without_adapter(model)
        self.base_name = next(name for name, module in model.named_modules() if module is base)
        before, after = self._made(getattr(model, "peft_config", {}), configs)
        self.has_adapters = isinstance(before, PeftModel)
        self.before, self.after = before, after

    def _made(self, old: Mapping[str, PeftConfig], new: Mapping[str, PeftConfig]) -> tuple[nn.Module, nn.Module]:
        base = without_adapter(self.model)
        if old:
            try:
                return skeleton(type(base), base.config, old), skeleton(type(base), self.cuts.config, new)
            except Exception:  # what needs weights raises errors of all kinds
                pass
        return skeleton(type(base), base.config, {}), skeleton(type(base), self.cuts.config, {})

    def tensors(self) -> Iterator[Change]:
        """Parameters and buffers."""
        yield from self._changes(_tensors(self.model), *(dict(_tensors(each)) for each in (self.before, self.after)))

    def modules(self) -> Iterator[Change]:
        yield from self._changes(_modules(self.model), *(dict(_modules(each)) for each in (self.before, self.after)))

    def _changes(
        self, named: list[tuple[str, Any]], before: Mapping[str, Any], after: Mapping[str, Any]
    ) -> Iterator[Change]:
        for name, it in named:
            key = name if self.has_adapters else self._plain(name)
            new_key = self.cuts.renamed(key)
            yield Change(name, it, before.get(key), after.get(new_key) if new_key is not None else None)

    def _plain(self, name: str) -> str:
        """The name in the base model, where an adapter has put others around it."""
        return WRAPPERS.sub("", name).removeprefix(self.base_name).removeprefix(".")


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def _modules(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(module.named_modules(remove_duplicate=False))


def skeleton(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, adapters: Mapping[str, PeftConfig]
) -> PreTrainedModel | PeftModel:
    """A model of this class with `config` and `adapters`, without weights, on the meta device."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]), without_upstream_warnings():
        bare = model_class(copy.deepcopy(config))
        wrapped = bare
        for name, adapter in adapters.items():
            if wrapped is bare:
                own = copy.deepcopy(adapter)
                own.base_model_name_or_path = None  # a skeleton has no name, and PEFT warns of a change of it
                wrapped = wrap(bare, with_named_targets(bare, own), name)
            else:
                wrapped.add_adapter(name, copy.deepcopy(adapter))
        return wrapped
