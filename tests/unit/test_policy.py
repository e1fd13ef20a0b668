"""What may be trained, read from text."""

from __future__ import annotations

import pytest

from pytest_qvl.models.policy import AdapterPolicy


def test_the_text_side_is_the_default() -> None:
    assert AdapterPolicy.parse("language,lm_head,embeddings") == AdapterPolicy()
    assert AdapterPolicy().text_only


def test_parts_and_their_own_weights() -> None:
    policy = AdapterPolicy.parse(" language , vision, merger:full ,")
    assert policy == AdapterPolicy(("language", "vision", "merger"), ("merger",))
    assert str(policy) == "language, vision, merger:full"
    assert AdapterPolicy.parse(str(policy)) == policy
    assert not policy.text_only
    assert policy.unused(["language", "merger"]) == ["vision"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("language, visual", "part 'visual' is unknown; known: language, vision, merger, lm_head, embeddings, other"),
        ("merger:half", "'merger:half': a part is followed by nothing or by ':full'"),
        ("merger:", "'merger:': a part is followed by nothing or by ':full'"),
        (" , ", "an adapter policy names at least one part"),
    ],
)
def test_what_is_no_policy(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        AdapterPolicy.parse(text)
