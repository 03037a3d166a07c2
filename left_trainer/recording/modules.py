"""Which module runs, in the forward and in the backward pass."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves

OUTSIDE = ("", "")


class ModuleTracker:
    """Follows the modules of a model by hooks on all modules, which leave those of single modules alone.

    In a forward pass, the module is the innermost one that runs. In a backward pass, it is the one whose result the
    gradient has reached last: nodes of the graph say when they are reached. Modules that run within a backward pass
    are recomputed ones.

    Args:
        model: Whose names are given; modules that do not belong to it go without a name.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._names: dict[int, tuple[str, str]] = {}
        self._stack: list[tuple[str, str]] = []
        self._in_backward = OUTSIDE
        if model is not None:
            self.add(model)

    def add(self, model: nn.Module) -> None:
        """Know the names of the modules of `model`."""
        for name, module in model.named_modules():
            self._names[id(module)] = (name, type(module).__name__)

    @property
    def current(self) -> tuple[str, str]:
        """Name and class of the module that runs."""
        return self._stack[-1] if self._stack else self._in_backward

    def leave_backward(self) -> None:
        """The backward pass has ended."""
        self._in_backward = OUTSIDE

    def __enter__(self) -> ModuleTracker:
        self._hooks = [
            register_module_forward_pre_hook(self._before),
            register_module_forward_hook(self._after, always_call=True),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._stack.clear()

    def _before(self, module: nn.Module, inputs: Any) -> None:
        outer = self.current
        self._stack.append(self._names.get(id(module), ("", type(module).__name__)))
        self._note(inputs, outer)

    def _after(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        inner = self._stack.pop() if self._stack else OUTSIDE
        self._note(outputs, inner)

    def _note(self, tensors: Any, module: tuple[str, str]) -> None:
        """When the gradient reaches these tensors, it is in `module`, unless a module noted there before says other."""
        for tensor in tree_leaves(tensors):
            node: Any = tensor.grad_fn if isinstance(tensor, torch.Tensor) else None
            if node is not None and "left_module" not in node.metadata:
                node.metadata["left_module"] = True
                node.register_prehook(lambda _, module=module: self._enter(module))

    def _enter(self, module: tuple[str, str]) -> None:
        self._in_backward = module
