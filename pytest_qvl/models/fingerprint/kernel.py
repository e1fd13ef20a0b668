"""The Triton kernel of :mod:`pytest_qvl.models.fingerprint.cuda`; importing it imports Triton."""

import triton
import triton.language as tl


@triton.jit
def _fold(word):
    return word ^ ((word >> 32) & 0xFFFFFFFF)


@triton.jit
def _mix(word, mixer_1, mixer_2):
    return _fold(_fold(_fold(word) * mixer_1) * mixer_2)


@triton.jit
def digest_stretch(rows, totals, step, mixer_1, mixer_2, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):  # noqa: N803
    """Add the mixed words of one stretch of one tensor to its total.

    A row is the tensor's address (a multiple of 16), its bytes, the stretch's first word and the tensor's place in
    ``totals``.
    """
    row = rows + 4 * tl.program_id(0)
    address = tl.load(row)
    size = tl.load(row + 1)
    first = tl.load(row + 2)
    total = totals + tl.load(row + 3)
    left = tl.minimum(size // 8 - first, BLOCK * BLOCKS)  # whole words of this stretch
    lanes = tl.arange(0, BLOCK)
    keys = (lanes + 1).to(tl.int64) * step
    base = tl.multiple_of((address + first * 8).to(tl.pointer_type(tl.int64)), 16)
    found = tl.zeros((BLOCK,), dtype=tl.int64)
    blocks = (left // BLOCK).to(tl.int32)
    for block in range(blocks):
        words = tl.load(base + block * BLOCK + lanes)
        found += _mix(words + (keys + (first + block * BLOCK) * step), mixer_1, mixer_2)
    done = blocks * BLOCK
    if done < left:
        inside = lanes < left - done
        words = tl.load(base + done + lanes, mask=inside, other=0)
        found += tl.where(inside, _mix(words + (keys + (first + done) * step), mixer_1, mixer_2), 0)
    tl.atomic_add(total, tl.sum(found, axis=0), sem="relaxed")
    whole = size // 8
    if (size % 8 != 0) & (whole >= first) & (whole < first + BLOCK * BLOCKS):
        # The last word of a tensor whose bytes are no whole number of words, padded with zeros.
        place = tl.arange(0, 8)
        octets = (address + whole * 8).to(tl.pointer_type(tl.uint8)) + place
        bits = tl.load(octets, mask=place < size % 8, other=0).to(tl.int64) << (place * 8).to(tl.int64)
        last = tl.sum(bits, axis=0) + (whole + 1) * step
        tl.atomic_add(total, _mix(last, mixer_1, mixer_2), sem="relaxed")
