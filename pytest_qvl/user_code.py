"""A name out of a module or script of the user's, which runs as it is imported, and what an error of it says."""

from __future__ import annotations

import importlib
import sys
from contextlib import redirect_stdout
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any


def imported(module: str, name: str) -> Any:
    """What a module, or a script that ends with ``.py``, calls by a name, the current folder first on the path.

    What it prints as it runs goes to stderr: stdout is for the command's own answer, which a program may read.

    Args:
        module: A module's dotted name, or the path of a script.
        name: Of an attribute; dotted for one of one of those.

    Raises:
        ValueError: It cannot be imported; says why in one sentence.
    """
    sys.path.insert(0, str(Path.cwd()))
    try:
        with redirect_stdout(sys.stderr):
            found: Any = _script(Path(module)) if module.endswith(".py") else importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{module}:{name} cannot be imported: {said_by(error)}") from None
    finally:
        sys.path.remove(str(Path.cwd()))
    return found


def said_by(error: BaseException) -> str:
    """The class of an error of the user's code, and what it says, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _script(file: Path) -> Any:
    spec = spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
