"""Models on the Hugging Face hub: reachable, cached or neither, found out in seconds.

Left to itself, huggingface_hub asks for every file of a model six times over half a minute before it says that there is
no network.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from pytest_qvl.models.sources.model_source import (
    ModelSource,
    ModelSourceError,
    check_stored_quantization,
    stored_quantization,
)

PATIENCE_S = 5.0
CONFIG = "config.json"


def hub_options(source: ModelSource) -> dict[str, Any]:
    """What ``from_pretrained`` needs beside the name: revision, and whether to read local files only.

    A hub id is looked up once per process: if the hub does not answer within five seconds, what is in the local cache
    is used; ``HF_HUB_OFFLINE`` asks for that from the start.

    Raises:
        ModelSourceError: A hub id that is not in the cache, and the hub does not answer or knows no such model.
    """
    if source.kind != "hub":
        return {"local_files_only": True}
    return {"local_files_only": _cache_only(source), "revision": source.revision}


def model_folder(source: ModelSource) -> Path | None:
    """The folder that holds a source's files, for a hub id in the local cache; ``None`` if there is none."""
    if source.kind in ("embedded", "local"):
        return Path(source.location)
    cached = _cached_config(source) if source.kind == "hub" else None
    return None if cached is None else cached.parent


def saved_quantization(source: ModelSource) -> dict[str, Any] | None:
    """The ``quantization_config`` that the source was saved with; ``None`` for a 16-bit checkpoint.

    Of a hub id, ``config.json`` is fetched.

    Raises:
        ModelSourceError: The hub has no such model or does not answer, or it is quantized otherwise than in 4 bits.
    """
    if source.kind == "synthetic":
        return None
    file = Path(source.location) / CONFIG if source.kind != "hub" else _hub_config(source)
    config = json.loads(file.read_text(encoding="utf-8"))
    if source.kind == "hub":
        check_stored_quantization(config, f"model {str(source)!r}")
    return stored_quantization(config)


def _cached_config(source: ModelSource) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source.location, CONFIG, revision=source.revision)
    return Path(found) if isinstance(found, str) else None


@cache
def _hub_config(source: ModelSource) -> Path:
    from huggingface_hub import hf_hub_download

    options = hub_options(source)
    return Path(hf_hub_download(source.location, CONFIG, **options))


@cache
def _cache_only(source: ModelSource) -> bool:
    """Whether only the local cache can be read."""
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    said = "HF_HUB_OFFLINE is set" if offline else _refusal(source)
    if not said:
        return False
    if _cached_config(source) is not None:
        return True
    raise ModelSourceError(
        f"model {str(source)!r} is not in the local cache ({constants.HF_HUB_CACHE}), and {said}: download it where "
        "there is a network (`hf download`), or give a folder"
    )


def _refusal(source: ModelSource) -> str:
    """Why the hub cannot give the model now; empty if it can, or if only a download would tell."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils._headers import build_hf_headers

    url = hf_hub_url(source.location, CONFIG, revision=source.revision)
    host = url.partition("://")[2].partition("/")[0]
    try:
        answer = get_session().head(url, headers=build_hf_headers(), timeout=PATIENCE_S)
    except Exception as error:  # requests or httpx, by the release of huggingface_hub; both raise many kinds
        return f"{host} does not answer ({type(error).__name__})"
    if answer.status_code == 404:
        missing = "RevisionNotFound" in answer.headers.get("x-error-code", "")
        return f"{host} knows no {'revision of that name' if missing else 'such model, or it is private'}"
    if answer.status_code in (401, 403):
        return f"{host} gives it only to those who are logged in and may read it (`hf auth login`)"
    return ""
