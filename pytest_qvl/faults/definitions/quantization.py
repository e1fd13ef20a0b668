"""What is quantized and must not be, or the reverse, or in another way than asked."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import fault
from pytest_qvl.faults.tools import all_of, attribute, load_again
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.quantized import KEEP_16BIT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from pytest_qvl.faults.case import Case


@fault(
    "skip-list-visual",
    'The skip list ["visual", "lm_head"] matches no module on Transformers 5.',
    target="load",
    check="quantization_census",
    expected_words=("vision: {vision} of {vision} linears are NF4", "entries that match no module", "model.visual"),
    source="1038lab/ComfyUI-JoyCaption#53, unslothai/unsloth#4208",
    transformers=(5,),
)
def _skip_list_visual(case: Case) -> Iterator[None]:
    load_again(case, skip=["visual", "lm_head"])
    yield


@fault(
    "skip-list-missing",
    "No skip list at all: vision tower and merger are quantized.",
    target="load",
    check="quantization_census",
    expected_words=("vision: {vision} of {vision}", "merger: {merger} of {merger}", "no skip list was given"),
    source="unslothai/unsloth#3639, unslothai/unsloth#1347",
)
def _skip_list_missing(case: Case) -> Iterator[None]:
    load_again(case, skip=None)
    yield


@fault(
    "skip-list-without-head",
    "A skip list replaces the default one, so the head is quantized unless it is named.",
    target="load",
    check="quantization_census",
    expected_words=("lm_head: 1 of 1 linears are NF4", "replaces the default one"),
    source="huggingface/transformers#45674",
    requires=("untied head",),
)
def _skip_list_without_head(case: Case) -> Iterator[None]:
    load_again(case, skip=["model.visual"])
    yield


@fault(
    "skip-list-without-merger",
    "The skip list names the vision blocks only: the merger is quantized.",
    target="load",
    check="quantization_census",
    expected_words=("merger: {merger} of {merger} linears are NF4", "does not cover it"),
    source="vllm-project/llm-compressor#1766",
)
def _skip_list_without_merger(case: Case) -> Iterator[None]:
    load_again(case, skip=["model.visual.blocks", "lm_head"])
    yield


@fault(
    "skip-list-too-greedy",
    'An entry "o_proj" keeps the attention outputs of the language backbone out of the quantization.',
    target="load",
    check="quantization_census",
    expected_words=("language: {with_attention} of {language} linears are {dtype} instead of nf4", "o_proj"),
)
def _skip_list_too_greedy(case: Case) -> Iterator[None]:
    load_again(case, skip=[*KEEP_16BIT, "o_proj"])
    yield


@fault(
    "declared-16-bit-and-packed",
    "Layers that are declared to stay in 16 bits are NF4, because no entry of the skip list names them.",
    target="load",
    check="quantization_census",
    expected_words=(
        "{with_attention} of {with_attention} linears that the policy names to stay 16-bit",
        "add 'o_proj' to",
    ),
)
def _declared_16_bit_and_packed(case: Case) -> Iterator[None]:
    case.policy = replace(case.policy, kept=(*case.policy.kept, "o_proj"))
    yield


@fault(
    "quantization-dropped",
    "The quantization config is lost on the way: everything is 16-bit.",
    target="load",
    check="quantization_census",
    expected_words=("nothing is quantized", "{language} of {language}"),
    source="NVIDIA-NeMo/Automodel#2358",
)
def _quantization_dropped(case: Case) -> Iterator[None]:
    load_again(case, quantized=False)
    yield


@fault(
    "type-fp4",
    "BitsAndBytesConfig's default type, fp4, instead of nf4.",
    target="load",
    check="quantization_census",
    expected_words=("{language} of {language} linears are fp4 instead of nf4", "bnb_4bit_quant_type"),
    source="bitsandbytes-foundation/bitsandbytes#2077",
)
def _type_fp4(case: Case) -> Iterator[None]:
    load_again(case, bnb_4bit_quant_type="fp4")
    yield


@fault(
    "double-quantization-off",
    "Block statistics stay in float32: 0.37 bits more per weight.",
    target="load",
    check="quantization_census",
    expected_words=("double_quantized False instead of True", "bnb_4bit_use_double_quant"),
    source="bitsandbytes-foundation/bitsandbytes#2077",
)
def _double_quantization_off(case: Case) -> Iterator[None]:
    load_again(case, bnb_4bit_use_double_quant=False)
    yield


@fault(
    "compute-float32",
    "Compute dtype float32, the config's default: slow and hungry, and without a warning; of a float32 model bfloat16.",
    target="load",
    check="quantization_census",
    expected_words=("compute_dtype ", " instead of {dtype}", "bnb_4bit_compute_dtype"),
    source="bitsandbytes-foundation/bitsandbytes#2077, #1177",
)
def _compute_float32(case: Case) -> Iterator[None]:
    import torch

    another = torch.bfloat16 if case.subject.dtype == "float32" else torch.float32
    load_again(case, bnb_4bit_compute_dtype=another)
    yield


@fault(
    "eight-bits",
    "LLM.int8 instead of NF4.",
    target="load",
    check="quantization_census",
    expected_words=("{language} of {language} linears are int8 instead of nf4",),
    source="bitsandbytes-foundation/bitsandbytes#1634",
)
def _eight_bits(case: Case) -> Iterator[None]:
    # In float16, which LLM.int8 computes in: it casts anything else, and says so at every product.
    load_again(case, dtype="float16", load_in_4bit=False, load_in_8bit=True)
    yield


@contextmanager
def four_bit(model: Any, name: str, *, blocksize: int = 64) -> Iterator[None]:
    """Quantize one linear of the base model in place, and put the old layer back."""
    import bitsandbytes as bnb

    base = anatomy(model).base
    parent = base.get_submodule(name.rpartition(".")[0])
    old: nn.Linear = base.get_submodule(name)
    new: Any = bnb.nn.Linear4bit(
        old.in_features,
        old.out_features,
        bias=old.bias is not None,
        compute_dtype=old.weight.dtype,
        quant_type="nf4",
    )
    weight = bnb.nn.Params4bit(
        old.weight.detach().cpu().clone(), requires_grad=False, quant_type="nf4", blocksize=blocksize
    )
    new.weight, new.bias = weight, old.bias
    new = new.to(old.weight.device)
    new.support_avx512bf16_for_cpu = False
    setattr(parent, name.rpartition(".")[2], new)
    try:
        yield
    finally:
        setattr(parent, name.rpartition(".")[2], old)


@fault(
    "one-vision-linear-quantized",
    "A single linear of one vision block is NF4.",
    target="model",
    check="quantization_census",
    expected_words=("vision: 1 of {vision} linears are NF4", "model.visual.blocks.2.attn.qkv"),
    source="vllm-project/llm-compressor#1939",
)
def _one_vision_linear(case: Case) -> Iterator[None]:
    with four_bit(case.model, "model.visual.blocks.2.attn.qkv"):
        yield


@contextmanager
def _saved_in_4_bits(case: Case, **options: Any) -> Iterator[None]:
    """Save the case's model in 4 bits, quantized as `options` say, and load what was saved in its place."""
    with TemporaryDirectory(prefix="qvl-fault-") as name:
        folder = Path(shutil.copytree(case.subject.source.location, Path(name) / "checkpoint"))
        case.load(dtype=case.policy.compute_dtype, lora=None, **options).save_pretrained(folder)
        load_again(case, folder=folder)
        yield


@fault(
    "saved-in-4-bits-with-an-old-skip-list",
    'A checkpoint saved in 4 bits with the skip list ["visual", "lm_head"]: its vision tower is quantized for good.',
    target="load",
    check="quantization_census",
    expected_words=(
        "vision: {vision} of {vision} linears are NF4",
        "'visual' for 'model.visual'",
        "quantize the 16-bit base again",
    ),
    source="1038lab/ComfyUI-JoyCaption#53",
    transformers=(5,),
    requires=("checkpoint file",),
)
def _saved_with_an_old_skip_list(case: Case) -> Iterator[None]:
    with _saved_in_4_bits(case, skip=["visual", "lm_head"]):
        yield


@fault(
    "saved-in-fp4",
    "A checkpoint saved in 4 bits with BitsAndBytesConfig's default type: its own configuration counts, so it is FP4.",
    target="load",
    check="quantization_census",
    expected_words=(
        "{language} of {language} linears are fp4 instead of nf4",
        "the checkpoint was saved in FP4",
        "quantize its 16-bit base again",
    ),
    source="bitsandbytes-foundation/bitsandbytes#2077",
    requires=("checkpoint file",),
)
def _saved_in_fp4(case: Case) -> Iterator[None]:
    with _saved_in_4_bits(case, bnb_4bit_quant_type="fp4"):
        yield


LAYER = "model.language_model.layers.1.mlp.up_proj"


@contextmanager
def _exchanged(module: nn.Module, name: str, value: nn.Module | nn.Parameter) -> Iterator[None]:
    old = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, old)


@fault(
    "linear4bit-over-a-16-bit-weight",
    "A layer is a Linear4bit, but its weight was put in past the quantizer.",
    target="model",
    check="quantization_census",
    expected_words=("cannot compute", "Linear4bit", "was never quantized", "quantization_config"),
    silent=False,
)
def _never_quantized(case: Case) -> Iterator[None]:
    from bitsandbytes.functional import dequantize_4bit
    from torch import nn

    layer = anatomy(case.model).base.get_submodule(f"{LAYER}.base_layer")
    values = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    with _exchanged(layer, "weight", nn.Parameter(values, requires_grad=False)):
        yield


@fault(
    "linear-over-a-4-bit-weight",
    "A 4-bit weight was put into an ordinary nn.Linear.",
    target="model",
    check="quantization_census",
    expected_words=("cannot compute", "Linear, and its weight is packed in 4 bits"),
    silent=False,
)
def _packed_in_linear(case: Case) -> Iterator[None]:
    from torch import nn

    adapted = anatomy(case.model).base.get_submodule(LAYER)
    old = adapted.base_layer
    plain = nn.Linear(old.in_features, old.out_features, bias=False)
    plain.weight = old.weight
    with _exchanged(adapted, "base_layer", plain):
        yield


@fault(
    "adapter-attached-before-quantizing",
    "The adapter was attached to 16-bit layers that were quantized afterwards: it works until it is merged.",
    target="load",
    check="quantization_census",
    expected_words=("{language} adapter layers are not of the class", "a Linear over a Linear4bit", "quantize first"),
)
def _attached_first(case: Case) -> Iterator[None]:
    from pytest_qvl.models.adapters import adapted_layers

    quantized = anatomy(case.load(dtype=case.policy.compute_dtype, lora=None)).base
    load_again(case, quantized=False)
    for name, layer in adapted_layers(anatomy(case.model)).items():
        layer.base_layer = quantized.get_submodule(name)
    yield


@fault(
    "one-block-size-off",
    "One language linear is quantized in blocks of 128, and without double quantization.",
    target="model",
    check="quantization_census",
    expected_words=("1 of {language} quantized linears have blocksize 128 instead of 64", "layers.1.mlp.up_proj"),
)
def _one_block_size(case: Case) -> Iterator[None]:
    name = "model.language_model.layers.1.mlp.up_proj.base_layer"
    parts = anatomy(case.model)
    plain = case.load(dtype=case.policy.compute_dtype, quantized=False, lora=None)
    layer = parts.base.get_submodule(name.removesuffix(".base_layer"))
    full = plain.get_submodule(name.removesuffix(".base_layer"))
    with _exchanged(layer, "base_layer", full), four_bit(case.model, name, blocksize=128):
        yield


@fault(
    "code-tables-cast",
    "Every tensor of a checkpoint saved in 4 bits was cast to bfloat16, the tables of values that codes stand for too.",
    target="model",
    check="quantization_census",
    expected_words=(
        "{language} of {language} quantized linears look their values up in another table",
        "quant_map or nested_quant_map of the checkpoint",
    ),
)
def _tables_cast(case: Case) -> Iterator[None]:
    states: list[Any] = [s for p in case.model.parameters() if (s := getattr(p, "quant_state", None)) is not None]
    # In their place and not in place: bitsandbytes may hand one table to many states.
    tables = [state for one in states for state in (one, one.state2) if state is not None]
    with all_of([attribute(state, "code", state.code.bfloat16().float()) for state in tables]):
        yield


def _no_repacking() -> str | None:
    from bitsandbytes.nn import modules

    has = getattr(modules, "has_avx512bf16", None)
    return None if has is not None and has() else "only CPUs with AVX512-BF16 repack quantized weights"


@fault(
    "repacked-for-the-cpu",
    "An eval forward rewrites the quantized weights in place for a CPU kernel.",
    target="load",
    check="quantization_census",
    expected_words=("{language} quantized weights were rewritten in place", "keep_quantized_weights_in_place"),
    silent=False,
    needs=_no_repacking,
    requires=("CPU",),
)
def _repacked(case: Case) -> Iterator[None]:
    import bitsandbytes as bnb
    import torch

    load_again(case)
    for module in case.model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        case.model(**case.batch())
    yield
