"""Sizes of a model's small files on the hub, asked for before any of them is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pytest_qvl.models.sources.hub import PATIENCE_S
from pytest_qvl.models.sources.model_source import ModelSource
from pytest_qvl.preflight.files.folder import limit_of, too_large
from pytest_qvl.preflight.findings import neutral

_AT_ONCE = 8


def refuse_large(source: ModelSource, names: Sequence[str]) -> None:
    """Refuse a model of which a file is larger than any real one of its name.

    A file that the hub does not have, or does not tell the size of, is left to whoever fetches it: huggingface_hub
    fetches nothing without a size.

    Raises:
        UnsafeFileError: The first of the files that is too large.
    """
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        sizes = list(threads.map(lambda name: _size(source, name), names))
    for name, size in zip(names, sizes, strict=True):
        if size > limit_of(name):
            raise too_large(name, f"of {neutral(source.location)} on the hub")


def _size(source: ModelSource, name: str) -> int:
    """Bytes of a file; 0 if the hub does not say."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        url = hf_hub_url(source.location, name, revision=source.revision)
        return get_hf_file_metadata(url, timeout=PATIENCE_S).size or 0
    except Exception:  # requests or httpx, by the release of huggingface_hub; both raise many kinds
        return 0
