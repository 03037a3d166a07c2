"""Taking rows out of the tables of a model that its vocabulary sizes, and renaming the ids that its configs name."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

# Fields of configs that hold ids, at any depth of lists.
ID_FIELD = re.compile(r"(.*_)?token_(ids?|index|indices)|(begin_)?suppress_tokens|(bad|force)_words_ids")
# In which every entry is a pair, of a position and an id, or of a sequence of ids and what is added to its score.
FORCED_IDS, SEQUENCE_BIAS = "forced_decoder_ids", "sequence_bias"
SIZE_FIELD = re.compile(r"(.*_)?vocab_size(_.*)?")

NewId: TypeAlias = Callable[[int], int]
AnyConfig: TypeAlias = PreTrainedConfig | GenerationConfig


@dataclass(frozen=True)
class Table:
    """A tensor of a model with a place for each token.

    Args:
        name: One of its names in the model.
        tensor: The parameter or buffer.
        dim: Along which the tokens are.
    """

    name: str
    tensor: torch.Tensor
    dim: int

    @property
    def rows(self) -> int:
        """Number of tokens."""
        return self.tensor.shape[self.dim]


def named_ids(*configs: AnyConfig | None) -> set[int]:
    """Ids of tokens that fields of configs, and of the configs inside of them, name."""
    found: set[int] = set()

    def note(number: int) -> int:
        found.add(number)
        return number

    for config in configs:
        for inner in _with_inner(config):
            for name, value in vars(inner).items():
                renamed({name: value}, note)
    return {number for number in found if number >= 0}


def rename_ids(new_id: NewId, *configs: AnyConfig | None) -> None:
    """Let the configs name tokens by new ids. One that stands in several places is changed once."""
    inner = {id(config): config for outer in configs for config in _with_inner(outer)}
    for config in inner.values():
        for name, value in list(vars(config).items()):
            new_value = renamed({name: value}, new_id)[name]
            if new_value != value:
                setattr(config, name, new_value)


def renamed(values: Mapping[str, Any], new_id: NewId) -> dict[str, Any]:
    """Fields of a config, or options, with new ids where they hold ids."""
    return {str(name): _renamed(str(name), value, new_id) for name, value in values.items()}


def with_size(config: PreTrainedConfig, size: int) -> PreTrainedConfig:
    """A copy of `config` with a vocabulary of `size` tokens."""
    config = copy.deepcopy(config)
    _set_sizes(config, size)
    return config


def check_model(model: PreTrainedModel) -> None:
    """Raise `ValueError` where an adapter stands on a model: its rows would be those of the whole vocabulary."""
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has an adapter, and a vocabulary is trimmed before an adapter is put on the "
            "model. Merge it first (`left-trainer merge`), or pass the model without it."
        )


def tables_of(model: PreTrainedModel) -> list[Table]:
    """The tensors of a model that its vocabulary sizes, each once: embeddings, output head, its bias and what is added.

    They are those that have another shape in the same class with a vocabulary of another size.

    Raises:
        ValueError: There are none, or one is not whole in this process.
    """
    other_size = 1 + max(_sizes(model.config), default=0)
    whole, other = (_shapes(type(model), config) for config in (model.config, with_size(model.config, other_size)))
    own = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    tables: dict[int, Table] = {}
    for name, shape in whole.items():
        if other.get(name, shape) == shape:
            continue
        differing = [dim for dim, (a, b) in enumerate(zip(shape, other[name], strict=True)) if a != b]
        if name not in own or tuple(own[name].shape) != tuple(shape) or len(differing) != 1:
            raise ValueError(
                f"{name} of {type(model).__name__} has no row for each token in this process, as it is quantized or "
                "spread over processes, or was resized. Load the model whole and unquantized"
            )
        tables.setdefault(id(own[name]), Table(name, own[name], differing[0]))
    if not tables:
        raise ValueError(f"no weight of {type(model).__name__} has the size of its vocabulary")
    return list(tables.values())


@torch.no_grad()
def keep_rows(model: PreTrainedModel, tables: Sequence[Table], kept: Sequence[int]) -> None:
    """Leave the tokens `kept` in the tables of `model`, in that order, and rename the ids that its configs name.

    Tensors are changed in place, so that what is tied stays tied.
    """
    new_ids = {number: place for place, number in enumerate(kept)}
    index = torch.tensor(kept)
    changed = {id(table.tensor) for table in tables}
    for table in tables:
        table.tensor.data = table.tensor.data.index_select(table.dim, index.to(table.tensor.device)).contiguous()
    for module in model.modules():
        if any(id(tensor) in changed for tensor in module._parameters.values()):
            _set_numbers(module, len(kept))
        if isinstance(vars(module).get("padding_idx"), int):
            module.padding_idx = new_ids.get(module.padding_idx, module.padding_idx)
        if isinstance(vars(module).get("vocab_size"), int):
            module.vocab_size = len(kept)
    configs = configs_of(model)
    rename_ids(lambda number: new_ids.get(number, number), *configs)
    for config in configs:
        if isinstance(config, PreTrainedConfig):
            _set_sizes(config, len(kept))


def check_positions(model: PreTrainedModel, tables: Sequence[Table], new_ids: Mapping[int, int]) -> None:
    """Raise `ValueError` where positions are counted from the id of the padding (M2M100, FSMT), and it would move."""
    changed = {id(table.tensor) for table in tables}
    for name, module in model.named_modules():
        is_table = any(id(tensor) in changed for tensor in module._parameters.values())
        number = vars(module).get("padding_idx")
        if is_table or isinstance(module, PreTrainedModel) or not isinstance(number, int):
            continue
        if new_ids.get(number, number) != number:
            raise ValueError(f"{name} counts positions from the id of the padding, which would be another")


def configs_of(model: PreTrainedModel) -> list[AnyConfig]:
    """The configs of a model and of the models inside of it, which may be copies, and how it generates."""
    inside = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    found = [getattr(module, name, None) for module in inside for name in ("config", "generation_config")]
    return [config for config in found if config is not None]


def _shapes(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        skeleton = model_class(copy.deepcopy(config))
    named = [*skeleton.named_parameters(remove_duplicate=False), *skeleton.named_buffers(remove_duplicate=False)]
    return {name: tensor.shape for name, tensor in named}


def _set_numbers(module: nn.Module, size: int) -> None:
    for name in ("num_embeddings", "out_features"):
        if hasattr(module, name):
            setattr(module, name, size)


def _with_inner(config: AnyConfig | None) -> Iterator[Any]:
    if config is None:
        return
    yield config
    for value in vars(config).values():
        if isinstance(value, AnyConfig):
            yield from _with_inner(value)


def _size_fields(config: PreTrainedConfig) -> Iterator[tuple[PreTrainedConfig, str]]:
    for inner in _with_inner(config):
        for name in {name for name in vars(inner) if SIZE_FIELD.fullmatch(name)} | {"vocab_size"}:
            if type(getattr(inner, name, None)) is int:
                yield inner, name


def _sizes(config: PreTrainedConfig) -> list[int]:
    return [getattr(inner, name) for inner, name in _size_fields(config)]


def _set_sizes(config: PreTrainedConfig, size: int) -> None:
    for inner, name in list(_size_fields(config)):
        setattr(inner, name, size)


def _renamed(name: str, value: Any, new_id: NewId) -> Any:
    """What a field called `name` holds, with new ids where it holds ids."""
    if name == FORCED_IDS and value:
        return [[position, _deep(number, new_id)] for position, number in value]
    if name == SEQUENCE_BIAS and value:
        pairs = [(_deep(ids, new_id), bias) for ids, bias in (value.items() if isinstance(value, dict) else value)]
        return dict(pairs) if isinstance(value, dict) else [list(pair) for pair in pairs]
    if isinstance(value, dict) and not ID_FIELD.fullmatch(name):
        return {key: _renamed(str(key), inner, new_id) for key, inner in value.items()}
    return _deep(value, new_id) if ID_FIELD.fullmatch(name) else value


def _deep(value: Any, new_id: NewId) -> Any:
    if isinstance(value, dict):
        return {key: _deep(inner, new_id) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_deep(inner, new_id) for inner in value)
    return new_id(value) if type(value) is int and value >= 0 else value
