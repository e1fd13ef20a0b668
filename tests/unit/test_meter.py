"""The meter's arithmetic, with an allocator that does what the test says; tests/gpu has the real one."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from pytest_qvl.evidence import CheckFailed, Figure
from pytest_qvl.vram.allocator import Event, TorchAllocator, blame
from pytest_qvl.vram.holders import Holder, holders_at_peak
from pytest_qvl.vram.limit import hold_limit
from pytest_qvl.vram.meter import CudaBroken, Meter
from pytest_qvl.vram.scripted import ScriptedAllocator, ScriptedProcess
from pytest_qvl.vram.usage import Usage

MiB, GiB = 1024**2, 1024**3


@pytest.fixture
def card():
    return ScriptedAllocator()


@pytest.fixture
def meter(card):
    return Meter(card, ScriptedProcess(card, 600 * MiB))


def numbers(usage):
    return tuple(None if n is None else n // MiB for n in (usage.allocated, usage.reserved, usage.process, usage.fit))


def test_the_four_numbers(card, meter):
    card.take(100 * MiB)
    with meter.phase("train") as phase:
        with card.taken(900 * MiB):
            pass
        card.take(50 * MiB)
    usage = phase.usage
    assert numbers(usage) == (1000, 1000, 1600, 1600)
    assert (usage.alive_allocated, usage.alive_reserved) == (100 * MiB, 100 * MiB)
    assert usage.measured
    assert meter.session().inner == [usage]


def test_an_inner_phase_takes_nothing_from_the_outer(card, meter):
    with meter.phase("test") as outer:
        with card.taken(700 * MiB), meter.phase("prefill") as first:
            card.free(card.take(100 * MiB))
        with meter.phase("decode") as second:
            card.free(card.take(300 * MiB))
        card.free(card.take(500 * MiB))
    assert [numbers(p.usage)[0] for p in (first, second, outer)] == [800, 300, 800]
    assert [u.name for u in outer.inner] == ["prefill", "decode"]


def test_a_peak_before_the_inner_phase_stays_with_the_outer_alone(card, meter):
    with meter.phase("outer") as outer:
        card.free(card.take(900 * MiB))
        with meter.phase("inner") as inner:
            card.free(card.take(100 * MiB))
    assert numbers(inner.usage)[:2] == (100, 100)
    assert numbers(outer.usage)[:2] == (900, 900)


def test_phases_may_end_in_any_order(card, meter):
    first = meter.begin("first")
    card.free(card.take(500 * MiB))
    second = meter.begin("second")
    card.free(card.take(200 * MiB))
    assert numbers(meter.end(first))[0] == 500
    card.free(card.take(300 * MiB))
    assert numbers(meter.end(second))[0] == 300


def test_loading_is_charged_to_itself_and_the_session_alone(card, meter):
    with meter.phase("test") as test:
        card.free(card.take(100 * MiB))
        with meter.phase("load", exclusive=True) as load:
            with meter.phase("read shards") as inside:
                card.free(card.take(900 * MiB))
            card.take(400 * MiB)
        card.free(card.take(50 * MiB))
    assert numbers(load.usage)[:2] == numbers(inside.usage)[:2] == (900, 900)
    assert numbers(test.usage)[:2] == (450, 450)
    assert test.inner == []
    assert [u.name for u in load.inner] == ["read shards"]
    assert numbers(meter.session().usage)[0] == 900


@pytest.mark.slow
def test_numbers_do_not_depend_on_what_ran_before(card, meter):
    def small():
        with meter.phase("small") as phase:
            card.free(card.take(10 * MiB))
        return numbers(phase.usage)

    def large():
        with meter.phase("large") as phase:
            card.free(card.take(900 * MiB))
        return numbers(phase.usage)

    assert [small(), large()] == [large(), small()][::-1] == [(10, 10, 610, 610), (900, 900, 1500, 1500)]


def test_an_unsettled_phase_counts_what_is_cached(card, meter):
    card.free(card.take(900 * MiB))
    with meter.phase("as it comes", settle=False) as phase:
        card.free(card.take(10 * MiB))
    assert numbers(phase.usage)[:2] == (10, 900)
    assert card.settled == 0


def test_the_session_remembers_the_peak_before_the_first_phase(card, meter):
    card.free(card.take(900 * MiB))
    with meter.phase("small") as phase:
        pass
    assert numbers(phase.usage)[0] == 0
    assert numbers(meter.session().usage)[0] == 900


def test_cuda_may_start_inside_a_phase():
    card = ScriptedAllocator(started=False)
    meter = Meter(card, ScriptedProcess(card, 600 * MiB))
    with meter.phase("first use") as phase:
        card.free(card.take(100 * MiB))
    assert numbers(phase.usage) == (100, 100, 700, 700)
    assert phase.usage.alive_allocated == 0


def test_without_cuda_a_phase_runs_and_says_why_nothing_was_measured():
    meter = Meter(ScriptedAllocator(started=False, reason="no CUDA: this torch is built without it"))
    with meter.phase("train") as phase:
        pass
    assert phase.usage == Usage("train", phase.usage.seconds, "no CUDA: this torch is built without it")
    assert phase.usage.number("fit") is None
    assert phase.usage.missing("fit") == "no CUDA: this torch is built without it"
    assert [f.name for f in phase.usage.figures()] == ["train: time"]
    with pytest.raises(ValueError, match="has no measured reserved"):
        hold_limit(phase, GiB, "reserved")


def test_here_torch_measures_nothing_and_is_not_even_imported():
    code = (
        "import sys; from pytest_qvl.vram.meter import Meter; meter = Meter();\n"
        "with meter.phase('a') as a: pass\n"
        "print(a.usage.reason, [m for m in ('torch', 'numpy', 'pynvml', 'pytest') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "torch was never imported []"


def test_why_torch_measures_nothing():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_initialized():
        pytest.skip("CUDA is in use in this process")
    expected = "CUDA was never used" if torch.version.cuda else "no CUDA: this torch is built without it"
    assert TorchAllocator().why_not() == expected
    assert TorchAllocator().read() is None


def test_without_the_driver_fit_is_unknown_and_reserved_is_not(card):
    with Meter(card).phase("train") as phase:
        card.free(card.take(100 * MiB))
    assert numbers(phase.usage) == (100, 100, None, None)
    assert phase.usage.missing("reserved") == ""
    assert "which 'fit' needs" in phase.usage.missing("fit")


def test_a_card_to_fit_brings_its_own_context(card):
    meter = Meter(card, ScriptedProcess(card, 600 * MiB), context=300 * MiB)
    with meter.phase("train") as phase:
        card.free(card.take(100 * MiB))
    assert numbers(phase.usage) == (100, 100, 700, 400)


def test_the_context_is_the_largest_seen(card):
    process = ScriptedProcess(card, 600 * MiB)
    meter = Meter(card, process)
    with meter.phase("train") as phase:
        process.context = 770 * MiB
        card.free(card.take(100 * MiB))
    assert phase.usage.context == 770 * MiB


def test_a_process_held_what_was_reserved_though_no_reading_fell_on_it(card):
    meter = Meter(card, ScriptedProcess(card, 600 * MiB), context=300 * MiB)
    with meter.phase("train") as phase:
        card.free(card.take(100 * MiB))
        card.release_cached()
    assert numbers(phase.usage) == (100, 100, 700, 400)


def test_seconds_are_the_blocks_own():
    ticks = {"now": 0.0}

    class Slow(ScriptedAllocator):
        def release_cached(self):
            ticks["now"] += 100
            super().release_cached()

        def history(self):
            ticks["now"] += 1000
            return super().history()

    card = Slow()
    meter = Meter(card, clock=lambda: ticks["now"])
    with meter.phase("outer") as outer:
        ticks["now"] += 1
        with meter.phase("inner", keep=lambda usage: True) as inner:
            ticks["now"] += 2
    assert (inner.usage.seconds, outer.usage.seconds) == (2, 3)


def test_an_exception_names_its_innermost_phase(card, meter):
    outer = meter.begin("test")

    def step():
        with meter.phase("train step"):
            card.take(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        step()
    meter.end(outer, caught.value)
    assert caught.value.qvl_phase == "train step"
    assert [(u.name, u.error, u.allocated) for u in meter.session().inner] == [
        ("train step", "ZeroDivisionError", 1),
        ("test", "ZeroDivisionError", 1),
    ]


# -- a device that no longer works ---------------------------------------------------------------------------

ASSERT = "CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA`"


def test_work_that_breaks_cuda_is_charged_to_its_phase(card, meter):
    phase = meter.begin("train")
    card.take(MiB)
    card.trouble = ASSERT
    with pytest.raises(CudaBroken, match="CUDA broke in 'train': CUDA error: device-side assert triggered"):
        meter.end(phase)
    assert phase.usage.allocated == MiB
    with meter.phase("next") as after:
        pass
    assert after.usage.reason == meter.broken == "CUDA broke in 'train': CUDA error: device-side assert triggered"


def test_a_blocks_own_exception_is_not_masked_by_the_broken_device(card, meter):
    phase = meter.begin("train")
    card.trouble = ASSERT
    assert meter.end(phase, ZeroDivisionError()).error == "ZeroDivisionError"
    assert "in 'train'" in meter.broken


def test_what_was_broken_before_a_phase_is_not_its_fault(card, meter):
    card.trouble = ASSERT
    with pytest.raises(CudaBroken, match="CUDA broke before 'train'"), meter.phase("train"):
        pytest.fail("must not run")


# -- holders and limits --------------------------------------------------------------------------------------


def event(action, address, size=0, function="f"):
    return Event(action, address, size, 0.0, f"site/model.py:7 {function}")


def test_holders_are_those_of_the_peak():
    events = [
        event("take", 1, 10, "early"),
        event("take", 2, 50, "loss"),
        event("take", 3, 20, "loss"),
        event("free", 2, 50),
        event("take", 4, 30, "late"),
    ]
    assert holders_at_peak(events, 100, "fixtures") == (
        Holder("fixtures", 100, 1),
        Holder("site/model.py:7 loss", 70, 2),
        Holder("site/model.py:7 early", 10, 1),
    )


def test_what_was_alive_before_and_is_freed_no_longer_counts():
    events = [event("free", 99, 60), event("take", 1, 80, "loss")]
    assert holders_at_peak(events, 100, "fixtures") == (
        Holder("site/model.py:7 loss", 80, 1),
        Holder("fixtures", 40, 1),
    )


def test_a_scope_that_only_frees_peaks_at_its_beginning():
    assert holders_at_peak([event("free", 99, 60)], 100, "fixtures") == (Holder("fixtures", 100, 1),)


def frame(filename, line, name):
    return {"filename": filename, "line": line, "name": name}


def test_the_line_that_asked_torch_is_blamed():
    inside = frame("/venv/torch/nn/functional.py", 1, "linear")
    outside = [frame("/home/me/torch/model.py", 7, "forward"), frame("/home/me/train.py", 9, "main")]
    assert blame([inside, *outside], "/venv/torch") == "torch/model.py:7 forward"
    assert blame([inside], "/venv/torch") == "nn/functional.py:1 linear"
    nameless = Event("take", 1, 5, 0.0, blame([], "/venv/torch"))
    assert holders_at_peak([nameless], 0, "")[0].where.startswith("code without a recorded line")


def measured(meter, card, peak, **options):
    with meter.phase("call of test_x", **options) as phase, card.taken(peak, "cross_entropy"):
        pass
    return phase


@pytest.mark.parametrize("of", ["allocated", "reserved", "process", "fit"])
@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_a_limit_is_inclusive_to_the_byte(card, meter, of, beyond):
    limit = 1000 * MiB
    context = 600 * MiB if of in ("process", "fit") else 0
    phase = measured(meter, card, limit - context + beyond)
    if beyond > 0:
        with pytest.raises(CheckFailed, match="1 B above the limit of 1000 MiB"):
            hold_limit(phase, limit, of)
    else:
        evidence = hold_limit(phase, limit, of)
        assert evidence.figures[0].holds
        assert evidence.ok


def test_an_exceeded_limit_names_phase_number_limit_and_holders(card, meter):
    card.take(2 * GiB)
    with meter.phase("call of test_x", keep=lambda usage: usage.fit > 4 * GiB) as phase:
        with meter.phase("prefill"), card.taken(GiB, "attention"):
            pass
        with meter.phase("train step"), card.taken(3 * GiB, "cross_entropy"), card.taken(GiB, "softmax"):
            pass
    with pytest.raises(CheckFailed) as caught:
        hold_limit(phase, 4 * GiB, "fit")
    text = str(caught.value).splitlines()
    assert text[0] == (
        "fit 6.59 GiB (peak reserved 6.00 GiB + context 600 MiB) is 2.59 GiB above the limit of 4.00 GiB "
        "in call of test_x [peak fit 6.586 GiB (<= 4 GiB)]"
    )
    assert text[1] == "note: 2.00 GiB were allocated before it began (fixtures and earlier code)"
    assert text[2:5] == [
        f"note: at the peak 3.00 GiB held by scripted/model.py:{3 * GiB} cross_entropy",
        "note: at the peak 2.00 GiB held by what was alive before (fixtures)",
        f"note: at the peak 1.00 GiB held by scripted/model.py:{GiB} softmax",
    ]
    assert [line.split()[0] for line in text[6:]] == ["phase", "----------", "train", "prefill", "altogether"]
    assert phase.history.snapshot == {"scripted": 6}


def test_the_history_is_kept_only_when_it_is_needed(card, meter):
    assert measured(meter, card, GiB, keep=lambda usage: False).history is None
    assert card.history() is None
    assert measured(meter, card, GiB).history is None
    assert measured(meter, card, GiB, keep=lambda usage: True).history is not None


def test_running_out_of_memory_keeps_the_history(card, meter):
    class OutOfMemoryError(RuntimeError):
        pass

    phase = meter.begin("train", keep=lambda usage: False)
    card.take(GiB, "cross_entropy")
    meter.end(phase, OutOfMemoryError())
    assert phase.holders == (Holder(f"scripted/model.py:{GiB} cross_entropy", GiB, 1),)


def test_a_nested_history_sees_its_own_part(card, meter):
    with meter.phase("outer", keep=lambda usage: True) as outer:
        with card.taken(2 * MiB, "outside"):
            pass
        with meter.phase("inner", keep=lambda usage: True) as inner, card.taken(MiB, "inside"):
            pass
    assert [h.where.split()[1] for h in inner.holders] == ["inside"]
    assert [h.where.split()[1] for h in outer.holders] == ["outside"]
    assert card.history() is None


def test_an_exceeded_limit_without_history_says_so(card, meter):
    with pytest.raises(CheckFailed, match="who held it was not recorded"):
        hold_limit(measured(meter, card, GiB), MiB, "reserved")


def test_the_source_of_a_process_reading_is_named(card):
    meter = Meter(card, ScriptedProcess(card, 600 * MiB, source="device"))
    with pytest.raises(CheckFailed, match=r"process 1.59 GiB \(gained by the whole device\)"):
        hold_limit(measured(meter, card, GiB), MiB, "process")


def test_usage_travels_as_plain_data(card, meter):
    usage = measured(meter, card, GiB).usage
    assert Usage(**usage.as_dict()) == usage
    assert dataclasses.asdict(usage) == usage.as_dict()
    assert usage.figures()[0] == Figure("call of test_x: peak allocated", 1.0, unit="GiB")
