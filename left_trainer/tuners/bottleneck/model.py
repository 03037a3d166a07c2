"""Put bottleneck adapters into a model."""

from __future__ import annotations

import re
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from left_trainer.tuners.bottleneck.config import BottleneckConfig, PfeifferAdapterConfig
from left_trainer.tuners.bottleneck.layer import BottleneckLayer, HoulsbyLayer, ParallelLayer, PfeifferLayer
from left_trainer.tuners.bottleneck.layouts import LAYOUTS, Layout, find_layout
from left_trainer.tuners.bottleneck.lower_layers import DroppedLayers, layer_number


class BottleneckModel(BaseTuner):
    """What the three tuners share. A subclass names its layer and the options that follow from the model's layout."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    layer_class: type[BottleneckLayer]
    required_options: tuple[str, ...] = ("target_modules",)

    @staticmethod
    def default_options(layout: Layout) -> dict[str, Any]:
        """Values of the options that name modules."""
        raise NotImplementedError

    def _prepare_adapter_config(self, peft_config: BottleneckConfig, model_config: dict[str, Any]) -> BottleneckConfig:
        layout = find_layout(model_config)
        for name, value in (self.default_options(layout) if layout else {}).items():
            if getattr(peft_config, name) is None:
                setattr(peft_config, name, value)
        missing = [name for name in self.required_options if not getattr(peft_config, name)]
        if missing:
            raise ValueError(
                f"{' and '.join(missing)} must be passed for model_type={model_config.get('model_type')!r}, since "
                f"{type(peft_config).__name__} has defaults for these model types only: {', '.join(sorted(LAYOUTS))}. "
                f"For a Llama-like model they would be {self.default_options(LAYOUTS['llama'])}."
            )
        input_module = getattr(peft_config, "input_module", None)
        if input_module in {name.rpartition(".")[2] for name in peft_config.modules_to_save or ()}:
            raise ValueError(
                f"modules_to_save={peft_config.modules_to_save!r} holds {input_module!r}, the input of which adapters "
                "read; PEFT would run a copy, and the adapters would see no input. Leave it out of modules_to_save."
            )
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: BottleneckConfig, key: str) -> Any:
        number = layer_number(key)
        if number is not None and number < peft_config.fewest_dropped:
            return False
        return BaseTuner._check_target_module_exists(peft_config, key)

    def _prepare_model(self, peft_config: BottleneckConfig, model: nn.Module) -> None:
        """Refuse to leave all layers without adapters."""
        if not peft_config.most_dropped:
            return
        last: dict[str, int] = {}
        for key, _ in model.named_modules():
            number = layer_number(key)
            if number is not None and BaseTuner._check_target_module_exists(peft_config, key):
                stack = key[: key.index(f".{number}.")]
                last[stack] = max(last.get(stack, 0), number)
        fewest = min(last.values(), default=0) + 1
        if peft_config.most_dropped >= fewest:
            raise ValueError(
                f"drop_layers={peft_config.drop_layers!r} must stay below {fewest}: of the layers that could have an "
                "adapter, one keeps it."
            )

    def _dropped_layers(self, adapter_name: str) -> DroppedLayers:
        """How many lower layers go without the adapter; drawn before each pass in training where that may vary."""
        known: dict[str, DroppedLayers] = self.__dict__.setdefault("dropped_layers", {})
        if adapter_name not in known:
            config = self.peft_config[adapter_name]
            known[adapter_name] = DroppedLayers(config.fewest_dropped, config.most_dropped)
            if config.fewest_dropped < config.most_dropped:
                self.model.register_forward_pre_hook(known[adapter_name].draw)
        return known[adapter_name]

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        hidden_size = self.model.config.hidden_size
        width = getattr(target, "out_features", hidden_size)
        if width != hidden_size:
            raise ValueError(
                f"target_modules={peft_config.target_modules!r} matches {current_key!r}, the output of which has "
                f"{width} features, not hidden_size={hidden_size}. Name modules that write to the residual stream."
            )
        if not isinstance(target, BottleneckLayer):
            self._check_siblings(peft_config, parent, current_key)
            target = self.layer_class(target, parent, peft_config)
            self._replace_module(parent, target_name, target, target.base_layer)
        target.update_layer(adapter_name, hidden_size, peft_config)
        target.drop_with(adapter_name, layer_number(current_key), self._dropped_layers(adapter_name))

    @staticmethod
    def _check_siblings(peft_config: BottleneckConfig, parent: nn.Module, key: str) -> None:
        for option in ("input_module", "norm_module"):
            name = getattr(peft_config, option, None)
            if name is not None and name not in dict(parent.named_modules()):
                raise ValueError(
                    f"{option}={name!r} is not in the module that holds {key!r}. Allowed: "
                    f"{', '.join(child for child, _ in parent.named_children())}."
                )

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own would copy a `weight`, which a whole feed-forward block lacks; layers find their device themselves.
        setattr(parent, child_name, new_module)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # The adapter name is deeper inside than where PEFT expects it, since every adapter is a module of several.
        return re.sub(rf"(\.{cls.prefix}\w+)\.{re.escape(adapter_name)}\.", r"\1.", key)


class HoulsbyAdapterModel(BottleneckModel):
    """Houlsby's adapters: one after every attention and every feed-forward sublayer. arXiv 1902.00751."""

    layer_class = HoulsbyLayer

    @staticmethod
    def default_options(layout: Layout) -> dict[str, Any]:
        return {"target_modules": [*layout.attention, layout.feed_forward]}


class PfeifferAdapterModel(BottleneckModel):
    """Pfeiffer's adapters: one after every feed-forward sublayer, and optionally an invertible one at the embeddings.

    arXiv 2005.00052, arXiv 2005.00247.
    """

    layer_class = PfeifferLayer
    required_options = ("target_modules", "input_module")

    @staticmethod
    def default_options(layout: Layout) -> dict[str, Any]:
        return {
            "target_modules": [layout.feed_forward],
            "input_module": layout.feed_forward_input,
            "norm_module": layout.post_layer_norm,
        }

    def _first_block(self, key: str) -> str | None:
        """Name of the first layer, where `key` names a part of it; the decoder has none beside an encoder."""
        match = re.match(r"(\D*\.0)\.", key)
        if match is None or (self.model.config.is_encoder_decoder and "decoder." in match[1]):
            return None
        return match[1]

    def _prepare_model(self, peft_config: PfeifferAdapterConfig, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        if not peft_config.invertible:
            return
        targets = [
            key
            for key, _ in model.named_modules()
            if self._first_block(key) and self._check_target_module_exists(peft_config, key)
        ]
        if len(targets) != 1:
            raise ValueError(
                "invertible=True needs exactly one target module in the first layer, but target_modules="
                f"{peft_config.target_modules!r} matches {targets or 'none'}. Pass invertible=False or other "
                "target_modules."
            )

    def _create_and_replace(
        self,
        peft_config: PfeifferAdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        super()._create_and_replace(peft_config, adapter_name, target, target_name, parent, current_key)
        block = self._first_block(current_key)
        if peft_config.invertible and block:
            getattr(parent, target_name).add_invertible(
                adapter_name, self.model.config.hidden_size, peft_config, self.model.get_submodule(block)
            )


class ParallelAdapterModel(BottleneckModel):
    """Parallel adapters: one beside every feed-forward sublayer. arXiv 2110.04366."""

    layer_class = ParallelLayer
    required_options = ("target_modules", "input_module")

    @staticmethod
    def default_options(layout: Layout) -> dict[str, Any]:
        return {"target_modules": [layout.feed_forward], "input_module": layout.feed_forward_input}
