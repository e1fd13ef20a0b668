# ruff: noqa: RUF009 - the calls that declare settings are `dataclasses.field`
"""Every setting once: type, flag, ini name, environment variable, default, and which of them was heard.

A setting is one field of :class:`Settings`; :data:`SETTINGS`, the flags and the ini names come from it. Order: flag,
then environment, then ini, then default (a marker on a test, where there is one, comes before all). Flags default to
``None`` so that the ini is heard.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import pytest

from pytest_qvl.gpu import PATIENCE_S
from pytest_qvl.models.backends import BASELINE
from pytest_qvl.models.sources.model_source import DEQUANTIZED, ModelSource, parse_model, stored_quantization
from pytest_qvl.option_values import (
    Parse,
    Value,
    names_in,
    one_of,
    parse_adapter,
    parse_backend,
    parse_base,
    parse_card,
    parse_fault,
    parse_folder,
    parse_known_failures,
    parse_layers,
    parse_page,
    parse_policy,
    parse_record,
    parse_size,
    parse_truth,
    whole_number,
)

if TYPE_CHECKING:
    from pytest_qvl.models.policy import AdapterPolicy
    from pytest_qvl.models.quantized_layers import QuantizedLayers
    from pytest_qvl.records.known_failures import KnownFailures
    from pytest_qvl.vram.cards import Card

COMPUTE_DTYPES = ("auto", "bfloat16", "float16", "float32")
DEVICES = ("auto", "cpu", "cuda")
FAULT_REFERENCES = ("healthy", "damaged")
OVERRIDE = "-o"
IniType = Literal["string", "int", "bool", "linelist"]
_INI_TYPES = {
    "string": "text",
    "int": "a whole number",
    "bool": "true or false",
    "linelist": 'a list (in TOML: ["..."])',
}
_SETTING = "setting"  # key of a field's metadata


@dataclass(frozen=True)
class Setting:
    """How one thing can be set.

    Attributes:
        name: Ini name (``qvl_model``); flag, environment variable and attribute follow from it.
        parse: From text, and the folder that relative paths start from, to value; raises ``ValueError``.
        default: Value, as text, where nobody set it; ``None`` for "not set".
        help: One line for ``--help``.
        metavar: Shown in ``--help``.
        many: Repeatable; in the environment separated by commas.
        switch: A flag without a value.
        ini_type: How pytest reads the ini value (native TOML is typed).
    """

    name: str
    parse: Parse[Any]
    default: str | None
    help: str
    metavar: str = "VALUE"
    many: bool = False
    switch: bool = False
    ini_type: IniType = "string"

    @property
    def flag(self) -> str:
        """``--qvl-model``."""
        return "--" + self.name.replace("_", "-")

    @property
    def env(self) -> str:
        """``QVL_MODEL``."""
        return self.name.upper()


@overload
def _one(parse: Parse[Value], default: str, help: str, metavar: str = ..., ini_type: IniType = ...) -> Value: ...
@overload
def _one(parse: Parse[Value], default: None, help: str, metavar: str = ...) -> Value | None: ...
def _one(
    parse: Parse[Value], default: str | None, help: str, metavar: str = "VALUE", ini_type: IniType = "string"
) -> Value | None:
    """A field with one value; the arguments are those of :class:`Setting`."""
    return cast("Value | None", _field(parse, default, help, metavar, ini_type=ini_type))


def _many(parse: Parse[Value], default: str | None, help: str, metavar: str) -> tuple[Value, ...]:
    """A field with several values."""
    return cast("tuple[Value, ...]", _field(parse, default, help, metavar, many=True, ini_type="linelist"))


def _switch(default: Literal["true", "false"], help: str) -> bool:
    """A field that is on or off; its flag takes no value."""
    return cast("bool", _field(parse_truth, default, help, switch=True, ini_type="bool"))


def _field(*arguments: Any, **named: Any) -> Any:
    return field(metadata={_SETTING: lambda name: Setting(name, *arguments, **named)})


@dataclass(frozen=True)
class Settings:
    """The effective settings of one run, each with the type that its tests and fixtures get."""

    model: tuple[ModelSource, ...] = _many(
        parse_model,
        "embedded",
        "model to test: 'embedded', a folder, a hub id, or 'synthetic:qwen2.5-vl-7b' (repeatable)",
        "MODEL",
    )
    reference_model: ModelSource | None = _one(
        parse_model,
        None,
        "record the full-precision reference from this 16-bit model instead of the tested one",
        "MODEL",
    )
    adapter: Path | None = _one(parse_adapter, None, "test this saved LoRA adapter instead of a fresh one", "FOLDER")
    adapter_policy: AdapterPolicy = _one(
        parse_policy,
        "language,lm_head,embeddings",
        "parts that are adapted on purpose, such as 'language,vision'; 'merger:full' if its own weights are trained",
        "PARTS",
    )
    quantized_layers: QuantizedLayers = _one(
        parse_layers,
        "language",
        "parts and layers that are in 4 bits on purpose; 'language,in_proj_a:16bit' if some of them are not",
        "LAYERS",
    )
    backend: tuple[str, ...] = _many(
        parse_backend,
        BASELINE,
        "how to load and adapt (repeatable: each runs in a process of its own)",
        "BACKEND",
    )
    device: str = _one(
        one_of(*DEVICES),
        "auto",
        "cpu, cuda, or auto: the embedded model on both, every other model on cuda",
        "DEVICE",
    )
    compute_dtype: str = _one(
        one_of(*COMPUTE_DTYPES),
        "auto",
        "dtype of 4-bit matrix products and of what stays unquantized: bfloat16, float16, float32, "
        "or auto (bfloat16, float16 where the card lacks it)",
        "DTYPE",
    )
    fault: str | None = _one(parse_fault, None, "damage the model and see which checks notice", "NAME")
    fault_reference: str = _one(
        one_of(*FAULT_REFERENCES),
        "healthy",
        "reference of a run with a fault: healthy (recorded before the damage), or damaged (after it, in common mode)",
        "STATE",
    )
    seed: int = _one(whole_number(0), "0", "seed of scenes, adapters and training", "N", "int")
    samples: int = _one(whole_number(2), "6", "rendered scenes per skill in the probe set", "N", "int")
    images: Path | None = _one(parse_folder, None, "folder with your own images and samples.jsonl", "FOLDER")
    card: Card | None = _one(
        parse_card,
        None,
        "behave like this GPU card, such as 't4': cap the memory of a bigger GPU, and forecast what fits",
        "CARD",
    )
    vram_limit: int | None = _one(parse_size, None, "default of limit_vram for every test, such as '15 GiB'", "SIZE")
    gpu_patience: int = _one(
        whole_number(0), f"{PATIENCE_S:.0f}", "seconds to wait for a GPU that other runs hold", "SECONDS", "int"
    )
    record: Path | None = _one(parse_record, None, "write what was measured, and on what, to this JSON file", "FILE")
    html: Path | None = _one(parse_page, None, "write a report to read in a browser to this HTML file", "FILE")
    compare: str | None = _one(
        parse_base, None, "say what changed since this record, or since the 'shipped' reference", "FILE"
    )
    known_failures: tuple[KnownFailures, ...] = _many(
        parse_known_failures, None, "expect the failures in this TOML file (repeatable)", "FILE"
    )
    require_gpu: bool = _switch(
        "false", "make every GPU test that is skipped, and a run without any GPU test, an error"
    )
    sources: Mapping[str, str] = field(default_factory=dict)

    def of_backend(self, name: str) -> Settings:
        """The same settings for the process of one backend."""
        return replace(self, backend=(name,))

    def source(self, name: str) -> str:
        """Who chose a setting, ``seed``: a flag, an environment variable, an ini file, ``-o`` or ``default``."""
        return self.sources[f"qvl_{name}"]

    def listed(self) -> list[dict[str, Any]]:
        """Name, value as text (``None`` for not set; several as a list) and source of every setting."""
        found = []
        for setting in SETTINGS:
            value = getattr(self, setting.name.removeprefix("qvl_"))
            shown = list(map(str, value)) if setting.many else None if value is None else str(value)
            found.append({"name": setting.name, "value": shown, "source": self.sources[setting.name]})
        return found

    def described(self) -> list[str]:
        """``model embedded (default)``, and every setting that somebody chose."""
        shown = []
        for setting in SETTINGS:
            name, source = setting.name.removeprefix("qvl_"), self.sources[setting.name]
            if source != "default" or name == "model":
                value = getattr(self, name)
                text = ", ".join(map(str, value)) if setting.many else str(value)
                shown.append(f"{name.replace('_', ' ')} {text} ({source})")
        if self.reference_model is None:
            shown += [f"reference of {source}: {DEQUANTIZED}" for source in self.model if _saved_in_4bit(source)]
        return shown


SETTINGS: tuple[Setting, ...] = tuple(
    each.metadata[_SETTING](f"qvl_{each.name}") for each in fields(Settings) if _SETTING in each.metadata
)


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
        pytest.UsageError: A value is wrong, or one of two; names the setting, who set it, the value and the fix.
    """
    _refuse_unknown(config)
    _refuse_contradictions(config)
    chosen = {setting.name: _choose(config, setting) for setting in SETTINGS}
    values = {name.removeprefix("qvl_"): value for name, (value, _) in chosen.items()}
    settings = Settings(**values, sources={name: source for name, (_, source) in chosen.items()})
    if settings.card is not None:
        from pytest_qvl.vram.cap import compute_dtype

        try:
            compute_dtype(settings.card, settings.compute_dtype)
        except ValueError as error:
            who = f"qvl_compute_dtype ({settings.source('compute_dtype')}), qvl_card ({settings.source('card')})"
            raise pytest.UsageError(f"{who}: {error}") from None
    return settings


def _refuse_unknown(config: pytest.Config) -> None:
    """Settings of the ini file or ``-o`` that nobody knows: pytest warns of the first, and is silent on the second."""
    names = [setting.name for setting in SETTINGS]
    found = dict.fromkeys(names_in(config.inipath, "qvl_"), str(config.inipath))
    overrides = (text.partition("=")[0].strip() for text in config.getoption("override_ini") or ())
    found |= {name: OVERRIDE for name in overrides if name.startswith("qvl_")}
    for name in sorted(found.keys() - set(names)):
        try:
            config.getini(name)  # another plugin's
        except ValueError:
            from difflib import get_close_matches

            near = get_close_matches(name, names, 1)
            meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
            raise pytest.UsageError(f"{name} ({found[name]}): pytest-qvl has no such setting; {meant}") from None


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


def _refuse_contradictions(config: pytest.Config) -> None:
    """Refuse a setting with two values in one place, of which pytest takes the last without a word.

    In different places the nearer wins: the command line over ``PYTEST_ADDOPTS``, that over ``addopts`` of the ini.

    Raises:
        pytest.UsageError: Names the setting, its values and the fix.
    """
    if hasattr(config, "workerinput"):  # the controller has looked
        return
    command_line = [os.fspath(argument) for argument in config.invocation_params.args]
    for arguments in (command_line, shlex.split(os.environ.get("PYTEST_ADDOPTS", "")), config.getini("addopts")):
        if any("qvl" in argument or argument.startswith("@") for argument in arguments):
            _refuse_two_values(arguments)


def _refuse_two_values(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, fromfile_prefix_chars="@")
    parser.add_argument(OVERRIDE, "--override-ini", dest="ini", action="append", default=[])
    once = [setting for setting in SETTINGS if not setting.many]
    for setting in once:
        if setting.switch:
            off = setting.flag.replace("--", "--no-", 1)
            parser.add_argument(setting.flag, dest=setting.name, action="append_const", const=setting.flag)
            parser.add_argument(off, dest=setting.name, action="append_const", const=off)
        else:
            parser.add_argument(setting.flag, dest=setting.name, action="append")
    given, _ = parser.parse_known_args(arguments)
    for setting in once:
        _refuse_several(setting.flag, getattr(given, setting.name) or (), "give it once")
    overrides = [text.partition("=") for text in given.ini]
    for setting in SETTINGS:
        fix = f"give {setting.flag} for each" if setting.many else "give it once"
        values = [value for name, _, value in overrides if name.strip() == setting.name]
        _refuse_several(f"{setting.name} ({OVERRIDE})", values, fix)


def _refuse_several(what: str, values: Iterable[str], fix: str) -> None:
    different = dict.fromkeys(value.strip() for value in values)
    if len(different) > 1:
        raise pytest.UsageError(
            f"{what}: given more than once, with the values {' and '.join(map(repr, different))}; {fix}"
        )


def _choose(config: pytest.Config, setting: Setting) -> tuple[Any, str]:
    """The first of flag, environment, ini and default that is set, and which it was; what is empty is not."""
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
        return () if setting.many else None, "default"
    try:
        if setting.many:
            return tuple(dict.fromkeys(setting.parse(text.strip(), folder) for text in raw)), source
        return raw if isinstance(raw, bool) else setting.parse(str(raw).strip(), folder), source
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
