"""Files of known failures: which checks are expected to fail, where, why and until when.

```toml
[[known]]
check = "decode_positions"                        # of the shipped suite
reason = "text positions of left-padded rows, https://github.com/huggingface/transformers/issues/41180"
parameters = ["left"]                             # words of the test's parameters; all have to be there
versions = { transformers = ">=4.54,<4.57" }      # all have to hold
backend = "transformers"
device = "cuda"
card = "*T4*"                                     # the GPU's name, or that of --qvl-card
model = "qwen2.5-vl-*"                            # as in ids of tests
expires = 2027-01-31                              # from this day on the entry does nothing
```

Only ``check`` and ``reason`` have to be there.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, fields
from datetime import date
from difflib import get_close_matches
from fnmatch import fnmatchcase
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from pytest_qvl.releases import installed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

DEVICES = ("cpu", "cuda")
_PACKAGED = re.compile(r"([A-Za-z_][\w.]*):([\w./-]+\.toml)")


class KnownFailuresError(ValueError):
    """A file of known failures that cannot be read; the message names file, entry and fix."""


@dataclass(frozen=True)
class KnownFailure:
    """One entry; conditions that are ``None`` or empty always hold.

    Attributes:
        place: File and number of the entry, ``known.toml#1``.
        check: The check that is expected to fail.
        reason: Why.
        parameters: Words of the test's parameters.
        versions: Specifier by package.
        backend: Name of a backend.
        device: ``cpu`` or ``cuda``.
        card: Pattern of the card's name.
        model: Pattern of the model's name in ids.
        expires: First day on which the entry does nothing.
    """

    place: str
    check: str
    reason: str
    parameters: tuple[str, ...] = ()
    versions: tuple[tuple[str, str], ...] = ()
    backend: str | None = None
    device: str | None = None
    card: str | None = None
    model: str | None = None
    expires: date | None = None

    @property
    def expected(self) -> str:
        """The reason of a test that is expected to fail, by which reports know the entry again."""
        return f"{self.reason} [{self.place}]"

    def expired(self, today: date) -> bool:
        """Whether its time is over."""
        return self.expires is not None and today >= self.expires

    def versions_hold(self) -> bool:
        """Whether every package is installed in a version that is meant; pre-releases count as what they are."""
        from packaging.specifiers import SpecifierSet

        found = ((installed(package), text) for package, text in self.versions)
        return all(have is not None and SpecifierSet(text).contains(have, prereleases=True) for have, text in found)

    def covers(self, check: str, parameters: str, cards: Callable[[], tuple[str, ...]], **target: str) -> bool:
        """Whether a test is one that is meant.

        Args:
            check: The check that it calls.
            parameters: What stands in brackets in its id.
            cards: Names of the card; asked only where an entry names one.
            target: ``backend``, ``device`` and ``model`` of the test.
        """
        words = f"-{parameters}-"
        return (
            check == self.check
            and all(f"-{word}-" in words for word in self.parameters)
            and (self.backend is None or target.get("backend") == self.backend)
            and (self.device is None or target.get("device") == self.device)
            and (self.model is None or fnmatchcase(target.get("model", ""), self.model))
            and (self.card is None or any(fnmatchcase(name, self.card) for name in cards()))
        )


@dataclass(frozen=True)
class KnownFailures:
    """The entries of one file.

    Attributes:
        source: As the user named it, a path or ``package:file.toml``.
        entries: In the order of the file.
    """

    source: str
    entries: tuple[KnownFailure, ...]

    def __str__(self) -> str:
        return self.source


def read_known_failures(text: str, folder: Path) -> KnownFailures:
    """Read a file, or one inside of an installed package (``package:known.toml``).

    Raises:
        KnownFailuresError: No such file, no TOML, or an entry that says nothing or too much.
    """
    name, content = _content(text, folder)
    try:
        data = tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise KnownFailuresError(f"{text} is no TOML: {error}") from None
    entries = data.pop("known", [])
    if data or not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
        odd = f", not {next(iter(data))!r}" if data else ""
        raise KnownFailuresError(f"{text}: every entry is a table [[known]]{odd}")
    return KnownFailures(text, tuple(_entry(f"{name}#{number}", one) for number, one in enumerate(entries, 1)))


def _content(text: str, folder: Path) -> tuple[str, str]:
    path = folder / text
    try:
        if not path.exists() and (packaged := _PACKAGED.fullmatch(text)):
            return packaged[2], files(packaged[1]).joinpath(packaged[2]).read_text(encoding="utf-8")
        path = path.expanduser()
        return path.name, path.read_text(encoding="utf-8")
    except (OSError, ModuleNotFoundError, UnicodeDecodeError) as error:
        raise KnownFailuresError(f"{text} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _entry(place: str, data: Mapping[str, Any]) -> KnownFailure:
    """One entry, every value held to its type."""
    from pytest_qvl.checks.declared import declared

    _refuse_unknown_keys(place, data)
    for key in ("check", "reason"):
        if not str(data.get(key, "")).strip():
            raise KnownFailuresError(f"{place}: an entry needs {key!r}")
    for key in ("check", "reason", "backend", "device", "card", "model"):
        if not isinstance(data.get(key, ""), str):
            raise KnownFailuresError(f"{place}: {key} = {data[key]!r} is no text")
    if data.get("device", "cpu") not in DEVICES:
        raise KnownFailuresError(f"{place}: device = {data['device']!r} is none of {', '.join(DEVICES)}")
    if data["check"] not in declared():
        near = get_close_matches(data["check"], declared(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise KnownFailuresError(f"{place}: no check is called {data['check']!r}{hint}")
    expires = data.get("expires")
    if expires is not None and type(expires) is not date:
        raise KnownFailuresError(f"{place}: expires = {expires!r} is no date; write expires = 2027-01-31")
    given = {key: data[key] for key in data.keys() - {"parameters", "versions"}}
    given["reason"] = " ".join(data["reason"].split())  # pytest's reports have its first line only
    return KnownFailure(place, **given, parameters=_words(place, data), versions=_versions(place, data))


def _refuse_unknown_keys(place: str, data: Mapping[str, Any]) -> None:
    known = [field.name for field in fields(KnownFailure) if field.name != "place"]
    if unknown := sorted(data.keys() - set(known)):
        raise KnownFailuresError(f"{place}: unknown key {unknown[0]!r}; known: {', '.join(known)}")


def _words(place: str, data: Mapping[str, Any]) -> tuple[str, ...]:
    words = data.get("parameters", [])
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise KnownFailuresError(f'{place}: parameters = {words!r} is no list of words; write parameters = ["left"]')
    return tuple(words)


def _versions(place: str, data: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    versions = data.get("versions", {})
    if not isinstance(versions, dict):
        raise KnownFailuresError(f'{place}: versions is no table; write versions = {{ transformers = ">=5,<5.4" }}')
    for package, text in versions.items():
        try:
            SpecifierSet(text)
        except (InvalidSpecifier, TypeError, AttributeError):
            raise KnownFailuresError(
                f"{place}: {package} = {text!r} is no range of versions; write '>=5,<5.4'"
            ) from None
    return tuple(versions.items())
