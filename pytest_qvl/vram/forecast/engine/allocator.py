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

# A free block's key is its size, and below that its address in units of 512 bytes: addresses are never used again, and
# those of a run are far less than 2 ** 45 bytes, so that a key is a small integer.
_SIZE_SHIFT = 36 - MIN_BLOCK.bit_length() + 1


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
    """A piece of a segment, handed out or free; its size stays as it is while it is handed out.

    Attributes:
        address: In bytes.
        size: In bytes.
        free: Whether it is in the cache.
        pool: Keys of the free blocks of its kind of segments.
        key: Its own while it is free: in order of size, then of address.
        prev: Before it in its segment.
        next: Behind it.
    """

    __slots__ = ("address", "free", "key", "next", "pool", "prev", "size")

    def __init__(self, address: int, size: int, pool: list[int]) -> None:
        self.address, self.size, self.pool = address, size, pool
        self.free = False
        self.key = -1
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
        met_limit: Whether the limit was met, and what could be given back was.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.allocated = 0
        self.reserved = 0
        self.met_limit = False
        self._next_address = 0
        # Keys of free blocks, sorted: the allocator takes the smallest that fits, the lowest address among equals.
        self._small: list[int] = []
        self._large: list[int] = []
        self._blocks: dict[int, Block] = {}

    def malloc(self, size: int) -> Block:
        """Allocate ``size`` bytes; returns the block, whose size is what ``memory_allocated`` counts for it.

        Raises:
            CardFullError: Above :attr:`limit`, even after giving cached segments back.
        """
        rounded = round_size(size)
        small = rounded <= SMALL_SIZE
        pool = self._small if small else self._large
        index = bisect_left(pool, rounded << _SIZE_SHIFT)
        if index < len(pool):
            block = self._blocks.pop(pool.pop(index))
            block.free = False
        else:
            block = self._new_segment(rounded, pool)
        remaining = block.size - rounded
        if remaining and (small or remaining > SMALL_SIZE):
            rest = Block(block.address + rounded, remaining, pool)
            rest.prev, rest.next = block, block.next
            if block.next is not None:
                block.next.prev = rest
            block.next, block.size = rest, rounded
            self._keep(rest)
        self.allocated += block.size
        return block

    def free(self, block: Block) -> None:
        """Return a block to the cache, merged with its free neighbours."""
        self.allocated -= block.size
        before, after = block.prev, block.next
        if before is not None and before.free:
            self._take(before)
            before.size += block.size
            before.next = after
            if after is not None:
                after.prev = before
            block = before
        if after is not None and after.free:
            self._take(after)
            block.size += after.size
            block.next = after.next
            if after.next is not None:
                after.next.prev = block
        self._keep(block)

    def empty_cache(self) -> None:
        """Give every wholly free segment back to the driver (``torch.cuda.empty_cache``)."""
        for pool in (self._small, self._large):
            kept = []
            for key in pool:
                block = self._blocks[key]
                if block.prev is None and block.next is None:
                    self.reserved -= block.size
                    del self._blocks[key]
                else:
                    kept.append(key)
            pool[:] = kept

    def _new_segment(self, rounded: int, pool: list[int]) -> Block:
        size = segment_size(rounded)
        if self.limit is not None and self.reserved + size > self.limit:
            self.met_limit = True
            self.empty_cache()
            if self.reserved + size > self.limit:
                raise CardFullError(rounded)
        block = Block(self._next_address, size, pool)
        # Segments never touch: blocks of different segments must not look adjacent.
        self._next_address += size + MIN_BLOCK
        self.reserved += size
        return block

    def _keep(self, block: Block) -> None:
        block.free = True
        block.key = key = block.size << _SIZE_SHIFT | block.address // MIN_BLOCK
        self._blocks[key] = block
        insort(block.pool, key)

    def _take(self, block: Block) -> None:
        pool, key = block.pool, block.key
        del pool[bisect_left(pool, key)], self._blocks[key]
        block.free = False
