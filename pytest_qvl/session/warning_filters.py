"""Noise of other packages that is none of a test's business: silenced narrowly, each with its source."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

# (message, category, module): regular expressions matched from the start.
WARNINGS: tuple[tuple[str, type[Warning], str], ...] = (
    # Importing PEFT or bitsandbytes brings in torch modules that are still scripted (torch/jit/_script.py,
    # torch 2.9 and later).
    (r"`torch\.jit\.script(_method)?` is (deprecated|not supported)", DeprecationWarning, r"torch\.jit\."),
    # torchao 0.18, which Unsloth brings and PEFT then imports, where it is compiled for the first time
    # (torchao/quantization/quant_api.py).
    (
        r"invalid escape sequence",
        SyntaxWarning if sys.version_info >= (3, 12) else DeprecationWarning,
        r".*torchao",
    ),
    # PEFT 0.21 asks Transformers 5.23 by the old names when it wraps a model (peft/peft_model.py, peft/utils/other.py).
    (
        r"`?(is_gradient_checkpointing|gradient_checkpointing_enable)`? is deprecated",
        FutureWarning,
        r"(peft|transformers)\.",
    ),
)

# (logger, beginning of the line).
LOG_LINES = (
    # Optional CPU kernels that bitsandbytes looks for at import (bitsandbytes/backends/cpu/ops.py, 0.50).
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"),
)


class _LineFilter(logging.Filter):
    def __init__(self, beginning: str) -> None:
        super().__init__()
        self._beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self._beginning)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _LineFilter) and other._beginning == self._beginning

    def __hash__(self) -> int:
        return hash(self._beginning)


# Everybody's modules but this package's, and the conftests and tests, which are the user's.
# By dotted name, or by path where pytest itself places a warning.
_OTHERS = re.compile(r"(?!(.*[./])?(pytest_qvl([./]|$)|conftest$|test_[^./]*$|[^./]*_test$)|__main__$)")


class _Never(Warning):
    """A category that no warning has, so that a filter for it changes nothing."""


def spare() -> None:
    """Show warnings of third parties that the filters at hand would raise, until the filters are put back.

    The user's filters keep their order and effect: before each that makes errors of warnings from every module goes one
    that makes none of other packages' warnings. One that names a module means it, and stays alone.
    """
    spared: list[Any] = []
    for action, message, category, module, line in warnings.filters:
        if action == "error" and module is None and not line:
            spared.append(("default", message, category, _OTHERS, 0))
        spared.append((action, message, category, module, line))
    warnings.filters[:] = spared  # type: ignore[index]
    warnings.simplefilter("ignore", _Never, append=True)  # makes Python look at the changed list


@contextmanager
def spared() -> Iterator[None]:
    """:func:`spare` for the length of a block."""
    with warnings.catch_warnings():
        spare()
        yield


def register(config: pytest.Config) -> None:
    """Silence the warnings for users whose ini says ``filterwarnings = error``."""
    for message, category, module in WARNINGS:
        config.addinivalue_line("filterwarnings", f"ignore:{message}:{category.__name__}:{module}")


def filter_for_test() -> None:
    """Silence them for the test that is about to be set up; ``-W error`` comes after the ini and would win.

    pytest puts the warning filters back after each test.
    """
    for message, category, module in WARNINGS:
        warnings.filterwarnings("ignore", message, category, module)
    for logger, beginning in LOG_LINES:
        logging.getLogger(logger).addFilter(_LineFilter(beginning))  # an equal filter is not added twice
