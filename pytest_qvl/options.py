"""Every setting once: flag, ini name, environment variable, default, and which of them spoke.

Order: flag, then environment, then ini, then default (a marker on a test, where there is one, comes before
all). Flags default to ``None`` so that the ini is heard.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from pytest_qvl.gpu.lease import PATIENCE_S
from pytest_qvl.models.backends import BASELINE, check_usable
from pytest_qvl.models.sources.model_source import (
    DEQUANTIZED,
    ModelSource,
    check_adapter,
    parse_model,
    stored_quantization,
)

if TYPE_CHECKING:
    from pytest_qvl.models.policy import AdapterPolicy
    from pytest_qvl.vram.cards import Card

COMPUTE_DTYPES = ("auto", "bfloat16", "float16", "float32")
DEVICES = ("auto", "cpu", "cuda")
OVERRIDE = "-o"
_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}
_INI_TYPES = {
    "string": "text",
    "int": "a whole number",
    "bool": "true or false",
    "linelist": 'a list (in TOML: ["..."])',
}

# What the user typed, and the folder that relative paths in it start from.
Parse = Callable[[str, Path], Any]


RECORD_START = 1024  # bytes, within which a record names its schema


class SettingError(ValueError):
    """A value that a setting cannot take."""


def _one_of(*choices: str) -> Parse:
    def parse(text: str, folder: Path) -> str:  # noqa: ARG001 - every parser is called alike
        if text not in choices:
            raise SettingError(f"{text!r} is not one of {', '.join(choices)}")
        return text

    return parse


def _whole(minimum: int) -> Parse:
    def parse(text: str, folder: Path) -> int:  # noqa: ARG001 - every parser is called alike
        try:
            value = int(text)
        except ValueError:
            raise SettingError(f"{text!r} is not a whole number") from None
        if value < minimum:
            raise SettingError(f"{value} is below the smallest value {minimum}")
        return value

    return parse


def _truth(text: str, folder: Path) -> bool:  # noqa: ARG001 - every parser is called alike
    if text.lower() in _TRUE | _FALSE:
        return text.lower() in _TRUE
    raise SettingError(f"{text!r} is neither true nor false; give one of {', '.join(sorted(_TRUE | _FALSE))}")


def _size(text: str, folder: Path) -> int:  # noqa: ARG001 - every parser is called alike
    from pytest_qvl.vram.units import parse_bytes

    return parse_bytes(text)


def _card(text: str, folder: Path) -> Card:  # noqa: ARG001 - every parser is called alike
    from pytest_qvl.vram.cards import card

    return card(text)


def _backend(text: str, folder: Path) -> str:  # noqa: ARG001 - every parser is called alike
    check_usable(text)
    return text


def _adapter(text: str, folder: Path) -> Path:
    if not text.strip():
        raise SettingError("no folder was named; leave the setting out, or give the adapter's folder")
    path = folder / Path(text).expanduser()
    check_adapter(path)
    return path.resolve()


def _policy(text: str, folder: Path) -> AdapterPolicy:  # noqa: ARG001 - every parser is called alike
    from pytest_qvl.models.policy import AdapterPolicy

    return AdapterPolicy.parse(text)


def _folder(text: str, folder: Path) -> Path:
    if not text.strip():
        raise SettingError("no folder was named; leave the setting out, or give the folder's path")
    path = folder / Path(text).expanduser()
    if not path.is_dir():
        raise SettingError(f"the folder {str(path)!r} does not exist")
    return path.resolve()


def _fault(text: str, folder: Path) -> str:  # noqa: ARG001 - every parser is called alike
    from pytest_qvl.faults.catalogue import find

    return find(text).name


def _record(text: str, folder: Path) -> Path:
    path = folder / Path(text).expanduser()
    if path.is_dir():
        raise SettingError(f"{str(path)!r} is a folder, not a file")
    if path.exists() and not path.is_file():
        raise SettingError(f"{str(path)!r} is a device or a pipe, not a regular file, and is not replaced by one")
    # As in `pytest --qvl-record tests/test_mine.py`, where the value was forgotten.
    if path.is_file() and (there := path.read_bytes()[:RECORD_START]).strip() and b'"pytest-qvl/record/' not in there:
        raise SettingError(f"{str(path)!r} is there and is no record of a run: name another file, or delete it first")
    return path.resolve()


@dataclass(frozen=True)
class Setting:
    """One thing a user can set.

    Attributes:
        name: Ini name (``qvl_model``); flag, environment variable and attribute follow from it.
        parse: From text, and the folder that relative paths start from, to value; raises ``ValueError``.
        default: Value, as text, where nobody spoke; ``None`` for "not set".
        help: One line for ``--help``.
        metavar: Shown in ``--help``.
        many: Repeatable; in the environment separated by commas.
        switch: A flag without a value.
        ini_type: How pytest reads the ini value (native TOML is typed).
    """

    name: str
    parse: Parse
    default: str | None
    help: str
    metavar: str = "VALUE"
    many: bool = False
    switch: bool = False
    ini_type: Literal["string", "int", "bool", "linelist"] = "string"

    @property
    def flag(self) -> str:
        """``--qvl-model``."""
        return "--" + self.name.replace("_", "-")

    @property
    def env(self) -> str:
        """``QVL_MODEL``."""
        return self.name.upper()


SETTINGS = (
    Setting(
        "qvl_model",
        parse_model,
        "embedded",
        "model to test: 'embedded', a folder, a hub id, or 'synthetic:qwen2.5-vl-7b' (repeatable)",
        "MODEL",
        many=True,
        ini_type="linelist",
    ),
    Setting(
        "qvl_reference_model",
        parse_model,
        None,
        "record the full-precision reference from this 16-bit model instead of the tested one",
        "MODEL",
    ),
    Setting("qvl_adapter", _adapter, None, "test this saved LoRA adapter instead of a fresh one", "FOLDER"),
    Setting(
        "qvl_adapter_policy",
        _policy,
        "language,lm_head,embeddings",
        "parts that are adapted on purpose, such as 'language,vision'; 'merger:full' if its own weights are trained",
        "PARTS",
    ),
    Setting(
        "qvl_backend",
        _backend,
        BASELINE,
        "how to load and adapt (repeatable: each runs in a process of its own)",
        "BACKEND",
        many=True,
        ini_type="linelist",
    ),
    Setting(
        "qvl_device",
        _one_of(*DEVICES),
        "auto",
        "cpu, cuda, or auto: the embedded model on both, every other model on cuda",
        "DEVICE",
    ),
    Setting(
        "qvl_compute_dtype",
        _one_of(*COMPUTE_DTYPES),
        "auto",
        "dtype of 4-bit matrix products and of what stays unquantized: bfloat16, float16, float32, "
        "or auto (bfloat16, float16 where the card lacks it)",
        "DTYPE",
    ),
    Setting("qvl_fault", _fault, None, "damage the model and see which checks notice", "NAME"),
    Setting("qvl_seed", _whole(0), "0", "seed of scenes, adapters and training", "N", ini_type="int"),
    Setting("qvl_samples", _whole(2), "6", "rendered scenes per skill in the probe set", "N", ini_type="int"),
    Setting("qvl_images", _folder, None, "folder with your own pictures and samples.jsonl", "FOLDER"),
    Setting(
        "qvl_card",
        _card,
        None,
        "behave like this GPU card, such as 't4': cap the memory of a bigger GPU, and forecast what fits",
        "CARD",
    ),
    Setting("qvl_vram_limit", _size, None, "default of limit_vram for every test, such as '15 GiB'", "SIZE"),
    Setting(
        "qvl_gpu_patience",
        _whole(0),
        f"{PATIENCE_S:.0f}",
        "seconds to wait for a GPU that other runs hold",
        "SECONDS",
        ini_type="int",
    ),
    Setting("qvl_record", _record, None, "write what was measured, and on what, to this JSON file", "FILE"),
    Setting(
        "qvl_require_gpu",
        _truth,
        "false",
        "make every GPU test that is skipped, and a run without any GPU test, an error",
        switch=True,
        ini_type="bool",
    ),
)


@dataclass(frozen=True)
class Choice:
    """A setting's value and who chose it."""

    value: Any
    source: str


class Settings:
    """The effective settings of one run; attributes are the ini names without ``qvl_``."""

    def __init__(self, choices: dict[str, Choice]) -> None:
        self._choices = choices

    def of_backend(self, name: str) -> Settings:
        """The same settings for the process of one backend."""
        return Settings({**self._choices, "qvl_backend": Choice((name,), self.source("backend"))})

    def __getattr__(self, name: str) -> Any:
        try:
            return self._choices[f"qvl_{name}"].value
        except KeyError:
            raise AttributeError(name) from None

    def source(self, name: str) -> str:
        """Who chose the setting: a flag, an environment variable, an ini file, ``-o`` or ``default``."""
        return self._choices[f"qvl_{name}"].source

    def described(self) -> list[str]:
        """``model embedded (default)``, and every setting that somebody chose."""
        shown = []
        for setting in SETTINGS:
            choice = self._choices[setting.name]
            if choice.source != "default" or setting.name == "qvl_model":
                value = ", ".join(map(str, choice.value)) if setting.many else str(choice.value)
                label = setting.name.removeprefix("qvl_").replace("_", " ")
                shown.append(f"{label} {value} ({choice.source})")
        if self.reference_model is None:
            shown += [f"reference of {source}: {DEQUANTIZED}" for source in self.model if _saved_in_4bit(source)]
        return shown


def _saved_in_4bit(source: ModelSource) -> bool:
    """Whether a folder was saved in 4 bits; of a hub id nobody knows yet."""
    if source.kind != "local":
        return False
    config = json.loads((Path(source.location) / "config.json").read_text(encoding="utf-8"))
    return stored_quantization(config) is not None


SETTINGS_KEY = pytest.StashKey[Settings]()


def add_options(parser: pytest.Parser) -> None:
    """Register every flag and ini name."""
    group = parser.getgroup("qvl", "QLoRA validation for Qwen-VL (pytest-qvl)")
    for setting in SETTINGS:
        default = "not set" if setting.default is None else f"default {setting.default}"
        text = f"{setting.help} [ini {setting.name}, environment {setting.env}, {default}]"
        kind: dict[str, Any] = {"dest": setting.name, "default": None, "help": text.replace("%", "%%")}
        if setting.switch:
            group.addoption(setting.flag, action=argparse.BooleanOptionalAction, **kind)
        else:
            action = "append" if setting.many else "store"
            group.addoption(setting.flag, action=action, metavar=setting.metavar, **kind)
        parser.addini(setting.name, setting.help, type=setting.ini_type, default=None)


def read_settings(config: pytest.Config) -> Settings:
    """Resolve every setting.

    Raises:
        pytest.UsageError: A value is wrong; names the setting, who set it, the value and the mend.
    """
    settings = Settings({setting.name: _choose(config, setting) for setting in SETTINGS})
    if settings.card is not None:
        from pytest_qvl.vram.cap import compute_dtype

        try:
            compute_dtype(settings.card, settings.compute_dtype)
        except ValueError as error:
            who = f"qvl_compute_dtype ({settings.source('compute_dtype')}), qvl_card ({settings.source('card')})"
            raise pytest.UsageError(f"{who}: {error}") from None
    return settings


def backends_before_conftests(config: pytest.Config) -> tuple[str, ...]:
    """Names of the backends chosen, unchecked, at a time when options are not settled yet; empty where they are bad."""
    setting = next(setting for setting in SETTINGS if setting.name == "qvl_backend")
    given = getattr(config.known_args_namespace, setting.name, None)
    environment = os.environ.get(setting.env, "").strip()
    try:
        raw = given or (environment.split(",") if environment else config.getini(setting.name)) or [setting.default]
        return tuple(dict.fromkeys(text.strip() for text in raw))
    except (TypeError, ValueError, pytest.UsageError):
        return ()


def _choose(config: pytest.Config, setting: Setting) -> Choice:
    """The first of flag, environment, ini and default that is set; what is empty is not."""
    given = config.getoption(setting.name)
    environment = os.environ.get(setting.env, "").strip()
    folder = config.invocation_params.dir
    raw: Any
    if given is not None:
        raw, source = given, setting.flag
    elif environment:
        raw, source = environment.split(",") if setting.many else environment, setting.env
    elif (ini := _read_ini(config, setting)) not in (None, "", []):
        raw, source = ini, _ini_name(config, setting)
        if source != OVERRIDE and config.inipath is not None:
            folder = config.inipath.parent
    elif setting.default is not None:
        raw, source = [setting.default] if setting.many else setting.default, "default"
    else:
        return Choice(None, "default")
    try:
        if setting.many:
            return Choice(tuple(dict.fromkeys(setting.parse(text.strip(), folder) for text in raw)), source)
        return Choice(raw if isinstance(raw, bool) else setting.parse(str(raw).strip(), folder), source)
    except (ValueError, OSError) as error:
        named = source if source in (setting.flag, setting.env) else f"{setting.name} ({source})"
        raise pytest.UsageError(f"{named}: {error}") from None


def _read_ini(config: pytest.Config, setting: Setting) -> Any:
    try:
        return config.getini(setting.name)
    except (TypeError, ValueError, pytest.UsageError) as error:  # pytest before 9.2 raises the first two
        raise pytest.UsageError(
            f"{setting.name} ({_ini_name(config, setting)}): {error}; give {_INI_TYPES[setting.ini_type]}"
        ) from None


def _ini_name(config: pytest.Config, setting: Setting) -> str:
    overrides = config.getoption("override_ini") or ()
    if config.inipath is None or any(text.partition("=")[0].strip() == setting.name for text in overrides):
        return OVERRIDE
    return config.inipath.name
