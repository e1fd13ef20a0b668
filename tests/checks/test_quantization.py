"""The quantization census sees what bitsandbytes really did, group by group, and says how to mend it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers
from packaging.version import Version

from pytest_qvl.checks.quantization import QuantizationPolicy, quantization_census
from pytest_qvl.checks.support.unpacked_weights import require_unpacked_weights
from pytest_qvl.checks.weights import weights_as_stored
from pytest_qvl.evidence import CannotJudge, CheckFailed
from pytest_qvl.faults.matrix.random_models import RANDOM_FAMILIES, random_model
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.quantized import usual_quantization
from pytest_qvl.models.quantized_layers import QuantizedLayers
from pytest_qvl.samples import make_batch, scenes


@pytest.fixture(scope="module")
def fresh_model(fresh_model: Any) -> Any:
    """In the dtype that the policy asks for by default."""
    return partial(fresh_model, dtype="bfloat16")


LAYER = "model.language_model.layers.0.self_attn.q_proj"


def refused(model: Any, policy: QuantizationPolicy | None = None) -> str:
    with pytest.raises(CheckFailed) as caught:
        quantization_census(model, policy)
    return str(caught.value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("lora", [None, True])
def test_healthy_models_pass_in_every_compute_dtype(fresh_model: Any, dtype: str, lora: bool | None) -> None:
    evidence = quantization_census(fresh_model(dtype=dtype, lora=lora), QuantizationPolicy(compute_dtype=dtype))
    assert evidence.ok
    figures = {figure.name: figure.value for figure in evidence.figures}
    assert figures["language linears in nf4"] == 28
    assert figures["language linears double-quantized"] == 28
    assert figures["vision linears quantized"] == figures["merger linears quantized"] == 0


def test_adapters_on_head_and_vision_do_not_hide_the_layers_below(fresh_model: Any) -> None:
    model = fresh_model(lora={"target_modules": "all-linear", "modules_to_save": ["lm_head"]})
    assert quantization_census(model).ok


def test_the_popular_skip_list_that_does_nothing(fresh_model: Any) -> None:
    model = fresh_model(skip=("visual", "lm_head"))
    if transformers.__version__.startswith("4."):
        assert quantization_census(model).ok  # there a pattern was a substring
        return
    message = refused(model)
    first = message.splitlines()[0]
    assert "vision: 20 of 20 linears are NF4 but must stay 16-bit" in first
    assert "first: model.visual.blocks.0.attn.qkv" in first
    assert "'visual'" in first
    assert "use ['model.visual', 'lm_head']" in first
    assert "merger: 2 of 2 linears are NF4" in message


def test_no_skip_list(fresh_model: Any) -> None:
    message = refused(fresh_model(skip=None))
    assert "no skip list was given: pass llm_int8_skip_modules=['model.visual', 'lm_head']" in message


def test_a_skip_list_replaces_the_default_and_loses_the_head(fresh_model: Any) -> None:
    message = refused(fresh_model(skip=("model.visual",)))
    assert message.startswith("lm_head: 1 of 1 linears are NF4")
    assert "replaces the default one" in message


def test_a_skip_list_that_covers_only_part_of_the_tower(fresh_model: Any) -> None:
    message = refused(fresh_model(skip=("model.visual.blocks", "lm_head")))
    assert message.startswith("merger: 2 of 2 linears are NF4")
    assert "does not cover it: use ['model.visual', 'lm_head']" in message


def test_a_skip_list_that_reaches_into_the_backbone(fresh_model: Any) -> None:
    message = refused(fresh_model(skip=("model.visual", "lm_head", "o_proj")))
    assert message.startswith("language: 4 of 28 linears are bfloat16 instead of nf4 (first: model.language_model")


def hybrid_model(*skip: str, tower: tuple[str, ...] = ("model.visual",)) -> Any:
    """Qwen3.5 of three layers, two of them linear attention with five linears each, in bfloat16."""
    if "qwen3_5" not in RANDOM_FAMILIES:
        pytest.skip("Transformers has no Qwen3.5 yet")
    asked = usual_quantization(torch.bfloat16, llm_int8_skip_modules=[*tower, "lm_head", *skip])
    return random_model("qwen3_5", seed=0, dtype=torch.bfloat16, quantization_config=asked)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (
            "linear_attn",
            "10 linears with 'linear_attn' in their path are quantized; write 'out_proj', 'in_proj_qkv', 'in_proj_z', "
            "'in_proj_b', 'in_proj_a' to keep them",
        ),
        ("in_porj_a", "2 linears with 'in_proj_a' in their path are quantized; write 'in_proj_a' to keep them"),
        ("gaet", "none has it in its path"),
    ],
)
def test_an_entry_that_does_nothing_is_a_note_where_the_policy_holds(entry: str, said: str) -> None:
    (note,) = quantization_census(hybrid_model(entry)).notes
    assert note == (
        f"the entry {entry!r} of the skip list matches no linear layer on Transformers {transformers.__version__}: {said}"
    )


def test_no_note_of_entries_that_lack_nothing(fresh_model: Any) -> None:
    other_families_and_kept_by_another_entry = ("model.visual", "lm_head", "linear_attn", "visual", "merger")
    assert quantization_census(fresh_model(skip=other_families_and_kept_by_another_entry)).notes == ()


MIXER = "model.language_model.layers.0.linear_attn"


@pytest.mark.parametrize("text", ["language, in_proj_[ab]:16bit", "language, in_proj_a:16bit, *.in_proj_b:16bit"])
def test_layers_that_are_kept_by_name(text: str) -> None:
    layers = QuantizedLayers.parse(text)
    policy = QuantizationPolicy(quantized=layers.quantized, kept=layers.all_kept)
    evidence = quantization_census(hybrid_model(".*in_proj_[ab]$"), policy)
    figures = {figure.name: figure.value for figure in evidence.figures}
    assert figures["linears kept by name quantized"] == 0
    assert figures["language linears in nf4"] == 3 * 3 + 2 * 3 + 4  # mlp; qkv, z, out_proj; full attention
    assert evidence.notes == ()


def test_layers_kept_undeclared_are_red_with_the_declaration() -> None:
    message = refused(hybrid_model(".*in_proj_[ab]$"))
    assert message.startswith("language: 4 of 23 linears are bfloat16 instead of nf4")
    assert "(--qvl-quantized-layers, ini or fixture) = 'language, in_proj_a:16bit, in_proj_b:16bit'" in message


def test_layers_declared_kept_and_packed_are_red() -> None:
    policy = QuantizationPolicy(kept=(*QuantizationPolicy().kept, "in_proj_a", "in_proj_b"))
    message = refused(hybrid_model("in_proj_a"), policy)
    assert message.startswith(
        "language: 2 of 4 linears that the policy names to stay 16-bit are quantized, as NF4 "
        f"(first: {MIXER}.in_proj_b); no entry of the skip list ['model.visual', 'lm_head', 'in_proj_a'] covers them: "
        "add 'in_proj_b' to llm_int8_skip_modules"
    )
    assert quantization_census(hybrid_model("in_proj_a", "in_proj_b"), policy).ok


def test_only_named_layers_packed() -> None:
    layers = QuantizedLayers.parse("language_model.*.mlp, down_proj:16bit")
    policy = QuantizationPolicy(quantized=layers.quantized, kept=layers.all_kept)
    assert quantization_census(hybrid_model(".*_attn", "down_proj"), policy).ok
    layers = QuantizedLayers.parse("language_model.*.mlp")
    policy = QuantizationPolicy(quantized=layers.quantized, kept=layers.all_kept)
    message = refused(hybrid_model(), policy)
    assert message.startswith("language: 14 of 14 linears are NF4 but must stay 16-bit")
    attentions = (
        "'in_proj_a', 'in_proj_b', 'in_proj_qkv', 'in_proj_z', 'k_proj', 'o_proj', 'out_proj', 'q_proj', 'v_proj'"
    )
    assert f"does not cover it: use ['model.visual', 'lm_head', {attentions}]" in message
    assert quantization_census(hybrid_model(".*_attn"), policy).ok
    message = refused(hybrid_model(".*_attn", "up_proj"), policy)
    assert message.startswith("language: 3 of 9 linears are bfloat16 instead of nf4")
    assert "= 'language_model.*.mlp, up_proj:16bit'" in message


def test_a_vision_layer_packed_on_purpose() -> None:
    layers = QuantizedLayers.parse("language, visual.blocks.*.mlp")
    policy = QuantizationPolicy(quantized=layers.quantized, kept=layers.all_kept)
    assert "nothing is quantized: vision: 8 of 8 linears" in refused(hybrid_model(), policy)
    tower = ("attn.qkv", "attn.proj", "model.visual.merger")
    assert quantization_census(hybrid_model(tower=tower), policy).ok
    message = refused(hybrid_model(tower=tower[2:]), policy)
    assert message.startswith("vision: 8 of 8 linears are NF4 but must stay 16-bit")
    assert "use ['model.visual.merger', 'lm_head', 'attn.proj', 'attn.qkv']" in message


def test_a_name_that_no_layer_has() -> None:
    policy = QuantizationPolicy(kept=(*QuantizationPolicy().kept, "in_proj_ba", "zzz"))
    message = refused(hybrid_model(), policy)
    assert "(qvl_quantized_layers): 'in_proj_ba' is no part (language, vision, " in message
    assert "names no linear layer of this model: did you mean in_proj_b?" in message
    assert "there are down_proj, gate_proj, in_proj_a, " in message


def test_the_declaration_does_not_contradict_itself() -> None:
    for quantized, advice in (
        (("language", "q_proj"), "'language, q_proj:16bit'"),
        (("q_proj", "v_proj"), "'v_proj, "),
    ):
        message = refused(hybrid_model("q_proj"), QuantizationPolicy(quantized=quantized))
        assert f"ini or fixture) = {advice}" in message
    message = refused(
        hybrid_model("model.language_model.layers.2.self_attn.q_proj"), QuantizationPolicy(quantized=("q_proj",))
    )
    assert "declare it" not in message


def test_the_declaration_leaves_out_names_that_no_layer_has() -> None:
    policy = QuantizationPolicy(kept=(*QuantizationPolicy().kept, "in_proj_b", "o_proj.base_layer"))
    message = refused(hybrid_model("o_proj", "in_proj_b"), policy)
    assert "'o_proj.base_layer' is no part " in message
    assert "= 'language, in_proj_b:16bit, o_proj:16bit'" in message


def test_one_vision_linear_alone_is_seen(fresh_model: Any) -> None:
    model, donor = fresh_model(), fresh_model(skip=None)
    model.model.visual.merger.mlp[2] = donor.model.visual.merger.mlp[2]
    assert refused(model).startswith(
        "merger: 1 of 2 linears are NF4 but must stay 16-bit (first: model.visual.merger.mlp.2)"
    )


def test_one_backbone_linear_left_out_is_seen(fresh_model: Any) -> None:
    model, donor = fresh_model(), fresh_model(quantized=False)
    model.model.language_model.layers[3].mlp.up_proj = donor.model.language_model.layers[3].mlp.up_proj
    assert "1 of 28 linears are bfloat16 instead of nf4 (first: model.language_model.layers.3.mlp.up_proj)" in refused(
        model
    )


def test_nothing_quantized_at_all(fresh_model: Any) -> None:
    assert refused(fresh_model(quantized=False)).startswith("nothing is quantized: language: 28 of 28 linears are")


def test_the_defaults_of_bitsandbytes_are_named(fresh_model: Any) -> None:
    message = refused(
        fresh_model(
            bnb_4bit_quant_type="fp4",
            bnb_4bit_use_double_quant=False,
            bnb_4bit_compute_dtype=torch.float32,
        )
    )
    assert "28 of 28 linears are fp4 instead of nf4" in message
    assert "pass bnb_4bit_quant_type='nf4'" in message
    assert "have double_quantized False instead of True" in message
    assert "have compute_dtype float32 instead of bfloat16" in message


def test_one_layer_with_other_blocks_or_compute(fresh_model: Any) -> None:
    model = fresh_model()
    layers = model.model.language_model.layers
    layers[1].mlp.down_proj.compute_dtype = torch.float32
    quantize(layers[2].mlp.down_proj, blocksize=128)
    message = refused(model)
    assert "1 of 28 quantized linears have blocksize 128 instead of 64" in message
    assert "first: model.language_model.layers.2.mlp.down_proj" in message
    assert "1 of 28 quantized linears have compute_dtype float32 instead of bfloat16" in message
    assert "first: model.language_model.layers.1.mlp.down_proj" in message


def quantize(linear: Any, *, blocksize: int) -> None:
    import bitsandbytes as bnb

    dense = torch.randn(linear.out_features, linear.in_features, dtype=torch.bfloat16)
    linear.weight = bnb.nn.Params4bit(dense, requires_grad=False, blocksize=blocksize, quant_type="nf4").to("cpu")


def test_a_head_that_is_tied_and_not_in_the_skip_list(fresh_model: Any) -> None:
    import bitsandbytes as bnb

    model = fresh_model()
    model.config.tie_word_embeddings = True
    table = model.model.language_model.embed_tokens.weight
    with torch.device("meta"):
        model.lm_head = bnb.nn.Linear4bit(table.shape[1], table.shape[0], bias=False, quant_type="nf4")
    model.lm_head.weight = table
    message = refused(model)
    assert message.startswith("lm_head cannot compute: Linear4bit, and its weight is bfloat16 and was never quantized")
    assert "the head is tied to the embeddings, which are not quantized: add 'lm_head'" in message


def test_a_layer_whose_weight_has_no_data(fresh_model: Any) -> None:
    model = fresh_model()
    layer = model.model.language_model.layers[1].mlp.up_proj
    layer.weight = torch.nn.Parameter(torch.empty(2, 2, device="meta"), requires_grad=False)
    assert "its weight has no data (meta device)" in refused(model)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("o_proj", "'o_proj' keeps 4 of them out"),
        (".*", "'.*' keeps 28 of them out, model.language_model.layers.3.mlp.down_proj among them: it is a regular"),
        ("model.language_model.layers.[12]", "'model.language_model.layers.[12]' keeps 14 of them out"),
    ],
)
def test_an_entry_that_reaches_too_far_is_named(fresh_model: Any, entry: str, says: str) -> None:
    if transformers.__version__.startswith("4.") and entry != "o_proj":
        pytest.skip("Transformers 4 takes no regular expressions")
    message = refused(fresh_model(skip=("model.visual", "lm_head", entry)))
    assert says in message
    assert "dropped" not in message


def test_storage_that_was_not_asked_for(fresh_model: Any) -> None:
    model = fresh_model(bnb_4bit_quant_storage=torch.bfloat16)
    assert quantization_census(model).ok  # not asked
    message = refused(model, QuantizationPolicy(quant_storage="uint8"))
    assert "have quant_storage bfloat16 instead of uint8" in message
    assert quantization_census(model, QuantizationPolicy(quant_storage="bfloat16")).ok


def test_values_of_another_type_under_the_name_of_nf4(fresh_model: Any) -> None:
    """A file says nf4, and its tables say otherwise: of another type, or cast with everything else."""
    model = fresh_model()
    quant = anatomy(model).base.get_submodule(LAYER).weight.quant_state
    healthy, healthy_nested = quant.code, quant.state2.code
    quant.code = healthy[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    assert refused(model).startswith(
        f"language: 1 of 28 quantized linears look their values up in another table than that of their type (first: {LAYER}"
    )
    quant.code, quant.state2.code = healthy, healthy_nested.bfloat16().float()
    assert "nested_quant_map of the checkpoint was exchanged, cast to another dtype, or saved" in refused(model)
    quant.state2.code = bnb.functional.create_dynamic_map() * (1 + 2**-23)
    assert quantization_census(model).ok


def test_the_table_that_bitsandbytes_0_49_leaves_on_the_cpu(fresh_model: Any) -> None:
    """Entry 0 of the 8-bit table is -1 there, before anything is quantized with it; from 0.50 on nothing leaves it so."""
    model = fresh_model()
    quant = anatomy(model).base.get_submodule(LAYER).weight.quant_state
    usual = bnb.functional.create_dynamic_map()
    if Version(bnb.__version__) < Version("0.50"):
        assert (quant.state2.code != usual).nonzero().flatten().tolist() == [0]
        assert quantization_census(model).ok
        assert weights_as_stored(model).ok
    else:
        assert torch.equal(quant.state2.code, usual)
        quant.state2.code = altered(usual, 0, -1.0)
        assert "or saved by bitsandbytes 0.49" in refused(model)


@pytest.mark.parametrize(
    ("entry", "value"), [(0, -0.9999), (0, -1.01), (0, 1.0), (1, -1.0), (127, 0.01), (254, 1.0), (255, -1.0)]
)
def test_any_other_entry_that_was_altered(fresh_model: Any, entry: int, value: float) -> None:
    model = fresh_model()
    quant = anatomy(model).base.get_submodule(LAYER).weight.quant_state
    quant.state2.code = altered(quant.state2.code, entry, value)
    assert f"(first: {LAYER}): quant_map or nested_quant_map" in refused(model)


def altered(table: torch.Tensor, entry: int, value: float) -> torch.Tensor:
    table = table.clone()
    table[entry] = value
    return table


def test_types_that_are_mixed(fresh_model: Any) -> None:
    model, donor = fresh_model(), fresh_model(bnb_4bit_quant_type="fp4")
    model.model.language_model.layers[0].mlp.up_proj = donor.model.language_model.layers[0].mlp.up_proj
    assert "language: 1 of 28 linears are fp4 instead of nf4 (first: model.language_model.layers.0.mlp" in refused(
        model
    )


def test_a_checkpoint_saved_in_4_bits_counts_by_its_own_configuration(fresh_model: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    name = "model.language_model.layers.2.mlp"
    fresh_model(skip=("model.visual", "lm_head", name), bnb_4bit_use_double_quant=False).save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    evidence = quantization_census(model, QuantizationPolicy(double_quant=False))
    assert evidence.ok
    assert "by naming them in its own skip list" in " ".join(evidence.notes)
    message = refused(model)
    assert "have double_quantized True" not in message
    assert "its own configuration counts and a BitsAndBytesConfig given now does not" in message


def test_a_checkpoint_saved_in_fp4_without_a_skip_list_is_to_be_quantized_again(
    fresh_model: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText

    fresh_model(skip=None, bnb_4bit_quant_type="fp4").save_pretrained(tmp_path)
    message = refused(AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16))
    assert "28 of 28 linears are fp4 instead of nf4" in message
    assert "the checkpoint was saved in FP4, and QLoRA is proven with NF4: quantize its 16-bit base again" in message
    assert "the fixture qvl_quantization_config, or QuantizationPolicy(quant_type='fp4')" in message
    assert (
        "the checkpoint was saved in 4 bits, and without a skip list: quantize its 16-bit base again with "
        "llm_int8_skip_modules=['model.visual', 'lm_head']"
    ) in message
    assert "pass llm_int8_skip_modules" not in message


@pytest.mark.parametrize("skip", [None, ["lm_head"]])
def test_a_checkpoint_saved_in_4_bits_that_lost_its_skip_list(fresh_model: Any, tmp_path: Path, skip: Any) -> None:
    from transformers import AutoModelForImageTextToText

    fresh_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = refused(AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16))
    assert f"holds them in 16 bits, but the skip list in its config.json ({skip}) does not keep them so" in message
    assert "add 'model.visual' to llm_int8_skip_modules in its quantization_config" in message


def test_weights_rewritten_for_the_cpu_are_named_as_such(fresh_model: Any, processor: Any) -> None:
    from bitsandbytes.nn.modules import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("bitsandbytes rewrites weights only on CPUs with AVX512-BF16")
    model = fresh_model(in_place=False)
    with torch.no_grad():
        model(**make_batch(processor, scenes(seed=1, per_skill=1)[:1]))
    message = refused(model)
    assert "28 quantized weights were rewritten in place for a CPU kernel" in message
    assert "keep_quantized_weights_in_place(model)" in message
    assert "double_quantized" not in message.splitlines()[0]
    with pytest.raises(CannotJudge, match="rewritten in place"):
        require_unpacked_weights(anatomy(model))


def test_float32_leftovers_of_kbit_preparation_are_a_note(fresh_model: Any) -> None:
    from peft import prepare_model_for_kbit_training

    evidence = quantization_census(prepare_model_for_kbit_training(fresh_model(), use_gradient_checkpointing=False))
    assert evidence.ok
    assert "not quantized, float32" in evidence.notes[0]
    assert "vision" in evidence.notes[0]
    assert "MiB more than in 16 bits" in evidence.notes[0]


def test_quantized_embeddings_are_seen(fresh_model: Any) -> None:
    import bitsandbytes as bnb

    model = fresh_model()
    table = model.model.language_model.embed_tokens
    small = bnb.nn.EmbeddingNF4(table.num_embeddings, table.embedding_dim)
    small.weight = bnb.nn.Params4bit(table.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
    model.model.language_model.embed_tokens = small
    message = refused(model)
    assert message.startswith("embeddings: model.language_model.embed_tokens is stored as uint8 (EmbeddingNF4)")


def test_a_tied_head_must_share_its_storage(fresh_model: Any) -> None:
    model = fresh_model()
    model.config.tie_word_embeddings = True
    words = "lm_head and embeddings are tied by the configuration but are two tensors"
    assert refused(model).startswith(words)
    table = model.model.language_model.embed_tokens
    head, kept = model.lm_head.weight, table.weight
    model.lm_head.weight, table.weight = (torch.nn.Parameter(each.to("meta")) for each in (head, kept))
    assert refused(model).startswith(words)  # no pointer without data, and no two tensors are one for that
    table.weight = kept
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    assert quantization_census(model).ok


def test_other_policies(fresh_model: Any) -> None:
    everything = QuantizationPolicy(quantized=("language", "vision", "merger"), kept=("lm_head", "embeddings"))
    assert quantization_census(fresh_model(skip=None), everything).ok
    assert "nothing is quantized: vision: 20 of 20 linears" in refused(fresh_model(), everything)
    single = QuantizationPolicy(quant_type="fp4", double_quant=False)
    assert quantization_census(fresh_model(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False), single).ok
    assert "have double_quantized True instead of False" in refused(fresh_model(bnb_4bit_quant_type="fp4"), single)


def test_the_policy_of_a_config_reads_how_and_not_where() -> None:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16,
        llm_int8_skip_modules=["visual"],
    )
    assert QuantizationPolicy.from_config(config) == QuantizationPolicy(compute_dtype="float16", quant_storage="uint8")
    bare = QuantizationPolicy.from_config(BitsAndBytesConfig(load_in_4bit=True))
    assert (bare.quant_type, bare.double_quant, bare.compute_dtype) == ("fp4", False, "float32")


def test_wrong_arguments() -> None:
    from transformers import BitsAndBytesConfig

    with pytest.raises(ValueError, match="does not ask for 4 bits"):
        QuantizationPolicy.from_config(BitsAndBytesConfig(load_in_8bit=True))
    with pytest.raises(TypeError, match=r"expected a transformers\.BitsAndBytesConfig, got NoneType"):
        QuantizationPolicy.from_config(None)
    with pytest.raises(ValueError, match="quant_type 'int4' is unknown"):
        QuantizationPolicy(quant_type="int4")
    with pytest.raises(ValueError, match=r"'\.\*visual\$' is neither a part .*; did you mean 'visual'\?"):
        QuantizationPolicy(kept=(".*visual$",))
    with pytest.raises(ValueError, match="vision: either quantized or kept"):
        QuantizationPolicy(quantized=("language", "vision"))
    for wrong in ("in_proj_a", None, ("in_proj_a", None), 3):
        for kind in (QuantizationPolicy, QuantizedLayers):
            with pytest.raises(ValueError, match=r"kept is a tuple of parts and names, such as \(.*\), got"):
                kind(kept=wrong)
    with pytest.raises(ValueError, match="quantized is a tuple of parts and names, .* got 'language'"):
        QuantizedLayers("language")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="write 'language, in_proj_a:16bit' for"):
        QuantizedLayers.parse("language:16bit, in_proj_a:16bit")


def test_nothing_is_changed(fresh_model: Any) -> None:
    model = fresh_model(lora=True)
    before = {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    quantization_census(model)
    assert before == {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    assert anatomy(model).base.get_submodule(LAYER) is not None
