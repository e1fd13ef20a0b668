"""The proof of a merge, element by element: what rounding does passes in every way to merge, one foreign value does not."""

from __future__ import annotations

import math

import pytest
import torch
from preflight_corpus import Workshop
from preflight_corpus.making import WEIGHTS, edit, retensor

from pytest_qvl.preflight import preflight
from pytest_qvl.preflight.files.folder import Folder
from pytest_qvl.preflight.files.headers import read_header
from pytest_qvl.preflight.merged import Place, compare, outside_cells, prove
from pytest_qvl.preflight.packed_merge import packed_before
from pytest_qvl.preflight.questions.merge_proof import _verdict
from pytest_qvl.preflight.updates import Update
from pytest_qvl.preflight.weights import Weights

FAMILY = "qwen2_5_vl"
ROWS, COLUMNS, RANK, SCALING = 300, 256, 8, 2.0


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("merged"))


class Court:
    """One weight, an update, and a merge of both as a test makes it."""

    def __init__(self, folder, dtype=torch.bfloat16, size=2e-2):
        torch.manual_seed(0)
        self.folder, self.dtype = folder, dtype
        self.weight = (torch.randn(ROWS, COLUMNS) * 0.02).to(dtype)
        self.down, self.up = torch.randn(RANK, COLUMNS) * 0.05, torch.randn(ROWS, RANK) * size

    def added(self, scaling=SCALING):
        return scaling * self.up @ self.down

    def proof(self, merged, **update):
        found, place = self.places(merged, **update)
        with torch.no_grad():
            return found, prove(found, found.factors(), *place)

    def places(self, merged, magnitude=None):
        from safetensors.torch import save_file

        extra = {} if magnitude is None else {"m": magnitude}
        for name, tensors in {"base": {"w": self.weight}, "merged": {"w": merged}}.items():
            save_file(tensors, self.folder / f"{name}.safetensors")
        save_file({"a": self.down, "b": self.up, **extra}, self.folder / "adapter.safetensors")
        header = read_header(Folder(self.folder), "adapter.safetensors")
        update = Update("layer", "language", header["a"], header["b"], SCALING, RANK, header.get("m"))
        weights = (Weights(read_header(Folder(self.folder), f"{name}.safetensors")) for name in ("base", "merged"))
        return update, tuple(Place(each, "w") for each in weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [2e-4, 2e-2, 1.0])
def test_every_way_to_merge_is_within_rounding(tmp_path, dtype, size):
    court = Court(tmp_path, dtype, size)
    once = (court.weight.float() + court.added()).to(dtype)
    # As PEFT does: the product in float32, rounded, then added in the weight's dtype.
    rounded = court.weight + court.added().to(dtype)
    # As a GPU does with 16-bit matrices: each of the three steps is rounded.
    narrow = court.weight + (court.up.to(dtype) @ court.down.to(dtype)) * SCALING
    # As a float64 merge that is cast.
    wide = (court.weight.double() + SCALING * court.up.double() @ court.down.double()).to(dtype)
    for merged in (once, rounded, narrow, wide, once.float()):
        update, proof = court.proof(merged)
        assert proof.outside == 0
        assert _verdict(proof, update) in ("merged", "below")
        assert proof.uu == pytest.approx(float(court.added().double().square().sum()), rel=1e-4)


def test_one_foreign_value_is_seen(tmp_path):
    court = Court(tmp_path)
    merged = (court.weight.float() + court.added()).bfloat16()
    merged[217, 99] += 4 * merged[217, 99].abs() * 2.0**-7 + court.added().abs().max() * 0.2
    _, proof = court.proof(merged)
    assert proof.outside == 1
    assert proof.kept == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize(
    ("multiple", "words"),
    [
        (0.0, "unmerged"),
        (2.0, "merged twice"),
        (3.0, "merged three times"),
        (-1.0, "subtracted"),
        (8.0, "by alpha in place of alpha / r"),
        (0.5, "without its scaling"),
        (math.sqrt(8), "as rsLoRA's"),
        (1 / math.sqrt(8), "in place of rsLoRA's"),
        (1.5, "scaled"),
    ],
)
def test_known_ways_to_go_wrong_are_told_apart(tmp_path, multiple, words):
    court = Court(tmp_path)
    update, proof = court.proof((court.weight.float() + multiple * court.added()).bfloat16())
    assert words in _verdict(proof, update)
    assert proof.kept == pytest.approx(multiple, rel=0.02, abs=1e-6)


def test_dora_is_within_rounding_and_plain_lora_is_not(tmp_path):
    court = Court(tmp_path)
    whole = court.weight.float() + court.added()
    magnitude = court.weight.float().norm(dim=1) * 1.1
    merged = whole * (magnitude / whole.norm(dim=1))[:, None]
    # As PEFT does in bfloat16: norm, quotient and product are rounded.
    norm = (court.weight + court.added().bfloat16()).norm(dim=1)
    narrow = (magnitude.bfloat16() / norm)[:, None] * (court.weight + court.added().bfloat16())
    for made in (merged.bfloat16(), narrow):
        update, proof = court.proof(made, magnitude=magnitude)
        assert _verdict(proof, update) == "merged"
    update, proof = court.proof(whole.bfloat16(), magnitude=magnitude)
    assert proof.outside > 0


def test_the_way_a_base_was_packed_is_found_by_packing_it(tmp_path):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    court = Court(tmp_path)
    plain = (court.weight.float() + court.added()).bfloat16()
    for kind, double, words in [("nf4", False, "NF4"), ("nf4", True, "NF4 with double"), ("fp4", False, "FP4")]:
        packed = quantize_4bit(court.weight, quant_type=kind, blocksize=64, compress_statistics=double)
        unpacked = dequantize_4bit(*packed)
        merged = (unpacked.float() + court.added()).bfloat16()
        update, proof = court.proof(merged)
        assert _verdict(proof, update) == "other"
        update, places = court.places(merged)
        assert packed_before(update.factors(), *places).startswith(words)
        update, places = court.places(unpacked)
        assert packed_before(update.factors(), *places).endswith("without the adapter")
    update, places = court.places(plain)
    assert packed_before(update.factors(), *places) == ""


@pytest.mark.parametrize("double", [False, True])
def test_what_a_packed_base_was_packed_from_is_told_from_anything_else(tmp_path, double):
    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import save_file

    court = Court(tmp_path, size=2e-3)
    packed, state = quantize_4bit(court.weight, quant_type="nf4", blocksize=64, compress_statistics=double)
    parts = {name.removeprefix("w."): value for name, value in state.as_dict(packed=True).items()}
    save_file({"w": packed, **{f"w.{name}": value for name, value in parts.items()}}, tmp_path / "packed.safetensors")
    base = Place(Weights(read_header(Folder(tmp_path), "packed.safetensors")), "w")
    merged = (court.weight.float() + court.added()).bfloat16()
    update, (_, place) = court.places(merged)
    assert outside_cells(update.factors(), base, place) == 0
    assert outside_cells(None, base, place) > 0
    merged[3, 5] += court.weight[3].abs().max()
    _, (_, place) = court.places(merged)
    assert outside_cells(update.factors(), base, place) == 1
    _, (_, place) = court.places(court.weight)
    assert outside_cells(None, base, place) == 0
    assert outside_cells(update.factors(), base, place) > 0


def test_two_names_of_one_tensor_are_refused(shop):
    folder = shop.copy(shop.base("qwen2_vl"))

    from safetensors.torch import load_file

    names = load_file(folder / WEIGHTS)
    today = next(name for name in names if "visual.merger" in name)
    other = today.removeprefix("model.") if today.startswith("model.") else f"model.{today}"
    retensor(folder / WEIGHTS, lambda name, tensor: {name: tensor, **({other: tensor * 2} if name == today else {})})
    found = preflight(folder, shop.adapter("qwen2_vl")).of(4)
    assert [(each.name, each.state) for each in found] == [("unsafe", "red")]
    assert "one tensor by their names" in found[0].line


def test_values_that_are_not_finite_are_counted(tmp_path):
    court = Court(tmp_path)
    merged = (court.weight.float() + court.added()).bfloat16()
    merged[3, 4], merged[200, 1] = math.nan, math.inf
    update, proof = court.proof(merged)
    assert (proof.bad, proof.outside) == (2, 2)
    assert _verdict(proof, update) == "not-finite"


def test_tensors_are_compared_by_bytes_and_by_value(tmp_path):
    from safetensors.torch import save_file

    value = torch.randn(40, 6)
    other = value.clone()
    other[7, 2] += 1
    tensors = {"a": value, "same": value.clone(), "one": other, "half": value.half(), "double": value.double()}
    tensors["nan"] = value.clone().fill_(math.nan)
    save_file(tensors, tmp_path / "t.safetensors")
    found = read_header(Folder(tmp_path), "t.safetensors")
    results = {name: compare(name, found["a"], found[name]) for name in tensors}
    assert results["same"].bytes_equal
    assert (results["one"].changed, results["one"].cast) == (1, 0)
    assert results["half"].changed == results["half"].cast > 0
    assert (results["double"].bytes_equal, results["double"].changed) == (False, 0)
    assert results["nan"].bad == value.numel()
    assert compare("rows", found["one"], found["a"], {7: value[7]}).changed == 0


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_rows_trained_in_float32_are_the_same_rows_in_a_table_of_another_dtype(tmp_path, base, stored):
    from safetensors.torch import save_file

    table, rows = torch.randn(40, 6).to(base), {n: torch.randn(6) for n in (3, 7)}
    merged = table.clone()
    for number, values in rows.items():
        merged[number] = values.to(base)
    save_file({"table": table, "merged": merged.to(stored), "copy": torch.randn(40, 6)}, tmp_path / "t.safetensors")
    found = read_header(Folder(tmp_path), "t.safetensors")
    lossless = {base, stored} != {torch.float16, torch.bfloat16} and not (base == torch.float32 != stored)
    if lossless:
        assert compare("rows", found["table"], found["merged"], rows).changed == 0
    other = {**rows, 7: rows[7] + 0.1}
    result = compare("rows", found["table"], found["merged"], other)
    assert result.changed - result.cast > 0


def test_a_trained_copy_may_have_been_rounded_to_the_dtype_of_its_base(tmp_path):
    from safetensors.torch import save_file

    copy = torch.randn(40, 6)
    tensors = {"copy": copy, "loaded": copy.bfloat16().float(), "other": copy.bfloat16().float() * 1.01}
    save_file(tensors, tmp_path / "t.safetensors")
    found = read_header(Folder(tmp_path), "t.safetensors")
    same = compare("loaded", found["copy"], found["loaded"], through=torch.bfloat16)
    assert same.changed == same.cast > 0
    assert compare("loaded", found["copy"], found["loaded"]).cast == 0
    other = compare("other", found["copy"], found["other"], through=torch.bfloat16)
    assert other.changed > other.cast


def test_nothing_is_said_of_a_merge_that_cannot_be_compared(shop):
    adapter = shop.adapter(FAMILY)
    other = {each.name for each in preflight(shop.base(FAMILY), adapter, merged=shop.base("qwen3_vl")).of(7)}
    assert other == {"other-model"}
    with_hub = preflight("qwen2.5-vl-7b", adapter, merged=shop.base(FAMILY)).of(7)
    assert [each.state for each in with_hub] == ["not judged"]


@pytest.mark.parametrize("runtime", ["transformers", "vllm"])
def test_a_head_of_its_own_under_a_configuration_that_ties_is_what_the_loader_makes_of_it(shop, runtime):
    """The same of base and merged checkpoint, and as the installed Transformers loads it."""
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText

    def tie(fields):
        fields["tie_word_embeddings"] = True
        fields.get("text_config", {})["tie_word_embeddings"] = True

    base, adapter = shop.base(FAMILY), shop.adapter(FAMILY)
    merged, tied = shop.merged(base, adapter), shop.copy(base)
    for folder in (merged, tied):
        edit(folder / "config.json", tie)
    loaded = AutoModelForImageTextToText.from_pretrained(tied).lm_head.weight
    kept = torch.equal(loaded, load_file(tied / WEIGHTS)["lm_head.weight"])
    expected = "not judged" if kept and runtime == "transformers" else "red"
    of_merge = [f for f in preflight(base, adapter, merged=merged, runtime=runtime).of(7) if f.name == "head-tied-over"]
    of_base = [f for f in preflight(tied, runtime=runtime).of(5) if f.name == "head-tied-over"]
    assert [f.state for f in (*of_merge, *of_base)] == [expected] * 2


def test_a_merged_folder_from_a_stranger_is_read_within_limits(shop):
    adapter = shop.adapter(FAMILY)
    merged = shop.copy(shop.base(FAMILY))
    outside = merged.parent / "outside.safetensors"
    (merged / WEIGHTS).rename(outside)
    (merged / WEIGHTS).symlink_to(outside)
    (found,) = preflight(shop.base(FAMILY), adapter, merged=merged).red
    assert (found.question, found.name) == (0, "merged-unsafe")
    assert "link to a file outside" in found.line


def test_names_of_the_report_are_harmless(shop):
    adapter = shop.adapter(FAMILY)
    merged = shop.copy(shop.base(FAMILY))
    retensor(merged / WEIGHTS, lambda name, tensor: {name.replace("lm_head", "\x1b[31mhead<b>"): tensor})
    found = preflight(shop.base(FAMILY), adapter, merged=merged)
    assert {"dropped", "added"} <= {each.name for each in found.of(7)}
    assert not any("\x1b" in f"{each.line}{each.cause}" for each in found)
