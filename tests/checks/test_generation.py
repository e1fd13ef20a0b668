"""Generation checks hold on healthy models in every dtype, and each fails on the defect it is for."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pytest_qvl import releases
from pytest_qvl.checks.generation import generation_repeatable, greedy_is_argmax
from pytest_qvl.checks.generation_form import generation_wellformed
from pytest_qvl.checks.generation_invariance import generation_batch_invariance, generation_cache_invariance
from pytest_qvl.checks.positions import decode_positions
from pytest_qvl.checks.support.greedy import Reply, greedy
from pytest_qvl.checks.support.mrope import VisionIds, mrope_oracle
from pytest_qvl.checks.support.noise_floor import NoiseFloor, noise_floor
from pytest_qvl.checks.support.placeholders import refuse_positions_in_generation
from pytest_qvl.checks.support.position_comparison import AloneAgainstBatch, ids_of_row
from pytest_qvl.checks.support.reference import Reference, record_reference
from pytest_qvl.checks.support.scoring import text_of
from pytest_qvl.evidence import CannotJudge, CheckFailed, Evidence, Judge
from pytest_qvl.faults.case import Case, apply
from pytest_qvl.faults.matrix.random_models import random_config
from pytest_qvl.models.adapters import adapter_parameters
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.sources.synthetic import build_synthetic
from pytest_qvl.models.taps import positions_changed
from pytest_qvl.samples import make_batch, scenes

if TYPE_CHECKING:
    from collections.abc import Callable

SAMPLES = scenes(seed=7, per_skill=2)
ONE_EACH = SAMPLES[:10]
IMAGE_PAD, EOS = 402, (398, 396)


@pytest.fixture(scope="module")
def reference(fresh_model: Any, processor: Any) -> Reference:
    return record_reference(fresh_model(quantized=False), processor, SAMPLES)


@pytest.fixture(scope="module")
def batch(processor: Any) -> dict[str, torch.Tensor]:
    return make_batch(processor, ONE_EACH)


def fails(check: Callable[..., Evidence], *args: Any, **options: Any) -> str:
    with pytest.raises(CheckFailed) as caught:
        check(*args, **options)
    return str(caught.value)


def figure(evidence: Evidence, name: str) -> float:
    return float(next(f.value for f in evidence.figures if f.name == name))


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow), "float32"])
def test_healthy(fresh_model: Any, processor: Any, batch: dict[str, torch.Tensor], dtype: str) -> None:
    model = fresh_model(dtype=dtype, lora=True)
    floor = noise_floor(fresh_model(quantized=False, dtype=dtype), processor, ONE_EACH)
    assert figure(greedy_is_argmax(model, batch), "tokens") >= 2 * len(ONE_EACH)
    generation_repeatable(model, batch)
    alone = generation_batch_invariance(model, processor, ONE_EACH, floor)
    cached = generation_cache_invariance(model, batch, floor)
    # bitwise equality would mean that the same computation was compared with itself
    assert figure(alone, "alone against batch") > 0
    assert figure(cached, "generation with cache against plain forward") > 0


def test_healthy_replies_are_wellformed(lora_model: Any, processor: Any, reference: Reference) -> None:
    form = generation_wellformed(lora_model, processor, SAMPLES, reference)
    assert figure(form, "replies judged for their form") >= 0.9 * len(SAMPLES)


def test_random_weights_are_judged_where_they_can_be(
    fresh_model: Any, processor: Any, batch: dict[str, torch.Tensor]
) -> None:
    model = fresh_model(quantized=False)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.04)
    recorded = record_reference(model, processor, ONE_EACH)
    assert not recorded.has_knowledge
    greedy_is_argmax(model, batch)
    generation_repeatable(model, batch)
    assert figure(generation_batch_invariance(model, processor, ONE_EACH, recorded), "alone against batch") > 0
    generation_cache_invariance(model, batch, recorded)
    evidence = generation_wellformed(model, processor, ONE_EACH, recorded, max_new_tokens=16)
    assert any("knows nothing about the images" in note for note in evidence.notes)
    assert not any(f.name == "replies without an end" for f in evidence.figures)


def test_the_models_own_generation_config_is_set_aside(
    fresh_model: Any, processor: Any, batch: dict[str, torch.Tensor], reference: Reference
) -> None:
    model = fresh_model(lora=True)
    before = [reply.ids for reply in greedy(model, batch, max_new_tokens=8)]
    config = anatomy(model).base.generation_config
    config.do_sample, config.temperature, config.top_p, config.top_k = True, 5.0, 0.9, 50
    config.repetition_penalty, config.no_repeat_ngram_size = 9.0, 1
    own = config.to_dict()
    evidence = greedy_is_argmax(model, batch, max_new_tokens=4)
    assert any("has repetition_penalty=9.0, no_repeat_ngram_size=1" in note for note in evidence.notes)
    assert [reply.ids for reply in greedy(model, batch, max_new_tokens=8)] == before
    generation_repeatable(model, batch, max_new_tokens=2)
    generation_cache_invariance(model, batch, reference, max_new_tokens=2)
    assert anatomy(model).base.generation_config.to_dict() == own


def test_batches_as_collators_make_them(fresh_model: Any, processor: Any, reference: Reference) -> None:
    """Without an attention mask (one row, no padding), and with correct positions of their own."""
    model = fresh_model(quantized=False)
    made = make_batch(processor, [scenes(seed=5, per_skill=1)[1]])
    parts, mask = anatomy(model), made.pop("attention_mask")
    ids = VisionIds(parts.image_token_id, parts.video_token_id)
    positions = mrope_oracle(made["input_ids"], mask, made["image_grid_thw"], ids, parts.merge_size)
    assert greedy_is_argmax(model, made, max_new_tokens=3).ok
    assert generation_cache_invariance(model, made, reference, max_new_tokens=3).ok
    given = {**made, "position_ids": positions}
    checks = (
        lambda: greedy_is_argmax(model, given, max_new_tokens=3),
        lambda: generation_cache_invariance(model, given, reference, max_new_tokens=3),
        lambda: generation_repeatable(model, given, max_new_tokens=3),
        lambda: decode_positions(model, given),
    )
    for check in checks:
        if releases.is_before("transformers", "5.2"):
            with pytest.raises(CannotJudge, match=r"^generate\(\) of Transformers .* crashes on position_ids"):
                check()
        else:
            assert check().ok


@pytest.mark.parametrize(("version", "taken"), [("5.1.0", False), ("5.2.0", True)])
def test_positions_that_generate_does_not_take(monkeypatch: pytest.MonkeyPatch, version: str, taken: bool) -> None:
    """``prepare_inputs_for_generation`` of 5.1.0 cuts the second of their axes, that of 5.2.0 the last."""
    monkeypatch.setattr(releases, "installed", {"transformers": version}.get)
    refuse_positions_in_generation({"position_ids": torch.zeros(2, 9)})
    refuse_positions_in_generation({"position_ids": None})
    given = {"position_ids": torch.zeros(3, 2, 9)}
    with nullcontext() if taken else pytest.raises(CannotJudge, match=r"\(5\.2\.0 takes them\)"):
        refuse_positions_in_generation(given)


def with_processor(model: Any, processor: Any) -> Any:
    """What a wrapper does that adds its own logits processor to every call."""
    from transformers import LogitsProcessorList

    generate = model.generate

    def adding(*args: Any, logits_processor: Any = (), **options: Any) -> Any:
        return generate(*args, logits_processor=LogitsProcessorList([*logits_processor, processor]), **options)

    model.generate = adding
    return model


def test_a_wrapper_that_forbids_repetition(fresh_model: Any, batch: dict[str, torch.Tensor]) -> None:
    from transformers import NoRepeatNGramLogitsProcessor

    said = fails(greedy_is_argmax, with_processor(fresh_model(), NoRepeatNGramLogitsProcessor(1)), batch)
    assert said.startswith("something samples or penalises although all of that is switched off: row ")
    assert "which occurs earlier in the row: a repetition penalty would do that" in said
    assert "tokens that are not the argmax" in said


def test_a_penalty_too_small_to_tip_a_token(fresh_model: Any, batch: dict[str, torch.Tensor]) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    said = fails(greedy_is_argmax, with_processor(fresh_model(), RepetitionPenaltyLogitsProcessor(1.05)), batch)
    assert said.startswith("a logits processor changes logits although none is configured, most in row ")


def test_a_wrapper_that_samples(fresh_model: Any, batch: dict[str, torch.Tensor]) -> None:
    model = fresh_model()
    generate = model.generate

    def sampling(*args: Any, generation_config: Any, **options: Any) -> Any:
        generation_config.do_sample, generation_config.temperature = True, 3.0
        return generate(*args, generation_config=generation_config, **options)

    model.generate = sampling
    assert "samples or penalises although all of that is switched off" in fails(greedy_is_argmax, model, batch)
    assert "choose different tokens" in fails(generation_repeatable, model, batch)


def test_dropout_that_stays_on(fresh_model: Any, batch: dict[str, torch.Tensor]) -> None:
    model = fresh_model()
    last = anatomy(model).language_backbone.layers[3].mlp
    last.register_forward_hook(lambda _m, _a, out: torch.nn.functional.dropout(out, 0.1, training=True))
    said = fails(generation_repeatable, model, batch)
    assert said.startswith("logits of two runs on the same inputs differ, most at row ")
    assert "dropout that stays on" in said


def test_positions_of_padded_rows_while_decoding(
    fresh_model: Any, processor: Any, batch: dict[str, torch.Tensor], reference: Reference
) -> None:
    """Transformers 4.54.0 to 4.56.2: prefill right, decoded tokens of padded rows off by their padding."""
    model = fresh_model()
    padding = (batch["attention_mask"] == 0).sum(dim=1)[:, None]

    def too_far(positions: torch.Tensor) -> torch.Tensor:
        decoding = positions.shape[-1] == 1 and positions.shape[1] == len(padding)
        return positions + padding if decoding else positions

    with positions_changed(anatomy(model), too_far):
        said = fails(generation_batch_invariance, model, processor, ONE_EACH, reference, max_new_tokens=3)
        cached = fails(generation_cache_invariance, model, batch, reference, max_new_tokens=3)
    assert "with cache against plain forward" in cached
    assert said.startswith("alone against batch: logits differ by ")
    assert "step 1" in said or "step 2" in said
    assert "where the noise floor is" in said
    assert "positions and mask of padded rows" in said


@pytest.fixture(scope="module")
def faint(processor: Any) -> tuple[Any, NoiseFloor]:
    """Random weights and the frequencies of a release, with which positions move the logits of a short row little."""
    config = random_config("qwen2_5_vl", layers=2, blocks=1, vision={"fullatt_block_indexes": [0]})
    text = config.get_text_config()
    text.num_attention_heads, text.num_key_value_heads, text.head_dim, text.rope_theta = 1, 1, 128, 1e6
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text.rope_parameters, text.rope_scaling = rope, {**rope, "type": "mrope"}
    model = build_synthetic(config, None, "cpu", torch.bfloat16)
    return model, noise_floor(model, processor, ONE_EACH[:3])


def test_positions_alone_are_held_where_logits_tell_nothing(faint: Any, processor: Any) -> None:
    model, floor = faint
    samples = [*ONE_EACH[:2], next(sample for sample in ONE_EACH if not sample.images)]
    healthy = generation_batch_invariance(model, processor, samples, floor, max_new_tokens=3)
    assert figure(healthy, "alone against batch: position ids that differ") == 0

    unused: Any = None
    case = Case(model, processor, unused, unused, samples, samples, unused, unused)
    with apply("text-alone-decodes-on-one-axis", case):
        said = fails(generation_batch_invariance, model, processor, samples, floor, max_new_tokens=3)
    assert said.startswith("alone against batch: positions differ in 1 of 3 samples: sample 'text-")
    assert ", decode step 1: h is 0 alone and " in said
    assert "logits differ" not in said


def test_a_row_may_count_from_another_number_alone(faint: Any, processor: Any) -> None:
    model, floor = faint
    with positions_changed(anatomy(model), lambda p: p + 16 if p.shape[1] == 1 else p):
        evidence = generation_batch_invariance(model, processor, ONE_EACH[:3], floor, max_new_tokens=3)
    assert figure(evidence, "alone against batch: position ids that differ") == 0


def test_positions_that_nobody_sees_are_said_not_to_be_compared() -> None:
    judge, positions = Judge("generation_batch_invariance", ""), AloneAgainstBatch()
    positions.take("sample 'a'", 3, ids_of_row([], torch.ones(1, 3, dtype=torch.bool), 0), torch.zeros(3, 4))
    positions.judge(judge, "alone against batch", "")
    assert not judge.figures
    assert judge.notes[0].startswith("positions of sample 'a' were not compared: the model bypasses ")


def test_rounding_of_replies_that_moves_them_further_than_the_floor_is_no_alarm(
    fresh_model: Any, processor: Any, rounded_otherwise: Any
) -> None:
    """A floor is measured on other samples and without the adapter, which rounds most here."""
    model = fresh_model(lora=True)
    few = SAMPLES[1:3]
    floor = noise_floor(model, processor, few, adapter_disabled=True)
    for name, matrix in adapter_parameters(anatomy(model)).items():
        if "lora_B" in name:
            matrix.data.normal_(std=1.0, generator=torch.Generator().manual_seed(0))
    made = make_batch(processor, few)
    with rounded_otherwise(model, lambda shape: shape[0] == len(few)):
        alone = generation_batch_invariance(model, processor, few, floor, max_new_tokens=2)
    with rounded_otherwise(model, lambda shape: shape[1:2] == (1,)):
        cached = generation_cache_invariance(model, made, floor, max_new_tokens=2)
    ways = ("alone against batch", alone), ("generation with cache against plain forward", cached)
    for name, evidence in ways:
        assert figure(evidence, f"{name}: replies beyond the noise floor, held to their own rounding") > 0


def test_padding_that_is_attended(fresh_model: Any, processor: Any, reference: Reference) -> None:
    model = fresh_model()

    def unmasked(_module: Any, args: Any, options: dict[str, Any]) -> Any:
        if options.get("attention_mask") is not None:
            options["attention_mask"] = torch.ones_like(options["attention_mask"])
        return args, options

    anatomy(model).language_backbone.register_forward_pre_hook(unmasked, with_kwargs=True)
    said = fails(generation_batch_invariance, model, processor, ONE_EACH, reference, max_new_tokens=2)
    assert "step 0" in said
    assert "sample '" in said


def test_decode_positions_off_by_one(
    fresh_model: Any, processor: Any, batch: dict[str, torch.Tensor], reference: Reference
) -> None:
    model = fresh_model()
    with positions_changed(anatomy(model), lambda p: p + 1 if p.shape[-1] == 1 else p):
        # alone and in a batch alike, so that only the plain forward tells
        generation_batch_invariance(model, processor, ONE_EACH, reference, max_new_tokens=3)
        said = fails(generation_cache_invariance, model, batch, reference, max_new_tokens=3)
    assert said.startswith("generation with cache against plain forward: logits differ by")
    assert "look at positions and cache of the decode steps" in said
    assert "without cache against plain forward: logits" not in said


def test_pictures_lost_after_the_first_step_without_cache(
    fresh_model: Any, batch: dict[str, torch.Tensor], reference: Reference
) -> None:
    model = fresh_model()
    prepare, prompt = model.prepare_inputs_for_generation, batch["input_ids"].shape[1]

    @wraps(prepare)
    def forgetful(input_ids: torch.Tensor, *args: Any, **options: Any) -> Any:
        made = prepare(input_ids, *args, **options)
        if made["input_ids"].shape[1] > prompt:
            # the pictures themselves, or what newer releases encoded of them once for all steps
            made |= dict.fromkeys(made.keys() & {"pixel_values", "image_grid_thw", "mm_encoder_outputs"})
        return made

    model.prepare_inputs_for_generation = forgetful
    said = fails(generation_cache_invariance, model, batch, reference, max_new_tokens=3)
    assert said.startswith("generation without cache against plain forward: logits differ by")
    assert "look at images, positions and mask of every step after the first" in said


def test_not_finite_logits_are_traced_to_their_module(fresh_model: Any, processor: Any, reference: Reference) -> None:
    model = fresh_model(quantized=False)
    with torch.no_grad():
        anatomy(model).language_backbone.layers[2].mlp.down_proj.weight[3, 5] = float("inf")
    said = fails(generation_wellformed, model, processor, ONE_EACH, reference)
    assert said.startswith("logits of sample '")
    assert "not finite from step 0 on; this begins at model.language_model.layers.2.mlp.down_proj" in said
    assert "with runs of token 0" in said


def test_not_finite_logits_are_no_penalty_dropout_or_position(
    fresh_model: Any, processor: Any, batch: dict[str, torch.Tensor], reference: Reference
) -> None:
    model = fresh_model(lora=True)
    with torch.no_grad():
        anatomy(model).language_backbone.layers[1].input_layernorm.weight[3] = float("nan")
    for check, arguments in {
        greedy_is_argmax: (model, batch),
        generation_repeatable: (model, batch),
        generation_batch_invariance: (model, processor, ONE_EACH[:3], reference),
        generation_cache_invariance: (model, batch, reference),
    }.items():
        with pytest.raises(CheckFailed) as caught:
            check(*arguments, max_new_tokens=2)
        [said] = caught.value.evidence.problems
        assert "are not finite from step 0 on; this begins at model.language_model.layers.1.input_layernorm" in said
        assert "whose own weight is not finite [replies with logits that are not finite " in said


def test_logits_that_are_not_finite_in_decoding_only(
    fresh_model: Any, batch: dict[str, torch.Tensor], reference: Reference
) -> None:
    model = fresh_model()
    norm = anatomy(model).language_backbone.layers[2].post_attention_layernorm
    norm.register_forward_hook(lambda _m, _a, out: out * torch.inf if out.shape[1] == 1 else out)
    said = fails(generation_cache_invariance, model, batch, reference)
    assert said.startswith(
        "logits of row 0 are not finite from step 1 on; this begins at model.language_model.layers.2."
    )


def test_end_of_sequence_forgotten(fresh_model: Any, processor: Any, reference: Reference) -> None:
    model = fresh_model()
    with torch.no_grad():
        model.lm_head.weight[list(EOS)] = -model.lm_head.weight[EOS[0]]
    said = fails(generation_wellformed, model, processor, ONE_EACH, reference, max_new_tokens=24)
    assert "and 24 tokens without one of 398, 396" in said
    assert "forgets to" in said
    assert said.startswith("sample '")


def test_a_generation_config_that_does_not_stop_where_turns_end(lora_model: Any, processor: Any) -> None:
    """Seen without a reference, so on weights that know nothing too."""
    config = anatomy(lora_model).base.generation_config
    before, config.eos_token_id = config.eos_token_id, 1
    try:
        said = fails(generation_wellformed, lora_model, processor, ONE_EACH[:1], max_new_tokens=2)
    finally:
        config.eos_token_id = before
    assert said.startswith("the generation config stops at 1 (")
    assert "and not at 398 (<|im_end|>)" in said
    assert "set generation_config.eos_token_id" in said


def lure(model: Any, processor: Any, token: int) -> None:
    """Make the head prefer `token` wherever it would say the first token of "red"."""
    [red, *_] = processor.tokenizer("red", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.lm_head.weight[token] = 2 * model.lm_head.weight[red]


@pytest.mark.parametrize(
    ("token", "message"),
    [(IMAGE_PAD, f"with vision token {IMAGE_PAD}"), (440, "with id 440 of 404")],
)
def test_tokens_that_are_no_words(
    fresh_model: Any, processor: Any, reference: Reference, token: int, message: str
) -> None:
    model = fresh_model(quantized=False)
    red = [s for s in SAMPLES if s.answer == "red"]
    assert red
    lure(model, processor, token)
    said = fails(generation_wellformed, model, processor, SAMPLES, reference, max_new_tokens=16)
    assert message in said
    assert "sample '" in said


def test_runs_of_token_0(fresh_model: Any, processor: Any, reference: Reference) -> None:
    model = fresh_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    said = fails(generation_wellformed, model, processor, ONE_EACH, reference, max_new_tokens=16)
    assert "says '!!!!" in said
    assert "argmax of logits that are broken [replies with runs of token 0" in said
    assert "and repeats its last 1 tokens" in said


def test_loops_are_found_at_the_end_only() -> None:
    from pytest_qvl.checks.generation_form import _loop

    assert _loop(Reply((1, 2, 3, 2, 3, 2, 3), stopped=False, not_finite=None)) == 2
    assert _loop(Reply((1, 5, 5, 5, 9), stopped=True, not_finite=None)) == 1
    assert _loop(Reply((5, 5, 5, 1, 2), stopped=False, not_finite=None)) is None
    assert _loop(Reply((5, 5, 9), stopped=True, not_finite=None)) is None


def test_without_a_reference_the_form_is_not_judged(lora_model: Any, processor: Any) -> None:
    evidence = generation_wellformed(lora_model, processor, ONE_EACH)
    assert any("not judged: no reference" in note for note in evidence.notes)


def test_inputs_that_cannot_decide(
    fresh_model: Any, processor: Any, batch: dict[str, torch.Tensor], reference: Reference
) -> None:
    model = fresh_model()
    right = make_batch(processor, ONE_EACH, padding_side="right")
    for check in (greedy_is_argmax, generation_repeatable):
        with pytest.raises(ValueError, match="pad the batch on the left"):
            check(model, right)
    with pytest.raises(ValueError, match="pad the batch on the left"):
        generation_cache_invariance(model, right, reference)
    with pytest.raises(CannotJudge, match="no row of the batch is padded"):
        generation_batch_invariance(model, processor, ONE_EACH[:1], reference)
    with pytest.raises(CannotJudge, match="no step was decoded from the cache"):
        generation_cache_invariance(model, batch, reference, max_new_tokens=1)
    other = replace(reference.floor, dtype="bfloat16")
    for check in (
        lambda: generation_cache_invariance(model, batch, other),
        lambda: generation_batch_invariance(model, processor, ONE_EACH, other),
    ):
        with pytest.raises(ValueError, match="was measured in bfloat16, the model computes in float32"):
            check()


def test_greedy_replies(lora_model: Any, processor: Any, batch: dict[str, torch.Tensor]) -> None:
    lora_model.train()
    replies = greedy(lora_model, batch, max_new_tokens=8, keep_logits=True)
    assert all(module.training for module in lora_model.modules())
    lora_model.eval()
    right = sum(text_of(processor, r) == s.answer for r, s in zip(replies, ONE_EACH, strict=True))
    assert right >= 8
    for reply in replies:
        assert reply.logits is not None
        assert reply.logits.shape == (len(reply.ids), 448)
        assert reply.stopped == (reply.ids[-1] in EOS)
        assert reply.not_finite is None
    hidden = greedy(lora_model, batch, max_new_tokens=8, suppress=EOS)
    assert all(not reply.stopped and reply.not_finite is None and len(reply.ids) == 8 for reply in hidden)
