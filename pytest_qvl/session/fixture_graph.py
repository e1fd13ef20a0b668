"""What a fixture's value was made from, read from pytest's fixture definitions.

pytest caches the value of a session fixture once, whatever was overridden underneath it: a test in another
folder, which sees other overrides, silently gets the value made for the first. This module finds out when that would
happen. How pytest keeps its fixtures (managers, overrides, finalizers, cached tracebacks) is known here; other modules
read no more of it than a definition's function and value, and a request's test.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl.session.keys import FIXTURE_NAMES_KEY

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

BASE_FIXTURE = "qvl_quantized_model"
LORA_FIXTURE = "qvl_lora_model"
MODEL_FIXTURES = frozenset({BASE_FIXTURE, LORA_FIXTURE})

Definition = Any  # `pytest.FixtureDef`; its attributes used here are not all public
Lineage = frozenset[tuple[str, tuple[Definition, ...]]]


def fixture_names(item: Any) -> frozenset[str]:
    """Every fixture that a test uses, directly or through others, as known before it runs.

    pytest's own list is short of what an overridden fixture stands on in some releases (9.0, once a test is
    parametrised).
    """
    info = getattr(item, "_fixtureinfo", None)
    if info is None:
        return frozenset()
    if FIXTURE_NAMES_KEY not in item.stash:
        item.stash[FIXTURE_NAMES_KEY] = frozenset({*item.fixturenames, *_walk(info.initialnames, item)})
    names: frozenset[str] = item.stash[FIXTURE_NAMES_KEY]
    return names


def definitions(item: Any, name: str) -> Sequence[Definition]:
    """The definitions of a fixture that a test sees, the most specific last."""
    info = getattr(item, "_fixtureinfo", None)
    if info is None:
        return ()
    found = info.name2fixturedefs.get(name)
    if found is None:  # not among the names known before the test runs
        found = item.session._fixturemanager.getfixturedefs(name, item)
    return found or ()


def active_definitions(item: Any, name: str) -> list[Definition]:
    """The definitions that take part for a test: the most specific, and what it builds on."""
    taking_part = []
    for definition in reversed(definitions(item, name)):
        taking_part.append(definition)
        if name not in resolved_dependencies(definition, item):
            break
    return taking_part


def resolved_dependencies(definition: Definition, item: Any) -> frozenset[str]:
    """Names of all fixtures that a definition is made from; its own too if it builds on what it overrides."""
    return frozenset(_walk(definition.argnames, item))


def lineage(definition: Definition, item: Any) -> Lineage:
    """Every fixture that a definition is made from, with the definitions of it that a test sees."""
    return frozenset((name, tuple(definitions(item, name))) for name in resolved_dependencies(definition, item))


def parameters(definition: Definition, item: Any) -> frozenset[tuple[str, Any]]:
    """Values of the parameters, of all that a definition is made from, that a test is run with; an unhashable's id."""
    callspec = getattr(item, "callspec", None)
    if callspec is None:
        return frozenset()
    names = {definition.argname, *resolved_dependencies(definition, item)}

    def key(value: Any) -> Any:
        try:
            hash(value)
        except TypeError:
            return id(value)
        return value

    return frozenset((name, key(value)) for name, value in callspec.params.items() if name in names)


def fixture_parameters(item: Any) -> dict[str, str]:
    """Id of each parameter that comes from a fixture and not from a mark on the test, by the fixture's name."""
    callspec = getattr(item, "callspec", None)
    if callspec is None:
        return {}
    names = list(callspec.params)
    # One id for each call of `parametrize`: as many as names where no call had several, and none was hidden.
    ids = list(callspec._idlist) if len(callspec._idlist) == len(names) else []
    ids = ids or [f"{name}{callspec.indices[name]}" for name in names]
    marks = [mark.args[0] if mark.args else mark.kwargs["argnames"] for mark in item.iter_markers("parametrize")]
    own = {name.strip() for mark in marks for name in (mark.split(",") if isinstance(mark, str) else mark)}
    return {name: shown for name, shown in zip(names, ids, strict=True) if name not in own}


def requests_below(item: Any) -> Iterator[tuple[Definition, Definition]]:
    """Every definition that takes part for a test, with each definition that it asks for."""
    for name in fixture_names(item):
        taking_part = active_definitions(item, name)
        for place, definition in enumerate(taking_part):
            for asked in definition.argnames:
                found = taking_part[place + 1 :][:1] if asked == name else definitions(item, asked)[-1:]
                yield from ((definition, one) for one in found)


def requested_models(item: Any) -> frozenset[str]:
    """Which of the two model fixtures a test asks for, directly or through fixtures of its own.

    What this package's fixtures are made from does not count: the LoRA model stands on the base model, and a
    LoRA configuration may be made by looking at it.
    """
    if not MODEL_FIXTURES & fixture_names(item):
        return frozenset()
    return MODEL_FIXTURES & set(_walk(item._fixtureinfo.initialnames, item, through_ours=False))


def requested_dynamically(item: Any) -> frozenset[str]:
    """Model fixtures that a test got by ``request.getfixturevalue``, which nothing announced beforehand."""
    request = getattr(item, "_request", None)
    got = set(getattr(request, "_fixture_defs", ()))
    return frozenset((MODEL_FIXTURES & got) - fixture_names(item))


def finish(definition: Definition, item: Any) -> None:
    """Tear a fixture down, with everything made from it; the next test that asks for it makes it anew."""
    definition.finish(request=item._request)


def has_value(definition: Definition) -> bool:
    """Whether a fixture is set up, and not only has failed to be."""
    return definition.cached_result is not None and definition.cached_result[2] is None


def forget_traceback(definition: Definition) -> None:
    """Let go of the frames of a fixture's error, which pytest keeps to raise it again for other tests."""
    value, key, failed = definition.cached_result or (None, None, None)
    if failed is not None:
        definition.cached_result = (value, key, (failed[0], None))


def keep_error(definition: Definition, error: BaseException) -> None:
    """Let pytest raise an error for every later test that asks for a fixture which has just been made."""
    _, key, _ = definition.cached_result
    definition.cached_result = (None, key, (error, None))


def keep_value(definition: Definition, value: Any) -> None:
    """Let pytest give another value to every later test that asks for a fixture which has just been made."""
    _, key, _ = definition.cached_result
    definition.cached_result = (value, key, None)


def defined_at(definition: Definition) -> tuple[Path, int] | None:
    """File and line of a fixture's function; None where pytest made it from the parameters of a test."""
    function = inspect.unwrap(definition.func)
    function = getattr(function, "func", function)  # of a functools.partial
    if function.__module__.startswith("_pytest."):
        return None
    return Path(function.__code__.co_filename), function.__code__.co_firstlineno


def fixtures_of(module: Any) -> frozenset[str]:
    """Names of the fixtures that a module defines, collected or not."""
    found = set()
    for name, value in list(getattr(module, "__dict__", {}).items()):
        marker = getattr(value, "_fixture_function_marker", None) if callable(value) else None
        if marker is not None:
            found.add(marker.name or name)
    return frozenset(found)


def is_ours(name: str) -> bool:
    """Whether a fixture is one of this package's, or overrides one."""
    return name.startswith(("qvl_", "_qvl_"))


def _walk(names: Iterable[str], item: Any, *, through_ours: bool = True) -> Iterator[str]:
    found: set[str] = set()
    todo = [name for name in names if name != "request"]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        yield name
        if through_ours or not is_ours(name):
            todo += [n for definition in definitions(item, name) for n in definition.argnames if n != "request"]
