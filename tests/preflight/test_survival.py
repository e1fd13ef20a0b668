"""Question 7: what storing keeps of ΔW, predicted from a sample and held to real merges and real quantization."""

from __future__ import annotations

import math

import pytest
import torch
from preflight_corpus import Workshop
from preflight_corpus.making import CONFIG, edit

from pytest_qvl.models.sources.embedded import embedded_model_dir
from pytest_qvl.preflight import preflight
from pytest_qvl.preflight.files.folder import Folder
from pytest_qvl.preflight.files.headers import read_header
from pytest_qvl.preflight.rounding import Loss, half_step, ratio, through_nf4
from pytest_qvl.preflight.run import _read
from pytest_qvl.preflight.subject import Asked
from pytest_qvl.preflight.survey import PARTS, Surveyed, _of_weight, sample_of, survey
from pytest_qvl.preflight.updates import Update
from pytest_qvl.preflight.weights import Weights

FAMILY = "qwen2_5_vl"
CLOSE = 0.05  # predicted to measured
NOTHING = 0.01  # of ΔW: a merge into 4 bits keeps a few hundredths, of which a sample knows less than 5 %


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("survival"))


@pytest.fixture(scope="module")
def embedded(shop):
    """An adapter on the embedded model, as faint as a short training leaves it: half of it is lost in bf16."""
    adapter = shop.adapter(FAMILY, base=embedded_model_dir())
    edit(adapter / CONFIG, lora_alpha=1.2)
    return adapter


def subject_of(base, adapter):
    return _read(Asked(str(base), adapter))[1]


def numbers_of(change, update):
    return float((change * update).sum() / update.square().sum()), float((change - update).norm() / update.norm())


def hold(loss, change, update):
    kept, error = numbers_of(change, update)
    assert loss.kept == pytest.approx(kept, rel=CLOSE, abs=NOTHING)
    assert loss.error == pytest.approx(error, rel=CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_a_step_is_what_rounding_may_take(dtype):
    torch.manual_seed(0)
    values = torch.cat((torch.randn(2000) * 10.0 ** torch.randint(-3, 3, (2000,)), torch.zeros(1)))
    # torch rounds float64 to float32 before it rounds to 16 bits.
    values = values.double() * (1 + 2.0**-40) if dtype == torch.float32 else values
    stored = values.to(dtype)
    step = half_step(stored).double()
    assert ((stored.double() - values.double()).abs() <= step * (1 + 1e-6)).all()
    up = torch.nextafter(stored, torch.tensor(math.inf, dtype=dtype)).double() - stored.double()
    powers = torch.frexp(stored.abs().double())[0] == 0.5  # at a power of two the step changes
    inside = ~powers & (stored != 0)
    assert torch.allclose(up[inside], 2 * step[inside])


def test_nf4_is_that_of_bitsandbytes():
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for shape in ((64, 192), (6, 96), (3, 65)):
        values = torch.randn(shape).bfloat16()
        # Padded to whole blocks, which leaves scales alone: the kernels for AVX512 take no other sizes.
        whole = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % 64)).view(-1, 64)
        real = dequantize_4bit(*quantize_4bit(whole, quant_type="nf4", blocksize=64)).float()
        found = through_nf4(values.float(), torch.bfloat16)
        assert torch.equal(found.flatten(), real.flatten()[: values.numel()])
    assert torch.equal(through_nf4(torch.zeros(2, 64), torch.bfloat16), torch.zeros(2, 64))


def test_the_error_that_is_said_is_that_of_many_samples():
    """Rows of very different energy, systematic samples of them: their own spread is not above the one that is said."""
    torch.manual_seed(0)
    energies = torch.exp(torch.randn(4000, dtype=torch.float64))
    tops = energies * (0.7 + 0.1 * torch.randn(4000, dtype=torch.float64)) * energies**0.2
    found = []
    for number in range(300):
        sample = sample_of(f"w{number}", (4000, 4096), energies)
        assert len(sample.starts) == 32
        found.append(ratio(tops[sample.starts] / sample.chances, energies[sample.starts] / sample.chances, False))
    real = float(tops.sum() / energies.sum())
    values = torch.tensor([each.value for each in found])
    assert float(values.mean()) == pytest.approx(real, rel=0.005)
    inside = sum(abs(each.value - real) <= each.error for each in found)
    assert inside >= 0.9 * len(found)
    assert sum(each.error for each in found) / len(found) < 0.1 * real
    one = torch.ones(2, dtype=torch.float64)
    assert ratio(one, 2 * one, True) == (0.5, 0.0)
    assert math.isnan(ratio(one, 0 * one, True).value)


def test_samples_are_whole_blocks_and_the_same_every_time():
    for shape in ((3584, 3584), (3584, 18944), (1280, 3420), (5, 7)):
        energies = torch.ones(shape[0], dtype=torch.float64)
        sample = sample_of("w", shape, energies)
        assert sample.starts == sample_of("w", shape, energies).starts
        assert sample.whole or len(sample.starts) >= PARTS
        assert all(start * shape[1] % 64 == 0 for start in sample.starts)
        assert sample.rows * shape[1] % 64 == 0
        assert float((sample.rows / sample.chances).sum()) == pytest.approx(max(shape[0], sample.rows), rel=0.1)
    even = torch.ones(3584, dtype=torch.float64)
    assert sample_of("v", (3584, 3584), even).starts != sample_of("w", (3584, 3584), even).starts


def test_bf16_merge_of_the_embedded_model_is_predicted(embedded):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    base = embedded_model_dir()
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16)
    before = {name: value.clone().float() for name, value in model.state_dict().items()}
    merged = PeftModel.from_pretrained(model, embedded).merge_and_unload().state_dict()
    subject = subject_of(base, embedded)
    assert len(subject.survey) == 28
    for module, found in subject.survey.items():
        factors = subject.updates.pairs[module].factors()
        update = factors.scaling * factors.left @ factors.right
        change = merged[f"{module}.weight"].float() - before[f"{module}.weight"]
        hold(found.losses["bf16"], change, update)
        assert 0.3 < found.losses["bf16"].kept < 0.95  # there is something to predict
        assert found.update == pytest.approx(factors.squared_norm, rel=1e-4)
        assert found.strength.value == pytest.approx(float(update.norm() / before[f"{module}.weight"].norm()), rel=1e-3)


def test_a_merge_into_four_bits_of_the_embedded_model_is_predicted(shop, embedded):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    base = embedded_model_dir()
    asked = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16, quantization_config=asked)

    def unpacked(model):
        return {
            name: dequantize_4bit(value.data, value.quant_state).bfloat16().float()  # as a layer computes with it
            for name, value in model.named_parameters()
            if hasattr(value, "quant_state")
        }

    before = unpacked(model)
    with pytest.warns(UserWarning, match="may get different generations"):
        merged = unpacked(PeftModel.from_pretrained(model, embedded).merge_and_unload())
    subject = subject_of(base, embedded)
    plain = {name: rows[0] for name in before for rows in [subject.weights.rows(name, [(0, len(before[name]))])]}
    for module, found in subject.survey.items():
        name, factors = f"{module}.weight", subject.updates.pairs[module].factors()
        update = factors.scaling * factors.left @ factors.right
        hold(found.losses["nf4-in-place"], merged[name] - before[name], update)
        whole = (plain[name] + update).bfloat16()
        after = dequantize_4bit(*quantize_4bit(whole, quant_type="nf4", blocksize=64)).float()
        hold(found.losses["nf4-after-bf16"], after - before[name], update)


@pytest.mark.parametrize("strength", [4e-4, pytest.param(3e-3, marks=pytest.mark.slow)], ids=["faint", "strong"])
def test_a_true_size_layer_is_predicted_from_a_sample_of_its_rows(tmp_path, strength):
    """The query projection of 7B, written and read; rows of B differ in size, as in trained ones."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    rows, columns, rank = 3584, 3584, 16
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    weight = (torch.randn(rows, columns) * 0.02).bfloat16()
    left = torch.randn(rows, rank) * torch.exp(torch.randn(rows, 1) / 2) * strength
    save_file({name: weight}, tmp_path / "w.safetensors")
    save_file({"a": torch.randn(rank, columns) * 0.0096, "b": left}, tmp_path / "a.safetensors")
    adapter = read_header(Folder(tmp_path), "a.safetensors")
    update = Update(name.removesuffix(".weight"), "language", adapter["a"], adapter["b"], 2.0, rank)
    found = _of_weight(Weights(read_header(Folder(tmp_path), "w.safetensors")), name, update, update.factors())
    assert found.share < 1 / 80
    whole = weight.float()
    added = update.factors().rows(whole, 0)
    packed = through_nf4(whole, torch.bfloat16)
    hold(found.losses["bf16"], (whole + added).bfloat16().float() - whole, added)
    in_place = through_nf4(packed + added, torch.bfloat16) - packed
    hold(found.losses["nf4-in-place"], in_place, added)
    for method, change in (("bf16", (whole + added).bfloat16().float() - whole), ("nf4-in-place", in_place)):
        kept, error = numbers_of(change, added)
        # Four standard errors, of which two are said.
        assert abs(found.losses[method].kept - kept) <= 2 * found.losses[method].kept_error
        assert abs(found.losses[method].error - error) <= 2 * found.losses[method].error_error
    assert found.strength.value == pytest.approx(float(added.norm() / whole.norm()), rel=0.02)


def test_a_last_part_that_is_shorter_counts_as_what_it_is(tmp_path):
    """Rows of 96 values: two make whole blocks of NF4, and the last stands alone."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    name = "model.visual.blocks.0.mlp.up_proj.weight"
    weight, left = (
        (torch.randn(4001, 96) * 0.02).bfloat16(),
        torch.randn(4001, 4) * torch.linspace(0, 5e-3, 4001)[:, None],
    )
    save_file({name: weight, "a": torch.randn(4, 96) * 0.05, "b": left}, tmp_path / "w.safetensors")
    header = read_header(Folder(tmp_path), "w.safetensors")
    update = Update(name.removesuffix(".weight"), "vision", header["a"], header["b"], 1.0, 4)
    found = _of_weight(Weights(header), name, update, update.factors())
    assert found.share < 1
    added = update.factors().rows(weight.float(), 0)
    hold(found.losses["bf16"], (weight.float() + added).bfloat16().float() - weight.float(), added)
    assert found.update == pytest.approx(float(added.square().sum()), rel=0.01)


def test_an_adapter_below_every_step_is_named(shop):
    adapter = shop.adapter(FAMILY)
    edit(adapter / CONFIG, lora_alpha=1e-9)  # below half a step of the smallest weight that any draw has
    found = preflight(shop.base(FAMILY), adapter).of(7)
    assert [(each.name, each.state) for each in found] == [("merge-changes-nothing", "red")]
    edit(adapter / CONFIG, lora_alpha=0.4)
    found = preflight(shop.base(FAMILY), adapter).of(7)
    assert [(each.name, each.state) for each in found] == [("merge-would-lose", "not judged")]
    edit(adapter / CONFIG, lora_alpha=16)
    found = preflight(shop.base(FAMILY), adapter).of(7)
    assert [(each.name, each.state) for each in found] == [("survives", "green")]
    assert len(found[0].notes) == 4


def test_of_a_packed_base_the_merge_in_place_is_predicted(shop):
    packed = shop.packed(FAMILY, bnb_4bit_use_double_quant=True)
    subject = subject_of(packed, shop.adapter(FAMILY))
    found = survey(subject)
    assert len(found) == 21
    assert all(each.packed and set(each.losses) == {"bf16", "nf4-in-place"} for each in found.values())
    assert all(isinstance(each, Surveyed) and isinstance(each.losses["bf16"], Loss) for each in found.values())


def test_of_a_merge_that_was_given_nothing_is_forecast_and_the_strengths_are_the_same(shop):
    base, adapter = shop.base(FAMILY), shop.adapter(FAMILY)
    plain, given = (_read(Asked(str(base), adapter, merged=merged))[1].survey for merged in (None, base))
    assert all(each.losses for each in plain.values())
    assert not any(each.losses for each in given.values())
    assert [each.strength for each in plain.values()] == [each.strength for each in given.values()]


def test_without_weights_nothing_is_predicted(shop):
    found = preflight("qwen2.5-vl-7b", shop.adapter(FAMILY)).of(7)
    assert [each.state for each in found] == ["not judged"]
