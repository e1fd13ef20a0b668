"""What only Qwen3.5 has: linear-attention layers, gated attention, partial rotation, norms centred on zero."""

from __future__ import annotations

import re
import sys
import weakref
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_qvl.checks import (
    CannotJudge,
    CheckFailed,
    QuantizationPolicy,
    adapter_census,
    layer_arithmetic,
    mrope_positions,
    packing_isolation,
    weights_as_stored,
)
from pytest_qvl.checks.support import packing
from pytest_qvl.checks.support.layers.mixers import CHUNKS, RUNS, rounded_to
from pytest_qvl.checks.support.noise_floor import noise_floor
from pytest_qvl.checks.support.packing import pack
from pytest_qvl.faults.case import Case, apply, load, lora_config
from pytest_qvl.faults.catalogue import catalogue, find
from pytest_qvl.faults.matrix.random_models import RANDOM_FAMILIES, random_config, random_model
from pytest_qvl.faults.subject import embedded
from pytest_qvl.faults.tools import after, attribute, values
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.layers import centred_on_zero, language_layers, rope_of
from pytest_qvl.models.mixer_kernels import mixer_kernels
from pytest_qvl.models.quantized import usual_quantization
from pytest_qvl.models.sources.synthetic import build_synthetic
from pytest_qvl.oracles import delta
from pytest_qvl.releases import is_before
from pytest_qvl.samples import scenes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:UserWarning:peft"),
    pytest.mark.skipif("qwen3_5" not in RANDOM_FAMILIES, reason="Transformers has no Qwen3.5 yet"),
]
FAULTS = [n for n, f in catalogue().items() if "linear attention" in f.requires and f.check == "layer_arithmetic"]
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _base(dtype: str) -> Any:
    """With gains that 16 bits round; those of weights as they are drawn, 0, are 1."""
    kind = getattr(torch, dtype)
    model = random_model("qwen3_5", seed=0, dtype=kind, quantization_config=usual_quantization(kind))
    for layer in language_layers(parts := anatomy(model)):
        for norm in (*layer.norms, *layer.head_norms):
            assert centred_on_zero(parts, norm)
            torch.nn.init.normal_(norm.weight, std=0.01, generator=torch.Generator().manual_seed(layer.number))
    return model


@pytest.fixture(
    scope="module",
    params=["float32", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bfloat16", "float16"))],
)
def case(processor: Any, request: pytest.FixtureRequest) -> Iterator[Case]:
    """A random model with two linear-attention layers before one of full attention, and padded rows."""
    from peft import get_peft_model

    dtype = request.param
    base, config = _base(dtype), lora_config()
    unrecorded: Any = None
    rows, policy = scenes(3, 1, ["side", "text"]), QuantizationPolicy(compute_dtype=dtype)
    with attribute(processor.image_processor, "patch_size", base.config.vision_config.patch_size):
        model = get_peft_model(base, config).eval()
        yield Case(model, processor, config, policy, rows, rows, unrecorded, load, embedded(dtype))


def _judge(case: Case) -> Any:
    return layer_arithmetic(case.model, case.batch(), case.lora_config)


def test_a_healthy_model_passes_and_nothing_is_left_out(case: Case) -> None:
    evidence = _judge(case)
    assert evidence.table is not None
    operations = {str(name) for name, *_ in evidence.table.rows}
    assert operations >= {"attention", "key-value cache", "rotary embedding", "norm", "4-bit product", "LoRA"}
    assert operations >= {"gated delta rule", "gated norm", "kept state"}
    assert evidence.notes == ()


def test_what_runs_under_autocast_is_judged_as_that_rounds_it(case: Case, autocasting: Any) -> None:
    with autocasting(case.model, torch.bfloat16):
        evidence = _judge(case)
    assert evidence.table is not None
    figures = {str(name): float(cast("float", value)) for name, _count, value in evidence.table.rows}
    assert max(figures.values()) <= 1
    assert min(figures[name] for name in ("gated delta rule", "gated norm", "attention")) > 0.05


@pytest.mark.parametrize(
    "name",
    [
        "state-lost-between-chunks",
        "decay-too-strong",
        pytest.param("state-rounded-between-steps", marks=pytest.mark.slow),
    ],
)
def test_a_fault_is_seen_under_autocast(case: Case, autocasting: Any, name: str) -> None:
    with apply(name, case), autocasting(case.model, torch.bfloat16), pytest.raises(CheckFailed) as failure:
        _judge(case)
    assert all(words in str(failure.value) for words in find(name).expected_words)


class _LiveBytes(TorchDispatchMode):
    """Most bytes alive at once, of storages that operations create."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self._live:
                self._live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, storage._cdata)
        return out

    def _forget(self, key: int) -> None:
        self.now -= self._live.pop(key)


def _most_bytes(layers: int, processor: Any) -> tuple[int, int, int]:
    """Of the check, of generation alone, and of the states of a layer: one in float64, sixteen in float32."""
    from peft import get_peft_model

    config, unrecorded = random_config("qwen3_5", layers=layers), cast("Any", None)
    text = config.get_text_config()
    rows, policy = scenes(3, 1, ["list", "text"]), QuantizationPolicy(compute_dtype="float32")
    with attribute(processor.image_processor, "patch_size", config.vision_config.patch_size):
        model = get_peft_model(build_synthetic(config, None, "cpu", torch.float32), lora_config()).eval()
        case = Case(model, processor, lora_config(), policy, rows, rows, unrecorded, load, embedded("float32"))
        batch = case.batch()
        with _LiveBytes() as alone, torch.no_grad():
            model.generate(**batch, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        with _LiveBytes() as judged:
            _judge(case)
    heads = text.linear_num_value_heads * text.linear_key_head_dim * text.linear_value_head_dim
    return judged.peak, alone.peak, len(batch["input_ids"]) * heads * (8 + RUNS * len(CHUNKS) * 4)


@pytest.mark.slow
def test_a_layer_more_takes_its_states_and_nothing_of_every_token(processor: Any) -> None:
    """Of a model of 24 such layers, what is kept of each counts, and not what one takes while it is judged.

    Three layers more are two of linear attention, and one whose keys and values are small beside the states.
    """
    few, many = _most_bytes(3, processor), _most_bytes(6, processor)
    states, generation = few[2], many[1] - few[1]
    assert many[0] - few[0] <= 2 * states + generation


def test_the_evidence_says_what_computed_linear_attention(case: Case) -> None:
    figures = {figure.name: figure.value for figure in _judge(case).figures}
    said = {name: value for name, value in figures.items() if name.startswith("linear attention")}
    assert len(said) == 4
    chosen = mixer_kernels(anatomy(case.model))
    assert set(said.values()) == set(chosen.values())
    if find_spec("fla") is None and not is_before("transformers", "5.17"):
        assert chosen["prompts"] == chosen["single tokens"] == "PyTorch"


def test_a_kernel_of_another_package_is_told_by_its_module(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    home = sys.modules[type(language_layers(anatomy(case.model))[0].attention).__module__]

    def implementation() -> None:
        """Stands for one of a package."""

    implementation.__module__ = "fla.ops.gated_delta_rule"
    monkeypatch.setattr(home, "torch_chunk_gated_delta_rule", lambda: implementation())
    monkeypatch.setattr(home, "causal_conv1d_fn", print)
    chosen = mixer_kernels(anatomy(case.model))
    assert (chosen["prompts"], chosen["convolution of prompts"]) == ("fla", "not known")


def test_mixers_of_older_releases_name_their_functions_themselves(case: Case) -> None:
    mixer: Any = language_layers(anatomy(case.model))[0].attention

    def kernel() -> None:
        """Stands for one of a package."""

    kernel.__module__ = "fla.ops.gated_delta_rule"
    with attribute(mixer, "chunk_gated_delta_rule", kernel), attribute(mixer, "causal_conv1d_fn", None):
        chosen = mixer_kernels(anatomy(case.model))
    assert (chosen["prompts"], chosen["convolution of prompts"]) == ("fla", "PyTorch")


def _long_row(case: Case) -> dict[str, torch.Tensor]:
    """One row of 700 tokens of text: errors of so many chunks have added up in the state."""
    batch = case.batch()
    ids = batch["input_ids"][batch["attention_mask"].bool()]
    ids = ids[~torch.isin(ids, torch.tensor(anatomy(case.model).vision_token_ids))]
    ids = ids.repeat(700 // len(ids) + 1)[None, :700]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@contextmanager
def _wide_case(processor: Any) -> Iterator[Case]:
    """Heads as wide as those of releases, in bfloat16."""
    from peft import get_peft_model

    config, unrecorded = random_config("qwen3_5"), cast("Any", None)
    text = config.text_config
    text.hidden_size = config.vision_config.out_hidden_size = 1024
    text.linear_key_head_dim = text.linear_value_head_dim = 128
    text.linear_num_key_heads, text.linear_num_value_heads = 8, 16
    base = build_synthetic(config, usual_quantization(torch.bfloat16), "cpu", torch.bfloat16)
    rows = scenes(3, 1, ["side", "text"])
    with attribute(processor.image_processor, "patch_size", config.vision_config.patch_size):
        model = get_peft_model(base, lora_config()).eval()
        yield Case(model, processor, lora_config(), QuantizationPolicy(), rows, rows, unrecorded, load, embedded())


@contextmanager
def _by_kernel(case: Case, *, forgets: bool = False) -> Iterator[None]:
    """Linear attention of several tokens as flash-linear-attention's kernels compute it, in their place.

    Held to the real kernels by Triton's interpreter: their root mean square error in float16 was 1.26e-05 and
    3.10e-05 on two draws, and this one's 1.29e-05 and 3.14e-05.
    """
    home = sys.modules[type(language_layers(anatomy(case.model))[0].attention).__module__]

    def kernel(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, **given: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        def rounded(x: torch.Tensor) -> torch.Tensor:
            return x.to(key.dtype).float()

        query, keys = (delta.of_unit_length(each.float()) for each in (query, key))
        tokens = delta.Tokens(delta.scaled(query), keys, *(each.float() for each in (value, g, beta)))
        empty = query.new_zeros(query.shape[0], query.shape[2], query.shape[3], value.shape[3])
        state = given["initial_state"]
        state = empty if state is None or forgets else state
        made, after = delta.chunked_by_kernel(tokens, state, rounded)
        return made.to(value.dtype), after

    kernel.__module__ = "fla.ops.gated_delta_rule"
    with attribute(home, "torch_chunk_gated_delta_rule", _wrapped(kernel)):
        yield


def _wrapped(implementation: Any) -> Any:
    """As Transformers wraps the function that it has chosen."""
    return lambda *args, **kwargs: implementation(*args, **kwargs)


@pytest.mark.slow
@pytest.mark.skipif(is_before("transformers", "5.17"), reason="a mixer has its own functions")
def test_kernels_that_round_inside_are_healthy(processor: Any) -> None:
    """Wide heads and a long row in bfloat16: error / limit was 1.06 where only PyTorch's rounding counted."""
    with _wide_case(processor) as case, _by_kernel(case):
        evidence = layer_arithmetic(case.model, _long_row(case), case.lora_config)
    figures = {str(name): float(cast("float", value)) for name, _count, value in evidence.table.rows}
    assert 0.3 < figures["gated delta rule"] <= 1


@pytest.mark.skipif(is_before("transformers", "5.17"), reason="a mixer has its own functions")
def test_a_kernel_that_forgets_the_state_is_named(case: Case) -> None:
    with _by_kernel(case, forgets=True), pytest.raises(CheckFailed, match=r"gated delta rule: .* behind a state"):
        _judge(case)


def test_the_layers_are_told_apart(case: Case) -> None:
    layers = language_layers(anatomy(case.model))
    assert [layer.attends for layer in layers] == [False, False, True]
    assert [len(layer.inputs) for layer in layers] == [4, 4, 3]
    assert rope_of(anatomy(case.model)).share == 0.25


def test_norms_are_centred_on_zero(case: Case) -> None:
    norm = language_layers(anatomy(case.model))[0].norms[0]
    with values(norm.weight, lambda weight: weight + 0.5):
        _judge(case)


def test_a_rotation_over_the_whole_head_is_named(case: Case) -> None:
    rotary: Any = anatomy(case.model).language_backbone.rotary_emb
    with values(rotary.inv_freq, lambda own: own.pow(0.25)), pytest.raises(CheckFailed, match="rotary embedding: "):
        _judge(case)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(case: Case, name: str) -> None:
    assert not find(name).missing(case)
    with apply(name, case) as damaged, pytest.raises(CheckFailed) as failure:
        _judge(damaged)
    for words in find(name).words():
        assert words in str(failure.value)


@pytest.mark.slow
def test_as_many_key_heads_as_value_heads_have_no_turns_to_take(case: Case) -> None:
    """As released models of 0.8B and 2B have."""
    config = random_config("qwen3_5", layers=1, blocks=1)
    text = config.get_text_config()
    text.linear_num_key_heads = text.linear_num_value_heads
    alike = replace(case, model=build_synthetic(config, None, "cpu", torch.float32))
    assert "share a key head: with one each" in (find("key-heads-in-turns").missing(alike) or "")
    assert "1 + weight is exact where weights are 0" in (find("gain-shifted-in-bfloat16").missing(alike) or "")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_state_of_one_row_that_was_rounded_is_told_from_one_of_float32(dtype: str) -> None:
    kind = getattr(torch, dtype)
    state = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert not rounded_to(state)
    assert not rounded_to(torch.cat((state, torch.zeros(1, 4, 16, 16))))  # a row of padding
    product = state.bfloat16().float()
    assert not rounded_to(product.mT @ product)
    assert rounded_to(torch.cat((state, state[:1].to(kind).float()))) == dtype
    assert rounded_to(state.to(kind)) == dtype


def test_what_a_mixer_returns_is_held(case: Case) -> None:
    mixer = language_layers(anatomy(case.model))[1].attention
    with after([mixer], lambda _m, _a, output: 1.01 * output), pytest.raises(CheckFailed) as failure:
        _judge(case)
    assert "layers.1.linear_attn does not return what out_proj does" in str(failure.value)


def test_packing_by_positions_is_not_judged_unless_somebody_packs(case: Case) -> None:
    batch = case.batch(padding_side="right", answers=True)
    with pytest.raises(CannotJudge, match=r"would not part the samples for linear attention \(Qwen3.5\)"):
        pack(anatomy(case.model), batch)


def test_samples_that_somebody_packed_leak_through_the_state(
    case: Case, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers' own code reads no cu_seq_lens (ms-swift#9618, huggingface/transformers#46093)."""
    batch = case.batch(padding_side="right", answers=True)
    monkeypatch.setattr(packing, "language_layers", lambda _parts: [])
    packed = pack(anatomy(case.model), batch)
    floor: Any = noise_floor(case.model.get_base_model(), processor, case.rows)
    with pytest.raises(CheckFailed, match="has other logits than alone"):
        packing_isolation(case.model, packed, floor)


def test_positions_are_those_of_the_oracle(case: Case) -> None:
    mrope_positions(case.model, case.batch())


def test_the_usual_adapter_is_on_every_linear_of_the_text(case: Case) -> None:
    evidence = adapter_census(case.model, case.lora_config)
    assert evidence.notes == ()
    assert evidence.table is not None
    linears = [n for n, _ in anatomy(case.model).named_linears() if anatomy(case.model).group_of(n) == "language"]
    assert {row[0]: row[2] for row in evidence.table.rows}["language"] == len(linears) == 2 * 8 + 7


def test_weights_of_multi_token_prediction_are_left_out_on_purpose(tmp_path: Path) -> None:
    """Releases hold them, and Transformers has no place for them (``_keys_to_ignore_on_load_unexpected``)."""
    model = random_model("qwen3_5", seed=0, dtype=torch.bfloat16, quantization_config=None)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "mtp.fc.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    assert weights_as_stored(model, tmp_path).ok
    save_file({**tensors, "mpt.fc.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckFailed, match="mpt.fc.weight"):
        weights_as_stored(model, tmp_path)


def test_what_seven_names_leave_out_is_named() -> None:
    from peft import get_peft_model

    config = lora_config(target_modules=SEVEN)
    evidence = adapter_census(get_peft_model(_base("float32"), config), config)
    (note,) = evidence.notes
    assert "2 of 3 layers mix tokens by linear attention without an adapter on it: 10 linears of" in note
    assert "model.language_model.layers.0.linear_attn" in note
    assert note.endswith("name in_proj_qkv, in_proj_z, in_proj_b, in_proj_a and out_proj in target_modules")


@pytest.mark.parametrize(
    ("left_out", "says"),
    [
        (
            {"exclude_modules": ["in_proj_b", "in_proj_a"]},
            ": 6 linears of .*name in_proj_qkv, in_proj_z and out_proj in",
        ),
        ({"layers_to_transform": [0, 2]}, "1 of 3 layers mix .*: 5 linears of model.language_model.layers.0.linear"),
        ({"exclude_modules": r".*\.linear_attn\..*"}, None),
        ({"layers_to_transform": [2]}, None),
        ({"modules_to_save": ["linear_attn"]}, None),
    ],
    ids=["linears", "layers", "mixers", "all its layers", "trained whole"],
)
def test_what_is_left_out_on_purpose_is_no_advice(left_out: dict[str, Any], says: str | None) -> None:
    from peft import get_peft_model

    config = lora_config(target_modules=SEVEN, **left_out)
    base = random_model("qwen3_5", seed=0, dtype=torch.float32, quantization_config=None)
    notes = adapter_census(get_peft_model(base, config), config).notes
    found = [note for note in notes if "linear attention" in note]
    assert len(found) == (says is not None)
    assert says is None or re.search(says, found[0])
