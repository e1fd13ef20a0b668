"""What a failure keeps alive, and that it is let go."""

from __future__ import annotations

import gc
import sys
import weakref

import pytest

from pytest_qvl.session.tracebacks import LAST, forget, forget_last, release_frames, write_down


class Big:
    """Stands for a model that a frame holds."""


def fails_holding(big):
    held = big
    raise ValueError(type(held).__name__)


@pytest.mark.parametrize("locals_shown", [False, True])
def test_frames_of_an_error_are_let_go(locals_shown):
    big = Big()
    gone = weakref.ref(big)
    try:
        fails_holding(big)
    except ValueError as error:
        caught = error
    del big
    if locals_shown:  # what pytest does to print the arguments of a failed test
        frame = caught.__traceback__.tb_next.tb_frame
        assert "held" in frame.f_locals
        del frame
    gc.collect()
    assert gone() is not None
    release_frames(caught)
    gc.collect()
    assert gone() is None
    assert str(caught) == "Big"


def test_frames_are_let_go_through_causes_contexts_and_groups():
    big = Big()
    gone = weakref.ref(big)
    try:
        try:
            try:
                fails_holding(big)
            except ValueError as error:
                raise RuntimeError("in between") from error
        except RuntimeError:
            raise KeyError("at last")  # noqa: B904 - its context is what is tested
    except KeyError as error:
        caught = error
    caught.__context__.__context__ = caught  # a cycle must not hang
    del big
    release_frames(BaseExceptionGroup("all", [caught]))
    gc.collect()
    assert gone() is None
    release_frames(None)


def fails_in_a_closure(big):
    def inner():
        assert big is None

    inner()


@pytest.fixture
def last():
    before = {name: vars(sys).pop(name) for name in LAST if name in vars(sys)}
    yield
    for name in LAST:
        vars(sys).pop(name, None)
    vars(sys).update(before)


def test_what_a_closure_has_caught_goes_with_the_traceback(last):
    big = Big()
    gone = weakref.ref(big)
    try:
        fails_in_a_closure(big)
    except AssertionError as error:  # as pytest's runner does after a failed call
        sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__.tb_next
    del big
    release_frames(sys.last_value)
    gc.collect()
    assert gone() is not None
    forget_last()
    assert not hasattr(sys, "last_value")
    gc.collect()
    assert gone() is None


class Odd(Exception):
    """Refuses what is assigned to it, and has a field that is named like a group's."""

    exceptions = (("a", 1), ("b", 2))

    def __setattr__(self, name, value):
        raise AttributeError(name)


def test_an_odd_exception_is_let_go_too():
    try:
        raise Odd("odd")
    except Odd as error:
        caught = error
    release_frames(caught)
    forget(caught)
    assert caught.__traceback__ is None


def test_a_traceback_is_written_down_from_below_pytests_own_frames():
    try:
        pytest.raises(5)  # fails inside of pytest
    except TypeError as error:
        inside = error
    try:
        fails_in_a_closure(Big())
    except AssertionError as error:
        below = error
    for error in (inside, below):
        write_down(error)
    assert inside.__notes__ == [""]
    assert "assert big is None" in below.__notes__[0]
    assert below.__notes__[0].count("File ") == 3


def test_nothing_kept_is_nothing_to_forget(last):
    forget_last()
    forget_last()
