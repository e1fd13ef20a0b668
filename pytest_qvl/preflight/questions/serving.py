"""Question 3 for vLLM and Unsloth: what their loaders make of the adapter, by their rules; neither is needed.

Sources: ``vllm/lora/utils.py`` (``parse_fine_tuned_lora_name``), ``vllm/lora/peft_helper.py``,
``vllm/lora/lora_model.py``, and ``hf_to_vllm_mapper`` of the three families in ``vllm/model_executor/models``, as of
vLLM 0.33.0; ``unsloth/models/loader.py`` as of Unsloth 2026.10.9.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.version import Version

from pytest_qvl.preflight.commands import red
from pytest_qvl.preflight.findings import Finding, some
from pytest_qvl.preflight.naming import Key
from pytest_qvl.preflight.starts import taking
from pytest_qvl.releases import installed

if TYPE_CHECKING:
    from pytest_qvl.preflight.loading import Loaded
    from pytest_qvl.preflight.subject import Subject

NUMBER = 3
_red = partial(red, NUMBER)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NEW = (
    ("model.language_model.", "language_model.model."),
    ("model.visual.", "visual."),
    ("lm_head.", "language_model.lm_head."),
)
_OLD = ("model.", "language_model.model.")  # names of before Transformers 4.52
_NOT_SERVED = ("lora_bias", "layer_replication", "alora_invocation_tokens", "use_bdlora", "use_qalora")
_PATTERNS_SINCE = Version("0.32.0")
_MOST_RANK = 16  # ``max_lora_rank`` by default
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_TOWER = "https://github.com/vllm-project/vllm/issues/23796"
_NO_MATCH = "https://github.com/vllm-project/vllm/issues/34186"


def to_vllm(name: str, family: str) -> str:
    """What vLLM calls a module whose name stands in an adapter's file: the first beginning that fits counts."""
    for theirs, ours in _NEW if family == "qwen3_vl" else (*_NEW, _OLD):  # which came after the old names
        if f"{name}.".startswith(theirs):
            return (ours + f"{name}.".removeprefix(theirs)).rstrip(".")
    return name


def vllm(subject: Subject, loaded: Loaded) -> Iterator[Finding]:
    """What vLLM refuses, ignores or has no module for."""
    yield from _unsupported(subject, loaded)
    family = subject.base.family
    modules = {to_vllm(name, family) for name, _ in subject.parts.base.named_modules() if name}
    matrices = [key for key in loaded.keys.values() if key.part]
    lost = [key.text for key in matrices if not _is_plain(key) or to_vllm(key.module, family) not in modules]
    tower = [key.text for key in matrices if key.text not in lost and to_vllm(key.module, family).startswith("visual.")]
    if lost:
        yield _red(
            subject,
            "vllm-no-module",
            f"{len(lost)} of {len(matrices)} keys name no module of vLLM's model: {some(lost)}",
            cause=f"vLLM looks an adapter up by name and serves the base where it finds none ({_NO_MATCH})",
            fix="save it with the installed PEFT on the whole vision-language model: "
            "base_model.model.model.language_model.layers...lora_A.weight",
        )
    if tower:
        yield _red(
            subject,
            "vllm-tower",
            f"{len(tower)} of {len(matrices)} keys are of the vision side, which vLLM leaves out unless told otherwise",
            cause=f"vLLM before 0.14 has no LoRA in the vision tower, later ones only on demand ({_TOWER})",
            fix="serve with --enable-tower-connector-lora on vLLM 0.14 or newer, merge the adapter, or train the "
            "language backbone only",
        )
    if not lost and not tower:
        yield Finding(NUMBER, "vllm-keys", "green", f"all {len(matrices)} keys name a module of vLLM's model")


def unsloth(subject: Subject) -> Finding:
    """Whether Unsloth finds the base: given an adapter's folder, it loads what the adapter names.

    Keys are as PEFT's, which Unsloth calls (``unsloth/models/loader.py``).
    """
    assert subject.adapter is not None
    named = str(subject.adapter.fields.get("base_model_name_or_path") or "")
    if named and (Path(named).expanduser().is_dir() or _HUB_ID.fullmatch(named)):
        return Finding(NUMBER, "unsloth-base", "green", f"Unsloth loads the base that the adapter names: {named!r}")
    return _red(
        subject,
        "unsloth-base",
        f"the adapter names the base {named!r}, which is no folder here and no hub id",
        cause="Unsloth loads the base that adapter_config.json names, and fails where there is none of that name",
        fix="write the base's hub id or folder into base_model_name_or_path of adapter_config.json",
    )


def _patterns(subject: Subject) -> Iterator[Finding]:
    """Ranks and alphas of their own, which vLLM before 0.32 takes no notice of."""
    named = [name for name in ("rank_pattern", "alpha_pattern") if getattr(subject.lora, name)]
    version = installed("vllm")
    if not named or (version and Version(version) >= _PATTERNS_SINCE):
        return
    line = f"{' and '.join(named)} of this adapter: vLLM before {_PATTERNS_SINCE} takes one rank and one alpha for all "
    fix = f"serve with vLLM {_PATTERNS_SINCE} or newer, or merge the adapter"
    if version:
        yield _red(
            subject, "vllm-patterns", f"{line}modules, and {version} is installed",
            cause="it scales the modules that they name wrongly, without a word", fix=fix,
        )  # fmt: skip
    else:
        yield Finding(NUMBER, "vllm-patterns", "not judged", f"{line}modules, and which vLLM will serve is not known",
                      fix=fix)  # fmt: skip


def _is_plain(key: Key) -> bool:
    return not key.adapter and not key.kohya and not key.wrapped and key.prefixes <= 1


def _unsupported(subject: Subject, loaded: Loaded) -> Iterator[Finding]:
    assert subject.adapter is not None
    config, init = subject.lora, subject.adapter.init
    asked = {
        "use_dora": config.use_dora,
        "modules_to_save": config.modules_to_save,
        f"bias={config.bias!r}": config.bias != "none",
        **{name: getattr(config, name, None) for name in _NOT_SERVED},
        f"init_lora_weights={init!r} (which takes a part out of the base)": taking(init) is not None,
    }
    if refused := [name for name, value in asked.items() if value]:
        yield _red(
            subject,
            "vllm-unsupported",
            f"vLLM does not serve {', '.join(refused)} of this adapter",
            cause="its loader knows plain LoRA and rsLoRA",
            fix="merge the adapter into the base and serve that",
        )
    yield from _patterns(subject)
    ranks = [shape[0] for text, shape in loaded.shapes.items() if loaded.keys[text].part == "lora_A"]
    if ranks and max(ranks) > _MOST_RANK:
        enough = next((rank for rank in _RANKS if rank >= max(ranks)), max(ranks))
        yield _red(
            subject,
            "vllm-rank",
            f"the adapter has rank {max(ranks)}, and vLLM takes up to {_MOST_RANK} unless told otherwise",
            cause="max_lora_rank is 16 by default",
            fix=f"serve with --max-lora-rank {enough}",
        )
