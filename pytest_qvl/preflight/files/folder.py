"""One folder of artefacts: nothing outside it is opened, nothing large is read whole, nothing is run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NoReturn

from pytest_qvl.models.sources.model_source import ModelSourceError
from pytest_qvl.preflight.findings import neutral
from pytest_qvl.preflight.refusals import BrokenFileError, UnsafeFileError

MiB = 2**20
# Released files are far below: config.json has a few KB, the index of the largest model 0.2 MiB, Qwen's tokenizer 11.
JSON_LIMITS = {"tokenizer.json": 64 * MiB, "tokenizer_config.json": 16 * MiB, "model.safetensors.index.json": 32 * MiB}
JSON_LIMIT = 4 * MiB
TEXT_LIMIT = 2 * MiB
PICKLED = re.compile(r"(adapter_model|pytorch_model|consolidated|model)[\w.-]*\.(bin|pt|pth|pkl|ckpt)")
_SNAPSHOT = "snapshots"


def limit_of(name: str) -> int:
    """The most bytes that a small file of that name may have."""
    return JSON_LIMITS.get(name, JSON_LIMIT) if name.endswith(".json") else TEXT_LIMIT


def too_large(name: str, where: str) -> UnsafeFileError:
    """What is raised for a small file beyond its limit, which is not read."""
    return UnsafeFileError(
        f"{neutral(repr(name))} {where} has more than {limit_of(name) / MiB:g} MiB, which no real file of that name "
        "has; it is not read"
    )


class Folder:
    """A folder whose files are looked at.

    Args:
        path: The folder; may itself be reached through a symbolic link.

    Raises:
        ModelSourceError: There is no such folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser()
        if not self.path.is_dir():
            raise ModelSourceError(f"the folder {neutral(repr(str(path)))} does not exist")
        self._inside = [self.path.resolve()]
        # The cache of huggingface_hub keeps files as links from snapshots/COMMIT into blobs, beside it.
        real = self.path.resolve()
        if real.parent.name == _SNAPSHOT and real.parents[1].name.startswith("models--"):
            self._inside.append(real.parents[1] / "blobs")

    def __str__(self) -> str:
        return str(self.path)

    def has(self, name: str) -> bool:
        """Whether there is an entry of that name, safe to open or not; a link that leads nowhere is one."""
        file = self.path / name
        return file.exists() or file.is_symlink()

    def file(self, name: str) -> Path:
        """A regular file inside the folder.

        Raises:
            UnsafeFileError: The name or a link leads out of the folder, or to something that is no regular file.
            BrokenFileError: There is no such file.
        """
        self.refuse_name(name)
        said = f"{neutral(repr(name), 200)} in {neutral(str(self.path))}"
        file = self.path / name
        try:
            real = file.resolve(strict=True)
        except (OSError, RuntimeError):
            if file.is_symlink():
                raise UnsafeFileError(f"{said} is a link that leads nowhere; it is not opened") from None
            raise BrokenFileError(f"there is no {said}") from None
        if not any(real.is_relative_to(root) for root in self._inside):
            raise UnsafeFileError(f"{said} is a link to a file outside the folder; it is not opened")
        if not real.is_file():
            raise UnsafeFileError(f"{said} is no regular file; it is not opened")
        return file

    def refuse_name(self, name: str) -> None:
        """Refuse a file's name that leads out of the folder, whether there is such a file or not.

        Raises:
            UnsafeFileError: It does.
        """
        if not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name:
            said = f"{neutral(repr(name), 200)} in {neutral(str(self.path))}"
            raise UnsafeFileError(f"{said} leads out of the folder; it is not opened")

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object of bounded size.

        Raises:
            UnsafeFileError: See :meth:`file`; or the file is larger than any real one, or nested without end.
            BrokenFileError: There is no such file, or it is no JSON object.
        """
        return _as_object(self._bytes(name), name, self.path)

    def text(self, name: str) -> str:
        """A text file of bounded size, such as ``chat_template.jinja``; it is never rendered.

        Raises:
            UnsafeFileError: See :meth:`json`.
            BrokenFileError: There is no such file.
        """
        return self._bytes(name).decode("utf-8", errors="backslashreplace")

    def optional_json(self, name: str) -> dict[str, Any] | None:
        """As :meth:`json`; ``None`` if there is no such file."""
        return self.json(name) if self.has(name) else None

    def pickles(self) -> list[str]:
        """Names of weight files in formats that can run code when they are read."""
        return sorted(entry.name for entry in self.path.iterdir() if PICKLED.fullmatch(entry.name))

    def _bytes(self, name: str) -> bytes:
        limit = limit_of(name)
        with self.file(name).open("rb") as stream:
            content = stream.read(limit + 1)
        if len(content) > limit:
            raise too_large(name, f"in {neutral(str(self.path))}")
        return content


def _as_object(content: bytes, name: str, folder: Path) -> dict[str, Any]:
    said = f"{neutral(repr(name))} in {neutral(str(folder))}"
    try:
        found = json.loads(content.decode("utf-8"), parse_constant=_no_constant)
    except RecursionError:
        raise UnsafeFileError(f"{said} is nested without end; it is not read") from None
    except ValueError as error:
        raise BrokenFileError(f"{said} is not readable JSON ({neutral(error, 120)})") from None
    if not isinstance(found, dict):
        raise BrokenFileError(f"{said} is not a JSON object")
    return found


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")
