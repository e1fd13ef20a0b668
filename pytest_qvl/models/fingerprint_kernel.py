"""The Triton kernel of :mod:`pytest_qvl.models.fingerprint_cuda`; importing it imports Triton."""

import triton
import triton.language as tl


@triton.jit
def _mix(word, mixer_1, mixer_2):
    word = word * mixer_1
    word = word ^ ((word >> 32) & 0xFFFFFFFF)
    word = word * mixer_2
    return word ^ ((word >> 32) & 0xFFFFFFFF)


@triton.jit
def digest_stretch(table, partial, step, mixer_1, mixer_2, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):  # noqa: N803
    """Sum the mixed words of one stretch of one tensor; a row of ``table`` is address, bytes, first word."""
    program = tl.program_id(0)
    address = tl.load(table + 3 * program)
    size = tl.load(table + 3 * program + 1)
    first = tl.load(table + 3 * program + 2)
    whole = size // 8
    base = address.to(tl.pointer_type(tl.int64))
    total = tl.zeros((BLOCK,), dtype=tl.int64)
    for block in range(BLOCKS):
        index = first + block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        inside = index < whole
        mixed = _mix(tl.load(base + index, mask=inside, other=0) + (index + 1) * step, mixer_1, mixer_2)
        total += tl.where(inside, mixed, 0)
    # The last word of a tensor whose bytes are no whole number of words, padded with zeros.
    place = tl.arange(0, 8).to(tl.int64)
    octets = address.to(tl.pointer_type(tl.uint8)) + whole * 8 + place
    present = (whole * 8 + place < size) & (whole >= first) & (whole < first + BLOCK * BLOCKS)
    bits = tl.load(octets, mask=present, other=0).to(tl.int64) << (place * 8)
    last = _mix(tl.sum(bits, axis=0) + (whole + 1) * step, mixer_1, mixer_2)
    some = tl.sum(present.to(tl.int64), axis=0) > 0
    tl.store(partial + program, tl.sum(total, axis=0) + tl.where(some, last, 0))
