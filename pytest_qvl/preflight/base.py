"""The base model: its configuration, the headers of its files, and the real class without data."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl.evidence import CannotJudge
from pytest_qvl.models.families import FAMILIES
from pytest_qvl.models.sources.hub import hub_options
from pytest_qvl.models.sources.model_source import (
    ADAPTER_CONFIG,
    ModelSource,
    ModelSourceError,
    check_stored_quantization,
    parse_model,
    stored_quantization,
)
from pytest_qvl.models.sources.released import hub_id, released_names
from pytest_qvl.preflight.files.folder import Folder
from pytest_qvl.preflight.files.headers import INDEX, Tensor, named_shards, read_headers
from pytest_qvl.preflight.findings import neutral
from pytest_qvl.preflight.hub_sizes import refuse_large
from pytest_qvl.preflight.refusals import BrokenFileError, RefusedError, SettingError, UnsafeFileError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_qvl.models.anatomy import Parts

# What is fetched of a model on the hub beside config.json and headers: nothing with weights, nothing that can run.
SMALL_FILES = (
    INDEX,
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
)
# Keys by which a configuration asks for code of its own, or for kernels from the hub.
_CODE = frozenset({"auto_map", "custom_pipelines"})
_CODE_ENDS = ("_implementation", "_implementation_internal")
EDITED = "config.json was edited, or belongs to another model"
PUT_BACK = "put back the config.json that the weights were saved with"
_UNREAD = "its weight files are not read (question 0)"
_DROPPED = frozenset({"quantization_config", "torch_dtype", "dtype"})


@dataclass(frozen=True)
class Base:
    """A base model that is judged from its files.

    Attributes:
        label: What to call it.
        name: Its hub id or folder, as an adapter's ``base_model_name_or_path`` would name it.
        fields: Content of its ``config.json``.
        folder: Where its files are; ``None`` for a built-in configuration.
        tensors: Its tensors by the headers of its files; empty where there are none to read.
        headers: The same of files that stayed on the hub, whose values cannot be read; empty where ``tensors`` is not.
        note: What a reader should know about where this came from; empty for nothing.
        released: Its name in ``released.json``, where that is what was given.
        unread: Why its weight files were not read although they are there; ``None`` if they were.
    """

    label: str
    name: str
    fields: Mapping[str, Any]
    folder: Folder | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    headers: Mapping[str, Tensor] = field(default_factory=dict)
    note: str = ""
    released: str = ""
    unread: ModelSourceError | None = None

    @property
    def family(self) -> str:
        """``model_type`` of its configuration."""
        return str(self.fields["model_type"])

    @property
    def described(self) -> Mapping[str, Tensor]:
        """Its tensors by the headers of its files, wherever these are."""
        return self.tensors or self.headers

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The ``quantization_config`` that it was saved with; ``None`` for a 16-bit model."""
        return stored_quantization(dict(self.fields))

    @cached_property
    def config(self) -> Any:
        """The configuration, as the installed Transformers reads it; without its quantization.

        Raises:
            SettingError: Transformers refuses it.
        """
        import transformers

        kind = getattr(transformers, FAMILIES[self.family].config_class)
        try:
            return kind.from_dict(_without_code(self.fields))
        except Exception as error:
            raise SettingError(
                f"config.json of {self.label} is none that Transformers {transformers.__version__} takes: "
                f"{neutral(_one_line(error), 200)}",
                cause=EDITED,
                fix=PUT_BACK,
            ) from None

    def skeleton(self) -> Parts:
        """The real model class of the installed Transformers on the meta device; a new one with each call.

        Raises:
            SettingError: The class cannot be built from this configuration.
        """
        import torch
        from transformers import AutoModelForImageTextToText

        from pytest_qvl.models.anatomy import anatomy

        try:
            with torch.device("meta"):
                model = AutoModelForImageTextToText.from_config(
                    self.config, dtype=torch.bfloat16, attn_implementation="eager"
                )
            model.tie_weights()
        except SettingError:
            raise
        except Exception as error:
            raise SettingError(
                f"no model can be built from config.json of {self.label}: {neutral(_one_line(error), 200)}",
                cause=EDITED,
                fix=PUT_BACK,
            ) from None
        return anatomy(model)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def find_base(text: str) -> Base:
    """The base that a user named: a released name, a folder, a hub id.

    Weight files that are broken are kept as :attr:`Base.unread`: what its configuration says can be judged without.

    Raises:
        ModelSourceError: There is none, it is of another family, or the hub does not answer.
        RefusedError: There is one, and its config.json is broken or could do harm.
    """
    text = text.strip()
    if text in released_names():
        return _built_in(text)
    prefix, colon, rest = text.partition(":")
    folder = Path(rest if colon and prefix == "local" else text).expanduser()
    if text and prefix not in ("hub", "synthetic") and folder.is_dir():
        return _of_folder(Folder(folder), str(folder), str(folder))
    source = parse_model(text)
    if source.kind == "synthetic":
        return _built_in(source.location)
    if source.kind == "hub":
        return _of_hub(source)
    return _of_folder(Folder(Path(source.location)), source.label, source.location)


def _built_in(name: str, note: str = "") -> Base:
    from pytest_qvl.models.sources.released import released_config

    fields = released_config(name).to_dict()
    return Base(name, hub_id(name), fields, note=note or "built-in configuration of the release", released=name)


def _of_folder(folder: Folder, label: str, name: str) -> Base:
    if not folder.has("config.json"):
        raise _without_config(folder, label)
    fields = folder.json("config.json")
    _refuse_foreign(fields, label)
    try:
        return Base(label, name, fields, folder, read_headers(folder))
    except RefusedError as error:
        return Base(label, name, fields, folder, note=_UNREAD, unread=error)


def _without_config(folder: Folder, label: str) -> ModelSourceError:
    if folder.has("model.safetensors") or folder.has(INDEX):
        return BrokenFileError(
            f"{neutral(label)} holds a model's weights without config.json",
            cause="it was not saved, or not copied or downloaded with them",
            fix="copy the config.json that they were saved with beside them",
        )
    kind = "an adapter" if folder.has(ADAPTER_CONFIG) else "no model"
    return ModelSourceError(f"the folder {neutral(repr(label))} holds {kind}: give one with a config.json and weights")


def _refuse_foreign(fields: Mapping[str, Any], label: str) -> None:
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ModelSourceError(
            f"config.json of {neutral(label)} says model_type {neutral(repr(kind), 80)}; "
            f"this package knows {', '.join(FAMILIES)}"
        )
    if not isinstance(fields.get("vision_config"), dict):
        raise ModelSourceError(f"config.json of {neutral(label)} has no vision_config, so it describes no vision tower")
    quantization = fields.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise SettingError(
            f"quantization_config in config.json of {neutral(label)} is {neutral(repr(quantization), 80)} and no table",
            cause=EDITED,
            fix=PUT_BACK,
        )
    check_stored_quantization(dict(fields), neutral(label))
    _refuse_absurd(fields, label)


def _refuse_absurd(fields: Mapping[str, Any], label: str) -> None:
    """Refuse sizes that no model has, before anything is built from them."""
    from pytest_qvl.vram.forecast.runnable import absurd_size

    if said := absurd_size(fields):
        raise UnsafeFileError(f"config.json of {neutral(label)} says {said}; nothing is built from it")


def _without_code(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that asks for no code, no kernels and no quantization."""
    return {
        key: _without_code(value) if isinstance(value, dict) else value
        for key, value in fields.items()
        if key not in _CODE | _DROPPED and not str(key).endswith(_CODE_ENDS)
    }


def _of_hub(source: ModelSource) -> Base:
    """Of a model on the hub only configuration and headers are fetched.

    Raises:
        ModelSourceError: It is not in the cache and the hub does not answer, and it is none of the built-in releases.
        UnsafeFileError: One of its small files is larger than any real one; nothing is fetched.
    """
    known = {hub_id(name): name for name in released_names()}
    try:
        options = hub_options(source)
    except ModelSourceError as error:
        if source.location in known and source.revision is None:
            return _built_in(known[source.location], f"built-in configuration of the release, because {error}")
        raise
    from transformers.utils.hub import cached_file

    if not options["local_files_only"]:
        refuse_large(source, ("config.json", *SMALL_FILES))
    fetch = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    for name in SMALL_FILES:
        cached_file(source.location, name, **fetch, **options)
    snapshot = Folder(Path(cached_file(source.location, "config.json", **options)).parent)
    fields = snapshot.json("config.json")
    _refuse_foreign(fields, str(source))
    named = Base(source.location, source.location, fields, snapshot)
    try:
        if _has_weights(snapshot):
            return replace(named, tensors=read_headers(snapshot))
        if options["local_files_only"]:
            return replace(named, note="its weights are not in the local cache, and the hub is not asked")
        from pytest_qvl.preflight.hub_headers import fetch_headers

        return replace(named, headers=fetch_headers(source.location, snapshot.path.name, snapshot))
    except CannotJudge as reason:
        return replace(named, note=str(reason))
    except RefusedError as error:
        return replace(named, note=_UNREAD, unread=error)


def _has_weights(snapshot: Folder) -> bool:
    """Whether all weight files of a model on the hub have been downloaded before."""
    if not snapshot.has(INDEX):
        return snapshot.has("model.safetensors")
    return all(map(snapshot.has, named_shards(snapshot)))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Transformers and bitsandbytes from printing into the report."""
    from transformers.utils import logging as transformers_logging

    before, packing = transformers_logging.get_verbosity(), logging.getLogger("bitsandbytes")
    level = packing.level
    transformers_logging.set_verbosity_error()
    packing.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        packing.setLevel(level)
