"""What was judged: digests and settings of model, adapter, samples and processor, for the record.

Registered where a record is asked for. Values of fixtures are described when they are set up, so that overrides count,
and belong to every target whose tests use them. Plain values only: nothing here keeps a model alive.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qvl.report.process_results import Subject
from pytest_qvl.session import fixture_graph
from pytest_qvl.session.findings import target_name
from pytest_qvl.session.targets import target_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping

    from pytest_qvl.samples import Sample

# Larger files are told by name, size and first bytes (of safetensors: the names, shapes and dtypes in it).
WHOLE_FILE = 64 * 2**20
HEAD = 2**20
# What no result depends on.
IGNORED_FILES = (".md", ".lock", ".metadata", ".gitattributes")
PROCESSOR_TEXT = "A processor is told by what it makes of this: <|image_pad|> 123 äß 猫"
LORA_FIELDS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "modules_to_save")


def folder_digest(folder: Path) -> str:
    """Digest of the files of a checkpoint, 16 hexadecimal digits.

    Files above :data:`WHOLE_FILE` bytes count by name, size and first :data:`HEAD` bytes: reading all weights of a 7B
    would take as long as loading them.
    """
    found = hashlib.sha256()
    for file in sorted(each for each in folder.iterdir() if each.is_file() and each.suffix not in IGNORED_FILES):
        size = file.stat().st_size
        with file.open("rb") as stream:
            content = stream.read(HEAD if size > WHOLE_FILE else size)
        found.update(f"{file.name}\n{size}\n{hashlib.sha256(content).hexdigest()}\n".encode())
    return found.hexdigest()[:16]


def samples_digest(samples: Iterable[Sample]) -> str:
    """Digest of questions, answers and every pixel, in order; 16 hexadecimal digits."""
    found = hashlib.sha256()
    for sample in samples:
        found.update(json.dumps([sample.id, sample.question, sample.answer, sample.skill]).encode())
        for image in (*sample.images, *(sample.swapped or ())):
            found.update(f"{image.mode} {image.size}".encode())
            found.update(image.tobytes())
    return found.hexdigest()[:16]


def _model(name: Any) -> dict[str, Any]:
    from pytest_qvl.models.sources.model_source import parse_model

    source = parse_model(name)
    digest = folder_digest(Path(source.location)) if source.kind in ("embedded", "local") else None
    return {"model": source.label, "digest": digest}


def _adapter(folder: Any) -> dict[str, Any]:
    return {"adapter": None if folder is None else folder_digest(Path(folder))}


def _quantization(config: Any) -> dict[str, Any]:
    return {
        "quantization": {
            "type": str(config.bnb_4bit_quant_type),
            "double": bool(config.bnb_4bit_use_double_quant),
            "compute_dtype": str(config.bnb_4bit_compute_dtype).removeprefix("torch."),
        }
    }


def _lora(config: Any) -> dict[str, Any]:
    fields = {name: value for name in LORA_FIELDS if (value := getattr(config, name, None)) is not None}
    targets = config.target_modules
    named = targets if targets is None or isinstance(targets, str) else ", ".join(sorted(targets))
    return {"lora": {name: _plain(value) for name, value in fields.items()} | {"target_modules": named}}


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else ", ".join(map(str, value))


def _processor(processor: Any) -> dict[str, Any]:
    tokenizer, images = processor.tokenizer, processor.image_processor.to_dict()
    told = {
        # Which of two equal implementations is installed is told by the versions.
        "images": {name: images[name] for name in sorted(images) if not name.endswith("_type")},
        "template": getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None),
        "tokens": tokenizer(PROCESSOR_TEXT)["input_ids"],
        "special": sorted(map(str, tokenizer.all_special_tokens)),
        "size": len(tokenizer),
    }
    return {"processor": hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()[:16]}


def _samples(samples: Any) -> dict[str, Any]:
    return {"samples": {"count": len(samples), "digest": samples_digest(samples)}}


def _loaded(model: Any) -> dict[str, Any]:
    import torch

    from pytest_qvl.models.anatomy import anatomy

    return {
        "family": anatomy(model).family,
        "revision": getattr(model.config, "_commit_hash", None),
        "torch": {
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "cuda": torch.version.cuda,
        },
    }


DESCRIBED: dict[str, Callable[[Any], dict[str, Any]]] = {
    "qvl_model": _model,
    "qvl_adapter": _adapter,
    "qvl_quantization_config": _quantization,
    "qvl_lora_config": _lora,
    "qvl_processor": _processor,
    "qvl_image_samples": _samples,
    "qvl_quantized_model": _loaded,
}


def described(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What is told of each value, by its fixture's name; nothing of one that an override made of something else."""
    found: dict[str, dict[str, Any]] = {name: {} for name in values}
    for name, value in values.items():
        with suppress(AttributeError, TypeError, ValueError, OSError, ImportError, KeyError):
            found[name] = DESCRIBED[name](value)
    return found


class Subjects:
    """Notes what each target's tests were run on; one per process. Register it as a plugin."""

    def __init__(self) -> None:
        self._current: dict[str, dict[str, Any]] = {}
        self._found: dict[str, Subject] = {}
        self._in_place: dict[str, dict[str, Any]] = {}

    @property
    def found(self) -> tuple[Subject, ...]:
        """What has been judged so far, one for each target."""
        return tuple(self._found.values())

    def in_place(self, facts: dict[str, dict[str, Any]]) -> None:
        """Say what the next test runs on in place of what its fixtures gave, as :func:`described` tells it.

        For wrappers of the test's call, which come before this class notes the test.
        """
        self._in_place = facts

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Generator[None, object, object]:
        """Describe the value of a fixture; one that an override made of something else is left out."""
        value = yield
        name = fixturedef.argname
        if name in DESCRIBED:
            self._current |= described({name: value})
        return value

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> None:
        """Note what a test is about to run on."""
        target = target_of(item)
        name = target_name(item)
        told, self._in_place = {**self._current, **self._in_place}, {}
        if target is None or name is None:
            return
        known = self._found.get(name) or Subject(name, target.device, target.backend)
        for fixture in DESCRIBED.keys() & fixture_graph.fixture_names(item):
            known = known.with_facts(told.get(fixture, {}))
        self._found[name] = known
