"""Weights and configuration values against the checkpoint: whatever is loaded whole passes, one bit is enough to fail."""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pytest_qvl.checks import AdapterPolicy, frozen_vision, training_step, weights_as_stored
from pytest_qvl.checks.support.initialised import looks_drawn
from pytest_qvl.evidence import CannotJudge, CheckFailed, InputError
from pytest_qvl.faults.case import load
from pytest_qvl.faults.matrix.random_models import random_config
from pytest_qvl.faults.tools import all_of, values
from pytest_qvl.models.adapters import base_modules
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.sources import stored
from pytest_qvl.models.sources.digests import altered_files, known_digest
from pytest_qvl.models.sources.embedded import EMBEDDED_SHA256, embedded_model_dir
from pytest_qvl.models.sources.stored import StoredFolder
from pytest_qvl.models.sources.synthetic import build_synthetic
from pytest_qvl.models.sources.synthetic_checkpoint import write_checkpoint
from pytest_qvl.oracles.nf4 import CODE_BOOK
from pytest_qvl.samples import make_batch, scenes

LAYER = "model.language_model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def model(fresh_model: Any) -> Any:
    """Shared: whoever damages it puts it back."""
    return fresh_model()


def figures(evidence: Any) -> dict[str, Any]:
    return {figure.name: figure.value for figure in evidence.figures}


def refused(model: Any, checkpoint: Path | None = None, policy: AdapterPolicy | None = None) -> str:
    with pytest.raises(CheckFailed) as caught:
        weights_as_stored(model, checkpoint, policy)
    return str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "quantized"),
    [
        ("bfloat16", True),
        ("float16", False),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in [("float16", True), ("float32", True)]),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in [("bfloat16", False), ("float32", False)]),
    ],
)
def test_every_tensor_and_value_of_a_loaded_model_is_compared(fresh_model: Any, dtype: str, quantized: bool) -> None:
    evidence = weights_as_stored(fresh_model(dtype=dtype, quantized=quantized))
    assert figures(evidence)["tensors compared"] == 105
    assert figures(evidence)["values of config.json compared"] > 60


@pytest.mark.parametrize(
    "quantization",
    [
        {"bnb_4bit_use_double_quant": False},
        pytest.param({"bnb_4bit_quant_type": "fp4"}, marks=pytest.mark.slow),
        pytest.param({"bnb_4bit_quant_storage": torch.bfloat16}, marks=pytest.mark.slow),
        pytest.param({"skip": None}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_other_ways_to_quantize(fresh_model: Any, quantization: dict[str, Any]) -> None:
    assert weights_as_stored(fresh_model(**quantization)).ok


@pytest.mark.parametrize(
    "lora",
    [
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": "all-linear"},
        pytest.param({"use_dora": True, "init_lora_weights": False}, marks=pytest.mark.slow),
        pytest.param({"trainable_token_indices": [1, 2]}, marks=pytest.mark.slow),
        pytest.param({"bias": "all"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_an_adapter_changes_nothing_of_the_base(fresh_model: Any, lora: dict[str, Any]) -> None:
    evidence = weights_as_stored(fresh_model(lora=lora))
    assert figures(evidence)["tensors that differ"] == 0


def test_trained_biases_are_noted_and_not_compared(fresh_model: Any) -> None:
    model = fresh_model(lora={"bias": "lora_only"})
    bias = base_modules(anatomy(model))["model.language_model.layers.0.self_attn.q_proj"].bias
    bias.data.add_(1)
    evidence = weights_as_stored(model)
    assert any("trained with the adapter (its bias setting)" in note for note in evidence.notes)


def test_what_merging_and_unmerging_leaves(fresh_model: Any, processor: Any) -> None:
    model = fresh_model(dtype="float32", quantized=False, lora={"init_lora_weights": False})
    model.merge_adapter()
    batch = make_batch(processor, scenes(seed=5, per_skill=1)[:1], answers=True)
    for train in (partial(training_step, gradient_checkpointing=False), frozen_vision):
        with pytest.raises(InputError, match=r"is merged into the base weights, .*: call unmerge_adapter\(\) before"):
            train(model, batch)
    model.unmerge_adapter()
    assert "is off by roundings, up and down: something was added and taken away again, as by merge" in refused(model)


def test_what_the_policy_names_may_be_trained(fresh_model: Any) -> None:
    model = fresh_model(dtype="float32")
    block: Any = anatomy(model).blocks[0]
    block.requires_grad_(True)
    block.attn.proj.weight.data.mul_(1.5)
    message = refused(model)
    assert "model.visual.blocks.0.attn.proj.weight" in message
    assert "it was trained, which no policy names" in message
    assert weights_as_stored(model, policy=AdapterPolicy.parse("language, vision:full")).ok


def test_a_part_that_begins_anew_is_named_unless_it_is_to_be_trained(tiny_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_dir, tmp_path / "anew")
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "merger" in name and tensor.ndim > 1:
            tensor.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(0))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = load(lora=None, folder=folder)
    assert "1 of 9 layers have weights as they were drawn (model.visual.merger)" in refused(model)
    assert weights_as_stored(model, policy=AdapterPolicy.parse("language, merger:full")).ok


def test_an_initialisation_that_rewrites_the_base_is_noted(fresh_model: Any) -> None:
    evidence = weights_as_stored(fresh_model(lora={"init_lora_weights": "olora"}))
    assert any("rewritten by the adapter's initialisation" in note for note in evidence.notes)


def test_k_bit_preparation_casts_and_is_healthy(fresh_model: Any) -> None:
    from peft import prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(fresh_model(dtype="float16"), use_gradient_checkpointing=False)
    evidence = weights_as_stored(model)
    assert any("rounded to float16 on the way" in note for note in evidence.notes)


def test_a_merged_adapter_is_not_judged(fresh_model: Any) -> None:
    model = fresh_model(quantized=False, lora=True)
    model.merge_adapter()
    with pytest.raises(CannotJudge, match=r"unmerge_adapter\(\) first"):
        weights_as_stored(model)


def test_a_state_that_names_another_dtype_by_now(fresh_model: Any) -> None:
    """As Unsloth sets it to what the layers compute in; the weights were quantized from the checkpoint's bfloat16."""
    model = fresh_model(dtype="bfloat16")
    for _name, module in base_modules(anatomy(model)).items():
        if state := getattr(getattr(module, "weight", None), "quant_state", None):
            state.dtype = torch.float16
    assert weights_as_stored(model).ok


def test_another_order_of_summation_is_no_fault(model: Any, tiny_dir: Path) -> None:
    """Another number of threads gives an offset whose last bit is another, and statistics that belong to it."""
    from bitsandbytes.functional import quantize_4bit, quantize_blockwise

    state = base_modules(anatomy(model))[LAYER].weight.quant_state
    weight = load_file(tiny_dir / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    absmax = quantize_4bit(weight.float(), blocksize=64, quant_type="nf4")[1].absmax
    other = torch.nextafter(state.offset, torch.tensor(1.0))
    codes, nested = quantize_blockwise(absmax - other, blocksize=256)
    changed = [(state.offset, other), (state.absmax, codes), (state.state2.absmax, nested.absmax)]
    with all_of([values(old, lambda _, new=new: new) for old, new in changed]):
        assert weights_as_stored(model).ok
    with values(state.offset, lambda offset: offset * (1 + 1e-5)):
        assert "the offset of its double quantization" in refused(model)


def test_a_folder_saved_in_4_bits_is_compared_byte_for_byte(tiny_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_dir, tmp_path / "saved")
    load(lora=None).save_pretrained(folder)
    model = load(lora=None, folder=folder)
    assert figures(weights_as_stored(model))["tensors compared"] == 105
    assert weights_as_stored(load(lora=None, folder=folder, quantized=False)).ok  # dequantized
    assert weights_as_stored(model, tiny_dir).ok  # and against the weights that it was quantized from
    state = base_modules(anatomy(model))[LAYER].weight.quant_state
    state.absmax[7] ^= 1
    assert f"{LAYER}.weight: its absmax differs in 1 of" in refused(model)
    state.absmax[7] ^= 1
    state.offset.add_(1e-6)
    assert f"{LAYER}.weight: its offset differs in 1 of 1" in refused(model)


@pytest.mark.parametrize(
    ("family", "tied"),
    [
        ("qwen2_5_vl", True),
        ("qwen3_vl", False),
        pytest.param("qwen2_5_vl", False, marks=pytest.mark.slow),
        pytest.param("qwen3_vl", True, marks=pytest.mark.slow),
    ],
)
def test_shards_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, tied: bool) -> None:
    monkeypatch.setattr(stored, "PIECE", 20_000)
    folder = tmp_path / "model"
    config = random_config(family, layers=2, blocks=4, tied=tied)
    write_checkpoint(config, folder, lambda _: None, device="cpu", dtype="float32", shard_bytes=2**19)
    assert len(list(folder.glob("*.safetensors"))) > 2
    model = _loaded(folder)
    evidence = weights_as_stored(model)
    assert any("random weights" in note for note in evidence.notes)
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) is tied


def _loaded(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    from pytest_qvl.models.quantized import usual_quantization

    return AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, quantization_config=usual_quantization(torch.float32)
    )


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning:peft")
def test_a_tied_head_with_a_trained_copy(tmp_path: Path, lora_config: Any) -> None:
    from peft import get_peft_model

    folder = tmp_path / "model"
    config = random_config("qwen2_5_vl", layers=1, blocks=2, tied=True)
    write_checkpoint(config, folder, lambda _: None, device="cpu", dtype="float32")
    model = get_peft_model(_loaded(folder), lora_config(modules_to_save=["lm_head"]))
    assert weights_as_stored(model).ok


def test_synthetic_weights_are_drawn_again_also_under_an_adapter(lora_config: Any, monkeypatch: Any) -> None:
    from peft import get_peft_model

    from pytest_qvl.models.quantized import usual_quantization

    monkeypatch.setattr(stored, "PIECE", 5_000)  # as at true size: no whole number of rows
    model = build_synthetic(random_config("qwen3_vl"), usual_quantization(torch.float32), "cpu", torch.float32, 5)
    model = get_peft_model(model, lora_config())
    assert any("of the synthetic weights of seed 5" in note for note in weights_as_stored(model).notes)
    weight = base_modules(anatomy(model))["model.visual.blocks.0.attn.qkv"].weight
    weight.data[3, 4] += 1
    assert "blocks.0.attn.qkv.weight: differs in 1 of 12,288 elements, first at [3, 4]" in refused(model)
    weight.data[3, 4] -= 1
    weight.data.copy_(weight.data.roll(1, 0))
    assert "each of its rows holds the one before it" in refused(model)


def test_a_synthetic_tensor_that_the_model_lost_is_missed() -> None:
    model = build_synthetic(random_config("qwen2_5_vl"), None, "cpu", torch.float32)
    assert weights_as_stored(model).ok
    projection: Any = anatomy(model).blocks[1].attn.proj  # type: ignore[union-attr]
    projection.bias = None
    message = refused(model)
    assert "what was drawn from seed 0 holds 1 tensor (model.visual.blocks.1.attn.proj.bias)" in message
    assert "that the model has no place for" in message


def test_the_head_that_a_checkpoint_lacks_is_named(fresh_model: Any, tiny_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_dir, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 tensor (lm_head.weight)" in refused(fresh_model(), folder)


def test_values_of_the_live_modules_are_those_of_the_file(model: Any, tiny_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_dir, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"], config["image_token_id"], config["tie_word_embeddings"] = 12.0, 1, True
    config["vision_config"] |= {"window_size": 112, "fullatt_block_indexes": [0, 3], "tokens_per_second": 4}
    (folder / "config.json").write_text(json.dumps(config))
    message = refused(model, folder)
    assert "model.visual.window_size is 56 instead of 112; model.visual.fullatt_block_indexes is [1, 3]" in message
    assert "as of a rotary base of 10 instead of 12" in message
    assert "values that differ from config.json 7 (== 0)" in message


def test_a_model_of_another_release_layout_says_the_same(tiny_dir: Path, tmp_path: Path, model: Any) -> None:
    """``save_pretrained`` of the installed release, whose names and configuration differ from the older file's."""
    folder = tmp_path / "again"
    load(lora=None, quantized=False, dtype="bfloat16").save_pretrained(folder)
    names = set(StoredFolder(folder)._places)
    assert names == set(StoredFolder(tiny_dir)._places)
    assert weights_as_stored(model, folder).ok


def test_rewritten_weights_are_not_judged(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    state = base_modules(anatomy(model))[LAYER].weight.quant_state
    monkeypatch.setattr(state, "packing_format_for_cpu", True, raising=False)
    with pytest.raises(CannotJudge, match="rewritten in place for a CPU kernel"):
        weights_as_stored(model)


def test_a_hub_id_is_found_in_the_cache(
    fresh_model: Any, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0" * 40
    shutil.copytree(tiny_dir, tmp_path / "models--owner--name" / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = fresh_model()
    model.name_or_path, model.config._commit_hash = "owner/name", commit
    assert any(f"snapshots/{commit}" in note for note in weights_as_stored(model).notes)


def test_nobody_knows_the_files(fresh_model: Any, tmp_path: Path) -> None:
    model = fresh_model()
    model.name_or_path = model.config._name_or_path = ""
    with pytest.raises(CannotJudge, match="nobody knows which files"):
        weights_as_stored(model)
    with pytest.raises(ValueError, match=r"no folder with config.json and \*.safetensors"):
        weights_as_stored(model, tmp_path)


def test_the_code_book_of_the_paper_is_that_of_bitsandbytes() -> None:
    from bitsandbytes.functional import get_4bit_type

    assert torch.equal(torch.tensor(CODE_BOOK), get_4bit_type("nf4", device="cpu"))


def test_draws_look_drawn_and_trained_matrices_do_not(tiny_dir: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        assert looks_drawn(torch.randn(64, 192, generator=generator).bfloat16())
        assert looks_drawn(torch.rand(64, 64, generator=generator) - 0.5)
    checkpoint = StoredFolder(tiny_dir)
    matrices = [n for n in checkpoint._places if len(checkpoint.shape(n)) == 2]
    drawn = [n for n in matrices if looks_drawn(next(checkpoint.pieces(n)).values.reshape(checkpoint.shape(n)))]
    assert len(drawn) <= 1


@pytest.mark.parametrize("value", [1.0, 0.1, -1.7e-3], ids=["ones", "tenths", "small"])
def test_a_matrix_of_one_magnitude_was_not_drawn(value: float) -> None:
    signs = 1 - 2 * (torch.arange(64 * 64) % 2).view(64, 64)
    assert not looks_drawn(torch.full((64, 64), value))
    assert not looks_drawn(signs * value)


def test_the_embedded_weights_are_the_published_ones(tiny_dir: Path, tmp_path: Path) -> None:
    """Trained anew? Then write their SHA-256 into ``models/sources/embedded.py``."""
    assert known_digest(tiny_dir / "model.safetensors") == EMBEDDED_SHA256["qwen2.5-vl"]
    assert altered_files(tiny_dir) == ()
    assert altered_files(shutil.copytree(tiny_dir, tmp_path / "copy")) == ()


def test_a_file_in_the_hubs_cache_has_the_digest_that_names_it(tmp_path: Path) -> None:
    content = b"some weights"
    blob = tmp_path / "blobs" / hashlib.sha256(content).hexdigest()
    file = tmp_path / "snapshots" / "commit" / "model.safetensors"
    for path in (blob, file):
        path.parent.mkdir(parents=True)
    file.symlink_to(blob)
    blob.write_bytes(content)
    assert altered_files(file.parent) == ()
    blob.write_bytes(content + b".")
    assert "was altered: its SHA-256 is" in altered_files(file.parent)[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda weight: weight * 1.5, "about 1.5 times what was stored"),
        (lambda weight: weight.roll(-1, 0), "each of its rows holds the one behind it"),
        (lambda weight: torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)), "nothing in common"),
        (torch.zeros_like, "its values were lost after they were loaded"),
    ],
    ids=["scaled", "rolled", "random", "zero"],
)
def test_the_usual_cause_is_named(model: Any, change: Any, says: str) -> None:
    with values(anatomy(model).blocks[1].mlp.up_proj.weight, change):
        assert says in refused(model)


# A vocabulary that was resized after the load


def with_rows(model: Any, rows: int) -> Any:
    model.resize_token_embeddings(rows)
    return model


def notes_on_resizing(model: Any, checkpoint: Path | None = None) -> list[str]:
    return [note for note in weights_as_stored(model, checkpoint).notes if "resize_token_embeddings" in note]


def test_a_trimmed_vocabulary_is_a_note(fresh_model: Any) -> None:
    assert notes_on_resizing(with_rows(fresh_model(), 420)) == [
        "embeddings and head have the first 420 of the checkpoint's 448 rows: the vocabulary was trimmed after the load "
        "(resize_token_embeddings)"
    ]


def test_rows_that_were_added_are_in_no_file(fresh_model: Any) -> None:
    """Its config.json is right: it was blamed."""
    model = with_rows(fresh_model(), 512)
    said = refused(model)
    assert said.startswith("embeddings and head have 512 rows in memory and 448 in checkpoint ")
    for words in (
        ": the vocabulary was grown after the load (resize_token_embeddings), its first 448 rows are as stored, and no",
        "resize the 16-bit base once, save it with its processor and load that, or train them "
        '(modules_to_save=["embed_tokens", "lm_head"], or trainable_token_indices), or do not resize for a tokenizer of at '
        "most 448 tokens [rows that no file holds 128 (== 0)]",
    ):
        assert words in said
    assert "config.json" not in said
    assert "tensors that differ" not in said


@pytest.mark.parametrize("rows", [420, 512])
def test_rows_that_both_have_are_compared(fresh_model: Any, rows: int) -> None:
    model = with_rows(fresh_model(), rows)
    with torch.no_grad():
        model.lm_head.weight[419, 5] += 1
        model.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight.roll(1, 0))
    said = refused(model)
    assert "lm_head.weight: differs in 1 of " in said
    assert "first at [419, 5]" in said
    assert "embed_tokens.weight: differs in " in said
    assert "each of its rows holds the one before it" in said
    assert "rows are as stored" not in said
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()
    assert "it has nothing in common with what was stored" in refused(model)


@pytest.mark.parametrize(
    ("lora", "lost"),
    [
        ({}, "embeddings and head have 512"),
        ({"modules_to_save": ["embed_tokens"]}, "head has 512"),
        (
            {"trainable_token_indices": {"embed_tokens": [448, 449], "lm_head": [*range(448, 512)]}},
            "embeddings have 512",
        ),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, ""),
        ({"trainable_token_indices": {"embed_tokens": [*range(440, 512)], "lm_head": [*range(448, 512)]}}, ""),
        ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, ""),
        (
            {"target_modules": ["lm_head"], "trainable_token_indices": {"embed_tokens": [*range(448, 512)]}},
            "head has 512",  # PEFT saves no table beside trained tokens
        ),
    ],
    ids=["LoRA alone", "embeddings saved", "some rows", "both saved", "all rows", "both adapted", "one adapted"],
)
def test_added_rows_that_the_adapter_holds_are_a_note(
    fresh_model: Any, lora_config: Any, lora: dict[str, Any], lost: str
) -> None:
    from peft import get_peft_model

    model = get_peft_model(with_rows(fresh_model(), 512), lora_config(**lora))
    if lost:
        assert refused(model).startswith(f"{lost} rows in memory")
        return
    (note,) = notes_on_resizing(model)
    assert note == (
        "embeddings and head have 64 rows that were added after the load (resize_token_embeddings); the adapter holds them "
        f"({next(iter(lora))}), and fits a base that is resized to 512 rows only"
    )


@pytest.mark.parametrize(
    ("lora", "held"),
    [
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, True),
        ({"trainable_token_indices": {"lm_head": [448, 449]}}, False),
        ({"trainable_token_indices": [448, 449]}, True),  # which PEFT puts on both sides
        ({"target_modules": ["q_proj", "embed_tokens"]}, True),
        ({"target_modules": ["q_proj", "lm_head"]}, True),
        ({"target_modules": ".*embed_tokens"}, True),
        ({"target_modules": ["q_proj", "language_model.embed_tokens"]}, False),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_added_rows_of_a_tied_table_are_held_on_both_sides(lora: dict[str, Any], held: bool, tmp_path: Path) -> None:
    """Held are those with which a resized base, whose own rows are others, gives the trained logits."""
    from peft import LoraConfig, PeftModel, get_peft_model

    def grown() -> Any:
        model = build_synthetic(random_config("qwen2_5_vl", tied=True), None, "cpu", torch.float32)
        with_rows(model, 450).get_input_embeddings().weight.data[448:].normal_()
        return model.eval()

    model = get_peft_model(grown(), LoraConfig(**{"target_modules": ["q_proj"], **lora})).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(grown(), tmp_path).eval()
    ids = torch.tensor([[1, 448, 2, 449]])
    assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits) is held
    if held:
        (note,) = notes_on_resizing(model)
        assert note.startswith("embeddings and head, which are tied, have 2 rows that were added after the load")
    else:
        assert refused(model).startswith("embeddings and head, which are tied, have 450 rows in memory and 448 in ")


def test_tokens_that_are_trained_do_not_bind_a_trimmed_vocabulary(fresh_model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5]})
    model = get_peft_model(with_rows(fresh_model(), 420), lora)
    (note,) = notes_on_resizing(model)
    assert note.endswith("the vocabulary was trimmed after the load (resize_token_embeddings)")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_resized_base_that_was_saved_is_its_own_checkpoint(tied: bool, tmp_path: Path) -> None:
    model = build_synthetic(random_config("qwen2_5_vl", tied=tied), None, "cpu", torch.bfloat16)
    rows = model.get_input_embeddings().weight.shape[0]
    model.save_pretrained(tmp_path)
    both = "embeddings and head, which are tied, have" if tied else "embeddings and head have"
    with_rows(model, rows + 8)
    assert refused(model, tmp_path).startswith(f"{both} {rows + 8} rows in memory and {rows} in checkpoint")
    assert ("ensure_weight_tying=True" in refused(model, tmp_path)) is tied
    assert refused(model).startswith(f"{both} {rows + 8} rows in memory and {rows} in the synthetic weights of seed 0")
    with_rows(model, rows - 8)
    for checkpoint in (tmp_path, None):
        (note,) = notes_on_resizing(model, checkpoint)
        assert note.startswith(f"{both} the first {rows - 8} of the checkpoint's {rows} rows")
    model.save_pretrained(tmp_path)
    assert notes_on_resizing(model, tmp_path) == []


def test_a_checkpoint_whose_config_says_other_rows_is_blamed_itself(fresh_model: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(embedded_model_dir(), tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] = 512
    (folder / "config.json").write_text(json.dumps(config))
    assert 'set "vocab_size" to 448 in config.json' in refused(with_rows(fresh_model(), 512), folder)
