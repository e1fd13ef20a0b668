"""The callback."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_callback import TrainerCallback

from pytest_qvl.evidence import CannotJudge
from pytest_qvl.training.findings import GuardWarning
from pytest_qvl.training.settings import (
    RECORD_NAME,
    Settings,
    adapter_policy,
    declared_layers,
    record_path,
    size_limit,
)

if TYPE_CHECKING:
    from pytest_qvl.checks.quantization import QuantizationPolicy
    from pytest_qvl.models.policy import AdapterPolicy
    from pytest_qvl.models.quantized_layers import QuantizedLayers
    from pytest_qvl.training.run import Moment, Run
    from pytest_qvl.training.settings import Learned, OnFinding, VisionGradients


class Guard(TrainerCallback):  # type: ignore[misc]  # Transformers has no types
    """Stops a broken training at its first step, with the evidence; costs a healthy one nothing but a little time.

    ``Trainer(..., callbacks=[Guard()])``, and TRL's ``SFTTrainer`` alike. What is judged when is in docs/guard.md. The
    training is bitwise what it is without the guard: nothing is drawn from the data loader, no generator of random
    numbers is moved, no extra forward is run.

    Args:
        processor: The processor that makes the batches; the trainer's ``processing_class`` if not given.
        every: The first two steps are judged, and every so many.
        batches: How many batches are judged before it comes to a sample of them, gradient accumulation counted apart.
        policy: What is adapted or trained on purpose, as an ``AdapterPolicy`` or as text (``"language, vision"``,
            ``"language, merger:full"``); the text side if not given, and nothing of it where it is not named.
        quantization: What the quantization is held to; NF4 on the language backbone if not given, the rest as the
            model's configuration asks, and nothing where no layer is in 4 bits.
        quantized_layers: Which layers are in 4 bits on purpose, as ``QuantizedLayers`` or as text (``"language,
            in_proj_a:16bit"``); those of the language backbone if not given. How they are is then as the model's
            configuration asks.
        lora_config: What the adapter is held to; the configuration that PEFT keeps on the model if not given.
        learned: ``"everything"`` where the loss counts prompts on purpose.
        vision_gradients: Back-propagation through the frozen vision tower costs time and breaks nothing, and on
            Transformers 5 gradient checkpointing alone begins it: ``"warn"``, ``"stop"``, or ``"spare"`` to remove the
            hooks that cause it when training begins.
        vram_limit: Largest peak allocated on this process's GPU, in bytes or as text (``"15 GiB"``).
        overhead: Share of the training's time that reading the base may take; decides how much of it is read at a time.
        on_finding: ``"stop"`` raises :class:`pytest_qvl.training.GuardError`; ``"warn"`` warns and goes on.
        record: Where the record goes, as JSON; ``qvl_guard.json`` in the trainer's ``output_dir`` if not given, nowhere
            if False.

    Raises:
        InputError: A value that guards nothing, or an argument of another type.
    """

    def __init__(
        self,
        processor: Any = None,
        *,
        every: int = 10,
        batches: int = 2,
        policy: AdapterPolicy | str | None = None,
        quantization: QuantizationPolicy | None = None,
        quantized_layers: QuantizedLayers | str | None = None,
        lora_config: Any = None,
        learned: Learned = "answers",
        vision_gradients: VisionGradients = "warn",
        vram_limit: str | int | None = None,
        overhead: float = 0.01,
        on_finding: OnFinding = "stop",
        record: str | Path | bool = True,
    ) -> None:
        self.settings = Settings(
            processor,
            every,
            batches,
            adapter_policy(policy),
            quantization,
            declared_layers(quantized_layers),
            lora_config,
            learned,
            vision_gradients,
            size_limit(vram_limit),
            overhead,
            on_finding,
            record_path(record),
        )
        self._run: Run | None = None
        self._seconds = 0.0

    @property
    def seconds(self) -> float:
        """What the guard itself has taken of the present training, or of the last one."""
        return self._seconds if self._run is None else self._run.seconds

    def on_train_begin(self, args: Any, state: Any, _control: Any, **kwargs: Any) -> None:
        """Judge what there is before the first batch, and hook what will pass."""
        from pytest_qvl.training.alive import inside_train
        from pytest_qvl.training.batches import no_processor
        from pytest_qvl.training.beginning import told
        from pytest_qvl.training.record import Record
        from pytest_qvl.training.run import Run
        from pytest_qvl.training.subject import Subject, whole_model
        from pytest_qvl.training.verdicts import Verdicts

        self._close()
        try:
            parts = whole_model(kwargs["model"])
        except CannotJudge as error:
            warnings.warn(f"the guard judges nothing of this training: {error}", GuardWarning, stacklevel=2)
            return
        processor = self.settings.processor or kwargs.get("processing_class") or kwargs.get("tokenizer")
        subject = Subject(
            parts, args, kwargs.get("optimizer"), kwargs.get("lr_scheduler"), processor, self.settings.policy
        )
        verdicts = Verdicts(
            Record(self._path(args), self.settings.as_dict(), told(subject)), self.settings.on_finding, args
        )
        step, last = int(state.global_step), int(state.max_steps)
        self._run = Run(self.settings, subject, verdicts, step=step, last=last, alive=inside_train(state))
        if reason := no_processor(processor):
            warnings.warn(f"the guard judges no batch: {reason}", GuardWarning, stacklevel=2)
        self._guarded("begin")

    def on_pre_optimizer_step(self, _args: Any, _state: Any, _control: Any, **_kwargs: Any) -> None:
        """Judge gradients while they are alive."""
        self._guarded("before_step")

    def on_optimizer_step(self, _args: Any, _state: Any, _control: Any, **_kwargs: Any) -> None:
        """Judge what the step has moved."""
        self._guarded("after_step")

    def on_step_end(self, _args: Any, _state: Any, _control: Any, **_kwargs: Any) -> None:
        """Judge what the step has not moved."""
        self._guarded("end_step")

    def on_save(self, _args: Any, _state: Any, _control: Any, **_kwargs: Any) -> None:
        """Hold the files against the model."""
        self._guarded("save")

    def on_train_end(self, _args: Any, _state: Any, _control: Any, **_kwargs: Any) -> None:
        """Judge the base once more, and write the record."""
        self._guarded("end")
        self._close()

    def _guarded(self, moment: Moment) -> None:
        if self._run is None:
            return
        try:
            self._run.judged(moment)
        except BaseException:
            self._close()
            raise

    def _close(self) -> None:
        if self._run is not None:
            self._seconds = self._run.seconds
            self._run.close()
            self._run = None

    def _path(self, args: Any) -> Path | None:
        if self.settings.record is False:
            return None
        return Path(args.output_dir) / RECORD_NAME if self.settings.record is True else Path(self.settings.record)
