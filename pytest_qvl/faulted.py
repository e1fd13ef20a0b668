"""``--qvl-fault``: run the shipped suite on a deliberately damaged model, to see what that failure looks like."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qvl.shipped import is_shipped

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from pytest_qvl.faults import Case
    from pytest_qvl.options import Settings

# Settings under which the case is the one that the matrix judges; a fault of another model proves nothing.
FIXED = {"model": "embedded", "adapter": None, "images": None, "backend": ("transformers",)}


def refuse_other_models(settings: Settings) -> None:
    """Faults are made for the embedded model on the CPU.

    Raises:
        pytest.UsageError: Another model, adapter, backend, device or folder of pictures was asked for as well.
    """
    asked = [name for name in FIXED if settings.source(name) != "default"]
    if settings.device == "cuda":
        asked.append("device")
    if asked:
        flags = ", ".join(f"qvl_{name} ({settings.source(name)})" for name in asked)
        raise pytest.UsageError(
            f"qvl_fault ({settings.source('fault')}): faults are shown on the embedded model on the CPU; drop {flags}"
        )


class Faulted:
    """Registered only when a fault was named.

    Args:
        settings: The run's settings.
    """

    def __init__(self, settings: Settings) -> None:
        from pytest_qvl.faults import find

        self._fault = find(settings.fault)
        self._settings = settings
        self._noticed: dict[str, bool] = {}

    @cached_property
    def _case(self) -> Case:
        from pytest_qvl.faults import healthy_case

        return healthy_case(seed=self._settings.seed)

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_call(self, item: pytest.Function) -> Generator[None, object, object]:
        """Give a test of the suite the damaged case in place of the healthy one."""
        if not is_shipped(item):
            return (yield)
        from pytest_qvl.faults import apply

        if reason := self._fault.missing():
            pytest.skip(f"the fault {self._fault.name} cannot be made here: {reason}")
        healthy = item.funcargs
        with apply(self._fault.name, self._case) as damaged:
            item.funcargs = {**healthy, **{name: make() for name, make in _inputs(damaged).items() if name in healthy}}
            try:
                return (yield)
            finally:
                item.funcargs = healthy

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note which checks noticed it."""
        found = getattr(report, "qvl", {})
        check = found.get("check")
        if check is None or report.when != "call":
            return
        if not report.skipped or found["not_judged"]:  # a fault that cannot be made here proves nothing
            self._noticed[check] = self._noticed.get(check, False) or report.failed

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Say what was damaged, which check must notice it, and which did."""
        fault = self._fault
        terminalreporter.line(f"qvl: fault {fault.name}: {fault.summary}")
        if fault.check not in self._noticed:
            terminalreporter.line(f"qvl: {fault.check} must catch it, and was not run", yellow=True)
            return
        caught = self._noticed[fault.check]
        verdict = "caught it" if caught else "DID NOT CATCH IT"
        also = [check for check, noticed in self._noticed.items() if noticed and check != fault.check]
        line = f"qvl: {fault.check} must catch it, and {verdict}; so did {', '.join(also) or 'no other check'}"
        terminalreporter.line(line if caught or also else line.partition(";")[0], green=caught, red=not caught)


def _inputs(case: Case) -> dict[str, Callable[[], Any]]:
    """What makes each fixture of the suite, had the fault been there from the start."""
    return {
        "qvl_quantized_model": lambda: case.model,
        "qvl_lora_model": lambda: case.model,
        "qvl_lora_config": lambda: case.lora_config,
        "qvl_processor": lambda: case.processor,
        "qvl_image_samples": lambda: case.probes,
        "qvl_reference": lambda: case.reference,
        "qvl_batch": lambda: case.batch,
        "qvl_adapter": lambda: case.adapter_folder,
        "qvl_optimizer": lambda: case.optimizer,
        "qvl_make_optimizer": lambda: case.make_optimizer,
        "one_of_each": lambda: case.rows,
        "noise_pictures": lambda: [sample.noise(seed=0) for sample in case.rows],
        "mixed_batch": case.batch,
        "training_batch": lambda: case.batch(padding_side="right", answers=True),
    }
