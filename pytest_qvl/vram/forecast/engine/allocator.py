"""The arithmetic of torch's CUDA caching allocator, without a GPU.

``torch.cuda.memory_allocated`` is not the sum of tensor sizes: it counts *blocks*, rounded up to 512 bytes
and, when a cached block is reused, up to 1 MiB larger than what was asked. ``memory_reserved`` counts the
segments those blocks were cut from. Both follow from the order of allocations and frees, which is all this
simulation needs.

Source: ``c10/cuda/CUDACachingAllocator.cpp`` of PyTorch (one stream, no ``max_split_size_mb``, no power-of-two
rounding; by default no ``expandable_segments``).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from operator import attrgetter

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
# Of an expandable pool: more than any device has, and a multiple of both pages.
_ADDRESSES = 2**19 * LARGE_SEGMENT


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
        mapped: Whether memory stands behind its addresses; if not, it is neither handed out nor in the cache.
        pool: Keys of the free blocks of its kind of segments.
        key: Its own while it is free: in order of size, then of address.
        prev: Before it in its segment.
        next: Behind it.
    """

    __slots__ = ("address", "free", "key", "mapped", "next", "pool", "prev", "size")

    def __init__(self, address: int, size: int, pool: list[int], *, mapped: bool = True) -> None:
        self.address, self.size, self.pool, self.mapped = address, size, pool, mapped
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
        # Of large blocks: what is left of one is not cut off unless it is more.
        self._unsplit = SMALL_SIZE
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
            block = self._blocks.pop(pool.pop(self._chosen(pool, index)))
            block.free = False
        else:
            block = self._new_segment(rounded, pool)
        remaining = block.size - rounded
        if remaining and (small or remaining > self._unsplit):
            self._keep(_cut(block, rounded))
        self.allocated += block.size
        return block

    def free(self, block: Block) -> None:
        """Return a block to the cache, merged with its free neighbours."""
        self.allocated -= block.size
        self._cache(block)

    def _cache(self, block: Block) -> Block:
        """Put a block into the cache, merged with its free neighbours; returns what it is then."""
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
        return block

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

    def _chosen(self, pool: list[int], index: int) -> int:  # noqa: ARG002 - of any pool
        """Which of the free blocks is taken, of those that fit the one at ``index`` being the smallest."""
        return index

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


def _cut(block: Block, size: int) -> Block:
    """Make a block that long; returns the rest, which stands behind it and is neither in the cache nor handed out."""
    rest = Block(block.address + size, block.size - size, block.pool, mapped=block.mapped)
    rest.prev, rest.next = block, block.next
    if block.next is not None:
        block.next.prev = rest
    block.next, block.size = rest, size
    return rest


class _Pool(list[int]):
    """Keys of free blocks, as ever, and what is not mapped, in order of address."""

    def __init__(self, page: int, begins: int) -> None:
        super().__init__()
        self.page = page
        self.unmapped = [Block(begins, _ADDRESSES, self, mapped=False)]


class ExpandableAllocator(CachingAllocator):
    """The same with ``expandable_segments:True``: a pool is one range of addresses, mapped page by page.

    A page is 2 MiB for small blocks and 20 MiB for others. No rest of a block is too small to be cut off.

    Args:
        limit: Bytes the process may reserve; ``None`` for no limit. Pages are counted as they are mapped, as a card
            that is full does (``set_per_process_memory_fraction`` counts a whole segment in advance).
    """

    _small: _Pool
    _large: _Pool

    def __init__(self, limit: int | None = None) -> None:
        super().__init__(limit)
        self._unsplit = 0
        self._small, self._large = _Pool(SMALL_SEGMENT, 0), _Pool(LARGE_SEGMENT, _ADDRESSES)

    def empty_cache(self) -> None:
        """Unmap every page that is wholly free."""
        for pool in (self._small, self._large):
            for block in [self._blocks[key] for key in pool]:
                begin = -(-block.address // pool.page) * pool.page
                end = (block.address + block.size) // pool.page * pool.page
                if begin < end:
                    self._take(block)
                    self._unmap(block, begin, end, pool)

    def _chosen(self, pool: list[int], index: int) -> int:
        """Of neighbours in size the one that could grow least."""
        while index + 1 < len(pool) and self._grown(pool[index + 1]) < self._grown(pool[index]):
            index += 1
        return index

    def _grown(self, key: int) -> int:
        """What a free block would be with what is not mapped behind it."""
        block = self._blocks[key]
        return block.size + (block.next.size if block.next is not None and not block.next.mapped else 0)

    def _new_segment(self, rounded: int, pool: list[int]) -> Block:
        assert isinstance(pool, _Pool)
        if self.limit is not None and self.reserved + self._missing(rounded, pool) > self.limit:
            self.met_limit = True
            self.empty_cache()
            if self.reserved + self._missing(rounded, pool) > self.limit:
                raise CardFullError(rounded)
        block = self._room(rounded, pool)
        if not block.mapped:
            block = self._map(block, rounded, pool)
        while block.size < rounded:
            assert block.next is not None
            block = self._map(block.next, rounded - block.size, pool)
        self._take(block)
        return block

    def _room(self, rounded: int, pool: _Pool) -> Block:
        """The first of neighbours that are free or not mapped and have room together."""
        for unmapped in pool.unmapped:
            first = unmapped.prev if unmapped.prev is not None and unmapped.prev.free else unmapped
            room = 0
            block: Block | None = first
            while block is not None and room < rounded and (block.free or not block.mapped):
                room, block = room + block.size, block.next
            if room >= rounded:
                return first
        raise CardFullError(rounded)

    def _missing(self, rounded: int, pool: _Pool) -> int:
        """Bytes that would have to be mapped."""
        missing, block = 0, self._room(rounded, pool)
        while rounded > 0:
            if block.mapped:
                rounded -= block.size
            else:
                pages = min(-(-rounded // pool.page) * pool.page, block.size)
                missing, rounded = missing + pages, rounded - pages
            if rounded > 0:
                assert block.next is not None
                block = block.next
        return missing

    def _map(self, block: Block, size: int, pool: _Pool) -> Block:
        """Map the pages of the first ``size`` bytes of a block, or all; returns the free block that they are in."""
        pages = min(-(-size // pool.page) * pool.page, block.size)
        pool.unmapped.remove(block)
        if pages < block.size:
            insort(pool.unmapped, _cut(block, pages), key=attrgetter("address"))
        block.mapped = True
        self.reserved += pages
        return self._cache(block)

    def _unmap(self, block: Block, begin: int, end: int, pool: _Pool) -> None:
        """Unmap the pages from ``begin`` to ``end`` of a block that was taken out of the cache."""
        if end < block.address + block.size:
            self._keep(_cut(block, end - block.address))
        if block.address < begin:
            block, before = _cut(block, begin - block.address), block
            self._keep(before)
        block.mapped = False
        self.reserved -= block.size
        for neighbour in (block.prev, block.next):
            if neighbour is not None and not neighbour.mapped:
                pool.unmapped.remove(neighbour)
                block.address = min(block.address, neighbour.address)
                block.size += neighbour.size
                if neighbour is block.prev:
                    block.prev = neighbour.prev
                    if block.prev is not None:
                        block.prev.next = block
                else:
                    block.next = neighbour.next
                    if block.next is not None:
                        block.next.prev = block
        insort(pool.unmapped, block, key=attrgetter("address"))
