"""Headers of a model's weight files on the hub: a range of each file's first bytes; no weights are fetched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pytest_qvl.evidence import CannotJudge
from pytest_qvl.preflight.files.folder import Folder
from pytest_qvl.preflight.files.headers import INDEX, Tensor, checked_tensors, joined, named_shards
from pytest_qvl.preflight.findings import neutral
from pytest_qvl.preflight.refusals import BrokenFileError

_AT_ONCE = 8


def fetch_headers(repository: str, revision: str, snapshot: Folder) -> dict[str, Tensor]:
    """Every tensor of a model on the hub by name; their values cannot be read.

    Args:
        repository: Hub id.
        revision: Commit.
        snapshot: Its small files, the index of the shards among them if there is one.

    Raises:
        UnsafeFileError: The index or a header says what cannot be (:mod:`pytest_qvl.preflight.files.headers`).
        BrokenFileError: A file is missing, or no safetensors file.
        CannotJudge: The model has no safetensors files, or the hub does not give them.
    """
    shards = named_shards(snapshot) if snapshot.has(INDEX) else ["model.safetensors"]
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        entries = list(threads.map(lambda shard: _entries(repository, revision, shard), shards))
    if None in entries and not snapshot.has(INDEX):
        raise CannotJudge("it has no safetensors weights on the hub")
    headers = []
    for shard, found in zip(shards, entries, strict=True):
        said = f"{neutral(repr(shard), 200)} of {repository} on the hub"
        if found is None:
            raise BrokenFileError(f"there is no {said}, which {INDEX} names")
        headers.append(checked_tensors(found, Path(shard), 0, said))
    return joined(headers, f"{repository} on the hub")


def _entries(repository: str, revision: str, shard: str) -> dict[str, Any] | None:
    """What the header of one file says; ``None`` if there is no such file."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError, NotASafetensorsRepoError, SafetensorsParsingError

    said = f"{neutral(repr(shard), 200)} of {repository} on the hub"
    try:
        found = HfApi().parse_safetensors_file_metadata(repository, shard, revision=revision)
    except (EntryNotFoundError, NotASafetensorsRepoError):
        return None
    except (SafetensorsParsingError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenFileError(f"{said} is corrupt: its header is not readable ({neutral(error, 120)})") from None
    except Exception as error:  # requests or httpx, by the release of huggingface_hub; both raise many kinds
        raise CannotJudge(f"the hub did not give the header of {said} ({type(error).__name__})") from None
    return {
        name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": list(tensor.data_offsets)}
        for name, tensor in found.tensors.items()
    }


def write_headers(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write a file without data that has the header of tensors, for readers of headers that take a folder."""
    begin, header = 0, {}
    for name, tensor in tensors.items():
        end = begin + tensor.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (begin, end)}
        begin = end
    content = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(content).to_bytes(8, "little") + content)
