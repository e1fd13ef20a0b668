"""Every layer against its oracle: healthy models of many kinds pass, small doses of damage are named."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import replace
from types import FunctionType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

from pytest_qvl.checks import CannotJudge, CheckFailed, layer_arithmetic
from pytest_qvl.checks.support.layers import mixers
from pytest_qvl.checks.support.layers.adapters import Adapters
from pytest_qvl.checks.support.layers.copies import resting
from pytest_qvl.checks.support.layers.tally import Tally
from pytest_qvl.faults.case import Case, apply, load, lora_config
from pytest_qvl.faults.catalogue import catalogue, find
from pytest_qvl.faults.definitions.adapters import another_adapter
from pytest_qvl.faults.matrix.restored import state
from pytest_qvl.faults.subject import embedded
from pytest_qvl.faults.tools import after, all_of, attribute, replaced_while_running
from pytest_qvl.models.adapters import adapted_layers, auxiliary_layers, original_module
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.attention import other_attention
from pytest_qvl.models.layers import language_layers, mergers, vision_blocks
from pytest_qvl.models.mixer_kernels import mixer_kernels
from pytest_qvl.oracles import delta

if TYPE_CHECKING:
    from pytest_qvl.evidence import Evidence

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft")
# Faults of other checks, which see them beside a reference from before the damage; here there is none.
WITHOUT_A_REFERENCE = {
    "windows-never-applied": "vision attention: model.visual.blocks.0.attn attends over the whole image",
    "windows-everywhere": "vision attention: model.visual.blocks.1.attn stays inside its window",
    "vision-positions-lost": "is given no rotation",
    "rotary-base-wrong": "turns as with base 10000, not 10",
    "attention-not-causal": "attention: model.language_model.layers.0.self_attn",
}
FIRST, *OTHERS = WITHOUT_A_REFERENCE
QUICK = ("tower-eps-too-large", "lora-ignores-rslora", "cache-one-step-stale")
SLOW = sorted(name for name, fault in catalogue().items() if fault.check == "layer_arithmetic" and name not in QUICK)
DEPTH = 2


@pytest.fixture(scope="module")
def case(processor: Any) -> Case:
    """A model of two layers in float32 without any reference, and a batch of an image of windows beside a text."""
    from pytest_qvl.checks import QuantizationPolicy
    from pytest_qvl.samples import scenes

    subject = embedded("float32")
    rows = scenes(3, 1, ["nth_colour", "text"])
    unrecorded: Any = None
    model, config = shortened(load(subject=subject)), lora_config()
    policy = QuantizationPolicy(compute_dtype="float32")
    return Case(model, processor, config, policy, rows, rows, unrecorded, load, subject)


def shortened(model: Any) -> Any:
    """The same model with two layers, and two blocks in its tower: one of windows, one of full attention."""
    parts = anatomy(model)
    blocks: Any = parts.blocks
    del parts.language_backbone.layers[DEPTH:], blocks[DEPTH:]
    parts.text_config.num_hidden_layers = parts.config.vision_config.depth = DEPTH
    return model


def in_bfloat16(case: Case) -> Case:
    """The same with the model in bfloat16."""
    return replace(case, model=shortened(load(dtype="bfloat16")))


def slow(*values: Any) -> list[Any]:
    """Parameters that show with other names or numbers what those of the default run do."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def worst(evidence: Evidence) -> dict[str, float]:
    assert evidence.table is not None
    return {str(name): float(value) for name, _count, value in evidence.table.rows}  # type: ignore[arg-type]


def test_nothing_of_linear_attention_runs_in_a_model_without(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that its code decides no verdict there, as ``pytest_qvl.faults.matrix.freshness`` takes for granted."""

    def never(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("linear attention was judged")

    for name, own in [*vars(delta).items(), *vars(mixers).items(), *vars(mixers.Mixers).items()]:
        home = next((each for each in (mixers.Mixers, delta, mixers) if vars(each).get(name) is own), None)
        mine = getattr(own, "__module__", "") in (delta.__name__, mixers.__name__)
        if isinstance(own, FunctionType) and mine and name not in ("__init__", "restart"):
            monkeypatch.setattr(home, name, never)
    assert layer_arithmetic(case.model, case.batch(), case.lora_config).table
    assert mixer_kernels(anatomy(case.model)) == {}


def test_a_healthy_model_keeps_every_limit_and_is_left_as_it_was(case: Case) -> None:
    before = state(case)
    figures = worst(layer_arithmetic(case.model, case.batch(), case.lora_config))
    assert state(case) == before
    assert set(figures) >= {
        *("4-bit product", "linear product", "LoRA", "norm", "eps of a norm", "attention", "vision attention"),
        *("rotary embedding", "vision rotary embedding", "key-value cache", "patch embedding", "NF4 code book"),
    }
    assert min(figures[name] for name in ("linear product", "attention", "vision attention", "norm")) > 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", *slow("float16")])
def test_in_16_bits_limits_are_nearly_used_and_kept(case: Case, dtype: str) -> None:
    figures = worst(layer_arithmetic(shortened(load(dtype=dtype)), case.batch()))
    for name in ("4-bit product", "linear product", "LoRA", "norm", "residual sum", "rotary embedding"):
        assert 0.3 < figures[name] <= 1, name


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "compute"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_products_in_another_dtype_than_activations_are_rounded_once_more(case: Case, dtype: str, compute: str) -> None:
    figures = worst(layer_arithmetic(load(dtype=dtype, bnb_4bit_compute_dtype=getattr(torch, compute)), case.batch()))
    assert figures["4-bit product"] <= 1


@pytest.mark.parametrize(
    "changed",
    [
        {"use_dora": True, "use_rslora": True, "lora_dropout": 0.1},
        *slow(
            {"lora_dropout": 0.1, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 64}},
            {"modules_to_save": ["lm_head"], "lora_bias": True},
            {"init_lora_weights": False, "bias": "lora_only"},
        ),
    ],
    ids=["dora", "dropout and patterns", "copy of the head", "trained"],
)
def test_other_adapters_are_judged_too(case: Case, changed: dict[str, Any]) -> None:
    config = lora_config(**changed)
    changed_case = replace(case)
    with another_adapter(changed_case, config):
        evidence = layer_arithmetic(changed_case.model, case.batch(), config)
    assert worst(evidence)["LoRA"] < 1
    assert not any("not judged" in note for note in evidence.notes) or "use_dora" in changed


@pytest.mark.parametrize(
    "changed",
    [{}, *slow({"use_dora": True}, {"modules_to_save": ["lm_head"], "lora_bias": True}, {"lora_dropout": 0.1})],
    ids=["plain", "dora", "copy of the head", "dropout"],
)
def test_what_runs_under_autocast_is_judged_as_that_rounds_it(
    case: Case, autocasting: Any, changed: dict[str, Any]
) -> None:
    case = in_bfloat16(case)
    config = lora_config(**changed)
    with another_adapter(case, config), autocasting(case.model, torch.bfloat16):
        figures = worst(layer_arithmetic(case.model, case.batch(), config))
    assert max(figures.values()) <= 1
    assert min(figures[name] for name in ("LoRA", "patch embedding", "4-bit product")) > 0.3


@pytest.mark.parametrize("name", ["lora-applies-alpha", *slow("4bit-product-off-by-5-percent")])
def test_a_fault_is_seen_under_autocast(case: Case, autocasting: Any, name: str) -> None:
    case = in_bfloat16(case)
    with apply(name, case), autocasting(case.model, torch.bfloat16), pytest.raises(CheckFailed) as failure:
        layer_arithmetic(case.model, case.batch(), case.lora_config)
    assert all(words in str(failure.value) for words in find(name).words())


def for_training(subject_dtype: str = "bfloat16", **quantization: Any) -> Any:
    """A model as QLoRA is usually set up: what is not in 4 bits, and with it the residual stream, in float32."""
    base = load(dtype=subject_dtype, lora=None, **quantization)
    return shortened(
        get_peft_model(prepare_model_for_kbit_training(base, use_gradient_checkpointing=False), lora_config())
    )


STREAMS = {
    "prepared for training": for_training,
    "float32": lambda: shortened(load(dtype="float32")),
    "products in float32": lambda: shortened(load(dtype="bfloat16", bnb_4bit_compute_dtype=torch.float32)),
    "not quantized": lambda: shortened(load(dtype="float32", quantized=False)),
}


@pytest.mark.parametrize("eager", [False, *slow(True)])
@pytest.mark.parametrize("name", ["prepared for training", *slow(*list(STREAMS)[1:])])
def test_autocast_of_a_stream_in_float32_rounds_what_it_multiplies(
    case: Case, autocasting: Any, name: str, eager: bool
) -> None:
    model = STREAMS[name]().eval()
    with other_attention(anatomy(model)) if eager else nullcontext(), autocasting(model, torch.bfloat16):
        figures = worst(layer_arithmetic(model, case.batch()))
    assert max(figures.values()) <= 1
    assert min(figures[name] for name in ("LoRA", "attention", "vision attention")) > 0.05


@pytest.mark.parametrize(
    "name", ["attention-scaling-off", *slow("4bit-product-off-by-5-percent", "lora-ignores-scaling")]
)
def test_a_fault_is_seen_where_autocast_rounds_a_stream_in_float32(case: Case, autocasting: Any, name: str) -> None:
    case = replace(case, model=for_training().eval())
    with apply(name, case), autocasting(case.model, torch.bfloat16), pytest.raises(CheckFailed) as failure:
        layer_arithmetic(case.model, case.batch(), case.lora_config)
    assert all(words in str(failure.value) for words in find(name).words())


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_of_an_adapted_layers_own_forward_is_seen(case: Case, autocasting: Any, enabled: bool) -> None:
    model = shortened(load(dtype="float32"))
    kind = type(next(iter(adapted_layers(anatomy(model)).values())))
    around = nullcontext() if enabled else autocasting(model, torch.bfloat16)
    with autocasting(kind, torch.bfloat16, enabled=enabled), around:
        assert 0.3 < worst(layer_arithmetic(model, case.batch()))["LoRA"] <= 1


def test_a_head_that_switches_autocast_off_is_judged_as_it_computes(case: Case, autocasting: Any) -> None:
    model = shortened(load(dtype="float32"))
    head = anatomy(model).lm_head
    own = head.forward

    def forward(x: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return own(x.float())

    with attribute(head, "forward", forward), autocasting(model, torch.bfloat16):
        assert worst(layer_arithmetic(model, case.batch()))["linear product"] <= 1


@pytest.mark.parametrize("where", ["vision", "language"])
def test_a_layer_that_calls_nothing_and_returns_its_input_is_no_fused_kernel(case: Case, where: str) -> None:
    parts = anatomy(case.model)
    layer = parts.blocks[1] if where == "vision" else parts.language_backbone.layers[1]
    with (
        attribute(layer, "forward", lambda x, *_args, **_kwargs: x),
        pytest.raises(CheckFailed, match=r"s\.1 returns its own input: it is skipped"),
    ):
        layer_arithmetic(case.model, case.batch())


def test_numbers_below_float16s_normal_ones_are_rounded_by_absolute_steps(case: Case, autocasting: Any) -> None:
    config = lora_config(r=2)
    model = shortened(load(dtype="float16", lora=config, seed=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.mul_(1e-3)
    with autocasting(model, torch.float16):
        assert 0.3 < worst(layer_arithmetic(model, case.batch(), config))["LoRA"] <= 1


def lora_forward(result: Any, lora_a: Any, lora_b: Any, x: Any, scaling: float) -> Any:
    """As Unsloth adds an adapter: x, A and B in the dtype of the base layer's output, all by one ``addmm``."""
    low = x.to(result.dtype) @ lora_a.weight.to(result.dtype).t()
    up, flat = lora_b.weight.to(result.dtype).t(), result.flatten(0, -2)
    return torch.addmm(flat, low.flatten(0, -2), up, alpha=scaling).view(result.shape)


def folded(times: float = 1.0) -> Any:
    """A forward of an adapted layer that adds by :func:`lora_forward`, which it is known by."""

    def forward(self: Any, x: Any) -> Any:
        result, name = self.base_layer(x), self.active_adapters[0]
        x = self.lora_dropout[name](x.to(self.lora_A[name].weight.dtype))
        return lora_forward(result, self.lora_A[name], self.lora_B[name], x, times * self.scaling[name])

    return forward


@pytest.mark.parametrize("times", [1.0, 1.05])
def test_adapters_that_a_kernel_folds_into_their_layer_are_judged_as_it_rounds(
    case: Case, times: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = in_bfloat16(case)
    kind = type(next(iter(adapted_layers(anatomy(case.model)).values())))
    monkeypatch.setattr(kind, "forward", folded(times))
    if times == 1:
        assert 0.3 < worst(layer_arithmetic(case.model, case.batch(), case.lora_config))["LoRA"] <= 1
        return
    with pytest.raises(CheckFailed, match=r"LoRA: \S+ adds 2\.1·B\(A\(x\)\) where its scaling is 2,"):
        layer_arithmetic(case.model, case.batch(), case.lora_config)


def test_an_adapter_that_is_only_rounded_too_often_is_not_said_to_have_another_rank(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = in_bfloat16(case)
    kind = type(next(iter(adapted_layers(anatomy(case.model)).values())))
    forward = folded()
    monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x))
    with pytest.raises(CheckFailed) as failure:
        layer_arithmetic(case.model, case.batch(), case.lora_config)
    assert "its rank is" not in str(failure.value)
    assert "more than rounding explains" in str(failure.value)


def test_eager_attention_and_a_base_in_full_precision(case: Case) -> None:
    model = shortened(load(dtype="float32", quantized=False))
    with other_attention(anatomy(model)):
        figures = worst(layer_arithmetic(model, case.batch()))
    assert "4-bit product" not in figures
    assert figures["attention"] < 1


def test_an_adapter_that_learns_a_prompt_is_refused(case: Case) -> None:
    from peft import PrefixTuningConfig

    changed = replace(case)
    with another_adapter(changed, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)):
        with pytest.raises(CannotJudge, match=r"the adapter default \(PrefixTuningConfig\) puts tokens of its own"):
            layer_arithmetic(changed.model, case.batch())


def test_two_active_adapters_are_judged_as_a_sum_and_named(case: Case) -> None:
    with apply("second-adapter-active", case) as damaged:
        evidence = layer_arithmetic(damaged.model, damaged.batch())
    assert "2 adapters are active and judged as a sum: default, left-over" in evidence.notes


def test_adapters_of_other_kinds_are_named_as_not_judged(case: Case) -> None:
    from peft import IA3Config

    config = IA3Config(target_modules=[".*_proj"], feedforward_modules=[])
    config.target_modules, config.feedforward_modules = {"q_proj"}, set()
    changed = replace(case)
    with another_adapter(changed, config):
        evidence = layer_arithmetic(changed.model, case.batch())
    assert any("ia3's Linear4bit is no LoRA of plain matrices" in note for note in evidence.notes)


@pytest.mark.parametrize("name", [*QUICK, *slow(*SLOW)])
def test_a_fault_is_named_without_any_reference(case: Case, name: str) -> None:
    if reason := find(name).missing(case):
        pytest.skip(reason)
    with apply(name, case) as damaged, pytest.raises(CheckFailed) as failure:
        layer_arithmetic(damaged.model, damaged.batch(), damaged.lora_config)
    for words in find(name).words():
        assert words in str(failure.value)


@pytest.mark.parametrize("name", [FIRST, *slow(*OTHERS)])
def test_faults_of_other_checks_need_no_reference_here(case: Case, name: str) -> None:
    with apply(name, case) as damaged, pytest.raises(CheckFailed) as failure:
        layer_arithmetic(damaged.model, damaged.batch())
    assert WITHOUT_A_REFERENCE[name] in str(failure.value)


def test_every_fault_of_these_families_is_this_check_s() -> None:
    families = ("arithmetic of layers", "arithmetic of adapters")
    assert {f.check for f in catalogue().values() if f.family in families} == {"layer_arithmetic"}
    assert set(QUICK) <= set(catalogue())


def test_norms_that_a_kernel_computes_from_their_weights_are_judged_and_pass(case: Case) -> None:
    """Unsloth's kernels take weights, and call no module."""
    from torch.nn.functional import gelu, linear

    parts = anatomy(case.model)
    merger = next(mergers(parts))

    def merged(x: torch.Tensor) -> torch.Tensor:
        normed = merger.norm.forward(x.view(-1, x.shape[-1])).view(-1, merger.first.in_features)
        inner = gelu(linear(normed, merger.first.weight, merger.first.bias))
        return linear(inner, merger.second.weight, merger.second.bias)

    places = [(parts.language_backbone, "norm")]
    places += [
        (layer.module, name)
        for layer in language_layers(parts)
        for name in ("input_layernorm", "post_attention_layernorm")
    ]
    places += [(block.module, name) for block in vision_blocks(parts) for name in ("norm1", "norm2")]
    changes = [replaced_while_running(module, name, getattr(module, name).forward) for module, name in places]
    with all_of([*changes, attribute(merger.module, "forward", merged)]):
        evidence = layer_arithmetic(case.model, case.batch())
    assert len(evidence.notes) == 1
    assert "merger.mlp.0 and 1 more (its module is never called" in evidence.notes[0]
    assert 1e-4 < worst(evidence)["norm"] <= 1
    assert worst(evidence)["merger as a whole"] <= 1


def test_norms_of_another_class_are_judged_alike(case: Case) -> None:
    norms = [norm for layer in language_layers(anatomy(case.model)) for norm in layer.norms]
    own = type(norms[0])
    before = worst(layer_arithmetic(case.model, case.batch()))
    try:
        for norm in norms:
            norm.__class__ = type("NormOfAKernelPackage", (own,), {})
        assert worst(layer_arithmetic(case.model, case.batch())) == before
    finally:
        for norm in norms:
            norm.__class__ = own


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("times", [0.5, 2])
def test_a_gain_that_is_off_is_not_said_to_be_an_eps(case: Case, times: float, dtype: str) -> None:
    """At the size of its root alone, half the gain is what an eps seven times as large makes."""
    damaged = case if dtype == "float32" else in_bfloat16(case)
    norms = [norm for layer in language_layers(anatomy(damaged.model)) for norm in layer.norms]
    with after(norms, lambda _m, _a, out: out * times), pytest.raises(CheckFailed) as failure:
        layer_arithmetic(damaged.model, damaged.batch())
    assert f"norm: model.language_model.layers.0.input_layernorm returns {times:g}" in str(failure.value)
    assert "computes as with eps" not in str(failure.value)


@pytest.mark.parametrize("times", [1 + 1e-4, *slow(1 - 1e-3)])
def test_a_dose_that_logits_hide_is_seen_in_float32(case: Case, times: float) -> None:
    layer = language_layers(anatomy(case.model))[1]
    linear = original_module(layer.inputs[2])
    with after([linear], lambda _m, _a, out: out * times), pytest.raises(CheckFailed, match=f"{times:.4g} times"):
        layer_arithmetic(case.model, case.batch())


def test_one_number_of_one_attention_is_enough(case: Case) -> None:
    block = vision_blocks(anatomy(case.model))[1]

    def touch(_module: Any, args: tuple[Any, ...]) -> Any:
        changed = args[0].clone()
        changed[3, 5] += 1e-3
        return (changed, *args[1:])

    handle = block.output.register_forward_pre_hook(touch)
    try:
        with pytest.raises(CheckFailed, match=r"vision attention: model\.visual\.blocks\.1\.attn"):
            layer_arithmetic(case.model, case.batch())
    finally:
        handle.remove()


def test_a_code_book_with_two_numbers_exchanged_is_seen(case: Case) -> None:
    linear = original_module(language_layers(anatomy(case.model))[0].mlp.down)
    code = linear.weight.quant_state.code
    kept = code.clone()
    code[[3, 4]] = code[[4, 3]]
    try:
        with pytest.raises(CheckFailed, match="NF4 code book: .*mlp.down_proj has another number .* at entry 3"):
            layer_arithmetic(case.model, case.batch())
    finally:
        code.copy_(kept)


def test_gradients_that_wait_for_a_step_stay_as_they_are(case: Case) -> None:
    """Checkpointing is judged by a backward pass, which must not add to what a user has accumulated so far."""
    config, changed = lora_config(lora_dropout=0.1), replace(case)
    with another_adapter(changed, config):
        waiting = {name: torch.ones_like(p) for name, p in changed.model.named_parameters() if p.requires_grad}
        for name, parameter in changed.model.named_parameters():
            parameter.grad = waiting.get(name)
        layer_arithmetic(changed.model, changed.batch(), lora_config=config)
        assert all(bool((gradient == 1).all()) for gradient in waiting.values())
        assert all(parameter.grad is waiting.get(name) for name, parameter in changed.model.named_parameters())


def test_dropout_in_training_is_judged_by_what_it_made(case: Case) -> None:
    config, changed = lora_config(lora_dropout=0.1), replace(case)
    with another_adapter(changed, config):
        dropout = next(iter(adapted_layers(anatomy(changed.model)).values())).lora_dropout["default"]
        with after([dropout], lambda _m, _a, out: out * 1.01), pytest.raises(CheckFailed) as failure:
            layer_arithmetic(changed.model, case.batch(), config)
    assert "LoRA dropout: " in str(failure.value) or "in train mode" in str(failure.value)


def test_eight_tokens_are_forced_and_a_setting_of_the_user_s_does_not_end_them(case: Case) -> None:
    steps: list[int] = []
    backbone = anatomy(case.model).language_backbone
    handle = backbone.register_forward_pre_hook(lambda *_call: steps.append(1))
    settings = case.model.generation_config
    kept = settings.max_new_tokens, settings.eos_token_id
    settings.max_new_tokens, settings.eos_token_id = 2, list(range(448))
    try:
        layer_arithmetic(case.model, case.batch())
    finally:
        handle.remove()
        settings.max_new_tokens, settings.eos_token_id = kept
    assert len(steps) == 8 + 2  # and a forward in train mode, without and with checkpointing


def test_a_linear_whose_module_is_never_called_is_named_as_not_judged(case: Case) -> None:
    """What Unsloth's kernels do: they read the weights and call no module."""
    layer = language_layers(anatomy(case.model))[1]
    mlp = layer.mlp.module
    gate, up = (original_module(each) for each in (layer.mlp.gate, layer.mlp.up))

    def fused(hidden: torch.Tensor) -> Any:
        inner = mlp.act_fn(gate.forward(hidden)) * up.forward(hidden)
        return mlp.down_proj(inner)

    mlp.forward = fused
    try:
        notes = layer_arithmetic(case.model, case.batch()).notes
    finally:
        del mlp.forward
    reason = "its module is never called: a fused kernel may compute in its place"
    assert f"not judged: {layer.mlp.name}.gate_proj and 1 more ({reason})" in notes
    assert any(note.startswith(f"not judged: {layer.mlp.name} (a fused kernel") for note in notes)


def test_packed_rows_are_refused(case: Case) -> None:
    batch = case.batch()
    length = batch["input_ids"].shape[1]
    batch["position_ids"] = (torch.arange(length) % (length // 2)).expand(3, len(batch["input_ids"]), length).clone()
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    with pytest.raises(CannotJudge, match="packed"):
        layer_arithmetic(case.model, batch)


def test_a_default_dtype_of_the_user_s_changes_no_limit(case: Case) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert max(worst(layer_arithmetic(case.model, case.batch())).values()) < 0.5
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("wrapper", [False, True], ids=["model", "PeftModel"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_logits_that_change_behind_the_head_are_seen(case: Case, *, wrapper: bool, training: bool) -> None:
    parts = anatomy(case.model)
    mode = "train" if training else "eval"

    def change(module: Any, _args: Any, output: Any) -> Any:
        if module.training is training:
            output.logits[0, -1, 7] += 2**-8
        return output

    says = f"{'its wrapper' if wrapper else 'the model'} does not return the logits of its head in {mode} mode"
    with after([parts.wrapped if wrapper else parts.base], change), pytest.raises(CheckFailed, match=says):
        layer_arithmetic(case.model, case.batch())


def test_the_configuration_that_was_asked_for_is_that_of_the_active_adapter(case: Case) -> None:
    asked = lora_config(lora_alpha=8)
    case.model.add_adapter("second", lora_config(lora_alpha=32))
    case.model.set_adapter("second")
    try:
        layer_arithmetic(case.model, case.batch(), lora_config(lora_alpha=32))
        with pytest.raises(CheckFailed, match="LoRA: .* where its scaling is 1"):
            layer_arithmetic(case.model, case.batch(), asked)
    finally:
        case.model.delete_adapter("second")
        case.model.set_adapter("default")


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head", "norm1"])
def test_trained_copies_are_judged_too(case: Case, name: str) -> None:
    changed = replace(case)
    with another_adapter(changed, lora_config(modules_to_save=[name])):
        copies = [w.modules_to_save["default"] for w in auxiliary_layers(anatomy(changed.model)).values()]
        assert layer_arithmetic(changed.model, case.batch()).notes == ()
        with after(copies[:1], lambda _m, _a, out: out * (1 + 2**-7)), pytest.raises(CheckFailed) as failure:
            layer_arithmetic(changed.model, case.batch())
    kind = {"embed_tokens": "embedding", "lm_head": "linear product", "norm1": "norm"}[name]
    assert re.search(rf"{kind}: \S*{name} \(default\)", str(failure.value))


def test_linears_inside_a_trained_copy_are_judged_and_originals_rest(case: Case) -> None:
    changed = replace(case)
    with another_adapter(changed, lora_config(modules_to_save=["merger"])):
        merger: Any = anatomy(changed.model).merger
        first = merger.modules_to_save["default"].mlp[0]
        assert layer_arithmetic(changed.model, case.batch()).notes == ()
        with after([first], lambda _m, _a, out: out * 1.01), pytest.raises(CheckFailed) as failure:
            layer_arithmetic(changed.model, case.batch())
    assert "linear product: model.visual.merger.mlp.0 (default) returns 1.01 times" in str(failure.value)


def test_a_layer_that_is_not_called_is_not_taken_for_a_copy_of_another_s_name() -> None:
    """A copy of ``layers.1`` is none of ``layers.10``."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(11))

    wrapped = get_peft_model(Model(), LoraConfig(target_modules=[r"layers.0"], modules_to_save=["layers.1"]))
    base: Any = wrapped.base_model.model
    parts: Any = SimpleNamespace(base=base)
    assert "layers.1" in resting(parts)
    assert "layers.10" not in resting(parts)


def test_matrices_on_the_meta_device_are_not_one(case: Case) -> None:
    first, second, *_ = adapted_layers(anatomy(case.model)).values()
    kept = [(layer.lora_A["default"], layer.lora_A["default"].weight) for layer in (first, second)]
    tally = Tally()
    try:
        for down, weight in kept:
            down.weight = torch.nn.Parameter(weight.to("meta"))
        Adapters(anatomy(case.model), None, tally).judge_sharing()
        assert not tally.operations["LoRA's matrices"].failed
        kept[0][0].weight = kept[1][0].weight
        Adapters(anatomy(case.model), None, tally).judge_sharing()
        assert tally.operations["LoRA's matrices"].failed
    finally:
        for down, weight in kept:
            down.weight = weight


def test_a_model_with_weights_elsewhere_is_refused_in_one_sentence(case: Case) -> None:
    norm: Any = language_layers(anatomy(case.model))[1].norms[0]
    kept = norm.weight
    norm.weight = torch.nn.Parameter(kept.to("meta"))
    try:
        with pytest.raises(CannotJudge, match=r"layers\.1\.input_layernorm\.weight has no data between two calls"):
            layer_arithmetic(case.model, case.batch())
    finally:
        norm.weight = kept


def test_the_base_of_the_tower_s_rotary_embedding_is_the_configuration_s(case: Case) -> None:
    vision = anatomy(case.model).config.vision_config
    name = "base of the tower's rotary embedding"
    evidence = layer_arithmetic(case.model, case.batch())
    assert {figure.name: figure.value for figure in evidence.figures}[name] == 10_000
    with attribute(vision, "rope_parameters", {"rope_theta": 500.0}), pytest.raises(CheckFailed) as failure:
        layer_arithmetic(case.model, case.batch())
    assert "is given other angles than row and column times 500^(-2i/d)" in str(failure.value)
