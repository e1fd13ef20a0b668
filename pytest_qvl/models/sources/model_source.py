"""Where a model comes from: a name that a user types becomes a checked source.

Standard library only, so that a mistyped name is refused while pytest starts, before anything heavy is
imported.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pytest_qvl.models.families import FAMILIES
from pytest_qvl.models.sources.embedded import FIRST, embedded_model_dir, embedded_names

Kind = Literal["embedded", "local", "hub", "synthetic"]
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
# What the reference of a checkpoint saved in 4 bits is, where no other model was named for it.
DEQUANTIZED = (
    "its own 4-bit weights dequantized, so what 4 bits cost is not judged (--qvl-reference-model names a base)"
)
_FOUR_BIT_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_QUANT_STATE = ".quant_state.bitsandbytes__"  # saved beside every 4-bit weight, whatever its type
_HELP = (
    "give 'embedded', a folder (or 'local:FOLDER'), a hub id such as 'Qwen/Qwen2.5-VL-7B-Instruct' "
    "(with '@REVISION' if need be), or 'synthetic:qwen2.5-vl-7b'"
)
_FOLDER_HELP = "give the folder that save_pretrained wrote"
_AGAIN = "download or save it again"
# How a file begins that Git LFS has put in place of a large one (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md).
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_HELP = "give the folder that PeftModel.save_pretrained wrote"


class ModelSourceError(ValueError):
    """A model name or folder that cannot be used; the message names it, what is wrong and the fix."""


@dataclass(frozen=True)
class ModelSource:
    """A model to test.

    Attributes:
        kind: Where the weights come from.
        location: Folder, hub id or name of a released configuration.
        revision: Branch, tag or commit of a hub id; ``None`` for its default branch.
    """

    kind: Kind
    location: str
    revision: str | None = None

    def __str__(self) -> str:
        if self.kind == "embedded":
            return self.label.replace("-", ":", 1)
        return f"{self.kind}:{self.location}" + (f"@{self.revision}" if self.revision else "")

    @property
    def label(self) -> str:
        """Short enough for a test id: ``embedded``, ``embedded-qwen3-vl``, ``Qwen2.5-VL-7B-Instruct``."""
        return Path(self.location).name or self.location

    @property
    def has_knowledge(self) -> bool:
        """Whether the weights were trained, so that answers mean something."""
        return self.kind != "synthetic"

    @property
    def pretrained(self) -> str:
        """The name or folder to give to ``from_pretrained``.

        Raises:
            ModelSourceError: Synthetic weights are built, not loaded.
        """
        if self.kind == "synthetic":
            raise ModelSourceError(f"{self}: synthetic weights are built on the device and have no folder")
        return self.location


def parse_model(text: str | os.PathLike[str], relative_to: Path | None = None) -> ModelSource:
    """Turn what a user typed into a checked :class:`ModelSource`.

    A folder is opened as far as it is cheap: configuration, processor files, the header of every weight file.

    Args:
        text: ``embedded``, ``embedded:NAME``, a folder, a hub id with or without ``@revision``, or one with its kind
            in front (``local:``, ``hub:``, ``synthetic:``).
        relative_to: Where relative folders start from; by default the current directory.

    Raises:
        ModelSourceError: Unknown name, missing folder, no usable model or processor in it, corrupt weights.
    """
    if not isinstance(text, str | os.PathLike):
        raise ModelSourceError(f"model {text!r} is of type {type(text).__name__}, not a name or folder; {_HELP}")
    text = os.fspath(text).strip()
    prefix, colon, rest = text.partition(":")
    if prefix == "embedded":
        return ModelSource("embedded", str(_embedded(rest if colon else FIRST, text)))
    if colon and prefix == "synthetic":
        return ModelSource("synthetic", _released(rest, text))
    if colon and prefix == "hub":
        return _hub_source(rest, text)
    start = Path.cwd() if relative_to is None else relative_to
    folder = start / Path(rest if colon and prefix == "local" else text).expanduser()
    if text and folder.is_dir():
        check_folder(folder)
        return ModelSource("local", str(folder.resolve()))
    looks_like_hub_id = prefix != "local" and _HUB_ID.fullmatch(text)
    # `out/merged` has the form of a hub id too; where `out` is a folder, a folder is what was meant.
    if looks_like_hub_id and not folder.parent.is_dir():
        return _hub_source(text, text)
    if prefix == "local" or "/" in text or "\\" in text or text.startswith("."):
        hub = f"; for a hub id of that name write 'hub:{text}'" if looks_like_hub_id else ""
        raise ModelSourceError(f"model {text!r}: the folder {str(folder)!r} does not exist{hub}; {_HELP}")
    raise ModelSourceError(f"model {text!r} is unknown; {_HELP}")


def _hub_source(name: str, text: str) -> ModelSource:
    match = _HUB_ID.fullmatch(name)
    if match is None:
        raise ModelSourceError(f"model {text!r}: a hub id has the form owner/name; {_HELP}")
    return ModelSource("hub", match[1], match[2])


def _embedded(name: str, text: str) -> Path:
    if name not in embedded_names():
        known = ", ".join(embedded_names())
        raise ModelSourceError(f"model {text!r}: no embedded model is called {name!r}; known: {known}")
    return embedded_model_dir(name)


def _released(name: str, text: str) -> str:
    names = sorted(json.loads((Path(__file__).parent / "released.json").read_text(encoding="utf-8"))["models"])
    if name not in names:
        raise ModelSourceError(f"model {text!r}: no released configuration {name!r}; known: {', '.join(names)}")
    return name


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be a Qwen-VL checkpoint with its processor.

    Raises:
        ModelSourceError: Names the folder, the file and the fix.
    """
    config = _read_json(folder, "config.json", "model folder", _FOLDER_HELP)
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ModelSourceError(
            f"model folder {str(folder)!r}: config.json says model_type {model_type!r}; "
            f"this package tests {', '.join(FAMILIES)}"
        )
    if not isinstance(config.get("vision_config"), dict):
        raise ModelSourceError(
            f"model folder {str(folder)!r}: config.json has no vision_config, so it describes no vision tower; "
            f"{_FOLDER_HELP}"
        )
    check_stored_quantization(config, f"model folder {str(folder)!r}")
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise ModelSourceError(
            f"model folder {str(folder)!r} has no processor (preprocessor_config.json); "
            f"save it beside the model with processor.save_pretrained({str(folder)!r})"
        )
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise ModelSourceError(
            f"model folder {str(folder)!r} has no tokenizer (tokenizer.json); "
            f"save it beside the model with processor.save_pretrained({str(folder)!r})"
        )
    for name in ("tokenizer.json", "vocab.json"):
        _refuse_lfs_pointer(folder / name)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelSourceError(
            f"model folder {str(folder)!r} has no *.safetensors; other formats are not read because they can run code"
        )
    for file in weights:
        check_safetensors(file)
    _check_shards(folder)


def stored_quantization(config: dict[str, Any]) -> dict[str, Any] | None:
    """The ``quantization_config`` that a ``config.json`` was saved with; ``None`` for a 16-bit checkpoint."""
    inner = config.get("text_config")
    found = config.get("quantization_config") or (inner.get("quantization_config") if isinstance(inner, dict) else None)
    return found if isinstance(found, dict) else None


def check_stored_quantization(config: dict[str, Any], what: str) -> None:
    """Refuse a checkpoint that was saved in another quantization than 4-bit bitsandbytes.

    Args:
        config: The content of its ``config.json``.
        what: What to call the checkpoint.

    Raises:
        ModelSourceError: Names it, its quantization and the fix.
    """
    stored = stored_quantization(config)
    if stored is None or stored.get("load_in_4bit"):
        return
    kind = "8 bits (load_in_8bit)" if stored.get("load_in_8bit") else f"{stored.get('quant_method')!r}"
    raise ModelSourceError(
        f"{what} is saved in {kind}; this package tests 4-bit bitsandbytes (NF4) bases: give the 16-bit checkpoint, "
        "or one saved with load_in_4bit"
    )


def check_adapter(folder: Path) -> None:
    """Refuse a folder that is no LoRA adapter saved by PEFT.

    Raises:
        ModelSourceError: Names the folder, the file and the fix.
    """
    if not folder.is_dir():
        raise ModelSourceError(f"the adapter folder {str(folder)!r} does not exist; {_ADAPTER_HELP}")
    kind = adapter_config(folder).get("peft_type")
    if kind != "LORA":
        raise ModelSourceError(
            f"adapter folder {str(folder)!r}: adapter_config.json says peft_type {kind!r}; this package tests 'LORA'"
        )
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise ModelSourceError(
            f"adapter folder {str(folder)!r} has no adapter_model.safetensors; other formats are not read "
            f"because they can run code; {_ADAPTER_HELP}"
        )
    check_safetensors(weights)


def adapter_config(folder: Path) -> dict[str, Any]:
    """The content of a saved adapter's ``adapter_config.json``.

    Raises:
        ModelSourceError: There is none, or it is no JSON object; names the folders below that have one.
    """
    return _read_json(folder, ADAPTER_CONFIG, "adapter folder", _adapters_below(folder) or _ADAPTER_HELP)


def _adapters_below(folder: Path) -> str:
    """Which folders one level down hold an adapter; empty if none does, or this one does.

    A Trainer's output folder keeps them in ``checkpoint-N``; PEFT keeps an adapter that is not called ``default`` in a
    folder of its name.
    """
    below = [path.parent for path in folder.glob(f"*/{ADAPTER_CONFIG}")]
    if not below or (folder / ADAPTER_CONFIG).is_file():
        return ""
    steps = {int(found[1]): path for path in below if (found := re.fullmatch(r"checkpoint-(\d+)", path.name))}
    best = steps[max(steps)] if steps else max(below, key=lambda path: (path.stat().st_mtime, path.name))
    count = f"the newest of {len(below)} below it" if len(below) > 1 else "one level down"
    return f"give {str(best)!r}, {count}"


def _check_shards(folder: Path) -> None:
    name = "model.safetensors.index.json"
    if not (folder / name).is_file():
        if not (folder / "model.safetensors").is_file():
            first = min(file.name for file in folder.glob("*.safetensors"))
            raise ModelSourceError(
                f"model folder {str(folder)!r} has neither model.safetensors nor {name}, which names the shards "
                f"(found: {first}); {_AGAIN}"
            )
        return
    weight_map = _read_json(folder, name, "model folder", _AGAIN).get("weight_map")
    shards = {str(shard) for shard in weight_map.values()} if isinstance(weight_map, dict) else set()
    missing = sorted(shard for shard in shards if not (folder / shard).is_file())
    if missing:
        raise ModelSourceError(
            f"model folder {str(folder)!r}: {len(missing)} of {len(shards)} files named in {name} are "
            f"missing (first: {missing[0]}); {_AGAIN}"
        )


def _read_json(folder: Path, name: str, what: str, fix: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise ModelSourceError(f"{what} {str(folder)!r} has no {name}; {fix}")
    _refuse_lfs_pointer(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelSourceError(f"{what} {str(folder)!r}: {name} is not readable JSON ({error}); {fix}") from None
    if not isinstance(content, dict):
        raise ModelSourceError(f"{what} {str(folder)!r}: {name} is not a JSON object; {fix}")
    return content


def _refuse_lfs_pointer(file: Path) -> None:
    """Refuse the few lines that a clone without Git LFS leaves where a large file should be.

    Raises:
        ModelSourceError: Names the file and the command that fetches what it stands for.
    """
    if not file.is_file():
        return
    with file.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ModelSourceError(
                f"{str(file)!r} is a Git LFS pointer of {file.stat().st_size} bytes and not the file itself: run "
                f"`git lfs install` and `git lfs pull` in {str(file.parent)!r}, or download it"
            )


def check_safetensors(file: Path) -> None:
    """Compare what a safetensors header says with the file's size.

    Raises:
        ModelSourceError: The file is truncated, padded, a Git LFS pointer or no safetensors file.
    """
    expected = _safetensors_header(file)[1]
    size = file.stat().st_size
    if size != expected:
        raise ModelSourceError(f"{_corrupt(file)}: {size:,} bytes on disk, {expected:,} by its header; {_AGAIN}")


def parameter_count(folder: Path) -> int:
    """Number of weights in a folder's safetensors files, by their headers; a byte of a 4-bit weight holds two."""
    tensors = stored_tensors(folder)
    return sum(2 * tensor.nbytes if tensor.is_4bit else math.prod(tensor.shape) for tensor in tensors.values())


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, by the header of its file.

    Attributes:
        dtype: As safetensors writes it, such as ``"BF16"``; of a 4-bit weight the storage dtype, mostly ``"U8"``.
        shape: As stored; of a 4-bit weight that of the packed data.
        nbytes: Size of the data in bytes.
        is_4bit: Whether a bitsandbytes quantization state is saved beside it.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    is_4bit: bool = False


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder's safetensors files by name; the parts of 4-bit weights' states are left out.

    Raises:
        ModelSourceError: A header is not readable.
    """
    entries = {name: entry for file in weight_files(folder) for name, entry in _safetensors_header(file)[0].items()}
    packed = {name.partition(_QUANT_STATE)[0] for name in entries if _QUANT_STATE in name}
    parts = {name + part for name in packed for part in _FOUR_BIT_PARTS}
    return {
        name: StoredTensor(entry.dtype, entry.shape, entry.nbytes, name in packed)
        for name, entry in entries.items()
        if name not in parts and _QUANT_STATE not in name
    }


def weight_files(folder: Path) -> list[Path]:
    """The files that ``from_pretrained`` reads: those of the index, or ``model.safetensors``, or all there are."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(folder, index.name, "model folder", _AGAIN).get("weight_map")
        return sorted({folder / str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def _safetensors_header(file: Path) -> tuple[dict[str, StoredTensor], int]:
    """The tensors of a file by name, and the size that the file must have.

    Format: eight bytes little-endian header length, a JSON header with byte offsets, the data
    (https://github.com/huggingface/safetensors#format).
    """
    _refuse_lfs_pointer(file)
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, 100_000_000):
            raise ModelSourceError(f"{_corrupt(file)}: {size} bytes cannot hold its header; {_AGAIN}")
        try:
            entries = {name: entry for name, entry in json.loads(stream.read(length)).items() if name != "__metadata__"}
            offsets = {name: tuple(map(int, entry["data_offsets"][:2])) for name, entry in entries.items()}
            tensors = {
                name: StoredTensor(
                    str(entry["dtype"]), tuple(map(int, entry["shape"])), offsets[name][1] - offsets[name][0]
                )
                for name, entry in entries.items()
            }
            return tensors, 8 + length + max((end for _, end in offsets.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ModelSourceError(f"{_corrupt(file)}: its header is not readable; {_AGAIN}") from None


def _corrupt(file: Path) -> str:
    return f"weight file {str(file)!r} is corrupt"
