"""How supported releases of Transformers read ``llm_int8_skip_modules``: one row per rule. Standard library only.

The rule of the installed release is asked of Transformers itself (:func:`skipped_by`); the rows
say what another release would do with the same list. Tests hold the row of each installed release to its own function.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from pytest_qvl.releases import installed


@dataclass(frozen=True)
class Rule:
    """One way to read a skip list.

    Attributes:
        versions: The releases that have it, as a specifier.
        words: What it does with an entry.
        source: Where it is written.
        skips: Whether an entry keeps a module of that name in 16 bits.
    """

    versions: str
    words: str
    source: str
    skips: Callable[[str, str], bool]

    @property
    def title(self) -> str:
        """Which releases, in words."""
        return f"Transformers {self.versions.removeprefix('==')}"


def _as_part(entry: str, name: str) -> bool:
    return f"{entry}." in name or entry in (name, name.rpartition(".")[2])


def _from_the_start(entry: str, name: str) -> bool:
    return re.match(entry, name) is not None or name.endswith(entry)


def _up_to_a_dot(entry: str, name: str) -> bool:
    return re.match(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", name) is not None or name.endswith(entry)


_UTILS = "https://github.com/huggingface/transformers/blob/v{}/src/transformers/quantizers/quantizers_utils.py"
# Read in 4.57.6, 5.2.0, 5.5.3, 5.10.4, 5.17.0, 5.18.0, 5.20.0, 5.21.0, 5.23.0 and 5.24.0.
RULES = (
    Rule(
        ">=4.57,<5",
        "plain text: the module's own name, or a parent's name anywhere in the path",
        "https://github.com/huggingface/transformers/blob/v4.57.6/src/transformers/integrations/bitsandbytes.py",
        _as_part,
    ),
    Rule(
        ">=5,<5.21",
        "a regular expression from the start of the path, open at its end (layers.1 is layers.10 too), or its end",
        _UTILS.format("5.17.0"),
        _from_the_start,
    ),
    Rule(
        ">=5.21",
        "a regular expression from the start of the path up to a dot, or the path's end",
        _UTILS.format("5.24.0"),
        _up_to_a_dot,
    ),
)
# What Transformers keeps in 16 bits where no list is given: the output head, tied or not
# (``get_keys_to_not_convert``; the embeddings and norms that it names too are no linear layers).
DEFAULT = ("lm_head",)


def skipped_by(pattern: str, module_name: str) -> bool:
    """Whether the installed Transformers keeps a module out of the quantization because of this pattern.

    Transformers 5 matches the pattern, a regular expression, from the start of the module's full name, or
    takes it as the end of the name. Transformers 4 (``_replace_with_bnb_linear``) takes it as the module's
    own name, or as a parent's name anywhere in the full name.
    """
    try:
        from transformers.quantizers.quantizers_utils import should_convert_module
    except ImportError:
        return f"{pattern}." in module_name or pattern in (module_name, module_name.rpartition(".")[2])
    return not should_convert_module(module_name, [pattern])


def rule_of(version: str) -> Rule | None:
    """The rule of a release; ``None`` for one before 4.57, which this package does not support."""
    from packaging.specifiers import SpecifierSet

    return next((rule for rule in RULES if SpecifierSet(rule.versions).contains(version, prereleases=True)), None)


def installed_rule() -> Rule:
    """The rule of the installed Transformers, asked of Transformers itself."""
    version = installed("transformers") or ""
    known = rule_of(version)
    return Rule(f"=={version}", known.words if known else "", known.source if known else "", skipped_by)


def others() -> list[Rule]:
    """The rules of supported releases that are not the installed one's."""
    here = rule_of(installed("transformers") or "")
    return [rule for rule in RULES if rule is not here]
