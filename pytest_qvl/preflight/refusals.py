"""Why something is not read or not judged, and whose fault that is. Standard library only.

One rule decides between a red finding (exit code 1) and invalid input (exit code 2):

- What was given is there and of the right kind, and is broken, incomplete, dangerous or says what means nothing: it was
  judged, and is red (:class:`BrokenFileError`, :class:`UnsafeFileError`, :class:`SettingError`).
- What was given is not there, or is something else than was asked for (another folder, another model family, a hub that
  does not answer): the call is wrong, and nothing is judged (any other ``ModelSourceError``).
- An artefact of the right kind, made by a method that this package does not test (IA3, FP4): not judged, and counted
  (``CannotJudge``).
"""

from __future__ import annotations

from pytest_qvl.models.sources.model_source import ModelSourceError
from pytest_qvl.preflight.findings import Finding


class RefusedError(ModelSourceError):
    """An artefact that is red as a whole; the message names it and what is wrong with it.

    Attributes:
        kind: The end of the finding's name.
        cause: Why.
        fix: What to do.
    """

    kind = "unreadable"
    cause = "a file is missing or broken"
    fix = "download it again, or save it again"


class BrokenFileError(RefusedError):
    """A file that is missing, truncated, or no file of its kind.

    Args:
        message: Names the file.
        cause: Why, where more is known.
        fix: What to do, where more is known.
    """

    def __init__(self, message: str, *, cause: str = "", fix: str = "") -> None:
        super().__init__(message)
        self.cause, self.fix = cause or self.cause, fix or self.fix


class UnsafeFileError(RefusedError):
    """A file that is not read, because reading it could do harm; the message names it and says why."""

    kind = "unsafe"
    cause = "what it holds could do harm to whoever loads it"
    fix = (
        "ask whoever made it for a plain one (safetensors, saved by save_pretrained), and load nothing of it until then"
    )


class SettingError(RefusedError):
    """A file that can be read, with a value that means nothing.

    Args:
        message: Names the file, the field and the value.
        cause: Why.
        fix: What to do.
    """

    kind = "bad-setting"

    def __init__(self, message: str, *, cause: str, fix: str) -> None:
        super().__init__(message)
        self.cause, self.fix = cause, fix


def broken(error: ModelSourceError) -> RefusedError:
    """What :mod:`pytest_qvl.models.sources` says of a file, with the fix that its sentence ends with apart from it."""
    if isinstance(error, RefusedError):
        return error
    said, fix = split_fix(str(error))
    return BrokenFileError(said, fix=fix)


def split_fix(sentence: str) -> tuple[str, str]:
    """A sentence without the fix that it ends with, and the fix; the fix is empty if it ends with none."""
    for mark, word in (("; ", ""), (": run ", "run ")):
        said, found, fix = sentence.rpartition(mark)
        if found and fix.startswith(("download", "give ", "set ", "`git")):
            return said, f"{word}{fix}"
    return sentence, ""


def refused(question: int, error: ModelSourceError, what: str = "") -> Finding:
    """The red finding of something that was not read.

    Args:
        question: The question that met it.
        error: Why; one that is no :class:`RefusedError` counts as a broken file.
        what: The artefact, where it is not judged at all (``"base"``).
    """
    said = broken(error)
    return Finding(
        question,
        f"{what.replace(' checkpoint', '')}-{said.kind}" if what else said.kind,
        "red",
        f"the {what} is not read: {said}" if what else str(said),
        cause=said.cause,
        fix=said.fix,
    )
