"""Computing on the meta device, with the values of small integers, masks and counts known.

A batch consists of integers, and what a model decides by (masks, lengths, counts of target tokens) is computed from
them alone. Such tensors carry their values along as a tensor on the CPU, so that questions about them have the true
answer. Questions about anything else, such as the values of weights, get a stand-in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from left_trainer.recording.recorder import tensors_in

aten = torch.ops.aten
LARGEST_KNOWN = 2**24  # elements
LARGEST_KNOWN_FLOAT = 2**16
VALUES = "known_values"  # attribute of a tensor on the meta device
COUNT = "known_count"  # the same: how many elements are not zero, of a mask whose values are not known


def on_meta(values: torch.Tensor) -> torch.Tensor:
    """A tensor on the meta device with known values."""
    with torch._C.DisableTorchFunction():
        tensor = torch.empty_strided(values.size(), values.stride(), dtype=values.dtype, device="meta")
    return _know(tensor, values)


def values_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """Its values, where they are known."""
    return getattr(tensor, VALUES, None)


def stand_in(tensor: torch.Tensor) -> torch.Tensor:
    """Values on the CPU: the known ones; else noise in the place of weights and activations, and ones of integers."""
    values = values_of(tensor)
    if values is not None:
        return values
    with torch._C.DisableTorchFunction():
        if not tensor.dtype.is_floating_point:
            return torch.ones(tensor.shape, dtype=tensor.dtype, device="cpu")
        noise = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(0), device="cpu")
        return noise.to(tensor.dtype)


def compute(operator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Compute `operator` on the meta device, or answer for it."""
    args, kwargs = (
        tree_map_only(torch.Tensor, _to_meta, (args, dict(kwargs))) if _is_mixed(args, kwargs) else (args, kwargs)
    )
    tensors = tensors_in((args, kwargs))
    if tensors and not any(tensor.is_meta for tensor in tensors):
        return _of_the_host(operator, args, kwargs)
    answer = ANSWERS.get(operator._overloadpacket)
    if answer is not None:
        return answer(operator, args, kwargs, _known_result(operator, args, kwargs, tensors))
    result = operator(*args, **kwargs)
    is_small = all(tensor.numel() <= LARGEST_KNOWN for tensor in tensors_in(result))
    known = _known_result(operator, args, kwargs, tensors) if is_small else None
    _pass_on(operator, args, kwargs, tensors, result, known)
    return result


def _of_the_host(operator: Any, args: Any, kwargs: Any) -> Any:
    """On real tensors: computed as it is, but for a copy to the device, which then has known values."""
    device = kwargs.get("device")
    if device is not None and torch.device(device).type == "meta":
        return on_meta(operator(*args, **{**kwargs, "device": "cpu"}))
    return operator(*args, **kwargs)


def _is_mixed(args: Any, kwargs: Any) -> bool:
    """Whether tensors of the host, other than single numbers, meet those of the device."""
    tensors = tensors_in((args, kwargs))
    return any(tensor.is_meta for tensor in tensors) and any(not tensor.is_meta and tensor.dim() for tensor in tensors)


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_meta or not tensor.dim() else on_meta(tensor)


def _know(tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    limit = LARGEST_KNOWN_FLOAT if values.is_floating_point() else LARGEST_KNOWN
    if values.numel() <= limit:
        setattr(tensor, VALUES, values)
    return tensor


def _known_result(operator: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> Any:
    """The result of `operator` on known values; `None` where one of its tensors has none, or nothing is kept of it."""
    packet = operator._overloadpacket
    if packet in UNKNOWN or (operator._schema.is_mutable and packet not in FILLING):
        return None
    values = {id(tensor): values_of(tensor) if tensor.is_meta else tensor for tensor in tensors}
    if any(value is None for value in values.values()) or (not tensors and not _makes_known(operator, args, kwargs)):
        return None
    moved = {name: "cpu" if name == "device" and value is not None else value for name, value in kwargs.items()}
    real = tree_map_only(torch.Tensor, lambda tensor: values[id(tensor)], (args, moved))
    try:
        return operator(*real[0], **real[1])
    except (RuntimeError, IndexError):  # an operator that the CPU lacks, or a stand-in out of its range
        return None


def _makes_known(operator: Any, args: Any, kwargs: Any) -> bool:
    """Whether a factory makes integers, masks or a few numbers."""
    packet, dtype = operator._overloadpacket, kwargs.get("dtype")
    if packet is aten.arange:
        return dtype is None or not dtype.is_floating_point
    if packet not in FACTORIES:
        return False
    is_integer = isinstance(args[1], int) if packet is aten.full and dtype is None else dtype in INTEGERS
    if packet is aten.zeros and not is_integer:
        return False  # made to be filled in, through views that the values would not follow
    size = args[0] if isinstance(args[0], (list, tuple)) else ()
    return math.prod(size) <= (LARGEST_KNOWN if is_integer else LARGEST_KNOWN_FLOAT)


def _pass_on(operator: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor], result: Any, known: Any) -> None:
    """Let results carry their values; tensors that were changed in another way lose them."""
    count = _count(operator._overloadpacket, args)
    if count is not None and isinstance(result, torch.Tensor):
        setattr(result, COUNT, count)
    if operator._schema.is_mutable:
        for index, argument in enumerate(operator._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[index] if index < len(args) else kwargs.get(argument.name)
                for leaf in tree_leaves(value):
                    if known is None and hasattr(leaf, VALUES):
                        delattr(leaf, VALUES)
        return
    if known is not None:
        for made, values in zip(tree_leaves(result), tree_leaves(known), strict=False):
            if isinstance(made, torch.Tensor) and isinstance(values, torch.Tensor) and made.shape == values.shape:
                _know(made, values)


def _count(packet: Any, args: Any) -> int | None:
    """How many elements of a result are not zero, where it is a mask into which positions were scattered."""
    if packet in ZEROS:
        return 0
    before = getattr(args[0], COUNT, None) if args else None
    if before is None or packet not in (*RESHAPING, *SCATTERING):
        return None
    return min(args[0].numel(), before + args[2].numel()) if packet in SCATTERING else before


# Answers to what the meta device refuses


def _shaped_by_values(operator: Any, args: Any, kwargs: Any, known: Any) -> Any:
    """For results whose size depends on values: of the true size where they are known, else of the largest."""
    if known is None:
        known = operator(*tree_map_only(torch.Tensor, stand_in, args), **kwargs)
    return tree_map_only(torch.Tensor, on_meta, known)


def _item(operator: Any, args: Any, kwargs: Any, known: Any) -> Any:
    if known is not None:
        return known
    dtype = args[0].dtype
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


def _nonzero(operator: Any, args: Any, kwargs: Any, known: Any) -> torch.Tensor:
    tensor = args[0]
    if known is not None:
        return on_meta(known)
    count = getattr(tensor, COUNT, tensor.numel())
    return torch.empty(count, tensor.dim(), dtype=torch.int64, device="meta")


def _with_positions(operator: Any, args: Any, kwargs: Any, known: Any) -> Any:
    """Masks among the indices become positions, as on a device."""
    if known is not None and not operator._schema.is_mutable:
        return on_meta(known)
    indices: list[Any] = []
    for index in args[1]:
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            indices.append(index)
            continue
        values = values_of(index)
        count = index.numel() if values is None else int(values.count_nonzero())
        indices += [torch.empty(count, dtype=torch.int64, device="meta") for _ in range(index.dim())]
    return operator(args[0], indices, *args[2:], **kwargs)


def _masked_select(operator: Any, args: Any, kwargs: Any, known: Any) -> torch.Tensor:
    tensor, mask = args
    values = values_of(mask)
    count = mask.numel() if values is None else int(values.count_nonzero())
    return tensor.new_empty(count)


def _copy_out(operator: Any, args: Any, kwargs: Any, known: Any) -> Any:
    """A copy from the device to the host is of real values, or of their stand-in."""
    device = kwargs.get("device")
    if device is None or torch.device(device).type == "meta" or not args[0].is_meta:
        result = operator(*args, **kwargs)
        _pass_on(operator, args, kwargs, [args[0]], result, known)
        return result
    return operator(stand_in(args[0]), *args[1:], **kwargs)


def _copy_in_place(operator: Any, args: Any, kwargs: Any, known: Any) -> Any:
    """`copy_` from either side to either side."""
    target, source = args[0], args[1]
    if target.is_meta:
        result = operator(target, source if source.is_meta else torch.empty_like(source, device="meta"), *args[2:])
        if hasattr(target, VALUES):
            delattr(target, VALUES)
        return result
    return operator(target, stand_in(source), *args[2:])


def _all_or_any(operator: Any, args: Any, kwargs: Any, known: Any) -> torch.Tensor:
    """Of what is not known, all are as asked; of what one looks for, such as numbers to draw again, there is none."""
    result = operator(*args, **kwargs)
    if known is None:
        known = torch.full(result.shape, operator._overloadpacket is aten.all, device="cpu")
    return _know(result, known)


def _coalesce(operator: Any, args: Any, kwargs: Any, known: Any) -> torch.Tensor:
    """Positions of sparse weights are different ones already."""
    return args[0]._coalesced_(True)


def _sparse_times_dense(operator: Any, args: Any, kwargs: Any, known: Any) -> torch.Tensor:
    """A product with a sparse matrix, `mm` or `addmm`, is dense."""
    left, right = args[-2:] if operator._overloadpacket in (aten.mm, aten._sparse_mm) else args[1:3]
    if left.layout == right.layout == torch.strided:
        result: torch.Tensor = operator(*args, **kwargs)
        return result
    return torch.empty(left.shape[0], right.shape[1], dtype=left.dtype, device="meta")


def _sparse_mask(operator: Any, args: Any, kwargs: Any, known: Any) -> torch.Tensor:
    """The elements of a dense tensor at the positions of a sparse one."""
    dense, mask = args[:2]
    values = torch.empty_like(mask._values(), dtype=dense.dtype)
    return torch.sparse_coo_tensor(mask._indices(), values, mask.shape, check_invariants=False)._coalesced_(True)


def _add_sparse(operator: Any, args: Any, kwargs: Any, known: Any) -> torch.Tensor:
    """`add`, also of sparse weights to dense ones."""
    if isinstance(args[1], torch.Tensor) and args[1].layout != torch.strided:
        dense: torch.Tensor = args[0]
        return dense if operator._schema.is_mutable else torch.empty_like(dense)
    result: torch.Tensor = operator(*args, **kwargs)
    _pass_on(operator, args, kwargs, tensors_in(args), result, known)
    return result


def _to_dense(operator: Any, args: Any, kwargs: Any, known: Any) -> torch.Tensor:
    """A sparse matrix with its zeros."""
    if args[0].layout == torch.strided:
        result: torch.Tensor = operator(*args, **kwargs)
        return result
    return torch.empty(args[0].shape, dtype=args[0].dtype, device="meta")


def _yes(operator: Any, args: Any, kwargs: Any, known: Any) -> bool:
    return True if known is None else known


ANSWERS: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense: _item,
    aten.nonzero: _nonzero,
    aten.index: _with_positions,
    aten.index_put: _with_positions,
    aten.index_put_: _with_positions,
    aten._index_put_impl_: _with_positions,
    aten.masked_select: _masked_select,
    aten.bincount: _shaped_by_values,
    aten._unique2: _shaped_by_values,
    aten.unique_consecutive: _shaped_by_values,
    aten.unique_dim: _shaped_by_values,
    aten.repeat_interleave: _shaped_by_values,
    aten.all: _all_or_any,
    aten.any: _all_or_any,
    aten._coalesce: _coalesce,
    aten.add: _add_sparse,
    aten.add_: _add_sparse,
    aten._to_dense: _to_dense,
    aten._sparse_addmm: _sparse_times_dense,
    aten.addmm: _sparse_times_dense,
    aten.mm: _sparse_times_dense,
    aten._sparse_mm: _sparse_times_dense,
    aten.sparse_mask: _sparse_mask,
    aten.is_nonzero: _yes,
    aten.equal: _yes,
    aten.allclose: _yes,
    aten._to_copy: _copy_out,
    aten.copy_: _copy_in_place,
}
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FACTORIES = frozenset((aten.full, aten.ones, aten.zeros, aten.scalar_tensor))
ZEROS = frozenset((aten.zeros, aten.zeros_like, aten.new_zeros))
RESHAPING = frozenset(
    (aten.view, aten._unsafe_view, aten._to_copy, aten.clone, aten.unsqueeze, aten.t, aten.transpose, aten.eq)
)
SCATTERING = (aten.scatter, aten.scatter_)
# In-place operators that keep known values right when they are repeated on them.
FILLING = frozenset((aten.masked_fill_, aten.fill_, aten.zero_, aten.add_, aten.sub_, aten.mul_, aten.clamp_))
# Whose values nobody may rely on.
UNKNOWN = frozenset((aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided))
