"""One guarded run: which judgement is made when."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytest_qvl import checks
from pytest_qvl.evidence import CannotJudge
from pytest_qvl.models.adapters import adapter_parameters
from pytest_qvl.models.backends.transformers import remove_vision_grad_hooks
from pytest_qvl.training import beginning, packed, saved, steps
from pytest_qvl.training.batches import judge_batch, no_processor
from pytest_qvl.training.movement import Movement
from pytest_qvl.training.watch import Watch
from pytest_qvl.training.weights import BaseWatch

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from pytest_qvl.evidence import Evidence
    from pytest_qvl.training.findings import Weight
    from pytest_qvl.training.settings import Settings
    from pytest_qvl.training.subject import Subject
    from pytest_qvl.training.verdicts import Verdicts

Moment = Literal["begin", "before_step", "after_step", "end_step", "save", "end"]
# Batches come in the same shapes again and again: of later ones a sample, once in as many looks at the weights.
_LOOKS_PER_BATCH = 10
# Steps before the time of one is taken: the first ones make kernels and caches.
_WARM_UP = 3
# A record is flushed to the disk, which may be far away.
_SECONDS_BETWEEN_RECORDS = 30.0


class Run:
    """A training from its first step to its last.

    Args:
        settings: The guard's.
        subject: What is trained.
        verdicts: Takes what is judged.
        step: Optimizer steps that were complete when it began; above 0 for a resumed run.
        last: Its last step.
        alive: Whether the training goes on; see :func:`pytest_qvl.training.alive.inside_train`.
    """

    def __init__(
        self,
        settings: Settings,
        subject: Subject,
        verdicts: Verdicts,
        *,
        step: int,
        last: int,
        alive: Callable[[], bool],
    ) -> None:
        self._settings, self._subject, self._verdicts = settings, subject, verdicts
        self._step, self._last = step, last
        self._taken = self._skipped = 0
        self._batches = self._in_step = self._deciding = 0
        self._step_began = self._guard_before = self._scale = 0.0
        self._watch = Watch(
            subject.parts,
            self._look_at_batch,
            self._no_path,
            compiled=bool(subject.args.torch_compile),
            alive=alive,
        )
        self._movement = Movement(subject)
        self._base: BaseWatch | None = None

    def judged(self, moment: Moment) -> None:
        """One moment of the trainer; its time counts as the guard's."""
        with self._verdicts.clock():
            getattr(self, moment)()

    @property
    def seconds(self) -> float:
        """What the guard itself has taken."""
        return self._verdicts.record.seconds

    # ---- moments of the trainer -------------------------------------------------------------------------

    def begin(self) -> None:
        """Before the first batch: the censuses, what will be trained and at which rate, and the base's digests."""
        subject, settings = self._subject, self._settings
        parts, moment = subject.parts, "before the first step"
        self._judge("adapter_switched_on", partial(beginning.adapter_switched_on, subject), moment)
        self._judge("quantization_census", self._quantization, moment)
        if adapter_parameters(parts):
            asked = beginning.lora_config_of(subject, settings.lora_config)
            census = partial(checks.adapter_census, parts.wrapped, asked, subject.optimizer, policy=settings.policy)
            self._judge("adapter_census", census, moment)
        self._judge("learning_rate", partial(beginning.learning_rate_ahead, subject, self._last - self._step), moment)
        if folder := beginning.resumed_folder(subject, self._step):
            self._judge_saved(folder, "before the first step of the resumed run", written=False)
        if settings.vision_gradients == "spare" and settings.policy.text_only:
            remove_vision_grad_hooks(parts.patch_embed)
        if not self._verdicts.found:
            self._judge("base_unchanged", self._begin_base, moment)
        self._verdicts.settle(self._step)
        self._verdicts.write(self._step)

    def before_step(self) -> None:
        """Gradients are there, clipped and unscaled where that is done, and the optimizer has not moved yet."""
        step, judge = self._step + 1, self._judge
        moment = f"before step {step} is taken"
        due = self._due(step)
        losses: list[Any] = []
        if due or self._subject.args.logging_nan_inf_filter:  # the trainer has waited for the loss itself
            losses = self._watch.take_losses()
            if due or not steps.all_finite(losses):
                judge("loss", partial(steps.losses_finite, losses), moment)
        if due:
            loss = max((float(loss.abs()) for loss in losses), default=1.0)
            gradients = partial(
                self._movement.gradients, step, images=self._watch.images, scaled=self._scaler is not None, loss=loss
            )
            judge("gradients", gradients, moment)
            judge("optimizer", partial(steps.optimizer_holds, self._subject), moment)
            rates = partial(steps.learning_rates, self._subject, step, first=not self._taken)
            judge("learning_rate", rates, moment)
            if self._subject.policy.text_only:
                self._judge_vision(moment)
            if self._base is not None and not self._taken:
                base = partial(self._base.judge, "by a forward and backward pass alone", whole=True)
                judge("base_unchanged", base, moment)
            self._verdicts.attempt(self._movement.remember, check="adapter_moved")
        if self._scaler is not None:
            self._scale = float(self._scaler.get_scale())
        self._verdicts.settle(self._step, together=due)

    def after_step(self) -> None:
        """The optimizer has moved, or a loss scaler has kept it from moving; gradients are still there."""
        step = self._step + 1
        if self._scaler is not None and steps.was_skipped(self._subject.optimizer, self._scale):
            self._skipped += 1
            scaler = partial(steps.scaler_steps, self._subject.optimizer, self._skipped)
            self._judge("loss_scaler", scaler, f"at step {step}")
            return
        if self._due(step):
            self._judge("adapter_moved", partial(self._movement.moved, step), f"at step {step}")
        self._skipped = 0
        self._taken += 1

    def end_step(self) -> None:
        """A step is complete."""
        due = self._due(self._step + 1) or self._taken in (1, 2)
        self._step += 1
        if self._movement.undecided:
            self._deciding, self._movement.undecided = self._step + 1, False
        if due:
            self._judge_base(f"after step {self._step}", whole=self._taken <= 1)
            if self._settings.vram_limit is not None:
                peak = partial(steps.peak_memory, self._settings.vram_limit, self._subject.parts.device)
                self._judge("peak_vram", peak, f"after step {self._step}")
            self._verdicts.write(self._step, at_most_every=_SECONDS_BETWEEN_RECORDS)
        self._verdicts.settle(self._step, together=due)
        self._watch.images, self._in_step = False, 0
        self._time_step()

    def save(self) -> None:
        """A checkpoint was written."""
        moment = f"at the checkpoint of step {self._step}"
        self._judge_base(moment, whole=True)
        if self._subject.args.should_save:
            self._judge_saved(Path(self._subject.args.output_dir) / f"checkpoint-{self._step}", moment, written=True)
        self._verdicts.settle(self._step)

    def end(self) -> None:
        """The training is over."""
        self._judge_base("at the end of the training", whole=True)
        self.close()
        self._verdicts.settle(self._step)
        self._verdicts.record.state = "finished"
        self._verdicts.write(self._step)

    def close(self) -> None:
        """Take the hooks off."""
        self._watch.remove()

    # ---- judgements -------------------------------------------------------------------------------------

    def _judge(self, check: str, judgement: Any, moment: str) -> bool:
        return self._verdicts.judge(judgement, check=check, step=self._step, moment=moment)

    def _quantization(self) -> Evidence:
        parts = self._subject.parts
        policy = beginning.quantization_policy(parts, self._settings.quantization, self._settings.quantized_layers)
        return checks.quantization_census(parts.wrapped, policy)

    def _begin_base(self) -> Evidence:
        self._base = BaseWatch(self._subject)
        return self._base.judge("by being read", whole=True)

    def _judge_base(self, moment: str, *, whole: bool) -> None:
        if self._base is not None:
            self._judge("base_unchanged", partial(self._base.judge, moment, whole=whole), moment)

    def _judge_vision(self, moment: str) -> None:
        watch, settings = self._watch, self._settings
        if any(map(self._subject.in_vision, self._subject.trained_of_base())):
            return  # what trains there is told of elsewhere
        spared = partial(
            steps.vision_spared, watch.calls, watch.followed, watch.vision_hooks(), watch.pixels_require_grad
        )
        if not self._taken or watch.followed:
            weight: Weight = "warn" if settings.vision_gradients == "warn" else "stop"
            self._verdicts.judge(
                spared, check="vision_not_backpropagated", step=self._step, moment=moment, weight=weight
            )

    def _judge_saved(self, folder: Path, moment: str, *, written: bool) -> None:
        parts = self._subject.parts
        if self._judge("adapter_roundtrip", partial(saved.adapter_as_saved, parts, folder, written=written), moment):
            self._judge("saved_config", partial(saved.config_as_saved, parts, folder), moment)

    def _look_at_batch(self, batch: dict[str, Any]) -> None:
        self._in_step += 1
        sampled = self._in_step == 1 and (self._step + 1) % (self._settings.every * _LOOKS_PER_BATCH) == 0
        if self._batches >= self._settings.batches and not sampled:
            return
        self._batches += 1
        with self._verdicts.clock():
            moment = f"batch {self._in_step} of step {self._step + 1}"
            judgement = partial(judge_batch, self._subject, batch, self._settings.learned)
            if self._judge("batch", judgement, moment):
                self._verdicts.attempt(partial(self._await_attention, batch, moment), check="packing")
            self._verdicts.settle(self._step, together=False)

    def _await_attention(self, batch: dict[str, Any], moment: str) -> None:
        """Of a packed batch, have what attention is given looked at when it comes to that."""
        if no_processor(self._subject.processor):
            return
        samples = packed.samples_of(self._subject, batch)
        if samples is None:
            return
        try:
            self._watch.look_at_attention(partial(self._look_at_attention, samples, f"in the forward of {moment}"))
        except CannotJudge as error:
            self._verdicts.record.skip("packing", str(error))

    def _look_at_attention(self, samples: torch.Tensor, moment: str, given: dict[str, Any]) -> None:
        with self._verdicts.clock():
            self._judge("packing", partial(packed.kept_apart, self._subject, samples, given), moment)
            self._verdicts.settle(self._step, together=False)

    def _no_path(self) -> None:
        with self._verdicts.clock():
            loss = partial(steps.loss_has_path, self._subject)
            self._judge("gradients", loss, f"in the forward of step {self._step + 1}")
            self._verdicts.settle(self._step, together=False)

    # ---- when ------------------------------------------------------------------------------------------

    @property
    def _scaler(self) -> Any:
        return getattr(self._subject.optimizer, "scaler", None)

    def _due(self, step: int) -> bool:
        """Whether a step is judged: the first two that are taken, every so many, and one that has to decide."""
        return self._taken < 2 or step % self._settings.every == 0 or step == self._deciding

    def _time_step(self) -> None:
        """Choose how much of the base is read at a time, once the time of a step is known."""
        now = time.perf_counter()
        if self._base is not None and self._taken == _WARM_UP + 1 and self._step_began:
            own = self._verdicts.record.seconds - self._guard_before
            step = max(now - self._step_began - own, 0.0)
            self._base.plan(self._settings.overhead / 2 * self._settings.every * step)
        self._step_began, self._guard_before = now, self._verdicts.record.seconds
