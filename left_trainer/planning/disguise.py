"""Let tensors on the meta device pass for tensors on another one, and choose the kernels that it would run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from transformers import modeling_utils

from left_trainer.planning.autocast_lists import LOWER_PRECISION, PROMOTED, SINGLE_PRECISION
from left_trainer.planning.device_kernels import REPLACED
from left_trainer.planning.known_values import on_meta, stand_in, values_of

META = torch.device("meta")


class Disguise(TorchFunctionMode):
    """Inside, meta tensors say that they are on `device`, and what is asked for on `device` is made on meta.

    Code that looks at the device before it chooses a way (fast paths, fused optimizers, attention, dropout) then
    chooses as it would there. Autocast, which knows no meta tensors, is done here by the lists of its documentation
    (https://docs.pytorch.org/docs/stable/amp.html).

    Args:
        device: `cuda`, `cpu`, ...; where none is named, tensors of integers made of lists are on the CPU as always.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self._casts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        answer = DISGUISED.get(func)
        if answer is not None:
            return answer(self, func, args, kwargs)
        if func is torch.Tensor.cpu and _is_meta(args[0]) and values_of(args[0]) is None:
            return self._offloaded(args[0])
        if func in HOST_COPIES:
            return func(stand_in(args[0]), *args[1:], **kwargs) if _is_meta(args[0]) else func(*args, **kwargs)
        if func in FROM_VALUES:
            return self._made_of_values(func, args, kwargs)
        args, kwargs = self._moved(args), self._moved(kwargs)
        if self.device.type == "cpu" and func in FACTORIES and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": META}
        if torch.is_autocast_enabled(self.device.type):
            args, kwargs = self._autocast(func, args, kwargs)
        replacement = REPLACED.get(func)
        return replacement(self.device, *args, **kwargs) if replacement else func(*args, **kwargs)

    def inside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, run in the disguise wherever it is called."""

        def disguised_function(*args: Any, **kwargs: Any) -> Any:
            if torch._C._len_torch_function_stack():
                return function(*args, **kwargs)
            try:
                with self:
                    return function(*args, **kwargs)
            finally:  # a recomputation ends by an error of torch's as soon as it has what it needs
                self._casts.clear()  # as autocast does when it is left

        return disguised_function

    def _moved(self, arguments: Any) -> Any:
        """The disguise's device replaced by meta, given as a device or by name."""

        def moved(value: Any) -> Any:
            if isinstance(value, torch.device):
                return META if value.type == self.device.type else value
            if isinstance(value, str) and value.partition(":")[0] == self.device.type:
                return META
            return value

        if isinstance(arguments, dict):
            return {name: moved(value) if name == "device" else value for name, value in arguments.items()}
        return (
            tuple(map(moved, arguments))
            if any(isinstance(each, (torch.device, str)) for each in arguments)
            else arguments
        )

    def _offloaded(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the host, such as FRoD makes of base weights: a shape that takes no room on the device."""
        if self.device.type == "cpu":
            return tensor
        with torch._C.DisableTorchFunction():
            return tensor.new_empty(1).expand(tensor.shape)

    def _made_of_values(self, func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        """`torch.tensor([...])`: its values are known, wherever it is made."""
        device = kwargs.pop("device", None)
        if args and _is_meta(args[0]):
            return args[0] if kwargs.get("dtype") in (None, args[0].dtype) else args[0].to(kwargs["dtype"])
        made: torch.Tensor = func(*args, **kwargs, device="cpu")
        is_here = self.device.type == ("cpu" if device is None else torch.device(device).type)
        return on_meta(made) if is_here else made

    # Autocast

    @contextlib.contextmanager
    def autocast(self, dtype: torch.dtype | None) -> Iterator[None]:
        """As `torch.autocast` on the disguise's device; `None` for none."""
        if dtype is None:
            yield
            return
        with torch.autocast(self.device.type, dtype):
            yield
        self._casts.clear()

    def _autocast(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(func, "__name__", "")
        if name in LOWER_PRECISION:
            return tree_map_only(torch.Tensor, self._lower, (args, kwargs))
        single = SINGLE_PRECISION.get(self.device.type, SINGLE_PRECISION["cuda"])
        if name in single and kwargs.get("dtype") is None:
            return tree_map_only(torch.Tensor, _single, (args, kwargs))
        if name in PROMOTED:
            return _promoted(args, kwargs)
        return args, kwargs

    def _lower(self, tensor: torch.Tensor) -> torch.Tensor:
        """In autocast's dtype; casts of trained weights are kept for the rest of the forward pass, as autocast does."""
        dtype = torch.get_autocast_dtype(self.device.type)
        if not tensor.is_floating_point() or tensor.dtype in (dtype, torch.float64) or not _is_meta(tensor):
            return tensor
        is_kept = tensor.dtype == torch.float32 and tensor.requires_grad and tensor.is_leaf and tensor._base is None
        if not is_kept or not torch.is_autocast_cache_enabled():
            return tensor.to(dtype)
        if id(tensor) not in self._casts:
            self._casts[id(tensor)] = (tensor, tensor.to(dtype))
        return self._casts[id(tensor)][1]


@contextlib.contextmanager
def disguised(device: torch.device) -> Iterator[Disguise]:
    """Inside, meta passes for `device`, also where this machine lacks it."""
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            # Else torch.autocast("cuda") turns itself off on a machine without a GPU.
            stack.enter_context(patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False))
            stack.enter_context(patch("torch.cuda.is_bf16_supported", return_value=True))
            stack.enter_context(patch("torch.cuda.synchronize"))
            stack.enter_context(patch("left_trainer.kernels.cross_entropy_rows.has_triton", return_value=True))
        disguise = Disguise(device)
        # The engine turns function modes off for the Python code that it runs: backward passes and recomputation.
        node = torch.autograd.function.BackwardCFunction
        stack.enter_context(patch.object(node, "apply", disguise.inside(node.apply)))
        stack.enter_context(patch.object(modeling_utils, "checkpoint", _checkpoint(disguise)))
        yield stack.enter_context(disguise)


def _checkpoint(disguise: Disguise) -> Callable[..., Any]:
    """torch's, recomputing in the disguise. It would compare devices of before and after, seen with and without it."""
    plain = modeling_utils.checkpoint

    def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("use_reentrant") is False:
            kwargs["determinism_check"] = "none"
        return plain(disguise.inside(function), *args, **kwargs)

    return checkpoint


def _is_meta(tensor: Any) -> bool:
    with torch._C.DisableTorchFunction():
        return isinstance(tensor, torch.Tensor) and tensor.is_meta


def _single(tensor: torch.Tensor) -> torch.Tensor:
    is_low = tensor.dtype in (torch.bfloat16, torch.float16)
    return tensor.float() if is_low else tensor


def _promoted(args: Any, kwargs: Any) -> Any:
    found: list[torch.dtype] = []
    tree_map_only(torch.Tensor, lambda tensor: found.append(tensor.dtype), (args, kwargs))
    if torch.float32 not in found:
        return args, kwargs
    return tree_map_only(torch.Tensor, _single, (args, kwargs))


# What code asks about a tensor


def _ask(truth: Callable[[Disguise], Any]) -> Callable[..., Any]:
    def answer(disguise: Disguise, func: Any, args: Any, kwargs: Any) -> Any:
        return truth(disguise) if _is_meta(args[0]) else func(*args, **kwargs)

    return answer


DISGUISED: dict[Any, Callable[..., Any]] = {
    torch.Tensor.device.__get__: _ask(lambda disguise: disguise.device),  # type: ignore[attr-defined]
    torch.Tensor.is_meta.__get__: _ask(lambda disguise: False),  # type: ignore[attr-defined]
    torch.Tensor.is_cuda.__get__: _ask(lambda disguise: disguise.device.type == "cuda"),  # type: ignore[attr-defined]
    torch.Tensor.is_cpu.__get__: _ask(lambda disguise: disguise.device.type == "cpu"),  # type: ignore[attr-defined]
}
HOST_COPIES = frozenset((torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__))
FROM_VALUES = frozenset((torch.tensor, torch.as_tensor))
FACTORIES = frozenset(
    (
        torch.arange,
        torch.empty,
        torch.eye,
        torch.full,
        torch.linspace,
        torch.ones,
        torch.rand,
        torch.randint,
        torch.randn,
        torch.randperm,
        torch.zeros,
    )
)
