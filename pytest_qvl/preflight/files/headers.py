"""Headers of safetensors files, parsed here with hard limits; no tensor is read.

Format (https://github.com/huggingface/safetensors#format): eight bytes little-endian header length, a JSON object of
that length (tensor name to dtype, shape and begin and end of its data), the data, without gaps or overlaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_qvl.models.sources.model_source import ModelSourceError, check_safetensors
from pytest_qvl.preflight.files.folder import Folder, MiB
from pytest_qvl.preflight.findings import neutral, some
from pytest_qvl.preflight.refusals import BrokenFileError, UnsafeFileError, broken

# A shard of the largest released model has a header of 0.3 MiB; the format itself allows 100 MB.
HEADER_LIMIT = 16 * MiB
MOST_TENSORS = 200_000
MOST_AXES = 8
LONGEST_NAME = 512
MOST_SHARDS = 2_000
INDEX = "model.safetensors.index.json"
_OTHERS = frozenset({"adapter_model.safetensors", "consolidated.safetensors"})  # no weights of from_pretrained's
# Bits of one element.
DTYPES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
}


@dataclass(frozen=True)
class Tensor:
    """One tensor, by the header of its file.

    Attributes:
        name: Its key in the file.
        dtype: As safetensors writes it (``"BF16"``).
        shape: Its sides.
        begin: First byte of its data in the file.
        end: The byte behind its last.
        file: The file it is in.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    file: Path

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.end - self.begin

    @property
    def numel(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)


def read_header(folder: Folder, name: str) -> dict[str, Tensor]:
    """The tensors of one file by name.

    Raises:
        UnsafeFileError: The file leads out of the folder, or its header is larger than any real one or says what cannot
            be (shapes that are not those of its data, overlaps, unknown dtypes, a name twice).
        BrokenFileError: The file is truncated, a Git LFS pointer or no safetensors file.
    """
    file = folder.file(name)
    said = f"{neutral(repr(name))} in {neutral(str(folder))}"
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if HEADER_LIMIT < length <= size - 8:
            raise UnsafeFileError(
                f"{said} has a header of {length / MiB:,.0f} MiB, which no real one has; it is not read"
            )
        content = stream.read(length) if size >= 8 and length <= size - 8 else b""
    if not content:
        try:
            check_safetensors(file)  # says what it is instead: truncated, a pointer of Git LFS
        except ModelSourceError as error:
            raise broken(error) from None
        raise BrokenFileError(f"{said} is empty")
    found = checked_tensors(_entries(content, said), file, 8 + length, said)
    end = max((tensor.end for tensor in found.values()), default=8 + length)
    if end != size:
        raise BrokenFileError(f"{said} is corrupt: {size:,} bytes on disk, {end:,} by its header")
    return found


def _entries(content: bytes, said: str) -> dict[str, Any]:
    try:
        found = json.loads(content.decode("utf-8"), object_pairs_hook=_once)
    except RecursionError:
        raise UnsafeFileError(f"{said} has a header nested without end; it is not read") from None
    except _TwiceError as error:
        raise UnsafeFileError(f"{said} names {neutral(repr(str(error)), 200)} twice in its header") from None
    except ValueError:
        raise BrokenFileError(f"{said} is corrupt: its header is not readable") from None
    if not isinstance(found, dict):
        raise BrokenFileError(f"{said} is corrupt: its header is no JSON object")
    found.pop("__metadata__", None)
    return found


class _TwiceError(ValueError):
    """A key that an object has twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        raise _TwiceError(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return found


def checked_tensors(entries: dict[str, Any], file: Path, start: int, said: str) -> dict[str, Tensor]:
    """The tensors that a header's entries describe.

    Args:
        entries: By name, without the metadata.
        file: The file that they are of.
        start: Where in it the data begin.
        said: What to call it.

    Raises:
        UnsafeFileError: They say what cannot be.
        BrokenFileError: An entry lacks something.
    """
    if len(entries) > MOST_TENSORS:
        raise UnsafeFileError(f"{said} names {len(entries):,} tensors, which no real file does; it is not read")
    found = {name: _tensor(name, entry, file, start, said) for name, entry in entries.items()}
    expected = start
    for tensor in sorted(found.values(), key=lambda each: (each.begin, each.end)):
        if tensor.begin != expected:
            raise UnsafeFileError(f"{said}: the data of {neutral(tensor.name, 160)} overlap others or leave a gap")
        expected = tensor.end
    return found


def _tensor(name: str, entry: Any, file: Path, start: int, said: str) -> Tensor:
    if len(name) > LONGEST_NAME:
        raise UnsafeFileError(f"{said} has a tensor whose name has {len(name):,} characters; it is not read")
    tensor = f"{said}: the header's entry for {neutral(name, 160)}"
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise BrokenFileError(f"{said} is corrupt: the name {neutral(name, 160)} is no text")
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise BrokenFileError(f"{tensor} lacks dtype, shape or data_offsets") from None
    if dtype not in DTYPES:
        raise UnsafeFileError(f"{tensor} has the dtype {neutral(repr(dtype), 40)}, which safetensors does not know")
    if not isinstance(shape, list) or len(shape) > MOST_AXES or not all(map(_is_size, [*shape, begin, end])):
        raise UnsafeFileError(f"{tensor} has a shape or offsets that no tensor has: {neutral(shape, 80)}")
    if begin > end or math.prod(shape) * DTYPES[dtype] != 8 * (end - begin):
        raise UnsafeFileError(
            f"{tensor} says {dtype} of shape {neutral(shape, 80)}, which {end - begin:,} bytes of data cannot be"
        )
    return Tensor(name, dtype, tuple(shape), start + begin, start + end, file)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48


def weight_file_names(folder: Folder) -> list[str]:
    """The files that ``from_pretrained`` reads: those of the index, or ``model.safetensors``; none if there are none.

    Raises:
        UnsafeFileError: The index names a file outside the folder, or more files than any real one.
        BrokenFileError: The index is not readable, names files that are not there, or is missing beside shards.
    """
    if not folder.has(INDEX):
        shards = sorted(entry.name for entry in folder.path.glob("*.safetensors") if entry.name not in _OTHERS)
        if folder.has("model.safetensors") or not shards:
            return ["model.safetensors"] if shards else []
        raise BrokenFileError(
            f"{neutral(str(folder))} has {len(shards)} safetensors files ({some(shards)}) and neither {INDEX} nor "
            "model.safetensors, so from_pretrained finds no weights",
            cause="the index was not copied or uploaded with the shards", fix=f"put {INDEX} back, or save it again",
        )  # fmt: skip
    shards = named_shards(folder)
    for shard in shards:
        folder.file(shard)
    return shards


def named_shards(folder: Folder) -> list[str]:
    """The files that an index names, whether they are there or not.

    Raises:
        UnsafeFileError: It names a file outside the folder, or more files than any real one.
        BrokenFileError: It is missing or not readable.
    """
    weight_map = folder.json(INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise BrokenFileError(f"{INDEX} in {neutral(str(folder))} has no weight_map")
    shards = sorted(set(weight_map.values()))
    if len(shards) > MOST_SHARDS:
        raise UnsafeFileError(f"{INDEX} in {neutral(str(folder))} names {len(shards):,} files; it is not followed")
    for shard in shards:
        folder.refuse_name(shard)
    return shards


def read_headers(folder: Folder) -> dict[str, Tensor]:
    """Every tensor of a checkpoint's files by name; empty for a folder without weights.

    Raises:
        UnsafeFileError: See :func:`read_header` and :func:`weight_file_names`; or two files hold one tensor.
        BrokenFileError: See there.
    """
    return joined((read_header(folder, name) for name in weight_file_names(folder)), neutral(str(folder)))


def joined(headers: Iterable[dict[str, Tensor]], said: str) -> dict[str, Tensor]:
    """The tensors of all files of a checkpoint.

    Raises:
        UnsafeFileError: Two files hold one tensor.
    """
    found: dict[str, Tensor] = {}
    for tensors in headers:
        if twice := sorted(found.keys() & tensors.keys()):
            raise UnsafeFileError(f"two files of {said} hold {neutral(twice[0], 160)}")
        found |= tensors
    return found
