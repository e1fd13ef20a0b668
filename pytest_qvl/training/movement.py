"""Whether a step reaches every adapter tensor, and moves those that the optimizer's own rule moves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.lora import SINGULAR_VALUES, layer_of, matrix_of, zero_initialised_matrices
from pytest_qvl.checks.support.teaching import reentrant_hint
from pytest_qvl.checks.support.wording import some, tally
from pytest_qvl.evidence import CannotJudge, Evidence, Judge
from pytest_qvl.models.fingerprint.digests import Fingerprint
from pytest_qvl.models.quantized import dtype_name
from pytest_qvl.training.replay import CannotReplayError, rule_stands_still, rule_takes_no_step, state_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from pytest_qvl.training.subject import Subject

# Matrices of which every training batch gives the whole a gradient; rows of an embedding wait for their token.
_REACHED = ("lora_A", "lora_B")


class Movement:
    """What one optimizer step does to the adapter.

    Args:
        subject: What is trained.

    Attributes:
        undecided: Whether a tensor stood still at the last judged step of which the next step has to be judged.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._fingerprint = Fingerprint()
        self._before: dict[str, int] = {}
        self._states: dict[str, dict[str, Any]] = {}
        self._stood_still: frozenset[str] = frozenset()
        self.undecided = False
        self._peaks: dict[str, float | None] = {}

    def gradients(self, step: int, *, images: bool, scaled: bool, loss: float) -> Evidence:
        """Hold the gradients of a step to be finite, on what may be trained alone, and on all of it that they reach.

        While B is zero the gradient of A is exactly zero (LoRA, arXiv:2106.09685, section 4.1), so that A is held to
        have one from where B has left zero.

        Args:
            step: The step that is about to be taken, counted from 1.
            images: Whether its batches had images; without them nothing reaches vision tower and merger.
            scaled: Whether a loss scaler may skip the step, which it does where gradients overflow.
            loss: Of the step; where it is exactly 0 so are gradients.

        Raises:
            CheckFailed: Names the tensors.
        """
        self._peaks = {}
        subject, trained = self._subject, self._subject.trained
        judge = Judge("gradients", f"the gradients of step {step} are finite, on the adapter alone, and on all of it")
        stray = [name for name, p in subject.base.items() if p.requires_grad or p.grad is not None]
        judge.equal(
            "other tensors with a gradient",
            len(stray),
            0,
            else_say=f"{len(stray)} tensors that are not the adapter's take gradients, in "
            f"{tally(map(subject.parts.group_of, stray))}: {some(stray)}; freeze them (requires_grad_(False)), or "
            "declare what is trained on purpose (policy)",
        )
        self._peaks = _peaks(trained)
        wild = [name for name, peak in self._peaks.items() if peak is not None and not math.isfinite(peak)]
        judge.report("gradients not finite", len(wild))
        if wild and not scaled:
            judge.problem(
                f"{len(wild)} of {len(trained)} gradients are not finite, first {some(wild)}: with this step every "
                "weight would be NaN; look for a loss over no token, float16 without a scaler, or a batch whose "
                "activations overflow"
            )
        if not wild:
            self._judge_reached(judge, trained, images=images, loss=loss)
        judge.report("largest gradient", max((p for p in self._peaks.values() if p is not None), default=0.0))
        return judge.verdict()

    def _judge_reached(self, judge: Judge, trained: Mapping[str, nn.Parameter], *, images: bool, loss: float) -> None:
        here = [name for name in trained if images or not self._subject.in_vision(name)]
        # Rows of embeddings and copies of modules may wait for their token; they must have been in the graph once.
        pathless = [name for name in here if self._peaks[name] is None and matrix_of(name) in _REACHED]
        judge.every(
            "adapter tensors with a gradient",
            here,
            pathless,
            else_say=lambda off: (
                f"the gradient has no path to {off} adapter tensors: {some(pathless)}{no_path_hint(self._subject)}"
            ),
        )
        awake = self._awake(here)
        silent = [name for name in awake if self._peaks[name] == 0.0]
        if silent and loss != 0.0:
            judge.problem(
                f"the gradient is exactly zero at {len(silent)} of {len(awake)} adapter tensors that a step has to "
                f"reach: {some(silent)}; is the output of their layers used, and is any token of the batch supervised?"
            )
        if loss == 0.0:
            judge.note("the loss is exactly 0, so that gradients are too")

    def _awake(self, names: list[str]) -> list[str]:
        """Those LoRA matrices whose gradient is not multiplied by a zero matrix on its way."""
        adapters = self._subject.allowed
        if any(matrix_of(name) == SINGULAR_VALUES for name in adapters):
            return []  # AdaLoRA takes ranks away, and their gradients with them
        lora = [name for name in names if matrix_of(name) in _REACHED]
        gates = zero_initialised_matrices({name: adapters[name] for name in adapters if matrix_of(name)})
        shut = {layer_of(name) for name, peak in _largest(gates).items() if not peak}
        return [name for name in lora if name in gates or layer_of(name) not in shut]

    def remember(self) -> None:
        """Note the adapter's values before the step, and the optimizer's state of tensors that stood still before."""
        trained, optimizer = self._subject.trained, self._subject.optimizer
        self._before = self._fingerprint.read(trained.items())
        states = {name: state_of(optimizer, p, copied=name in self._stood_still) for name, p in trained.items()}
        self._states = {name: state for name, state in states.items() if state is not None}

    def moved(self, step: int) -> Evidence:
        """Hold the step to have moved every tensor that the optimizer's own rule moves.

        Expected of a tensor with a gradient whose parameter group has a learning rate above 0. Where one stands still
        all the same, the step is taken once more on a copy, from the optimizer's state before it
        (:func:`pytest_qvl.training.replay.rule_stands_still`): a tensor whose dtype loses every element's step, as at
        the beginning of a warm-up in bfloat16, is noted and not held to anything, unless no tensor moves and the rule
        would not even move zeros. No state is kept in advance: a tensor that first stands still after its first step is
        judged at the next one (:attr:`undecided`).

        Raises:
            CheckFailed: Names the tensors that stand still.
            CannotJudge: What was there before the step is not known, or the optimizer's rule cannot be asked although
                other tensors moved.
        """
        if not self._before or not self._peaks:
            raise CannotJudge("values and gradients before the step were not read")
        trained, rates = self._subject.trained, self._subject.rates()
        after = self._fingerprint.read(trained.items())
        judge = Judge("adapter_moved", f"step {step} moves every adapter tensor that has a gradient")
        steep = [n for n in trained if self._peaks.get(n) and rates.get(id(trained[n]), 0) != 0]
        still = [name for name in steep if after[name] == self._before.get(name)]
        found, unknown = self._sort(judge, steep, still)
        self._before, self._states, self._stood_still = {}, {}, frozenset(still)
        judge.every(
            "tensors that the step moved",
            steep,
            found,
            else_say=lambda off: (
                f"step {step} did not move {off} adapter tensors that have a gradient: {some(found)}; "
                f"{_why_still([trained[n] for n in found], rates)}"
            ),
        )
        evidence = judge.verdict()
        if unknown:
            raise CannotJudge(unknown)
        return evidence

    def _sort(self, judge: Judge, steep: list[str], still: list[str]) -> tuple[list[str], str]:
        """Those of the tensors that stand still which should have moved; and why others could not be judged."""
        trained, optimizer = self._subject.trained, self._subject.optimizer
        found: list[str] = []
        small: list[str] = []
        unknown = ""
        later = [name for name in still if name not in self._states]
        for name in still:
            if name in self._states:
                try:
                    lost = rule_stands_still(optimizer, trained[name], self._states[name])
                    (small if lost else found).append(name)
                except CannotReplayError as error:
                    unknown = f"{len(still)} of {len(steep)} tensors stand still, and {error}"
        # Whatever the rule is, a step moves something, or would if no dtype hid it.
        if (
            len(still) == len(steep)
            and not later
            and all(rule_takes_no_step(optimizer, trained[name], self._states[name]) for name in small)
        ):
            found, small, unknown = still, [], ""
        if small:
            dtypes = tally(dtype_name(trained[name].dtype) for name in small)
            judge.note(
                f"{len(small)} of {len(steep)} tensors stand still because {dtypes} keeps no step as small as this "
                f"learning rate takes: {some(small)}"
            )
        if later:
            judge.note(f"{len(later)} of {len(steep)} tensors stand still, which the next step decides: {some(later)}")
        self.undecided = bool(later)
        return found, unknown


def _peaks(parameters: Mapping[str, nn.Parameter]) -> dict[str, float | None]:
    """The largest magnitude of each gradient; None where there is no gradient."""
    grads = {n: p.grad.detach() for n, p in parameters.items() if p.grad is not None and p.grad.numel()}
    return {**dict.fromkeys(parameters), **_largest(grads)}


def _largest(tensors: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The largest magnitude in each tensor, brought to the host at once."""
    import torch

    if not tensors:
        return {}
    with torch.no_grad():
        norms = [norm.float() for norm in torch._foreach_norm(list(tensors.values()), math.inf)]
    if len({norm.device for norm in norms}) > 1:
        norms = [norm.cpu() for norm in norms]
    return dict(zip(tensors, torch.stack(norms).tolist(), strict=True))


def no_path_hint(subject: Subject) -> str:
    """What most likely keeps a gradient from the adapter, as the end of a sentence."""
    return reentrant_hint(subject.parts) or (
        "; is the output of their layers detached (torch.no_grad), the adapter switched off, or the layer not called?"
    )


def _why_still(still: list[nn.Parameter], rates: Mapping[int, float | None]) -> str:
    missing = sum(id(parameter) not in rates for parameter in still)
    if missing:
        return f"the optimizer does not hold {missing} of them: was it made before the adapter was attached?"
    return "the optimizer holds them, so its step is not taken, or something puts their values back"
