"""Every check on one case, with a small fixed set of probes."""

from __future__ import annotations

import inspect
import traceback
from operator import attrgetter, methodcaller
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_qvl import checks
from pytest_qvl.checks.declared import declared, needing
from pytest_qvl.checks.support.code_places import is_own
from pytest_qvl.checks.support.packing import is_packed, pack
from pytest_qvl.evidence import CannotJudge, CheckFailed, ModelCrashed
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.vram.forecast.runnable import NotRunnableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pytest_qvl.faults.case import Case
    from pytest_qvl.faults.subject import Subject
    from pytest_qvl.samples.batch import PaddingSide

PASS, CAUGHT, REFUSED, UNDECIDED, CRASHED = "pass", "caught", "refused", "cannot judge", "crashed"
BOTH_SIDES: tuple[PaddingSide, ...] = ("left", "right")
WELLFORMED_PROBES = 10


class Verdict(NamedTuple):
    """What one check said of one case.

    Attributes:
        outcome: ``"pass"``; ``"caught"`` (:class:`CheckFailed`); ``"refused"``: the check turned its inputs down with
            a sentence (``ValueError`` from the check itself, which fails a test as well); ``"cannot judge"``
            (a skip); ``"crashed"``: an exception out of the model, which a test without any check would see.
        message: What it said.
    """

    outcome: str
    message: str = ""

    @property
    def noticed(self) -> bool:
        """Whether the check fails with words of its own."""
        return self.outcome in (CAUGHT, REFUSED)


def all_checks(device: str = "cpu") -> dict[str, Callable[[Case], Any]]:
    """Every check that a device allows by name, as a function of a case: ``"cuda"`` has one more than ``"cpu"``."""
    left_out = {*needing("forecast"), *(needing("gpu") if device != "cuda" else ())}
    return {name: _CALLS.get(name) or _plain(name) for name in declared() if name not in left_out}


def _plain(name: str) -> Callable[[Case], Any]:
    """A check on a case, each argument that it cannot do without by its name."""
    samples = "probes" if name in needing("knowledge") else "rows"
    givers: dict[str, Callable[[Case], Any]] = {
        "model": attrgetter("model"),
        "processor": attrgetter("processor"),
        "reference": attrgetter("reference"),
        "samples": attrgetter(samples),
        "batch": methodcaller("batch"),
        "batches": methodcaller("batch"),
    }

    def call(case: Case) -> Any:
        check = getattr(checks, name)
        required = [p.name for p in inspect.signature(check).parameters.values() if p.default is p.empty]
        return check(**{parameter: givers[parameter](case) for parameter in required})

    return call


def _training(case: Case) -> Any:
    return case.batch(padding_side="right", answers=True)


def _with_videos(name: str, call: Callable[[Case], Any]) -> Callable[[Case], Any]:
    """A check on its usual inputs, and on videos over noise, padded on either side."""

    def both(case: Case) -> Any:
        call(case)
        return [getattr(checks, name)(case.model, case.clips(padding_side=side, noise=True)) for side in BOTH_SIDES]

    return both


def _on_both_sides(name: str, samples: Callable[[Case], Any]) -> Callable[[Case], Any]:
    def call(case: Case) -> Any:
        return [getattr(checks, name)(case.model, case.batch(samples(case), padding_side=side)) for side in BOTH_SIDES]

    return call


def _placeholder_counts(case: Case) -> None:
    _on_both_sides("placeholder_counts", attrgetter("rows"))(case)
    checks.placeholder_counts(case.model, _training(case))


def _causality(case: Case) -> None:
    checks.causality(case.model, case.batch())
    checks.causality(case.model, _training(case))


def _mrope_positions(case: Case) -> None:
    checks.mrope_positions(case.model, case.batch())
    checks.mrope_positions(case.model, _training(case), training=True)


def _training_step(case: Case) -> None:
    for checkpointing in (False, True):
        checks.training_step(
            case.model, _training(case), gradient_checkpointing=checkpointing, make_optimizer=case.make_optimizer
        )


def _gradient_arithmetic(case: Case) -> None:
    for checkpointing in (False, True):
        checks.gradient_arithmetic(case.model, _training(case), gradient_checkpointing=checkpointing)


def _vision_not_backpropagated(case: Case) -> None:
    for checkpointing in (False, True):
        checks.vision_not_backpropagated(case.model, _training(case), gradient_checkpointing=checkpointing)


def _batch(case: Case) -> None:
    for batch in (case.batch(), _training(case)):
        checks.batch(batch, case.processor, case.model, case.rows)
    checks.batch(case.clips(), case.processor, case.model)


def _packing_isolation(case: Case) -> None:
    batch = _training(case)
    packed = batch if is_packed(batch) else pack(anatomy(case.model), batch)
    checks.packing_isolation(case.model, packed, case.reference)


def _peak_vram(case: Case) -> None:
    from pytest_qvl.vram.meter import Meter

    checks.peak_vram(case.model, case.batch(), _training(case), Meter())


# Checks that take more of a case than the arguments they cannot do without, or other inputs than the usual ones.
_CALLS: dict[str, Callable[[Case], Any]] = {
    "peak_vram": _peak_vram,
    "weights_as_stored": lambda c: checks.weights_as_stored(c.model, c.checkpoint),
    "quantization_census": lambda c: checks.quantization_census(c.model, c.policy),
    "adapter_census": lambda c: checks.adapter_census(c.model, c.lora_config, c.optimizer),
    "adapter_roundtrip": lambda c: checks.adapter_roundtrip(c.model, c.adapter_folder),
    "placeholder_counts": _with_videos("placeholder_counts", _placeholder_counts),
    "causality": _causality,
    "feature_scatter": _with_videos(
        "feature_scatter", _on_both_sides("feature_scatter", lambda c: [sample.noise(seed=0) for sample in c.rows])
    ),
    "picture_pairing": lambda c: [
        checks.picture_pairing(c.model, c.processor, c.rows, batch) for batch in (c.batch(), _training(c))
    ],
    "mrope_positions": _with_videos("mrope_positions", _mrope_positions),
    "decode_positions": lambda c: [
        checks.decode_positions(c.model, batch) for batch in (c.batch(), c.long_batch(), c.clips())
    ],
    "generation_wellformed": lambda c: checks.generation_wellformed(
        c.model, c.processor, c.probes[:WELLFORMED_PROBES], c.reference
    ),
    "training_step": _training_step,
    "vision_not_backpropagated": _vision_not_backpropagated,
    "label_mask": lambda c: checks.label_mask(c.model, _training(c), c.processor),
    "layer_arithmetic": lambda c: checks.layer_arithmetic(c.model, c.batch(), c.lora_config),
    "training_collation": lambda c: checks.training_collation(c.processor, c.rows, _training(c)),
    "batch": _batch,
    "packing_isolation": _packing_isolation,
    "gradient_arithmetic": _gradient_arithmetic,
    "loss_arithmetic": lambda c: checks.loss_arithmetic(c.model, _training(c), trainer=c.trainer),
    "frozen_vision": lambda c: checks.frozen_vision(c.model, _training(c), make_optimizer=c.make_optimizer),
}


def judge(case: Case, check: str) -> Verdict:
    """Run one check on a case and turn what it raises into a verdict."""
    return attempt(lambda: all_checks(case.subject.device)[check](case), case.subject)


def attempt(call: Callable[[], object], subject: Subject) -> Verdict:
    """Call something that may raise what checks raise, and turn that into a verdict."""
    import torch

    try:
        with torch.random.fork_rng(devices=subject.random_devices()):
            call()
    except (ModelCrashed, NotRunnableError) as failure:
        return Verdict(CRASHED, str(failure))
    except CheckFailed as failure:
        return Verdict(CAUGHT, str(failure))
    except CannotJudge as reason:
        return Verdict(UNDECIDED, str(reason))
    except ValueError as error:
        *_, (innermost, _line) = traceback.walk_tb(error.__traceback__)
        return Verdict(REFUSED if is_own(innermost) else CRASHED, str(error))
    except Exception as error:
        return Verdict(CRASHED, f"{type(error).__name__}: {error}")
    return Verdict(PASS)


def judge_all(case: Case, names: Iterable[str] = ()) -> dict[str, Verdict]:
    """Run the named checks on a case, or all of them; verdicts by check."""
    return {name: judge(case, name) for name in (names or all_checks(case.subject.device))}


def smoke(case: Case) -> Verdict:
    """The test that most projects have: one training step and a generation; does it raise, is there text?"""
    import torch

    try:
        with torch.random.fork_rng(devices=case.subject.random_devices()):
            wrapped = case.model
            wrapped.train()
            loss = wrapped(**case.batch(padding_side="right", answers=True), use_cache=False).loss
            loss.backward()
            if not bool(torch.isfinite(loss)):
                return Verdict(CAUGHT, f"the loss is {float(loss)}")
            wrapped.zero_grad(set_to_none=True)
            wrapped.eval()
            with torch.no_grad():
                batch = case.batch()
                made = wrapped.generate(**batch, max_new_tokens=8, do_sample=False)
    except Exception as error:
        return Verdict(CRASHED, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    tokenizer = case.processor.tokenizer
    new = made[:, batch["input_ids"].shape[1] :]
    text = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in new]
    return Verdict(PASS, text[-1]) if any(text) else Verdict(CAUGHT, "no text")
