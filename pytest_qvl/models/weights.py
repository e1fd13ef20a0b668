"""Where a model comes from: a name that a user types becomes a checked source.

Standard library only, so that a mistyped name is refused while pytest starts, before anything heavy is
imported.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pytest_qvl.data import embedded_model_dir

Kind = Literal["embedded", "local", "hub", "synthetic"]
SUPPORTED_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HELP = (
    "give 'embedded', a folder (or 'local:FOLDER'), a hub id such as 'Qwen/Qwen2.5-VL-7B-Instruct', "
    "or 'synthetic:qwen2.5-vl-7b'"
)
_FOLDER_HELP = "give the folder that save_pretrained wrote"
_AGAIN = "download or save it again"
_ADAPTER_HELP = "give the folder that PeftModel.save_pretrained wrote"


class ModelSourceError(ValueError):
    """A model name or folder that cannot be used; the message names it, what is wrong and the mend."""


@dataclass(frozen=True)
class ModelSource:
    """A model to test.

    Attributes:
        kind: Where the weights come from.
        location: Folder, hub id or name of a released configuration.
    """

    kind: Kind
    location: str

    def __str__(self) -> str:
        return self.kind if self.kind == "embedded" else f"{self.kind}:{self.location}"

    @property
    def label(self) -> str:
        """Short enough for a test id: ``embedded``, ``Qwen2.5-VL-7B-Instruct``, ``qwen2.5-vl-7b``."""
        return self.kind if self.kind == "embedded" else Path(self.location).name or self.location

    @property
    def has_knowledge(self) -> bool:
        """Whether the weights were trained, so that answers mean something."""
        return self.kind != "synthetic"

    @property
    def pretrained(self) -> str:
        """What ``from_pretrained`` takes.

        Raises:
            ModelSourceError: Synthetic weights are built, not loaded.
        """
        if self.kind == "synthetic":
            raise ModelSourceError(f"{self}: synthetic weights are built on the device and have no folder")
        return self.location


def parse_model(text: str, relative_to: Path | None = None) -> ModelSource:
    """Turn what a user typed into a checked :class:`ModelSource`.

    A folder is opened as far as it is cheap: configuration, processor files, the header of every weight file.

    Args:
        text: ``embedded``, a folder, a hub id, or one with its kind in front (``local:``, ``hub:``,
            ``synthetic:``).
        relative_to: Where relative folders start from; by default the current directory.

    Raises:
        ModelSourceError: Unknown name, missing folder, no usable model or processor in it, corrupt weights.
    """
    text = text.strip()
    if text == "embedded":
        return ModelSource("embedded", str(embedded_model_dir()))
    prefix, colon, rest = text.partition(":")
    if colon and prefix == "synthetic":
        return ModelSource("synthetic", _released(rest, text))
    if colon and prefix == "hub":
        if not _HUB_ID.fullmatch(rest):
            raise ModelSourceError(f"model {text!r}: a hub id has the form owner/name; {_HELP}")
        return ModelSource("hub", rest)
    start = Path.cwd() if relative_to is None else relative_to
    folder = start / Path(rest if colon and prefix == "local" else text).expanduser()
    if text and folder.is_dir():
        check_folder(folder)
        return ModelSource("local", str(folder.resolve()))
    looks_like_hub_id = prefix != "local" and _HUB_ID.fullmatch(text)
    # `out/merged` has the form of a hub id too; where `out` is a folder, a folder is what was meant.
    if looks_like_hub_id and not folder.parent.is_dir():
        return ModelSource("hub", text)
    if prefix == "local" or "/" in text or "\\" in text or text.startswith("."):
        hub = f"; for a hub id of that name write 'hub:{text}'" if looks_like_hub_id else ""
        raise ModelSourceError(f"model {text!r}: the folder {str(folder)!r} does not exist{hub}; {_HELP}")
    raise ModelSourceError(f"model {text!r} is unknown; {_HELP}")


def _released(name: str, text: str) -> str:
    names = sorted(json.loads((Path(__file__).parent / "released.json").read_text(encoding="utf-8"))["models"])
    if name not in names:
        raise ModelSourceError(f"model {text!r}: no released configuration {name!r}; known: {', '.join(names)}")
    return name


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be a Qwen-VL checkpoint with its processor.

    Raises:
        ModelSourceError: Names the folder, the file and the mend.
    """
    model_type = _read_json(folder, "config.json", "model folder", _FOLDER_HELP).get("model_type")
    if model_type not in SUPPORTED_TYPES:
        raise ModelSourceError(
            f"model folder {str(folder)!r}: config.json says model_type {model_type!r}; "
            f"this package tests {', '.join(SUPPORTED_TYPES)}"
        )
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
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelSourceError(
            f"model folder {str(folder)!r} has no *.safetensors; other formats are not read because they can run code"
        )
    for file in weights:
        check_safetensors(file)
    _check_shards(folder)


def check_adapter(folder: Path) -> None:
    """Refuse a folder that is no LoRA adapter saved by PEFT.

    Raises:
        ModelSourceError: Names the folder, the file and the mend.
    """
    if not folder.is_dir():
        raise ModelSourceError(f"the adapter folder {str(folder)!r} does not exist; {_ADAPTER_HELP}")
    kind = _read_json(folder, "adapter_config.json", "adapter folder", _ADAPTER_HELP).get("peft_type")
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


def _check_shards(folder: Path) -> None:
    name = "model.safetensors.index.json"
    if not (folder / name).is_file():
        return
    weight_map = _read_json(folder, name, "model folder", _AGAIN).get("weight_map")
    shards = {str(shard) for shard in weight_map.values()} if isinstance(weight_map, dict) else set()
    missing = sorted(shard for shard in shards if not (folder / shard).is_file())
    if missing:
        raise ModelSourceError(
            f"model folder {str(folder)!r}: {len(missing)} of {len(shards)} files named in {name} are "
            f"missing (first: {missing[0]}); {_AGAIN}"
        )


def _read_json(folder: Path, name: str, what: str, mend: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise ModelSourceError(f"{what} {str(folder)!r} has no {name}; {mend}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelSourceError(f"{what} {str(folder)!r}: {name} is not readable JSON ({error}); {mend}") from None
    if not isinstance(content, dict):
        raise ModelSourceError(f"{what} {str(folder)!r}: {name} is not a JSON object; {mend}")
    return content


def check_safetensors(file: Path) -> None:
    """Compare what a safetensors header says with the file's size.

    Raises:
        ModelSourceError: The file is truncated, padded or no safetensors file.
    """
    header, begin = _safetensors_header(file)
    size = file.stat().st_size
    expected = begin + max((end for _, end in header), default=0)
    if size != expected:
        raise ModelSourceError(f"{_corrupt(file)}: {size:,} bytes on disk, {expected:,} by its header; {_AGAIN}")


def parameter_count(folder: Path) -> int:
    """Number of values in a folder's safetensors files, by their headers."""
    return sum(values for file in folder.glob("*.safetensors") for values, _ in _safetensors_header(file)[0])


def _safetensors_header(file: Path) -> tuple[list[tuple[int, int]], int]:
    """Number of values and end offset of each tensor, and where the data begin.

    Format: eight bytes little-endian header length, a JSON header with byte offsets, the data
    (https://github.com/huggingface/safetensors#format).
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, 100_000_000):
            raise ModelSourceError(f"{_corrupt(file)}: {size} bytes cannot hold its header; {_AGAIN}")
        try:
            entries = [entry for name, entry in json.loads(stream.read(length)).items() if name != "__metadata__"]
            return [(math.prod(e["shape"]), int(e["data_offsets"][1])) for e in entries], 8 + length
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ModelSourceError(f"{_corrupt(file)}: its header is not readable; {_AGAIN}") from None


def _corrupt(file: Path) -> str:
    return f"weight file {str(file)!r} is corrupt"
