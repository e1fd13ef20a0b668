"""Digests of tensors: to see that a gigabyte is bitwise what it was without keeping a second gigabyte."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING

from pytest_qvl.models.fingerprint.cuda import PointerTable, usable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import torch

WORD_BYTES = 8
CHUNK_BYTES = 8 * 2**20
CHUNK_WORDS = CHUNK_BYTES // WORD_BYTES
_MASK = 2**64 - 1
# Odd constants of the SplitMix64 generator (Steele, Lea, Flood, "Fast splittable pseudorandom number
# generators", OOPSLA 2014): the golden-ratio step between positions, and the two multipliers of the
# finalizer.
_STEP = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def digests(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
    """A 64-bit digest of each tensor's dtype, shape and bits, by name; see :meth:`Fingerprint.read`."""
    return Fingerprint().read(named_tensors)


def differences(before: dict[str, int], now: dict[str, int]) -> list[str]:
    """Names whose digests are not equal, or that only one of the two has: first those of ``before``, in its order."""
    names = [*before, *(name for name in now if name not in before)]
    return [name for name in names if before.get(name) != now.get(name)]


class Fingerprint:
    """Takes digests of the same tensors again and again.

    What a read on CUDA needs besides the tensors, the table of their addresses on the device, is kept from one
    read to the next for as long as the addresses stay. No tensor is kept alive by it.
    """

    def __init__(self) -> None:
        self._tables: dict[torch.device, PointerTable] = {}

    def read(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
        """A 64-bit digest of each tensor's dtype, shape and bits, by name.

        The bytes are read as 64-bit words ``w``, the last one padded with zeros, and the digest is
        ``sum over positions i of mix(w[i] + (i + 1) * step)  (mod 2**64)``, plus a term for dtype and shape.
        ``mix`` is a bijection on 64-bit words, hence

        - a change of any one word, so of any single element or of elements within one word, always changes
          the digest;
        - a permutation, or any other change of several words, goes unseen with a chance of about ``2**-64``:
          position enters before the non-linear ``mix``, so the terms do not cancel as they would in a plain
          sum. ``mix`` folds the upper half of a word onto the lower before each of its two multiplications
          and after the last. With one fewer of these steps the changed signs of two elements cancel once in
          a few million pairs, because a product passes differences upwards only.

        Not cryptographic: it guards against accidents, not against an adversary.

        Works on any device and memory layout, adds up the same on CPU and CUDA, and brings all results of a
        device to the host in one transfer. Scratch: five buffers of 8 MiB, and at most 16 MiB more for a
        tensor that is not contiguous; on CUDA with Triton 32 bytes per 256 KiB read.

        Args:
            named_tensors: Names and tensors of any dtype, parameters and tensor subclasses included.

        Returns:
            Digest by name, in the order given; unsigned 64-bit.

        Raises:
            ValueError: A name comes twice, or a tensor has no data to read (meta device).
        """
        import torch

        heads: dict[str, int] = {}
        direct: dict[torch.device, dict[str, torch.Tensor]] = {}
        piecewise: dict[torch.device, dict[str, torch.Tensor]] = {}
        for name, tensor in named_tensors:
            if name in heads:
                raise ValueError(f"two tensors are called {name!r}")
            if tensor.device.type == "meta":
                raise ValueError(f"{name} is on the meta device: it has no data to take a digest of")
            heads[name] = _head(tensor.dtype, tensor.shape)
            (direct if usable(tensor) else piecewise).setdefault(tensor.device, {})[name] = tensor
        sums = []
        with torch.no_grad():
            for device, tensors in direct.items():
                sums.append((tensors, self._table(device, list(tensors.values())).sums()))
            for device, tensors in piecewise.items():
                sums.append((tensors, _sums(list(tensors.values()), device)))
            found: dict[str, int] = {}
            for tensors, totals in sums:
                found |= zip(tensors, totals.tolist(), strict=True)
        return {name: (found[name] + head) & _MASK for name, head in heads.items()}

    def _table(self, device: torch.device, tensors: Sequence[torch.Tensor]) -> PointerTable:
        table = self._tables.get(device)
        if table is None or not table.points_to(tensors):
            table = PointerTable(tensors, _signed(_STEP), (_signed(_MIX_1), _signed(_MIX_2)))
            self._tables[device] = table
        return table


@lru_cache(maxsize=4096)
def _head(dtype: torch.dtype, shape: torch.Size) -> int:
    text = f"{dtype} {tuple(shape)}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=WORD_BYTES).digest(), "little")


def _signed(value: int) -> int:
    """The int64 that has the same bits, reduced modulo 2**64."""
    value &= _MASK
    return value - 2**64 if value >> 63 else value


def _sums(tensors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The sum of each tensor's mixed words, small tensors many at a time: ``(len(tensors),)`` int64."""
    import torch

    totals = torch.zeros(len(tensors), dtype=torch.int64, device=device)
    pieces: list[torch.Tensor] = []
    origins: list[tuple[int, int]] = []  # which tensor, and which of its words comes first
    waiting = 0
    for owner, tensor in enumerate(tensors):
        first = 0
        for words in _words(tensor.detach().as_subclass(torch.Tensor)):
            if waiting + words.numel() > CHUNK_WORDS:
                _add(totals, pieces, origins)
                pieces, origins, waiting = [], [], 0
            pieces.append(words)
            origins.append((owner, first))
            first += words.numel()
            waiting += words.numel()
    if pieces:
        _add(totals, pieces, origins)
    return totals


def _add(totals: torch.Tensor, pieces: Sequence[torch.Tensor], origins: Sequence[tuple[int, int]]) -> None:
    """Add the mixed words of each piece to the total of the tensor it belongs to."""
    import torch

    device = totals.device
    owners, firsts = torch.tensor(origins, dtype=torch.int64).unbind(1)
    lengths = torch.tensor([piece.numel() for piece in pieces])
    ends = lengths.cumsum(0)
    mixed = torch.cat(list(pieces))
    positions = torch.arange(1, len(mixed) + 1, device=device)
    positions += torch.repeat_interleave((firsts - (ends - lengths)).to(device), lengths.to(device))
    mixed += positions.mul_(_signed(_STEP))
    low, high = mixed.view(torch.int32).view(-1, 2).unbind(1)
    low ^= high
    for multiplier in (_MIX_1, _MIX_2):
        mixed *= _signed(multiplier)
        low ^= high
    # Integers wrap, so that differences of running sums are exact modulo 2**64.
    upto = mixed.cumsum(0)[(ends - 1).to(device)]
    totals.index_add_(0, owners.to(device), upto.diff(prepend=upto.new_zeros(1)))


def _words(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor's bytes in logical order as int64 chunks of at most :data:`CHUNK_BYTES`."""
    import torch

    if tensor.numel() == 0:
        return
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    # A strided tensor is gathered by 8-byte indices, one per element: fewer elements at a time bound those
    # too.
    per_chunk = CHUNK_BYTES // (tensor.element_size() if tensor.is_contiguous() else WORD_BYTES)
    for start in range(0, tensor.numel(), per_chunk):
        stop = min(start + per_chunk, tensor.numel())
        octets = _elements(tensor, start, stop).view(torch.uint8)
        rest = -octets.numel() % WORD_BYTES
        if rest:
            octets = torch.nn.functional.pad(octets, (0, rest))
        elif octets.storage_offset() % WORD_BYTES:
            octets = octets.clone()
        yield octets.view(torch.int64)


def _elements(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Elements ``start`` to ``stop`` in logical order as a contiguous vector; a view where possible."""
    import torch

    if tensor.is_contiguous():
        return tensor.view(-1)[start:stop]
    same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return torch.take(tensor.view(same_size), torch.arange(start, stop, device=tensor.device))
