"""The three selective tuners: they differ in what they select, and share everything else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from torch import nn
from transformers import PreTrainedModel

from left_trainer.tuners.selective.config import BitFitConfig, LayersConfig, ParameterTypesConfig, SelectiveConfig
from left_trainer.tuners.selective.layer import SelectiveLayer, Trainers
from left_trainer.tuners.selective.selection import (
    Selection,
    own_parameters,
    parameter_owners,
    select_biases,
    select_layers,
    select_types,
)


class SelectiveModel(BaseTuner):
    """Wraps every module that owns selected parameters in a `SelectiveLayer`.

    A selected parameter that is tied to others, such as T5's embeddings, stays tied: it is trained and saved once.
    One adapter is active, and merged, at a time, since adapters replace parameters and cannot be summed.

    Raises `ValueError` when nothing is selected or when a parameter lies where it cannot be replaced.
    """

    tuner_layer_cls = SelectiveLayer

    def _select(self, model: nn.Module, owners: dict[str, nn.Module], config: Any) -> Selection:
        raise NotImplementedError

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config

    def _prepare_model(self, peft_config: SelectiveConfig, model: nn.Module) -> None:
        everything = replace(peft_config, target_modules=".*")  # leaves out `modules_to_save`
        owners = {
            name: module
            for name, module in parameter_owners(model).items()
            if check_target_module_exists(everything, name)
        }
        selection = {
            name: parameters
            for name, parameters in self._select(model, owners, peft_config).items()
            if peft_config.target_modules is None or check_target_module_exists(peft_config, name)
        }
        if not selection:
            raise ValueError(
                f"target_modules={peft_config.target_modules!r} leaves no parameter of {type(model).__name__} to "
                f"train with {peft_config.peft_type.value.lower()}. Remove it, or name modules such as "
                f"{list(owners)[-1]!r}."
            )
        self._selection = _with_tied_parameters(selection, owners)
        self._trainers: Trainers = {}

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> bool:
        return key in self._selection

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, SelectiveLayer) else SelectiveLayer(target, self.prefix)
        layer.update_layer(adapter_name, self._selection[current_key], self._trainers)
        self._replace_module(parent, target_name, layer, target)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise ValueError(f"adapter_name={adapter_name!r}: these adapters replace parameters. Activate one of them.")
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        # Adapters may lie in different layers, and PEFT lets each layer choose the next one for itself.
        if was_active and self.peft_config:
            self.set_adapter(sorted(self.peft_config)[0])

    def _check_merge_allowed(self) -> None:
        """PEFT's check warns of tied embeddings, which are kept tied here."""

    def _check_merge(self, adapter_names: list[str] | None) -> None:
        names = set(adapter_names or self.active_adapters)
        layers = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, SelectiveLayer)}
        together = names.union(*(layer.merged_adapters for layer in layers.values()))
        if len(together) > 1:
            raise ValueError(
                f"Adapters {sorted(together)} cannot be merged together, since they replace parameters. Merge one of "
                "them, after model.unmerge_adapter() where another one is merged."
            )
        grown = [name for name, layer in layers.items() if any(layer.adds_bias(adapter) for adapter in names)]
        if grown:
            raise ValueError(
                f"{type(self.model).__name__} cannot be merged with biases it has no place for: {len(grown)} of its "
                f"modules got one, such as {grown[0]!r}, and would lose it when the merged model is loaded. Keep the "
                "adapter, or train with target_modules that name modules with a bias."
            )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_merge(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge(adapter_names)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)


def _with_tied_parameters(selection: Selection, owners: dict[str, nn.Module]) -> Selection:
    """`selection` in the order of the model, with every other place of its parameters, where they can be replaced."""
    chosen = {
        id(own_parameters(owners[name])[parameter])
        for name, parameters in selection.items()
        for parameter in parameters
        if parameter in own_parameters(owners[name])
    }
    result: Selection = {}
    inner: dict[int, str] = {}
    for name, module in owners.items():
        places = {key: id(value) for key, value in own_parameters(module).items() if id(value) in chosen}
        if any(True for child in module.children() for _ in child.parameters()):
            inner.update(dict.fromkeys(places.values(), name))
        elif places or name in selection:
            result[name] = list(dict.fromkeys([*selection.get(name, ()), *places]))
    reached = {id(own_parameters(owners[name]).get(key)) for name, keys in result.items() for key in keys}
    # RoBERTa's head keeps a second reference to its decoder's bias, which nothing reads: the decoder's is enough.
    for parameter, name in inner.items():
        if parameter not in reached:
            raise ValueError(
                f"{name!r} ({type(owners[name]).__name__}) owns a selected parameter and modules with parameters of "
                "their own, and cannot be replaced. Leave it out through target_modules."
            )
    return result


class BitFitModel(SelectiveModel):
    """Trains biases: see `BitFitConfig`."""

    prefix = "bitfit_"

    def _select(self, model: nn.Module, owners: dict[str, nn.Module], config: BitFitConfig) -> Selection:
        head: Any = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        return select_biases(owners, head.get_base_layer() if isinstance(head, SelectiveLayer) else head)


class LayersModel(SelectiveModel):
    """Trains blocks: see `LayersConfig`."""

    prefix = "selected_layers_"

    def _select(self, model: nn.Module, owners: dict[str, nn.Module], config: LayersConfig) -> Selection:
        encoder_decoder = bool(self.get_model_config(model).get("is_encoder_decoder"))
        return select_layers(model, owners, config.layers, config.stack, encoder_decoder)


class ParameterTypesModel(SelectiveModel):
    """Trains kinds of parameters: see `ParameterTypesConfig`."""

    prefix = "selected_types_"

    def _select(self, model: nn.Module, owners: dict[str, nn.Module], config: ParameterTypesConfig) -> Selection:
        return select_types(model, owners, list(config.types))
