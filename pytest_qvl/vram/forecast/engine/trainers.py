"""What a trainer does in a training step, beyond ``model(**batch).loss.backward()``.

Followed from source: ``transformers/trainer.py`` (``_run_epoch``, ``training_step``, ``compute_loss``),
``accelerate/accelerator.py`` (``prepare_model``, ``clip_grad_norm_``) and ``trl/trainer/sft_trainer.py``
(``__init__``, ``compute_loss``).
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from pytest_qvl.models.attributes import attributes_replaced
from pytest_qvl.models.renamed import kv_cache_name
from pytest_qvl.vram.forecast import phases
from pytest_qvl.vram.forecast.engine import ddp, liger
from pytest_qvl.vram.forecast.engine.fused_head import FusedHead
from pytest_qvl.vram.forecast.engine.unsloth import SMALL_CARD, Offloading, UnslothHead, compiled_layers, lora_forwards

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_qvl.models.anatomy import Parts
    from pytest_qvl.vram.forecast.engine.workload import Stage
    from pytest_qvl.vram.forecast.request import Dtype, Request

# ``max_grad_norm`` of ``TrainingArguments``; any other value above zero gives the same memory.
MAX_GRADIENT_NORM = 1.0

# Batches of one update beyond the second find the memory as the second does: all gradients are there.
REPEATED_BATCHES = 2


class Loop:
    """``model(**batch).loss``, a batch at a time.

    Args:
        parts: The model.
        request: What is trained.
        stage: Where.

    Attributes:
        enter: Told of phases that begin within a loss.
    """

    # Whether every batch of an update is on the device before the first is used.
    fetches_ahead = False
    clips_gradients = False

    def __init__(self, parts: Parts, request: Request, stage: Stage) -> None:
        self.parts = parts
        self.request = request
        self.stage = stage
        self.enter: Callable[[str], None] = stage.phase

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """What holds while it trains."""
        yield

    def autocast(self) -> Any:
        """The autocast that the request trains under, if any."""
        return autocast(self.request.autocast_dtype, self.stage)

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """The loss of one batch."""
        with self.autocast():
            loss: torch.Tensor = self.parts.wrapped(**batch).loss
        return loss

    def loss_and_logits(self, batch: dict[str, Any]) -> tuple[torch.Tensor, tuple[Any, ...]]:
        """The loss of one batch, and all else that the model returns (``Trainer.prediction_step``).

        Of Transformers 5.24 that is what the vision tower returned too.
        """
        from transformers.trainer_pt_utils import nested_detach

        outputs = self.outputs(**batch)
        usual = [kv_cache_name(self.parts)]  # which Transformers 5.24 calls otherwise than those before it
        ignored = {"loss", *getattr(self.parts.wrapped.config, "keys_to_ignore_at_inference", usual)}
        return outputs["loss"], nested_detach(tuple(kept for name, kept in outputs.items() if name not in ignored))

    def outputs(self, **batch: Any) -> Any:
        """What the model returns."""
        with self.autocast():
            return self.parts.wrapped(**batch)


class HuggingFace(Loop):
    """Transformers' ``Trainer`` on Accelerate."""

    fetches_ahead = True
    clips_gradients = True
    # Whether Liger, where it is asked for, puts its own forward in place.
    has_ligers_head = True

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Without a KV cache, which ``Trainer.__init__`` switches off in the model's configuration; Liger's kernels."""
        config: Any = self.parts.wrapped.config
        before, config.use_cache = getattr(config, "use_cache", None), False
        try:
            with self._liger() if self.request.liger else nullcontext():
                yield
        finally:
            config.use_cache = before

    @contextmanager
    def _liger(self) -> Iterator[None]:
        base, keeps = self.parts.base, self.request.keeps_logits
        head = liger.LigerHead(self.parts, lambda: self.enter(phases.LOSS), keeps_logits=keeps)
        forward = [(base, "forward", head.forward)] if self.has_ligers_head else []
        with liger.layers(self.parts), attributes_replaced(forward):
            yield

    def outputs(self, **batch: Any) -> Any:
        """What the prepared model returns: under autocast its 16-bit outputs in fp32, copies of them under DDP."""
        from accelerate.utils.operations import convert_to_fp32

        with self.autocast():
            outputs = self.parts.wrapped(**batch)
        if self.request.autocast_dtype is not None:
            outputs = convert_to_fp32(outputs)
        return ddp.copied(outputs) if self.request.ddp else outputs

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """``Trainer.compute_loss``: the outputs live until it returns."""
        outputs = self.outputs(**batch)
        loss: torch.Tensor = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
        return loss


class TRL(HuggingFace):
    """TRL's ``SFTTrainer`` (1.15), which never has all logits."""

    has_ligers_head = False

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """The model's head replaced by the fused one."""
        base = self.parts.base
        head = FusedHead(self.parts, lambda: self.enter(phases.LOSS))
        with super().prepared(), attributes_replaced([(base, "forward", head.forward)]):
            yield

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """``SFTTrainer.compute_loss``: the sum of each token's loss over their number; metrics read what is left."""
        outputs = self.outputs(**batch, use_cache=False)
        count = outputs["label_mask"].sum()
        loss: torch.Tensor = (-outputs["log_probs"]).sum() / count.clamp(min=1)
        outputs["entropy"].detach().sum()
        outputs["is_top1"].sum()
        return loss

    def loss_and_logits(self, batch: dict[str, Any]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The loss, and logits from a second forward with the model's own head (``SFTTrainer.prediction_step``)."""
        loss = self.loss(batch)
        fused, base = self.parts.base.forward, self.parts.base
        del base.forward
        try:
            outputs = self.outputs(
                **{name: value for name, value in batch.items() if name != "labels"}, use_cache=False
            )
        finally:
            base.forward = fused
        return loss, (outputs["logits"],)


class Unsloth(HuggingFace):
    """TRL's ``SFTTrainer`` as Unsloth (2026.10.9) makes it, on the model that its ``get_peft_model`` returns."""

    def __init__(self, parts: Parts, request: Request, stage: Stage) -> None:
        super().__init__(parts, request, stage)
        self._offloading = Offloading(parts, stage)

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """From an empty cache, with its checkpoints, its LoRA layers and its loss in place."""
        base, request = self.parts.base, self.request
        small = request.device_bytes is not None and request.device_bytes <= SMALL_CARD
        head = UnslothHead(
            self.parts, lambda: self.enter(phases.LOSS), small_card=small and request.capability >= (8, 0)
        )
        checkpoints = self._offloading.installed() if request.gradient_checkpointing else nullcontext()
        compiled = compiled_layers(self.parts) if request.compiled else nullcontext()
        loss = attributes_replaced([(base, "forward", head.forward)])
        with super().prepared(), checkpoints, lora_forwards(), compiled, loss:
            self.stage.empty_cache()
            yield

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """As ever, once there are buffers for what checkpoints give away."""
        if self.request.gradient_checkpointing and torch.is_grad_enabled():
            self._offloading.begin(batch, vision=self.request.keeps_vision_hook)
        return super().loss(batch)


TRAINERS: dict[str, type[Loop]] = {"loop": Loop, "hf": HuggingFace, "trl": TRL, "unsloth": Unsloth}


class Steps:
    """Training steps: batches, losses, backward, update.

    Args:
        trainer: Computes losses.
        draw: Puts the next batch on the device.

    Attributes:
        optimizer: Updates; to be set before the first step.
    """

    optimizer: Any

    def __init__(self, trainer: Loop, draw: Callable[[], dict[str, Any]]) -> None:
        self._trainer, self._request, self._stage = trainer, trainer.request, trainer.stage
        self._draw = draw
        # A loop is measured over the same batch again and again; trainers let go of the last update's when they have
        # the next one's.
        self._batches: list[dict[str, Any]] = [] if trainer.fetches_ahead else [draw()]

    def fetch(self) -> None:
        """Every batch of the next update; those of the last one go when these are there."""
        self._batches = [self._draw() for _ in range(self._request.accumulation)]

    def update(self, enter: Callable[[str], None]) -> None:
        """Losses and gradients of the batches, and the update; ``enter`` is told of the phases after the loss."""
        self._trainer.enter = enter
        for number in range(min(self._request.accumulation, REPEATED_BATCHES)):
            self._one(self._batches[number % len(self._batches)], enter)
        enter(phases.OPTIMIZER)
        if self._trainer.clips_gradients:
            self._stage.unscale(self.optimizer)
            torch.nn.utils.clip_grad_norm_(parameters_of(self.optimizer), MAX_GRADIENT_NORM)
        with self._stage.labelled("optimizer"):
            self._stage.update(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)

    def _one(self, batch: dict[str, Any], enter: Callable[[str], None]) -> None:
        loss = self._trainer.loss(batch)
        if self._request.accumulation > 1:
            loss = loss / self._request.accumulation
        enter(phases.BACKWARD)
        self._stage.scaled(loss).backward()  # type: ignore[no-untyped-call]


def autocast(dtype: Dtype | None, stage: Stage) -> Any:
    """Autocast to a dtype; ``None`` for none."""
    if dtype is None:
        return nullcontext()
    return torch.autocast(stage.autocast_device, dtype=getattr(torch, dtype))


def parameters_of(optimizer: Any) -> list[Any]:
    """Every parameter that an optimizer updates."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def adapter_in_bfloat16(model: Any) -> None:
    """What ``SFTTrainer.__init__`` does to the adapter of a quantized model, DoRA's magnitudes left in fp32."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_magnitude_vector" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
