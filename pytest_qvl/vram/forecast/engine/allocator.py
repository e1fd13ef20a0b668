"""The arithmetic of torch's CUDA caching allocator, without a GPU.

``torch.cuda.memory_allocated`` is not the sum of tensor sizes: it counts *blocks*, rounded up to 512 bytes
and, when a cached block is reused, up to 1 MiB larger than what was asked. ``memory_reserved`` counts the
segments those blocks were cut from. Both follow from the order of allocations and frees, which is all this
simulation needs.

Source: ``c10/cuda/CUDACachingAllocator.cpp`` of PyTorch (default settings: one stream, no
``expandable_segments``, no ``max_split_size_mb``, no power-of-two rounding).
"""

from __future__ import annotations

from bisect import bisect_left, insort

from pytest_qvl.vram.units import MiB

MIN_BLOCK = 512
SMALL_SIZE = 1 * MiB
SMALL_SEGMENT = 2 * MiB
LARGE_SEGMENT = 20 * MiB
MIN_OWN_SEGMENT = 10 * MiB
SEGMENT_ROUNDING = 2 * MiB


class CardFullError(Exception):
    """The simulated card is full even after every cached segment was given back.

    Attributes:
        requested: Bytes of the allocation that failed.
    """

    def __init__(self, requested: int) -> None:
        super().__init__(f"{requested} bytes do not fit")
        self.requested = requested


def round_size(size: int) -> int:
    """``size`` rounded up to whole 512-byte units, at least one."""
    return -(-size // MIN_BLOCK) * MIN_BLOCK or MIN_BLOCK


def segment_size(rounded: int) -> int:
    """Bytes requested from the driver when no cached block fits an allocation of ``rounded`` bytes."""
    if rounded <= SMALL_SIZE:
        return SMALL_SEGMENT
    if rounded < MIN_OWN_SEGMENT:
        return LARGE_SEGMENT
    return (rounded + SEGMENT_ROUNDING - 1) // SEGMENT_ROUNDING * SEGMENT_ROUNDING


class Block:
    """A piece of a segment, handed out or free; its size stays as it is while it is handed out."""

    __slots__ = ("address", "free", "next", "prev", "size", "small")

    def __init__(self, address: int, size: int, small: bool) -> None:
        self.address, self.size, self.small = address, size, small
        self.free = False
        self.prev: Block | None = None
        self.next: Block | None = None


class CachingAllocator:
    """One device's caching allocator.

    Args:
        limit: Bytes the process may reserve (what the card leaves after the CUDA context); ``None`` for no
            limit.

    Attributes:
        allocated: Bytes in blocks handed out (``torch.cuda.memory_allocated``).
        reserved: Bytes in segments held (``torch.cuda.memory_reserved``).
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.allocated = 0
        self.reserved = 0
        self._next_address = 0
        # (size, address, block) sorted: the allocator takes the smallest block that fits, the lowest address among
        # equals.
        self._free: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}

    def malloc(self, size: int) -> Block:
        """Allocate ``size`` bytes; returns the block, whose size is what ``memory_allocated`` counts for it.

        Raises:
            CardFullError: Above :attr:`limit`, even after giving cached segments back.
        """
        rounded = round_size(size)
        small = rounded <= SMALL_SIZE
        pool = self._free[small]
        index = bisect_left(pool, (rounded, -1))
        if index < len(pool):
            block = pool.pop(index)[2]
            block.free = False
        else:
            block = self._new_segment(rounded, small)
        remaining = block.size - rounded
        if remaining >= MIN_BLOCK if small else remaining > SMALL_SIZE:
            rest = Block(block.address + rounded, remaining, small)
            rest.prev, rest.next = block, block.next
            if block.next is not None:
                block.next.prev = rest
            block.next, block.size = rest, rounded
            self._insert_free(rest)
        self.allocated += block.size
        return block

    def free(self, block: Block) -> None:
        """Return a block to the cache, merged with its free neighbours."""
        self.allocated -= block.size
        before, after = block.prev, block.next
        if before is not None and before.free:
            self._remove_free(before)
            before.size += block.size
            before.next = after
            if after is not None:
                after.prev = before
            block = before
        if after is not None and after.free:
            self._remove_free(after)
            block.size += after.size
            block.next = after.next
            if after.next is not None:
                after.next.prev = block
        self._insert_free(block)

    def empty_cache(self) -> None:
        """Give every wholly free segment back to the driver (``torch.cuda.empty_cache``)."""
        for pool in self._free.values():
            kept = []
            for item in pool:
                block = item[2]
                if block.prev is None and block.next is None:
                    self.reserved -= block.size
                else:
                    kept.append(item)
            pool[:] = kept

    def _new_segment(self, rounded: int, small: bool) -> Block:
        size = segment_size(rounded)
        if self.limit is not None and self.reserved + size > self.limit:
            self.empty_cache()
            if self.reserved + size > self.limit:
                raise CardFullError(rounded)
        block = Block(self._next_address, size, small)
        # Segments never touch: blocks of different segments must not look adjacent.
        self._next_address += size + MIN_BLOCK
        self.reserved += size
        return block

    def _insert_free(self, block: Block) -> None:
        block.free = True
        insort(self._free[block.small], (block.size, block.address, block))

    def _remove_free(self, block: Block) -> None:
        block.free = False
        pool = self._free[block.small]
        del pool[bisect_left(pool, (block.size, block.address))]
