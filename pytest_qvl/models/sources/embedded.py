"""Where the package's own data are: inside the installed package, or in the checkout it is imported from."""

from __future__ import annotations

from pathlib import Path

EMBEDDED_SHA256 = "fe8d0faea6c67519b71aa3be00004c61ac0a82415850b6869779cf60fabe9ccc"  # of its model.safetensors

_PACKAGE = Path(__file__).resolve().parents[2]


def embedded_model_dir() -> Path:
    """Folder of the embedded model's checkpoint.

    A wheel carries it as ``pytest_qvl/_data/embedded``; a checkout (also installed with ``pip install -e``)
    has it in ``fixtures/embedded``, the one place where it is edited. The packaged copy goes first, because
    only a wheel has one.

    Raises:
        FileNotFoundError: Neither is there: the installation is broken.
    """
    packaged = _PACKAGE / "_data" / "embedded"
    checkout = _PACKAGE.parent / "fixtures" / "embedded"
    for folder in (packaged, checkout):
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(
        f"the embedded model is missing: neither {packaged} nor {checkout} has a config.json. "
        "Reinstall pytest-qvl, or in a checkout restore fixtures/embedded with git."
    )
