"""Give modules of a model another forward pass, and take it away again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Self, TypeAlias, TypeVar

import torch
from torch import nn

from left_trainer.kernels.fast_paths import FastPath, note_in_graph
from left_trainer.models.wrapping import class_without_sharding

# For a module and its own class: the class to take its place, or why there is none; `None` for other modules.
FusedClass: TypeAlias = Callable[[nn.Module, type[nn.Module]], type[nn.Module] | str | None]

Computes = TypeVar("Computes")


class Fused:
    """Base of what takes the place of a module's class, after that class itself.

    A copy is fused as well. What is pickled, as `torch.save(model)` does, has its own class and needs none of this.
    """

    fast_path: FastPath

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self)] = twin = _new(type(self), {})
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = {name: value for name, value in vars(self).items() if name != "fast_path"}
        # A later protocol takes nothing but the class that the pickled object has.
        return _new(plain_class(self), state).__reduce_ex__(1)  # type: ignore[no-any-return]


def _new(kind: type[Any], state: dict[str, Any]) -> Any:
    module: Any = object.__new__(kind)
    vars(module).update(state)
    return module


def use_fused_modules(model: nn.Module, fused_class: FusedClass, switch: str, use: bool) -> FastPath:
    """Put fused forward passes into the modules of `model` that have one, or take them out.

    Only the class of a module changes, to one that extends it: its weights, their names in a state dict, and what other
    code does with it stay. `plain_class` finds the class that it had.

    Args:
        model: Changed in place.
        fused_class: What takes the place of a module's class.
        switch: The training argument, for the report.
        use: `False` to take them out.

    Returns:
        What counts the calls of the changed modules. One that stays as it is, is counted once, here.
    """
    path = FastPath()
    for module in model.modules():
        plain = plain_class(module)
        fused = fused_class(module, plain)
        if fused is None:
            continue
        is_fused = use and not isinstance(fused, str)
        if not is_fused:
            path.record(fused if isinstance(fused, str) else f"{switch}=False")
        changed: Any = module
        changed.__class__ = fused if is_fused else plain
        changed.fast_path = path if is_fused else None
    return path


def plain_class(module: Any) -> type[Any]:
    """The class that a module has without its fused forward pass."""
    is_fused = isinstance(getattr(module, "fast_path", None), FastPath)
    return class_without_sharding(module).__mro__[1] if is_fused else type(module)


def has_torch_hooks(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class says. Not a loop: it is asked at every call of a layer."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def fused_version(plain: type[Any], name: str, compute: Callable[[Any, torch.Tensor], torch.Tensor]) -> type[Any]:
    """The class `plain`, whose forward pass is `compute` where something is kept for a backward pass.

    A compiler fuses the plain one by itself, which the fast path `name` notes.
    """

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            note_in_graph(name, "the compiler fuses it")
        elif torch.is_grad_enabled():
            return compute(self, hidden_states)
        return plain_class(self).forward(self, hidden_states)  # type: ignore[no-any-return]

    return type(f"Fused{plain.__name__}", (plain, Fused), {"forward": forward, "__doc__": plain.__doc__})


def of_same_code(plain: type[Any], known: Mapping[type[Any], Computes], *methods: str) -> Computes | None:
    """The value in `known` of a class that has the code of `plain` in each of `methods`; `None` where none has.

    Models copy layers of others under names of their own.
    """
    return next(
        (
            value
            for kind, value in known.items()
            if all(_code(plain, method) == _code(kind, method) for method in methods)
        ),
        None,
    )


def _code(kind: type[nn.Module], name: str) -> tuple[Any, ...] | None:
    code = getattr(getattr(kind, name, None), "__code__", None)
    return code and (code.co_code, code.co_consts[1:], code.co_names, code.co_varnames)
