"""Starting a process for Unsloth: is it usable, and is it imported before what it patches?

Unsloth patches Transformers and PEFT when it is imported, and asks CUDA for its devices then, so the GPU has to
be leased before that. Nothing here imports it to find out whether it is there: that alone changes Transformers
for the whole process.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import tempfile
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl.releases import install_extra

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_qvl.gpu.lease import Lease

OLDEST = "2026.10.9"
PATCHED = ("transformers", "peft", "trl")
# Those of Unsloth's requirements that decide whether it works with what is installed.
DECISIVE = ("torch", "torchvision", "transformers", "peft", "trl", "datasets", "bitsandbytes", "accelerate")
COMPILE_LOCATION = "UNSLOTH_COMPILE_LOCATION"

_kept: list[tempfile.TemporaryDirectory[str] | Lease] = []  # until the process ends


class UnslothStartError(RuntimeError):
    """Unsloth cannot be used in this process; the message says why, and the fix."""


def problem() -> str:
    """Why Unsloth cannot be used with what is installed; empty when it can."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    found, zoo, mend = _version("unsloth"), _version("unsloth_zoo"), install_extra("unsloth")
    if found is None or zoo is None or find_spec("unsloth") is None:
        return f"backend 'unsloth' needs Unsloth, which is not installed; {mend}"
    if Version(found) < Version(OLDEST):
        return f"Unsloth {found} is older than {OLDEST}, the oldest that backend 'unsloth' knows; {mend}"
    for needed in map(Requirement, requires("unsloth") or ()):
        if needed.name not in DECISIVE or (needed.marker and not needed.marker.evaluate({"extra": ""})):
            continue
        installed = _version(needed.name)
        if installed is None or not needed.specifier.contains(installed, prereleases=True):
            there = "none is" if installed is None else f"{installed} is"
            return f"Unsloth {found} needs {needed.name}{needed.specifier}, and {there} installed; {mend}"
    return ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def import_first(say: Callable[[str], None]) -> None:
    """Lease a GPU, then import Unsloth; without a GPU do nothing, since its tests will be skipped.

    Args:
        say: Told, in whole sentences, while others hold the GPU.

    Raises:
        UnslothStartError: What it patches is there already, its compiled code is left from another run, no GPU
            can be leased, or its import fails.
    """
    from pytest_qvl.gpu.errors import LeaseError
    from pytest_qvl.gpu.lease import acquire
    from pytest_qvl.gpu.visible import VisibleDevicesError, visible_gpus

    if "unsloth" in sys.modules:
        return
    there = [name for name in PATCHED if name in sys.modules]
    if there:
        raise UnslothStartError(
            f"Unsloth has to be imported before what it patches, and {' and '.join(there)} had been imported when "
            "pytest started (a plugin, a module given with -p, sitecustomize); import it later there, in a fixture or "
            "a test"
        )
    try:
        visible = visible_gpus()
        if not visible.gpus:
            return
        use_own_compile_folder()
        _kept.append(acquire(visible, say=say))
    except (LeaseError, VisibleDevicesError) as error:
        raise UnslothStartError(str(error)) from None
    # Its own switches, by what its source reads. Compiled code is for figures: set the first to 0.
    os.environ.setdefault("UNSLOTH_COMPILE_DISABLE", "1")
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    try:
        with quiet():
            __import__("unsloth")
            let_compiled_code_be()
    except Exception as error:
        first = (str(error).strip() or "no reason given").splitlines()[0]
        raise UnslothStartError(f"Unsloth could not be imported: {type(error).__name__}: {first}") from None


def use_own_compile_folder() -> None:
    """Let Unsloth write the code that it generates into a folder of this process, not the user's.

    Raises:
        UnslothStartError: The user names a folder that holds code already: it would run unseen.
    """
    given = os.environ.get(COMPILE_LOCATION)
    if given is None:
        folder = tempfile.TemporaryDirectory(prefix="qvl-unsloth-", ignore_cleanup_errors=True)
        _kept.append(folder)
        os.environ[COMPILE_LOCATION] = str(Path(folder.name) / "compiled")
    elif any(Path(given).glob("*.py")):
        raise UnslothStartError(
            f"{COMPILE_LOCATION}={given} holds compiled code of an earlier run, which Unsloth would run as it is; "
            "empty that folder, or unset the variable and a new one is used"
        )


def let_compiled_code_be() -> None:
    """Undo what pytest and CI change about torch.compile; call once torch is imported."""
    # Where CI is set, torch makes an error of what it warns of anywhere else (its issue 182006): with 2.11 also of an
    # operator of its own, inductor::_alloc_from_pool.
    config: Any = import_module("torch._functorch.config")
    if hasattr(config, "error_on_custom_op_aliasing"):
        config.error_on_custom_op_aliasing = False
    # pytest listens to loggers that do not propagate, and this one writes every step of a compilation, with the tensors
    # in it, to whoever listens: thousands of lines in the report of a test that failed.
    if "TORCH_TRACE" not in os.environ:
        logging.getLogger("torch.__trace").disabled = True


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress all output (Unsloth's banner) and the warnings of modules that are imported inside the block."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
