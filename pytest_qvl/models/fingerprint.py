"""Digests of tensors: to see that a gigabyte is bitwise what it was without keeping a second gigabyte."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from pytest_qvl.models.fingerprint_cuda import sums as table_sums
from pytest_qvl.models.fingerprint_cuda import usable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

WORD_BYTES = 8
CHUNK_BYTES = 8 * 2**20
_MASK = 2**64 - 1
# Odd constants of the SplitMix64 generator (Steele, Lea, Flood, "Fast splittable pseudorandom number
# generators", OOPSLA 2014): the golden-ratio step between positions, and the two multipliers of the
# finalizer.
_STEP = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_LOW_32 = 0xFFFFFFFF


def digests(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
    """A 64-bit digest of each tensor's dtype, shape and bits, by name.

    The bytes are read as 64-bit words ``w``, the last one padded with zeros, and the digest is
    ``sum over positions i of mix(w[i] + (i + 1) * step)  (mod 2**64)``, plus a term for dtype and shape.
    ``mix`` is a bijection on 64-bit words, hence

    - a change of any one word, so of any single element or of elements within one word, always changes the
      digest;
    - a permutation, or any other change of several words, goes unseen with a chance of about ``2**-64``:
      position enters before the non-linear ``mix``, so the terms do not cancel as they would in a plain sum.

    Not cryptographic: it guards against accidents, not against an adversary.

    Works on any device and memory layout, adds up the same on CPU and CUDA, and brings all results of a
    device to the host in one transfer. Scratch: three buffers of 8 MiB, and at most 16 MiB more for a tensor
    that is not contiguous.

    Args:
        named_tensors: Names and tensors of any dtype, parameters and tensor subclasses included.

    Returns:
        Digest by name, in the order given; unsigned 64-bit.

    Raises:
        ValueError: A name comes twice, or a tensor has no data to read (meta device).
    """
    import torch

    heads: dict[str, int] = {}
    sums: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}
    keys: dict[torch.device, torch.Tensor] = {}
    together: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}
    with torch.no_grad():
        for name, tensor in named_tensors:
            if name in heads:
                raise ValueError(f"two tensors are called {name!r}")
            if tensor.device.type == "meta":
                raise ValueError(f"{name} is on the meta device: it has no data to take a digest of")
            heads[name] = _head(tensor)
            plain = tensor.detach().as_subclass(torch.Tensor)
            if usable(plain):
                together.setdefault(plain.device, []).append((name, plain))
                continue
            if plain.device not in keys:
                keys[plain.device] = _position_keys(plain.device)
            sums.setdefault(plain.device, []).append((name, _sum(plain, keys[plain.device])))
        for device, pairs in together.items():
            totals = table_sums([tensor for _, tensor in pairs], _signed(_STEP), (_signed(_MIX_1), _signed(_MIX_2)))
            sums.setdefault(device, []).extend(zip((name for name, _ in pairs), totals.unbind(), strict=True))
        found: dict[str, int] = {}
        for entries in sums.values():
            values = torch.stack([total for _, total in entries]).tolist()
            for (name, _), value in zip(entries, values, strict=True):
                found[name] = (value + heads[name]) & _MASK
    return {name: found[name] for name in heads}


def _head(tensor: torch.Tensor) -> int:
    text = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=WORD_BYTES).digest(), "little")


def _signed(value: int) -> int:
    """The int64 that has the same bits, reduced modulo 2**64."""
    value &= _MASK
    return value - 2**64 if value >> 63 else value


def _position_keys(device: torch.device) -> torch.Tensor:
    import torch

    return torch.arange(1, CHUNK_BYTES // WORD_BYTES + 1, device=device).mul_(_signed(_STEP))


def _sum(tensor: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    import torch

    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    first = 0
    for words in _words(tensor):
        mixed = words + keys[: words.numel()]
        mixed += _signed(first * _STEP)
        shifted = torch.empty_like(mixed)
        for multiplier in (_MIX_1, _MIX_2):
            mixed *= _signed(multiplier)
            # `>>` repeats the sign bit; masked, the step is the logical shift that keeps `mix` a bijection.
            torch.bitwise_right_shift(mixed, 32, out=shifted)
            shifted &= _LOW_32
            mixed ^= shifted
        total += mixed.sum()
        first += words.numel()
    return total


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
