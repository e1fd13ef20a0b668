"""Thoughts in the label mask, by the chat template that opens them: taught whole or not at all, and never left out."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from pytest_qvl.checks.labels import label_mask
from pytest_qvl.checks.pairing import picture_pairing
from pytest_qvl.evidence import CheckFailed
from pytest_qvl.faults.tools import attribute
from pytest_qvl.models.families import FAMILIES
from pytest_qvl.models.sources.embedded import embedded_model_dir
from pytest_qvl.models.sources.processors import load_processor
from pytest_qvl.samples import make_batch, scenes
from pytest_qvl.samples.batch import IGNORED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_qvl.evidence import Evidence

pytestmark = pytest.mark.skipif(not FAMILIES["qwen3_5"].installed, reason="this release of Transformers has no Qwen3.5")

ASKED, ANSWERS = "<|im_start|>user\nwhich colour?<|im_end|>\n", "<|im_start|>assistant\n"
EMPTY, THOUGHT = "<think>\n\n</think>\n\n", "<think>\nthe left tile\n</think>\n\n"
END = "<|im_end|>"
ONE_ROW = ASKED + ANSWERS
OPENED = "{{ '<think>\n' }}"
SWITCH = "{% if enable_thinking is defined and enable_thinking is true %}"
NEVER_THINKS = "{{ '<think>\n\n</think>\n\n' }}"


@pytest.fixture(scope="module")
def model() -> Any:
    """Only asked for the ids of its vision tokens."""
    return transformers.AutoModelForImageTextToText.from_pretrained(embedded_model_dir("qwen3.5"))


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load_processor(embedded_model_dir("qwen3.5"))


@pytest.fixture
def processor(loaded: Any) -> Iterator[Any]:
    """With a chat template that a test may replace."""
    with attribute(loaded, "chat_template", loaded.chat_template):
        yield loaded


@pytest.fixture
def judged(model: Any, processor: Any) -> Callable[..., Evidence]:
    """Judge one row, given as pieces of text of which every other one is taught, the first one not."""

    def judge(*pieces: str, **more: Any) -> Evidence:
        ids: list[int] = []
        labels: list[int] = []
        for number, piece in enumerate(pieces):
            made = processor.tokenizer(piece, add_special_tokens=False)["input_ids"]
            ids += made
            labels += made if number % 2 else [IGNORED] * len(made)
        assert ids == processor.tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]
        return label_mask(
            model, {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels]), **more}, processor
        )

    return judge


def counts(evidence: Evidence) -> tuple[Any, ...]:
    """Thoughts that are taught, left out and empty."""
    named = {figure.name: figure.value for figure in evidence.figures}
    return tuple(named[f"thoughts {kind}"] for kind in ("taught", "left out", "empty"))


HEALTHY = {
    "whole": ((ONE_ROW, f"{THOUGHT}red{END}"), (1, 0, 0)),
    "whole, of what the prompt does not give": (
        (f"{ONE_ROW}<think>\n", f"the left tile\n</think>\n\nred{END}"),
        (1, 0, 0),
    ),
    "whole, line breaks left out": (
        (f"{ONE_ROW}<think>\n", "the left tile", "\n", "</think>", "\n\n", f"red{END}"),
        (1, 0, 0),
    ),
    "left out": ((ONE_ROW + THOUGHT, f"red{END}"), (0, 1, 0)),
    "left out but for what the prompt gives": (
        (ONE_ROW, "<think>", "\nthe left tile\n</think>", f"\n\nred{END}"),
        (0, 1, 0),
    ),
    "empty": ((ONE_ROW + EMPTY, f"red{END}"), (0, 0, 1)),
    "empty and taught": ((ONE_ROW, f"{EMPTY}red{END}"), (0, 0, 1)),
    "empty, its end taught": ((f"{ONE_ROW}<think>\n\n", f"</think>\n\nred{END}"), (0, 0, 1)),
    "one line break less": ((f"{ONE_ROW}<think>\n", f"</think>\n\nred{END}"), (0, 0, 1)),
    "earlier answers as the template writes them": (
        (ONE_ROW, f"red{END}", f"\n{ONE_ROW}", f"{THOUGHT}red{END}", "\n"),
        (1, 0, 0),
    ),
    "earlier answers with their thoughts": (
        (ONE_ROW, f"{THOUGHT}red{END}", f"\n{ONE_ROW}{EMPTY}", f"red{END}"),
        (1, 0, 1),
    ),
    "an earlier answer that is left out": ((f"{ONE_ROW}red{END}\n{ONE_ROW}{EMPTY}", f"red{END}"), (0, 0, 1)),
    "an earlier answer whose row ends in the next header": ((ONE_ROW, f"red{END}", "\n<|im_start|>user\n"), (0, 0, 0)),
    "the mark as a word of the reply": ((ONE_ROW, f"{THOUGHT}as <think>{END}"), (1, 0, 0)),
    "both marks as words of the reply": ((ONE_ROW + EMPTY, f"within <think> and </think>{END}"), (0, 0, 1)),
    "the mark as a word of the thought": ((ONE_ROW, f"<think>\nno <think>\n</think>\n\nred{END}"), (1, 0, 0)),
    "a header behind the last answer": ((ONE_ROW + EMPTY, f"red{END}\n", ANSWERS), (0, 0, 1)),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_thoughts_may_be_taught_left_out_or_empty(name: str, judged: Callable[..., Evidence]) -> None:
    pieces, expected = HEALTHY[name]
    assert counts(judged(*pieces)) == expected


def test_what_is_left_out_is_noted(judged: Callable[..., Evidence]) -> None:
    (note,) = judged(*HEALTHY["left out"][0]).notes
    assert note.startswith("1 thoughts are not taught")
    (note,) = judged(*HEALTHY["earlier answers as the template writes them"][0]).notes
    assert note.startswith("1 answers that another turn follows are taught without a thought in front")
    for name in HEALTHY:
        if "as word" in name or "as a word" in name:
            (note,) = judged(*HEALTHY[name][0]).notes
            assert note == "1 answers hold <think> inside of a thought or reply, which is taken for a word of it"
    assert judged(*HEALTHY["whole"][0]).notes == ()


BROKEN = {
    "its end not taught": (
        (ONE_ROW, "<think>\nthe left tile\n", "</think>\n\n", f"red{END}"),
        "1 thoughts are taught without the </think> behind them, so the model does not learn to stop thinking: row 0 [",
    ),
    "its end taught alone": (
        (f"{ONE_ROW}<think>\nthe left tile\n", f"</think>\n\nred{END}"),
        "1 thoughts are not taught and the </think> behind them is, so the model learns to close a thought",
    ),
    "its second half": (
        (f"{ONE_ROW}<think>\nthe", f" left tile\n</think>\n\nred{END}"),
        "1 thoughts are taught in part: teach each with its </think>, or leave out both: row 0, ",
    ),
    "its first half": (
        (ONE_ROW, "<think>\nthe", " left tile\n</think>\n\n", f"red{END}"),
        "1 thoughts are taught in part",
    ),
    "missing": (
        (ONE_ROW, f"red{END}"),
        "1 answers do not begin as a generation prompt of the chat template ends ('<think>\\n\\n</think>\\n\\n' or "
        "'<think>\\n'), so they are learned in a context that generation never makes",
    ),
    "missing, in the last of two answers": (
        (f"{ONE_ROW}red{END}\n{ONE_ROW}", f"red{END}"),
        "row 0, answer 1 begins with 'red<|im_end|>' [answers without an opening 1 (== 0)]",
    ),
    "never closed": (
        (ONE_ROW, f"<think>\nthe left tile{END}"),
        "1 answers end inside of their thought, without </think>, so the model learns to end its turn there: row 0 [",
    ),
    "cut off": (
        (ONE_ROW, "<think>\nthe left"),
        "1 answers end without a supervised <|im_end|>, so the model does not learn to stop: row 0, cut off inside of its "
        "thought [",
    ),
    "behind an empty one": (
        (ONE_ROW, f"{EMPTY}the left tile\n</think>\n\nred{END}"),
        "1 answers hold <think> or </think> elsewhere than around one thought in front: did a template not find",
    ),
    "behind an empty one, opened": (
        (ONE_ROW, f"{EMPTY}{THOUGHT}red{END}"),
        "1 answers hold <think> or </think> elsewhere than around one thought in front",
    ),
    "closed twice": (
        (ONE_ROW, f"{THOUGHT}red</think>{END}"),
        "1 answers hold <think> or </think> elsewhere than around one thought in front",
    ),
    "opened twice and never closed": (
        (ONE_ROW, f"<think>\n<think>\nthe left tile{END}"),
        "1 answers end inside of their thought, without </think>",
    ),
    "opened twice": (
        (ONE_ROW, f"<think>\n<think>\nthe left tile\n</think>\n\nred{END}"),
        "1 answers hold <think> or </think>",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_thought_is_broken_in_one_way(name: str, judged: Callable[..., Evidence]) -> None:
    pieces, expected = BROKEN[name]
    with pytest.raises(CheckFailed) as caught:
        judged(*pieces)
    (problem,) = caught.value.evidence.problems
    assert expected in problem


def test_a_packed_sample_is_a_conversation(judged: Callable[..., Evidence], processor: Any) -> None:
    """Position ids say where one ends; in a row without them the first answer is one that another turn follows."""
    pieces = (ONE_ROW, f"red{END}", f"{ONE_ROW}{EMPTY}", f"red{END}")
    assert judged(*pieces).notes
    lengths = [len(processor.tokenizer("".join(two))["input_ids"]) for two in (pieces[:2], pieces[2:])]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with pytest.raises(CheckFailed, match="row 0, answer 0 begins with 'red<|im_end|>'"):
        judged(*pieces, position_ids=positions)


def release_template(name: str) -> str:
    """A template as it was released, or as trl trains with it; trl keeps them."""
    found = importlib.util.find_spec("trl")
    file = Path(str(found and found.origin)).parent / "chat_templates" / f"{name}.jinja"
    if not file.is_file():
        pytest.skip(f"this release of trl has no {file.name}")
    return file.read_text(encoding="utf-8")


QUESTION = {"role": "user", "content": "which colour?"}
PLAIN = {"role": "assistant", "content": "red"}
THOUGHTFUL = PLAIN | {"reasoning_content": "the left tile"}
IN_TEXT = {"role": "assistant", "content": "<think>\nthe left tile\n</think>\n\nred"}
STEP = [PLAIN, {"role": "tool", "content": "a tile"}]
RELEASES = ("qwen3_5_think", "qwen3_5_nothink", "qwen3", "qwen3_6", "qwen3_8")


def templates(*names: str) -> list[Any]:
    """The embedded one and that of a release run always."""
    return ["embedded", RELEASES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in names)]


def taught_whole(processor: Any, conversation: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    """A conversation as the template writes it, every answer of it taught."""
    text = processor.apply_chat_template(conversation, tokenize=False)
    ids: list[int] = []
    labels: list[int] = []
    for number, piece in enumerate(text.split(ANSWERS)):
        answer, end, behind = piece.partition(END) if number else ("", "", piece)
        said, asked = (processor.tokenizer(part)["input_ids"] for part in (answer + end, behind + ANSWERS))
        ids += said + asked
        labels += said + [IGNORED] * len(asked)
    return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}


@pytest.mark.parametrize("name", templates(*RELEASES[1:], *(f"{name}_training" for name in RELEASES)))
def test_the_rows_that_a_template_writes_are_right(name: str, model: Any, processor: Any) -> None:
    """One answer, several and steps with tools, with thoughts and without, rendered whole."""
    if name != "embedded":
        processor.chat_template = release_template(name)
    for said in ([PLAIN], [PLAIN, QUESTION, PLAIN], [*STEP, PLAIN]):
        assert counts(label_mask(model, taught_whole(processor, [QUESTION, *said]), processor))[0] == 0
    for said in ([THOUGHTFUL], [THOUGHTFUL, QUESTION, THOUGHTFUL], [*STEP, THOUGHTFUL]):
        assert counts(label_mask(model, taught_whole(processor, [QUESTION, *said]), processor))[0] >= 1


@pytest.mark.parametrize("name", templates(*RELEASES[1:]))
def test_a_thought_in_the_text_of_a_reply(name: str, model: Any, processor: Any) -> None:
    """Templates take it out and put it in front, but for Qwen3.8's, which writes an empty one and leaves it there."""
    if name != "embedded":
        processor.chat_template = release_template(name)
    batch = taught_whole(processor, [QUESTION, IN_TEXT])
    if name != "qwen3_8":
        assert counts(label_mask(model, batch, processor)) == (1, 0, 0)
        return
    with pytest.raises(CheckFailed, match="did a template not find the thought, and put an empty one in front of it"):
        label_mask(model, batch, processor)


def test_a_template_that_lets_the_model_open_its_thoughts(judged: Callable[..., Evidence], processor: Any) -> None:
    """As Qwen3's: the prompt opens nothing, or an empty thought; an answer without one is what either could get."""
    processor.chat_template = processor.chat_template.replace(OPENED, "")
    assert counts(judged(ONE_ROW, f"red{END}")) == (0, 0, 0)
    assert counts(judged(ONE_ROW, f"{THOUGHT}red{END}")) == (1, 0, 0)
    with pytest.raises(CheckFailed, match="thoughts are taught without the </think>"):
        judged(*BROKEN["its end not taught"][0])
    with pytest.raises(CheckFailed, match="elsewhere than around one thought"):
        judged(ONE_ROW, f"the left tile\n</think>\n\nred{END}")


def test_a_template_that_always_thinks(judged: Callable[..., Evidence], processor: Any) -> None:
    """As Qwen3-VL-Thinking's, which has no switch."""
    whole = processor.chat_template
    processor.chat_template = whole.replace(SWITCH, "{% if true %}")
    assert counts(judged(ONE_ROW, f"{THOUGHT}red{END}")) == (1, 0, 0)
    assert counts(judged(f"{ONE_ROW}<think>\n</think>\n\n", f"red{END}")) == (0, 0, 1)
    with pytest.raises(CheckFailed, match=r"row 0 begins with '<think>\\n\\n</think>"):
        judged(ONE_ROW + EMPTY, f"red{END}")  # two line breaks are one token, and not the prompt's
    with pytest.raises(CheckFailed, match=r"prompt of the chat template ends \('<think>\\n'\)"):
        judged(ONE_ROW, f"red{END}")


def test_samples_close_the_thought_of_a_template_that_always_opens_one(model: Any, processor: Any) -> None:
    """Their answers are replies, behind the very tokens of the generation prompt; a row that thinks is right too."""
    processor.chat_template = processor.chat_template.replace(SWITCH, "{% if true %}").replace(
        "enable_thinking", "other"
    )
    samples = scenes(0, 1, ["nth_colour", "text"])
    batch = make_batch(processor, samples, answers=True, padding_side="right")
    told = processor.tokenizer.decode(batch["input_ids"][0])
    assert told.endswith(f"assistant\n<think>\n</think>\n\n{samples[0].answer}{END}")
    assert counts(label_mask(model, batch, processor)) == (0, 0, 2)
    assert picture_pairing(model, processor, samples, batch).ok


def test_a_template_that_never_thinks(judged: Callable[..., Evidence], processor: Any) -> None:
    """It closes every thought at once, so that no reply begins with another one."""
    processor.chat_template = processor.chat_template.replace(SWITCH, "{% if false %}")
    assert counts(judged(ONE_ROW + EMPTY, f"red{END}")) == (0, 0, 1)
    with pytest.raises(CheckFailed, match="row 0 begins with '<think>"):
        judged(ONE_ROW, f"{THOUGHT}red{END}")


def test_a_template_that_keeps_every_thought(judged: Callable[..., Evidence], processor: Any) -> None:
    """As those that trl trains with (huggingface/trl#5824): earlier answers have to begin with one as well."""
    processor.chat_template = processor.chat_template.replace("{% if loop.index0 > turn.question %}", "{% if true %}")
    assert counts(judged(ONE_ROW, f"{THOUGHT}red{END}", f"\n{ONE_ROW}", f"{EMPTY}red{END}")) == (1, 0, 1)
    with pytest.raises(CheckFailed, match="row 0, answer 0 begins with 'red<|im_end|>'"):
        judged(ONE_ROW, f"red{END}", f"\n{ONE_ROW}", f"{EMPTY}red{END}")


def test_a_template_that_strips_thoughts_when_asked(judged: Callable[..., Evidence], processor: Any) -> None:
    """As Qwen3.8's ``preserve_thinking``: rows rendered without are the template's own, too."""
    processor.chat_template = processor.chat_template.replace(
        "{% if loop.index0 > turn.question %}",
        "{% if preserve_thinking is undefined or preserve_thinking or loop.index0 > turn.question %}",
    )
    stripped = judged(ONE_ROW, f"red{END}", f"\n{ONE_ROW}", f"{EMPTY}red{END}")
    assert stripped.notes[0].startswith("1 answers that another turn follows are taught without a thought in front")
    with pytest.raises(CheckFailed, match="row 0, answer 1 begins with 'red<|im_end|>'"):
        judged(ONE_ROW, f"{EMPTY}red{END}", f"\n{ONE_ROW}", f"red{END}")


def test_of_several_templates_the_default_is_asked(judged: Callable[..., Evidence], processor: Any) -> None:
    own = processor.chat_template
    processor.chat_template = {"default": own, "other": ""}
    assert counts(judged(ONE_ROW, f"{EMPTY}red{END}")) == (0, 0, 1)
    processor.chat_template = {"default": own.replace("think>", "thought>"), "other": own}
    assert judged(ONE_ROW, f"red{END}").notes == ()
    processor.chat_template = {"other": own}
    (note,) = judged(ONE_ROW, f"red{END}").notes
    assert note.startswith("thoughts are not judged: its chat template cannot be rendered (ValueError")


@pytest.mark.parametrize(
    "template",
    [
        "",
        "<|im_start|>user\n{{ messages[0].content }}<|im_end|>\n{{ '<|im_start|>assistant\n' }}",
        "<|im_start|>system\nThink between <think> and </think>.<|im_end|>\n{{ '<|im_start|>assistant\n' }}",
    ],
)
def test_another_template_has_nothing_to_judge(template: str, judged: Callable[..., Evidence], processor: Any) -> None:
    """Text of a user's own, as in rows for Qwen2.5-VL in the manner of DeepSeek-R1."""
    processor.chat_template = template or None
    for pieces in (BROKEN["its end not taught"][0], BROKEN["its second half"][0], BROKEN["missing"][0]):
        evidence = judged(*pieces)
        assert evidence.notes == ()
        assert not [figure for figure in evidence.figures if "thought" in figure.name]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('no <think>') }}", "cannot be rendered (TemplateError: no <think>)"),
        ("<|start|>assistant<think>", "it writes no '<|im_start|>assistant\\n'"),
    ],
)
def test_a_template_that_cannot_be_asked_is_noted(
    template: str, why: str, judged: Callable[..., Evidence], processor: Any
) -> None:
    processor.chat_template = template
    (note,) = judged(ONE_ROW, f"red{END}").notes
    assert note.startswith("thoughts are not judged: its chat template")
    assert why in note


def test_marks_that_are_no_tokens_are_noted(model: Any) -> None:
    """The template of a thinking family over a vocabulary without its marks."""
    processor = load_processor(embedded_model_dir("qwen2.5-vl"))
    processor.chat_template = load_processor(embedded_model_dir("qwen3.5")).chat_template
    batch = make_batch(processor, scenes(0, 1, ["text"]), answers=True)
    (note,) = label_mask(model, batch, processor).notes
    assert note.startswith("thoughts are not judged: the chat template writes <think>, which is ")


def test_a_tokenizer_is_asked_like_its_processor(model: Any, processor: Any) -> None:
    batch = make_batch(processor, scenes(0, 1, ["text"]), answers=True)
    assert counts(label_mask(model, batch, processor.tokenizer)) == (0, 0, 1)


def test_a_prompt_may_open_a_thought_or_hold_an_empty_one(model: Any, processor: Any) -> None:
    """Another prompt than these is named by where it parts from the nearest of them."""
    samples = scenes(0, 1, ["nth_colour", "text"])
    batch = make_batch(processor, samples, padding_side="right")
    images = {name: value for name, value in batch.items() if name in ("pixel_values", "image_grid_thw")}
    asked = [
        processor.tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]

    def rows(thought: str) -> Any:
        texts = [text.replace(EMPTY, thought) + "red" for text in asked]
        return images | dict(processor.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt"))

    for thought in (EMPTY, THOUGHT):
        assert picture_pairing(model, processor, samples, rows(thought)).ok
    with pytest.raises(CheckFailed, match="has 'red' at token"):
        picture_pairing(model, processor, samples, rows(""))
    processor.chat_template = processor.chat_template.replace(OPENED, NEVER_THINKS)
    with pytest.raises(CheckFailed, match="2 of 2 prompts are not those of the processor's chat template"):
        picture_pairing(model, processor, samples, rows(THOUGHT))
