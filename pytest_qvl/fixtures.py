"""The public fixtures: a chain of small session fixtures, each of which any conftest may override.

``qvl_model`` → ``qvl_quantization_config``, ``qvl_backend`` → ``qvl_quantized_model`` → ``qvl_lora_config`` →
``qvl_lora_model``. The two models are two views of one object in memory, so a test takes one of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_qvl.options import SETTINGS_KEY
from pytest_qvl.session.errors import UserError, as_usage_error
from pytest_qvl.session.keys import DEVICE_KEY, METER_KEY, MODEL_KEY, PROBES_KEY
from pytest_qvl.session.reference_first import record_reference_first

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import torch

    from pytest_qvl.checks import Reference
    from pytest_qvl.models.backends import LoadRequest
    from pytest_qvl.models.policy import AdapterPolicy
    from pytest_qvl.models.quantized_layers import QuantizedLayers
    from pytest_qvl.samples import ProbeSizes, Sample
    from pytest_qvl.session.targets import Target
    from pytest_qvl.vram.cards import Card
    from pytest_qvl.vram.meter import Meter


@pytest.fixture(scope="session")
def qvl_target(request: pytest.FixtureRequest) -> Target:
    """Model, device and backend of this test (``--qvl-model``, ``--qvl-device``, ``--qvl-backend``)."""
    target: Target | None = getattr(request, "param", None)
    if target is None:
        raise UserError(
            "a fixture of pytest-qvl was asked for by request.getfixturevalue in a test that names none, so nothing "
            "said on which model and device to run the test. Name the fixture as an argument of the test, or with "
            "@pytest.mark.usefixtures"
        )
    if target.device == "cuda":
        request.config.stash[DEVICE_KEY].need_cuda()
    return target


@pytest.fixture(scope="session")
def qvl_model(qvl_target: Target) -> str:
    """What to test: ``"embedded"``, a folder, a hub id, or ``"synthetic:qwen2.5-vl-7b"``."""
    return qvl_target.model


@pytest.fixture(scope="session")
def qvl_backend(qvl_target: Target) -> str:
    """How to load and adapt, chosen by ``--qvl-backend``: a name in ``pytest_qvl.models.backends.BACKENDS``."""
    return qvl_target.backend


@pytest.fixture(scope="session")
def qvl_compute_dtype(pytestconfig: pytest.Config, qvl_target: Target) -> str:
    """Name of the dtype of 4-bit matrix products and of everything that is not quantized."""
    chosen = pytestconfig.stash[SETTINGS_KEY].compute_dtype
    return pytestconfig.stash[DEVICE_KEY].default_dtype(qvl_target.device) if chosen == "auto" else chosen


@pytest.fixture(scope="session")
def _qvl_saved_quantization(qvl_model: str) -> Any:
    """The ``BitsAndBytesConfig`` that the checkpoint was saved with in 4 bits; ``None`` for one in 16 bits."""
    from pytest_qvl.models.sources.hub import saved_quantization
    from pytest_qvl.models.sources.model_source import parse_model

    with as_usage_error("qvl_model"):
        saved = saved_quantization(parse_model(qvl_model))
    if saved is None:
        return None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig.from_dict(saved)


@pytest.fixture(scope="session")
def qvl_quantization_config(qvl_compute_dtype: str, _qvl_saved_quantization: Any) -> Any:
    """A ``transformers.BitsAndBytesConfig``: NF4 with double quantization; vision tower, merger and head in 16 bits.

    Of a checkpoint that was saved in 4 bits, its own: ``from_pretrained`` takes no other.
    """
    import torch

    from pytest_qvl.models.quantized import usual_quantization

    if _qvl_saved_quantization is not None:
        return _qvl_saved_quantization
    return usual_quantization(getattr(torch, qvl_compute_dtype))


@pytest.fixture(scope="session")
def qvl_lora_config(qvl_adapter: Path | None) -> Any:
    """A ``peft.LoraConfig``: rank 16 on every linear of the language backbone and on nothing else.

    With ``--qvl-adapter``, the configuration saved in that folder.
    """
    from peft import LoraConfig

    from pytest_qvl.models.adapters import LANGUAGE_ONLY
    from pytest_qvl.models.attaching import adapter_folder, saved_lora_config

    with as_usage_error("qvl_lora_config"):
        folder = adapter_folder(qvl_adapter)
        if folder is not None:
            return saved_lora_config(folder)
    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, bias="none", target_modules=LANGUAGE_ONLY)


@pytest.fixture(scope="session")
def qvl_processor(qvl_model: str) -> Any:
    """The model's real processor, with or without torchvision, left-padding."""
    from pytest_qvl.models.sources.model_source import parse_model
    from pytest_qvl.models.sources.synthetic_processor import processor_for

    with as_usage_error("qvl_processor"):
        return processor_for(parse_model(qvl_model))


@pytest.fixture(scope="session")
def _qvl_load_request(
    qvl_model: str, qvl_target: Target, qvl_quantization_config: Any, qvl_compute_dtype: str, qvl_card: Card | None
) -> LoadRequest:
    from pytest_qvl.models.backends import LoadRequest
    from pytest_qvl.models.quantized import asks_for_4bit, refuse_other_than_saved
    from pytest_qvl.models.sources.hub import saved_quantization
    from pytest_qvl.models.sources.model_source import parse_model
    from pytest_qvl.vram.cap import compute_dtype

    with as_usage_error("qvl_model"):
        source = parse_model(qvl_model)
        saved = saved_quantization(source)
    with as_usage_error("qvl_quantization_config"):
        asks_for_4bit(qvl_quantization_config)
        refuse_other_than_saved(qvl_quantization_config, saved)
    if qvl_card is not None and qvl_target.device == "cuda":
        with as_usage_error("qvl_compute_dtype"):
            compute_dtype(qvl_card, qvl_compute_dtype)
    return LoadRequest(source, qvl_quantization_config, qvl_target.device, qvl_compute_dtype)


@pytest.fixture(scope="session")
def qvl_quantized_model(request: pytest.FixtureRequest, _qvl_load_request: LoadRequest, qvl_backend: str) -> Any:
    """The 4-bit base model without an adapter: frozen, in eval mode at the start of every test."""
    model = request.config.stash[MODEL_KEY]
    model.refuse_unannounced(request, "qvl_quantized_model")
    record_reference_first(request)
    with as_usage_error("qvl_quantized_model"):
        return model.owner.base(_qvl_load_request, qvl_backend)


@pytest.fixture(scope="session")
def qvl_lora_model(
    request: pytest.FixtureRequest,
    qvl_quantized_model: Any,
    qvl_backend: str,
    qvl_lora_config: Any,
    qvl_adapter: Path | None,
) -> Iterator[Any]:
    """The 4-bit base model wrapped with LoRA in place: a ``PeftModel``, in eval mode when a test starts."""
    from pytest_qvl.models.attaching import adapter_folder

    state, settings = request.config.stash[MODEL_KEY], request.config.stash[SETTINGS_KEY]
    state.refuse_unannounced(request, "qvl_lora_model")
    with as_usage_error("qvl_lora_model"):
        folder = adapter_folder(qvl_adapter)
        adapter = None if folder is None else str(folder)
        model = state.owner.adapted(qvl_quantized_model, qvl_backend, qvl_lora_config, adapter, settings.seed)
    yield model
    del model
    state.owner.drop_adapter()


@pytest.fixture(scope="session")
def qvl_adapter(pytestconfig: pytest.Config) -> Path | None:
    """Folder of the saved adapter under test (``--qvl-adapter``), or ``None`` for a fresh one."""
    return pytestconfig.stash[SETTINGS_KEY].adapter


@pytest.fixture(scope="session")
def qvl_adapter_policy(pytestconfig: pytest.Config) -> AdapterPolicy:
    """Which parts are adapted or trained on purpose: the text side, or what ``--qvl-adapter-policy`` names."""
    return pytestconfig.stash[SETTINGS_KEY].adapter_policy


@pytest.fixture(scope="session")
def qvl_quantized_layers(pytestconfig: pytest.Config) -> QuantizedLayers:
    """Which linears are in 4 bits on purpose: the language backbone's, or what ``--qvl-quantized-layers`` names."""
    return pytestconfig.stash[SETTINGS_KEY].quantized_layers


@pytest.fixture(scope="session")
def qvl_make_optimizer() -> Callable[[list[Any]], Any] | None:
    """Makes the optimizer that the training checks step with from the list of trainable parameters.

    ``None``: the checks' own AdamW, at a rate derived from the model. Override it with the optimizer you train with.
    """
    return None


@pytest.fixture
def qvl_optimizer() -> Any:
    """Your own optimizer over ``qvl_lora_model``, to prove that it holds exactly the adapter; ``None`` for none."""
    return None


@pytest.fixture
def qvl_trainer() -> Any:
    """Your own ``transformers.Trainer`` over ``qvl_lora_model``, or a function ``(model, micro_batches)``; or ``None``.

    Judged is that gradients accumulated over the micro-batches of one optimizer step are those of one batch. A function
    runs forward and backward of each, and steps no optimizer.
    """
    return None


@pytest.fixture(scope="session")
def qvl_probe_sizes(qvl_model: str, qvl_processor: Any) -> ProbeSizes:
    """How large the images of the rendered scenes are, derived from the model's configuration and its processor."""
    from pytest_qvl.checks.support.sizing import sizes_for
    from pytest_qvl.models.sources.model_source import parse_model

    with as_usage_error("qvl_probe_sizes"):
        return sizes_for(parse_model(qvl_model), qvl_processor)


@pytest.fixture(scope="session")
def qvl_image_samples(pytestconfig: pytest.Config, qvl_model: str, qvl_probe_sizes: ProbeSizes) -> list[Sample]:
    """Images with questions and known answers: rendered scenes, or the folder given by ``--qvl-images``.

    Scenes have the sizes of :func:`qvl_probe_sizes`. A model with knowledge of photographs (a folder or a hub id, not
    the embedded model) gets those of scikit-image as well, where the ``photos`` extra is installed.
    """
    from pytest_qvl.models.sources.model_source import parse_model
    from pytest_qvl.samples import folder_samples, has_photos, photo_samples, probe_samples

    settings = pytestconfig.stash[SETTINGS_KEY]
    with as_usage_error("qvl_image_samples"):
        if settings.images is not None:
            return folder_samples(settings.images)
        scenes = probe_samples(qvl_probe_sizes, settings.seed, settings.samples)
        knows_photographs = parse_model(qvl_model).has_knowledge and not qvl_probe_sizes.one_size
        return [*scenes, *photo_samples(qvl_probe_sizes)] if knows_photographs and has_photos() else scenes


@pytest.fixture(scope="session")
def qvl_batch(qvl_processor: Any, qvl_target: Target) -> Callable[..., dict[str, torch.Tensor]]:
    """A factory: ``qvl_batch(samples, padding_side="left", answers=False)`` → model inputs on the device.

    ``input_ids`` and ``attention_mask`` ``(batch, length)``, ``pixel_values`` ``(patches, 1176)``,
    ``image_grid_thw`` ``(images, 3)``; with ``answers=True`` also ``labels`` ``(batch, length)``, −100
    everywhere but on the answer.
    """
    from functools import partial

    from pytest_qvl.samples import make_batch

    return partial(make_batch, qvl_processor, device=qvl_target.device)


@pytest.fixture(scope="session")
def qvl_training_batch(qvl_batch: Callable[..., Any]) -> Callable[[list[Sample]], Any]:
    """A factory for what is trained on: ``qvl_training_batch(samples)`` → model inputs with ``labels``.

    ``qvl_batch(samples, padding_side="right", answers=True)``. Override it with the collator that you train with.
    """
    from functools import partial

    return partial(qvl_batch, padding_side="right", answers=True)


@pytest.fixture(scope="session")
def qvl_dataset(qvl_image_samples: list[Sample], qvl_probe_sizes: ProbeSizes) -> Sequence[Any]:
    """Rows of the data that you train on, for ``checks.batch`` to judge: samples of the suite unless overridden.

    A sequence with ``len`` and indices: a ``datasets.Dataset``, a list. Rows with ``messages`` and ``images``, as TRL
    and Unsloth take them, are compared with what the collator makes of them; others are collated and not compared.
    """
    from pytest_qvl.samples import training_rows

    return training_rows(qvl_image_samples, qvl_probe_sizes)


@pytest.fixture(scope="session")
def qvl_collator(qvl_training_batch: Callable[[list[Sample]], Any]) -> Callable[[list[Any]], Any]:
    """The collator that you train with: rows of ``qvl_dataset`` in, a batch out; the suite's own by default."""
    return qvl_training_batch


@pytest.fixture(scope="session")
def qvl_reference(
    request: pytest.FixtureRequest,
    _qvl_load_request: LoadRequest,
    qvl_backend: str,
    qvl_processor: Any,
    qvl_image_samples: list[Sample],
) -> Reference:
    """What the same model answers in full precision: recorded in one pass that ends before the 4-bit load.

    With ``--qvl-reference-model``, what that model answers; of a checkpoint saved in 4 bits otherwise what its own
    weights answer, dequantized. The card that ``--qvl-card`` names would not have to hold it, so its memory cap is
    lifted for that time.
    """
    from dataclasses import replace

    from pytest_qvl.checks import record_reference
    from pytest_qvl.models.sources.base import reference_request
    from pytest_qvl.vram.cap import lifted

    state = request.config.stash[MODEL_KEY]

    def record() -> Reference:  # its model is gone when the phase ends
        base = reference_request(_qvl_load_request, request.config.stash[SETTINGS_KEY].reference_model)
        with state.owner.full_precision(base.request, qvl_backend) as model:
            reference = record_reference(model, qvl_processor, qvl_image_samples)
            if (probes := request.config.stash.get(PROBES_KEY, None)) is not None:
                probes.ask_full(model, qvl_processor, qvl_image_samples)
        source = f"{base.name}, {reference.vision_dtype}" if base.name else reference.source
        return replace(reference, source=source, caveat=base.caveat)

    with as_usage_error("qvl_reference"), lifted(), state.apart("reference"):
        return record()


@pytest.fixture(scope="session")
def qvl_vram(pytestconfig: pytest.Config) -> Meter:
    """The session's VRAM meter: ``with qvl_vram.phase("prefill") as phase: ...``, then ``phase.usage``."""
    return pytestconfig.stash[METER_KEY]


@pytest.fixture(scope="session")
def qvl_card(pytestconfig: pytest.Config) -> Card | None:
    """The GPU card to behave like and to forecast for (``--qvl-card``), or ``None``."""
    return pytestconfig.stash[SETTINGS_KEY].card


@pytest.fixture(scope="session")
def qvl_vram_limit(pytestconfig: pytest.Config) -> int | None:
    """Bytes that no phase of the suite may need (``--qvl-vram-limit``), or ``None``."""
    return pytestconfig.stash[SETTINGS_KEY].vram_limit
