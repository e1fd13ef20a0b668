"""One healthy QLoRA setup with everything that checks look at; faults change it for the length of a block."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import find
from pytest_qvl.faults.subject import Subject, embedded
from pytest_qvl.models.adapters import LANGUAGE_ONLY
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.layers import family_of
from pytest_qvl.models.quantized import KEEP_16BIT, usual_quantization

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    import torch

    from pytest_qvl.checks import QuantizationPolicy, Reference
    from pytest_qvl.samples import Sample
    from pytest_qvl.samples.batch import PaddingSide

    Batch = dict[str, torch.Tensor]
    Collator = Callable[[Batch, Sequence[Sample]], Batch]


ROW_SKILLS = ("nth_colour", "text", "side", "list")
PROBES_PER_SKILL = 3
SEED = 0


@dataclass
class Case:
    """A model with everything that checks are given: processor, probes, reference, adapter and optimizer settings.

    Attributes:
        model: The QLoRA model, wrapped by PEFT.
        processor: Its processor.
        lora_config: The ``peft.LoraConfig`` that was asked for.
        policy: The quantization that was asked for.
        rows: Samples of the batches: several images, one, none; different lengths and grids.
        probes: Samples with known answers; `reference` was recorded for them.
        reference: What full precision makes of `probes`.
        load: Loads another model of the same source on the same device, see :func:`load`.
        subject: What :attr:`model` was loaded from, and where to.
        adapter_folder: Where the adapter was loaded from, or ``None`` for a fresh one.
        checkpoint: Folder that the model is meant to be loaded from, where it is not the one that it names.
        collators: Change a batch after the processor made it, in order.
        clip_collators: The same of rows with videos.
        optimizer: The user's optimizer, or ``None``.
        make_optimizer: Makes the optimizer of a training step from the trainable parameters, or ``None``.
        trainer: The user's trainer over the model, or a function that accumulates as theirs does, or ``None``.
    """

    model: Any
    processor: Any
    lora_config: Any
    policy: QuantizationPolicy
    rows: list[Sample]
    probes: list[Sample]
    reference: Reference
    load: Callable[..., Any]
    subject: Subject = field(default_factory=embedded)
    adapter_folder: Path | None = None
    checkpoint: Path | None = None
    collators: list[Collator] = field(default_factory=list)
    clip_collators: list[Callable[[Batch], Batch]] = field(default_factory=list)
    optimizer: Any = None
    make_optimizer: Any = None
    trainer: Any = None

    def batch(
        self,
        samples: Sequence[Sample] | None = None,
        *,
        padding_side: PaddingSide = "left",
        answers: bool = False,
    ) -> Batch:
        """Model inputs of `samples` (of :attr:`rows` if not given), as this setup collates them, on its device.

        Collators work on the CPU, as a data loader's do; what they made then goes to the device.
        """
        from pytest_qvl.samples import make_batch

        given = self.rows if samples is None else samples
        batch = make_batch(self.processor, given, padding_side=padding_side, answers=answers)
        for change in self.collators:
            batch = change(batch, given)
        return {name: _moved(tensor, self.subject.device) for name, tensor in batch.items()}

    def clips(self, *, padding_side: PaddingSide = "left", noise: bool = False) -> Batch:
        """Rows with videos, as this setup collates them, on its device: collators of images are not asked."""
        from pytest_qvl.checks.support.sizing import sizes_for
        from pytest_qvl.samples import clip_batch, scene_clips

        sizes = sizes_for(self.subject.source, self.processor)
        made = scene_clips(SEED, cell=sizes.clip_cell)
        if noise:
            made = [clip.noise(SEED) for clip in made]
        time = family_of(anatomy(self.model)).video_time
        batch = clip_batch(self.processor, made, time=time, padding_side=padding_side)
        for change in self.clip_collators:
            batch = change(batch)
        return {name: _moved(tensor, self.subject.device) for name, tensor in batch.items()}

    def long_batch(self) -> Batch:
        """One row of more than 2,000 tokens, as this setup collates it."""
        from pytest_qvl.checks.support.sizing import sizes_for
        from pytest_qvl.samples import long_sample

        sizes = sizes_for(self.subject.source, self.processor)
        longest = self.model.config.get_text_config().max_position_embeddings
        return self.batch([long_sample(self.processor, sizes, seed=SEED, longest=longest)])


def _moved(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """The same tensor on a device, as a leaf: like what a collator hands over, it has no gradient history."""
    if tensor.device.type == device:
        return tensor
    return tensor.detach().to(device).requires_grad_(tensor.requires_grad)


@contextmanager
def apply(name: str, case: Case) -> Iterator[Case]:
    """Damage a case for the length of a block, and put everything back on leaving.

    Args:
        name: Name of a fault in the catalogue.
        case: A healthy case. A fault may damage its model in place, or put another model in its place.

    Yields:
        The damaged case; the one that was given stays as it was.

    Raises:
        ValueError: No such fault.
    """
    with damaged(case, find(name).damage) as made:
        yield made


@contextmanager
def damaged(case: Case, damage: Callable[[Case], AbstractContextManager[Any]]) -> Iterator[Case]:
    """The same with any damage, of a fault or of a dose."""
    from pytest_qvl.faults.tools import attributes_restored
    from pytest_qvl.models.state import preserved

    made = replace(case, collators=list(case.collators), clip_collators=list(case.clip_collators))
    with preserved(case.model), attributes_restored(case.model), damage(made):
        yield made


def healthy_case(*, dtype: str = "bfloat16", seed: int = SEED, subject: Subject | None = None) -> Case:
    """A model in NF4 with a fresh LoRA, its processor, probes and full-precision reference.

    Args:
        dtype: Load and compute dtype, where no subject is given.
        seed: Which held-out scenes to take.
        subject: Model, device and dtype; the embedded model on the CPU if not given.
    """
    from pytest_qvl import checks
    from pytest_qvl.checks.support.sizing import sizes_for
    from pytest_qvl.models.memory import collect
    from pytest_qvl.models.progress_bars import no_progress_bars
    from pytest_qvl.samples import probe_samples, structure_rows

    subject = embedded(dtype) if subject is None else subject
    processor = _processor(subject)
    sizes = sizes_for(subject.source, processor)
    probes = probe_samples(sizes, seed, PROBES_PER_SKILL)
    loader = partial(load, subject=subject)
    with no_progress_bars():
        reference = checks.record_reference(loader(quantized=False, lora=None), processor, probes)
        collect()
        model = loader()
    return Case(
        model=model,
        processor=processor,
        lora_config=lora_config(),
        policy=checks.QuantizationPolicy(compute_dtype=subject.dtype),
        rows=[sample for sample in structure_rows(probes, sizes) if sample.skill in ROW_SKILLS],
        probes=probes,
        reference=reference,
        load=loader,
        subject=subject,
    )


def lora_config(**overrides: Any) -> Any:
    """A ``peft.LoraConfig``: rank 8 on every linear of the language backbone; arguments replace its fields."""
    from peft import LoraConfig

    return LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": LANGUAGE_ONLY, **overrides})


def load(
    *,
    dtype: str | None = None,
    quantized: bool = True,
    skip: Sequence[str] | None = KEEP_16BIT,
    lora: Any = "",
    seed: int = SEED,
    subject: Subject | None = None,
    folder: Path | None = None,
    **quantization: Any,
) -> Any:
    """A model, loaded and adapted by the backend.

    Args:
        dtype: Load dtype, and compute dtype unless `quantization` has another; the subject's own if not given.
        quantized: NF4 with double quantization, or full precision.
        skip: Modules kept out of the quantization.
        lora: A ``LoraConfig``; ``None`` for no adapter; the default adapter if not given.
        seed: Seed of the adapter's weights.
        subject: Which model, and where to; the embedded one on the CPU if not given.
        folder: A checkpoint to load in the place of the subject's own.
        quantization: Fields of ``BitsAndBytesConfig`` to override.
    """
    import torch

    from pytest_qvl.models.backends import backend
    from pytest_qvl.models.sources.model_source import parse_model

    subject = embedded() if subject is None else subject
    chosen = backend(subject.backend)
    dtype = subject.dtype if dtype is None else dtype
    kept = None if skip is None else list(skip)
    config = None
    if quantized:
        config = usual_quantization(getattr(torch, dtype), **{"llm_int8_skip_modules": kept, **quantization})
    request = subject.request(config, dtype)
    if folder is not None:
        request = replace(request, source=parse_model(folder))
    base = chosen.load(request)
    if lora is None:
        return base
    with torch.random.fork_rng(devices=subject.random_devices()):
        torch.manual_seed(seed)
        return chosen.attach(base, lora or lora_config(), None).peft_model.eval()


def _processor(subject: Subject | None = None) -> Any:
    from pytest_qvl.models.sources.synthetic_processor import processor_for

    return processor_for((embedded() if subject is None else subject).source)
