"""generation_as_found: the mode, the generation config and the padding side that are found, and not clean ones."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pytest_qvl.checks import generation_as_found
from pytest_qvl.evidence import CannotJudge, CheckFailed
from pytest_qvl.faults.tools import after, all_of, attribute
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.training import checkpointing
from pytest_qvl.samples import scenes

if TYPE_CHECKING:
    from collections.abc import Iterator

SAMPLES = [sample for sample in scenes(seed=7, per_skill=1) if sample.skill in ("list", "colour", "side", "text")]
END = "<|im_end|>"


@pytest.fixture(scope="module")
def model(fresh_model: Any) -> Any:
    return fresh_model(quantized=False, lora={"lora_dropout": 0.1})


@pytest.fixture
def judged(model: Any, processor: Any) -> Any:
    return partial(generation_as_found, model, processor, SAMPLES)


@contextmanager
def configured(model: Any, **settings: Any) -> Iterator[None]:
    with all_of([attribute(anatomy(model).base.generation_config, name, value) for name, value in settings.items()]):
        yield


@contextmanager
def in_training(model: Any) -> Iterator[None]:
    model.train()
    try:
        yield
    finally:
        model.eval()


def says(judged: Any) -> str:
    with pytest.raises(CheckFailed) as caught:
        judged()
    return str(caught.value)


def figures(evidence: Any) -> dict[str, Any]:
    return {figure.name: figure.value for figure in evidence.figures}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_quantized_model_as_released(fresh_model: Any, processor: Any, dtype: str) -> None:
    """Whose generation config samples at 1e-6 and penalises repetitions by 1.05."""
    model = fresh_model(dtype=dtype, lora=True)
    assert anatomy(model).base.generation_config.do_sample
    found = figures(generation_as_found(model, processor, SAMPLES))
    assert found["answers that argmax is sure of"] == len(SAMPLES)
    assert found["modules in train mode"] == 0


def test_train_mode_that_changes_nothing_is_noted(model: Any, judged: Any) -> None:
    """Its adapter is fresh, so dropout in it adds nothing; without checkpointing the cache stays."""
    with in_training(model):
        evidence = judged()
    assert "are in train mode, which changes no logit here" in evidence.notes[-1]
    assert not any(module.training for module in model.modules())


def test_checkpointing_in_train_mode_drops_the_cache(model: Any, judged: Any) -> None:
    with checkpointing(anatomy(model), enabled=True):
        assert judged().ok  # in eval mode nothing is checkpointed
        with in_training(model):
            said = says(judged)
            assert "the logits differ from step 1 on; gradient checkpointing is on in" in said
            assert "call model.eval() before generate()" in said
            with configured(model, use_cache=False):  # every step computes the whole row, and is right
                assert "use_cache=False: each token computes the whole row again" in " ".join(judged().notes)


def test_dropout_of_a_trained_adapter_is_named(model: Any, judged: Any) -> None:
    layers = [module for name, module in model.named_modules() if name.endswith("lora_B.default")]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in layers:
            layer.weight.data.normal_(std=0.02)
    try:
        with in_training(model):
            assert "dropout is on: " in (said := says(judged))
            assert "lora_dropout.default (0.1)" in said
    finally:
        for layer in layers:
            layer.weight.data.zero_()


def test_noise_in_eval_mode_cannot_be_told_from_train_mode(model: Any, judged: Any) -> None:
    noisy = after([anatomy(model).language_backbone], lambda _m, _a, out: setattr_noise(out))
    with in_training(model), noisy, pytest.raises(CannotJudge, match="two runs in eval mode differ bitwise"):
        judged()


COUNT = [0]


def setattr_noise(output: Any) -> Any:
    """Something else at every call, whatever the seed."""
    COUNT[0] += 1
    output.last_hidden_state = output.last_hidden_state * (1 + COUNT[0] / 1000)
    return output


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_new_tokens": 2}, "max_new_tokens=2 cuts replies off: the answer '"),
        ({"max_length": 40}, "max_length=40 counts the prompt with its visual tokens, "),
        ({"min_new_tokens": 9}, "min_new_tokens=9 bans <|im_end|> until then, and the answer '"),
        ({"min_length": 300}, "min_length=300 bans <|im_end|> until then"),
        ({"no_repeat_ngram_size": 1}, "no_repeat_ngram_size=1 bans what the row has said before"),
        ({"stop_strings": [", "]}, "stop_strings=', ' ends replies inside of the answer '"),
        ({"temperature": 0.7}, "do_sample=True with temperature=0.7"),
        ({"temperature": None, "top_k": 50}, "draws replies at random"),
        ({"num_beams": 4, "do_sample": False, "length_penalty": 30.0}, "num_beams=4, length_penalty=30.0"),
    ],
    ids=lambda value: repr(value) if isinstance(value, dict) else "",
)
def test_settings_that_spoil_answers(model: Any, judged: Any, settings: dict[str, Any], words: str) -> None:
    with configured(model, **settings):
        assert words in says(judged)


@pytest.mark.parametrize("name", ["bad_words_ids", "suppress_tokens", "begin_suppress_tokens"])
def test_bans_count_where_an_answer_needs_the_token(model: Any, processor: Any, judged: Any, name: str) -> None:
    first, end = (processor.tokenizer(text)["input_ids"][0] for text in (SAMPLES[0].answer, END))
    image = anatomy(model).image_token_id
    shape = (lambda ids: [[each] for each in ids]) if name == "bad_words_ids" else list
    with configured(model, **{name: shape([image])}):
        assert judged().ok
    with configured(model, **{name: shape([image, first])}):
        assert f"{name} bans {SAMPLES[0].answer.split(' ')[0]!r} ({first}), which the answer " in says(judged)
    if name != "begin_suppress_tokens":
        with configured(model, **{name: shape([end])}):
            assert f"{name} bans {END!r}" in says(judged)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 512, "min_new_tokens": 1},
        {"max_length": 4096},
        {"temperature": 0.01, "top_k": 1, "top_p": 0.001},  # Qwen2-VL as released
        {"temperature": 0.7, "top_k": 1},
        {"num_beams": 2, "do_sample": False},
        {"stop_strings": ["<|im_start|>"]},
        {"no_repeat_ngram_size": 20},
    ],
    ids=repr,
)
def test_settings_that_leave_answers_alone(model: Any, judged: Any, settings: dict[str, Any]) -> None:
    with configured(model, **settings):
        assert judged().ok


def test_a_family_that_samples_as_released_is_not_judged_for_it(model: Any, judged: Any) -> None:
    released = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.0}
    with configured(model, **released), attribute(anatomy(model).config, "model_type", "qwen3_vl"):
        assert any("replies are drawn at random" in note for note in judged().notes)


@pytest.mark.parametrize("settings", [{"sequence_bias": -30.0}, {"num_beams": 4, "length_penalty": 30.0}], ids=repr)
def test_where_replies_are_drawn_argmax_judges_the_rest(
    model: Any, processor: Any, judged: Any, settings: dict[str, Any]
) -> None:
    released = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.0}
    if "sequence_bias" in settings:
        settings = {"sequence_bias": [[processor.tokenizer(END)["input_ids"], settings["sequence_bias"]]]}
    with configured(model, **released | settings), attribute(anatomy(model).config, "model_type", "qwen3_vl"):
        said = says(judged)
    assert "generate() as found loses " in said
    assert f"{next(iter(settings))}=" in said


def test_rows_padded_on_the_right(model: Any, processor: Any, judged: Any) -> None:
    processor.tokenizer.padding_side = "right"
    try:
        assert "the processor as found pads on the right (tokenizer.padding_side): in " in says(judged)
        assert judged(padding_side="left").ok
        assert "these rows have one length" in generation_as_found(model, processor, SAMPLES[:1]).notes[-1]
    finally:
        processor.tokenizer.padding_side = "left"
    with pytest.raises(ValueError, match="needs at least one sample"):
        generation_as_found(model, processor, [])


def test_random_weights_answer_nothing(fresh_model: Any, processor: Any) -> None:
    model = fresh_model(quantized=False)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.04)
    evidence = generation_as_found(model, processor, SAMPLES)
    assert "argmax gives none of the answers for sure" in evidence.notes[-1]
