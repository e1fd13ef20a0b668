"""Where the package's own data are: inside the installed package, or in the checkout it is imported from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

# The embedded models by the name behind ``embedded:``, with the SHA-256 of each one's ``model.safetensors``.
EMBEDDED_SHA256: Mapping[str, str] = MappingProxyType(
    {
        "qwen2.5-vl": "fe8d0faea6c67519b71aa3be00004c61ac0a82415850b6869779cf60fabe9ccc",
        "qwen3-vl": "f48daab5d61ef6e4a01d0dd8aef6806baddb0b0a13cdb19c9ab6bccb0f5c326d",
        "qwen3.5": "9b839c89e6cc156cea786d90f0fcb39d62fff0ae4d26b74cae8b161627d77b77",
    }
)
# The one that is meant where none is named.
FIRST = "qwen2.5-vl"

_PACKAGE = Path(__file__).resolve().parents[2]


def embedded_model_dir(name: str = FIRST) -> Path:
    """Folder of an embedded model's checkpoint.

    A wheel carries it as ``pytest_qvl/_data/embedded``; a checkout (also installed with ``pip install -e``)
    has it in ``fixtures/embedded``, the one place where it is edited. The packaged copy goes first, because
    only a wheel has one. Those of other families lie beside it, as ``embedded-NAME``.

    Args:
        name: One of :data:`EMBEDDED_SHA256`.

    Raises:
        FileNotFoundError: Neither is there: the installation is broken.
    """
    kept = "embedded" if name == FIRST else f"embedded-{name}"
    packaged = _PACKAGE / "_data" / kept
    checkout = _PACKAGE.parent / "fixtures" / kept
    for folder in (packaged, checkout):
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(
        f"the embedded model is missing: neither {packaged} nor {checkout} has a config.json. "
        f"Reinstall pytest-qvl, or in a checkout restore fixtures/{kept} with git."
    )


def embedded_names() -> tuple[str, ...]:
    """The names of all embedded models, the first one's first."""
    return tuple(EMBEDDED_SHA256)


def embedded_digest(folder: Path) -> str | None:
    """The SHA-256 of the weights of the embedded model that lies in a folder; ``None`` for any other folder."""
    here = (sha for name, sha in EMBEDDED_SHA256.items() if folder == embedded_model_dir(name).resolve())
    return next(here, None)
