"""What torch's caching allocator takes from a GPU for the blocks of a recording, which is more than these need.

The allocator asks the driver for segments, cuts blocks from them, and keeps the segments for later. Sizes and the
choice of a block are those of torch's documentation and source (`CUDACachingAllocator` of version 2.11): blocks of up
to 1 MiB come from segments of 2 MiB, blocks of less than 10 MiB from segments of 20 MiB, and larger ones from segments
of their own size in steps of 2 MiB. The smallest free block that is large enough is taken, and cut where enough is
left.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

from left_trainer.recording.recorder import Block, Event, Recording

MIB = 2**20
STEP = 512  # bytes, of a block
SMALL_BLOCK, SMALL_SEGMENT = MIB, 2 * MIB
MIDDLE_BLOCK, MIDDLE_SEGMENT = 10 * MIB, 20 * MIB
LARGE_STEP = 2 * MIB


class _Piece:
    """A part of a segment, in use or free, between its neighbours."""

    __slots__ = ("after", "before", "is_free", "number", "size")

    def __init__(self, size: int, number: int, before: _Piece | None = None, after: _Piece | None = None) -> None:
        self.size, self.number, self.before, self.after, self.is_free = size, number, before, after, False

    @property
    def key(self) -> tuple[int, int]:
        """Smaller ones first, of equal ones the older."""
        return self.size, self.number


class CachingAllocator:
    """Segments, the blocks in them, and how much is held at most."""

    def __init__(self) -> None:
        self.held_bytes = self.most_held_bytes = 0
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # of small blocks, of others
        self._pieces: dict[int, _Piece] = {}
        self._count = 0

    def allocate(self, n_bytes: int) -> _Piece:
        """A block of at least `n_bytes`."""
        size = max(STEP, -(-n_bytes // STEP) * STEP)
        is_small = size <= SMALL_BLOCK
        free = self._free[is_small]
        place = bisect_left(free, (size, 0))
        piece = self._pieces[free.pop(place)[1]] if place < len(free) else self._segment(size, is_small)
        piece.is_free = False
        rest = piece.size - size
        if rest >= STEP if is_small else rest > SMALL_BLOCK:
            self._cut(piece, size, free)
        return piece

    def release(self, piece: _Piece) -> None:
        """Give a block back, joined with free neighbours."""
        free = self._free[self._is_small(piece)]
        for neighbour in (piece.before, piece.after):
            if neighbour is not None and neighbour.is_free:
                free.pop(bisect_left(free, neighbour.key))
                self._join(piece, neighbour)
        piece.is_free = True
        insort(free, piece.key)

    def empty_cache(self) -> None:
        """Give back segments in which nothing is in use, as `torch.cuda.empty_cache` does."""
        for is_small, free in self._free.items():
            kept = []
            for key in free:
                piece = self._pieces[key[1]]
                if piece.before is None and piece.after is None:
                    self.held_bytes -= piece.size
                    del self._pieces[piece.number]
                else:
                    kept.append(key)
            self._free[is_small] = kept

    def _segment(self, size: int, is_small: bool) -> _Piece:
        n_bytes = -(-size // LARGE_STEP) * LARGE_STEP
        if is_small:
            n_bytes = SMALL_SEGMENT
        elif size < MIDDLE_BLOCK:
            n_bytes = MIDDLE_SEGMENT
        self.held_bytes += n_bytes
        self.most_held_bytes = max(self.most_held_bytes, self.held_bytes)
        return self._made(n_bytes, None, None, is_small)

    def _made(self, size: int, before: _Piece | None, after: _Piece | None, is_small: bool) -> _Piece:
        self._count += 1
        number = 2 * self._count + is_small  # odd for small blocks
        piece = self._pieces[number] = _Piece(size, number, before, after)
        return piece

    @staticmethod
    def _is_small(piece: _Piece) -> bool:
        return bool(piece.number % 2)

    def _cut(self, piece: _Piece, size: int, free: list[tuple[int, int]]) -> None:
        rest = self._made(piece.size - size, piece, piece.after, self._is_small(piece))
        if piece.after is not None:
            piece.after.before = rest
        piece.after, piece.size = rest, size
        rest.is_free = True
        insort(free, rest.key)

    def _join(self, piece: _Piece, neighbour: _Piece) -> None:
        piece.size += neighbour.size
        if neighbour is piece.before:
            piece.before = neighbour.before
            if piece.before is not None:
                piece.before.after = piece
        else:
            piece.after = neighbour.after
            if piece.after is not None:
                piece.after.before = piece
        del self._pieces[neighbour.number]


def held_bytes(recording: Recording, kept: Iterable[int] = (), n_steps: int = 2) -> int:
    """The most that the allocator holds during the steps of a training, `torch.cuda.max_memory_reserved`.

    Args:
        recording: Of the loading of a model and of one step on it.
        kept: Sizes of blocks that the first step allocates beside its tensors and keeps, such as workspaces.
        n_steps: How often the step is repeated; what it leaves behind, the optimizer's state, is made in the first.
    """
    allocator = CachingAllocator()
    pieces: dict[int, _Piece] = {}
    events = recording.events
    start = next((index for index, event in enumerate(events) if event.phase != "loading"), len(events))
    _replay(events[:start], allocator, pieces, set())
    allocator.empty_cache()
    allocator.most_held_bytes = allocator.held_bytes
    for size in kept:
        allocator.allocate(size)
    ended = {id(event.block) for event in events if not event.is_allocation}
    for index in range(n_steps):
        # What has no end stays, and is there when the next step begins.
        skipped = {id(event.block) for event in events if id(event.block) not in ended} if index else set()
        _replay(events[start:], allocator, pieces, skipped)
    return allocator.most_held_bytes


def _replay(events: Iterable[Event], allocator: CachingAllocator, pieces: dict[int, _Piece], skipped: set[int]) -> None:
    for event in events:
        block: Block = event.block
        if id(block) in skipped:
            continue
        if event.is_allocation:
            pieces[id(block)] = allocator.allocate(block.n_bytes)
        elif id(block) in pieces:
            allocator.release(pieces.pop(id(block)))
