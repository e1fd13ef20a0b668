"""The adapter census and adapter neutrality: healthy adapters of every kind pass, each defect is named."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer

from pytest_qvl.checks.adapter import adapter_census
from pytest_qvl.checks.neutrality import adapter_neutrality
from pytest_qvl.checks.roundtrip import adapter_roundtrip
from pytest_qvl.checks.support.lora import zero_initialised_matrices
from pytest_qvl.checks.training import training_step
from pytest_qvl.evidence import CannotJudge, CheckFailed, Evidence, ModelCrashed
from pytest_qvl.models.adapters import adapter_parameters
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.fingerprint.digests import digests
from pytest_qvl.models.policy import AdapterPolicy
from pytest_qvl.models.quantized import base_tensors
from pytest_qvl.samples import make_batch, scenes

SEVEN_NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Q_PROJ = "model.language_model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def batch(processor: Any) -> dict[str, torch.Tensor]:
    """One picture and none, padded to one length."""
    samples = scenes(seed=5, per_skill=1)
    return make_batch(processor, [samples[1], samples[9]], answers=True)


def census(fresh_model: Any, lora_config: Any, **overrides: Any) -> Evidence:
    return adapter_census(fresh_model(lora=overrides), lora_config(**overrides))


def refused(check: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(CheckFailed) as caught:
        check(*args, **kwargs)
    return str(caught.value)


def figure(evidence: Evidence, name: str) -> Any:
    return next(f.value for f in evidence.figures if f.name == name)


# --- census: healthy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        {"target_modules": SEVEN_NAMES, "exclude_modules": r".*visual.*"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1, 3]},
        {"target_modules": ["q_proj"], "layers_to_transform": 2, "layers_pattern": "layers"},
        {"target_modules": [Q_PROJ, "model.language_model.layers.2.mlp.up_proj"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"use_dora": True},
        {"use_rslora": True, "r": 16},
        {"rank_pattern": {"q_proj": 4, r"layers\.1\.self_attn\.v_proj": 2}, "alpha_pattern": {"q_proj": 32}},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 4]},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
        {"bias": "lora_only"},
    ],
    ids=str,
)
def test_every_healthy_kind_of_adapter_passes(fresh_model: Any, lora_config: Any, overrides: Any) -> None:
    model = fresh_model(lora=overrides)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    assert adapter_census(model, lora_config(**overrides), optimizer).ok


def test_full_precision_and_lora_bias(fresh_model: Any, lora_config: Any) -> None:
    overrides = {"lora_bias": True, "target_modules": ["q_proj", "k_proj"]}
    assert adapter_census(fresh_model(quantized=False, lora=overrides), lora_config(**overrides)).ok


def test_the_parameter_count_is_the_formula(fresh_model: Any, lora_config: Any) -> None:
    """Per layer: q, o 128x128; k, v 64x128; gate, up 256x128; down 128x256; rank times (in + out)."""
    evidence = census(fresh_model, lora_config, r=4)
    per_layer = 2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 256)
    assert figure(evidence, "trainable LoRA parameters") == 4 * 4 * per_layer
    assert figure(evidence, "modules asked for that have an adapter") == 28


def test_the_request_may_be_mutated_by_peft_or_not(fresh_model: Any, lora_config: Any) -> None:
    """`get_peft_model` rewrites "all-linear" in the config object that it was given."""
    asked = lora_config(target_modules="all-linear", exclude_modules=r".*visual.*")
    model = fresh_model(lora=lora_config(target_modules="all-linear", exclude_modules=r".*visual.*"))
    assert adapter_census(model, asked).ok
    assert adapter_census(model, model.peft_config["default"]).ok


def test_an_inactive_second_adapter_does_not_disturb(fresh_model: Any, lora_config: Any) -> None:
    model = fresh_model(lora=True)
    model.add_adapter("other", lora_config(r=2, target_modules=["q_proj"]))
    assert adapter_census(model, lora_config()).ok


def test_trained_copies_and_tokens_are_a_note(fresh_model: Any, lora_config: Any) -> None:
    assert (
        "57,344 trainable parameters beside LoRA: lm_head"
        in census(fresh_model, lora_config, modules_to_save=["lm_head"]).notes[0]
    )


# --- census: damaged ---------------------------------------------------------------------------------------


def test_the_usual_seven_names_leak_into_the_vision_tower(fresh_model: Any, lora_config: Any) -> None:
    message = refused(census, fresh_model, lora_config, target_modules=SEVEN_NAMES)
    first = message.splitlines()[0]
    assert first.startswith("LoRA leaked into vision (12)")
    assert "model.visual.blocks.0.mlp.down_proj, model.visual.blocks.0.mlp.gate_proj" in first
    assert r"language_model.*\.(down_proj|gate_proj|k_proj|o_proj|q_proj|up_proj|v_proj)" in first


def test_the_regex_that_it_recommends_is_right(fresh_model: Any, lora_config: Any) -> None:
    message = refused(census, fresh_model, lora_config, target_modules=SEVEN_NAMES)
    recommended = message.split('target_modules=r"')[1].split('"')[0]
    assert (
        figure(census(fresh_model, lora_config, target_modules=recommended), "modules asked for that have an adapter")
        == 28
    )


def test_all_linear_reaches_the_merger(fresh_model: Any, lora_config: Any) -> None:
    message = refused(census, fresh_model, lora_config, target_modules="all-linear")
    assert message.startswith("LoRA leaked into vision (20), merger (2): target_modules 'all-linear'")


def test_a_leak_that_is_wanted_can_be_declared(fresh_model: Any, lora_config: Any) -> None:
    config = lora_config(target_modules="all-linear")
    model = fresh_model(lora={"target_modules": "all-linear"})
    assert not adapter_census(model, config, policy=AdapterPolicy(("language", "vision", "merger"))).notes
    with pytest.raises(CheckFailed, match=r"LoRA leaked into merger \(2\).*or declare what is adapted on purpose"):
        adapter_census(model, config, policy=AdapterPolicy(("language", "vision")))


def test_a_declaration_that_nothing_follows_is_a_note(lora_model: Any, lora_config: Any) -> None:
    evidence = adapter_census(lora_model, lora_config(), policy=AdapterPolicy(("language", "vision")))
    assert evidence.notes == ("declared but neither adapted nor trained (qvl_adapter_policy): vision",)


def test_weights_trained_on_purpose(fresh_model: Any, lora_config: Any) -> None:
    model = fresh_model(lora=True)
    for parameter in anatomy(model).merger.parameters():
        parameter.requires_grad_(True)
    with pytest.raises(CheckFailed, match=r"5 tensors that are not the adapter's require grad \(merger \(5\)\)"):
        adapter_census(model, lora_config(), policy=AdapterPolicy(("language", "merger")))
    assert adapter_census(model, lora_config(), policy=AdapterPolicy.parse("language, merger:full")).ok


def test_the_patch_embedding_counts_as_a_leak(fresh_model: Any, lora_config: Any) -> None:
    message = refused(census, fresh_model, lora_config, target_modules=["q_proj", "patch_embed.proj"])
    assert message.startswith("LoRA leaked into vision (1)")
    assert "model.visual.patch_embed.proj" in message


def test_one_module_without_its_adapter(fresh_model: Any, lora_config: Any) -> None:
    model = fresh_model(lora={"exclude_modules": [Q_PROJ]})
    message = refused(adapter_census, model, lora_config())
    assert message.startswith(f"1 modules that were asked for have no adapter: {Q_PROJ} ")


def test_a_regex_that_no_longer_matches_half_of_the_modules(fresh_model: Any, lora_config: Any) -> None:
    model = fresh_model(lora={"target_modules": r".*layers\.[01]\..*\.(q|k|v|o|gate|up|down)_proj"})
    assert "14 modules that were asked for have no adapter" in refused(adapter_census, model, lora_config())


def test_an_adapter_that_nobody_asked_for(fresh_model: Any, lora_config: Any) -> None:
    message = refused(adapter_census, fresh_model(lora=True), lora_config(target_modules=["q_proj", "v_proj"]))
    assert message.startswith("20 modules have an adapter that the LoRA config does not ask for")


def test_another_rank_in_one_module(fresh_model: Any, lora_config: Any) -> None:
    message = refused(adapter_census, fresh_model(lora={"rank_pattern": {Q_PROJ: 9}}), lora_config())
    assert f"first at {Q_PROJ}, which has 2,304 trainable parameters instead of 2,048" in message


def test_two_ranks_that_cancel_in_the_sum(fresh_model: Any, lora_config: Any) -> None:
    off = {Q_PROJ: 9, Q_PROJ.replace("layers.0", "layers.1"): 7}
    assert f"first at {Q_PROJ}" in refused(adapter_census, fresh_model(lora={"rank_pattern": off}), lora_config())


def test_one_frozen_adapter_tensor(fresh_model: Any, lora_config: Any) -> None:
    model = fresh_model(lora=True)
    model.base_model.model.model.language_model.layers[3].mlp.up_proj.lora_A["default"].weight.requires_grad_(False)
    message = refused(adapter_census, model, lora_config())
    assert "first at model.language_model.layers.3.mlp.up_proj, which has 2,048" in message
    assert "instead of 3,072" in message


def test_an_adapter_loaded_for_inference(fresh_model: Any, lora_config: Any, tmp_path: Any) -> None:
    from peft import PeftModel

    fresh_model(lora=True).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(fresh_model(), tmp_path)
    assert "is_trainable=False" in refused(adapter_census, model, lora_config())
    assert adapter_census(PeftModel.from_pretrained(fresh_model(), tmp_path, is_trainable=True), lora_config()).ok


def test_one_unfrozen_base_tensor(fresh_model: Any, lora_config: Any) -> None:
    model = fresh_model(lora=True)
    model.base_model.model.model.visual.merger.ln_q.weight.requires_grad_(True)
    message = refused(adapter_census, model, lora_config())
    assert message.startswith(
        "1 tensors that are not the adapter's require grad (merger (1)): model.visual.merger.ln_q.weight"
    )


def test_a_bias_that_is_asked_for_and_frozen(fresh_model: Any, lora_config: Any) -> None:
    model = fresh_model(lora={"bias": "lora_only"})
    q_proj(model).base_layer.bias.requires_grad_(False)
    message = refused(adapter_census, model, lora_config(bias="lora_only"))
    assert message.startswith("bias='lora_only' asks to train 12 biases, 1 are frozen: ")


def test_a_second_active_adapter_is_named(fresh_model: Any, lora_config: Any) -> None:
    model = fresh_model(lora=True)
    model.add_adapter("second", lora_config(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    model.set_requires_grad("second", requires_grad=False)
    message = refused(adapter_census, model, lora_config())
    assert message.startswith("2 adapters take part in every forward (default, second), and the LoRA config describes")


def test_other_kinds_of_adapters_are_one_sentence(fresh_model: Any, lora_model: Any, lora_config: Any) -> None:
    from peft import AdaLoraConfig, IA3Config, get_peft_model

    ia3 = IA3Config(target_modules=["v_proj"], feedforward_modules=[])
    with pytest.raises(CannotJudge, match="IA3Config asks for IA3; the census knows"):
        adapter_census(lora_model, ia3)
    with pytest.raises(CannotJudge, match="AdaLoraConfig asks for ADALORA"):
        adapter_census(lora_model, AdaLoraConfig(target_modules=["q_proj"], total_step=9))
    with pytest.raises(CannotJudge, match="the adapter on the model is IA3"):
        adapter_census(get_peft_model(fresh_model(), ia3), lora_config())


def test_trained_biases_are_traced_to_their_setting(fresh_model: Any, lora_config: Any) -> None:
    message = refused(census, fresh_model, lora_config, bias="all")
    assert "bias='all' in the LoRA config trains them" in message
    assert "vision" in message.splitlines()[0]


def test_a_copy_of_the_merger_is_not_on_the_text_side(fresh_model: Any, lora_config: Any) -> None:
    message = refused(census, fresh_model, lora_config, modules_to_save=["merger"])
    assert "trained copies (modules_to_save) are in merger" in message


def test_a_copy_that_was_asked_for_and_is_not_there(fresh_model: Any, lora_config: Any) -> None:
    message = refused(adapter_census, fresh_model(lora=True), lora_config(modules_to_save=["lm_head"]))
    assert "modules_to_save lm_head: no trained copy of such a module exists" in message


def test_the_optimizer_must_hold_exactly_the_adapter(fresh_model: Any, lora_config: Any) -> None:
    model = fresh_model(lora=True)
    trainable = [p for p in model.parameters() if p.requires_grad]
    embeddings = model.get_input_embeddings().weight

    missing = refused(adapter_census, model, lora_config(), torch.optim.AdamW(trainable[1:]))
    assert missing.startswith(f"the optimizer misses 1 of 56 trainable tensors: {Q_PROJ}.lora_A.default.weight")
    extra = refused(adapter_census, model, lora_config(), torch.optim.AdamW([*trainable, embeddings]))
    assert "the optimizer holds 1 tensors that are not trainable: model.language_model.embed_tokens" in extra
    stale = refused(adapter_census, model, lora_config(), torch.optim.AdamW([p.detach().clone() for p in trainable]))
    assert "misses 56 of 56" in stale
    assert "was it made before the adapter was attached?" in stale
    assert "a tensor that is not in the model" in stale


def test_a_tensor_held_twice(fresh_model: Any, lora_config: Any) -> None:
    model = fresh_model(lora=True)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable)
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": trainable[:1]})
    assert "the optimizer holds 1 tensors more than once" in refused(adapter_census, model, lora_config(), optimizer)


def test_a_request_that_reaches_only_the_vision_tower(fresh_model: Any, lora_config: Any) -> None:
    message = refused(census, fresh_model, lora_config, target_modules=["qkv"])
    assert "LoRA leaked into vision (4)" in message
    assert "the text side is not adapted at all" in message


def test_wrong_arguments_of_the_census(fresh_model: Any, lora_model: Any, lora_config: Any) -> None:
    with pytest.raises(ValueError, match="carries no adapter"):
        adapter_census(fresh_model(), lora_config())
    with pytest.raises(TypeError, match=r"expected a peft\.LoraConfig, got dict"):
        adapter_census(lora_model, {})
    with pytest.raises(TypeError, match="expected a torch optimizer, got list"):
        adapter_census(lora_model, lora_config(), [])
    with pytest.raises(ValueError, match="names no target_modules"):
        adapter_census(lora_model, lora_config(target_modules=None))
    with pytest.raises(CannotJudge, match="target_parameters"):
        adapter_census(lora_model, lora_config(target_parameters=["weight"]))


# --- neutrality --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "lora"),
    [
        ({}, {}),
        ({"dtype": "float32"}, {"lora_dropout": 0.1}),
        ({"dtype": "float16"}, {"use_rslora": True}),
        ({"dtype": "float32", "bnb_4bit_compute_dtype": torch.bfloat16}, {}),
        ({"dtype": "bfloat16", "bnb_4bit_compute_dtype": torch.float32}, {"init_lora_weights": "gaussian"}),
        ({"quantized": False}, {"lora_bias": True, "target_modules": ["q_proj"]}),
        ({}, {"init_lora_weights": False, "lora_dropout": 0.1}),
        ({}, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        ({}, {"modules_to_save": ["lm_head"]}),
        ({}, {"trainable_token_indices": [3, 4], "bias": "lora_only"}),
    ],
    ids=str,
)
def test_neutral_in_every_dtype_and_kind(fresh_model: Any, batch: Any, load: Any, lora: Any) -> None:
    evidence = adapter_neutrality(fresh_model(lora=lora, **load), batch)
    judged = [f for f in evidence.figures if f.relation]
    assert len(judged) == 4
    assert all(f.value == 0.0 for f in judged)


@pytest.mark.parametrize(
    "lora",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": "of the batch"},
        {"bias": "lora_only"},
        {"rank_pattern": {"q_proj": 32}, "alpha_pattern": {"q_proj": 64}},
    ],
    ids=str,
)
def test_neutral_when_everything_that_peft_trains_was_trained(fresh_model: Any, batch: Any, lora: Any) -> None:
    if "trainable_token_indices" in lora:
        lora = {"trainable_token_indices": batch["input_ids"].unique()[-4:].tolist()}
    model = fresh_model(lora=lora)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    evidence = adapter_neutrality(model, batch)
    assert all(f.value == 0.0 for f in evidence.figures if f.relation)
    assert figure(evidence, "adapter as found: largest logit change") > 0


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute in the model:UserWarning")
@pytest.mark.usefixtures("transformers_takes_peft")
def test_neutral_without_a_wrapper(fresh_model: Any, batch: Any, lora_config: Any) -> None:
    base = fresh_model()
    base.add_adapter(lora_config(init_lora_weights=False), adapter_name="vlm")
    assert adapter_neutrality(base, batch).ok
    assert adapter_census(base, lora_config()).ok


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning")
def test_neutral_when_wrapped_twice(fresh_model: Any, batch: Any, lora_config: Any) -> None:
    from peft import get_peft_model

    base = fresh_model()
    get_peft_model(base, lora_config())
    assert adapter_neutrality(get_peft_model(base, lora_config(init_lora_weights=False)), batch).ok


def test_what_is_no_lora_is_judged_when_disabled_only(fresh_model: Any, batch: Any) -> None:
    from peft import IA3Config, get_peft_model

    model = get_peft_model(fresh_model(), IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
    evidence = adapter_neutrality(model, batch)
    assert [f.name.partition(",")[0] for f in evidence.figures if f.relation] == ["disabled adapter"] * 2
    assert evidence.notes[0].startswith("IA3: only the disabled adapter is judged")


def test_neutral_under_autocast(fresh_model: Any, batch: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert adapter_neutrality(fresh_model(dtype="float32", lora=True), batch).ok


@pytest.mark.parametrize("seed", range(2))
def test_neutral_over_seeds_and_trained_weights(fresh_model: Any, processor: Any, lora_config: Any, seed: int) -> None:
    model = fresh_model(lora=True, seed=seed)
    with torch.no_grad():
        for parameter in adapter_parameters(anatomy(model)).values():
            parameter.normal_(std=0.1)
    samples = scenes(seed=seed, per_skill=1)
    sides = [make_batch(processor, samples[seed : seed + 3], padding_side=side) for side in ("left", "right")]
    evidence = adapter_neutrality(model, sides)
    assert figure(evidence, "adapter as found: largest logit change") > 0


def test_neutral_where_compiled_code_rounds_in_its_own_way(fresh_model: Any, batch: Any, compiler: Any) -> None:
    model = fresh_model(quantized=False, dtype="float32", lora=True)
    layer = model.base_model.model.model.language_model.layers[0].self_attn.q_proj
    runs = []

    def rounds(graph: Any, _inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            runs.append(graph)
            return tuple(output * (1 + 2**-10) for output in graph(*args))

        return run

    assert not adapter_neutrality(model, batch).notes
    layer.forward = compiler(layer.forward, backend=rounds)
    layer(torch.ones(1, layer.in_features))
    assert runs
    runs.clear()
    evidence = adapter_neutrality(model, batch)
    assert evidence.ok
    assert any("as it was written" in note for note in evidence.notes)
    assert not runs
    layer(torch.ones(1, layer.in_features))
    assert runs


def test_neutrality_leaves_no_trace(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(lora={"modules_to_save": ["lm_head"], "init_lora_weights": False})
    model.train()
    parts = anatomy(model)
    model.base_model.model.model.rope_deltas = torch.ones(3, 1)

    def state() -> Any:
        return (
            digests(base_tensors(parts)),
            digests(adapter_parameters(parts).items()),
            [(name, m.training, len(m._forward_hooks)) for name, m in model.named_modules()],
            [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()],
            sorted(vars(parts.base)),
            torch.get_rng_state().tolist(),
            parts.core.rope_deltas.tolist(),
        )

    before = state()
    adapter_neutrality(model, batch)
    assert state() == before


def test_an_adapter_switched_off_by_its_user_stays_off(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(lora=True)
    with model.disable_adapter():
        assert adapter_neutrality(model, batch).ok
        assert model.base_model.model.model.language_model.layers[0].self_attn.q_proj.disable_adapters


def test_initialisations_that_rewrite_the_base_are_named(fresh_model: Any, batch: Any) -> None:
    for kind, quantized in (("olora", True), ("pissa_niter_4", False)):  # PEFT refuses PiSSA on 4-bit weights
        evidence = adapter_neutrality(fresh_model(quantized=quantized, lora={"init_lora_weights": kind}), batch)
        assert f"init_lora_weights={kind!r} wrote into the base weights" in evidence.notes[0]
        assert figure(evidence, "adapter as found: largest logit change") > 1
    evidence = adapter_neutrality(fresh_model(lora={"init_lora_weights": False}), batch)
    assert "starts with a random B" in evidence.notes[0]


@pytest.mark.skipif(not hasattr(LoraLayer, "mica_init"), reason="this release of PEFT has no MiCA")
def test_mica_trains_a_over_a_frozen_b(fresh_model: Any, lora_config: Any, batch: Any) -> None:
    model = fresh_model(quantized=False, lora={"init_lora_weights": "mica"})
    evidence = adapter_census(model, lora_config(init_lora_weights="mica"))
    assert evidence.notes[0].startswith("28 matrices belong to the adapter and are not trained (MiCA, LoRA-FA): model.")
    step = training_step(model, batch, gradient_checkpointing=False)
    assert "first step (A = 0): adapter tensors reached" in {each.name for each in step.figures}
    assert adapter_roundtrip(model).ok
    frozen = fresh_model(quantized=False, lora=True)
    for name, parameter in frozen.named_parameters():
        if ".lora_B." in name:
            parameter.requires_grad_(False)
    assert "instead of 3,072 [trainable LoRA parameters 32,768" in refused(adapter_census, frozen, lora_config())


def test_lorafas_optimizer_trains_b_over_a_frozen_a(fresh_model: Any, lora_config: Any) -> None:
    from peft.optimizers import create_lorafa_optimizer

    model = fresh_model(lora=True)
    optimizer = create_lorafa_optimizer(model, r=8, lora_alpha=16, lr=1e-4)  # freezes A, and holds the whole model
    assert adapter_census(model, lora_config(), optimizer).notes
    other = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    assert "does not have the size of its config" in refused(adapter_census, model, lora_config(), other)


def test_one_matrix_in_several_layers(fresh_model: Any, lora_config: Any) -> None:
    model = fresh_model(lora=True)
    for layer in (1, 3):
        q_proj(model, layer).lora_B["default"] = q_proj(model, 0).lora_B["default"]
    message = refused(adapter_census, model, lora_config())
    assert message.startswith(
        f"1 adapter matrices are one tensor in several modules, which then all learn the same: {Q_PROJ}"
    )


@pytest.mark.skipif(not hasattr(peft, "LoraGAConfig"), reason="this release of PEFT has no LoRA-GA")
@pytest.mark.parametrize("quantized", [True, False], ids=["4-bit", "16-bit"])
def test_lora_ga_without_gradients_is_the_default_initialisation(fresh_model: Any, batch: Any, quantized: bool) -> None:
    ga = {"init_lora_weights": "lora_ga", "lora_ga_config": peft.LoraGAConfig()}
    evidence = adapter_neutrality(fresh_model(quantized=quantized, lora=ga), batch)
    why = "refuses 4-bit weights" if quantized else "has left none"
    assert f"found no gradients to start from (preprocess_loraga {why}): PEFT initialised" in evidence.notes[0]


@pytest.mark.skipif(not hasattr(peft, "LoraGAConfig"), reason="this release of PEFT has no LoRA-GA")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # PEFT's, on the first layer
def test_lora_ga_on_gradients_rewrites_the_base(fresh_model: Any, batch: Any) -> None:
    from peft.tuners.lora.loraga import preprocess_loraga

    model = fresh_model(quantized=False)
    weight = model.model.language_model.layers[0].self_attn.q_proj.weight
    before = weight.detach().clone()
    config = peft.LoraConfig(
        r=2,
        target_modules=r".*language_model.*\.(q_proj|v_proj)",
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(),
    )
    preprocess_loraga(model, config, lambda: model(**batch).loss.backward())
    model = peft.get_peft_model(model, config)
    assert not torch.equal(q_proj(model, 0).base_layer.weight, before)
    assert "writes into the base weights if preprocess_loraga ran" in adapter_neutrality(model, batch).notes[0]
    assert not adapter_roundtrip(model).notes  # loading it writes nothing: it is loaded back and compared


def test_dora_is_judged_when_disabled_only(fresh_model: Any, batch: Any) -> None:
    evidence = adapter_neutrality(fresh_model(lora={"use_dora": True, "lora_dropout": 0.1}), batch)
    assert [f.name for f in evidence.figures if f.relation] == [
        "disabled adapter, eval mode: largest logit change",
        "disabled adapter, train mode: largest logit change",
    ]
    assert "DoRA: B = 0 is not judged" in evidence.notes[0]


def q_proj(model: Any, layer: int = 2) -> Any:
    return model.base_model.model.model.language_model.layers[layer].self_attn.q_proj


def test_a_layer_that_ignores_being_disabled(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(lora={"init_lora_weights": False})
    layer = q_proj(model)
    plain = layer.forward

    def stubborn(x: torch.Tensor) -> torch.Tensor:
        layer._disable_adapters = False
        return plain(x)

    layer.forward = stubborn
    message = refused(adapter_neutrality, model, batch)
    assert message.startswith("disabled adapter (eval mode, batch 0) changes")
    assert "first at the output of model.language_model.layers.2.self_attn.q_proj" in message


def test_a_single_nan_in_a(fresh_model: Any, batch: Any) -> None:
    """Zero times NaN is NaN: a broken A shows even while B is zero."""
    model = fresh_model(lora=True)
    with torch.no_grad():
        q_proj(model).lora_A["default"].weight[0, 0] = float("nan")
    message = refused(adapter_neutrality, model, batch)
    assert "adapter with B = 0 (eval mode, batch 0) changes" in message
    assert "first at the output of model.language_model.layers.2.self_attn.q_proj" in message
    assert "disabled adapter (" not in message


def test_one_unit_in_the_last_place_is_seen(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(dtype="float32", lora=True)
    layer = q_proj(model, layer=0)
    plain = layer.forward
    layer.forward = lambda x: torch.nextafter(plain(x), torch.tensor(float("inf")))
    assert "first at the output of model.language_model.layers.0.self_attn.q_proj" in refused(
        adapter_neutrality, model, batch
    )


def test_a_wrapper_that_computes_in_another_dtype(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(dtype="float32", lora=True)
    layer = q_proj(model)
    plain = layer.forward
    layer.forward = lambda x: plain(x.bfloat16()).float()
    assert "adapter with B = 0 (eval mode" in refused(adapter_neutrality, model, batch)


def test_a_difference_in_train_mode_only(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(lora=True)
    layer = q_proj(model)
    plain = layer.forward
    layer.forward = lambda x: plain(x) * (1.5 if layer.training else 1)
    message = refused(adapter_neutrality, model, batch)
    assert "(train mode, batch 0) changes" in message
    assert "(eval mode" not in message


def test_b_is_put_back_when_the_model_breaks(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(lora={"init_lora_weights": False})
    parts = anatomy(model)
    before = digests(zero_initialised_matrices(adapter_parameters(parts)).items())
    layer = q_proj(model)

    def broken(x: torch.Tensor) -> torch.Tensor:
        if not layer._disable_adapters:
            raise RuntimeError("out of memory")
        return layer.base_layer(x)

    layer.forward = broken
    with pytest.raises(ModelCrashed, match="RuntimeError: out of memory"):
        adapter_neutrality(model, batch)
    assert digests(zero_initialised_matrices(adapter_parameters(parts)).items()) == before
    assert "self_attn.q_proj.lora_A" in " ".join(name for name, _ in model.named_parameters())


def test_kernels_that_do_not_repeat_cannot_be_judged(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(lora=True)
    noise = torch.Generator().manual_seed(1)
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _m, _a, out: out + torch.randn(out.shape, generator=noise).to(out.dtype))
    with pytest.raises(CannotJudge, match="two forwards of the base model alone"):
        adapter_neutrality(model, batch)
    handle.remove()


def test_what_neutrality_cannot_judge(fresh_model: Any, lora_model: Any, processor: Any, batch: Any) -> None:
    text = make_batch(processor, [s for s in scenes(seed=1, per_skill=1) if not s.images])
    with pytest.raises(CannotJudge, match="no batch has images"):
        adapter_neutrality(lora_model, text)
    with pytest.raises(ValueError, match="carries no adapter"):
        adapter_neutrality(fresh_model(), batch)
    merged = fresh_model(quantized=False, lora=True)
    merged.merge_adapter()
    with pytest.raises(CannotJudge, match="merged into the base weights"):
        adapter_neutrality(merged, batch)
