"""Watch the storages and the operations of a training step, on any device, with data or without.

`StepRecorder` sees what torch's dispatcher sees, below autograd: each operation with the tensors that it reads and
writes, each storage when it is allocated and when the last reference to it goes, autograd's own included. On the meta
device nothing is computed and everything else is the same, which is what plans are made of; on real tensors the same
recorder measures what a plan is held against.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from left_trainer.recording.modules import ModuleTracker
from left_trainer.recording.storage_bytes import RoundingRule, as_requested

Phase = Literal["loading", "forward", "backward", "optimizer", "evaluation", "saving"]
Part = Literal[
    "frozen weights",
    "trained weights",
    "gradients",
    "optimizer state",
    "activations",
    "logits and loss",
    "inputs",
    "temporaries",
]


@dataclass(frozen=True, slots=True)
class TensorShape:
    """A tensor that an operation reads or writes.

    Args:
        shape: Sizes.
        dtype: Of its elements.
        n_bytes: That memory traffic counts: an expanded tensor is as large as what it is expanded from.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Operation:
    """One kernel launch, as far as the dispatcher tells: views, allocations and bookkeeping are left out.

    Args:
        name: Of torch's operator, `aten.addmm.default`.
        phase: Of the step.
        module: Name, in the model, of the module whose forward or backward pass it belongs to; empty outside of them.
        module_type: The module's class.
        inputs: Tensors that it reads, in order.
        outputs: Tensors that it makes, or changes in place.
        flops: Of matrix products, convolutions and attention, two for each multiplication with its addition; 0 for
            the rest, which the bandwidth bounds.
        is_synchronous: Whether the host waits for its result, as `item()` does.
    """

    name: str
    phase: Phase
    module: str
    module_type: str
    inputs: tuple[TensorShape, ...]
    outputs: tuple[TensorShape, ...]
    flops: int = 0
    is_synchronous: bool = False

    @property
    def read_bytes(self) -> int:
        return sum(tensor.n_bytes for tensor in self.inputs)

    @property
    def written_bytes(self) -> int:
        return sum(tensor.n_bytes for tensor in self.outputs)


@dataclass(slots=True, eq=False)
class Block:
    """A storage, from its allocation to its end.

    Args:
        n_bytes: As the allocator rounds it.
        phase: In which it was allocated.
        module: That allocated it.
        module_type: The module's class.
        shape: Of the tensor that it was allocated for.
        dtype: The same.
        part: Where that is known; otherwise it follows from phase and lifetime.
        outlived_forward: Whether it was alive when the forward pass that made it had ended.
    """

    n_bytes: int
    phase: Phase
    module: str
    module_type: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    part: Part | None = None
    outlived_forward: bool = False


@dataclass(frozen=True, slots=True)
class Event:
    """An allocation (`is_allocation`) or the end of a block, before operation number `operation` had finished."""

    block: Block
    is_allocation: bool
    phase: Phase
    operation: int


# Makes the results of an operation: an operator, its arguments and keyword arguments.
Compute = Callable[[Any, tuple[Any, ...], Mapping[str, Any]], Any]


@dataclass
class Recording:
    """What a recorder saw.

    Args:
        operations: In the order of their launch.
        events: Allocations and ends, in order.
        marks: Names of moments, with the number of events before them.
    """

    operations: list[Operation] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    marks: list[tuple[str, int]] = field(default_factory=list)


class StepRecorder(TorchDispatchMode):
    """Record storages and operations while it is entered.

    Args:
        device_type: Tensors on other devices are not counted, `meta` for a plan.
        rounding: How the allocator rounds the size of a block.
        compute: Computes an operation; by default the operator itself.
        tracker: Knows which module runs.
    """

    def __init__(
        self,
        device_type: str = "meta",
        rounding: RoundingRule = as_requested,
        compute: Compute | None = None,
        tracker: ModuleTracker | None = None,
    ) -> None:
        super().__init__()
        self.device_type, self.rounding = device_type, rounding
        self.compute = compute or (lambda operator, args, kwargs: operator(*args, **kwargs))
        self.tracker = tracker or ModuleTracker()
        self.recording = Recording()
        self.phase: Phase = "loading"
        self._blocks: dict[int, Block] = {}
        self._sum: tuple[Block | None, int, int] = (None, 0, 0)
        self._watchers: dict[int, weakref.ref[Any]] = {}

    # Phases and parts

    def begin(self, phase: Phase) -> None:
        """What follows belongs to `phase`. What a forward pass has made and left is what it has saved."""
        if self.phase == "forward" and phase != "forward":
            for block in self._blocks.values():
                block.outlived_forward |= block.phase == "forward"
        self.phase = phase

    def mark(self, name: str) -> None:
        """Name the present moment."""
        self.recording.marks.append((name, len(self.recording.events)))

    def label(self, tensors: Iterable[torch.Tensor | None], part: Part) -> None:
        """Say what `tensors` are; those that were there before the recorder are counted from now on."""
        with torch._C.DisableTorchFunction():
            for tensor in tensors:
                for each in [] if tensor is None else stored(tensor):
                    block = self._watch(each)
                    if block is not None:
                        block.part = part

    def label_kept(self, part: Part) -> None:
        """Say that what the present phase has allocated and kept is `part`, unless it is known already."""
        for block in self._blocks.values():
            if block.phase == self.phase and block.part is None:
                block.part = part

    def label_model(self, model: nn.Module) -> None:
        """Weights, trained and frozen, buffers and gradients of `model`."""
        for parameter in model.parameters():
            self.label(plain_tensors(parameter), "trained weights" if parameter.requires_grad else "frozen weights")
            self.label([parameter.grad], "gradients")
        self.label(model.buffers(), "frozen weights")

    @property
    def live_bytes(self) -> int:
        return sum(block.n_bytes for block in self._blocks.values())

    # Operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self._record(func, args, kwargs or {})

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        result = self.compute(func, args, kwargs)
        made, given = _tensors(result), _tensors((args, kwargs))
        if func is SUM and self.phase == "backward":
            self._sum = (self._watch(given[0]), len(self.recording.events), len(self.recording.operations) + 1)
        for tensor in made:
            self._watch(tensor)
        operation = self._operation(func, args, kwargs, given, made, result)
        if operation is not None:
            self.recording.operations.append(operation)
        return result

    def _operation(
        self, func: Any, args: Any, kwargs: Any, given: list[torch.Tensor], made: list[torch.Tensor], result: Any
    ) -> Operation | None:
        """The record of a launch; `None` for what launches nothing."""
        if not any(tensor.device.type == self.device_type for tensor in (*given, *made)):
            return None
        packet = func._overloadpacket
        written = _mutated(func, args, kwargs)
        if not written:
            storages = {tensor.untyped_storage()._cdata for tensor in given}
            written = [tensor for tensor in made if tensor.untyped_storage()._cdata not in storages]
            if packet in WITHOUT_KERNEL or (made and not written):
                return None
        module, module_type = self.tracker.current
        return Operation(
            str(func),
            self.phase,
            module,
            module_type,
            tuple(map(_shape, given)),
            tuple(map(_shape, written)),
            _flops(packet, args, kwargs, result),
            packet in SYNCHRONOUS,
        )

    # Storages

    def _watch(self, tensor: torch.Tensor) -> Block | None:
        """The block of a tensor's storage; `None` where it has none or is elsewhere."""
        if tensor.device.type != self.device_type:
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        block = self._blocks.get(key)
        if block is not None:
            return block
        n_bytes = self.rounding(storage.nbytes())
        block = Block(n_bytes, self.phase, *self.tracker.current, tuple(tensor.shape), tensor.dtype)
        self._blocks[key] = block
        self._event(block, True)
        self._watchers[key] = weakref.ref(storage, lambda _: self._end(key))
        return block

    def _end(self, key: int) -> None:
        block = self._blocks.pop(key, None)
        self._watchers.pop(key, None)
        if block is not None and not self._end_of_sum(block):
            self._event(block, False)

    def _end_of_sum(self, block: Block) -> bool:
        """Let the first of two gradients that were added end before their sum is allocated, where the sum outlives it.

        The engine adds gradients in place, but not under a dispatch mode, such as this recorder (torch 2.11).
        """
        summand, index, operation = self._sum
        if block is not summand or operation != len(self.recording.operations) or not block.n_bytes:
            return False
        before = self.recording.events[index] if index < len(self.recording.events) else None
        if before is None:
            return False
        self.recording.events.insert(index, Event(block, False, before.phase, before.operation))
        self._sum = (None, 0, 0)
        return True

    def _event(self, block: Block, is_allocation: bool) -> None:
        if block.n_bytes:
            recording = self.recording
            recording.events.append(Event(block, is_allocation, self.phase, len(recording.operations)))


aten = torch.ops.aten
SUM = aten.add.Tensor
SYNCHRONOUS = frozenset((aten._local_scalar_dense, aten.nonzero, aten.is_nonzero, aten.equal))
WITHOUT_KERNEL = frozenset((aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided))


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """The tensors in the arguments or the result of an operator; torch's `tree_leaves` takes ten times as long."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        return []
    return [tensor for part in tree if part is not None for tensor in tensors_in(part)]


def stored(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What has a storage: the tensor itself, or positions and values of a sparse one."""
    if tensor.layout == torch.strided:
        return [tensor]
    return [tensor._indices(), tensor._values()] if tensor.layout == torch.sparse_coo else []


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [each for tensor in tensors_in(tree) for each in stored(tensor)]


def plain_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensor, and those that a quantized weight carries beside its packed elements."""
    state = getattr(tensor, "quant_state", None)
    nested = getattr(state, "state2", None)
    states = [part for part in (state, nested) if part is not None]
    carried = [getattr(part, name, None) for part in states for name in ("absmax", "code", "offset")]
    return [tensor, *(each for each in carried if isinstance(each, torch.Tensor))]


def _mutated(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Arguments that the operator writes to."""
    if not func._schema.is_mutable:
        return []
    found = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found += _tensors(value)
    return found


def _shape(tensor: torch.Tensor) -> TensorShape:
    n_elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        n_elements *= size if stride else min(size, 1)
    return TensorShape(tuple(tensor.shape), tensor.dtype, n_elements * tensor.dtype.itemsize)


def _flops(packet: Any, args: Any, kwargs: Any, result: Any) -> int:
    counter = flop_registry.get(packet) or flop_registry.get(IN_PLACE.get(packet))
    if counter is None:
        return 0
    return int(counter(*args, **{name: value for name, value in kwargs.items() if name != "out"}, out_val=result))


IN_PLACE = {aten.addmm_: aten.addmm, aten.baddbmm_: aten.baddbmm}
