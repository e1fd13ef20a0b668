"""Whether an adapter was trained for the model under test, by the names in its configuration.

Shapes do not tell: every fine-tune of Qwen2.5-VL-7B takes every adapter of that size.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_qvl.models.families import FAMILIES
from pytest_qvl.models.sources.released import hub_id, released_config, released_names

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_qvl.models.anatomy import Parts

# Where the cache of huggingface_hub keeps a repository: ``models--owner--name/snapshots/commit``.
_CACHED = re.compile(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots(?:[/\\]|$)")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Names of models say how many parameters they have ("-7B", "30b-a3b"); those of runs and of code do not.
_SIZE = re.compile(r"(?<![a-z0-9])\d+(\.\d+)?[bm](?![a-z0-9])")
# Endings that name a copy of the same weights in another format.
_FORMAT = re.compile(r"[-_.](unsloth|bnb|dynamic|4-?bit|8-?bit|nf4|fp4|fp8|bf16|fp16|int4|int8|awq|gptq)$")
# A release's whole name ("qwen2.5-vl-7b-instruct", "qwen3-vl-30b-a3b-thinking", "qwen3.5-9b"), so that no fine-tune
# is taken for one.
_RELEASE = re.compile(r"(qwen[\d.]*(?:-vl)?)-\d+(?:\.\d+)?b(-a\d+b)?(-instruct|-thinking|-base)?")


class OtherBase(NamedTuple):
    """Whether the base that an adapter names is another model than the one under test.

    Attributes:
        sentence: How they differ; empty if they do not, or say nothing.
        certain: Whether it is another model; a folder's name may have been chosen by anybody.
    """

    sentence: str = ""
    certain: bool = False


@cache
def generations() -> dict[str, str]:
    """By ``model_type``, what the names of a family's releases begin with: ``qwen2.5-vl``, up to the size.

    Read from where its typical checkpoint was released. Dense models and mixtures of experts of one generation may be
    two families under one such name (Qwen3-VL-8B, Qwen3-VL-30B-A3B): it does not tell them apart.
    """
    found = {kind: _RELEASE.fullmatch(_plain(hub_id(family.typical))) for kind, family in FAMILIES.items()}
    return {kind: release[1] for kind, release in found.items() if release}


def name_of_base(parts: Parts) -> str:
    """Where the base model came from, as Transformers noted it: a hub id or a folder; empty if it was built."""
    return str(getattr(parts.base, "name_or_path", "") or getattr(parts.config, "_name_or_path", "") or "")


def other_base(adapter: Mapping[str, Any], under_test: str, config: Any) -> OtherBase:
    """Compare the base model that an adapter names with the model under test.

    Names are compared without owner, folder, upper case and the ending of a copy in another format, so that
    ``unsloth/Qwen2.5-VL-7B-Instruct-bnb-4bit``, a folder ``/models/Qwen2.5-VL-7B-Instruct`` and a snapshot in the hub's
    cache all are ``Qwen/Qwen2.5-VL-7B-Instruct``. Certain is that it is another model if

    - both are hub ids of different names, or of one name and different commits (``revision``); ``owner/name`` may as
      well be a folder of whoever trained (``Qwen2-VL-Finetune/my-run``), so it counts only if it names a model's size;
    - the last part of the name is, as a whole, that of a release of a generation (:func:`generations`) that another
      family than the model's was released in;
    - the name is a released checkpoint's and the model has another width.

    Otherwise at least one name is a folder's, which anybody may have chosen and which proves nothing.

    Args:
        adapter: Content of ``adapter_config.json``.
        under_test: :func:`name_of_base`.
        config: The model's ``transformers`` configuration.
    """
    named = str(adapter.get("base_model_name_or_path") or "")
    if not named:
        return OtherBase()
    sentence = (
        f"the adapter was trained for {named!r} (base_model_name_or_path in its adapter_config.json) and is judged on "
        f"{under_test or 'a model built from a configuration'!r}"
    )
    if _plain(named) == _plain(under_test):
        revisions = _other_revision(str(adapter.get("revision") or ""), config)
        return OtherBase(f"{sentence}, {revisions}", certain=True) if revisions else OtherBase()
    if why := _cannot_be(named, config):
        return OtherBase(f"{sentence}, {why}: load it on the model it was trained for", certain=True)
    if _hub_id(named) and _hub_id(under_test) and (_CACHED.search(named) or _SIZE.search(_plain(named))):
        return OtherBase(
            f"{sentence}: its shapes fit, but it was learned on other weights; give --qvl-model {named}", certain=True
        )
    unsure = f"{sentence}; if these are not the same weights, load it on the model it was trained for"
    return OtherBase(unsure) if under_test else OtherBase()


def _other_revision(theirs: str, config: Any) -> str:
    """How the commits differ, where both are known."""
    ours = str(getattr(config, "_commit_hash", None) or "")
    if ours == theirs or not (_COMMIT.fullmatch(ours) and _COMMIT.fullmatch(theirs)):
        return ""
    return f"but at revision {theirs[:12]} and not {ours[:12]}"


def _cannot_be(named: str, config: Any) -> str:
    """Why a model of this configuration cannot be the one of that name; empty if it can."""
    release = _RELEASE.fullmatch(_plain(named))
    kind = getattr(config, "model_type", "")
    if release and release[1] in generations().values() and generations().get(kind) != release[1]:
        return f"which is {kind}"
    released = next((name for name in released_names() if _plain(hub_id(name)) == _plain(named)), None)
    if released is not None and _hub_id(named):
        width, wanted = (c.get_text_config().hidden_size for c in (config, released_config(released)))
        if width != wanted:
            return f"which is {width:,} wide and not {wanted:,}"
    return ""


def _hub_id(name: str) -> str:
    """The name as a hub id; empty for a folder."""
    if cached := _CACHED.search(name):
        return f"{cached[1]}/{cached[2]}"
    return name if _HUB_ID.fullmatch(name) and not Path(name).is_dir() else ""


def _plain(name: str) -> str:
    last = (_hub_id(name) or name).replace("\\", "/").rstrip("/").rpartition("/")[2].lower()
    while _FORMAT.search(last):
        last = _FORMAT.sub("", last)
    return last
