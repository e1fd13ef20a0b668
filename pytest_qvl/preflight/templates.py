"""A chat template as text: parsed by Jinja, never rendered, so that nothing in it runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

END = "<|im_end|>"
_START = "<|im_start|>"
_VISION = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
_MARKS = re.compile(r"<\|(?:im_start|im_end|vision_start|vision_end|image_pad|video_pad)\|>")
_FLAG = "add_generation_prompt"


@dataclass(frozen=True)
class Fault:
    """What is wrong with a template.

    Attributes:
        name: Of the finding.
        words: Behind "the chat template".
        cause: Why that matters.
    """

    name: str
    words: str
    cause: str


def fault_of(template: str) -> Fault | None:
    """The first thing that is wrong with a template; ``None`` for nothing.

    Order is judged by the order in which the template writes its marks; one that puts them together from variables is
    not judged.
    """
    try:
        tree = _environment().parse(template)
    except RecursionError:
        return Fault("template-syntax", "is nested without end", "no prompt can be written with it")
    except Exception as error:  # jinja2.TemplateError, and what its lexer makes of strange numbers and texts
        line = getattr(error, "lineno", None)
        where = f" in line {line}" if line else ""
        said = str(error).partition(". ")[0].rstrip(".")
        return Fault("template-syntax", f"has a syntax error{where}: {said}", "no prompt can be written with it")
    if blind := [text for text in _VISION if text not in template]:
        text_only = "it is a text model's template: images get no place in the prompt"
        unmarked = "images are not marked as they were in the training"
        cause = text_only if "<|image_pad|>" in blind else unmarked
        return Fault("blind-template", f"does not write {' and '.join(blind)}", cause)
    if END not in template:
        cause = "replies are learned without their end, and do not stop"
        return Fault("endless-template", f"does not write {END}", cause)
    marks = list(_marks(tree))
    return _wrong_order(marks) or _without_prompt(tree, marks)


def _environment() -> jinja2.Environment:
    """As Transformers makes one, but for what runs (``chat_template_utils._compile_jinja_template``)."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        """The block ``{% generation %}``, which marks what is trained."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])


def _marks(tree: Any) -> Iterator[str]:
    """Every mark that the template writes, in its order."""
    from jinja2 import nodes

    for output in tree.find_all(nodes.Output):
        for node in output.nodes:
            written = [node] if isinstance(node, nodes.TemplateData | nodes.Const) else []
            for literal in (*written, *node.find_all((nodes.TemplateData, nodes.Const))):
                text = literal.data if isinstance(literal, nodes.TemplateData) else literal.value
                yield from _MARKS.findall(text) if isinstance(text, str) else ()


def _wrong_order(marks: list[str]) -> Fault | None:
    vision = [mark for mark in marks if "im_" not in mark]
    around = set(zip(vision, vision[1:], vision[2:], strict=False))
    for pad in ("<|image_pad|>", "<|video_pad|>"):
        if (_VISION[2], pad, _VISION[0]) in around and (_VISION[0], pad, _VISION[2]) not in around:
            return Fault(
                "template-order", f"writes {_VISION[2]} before {pad} and {_VISION[0]} behind it",
                "images are found by what stands before them, and the model has not seen prompts of that form",
            )  # fmt: skip
    turns = [mark for mark in marks if mark in (_START, END)]
    if _START in turns and turns[0] == END:
        return Fault(
            "template-order", f"writes {END} before {_START}",
            "turns end before they begin, and the model has not seen prompts of that form",
        )  # fmt: skip
    return None


def _without_prompt(tree: Any, marks: list[str]) -> Fault | None:
    """Prompts that end without the beginning of the assistant's turn: it is not asked for, or nothing is written then.

    A template that always ends with it needs no flag.
    """
    from jinja2 import nodes

    asked = any(node.name == _FLAG for node in tree.find_all(nodes.Name))
    branches = [
        node for node in tree.find_all(nodes.If) if isinstance(node.test, nodes.Name) and node.test.name == _FLAG
    ]
    silent = bool(branches) and not any(branch.find(nodes.Output) for branch in branches)
    always = next((mark for mark in reversed(marks) if mark in (_START, END)), "") == _START
    if always or (asked and not silent):
        return None
    return Fault(
        "no-generation-prompt", f"writes nothing for {_FLAG}" if silent else f"does not ask for {_FLAG}",
        "prompts end behind the question, without the mark of the assistant's turn, which the model then has to write",
    )  # fmt: skip
