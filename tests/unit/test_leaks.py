"""What counts as a leak, by a scripted allocator; and who keeps a tensor alive, by real tensors."""

from __future__ import annotations

import sys
from contextlib import suppress
from types import ModuleType, SimpleNamespace

import pytest

from pytest_qvl.session.leaks import TOLERANCE, LeakWatch
from pytest_qvl.vram.meter import Meter
from pytest_qvl.vram.scripted import ScriptedAllocator, ScriptedProcess
from pytest_qvl.vram.survivors import tensors_alive

MiB = 1024**2


@pytest.fixture
def card():
    return ScriptedAllocator()


@pytest.fixture
def watch(card):
    return LeakWatch(Meter(card, ScriptedProcess(card, 600 * MiB)))


def nothing():
    return None


def left(watch, let_go=nothing, own=frozenset()):
    return watch.left_by_test(let_go, lambda: own)


def test_what_a_test_leaves_is_named_with_its_holder(card, watch):
    watch.begin()
    card.take(300 * MiB, "attend")
    card.take(20 * MiB, "cache")
    assert left(watch).splitlines() == [
        "320 MiB of GPU memory stayed allocated (the driver counts 920 MiB for this process)",
        "  300 MiB held by attend",
        "  20 MiB held by cache",
    ]


@pytest.mark.parametrize(("size", "leaks"), [(TOLERANCE, False), (TOLERANCE + 1, True)])
def test_the_tolerance(card, watch, size, leaks):
    watch.begin()
    card.take(size)
    assert bool(left(watch)) is leaks


def test_what_is_let_go_is_no_leak(card, watch):
    watch.begin()
    address = card.take(300 * MiB)
    assert left(watch, let_go=lambda: card.free(address)) == ""
    assert card.settled == 1  # before the first model


def test_what_libraries_keep_for_their_next_call_is_no_leak_and_hides_none(card, watch):
    card.workspaces.append(card.take(32 * MiB))
    watch.begin()
    card.workspaces.append(card.take(32 * MiB))
    assert left(watch) == ""
    card.take(20 * MiB, "hidden")
    assert "20 MiB held by hidden" in left(watch)
    assert watch.left_by_session(nothing).startswith("20 MiB")


def test_no_suspicion_no_work(card, watch):
    watch.begin()
    before = card.settled
    assert left(watch) == ""
    assert card.settled == before


def test_fixtures_of_a_wider_scope_are_no_leak_unless_they_fail(card, watch):
    watch.begin()
    with watch.making():
        card.take(300 * MiB, "outer")
        with watch.making():
            card.take(200 * MiB, "inner")
    assert left(watch) == ""
    watch.begin()
    with suppress(ValueError), watch.making():
        card.take(100 * MiB, "half")
        raise ValueError
    assert left(watch).startswith("100 MiB of GPU memory stayed allocated")


def test_a_model_that_replaces_a_bigger_one_hides_nothing(card, watch):
    old = card.take(900 * MiB)
    watch.begin()
    with watch.making():
        card.free(old)
        card.take(400 * MiB)
    card.take(50 * MiB)
    assert left(watch).startswith("50 MiB")


def test_own_storages_are_not_named(card, watch):
    watch.begin()
    mine = card.take(300 * MiB, "mine")
    assert "mine" not in left(watch, own=frozenset({mine}))
    assert "no tensor that Python knows holds it" in left(watch, own=frozenset({mine}))


@pytest.mark.slow
def test_the_session_is_compared_with_what_was_before_the_first_model(card, watch):
    card.take(70 * MiB, "somebody else's")
    watch.begin()
    model = card.take(400 * MiB)
    watch.begin()
    card.free(model)
    assert watch.left_by_session(nothing) == ""
    kept = card.take(5 * MiB)
    assert watch.left_by_session(nothing).startswith("5 MiB")
    assert watch.left_by_session(lambda: card.free(kept)) == ""


def test_without_cuda_nothing_leaks(card):
    watch = LeakWatch(Meter(ScriptedAllocator(started=False)))
    watch.begin()
    with watch.making():
        pass
    assert left(watch) == ""
    assert watch.left_by_session(nothing) == ""


def test_a_broken_device_is_no_leak(card, watch):
    watch.begin()
    card.take(300 * MiB)
    card.trouble = "CUDA error: an illegal memory access was encountered"
    assert left(watch) == ""


@pytest.mark.slow
def test_survivors_are_named_by_what_keeps_them(monkeypatch):
    torch = pytest.importorskip("torch")
    module = ModuleType("keeps_it")  # made now: the garbage collector does not show what was there when tests began
    module.KEPT = kept = {}
    monkeypatch.setitem(sys.modules, module.__name__, module)
    sizes = {"attribute": 101, "listed": 102, "local": 103, "global": 104}
    makes = {name: torch.empty(size * MiB, dtype=torch.uint8, device="cpu") for name, size in sizes.items()}
    keeper = SimpleNamespace(field=makes.pop("attribute"))
    kept["deep"] = [makes.pop("listed")]
    kept["flat"] = makes.pop("global")
    view = kept["flat"][5:]
    local = makes.pop("local")
    try:
        told = {holder.size // MiB: holder.where for holder in tensors_alive(torch, "cpu")}
        assert told[101] == f"a tensor {101 * MiB} of uint8, kept by SimpleNamespace.field"
        assert told[102].endswith("kept by a list in a dict in keeps_it.KEPT")
        assert told[103].startswith(f"a tensor {103 * MiB} of uint8")
        assert told[104].endswith("kept by a dict in keeps_it.KEPT")
        besides = frozenset({local.untyped_storage().data_ptr()})
        assert all(holder.size != 103 * MiB for holder in tensors_alive(torch, "cpu", besides))
        assert not tensors_alive(torch, "meta")
        assert keeper.field is not view
    finally:
        kept.clear()


def test_a_tensor_that_was_only_traced_holds_nothing():
    torch = pytest.importorskip("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode  # torch.compile traces with these

    with FakeTensorMode():
        tensor = torch.empty(2**40, dtype=torch.uint8, device="cpu")
    assert tensor.device.type == "cpu"
    assert all(holder.size < 2**40 for holder in tensors_alive(torch, "cpu"))
