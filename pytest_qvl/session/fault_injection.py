"""``--qvl-fault``: run the shipped suite on a deliberately damaged model, to see what that failure looks like."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qvl.models.backends import BASELINE, ModelLoadError
from pytest_qvl.models.sources.model_source import ModelSourceError, parse_model
from pytest_qvl.report.injected_fault import InjectedFault
from pytest_qvl.session.errors import UserError
from pytest_qvl.session.suite_collection import is_shipped
from pytest_qvl.session.targets import Target, target_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from contextlib import AbstractContextManager

    from pytest_qvl.checks import Reference
    from pytest_qvl.faults import Case
    from pytest_qvl.options import Settings
    from pytest_qvl.report.run_results import ResultsBuilder
    from pytest_qvl.session.subjects import Subjects

# A fault is made on a setup of its own, with a fresh adapter and rendered scenes; these would have no effect.
WITHOUT_EFFECT = ("adapter", "images")


def refuse_without_effect(settings: Settings) -> None:
    """Refuse what a fault cannot be combined with.

    Raises:
        pytest.UsageError: An adapter, a folder of images or another backend was asked for as well.
    """
    asked = [name for name in WITHOUT_EFFECT if settings.source(name) != "default"]
    if settings.backend != (BASELINE,):
        asked.append("backend")
    if asked:
        flags = ", ".join(f"qvl_{name} ({settings.source(name)})" for name in asked)
        raise pytest.UsageError(
            f"qvl_fault ({settings.source('fault')}): faults are made on a setup of their own, with a fresh adapter, "
            f"rendered scenes and the backend {BASELINE!r}; drop {flags}"
        )


class Faulted:
    """Runs the suite on the damaged model; registered only when ``--qvl-fault`` names a fault.

    Args:
        fault: Its name.
        settings: The run's settings.
        default_dtype: Says which dtype a device computes in, where no setting does.
        shared: Around what one test allocates for those after it.
        builder: Is told what is damaged; the results of the run then say which checks noticed it.
        subjects: Is told what tests run on in place of what fixtures gave, where a record is asked for.
    """

    def __init__(
        self,
        fault: str,
        settings: Settings,
        default_dtype: Callable[[str], str],
        shared: Callable[[], AbstractContextManager[object]],
        builder: ResultsBuilder,
        *,
        subjects: Subjects | None = None,
    ) -> None:
        from pytest_qvl.faults import find
        from pytest_qvl.faults.common_mode import unshared

        self._subjects = subjects
        self._default_dtype, self._shared = default_dtype, shared
        self._fault = find(fault)
        self._settings = settings
        self._made: tuple[Target, Case] | None = None
        self._facts: dict[str, dict[str, Any]] = {}
        alone, asked = unshared(self._fault), settings.fault_reference == "damaged"
        self._damaged = asked and not alone
        self._reference: tuple[Target, Reference] | None = None
        recorded = f"recorded before the damage: {alone}" if alone else "recorded after the damage"
        fault_made = self._fault.name, self._fault.summary, self._fault.check
        builder.set_fault(InjectedFault(*fault_made, reference=recorded if asked else ""))

    def _case(self, item: pytest.Function) -> Case:
        """The healthy case of a test's model and device; one is kept, because a second model may not fit."""
        target = target_of(item)
        assert target is not None
        if self._made is None or self._made[0] != target:
            self._made = None
            with self._shared():
                self._made = target, self._healthy(target)
            self._facts = _described(self._made[1]) if self._subjects is not None else {}
        return self._made[1]

    def _recorded(self, item: pytest.Function, case: Case) -> Case:
        """The case with the reference that a test of the suite is to be given."""
        target = target_of(item)
        assert target is not None
        if not self._damaged or "qvl_reference" not in item.funcargs:
            return case
        if self._reference is None or self._reference[0] != target:
            from pytest_qvl.faults.common_mode import damaged_reference, in_full_precision

            with self._shared():
                self._reference = target, damaged_reference(self._fault.name, in_full_precision(case))
        return replace(case, reference=self._reference[1])

    def _healthy(self, target: Target) -> Case:
        from pytest_qvl.faults import healthy_case
        from pytest_qvl.faults.subject import Subject

        chosen: str = self._settings.compute_dtype
        dtype = self._default_dtype(target.device) if chosen == "auto" else chosen
        try:
            subject = Subject(parse_model(target.model), target.device, dtype)
            return healthy_case(seed=self._settings.seed, subject=subject)
        except (ModelLoadError, ModelSourceError) as error:
            raise UserError(f"qvl_fault ({self._settings.source('fault')}): {error}") from None

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        """Drop the model before the session is searched for memory that was left allocated."""
        self._made = None

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_call(self, item: pytest.Function) -> Generator[None, object, object]:
        """Give a test of the suite the damaged case in place of the healthy one."""
        if not is_shipped(item):
            return (yield)
        from pytest_qvl.faults import apply

        if target_of(item) is None:  # a test without a model
            return (yield)
        case = self._case(item)
        if reason := self._fault.missing(case):
            pytest.skip(f"the fault {self._fault.name} cannot be made here: {reason}")
        if self._subjects is not None:
            self._subjects.in_place(self._facts)
        healthy = item.funcargs
        with apply(self._fault.name, self._recorded(item, case)) as damaged:
            item.funcargs = {**healthy, **{name: make() for name, make in _inputs(damaged).items() if name in healthy}}
            try:
                return (yield)
            finally:
                item.funcargs = healthy


def _described(case: Case) -> dict[str, dict[str, Any]]:
    """What the record says that tests ran on: the case as it was before the damage, which the record names apart."""
    from pytest_qvl.session.subjects import described

    return described(
        {
            "qvl_lora_config": case.lora_config,
            "qvl_processor": case.processor,
            "qvl_image_samples": case.probes,
            "qvl_quantized_model": case.model,
        }
    )


def _inputs(case: Case) -> dict[str, Callable[[], Any]]:
    """What makes each fixture of the suite, had the fault been there from the start."""
    from pytest_qvl.faults.case import ROW_SKILLS
    from pytest_qvl.samples import first_of_each_skill

    return {
        "qvl_quantized_model": lambda: case.model,
        "qvl_lora_model": lambda: case.model,
        "qvl_lora_config": lambda: case.lora_config,
        "qvl_processor": lambda: case.processor,
        "qvl_image_samples": lambda: case.probes,
        "qvl_reference": lambda: case.reference,
        "qvl_batch": lambda: case.batch,
        "qvl_dataset": lambda: case.rows,
        "qvl_collator": lambda: partial(case.batch, padding_side="right", answers=True),
        "qvl_adapter": lambda: case.adapter_folder,
        "qvl_optimizer": lambda: case.optimizer,
        "qvl_make_optimizer": lambda: case.make_optimizer,
        "qvl_trainer": lambda: case.trainer,
        "row_samples": lambda: [case.rows],
        "noise_samples": lambda: [[sample.noise(seed=0) for sample in case.rows]],
        "answered_samples": lambda: [s for s in first_of_each_skill(case.probes) if s.skill in ROW_SKILLS],
        "mixed_batches": lambda: [case.batch()],
        "long_batch": case.long_batch,
        "training_samples": lambda: case.rows,
        "training_batch": lambda: case.batch(padding_side="right", answers=True),
        "rows": lambda: case.batch(padding_side="right", answers=True),
        "training_batches": lambda: [case.batch(padding_side="right", answers=True)],
    }
