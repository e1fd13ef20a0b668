"""Proves that QLoRA still leaves a Qwen2.5-VL seeing. Importing this package imports nothing heavy."""

__version__: str


def __getattr__(name: str) -> str:
    """``__version__``, as the package was installed: that of the last tag, and commits since."""
    if name == "__version__":
        from pytest_qvl.releases import THIS, installed

        return installed(THIS) or "0+unknown"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
