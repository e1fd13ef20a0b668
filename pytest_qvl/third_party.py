"""Noise of other packages that is none of a test's business: silenced narrowly, each with its source."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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


def register(config: pytest.Config) -> None:
    """Silence the warnings for users whose ini says ``filterwarnings = error``."""
    for message, category, module in WARNINGS:
        config.addinivalue_line("filterwarnings", f"ignore:{message}:{category.__name__}:{module}")


def hush() -> None:
    """Silence them for the test that is about to be set up; ``-W error`` comes after the ini and would win.

    pytest puts the warning filters back after each test.
    """
    for message, category, module in WARNINGS:
        warnings.filterwarnings("ignore", message, category, module)
    for logger, beginning in LOG_LINES:
        logging.getLogger(logger).addFilter(_LineFilter(beginning))  # an equal filter is not added twice
