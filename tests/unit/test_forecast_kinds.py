"""What Unsloth's trainer, an 8-bit base and DDP do to memory, by the forecast and by the libraries themselves."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pytest_qvl.models.sources.embedded import embedded_model_dir
from pytest_qvl.vram.forecast import Forecast, Request, phases
from pytest_qvl.vram.forecast.engine import ddp, trainers, unsloth
from pytest_qvl.vram.forecast.engine.unsloth import rows_at_once
from pytest_qvl.vram.forecast.run import Forecaster
from pytest_qvl.vram.forecast.validation.records import request_of
from pytest_qvl.vram.forecast.validation.trainers.predict import predict
from pytest_qvl.vram.units import GiB, MiB

if TYPE_CHECKING:
    from collections.abc import Iterator

SMALL = Request(model=str(embedded_model_dir()), image=(112, 112), tokens=40, lora_r=8, optimizer="adamw_8bit")


def made(request: Request) -> Forecast:
    return Forecaster(request).forecast(request, inference=False)


def test_unsloths_checkpoints_keep_no_input_but_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every block and layer but the last an input in 16 bits is gone, and there are two buffers for them."""
    assert 2 * MiB == unsloth.LEAST_OFFLOADED
    request = replace(SMALL, trainer="unsloth", image=(224, 224))
    config = Forecaster(request).source.config
    text, vision = config.get_text_config(), config.vision_config
    before: dict[int, int] = {}
    for least in (10**6, 1):
        monkeypatch.setattr(unsloth, "LEAST_OFFLOADED", least)
        found = made(request)
        before[least] = found.phase(phases.LOSS).start_allocated
    tokens, patches = found.sequence, 4 * found.visual_tokens
    inputs = (text.num_hidden_layers - 1) * tokens * text.hidden_size + vision.depth * patches * vision.hidden_size
    largest = max(tokens * text.hidden_size, patches * vision.hidden_size)
    assert before[10**6] - before[1] == pytest.approx(2 * inputs + 2 * (10**6 - 2 * largest), abs=512 * 20)


class _AllLogits:
    """In place of Unsloth's loss what was measured: the model's own head, and the loss of ``fast_cross_entropy_loss``."""

    def __init__(self, parts: Any, *_: Any, **__: Any) -> None:
        self._base = parts.base
        self._base._loss_function = self._loss

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self._base).forward(self._base, *args, **kwargs)

    @staticmethod
    def _loss(logits: torch.Tensor, labels: torch.Tensor, **_: Any) -> torch.Tensor:
        losses: torch.Tensor = _CrossEntropy.apply(logits.reshape(-1, logits.shape[-1]), torch.empty_like(labels))
        return losses.sum()


class _CrossEntropy(torch.autograd.Function):
    """``unsloth/kernels/cross_entropy_loss.py``, its kernels left out: it keeps the logits."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses = logits.new_empty(len(logits), dtype=torch.float32)
        sums = [logits.new_empty((len(logits), -(-logits.shape[1] // 65536)), dtype=torch.float32) for _ in range(2)]
        first, others = (part.logsumexp(1) for part in sums)
        losses = others + losses
        ctx.save_for_backward(logits, first, losses, labels)
        return losses

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        return torch.empty_like(ctx.saved_tensors[0]), None


@pytest.mark.parametrize(
    ("case", "record"),
    [
        ("1x560x560+300 r16 paged_adamw_8bit kept not compiled", 3),
        pytest.param("1x1008x756+300 r16 paged_adamw_8bit not compiled", 3, marks=pytest.mark.slow),
        pytest.param("2x2*644x448+300 r64 adamw_8bit accumulate4 not compiled", 2, marks=pytest.mark.slow),
        pytest.param("756x560+90_448x448,336x504+260 r16 paged_adamw_8bit not compiled", 3, marks=pytest.mark.slow),
        pytest.param("1x1008x756+300 r16 paged_adamw_8bit", 3, marks=pytest.mark.slow),
        pytest.param("4x1008x756+300 r16 paged_adamw_8bit", 2, marks=pytest.mark.slow),
    ],
)
def test_unsloths_steps_are_those_measured_without_its_loss(
    case: str, record: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints, LoRA layers and expandable segments, on an H200 that trained Transformers' class with all logits."""
    records, name = Path(__file__).parents[2] / "docs" / "records", f"qwen2.5-vl-3b unsloth bf16 {case}"
    entry, measured = (
        next(e for e in json.loads((records / file).read_text())["cases"] if e["name"] == name)
        for file in ("forecast-kinds-predictions.json", f"h200-forecast-kinds-measured-{record}.json")
    )
    monkeypatch.setattr(trainers, "UnslothHead", _AllLogits)
    found = predict(request_of(entry))
    assert found["allocated"] == pytest.approx(measured["allocated"], rel=0.0005)
    compared = (phases.FORWARD, phases.LOSS, phases.OPTIMIZER) if "not compiled" in case else (phases.LOSS,)
    for phase in compared:
        assert found["phases"][phase]["allocated"] == pytest.approx(measured["phases"][phase]["allocated"], rel=0.0005)


@pytest.mark.parametrize(
    ("tokens", "width", "vocabulary", "rows"),
    [
        (5000, 3584, 152064, 512),
        (300, 3584, 152064, 300),
        (100_000, 3584, 152064, 2048),
        (5000, 2048, 32000, 2048),
        (10**6, 8192, 152064, 3530),
    ],
)
def test_rows_of_logits_are_as_many_as_liger_takes(tokens: int, width: int, vocabulary: int, rows: int) -> None:
    assert rows_at_once(tokens, width, vocabulary) == rows


def test_unsloths_loss_has_some_rows_of_logits_and_on_a_small_card_a_part_of_them() -> None:
    """On a card before compute capability 8.0 it has all of them, however small it is."""
    request = replace(SMALL, trainer="unsloth", image=(448, 448), tokens=600, gradient_checkpointing=False)
    text = Forecaster(request).source.config.get_text_config()
    large, small = made(request), made(replace(request, device_bytes=16 * GiB))
    old = made(replace(request, device_bytes=16 * GiB, capability=(7, 5), compute_dtype="float16"))
    rows = rows_at_once(large.sequence - 1, text.hidden_size, text.vocab_size)
    for found in (large, old):
        assert found.phase(phases.LOSS).by_kind["logits"] == pytest.approx(rows * text.vocab_size * 4, rel=0.01)
    assert small.phase(phases.LOSS).by_kind["logits"] == 0


def test_a_compiled_layer_makes_its_gates_and_norms_again() -> None:
    """Of an MLP's four inner tensors it keeps two, and of a norm its input in place of that in fp32 and the result."""
    request = replace(SMALL, trainer="unsloth", gradient_checkpointing=False, image=(224, 224))
    config = Forecaster(request).source.config
    text, vision = config.get_text_config(), config.vision_config
    as_written, compiled = made(replace(request, compiled=False)), made(request)
    tokens, patches = compiled.sequence, 4 * compiled.visual_tokens
    # What is frozen keeps no input of a product: of a vision block one gate less, and no result of a norm.
    language = text.num_hidden_layers * tokens * (2 * 2 * text.intermediate_size + 2 * 4 * text.hidden_size)
    blocks = vision.depth * patches * (2 * vision.intermediate_size + 2 * 2 * vision.hidden_size)
    after = tokens * 4 * text.hidden_size + patches * 2 * vision.hidden_size  # the last norm of each tower
    saved = as_written.phase(phases.LOSS).start_allocated - compiled.phase(phases.LOSS).start_allocated
    assert saved == pytest.approx(language + blocks + after, rel=0.1)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"base_bits": 8}, "base_bits is 8 and trainer is 'unsloth', whose own code for it is not followed"),
        ({"use_dora": True}, "use_dora is True and trainer is 'unsloth'"),
        ({"reentrant": False}, "reentrant is False and trainer is 'unsloth'"),
        ({"precision": "bf16-pure"}, "precision is 'bf16-pure' and trainer is 'unsloth'"),
        ({"ddp": True}, "ddp is True and trainer is 'unsloth'"),
    ],
)
def test_what_unsloth_does_in_its_own_way_is_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Request(**{"trainer": "unsloth", **settings})
    with pytest.raises(ValueError, match="compiled is False and trainer is 'hf': only Unsloth compiles"):
        Request(compiled=False)


def test_bitsandbytes_keeps_the_input_of_an_8_bit_product_where_no_checkpoint_finds_it() -> None:
    """The real layer and the real checkpoint: reentrant ones make no graph in their forward."""
    linear = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False, threshold=6.0)
    values, scales, _ = bnb.functional.int8_vectorwise_quant(torch.randn(32, 64).half())
    linear.weight = bnb.nn.Int8Params(values, requires_grad=False, CB=values, SCB=scales)
    for reentrant, alive in ((False, True), (True, False)):
        inner: list[Any] = []

        def layer(x: torch.Tensor, inner: list[Any] = inner) -> torch.Tensor:
            doubled = x * 2
            inner.append(weakref.ref(doubled))
            return linear(doubled)  # type: ignore[no-any-return]

        out = checkpoint(layer, torch.randn(4, 64, requires_grad=True), use_reentrant=reentrant)
        gc.collect()
        assert (inner[0]() is not None) is alive
        out.sum().backward()


def test_an_8_bit_base_keeps_every_layers_inputs_until_the_step_is_over() -> None:
    """As bitsandbytes does; a byte for each weight in place of half of one."""
    request = replace(SMALL, base_bits=8, checkpoint="16bit")
    kept, reentrant = made(request), made(replace(request, reentrant=True))
    text = Forecaster(request).source.config.get_text_config()
    inputs = 2 * kept.sequence * (3 * text.hidden_size + text.intermediate_size) * text.num_hidden_layers
    grown = kept.phase(phases.LOSS).start_allocated - reentrant.phase(phases.LOSS).start_allocated
    assert grown == pytest.approx(inputs, rel=0.2)
    weights = made(replace(request, base_bits=4)).phase(phases.LOAD).end_allocated
    assert kept.phase(phases.LOAD).end_allocated > 1.1 * weights


def test_a_synthetic_base_in_8_bits_is_there_in_16_first() -> None:
    """As the validation makes it: what is packed lies beside the whole model, and has half the bytes of what goes."""
    request = replace(SMALL, checkpoint="synthetic")
    whole, packed = (made(replace(request, base_bits=bits)).phase(phases.LOAD) for bits in (16, 8))
    saved = whole.end_allocated - packed.end_allocated
    assert packed.peak_allocated > whole.end_allocated + saved
    one_by_one = made(replace(request, base_bits=8, checkpoint="16bit")).phase(phases.LOAD)
    assert one_by_one.peak_allocated < whole.end_allocated


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[None]:
    """One process that is all there is."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("cap", [None, 4])
def test_buckets_are_those_of_the_real_ddp(processes: None, cap: int | None) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(700, 900 - 20 * i) for i in range(20)))
    wrapped = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=cap, find_unused_parameters=True)
    theirs = wrapped._get_ddp_logging_data()["bucket_sizes"]
    ours = ddp.buckets(list(model.parameters()), cap)
    assert [str(bucket.nbytes) for bucket in ours] == theirs.split(", ")


def test_outputs_with_gradients_are_copied_as_by_the_real_ddp(processes: None) -> None:
    class Model(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            self.made = {"loss": super().forward(x).sum(), "logits": super().forward(x), "ids": torch.ones(2)}
            return dict(self.made)

    model = Model(3, 4)
    wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    theirs = wrapped(torch.ones(2, 3))
    same = [name for name in model.made if theirs[name].data_ptr() == model.made[name].data_ptr()]
    ours = ddp.copied(model.made)
    assert same == ["ids"]
    assert [name for name in model.made if ours[name].data_ptr() == model.made[name].data_ptr()] == same


def test_ddp_keeps_the_gradients_once_more_and_copies_the_logits() -> None:
    request = replace(SMALL, gradient_checkpointing=False)
    alone, one_of = made(request), made(replace(request, ddp=True))
    trained = alone.phase(phases.OPTIMIZER).by_kind["gradients"]
    buckets = one_of.phase(phases.TRAIN_VISION).by_kind["gradients"]
    assert buckets == pytest.approx(trained, rel=0.1)
