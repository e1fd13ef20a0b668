"""What every check does with what it is given, and with a model that crashes under it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import BatchFeature

from pytest_qvl import checks
from pytest_qvl.checks.registry import unwrapped
from pytest_qvl.evidence import CannotJudge, CheckFailed, InputError, ModelCrashed, collecting
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.samples import make_batch, scenes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def model(fresh_model: Any) -> Any:
    return fresh_model(quantized=False, lora=True)


@pytest.fixture(scope="module")
def batch(processor: Any) -> Any:
    return make_batch(processor, scenes(seed=1, per_skill=1, skills=["side"]), answers=True, padding_side="right")


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_every_public_check_is_one() -> None:
    plain = {"mrope_oracle", "record_reference", "validate_batch", "forecast_fits_card", "batch"}
    functions = {
        name: each for name in checks.__all__ if callable(each := getattr(checks, name)) and not isinstance(each, type)
    }
    assert {name for name, each in functions.items() if not hasattr(each, "__wrapped__")} == plain


def test_wrappers_of_torch_are_looked_through(model: Any, lora_config: Any, batch: Any, process_group: None) -> None:
    for wrapper in (
        torch.nn.DataParallel(model),
        torch.nn.parallel.DistributedDataParallel(model),
        torch.compile(model),
        torch.compile(torch.nn.parallel.DistributedDataParallel(model)),
    ):
        assert unwrapped(wrapper) is model
        for evidence in (
            checks.adapter_census(wrapper, lora_config()),
            checks.placeholder_counts(model=wrapper, batch=batch),
            checks.mrope_positions(wrapper, batch),
        ):
            assert f"judged is the model inside {type(wrapper).__name__}, run as it was written" in evidence.notes


@pytest.mark.filterwarnings("ignore:FSDP")
def test_a_sharded_model_is_not_judged(batch: Any, process_group: None) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    sharded = FullyShardedDataParallel(torch.nn.Linear(2, 2), device_id=torch.device("cpu"))
    with pytest.raises(CannotJudge, match="FullyShardedDataParallel.*before it is wrapped"):
        checks.placeholder_counts(sharded, batch)


def test_a_batch_may_be_a_batch_feature_with_strings_in_it(model: Any, batch: Any) -> None:
    feature = BatchFeature({**batch, "text": ["a question"], "images": [[]]})
    evidence = checks.mrope_positions(model, feature)
    assert "left out of the batch, since no model takes them: images, text" in evidence.notes
    assert "text" in feature
    with pytest.raises(ValueError, match="a batch is a mapping from names to tensors, got str"):
        checks.mrope_positions(model, "input_ids")


def test_a_video_is_not_judged(model: Any, batch: Any) -> None:
    video = {"pixel_values_videos": torch.zeros(16, 1176), "video_grid_thw": torch.tensor([[1, 4, 4]])}
    ids = batch["input_ids"].clone()
    ids[ids == anatomy(model).image_token_id] = anatomy(model).video_token_id
    for broken in ({**batch, **video}, {"input_ids": ids}):
        for name in ("causality", "position_state", "greedy_is_argmax", "adapter_neutrality"):
            with pytest.raises(CannotJudge, match="not judged: video"):
                getattr(checks, name)(model, broken)


def test_a_crash_of_the_model_is_a_finding_that_names_the_module(model: Any, batch: Any) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise IndexError("index 3 is out of bounds\nwith more to say")

    layer = anatomy(model).language_backbone.layers[1].mlp
    layer.forward = broken
    try:
        with collecting() as collected, pytest.raises(ModelCrashed) as failure:
            checks.feature_scatter(model, batch)
    finally:
        del layer.forward
    assert isinstance(failure.value, CheckFailed)
    assert isinstance(failure.value.__cause__, IndexError)
    assert str(failure.value).splitlines()[0] == (
        "the model's model.language_model.layers.1.mlp raised IndexError: index 3 is out of bounds"
    )
    assert [each.check for each in collected] == ["feature_scatter"]
    assert collected[0].promise.startswith("each visual token stands at its own placeholder")
    assert not collected[0].ok


def test_a_crash_in_the_backward_pass_or_the_optimizer_is_named(model: Any, batch: Any) -> None:
    class Refuses(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError("no backward kernel")

    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise TypeError("state is None")

    handle = model.get_output_embeddings().register_forward_hook(lambda _m, _a, out: Refuses.apply(out))
    with pytest.raises(ModelCrashed, match=r"^the backward pass raised NotImplementedError: no backward kernel"):
        checks.training_step(model, batch, gradient_checkpointing=False)
    handle.remove()
    with pytest.raises(ModelCrashed, match=r"^the optimizer \(Broken\) raised TypeError: state is None"):
        checks.training_step(model, batch, gradient_checkpointing=False, make_optimizer=lambda p: Broken(p, lr=0.1))


@pytest.mark.parametrize(
    ("make", "got"),
    [
        ("adamw", "got a value of type str"),
        (lambda _: None, "and this one returned None: is its return missing?"),
        (lambda parameters: parameters, "and this one returned a value of type list"),
    ],
    ids=["text", "none", "list"],
)
def test_what_makes_no_optimizer_is_refused_in_words(model: Any, batch: Any, make: Any, got: str) -> None:
    says = f"from the list of trainable parameters to an optimizer, {re.escape(got)}$"
    with pytest.raises(InputError, match=says):
        checks.training_step(model, batch, gradient_checkpointing=False, make_optimizer=make)
    with pytest.raises(InputError, match=says):
        checks.frozen_vision(model, batch, make_optimizer=make)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: device-side assert triggered"),
        MemoryError(),
        DeprecationWarning("made an error by the user's filter"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_verdicts_of_others_stay_as_they_are(model: Any, batch: Any, error: Exception) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise error

    layer = anatomy(model).lm_head
    layer.forward = broken
    try:
        with pytest.raises(type(error)) as raised:
            checks.feature_scatter(model, batch)
    finally:
        del layer.forward
    assert raised.value is error


def test_errors_of_the_check_itself_stay_as_they_are(model: Any, batch: Any) -> None:
    with pytest.raises(TypeError, match="not supported between instances"):
        checks.decode_positions(model, batch, steps="two")
    with pytest.raises(ValueError, match="steps must be at least 1"):
        checks.decode_positions(model, batch, steps=0)
    with pytest.raises(TypeError, match="missing a required argument"):
        checks.decode_positions(model)


def test_ids_that_the_model_has_no_row_for(fresh_model: Any, processor: Any) -> None:
    from pytest_qvl import checks
    from pytest_qvl.samples import make_batch, scenes

    samples = scenes(0, 1)[:2]
    model = fresh_model()
    model.resize_token_embeddings(len(processor.tokenizer))  # fewer rows than before: healthy
    checks.greedy_is_argmax(model, make_batch(processor, samples), max_new_tokens=2)
    model.resize_token_embeddings(processor.image_token_id)
    with pytest.raises(ValueError, match=r"token id \d+ has no row in the model's embeddings, which have \d+: the voc"):
        checks.greedy_is_argmax(model, make_batch(processor, samples))
    with pytest.raises(ValueError, match="has no row in the model's embeddings"):
        checks.image_isolation(model, processor, samples)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (lambda batch: None, "got None for batch; make_batch"),
        (lambda batch: [batch], "got list for batch; make_batch"),
        (
            lambda batch: {name: value.tolist() for name, value in batch.items()},
            r"batch\['input_ids'\] is of type list",
        ),
        (
            lambda batch: {**batch, "pixel_values": batch["pixel_values"].numpy()},
            r"'pixel_values'\] is of type ndarray",
        ),
        (lambda batch: {"pixel_values": batch["pixel_values"]}, r"in batch they are missing among pixel_values$"),
        (lambda batch: {**batch, "input_ids": batch["input_ids"][0]}, r"they are of shape \(\d+,\)$"),
    ],
    ids=["none", "list", "lists", "arrays", "no-ids", "one-dimensional"],
)
@pytest.mark.parametrize("check", ["generation_repeatable", "placeholder_counts", "mrope_positions"])
def test_what_is_no_batch_is_named(model: Any, batch: Any, check: str, given: Any, says: str) -> None:
    with pytest.raises(InputError, match=f"^{check}: .*{says}") as error:
        getattr(checks, check)(model, given(batch))
    assert isinstance(error.value, ValueError)
    assert "\n" not in str(error.value)


def test_grids_that_were_cast_with_the_pixels(model: Any, batch: Any) -> None:
    cast = {**batch, "image_grid_thw": batch["image_grid_thw"].to(torch.bfloat16)}
    with pytest.raises(InputError, match=r"placeholder_counts: batch\['image_grid_thw'\] is bfloat16, and counts"):
        checks.placeholder_counts(model, cast)


def test_one_of_several_batches_is_named(model: Any, batch: Any) -> None:
    with pytest.raises(InputError, match=r"adapter_neutrality: .* got str for batches\[1\]"):
        checks.adapter_neutrality(model, [batch, "second"])


def test_a_batch_without_labels_says_where_they_come_from(model: Any, batch: Any, processor: Any) -> None:
    bare = {name: value for name, value in batch.items() if name != "labels"}
    for call in (
        lambda: checks.label_mask(model, bare, processor),
        lambda: checks.training_step(model, bare, gradient_checkpointing=False),
        lambda: checks.frozen_vision(model, bare),
    ):
        with pytest.raises(InputError, match=r"the batch needs labels \(rows, length\).* your collator, make_batch\("):
            call()


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_a_caller_that_switched_gradients_off_changes_no_verdict(model: Any, batch: Any, off: Any) -> None:
    with off():
        made_inside = {name: value.clone() for name, value in batch.items()}
        assert checks.vision_not_backpropagated(model, made_inside, gradient_checkpointing=False).ok
        assert checks.frozen_vision(model, made_inside).ok
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_a_crash_on_a_malformed_batch_says_both(model: Any, batch: Any) -> None:
    broken = {**batch, "image_grid_thw": batch["image_grid_thw"][:0]}
    left = {**broken, "attention_mask": torch.ones_like(batch["attention_mask"])}
    with pytest.raises(ModelCrashed) as failure:
        checks.generation_repeatable(model, left)
    first, *rest = str(failure.value).splitlines()
    assert first.startswith("the model's model raised ")
    assert "; the batch is malformed: the batch holds image_grid_thw (0," in first
    assert any(line.startswith("note: raised at transformers/models/qwen2_5_vl/") for line in rest)
