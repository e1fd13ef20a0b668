"""Weight files whose content is known: the embedded models', and those of the Hugging Face hub's cache."""

from __future__ import annotations

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from pytest_qvl.models.sources.embedded import embedded_digest
from pytest_qvl.models.sources.model_source import weight_files

if TYPE_CHECKING:
    from pathlib import Path

# The cache keeps a file of Git LFS as ``blobs/SHA-256``, linked to from ``snapshots/COMMIT/NAME``
# (https://huggingface.co/docs/huggingface_hub/guides/manage-cache).
_BLOB = re.compile(r"[0-9a-f]{64}")


def known_digest(file: Path) -> str | None:
    """The SHA-256 that a weight file should have; ``None`` if nobody says."""
    real = file.resolve()
    if real.parent.name == "blobs" and _BLOB.fullmatch(real.name):
        return real.name
    return embedded_digest(real.parent)


def altered_files(folder: Path) -> tuple[str, ...]:
    """One sentence for each weight file of a checkpoint whose content is not what it is known to be.

    Reads every byte of files that have a known digest, about a second per GB and core, several files at a time.
    """
    known = {file: digest for file in weight_files(folder) if (digest := known_digest(file)) is not None}
    with ThreadPoolExecutor() as pool:
        found = dict(zip(known, pool.map(_digest, known), strict=True))
    return tuple(
        f"{str(file)!r} was altered: its SHA-256 is {found[file][:12]}... and not {digest[:12]}..., under "
        "which it was published; remove it and download it again"
        for file, digest in known.items()
        if found[file] != digest
    )


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
