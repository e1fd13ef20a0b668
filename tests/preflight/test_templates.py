"""Chat templates as text: what is wrong is named by its cause, and the many ways to write a right one are right."""

from __future__ import annotations

import pytest

from pytest_qvl.preflight.templates import fault_of

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n%s<|im_end|>\n{% endfor %}"
PART = "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}%s{% endfor %}{% endif %}"
IMAGES = PART.replace("%s", "{% if p.type == 'image' %}" + IMAGE + "{% else %}{{ p.text }}{% endif %}")
PLAIN = TURN.replace("%s", IMAGES)
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
MACRO = (
    "{%- macro show(parts) %}{%- for p in parts %}{{- '" + IMAGE + "' if p.type == 'image' else p.text }}"
    "{%- endfor %}{%- endmacro %}{%- for m in messages %}{{- '<|im_start|>' ~ m.role ~ '\n' ~ show(m.content) }}"
    "{{- '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
)


@pytest.mark.parametrize(
    "template",
    [
        PLAIN + PROMPT,
        MACRO,
        PLAIN + "<|im_start|>assistant\n",
        PLAIN.replace("{{ p.text }}", "{% generation %}{{ p.text | trim }}{% endgeneration %}") + PROMPT,
        PLAIN.replace("{% endfor %}{% endif %}", "{% if loop.last %}{% break %}{% endif %}{% endfor %}{% endif %}")
        + PROMPT,
        "{% set add = add_generation_prompt and not continue_final %}" + PLAIN + "{% if add %}<|im_start|>{% endif %}",
    ],
    ids=["plain", "macro", "always", "generation", "break", "renamed"],
)
def test_a_right_template_has_no_fault(template):
    assert fault_of(template) is None


@pytest.mark.parametrize(
    ("template", "name", "words"),
    [
        (PLAIN + PROMPT.replace("{% endif %}", ""), "template-syntax", "syntax error in line"),
        (PLAIN.replace("}}", "}") + PROMPT, "template-syntax", "syntax error"),
        ("{{ " + "(" * 50_000, "template-syntax", ""),
        (PLAIN, "no-generation-prompt", "does not ask for"),
        (PLAIN + "{% if add_generation_prompt %}{% endif %}", "no-generation-prompt", "writes nothing for"),
        (PLAIN.replace("<|vision_end|>", "") + PROMPT, "blind-template", "does not write <|vision_end|>"),
        (PLAIN.replace(IMAGE, "<|vision_end|><|image_pad|><|vision_start|>") + PROMPT, "template-order", "image_pad"),
        ("<|im_end|>" + PLAIN + PROMPT, "template-order", "before <|im_start|>"),
    ],
    ids=["open-block", "open-brace", "nested", "no-prompt", "silent", "blind", "markers", "turns"],
)
def test_a_wrong_template_is_named(template, name, words):
    fault = fault_of(template)
    assert fault is not None
    assert fault.name == name
    assert words in fault.words


def test_nothing_in_a_template_runs():
    assert fault_of(PLAIN + PROMPT + "{{ raise_exception('ran') }}{{ 'x' * 10**9 }}{{ cycler.__init__ }}") is None
