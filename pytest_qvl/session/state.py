"""What one pytest session knows: the owner of the model, what each value was made from, what failed where.

Imports nothing heavy; the model side is imported when the first test needs it.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qvl.evidence import printable
from pytest_qvl.processes.child import NAME as CHILD
from pytest_qvl.session import fixture_graph
from pytest_qvl.session.errors import UserError
from pytest_qvl.session.fixture_graph import BASE_FIXTURE, LORA_FIXTURE, MODEL_FIXTURES, Definition, Lineage
from pytest_qvl.session.gpu_access import GpuAccess
from pytest_qvl.session.leaks import LeakWatch
from pytest_qvl.session.session_results import Verdict
from pytest_qvl.session.tracebacks import forget, forget_last, release_frames, write_down

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from pytest_qvl.models.owner import ModelOwner
    from pytest_qvl.options import Settings
    from pytest_qvl.vram.meter import Meter

REFERENCE_FIXTURE = "qvl_reference"
BF16_CAPABILITY = (8, 0)  # `is_bf16_supported()` is True on a T4, by emulation at a quarter of the speed
NAMED_CHANGES = 3
STOPPED = (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR)  # with fixtures still alive


# A model fixture, what it stands on, and with which parameters.
FailureKey = tuple[Definition, Lineage, frozenset[tuple[str, Any]]]


@dataclass
class State:
    """The session's state; one per process."""

    config: pytest.Config
    settings: Settings
    _made_from: dict[Definition, Lineage] = field(default_factory=dict)
    _first_met: dict[BaseException, str] = field(default_factory=dict)
    _failed: dict[FailureKey, str] = field(default_factory=dict)
    _torn_down: list[Definition] = field(default_factory=list)
    _watched: frozenset[str] = frozenset()
    _changed_in_setup: bool = False
    _got_unannounced: bool = False
    _device_set_up: bool = False
    _device_refused: UserError | None = None
    _undo_device: ExitStack = field(default_factory=ExitStack)
    _tearing_down: tuple[pytest.Item, list[BaseException]] | None = None
    _left: str = ""

    @cached_property
    def owner(self) -> ModelOwner:
        """The owner of the model; made when the first test needs it."""
        from pytest_qvl.models.owner import ModelOwner

        return ModelOwner(self.progress, self.apart)

    @cached_property
    def meter(self) -> Meter:
        """The one meter of this process."""
        from pytest_qvl.vram.meter import Meter

        return Meter()

    @cached_property
    def access(self) -> GpuAccess:
        """The way to the GPU."""
        return GpuAccess(self.config, self.settings, self.meter, self.announce)

    @cached_property
    def leaks(self) -> LeakWatch:
        """What tests and session leave allocated."""
        return LeakWatch(self.meter)

    def apart(self, phase: str) -> AbstractContextManager[object]:
        """A phase of the meter for what many tests share: never charged to the one that comes first."""
        return self.meter.phase(phase, apart=True)

    def facts(self) -> dict[str, Any]:
        """What summary and record say of this process, as plain data: its lease, its VRAM as a whole and by phase."""
        session = self.meter.session()
        assert session.usage is not None
        vram = {"session": session.usage.as_dict(), "phases": [usage.as_dict() for usage in session.inner]}
        return {"lease": self.access.gpu.facts(), "vram": vram}

    def progress(self, line: str) -> None:
        """Show a line of progress on a terminal, past captured output; silent under ``-q`` and in workers."""
        child = self.config.pluginmanager.get_plugin(CHILD)
        if child is not None:
            child.request("progress", line=line)
            return
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is None or self.config.get_verbosity() < 0 or not reporter.isatty:
            return
        with self._uncaptured():
            reporter.ensure_newline()
            reporter.write_line(printable(f"qvl: {line}"))

    def announce(self, line: str) -> None:
        """Show what somebody may be waiting for at once, on a terminal or not.

        A worker's terminal goes nowhere, its standard error is the controller's; that of a backend's process is silent.
        """
        child = self.config.pluginmanager.get_plugin(CHILD)
        if child is not None:
            child.request("announce", line=f"{child.backend}: {line}")
            return
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        worker = getattr(self.config, "workerinput", {}).get("workerid", "")
        with self._uncaptured():
            if reporter is None or worker:
                print(f"\nqvl: {f'{worker}: ' if worker else ''}{line}", file=sys.__stderr__, flush=True)
            else:
                reporter.ensure_newline()
                reporter.write_line(printable(f"qvl: {line}"))
                reporter.flush()

    def _uncaptured(self) -> AbstractContextManager[object]:
        capture: Any = self.config.pluginmanager.get_plugin("capturemanager")
        return nullcontext() if capture is None else capture.global_and_fixture_disabled()

    def need_cuda(self) -> None:
        """Lease a GPU and start CUDA on it; skip the test, with the reason, where there is none to be had."""
        self.access.need_cuda()
        self.set_up_device()

    def set_up_device(self) -> None:
        """Once, before the first load on CUDA: simulate ``--qvl-card``, or pin the GPU's own attention kernels.

        :meth:`close` undoes it.

        Raises:
            UserError: The card has more memory than the GPU; the same one every time.
        """
        if not self._device_set_up:
            from pytest_qvl.vram.cap import capped, pinned_attention

            card = self.settings.card
            try:
                if card is None:
                    import torch

                    self._undo_device.enter_context(pinned_attention(torch.cuda.get_device_capability()))
                else:
                    self._undo_device.enter_context(capped(card))
                    self.meter.context = card.context_bytes
            except ValueError as error:
                self._device_refused = UserError(f"{self.settings.source('card')}: {error}")
            self._device_set_up = True
        if self._device_refused is not None:
            raise self._device_refused.with_traceback(None)

    def making(self, definition: Definition) -> AbstractContextManager[object]:
        """Around the set-up of a fixture: what one of a wider scope than one test allocates is no leak of a test."""
        watched = definition.scope != "function" and "leaks" in vars(self)
        return self.leaks.making() if watched else nullcontext()

    def shared(self) -> AbstractContextManager[object]:
        """Around what the first test makes for those after it: what it allocates is no leak of that test."""
        return self.leaks.making() if "leaks" in vars(self) else nullcontext()

    def default_dtype(self, device: str) -> str:
        """bfloat16 where the hardware (or the card that it simulates) has it, else float16."""
        if device == "cuda":
            if self.settings.card is not None:
                from pytest_qvl.vram.cap import compute_dtype

                return compute_dtype(self.settings.card)
            import torch

            if torch.cuda.get_device_capability() < BF16_CAPABILITY:
                return "float16"
        return "bfloat16"

    def record_reference_first(self, request: pytest.FixtureRequest) -> None:
        """Record the reference before the 4-bit load if any collected test will ask for it.

        A reference that fails here is reported by the tests that ask for it, not by this one: pytest keeps
        the fixture's exception.
        """
        if not any(REFERENCE_FIXTURE in fixture_graph.fixture_names(item) for item in request.session.items):
            return
        try:
            request.getfixturevalue(REFERENCE_FIXTURE)
        except (Exception, pytest.skip.Exception, pytest.fail.Exception) as error:
            if isinstance(error, Exception):  # those of pytest are one line
                write_down(error)
            self._let_go_of([error])  # its frames hold the full-precision model
            self._first_met[error] = ""  # not by the test that runs now, which does not ask for it

    # ---- what fixtures were made from, and what became of them -------------------------------------------

    def note(self, definition: Definition, item: Any) -> None:
        """Remember what the value stands on that a fixture of a wider scope than one test is about to make."""
        if definition.scope == "function":
            return
        names = (definition.argname, *fixture_graph.resolved_dependencies(definition, item))
        if any(map(fixture_graph.is_ours, names)):
            self._made_from[definition] = fixture_graph.lineage(definition, item)

    def note_trainer(self, definition: Definition, item: Any) -> None:
        """If a fixture of a wider scope than one test has just trained the model, the weights are its own."""
        if "owner" in vars(self) and definition.scope != "function" and _depends_on_model(definition, item):
            self.owner.snapshot_trained(definition)

    def note_failure(self, definition: Definition, error: BaseException, item: pytest.Item) -> None:
        """Remember which test met a fixture's error first; pytest raises it again for every other test."""
        if definition in self._made_from:
            self._first_met.setdefault(error, item.nodeid)
            if definition.argname in MODEL_FIXTURES and not self._got_unannounced:
                self._failed.setdefault(_failure_key(definition, item), self._first_met[error])

    def known_failure(self, definition: Definition, item: Any) -> UserError | None:
        """For a model that could not be made before from the same fixtures: one line that points to the first test.

        pytest forgets an error with the fixtures below it, and the base may have to be loaded again meanwhile.
        """
        if definition.argname not in MODEL_FIXTURES or not self._failed:
            return None
        first = self._failed.get(_failure_key(definition, item), item.nodeid)
        return None if first == item.nodeid else UserError(f"not run: see the error of {first}")

    def pointer(self, error: BaseException, item: pytest.Item) -> UserError | None:
        """For every test but the one that met an error first: one line that points to it."""
        first = self._first_met.get(error, item.nodeid)
        if not first:
            self._first_met[error] = first = item.nodeid
        return None if first == item.nodeid else UserError(f"not run: see the error of {first}")

    def note_end(self, definition: Definition) -> None:
        """A fixture is torn down: what it trained is forgotten once the running test has been judged."""
        if definition.scope != "function":
            self._judge_memory()
        self._made_from.pop(definition, None)
        self._torn_down.append(definition)

    def refuse_unannounced(self, request: pytest.FixtureRequest, name: str) -> None:
        """Refuse ``request.getfixturevalue`` for a model: nobody could put it into the right state before."""
        item = request._pyfuncitem
        if name not in fixture_graph.fixture_names(item):
            self._got_unannounced = True
            raise UserError(_unannounced(item))

    # ---- before a test -----------------------------------------------------------------------------------

    def prepare(self, item: pytest.Item) -> None:
        """Drop what was made for tests that see other overrides, and show the model that this test asks for.

        Raises:
            UserError: The test asks for the base and the LoRA model at once.
        """
        self._watched = frozenset()
        self._changed_in_setup = self._got_unannounced = False
        wanted = fixture_graph.requested_models(item)
        if wanted == MODEL_FIXTURES:
            raise UserError(
                f"{item.nodeid} asks for {BASE_FIXTURE} and {LORA_FIXTURE}: both show one model; take "
                f"{LORA_FIXTURE} and run the base model inside `with model.disable_adapter():`"
            )
        self._finish_stale(item)
        if wanted:
            self._show(item, wanted)
            self.leaks.begin()

    def _show(self, item: pytest.Item, wanted: frozenset[str]) -> None:
        if "owner" not in vars(self):
            return
        (name,) = wanted
        used = _used_by(item)
        made = any(map(fixture_graph.has_value, fixture_graph.active_definitions(item, name)))
        if not self.owner.usable_by(used):
            self._finish_models(item)
        elif not made:
            self.owner.drop_adapter()
        elif not (self.owner.show_base() if name == BASE_FIXTURE else self.owner.show_adapted(self.owner.latest(used))):
            self._finish_models(item)

    def begin_watch(self, item: pytest.Item) -> None:
        """After set-up: from here on the test answers for what becomes of the model.

        Raises:
            UserError: A fixture of the test got a model by ``request.getfixturevalue``.
        """
        self.check_announced(item)
        for name in fixture_graph.requested_models(item):
            maker = fixture_graph.active_definitions(item, name)[0]
            if maker.cached_result is None or not self.owner.track_external(maker.cached_result[0], maker):
                continue
            self._watched = frozenset({name})
            # What a function fixture does to the model ends with this test, and is not the test's doing.
            own = [d for d in _used_by(item) if d.scope == "function" and _depends_on_model(d, item)]
            self._changed_in_setup = bool(own and (self.owner.adapter_changes() or self.owner.base_changes()))

    def check_announced(self, item: pytest.Item) -> None:
        """Refuse a test that got a model by ``request.getfixturevalue``: it may be in another test's state.

        Raises:
            UserError: It has.
        """
        if fixture_graph.requested_dynamically(item):
            raise UserError(_unannounced(item))

    @contextmanager
    def kept_as_found(self) -> Iterator[None]:
        """Put modes, hooks, ``requires_grad``, active adapters and random state back after a test's body."""
        if not self._watched:
            yield
            return
        from pytest_qvl.models.state import preserved

        with preserved(self.owner.resident):
            yield

    def _finish_stale(self, item: Any) -> None:
        names = fixture_graph.fixture_names(item)
        for definition, made_from in list(self._made_from.items()):
            name = definition.argname
            if name not in names:
                continue
            visible = definition in fixture_graph.definitions(item, name)
            # One model at a time: a definition that takes no part here would hold a second one in memory.
            beside = name in MODEL_FIXTURES and definition not in fixture_graph.active_definitions(item, name)
            if beside or (visible and fixture_graph.lineage(definition, item) != made_from):
                fixture_graph.finish(definition, item)
        self._forget_torn_down()

    def _finish_models(self, item: Any) -> None:
        """Nothing of the model that is resident may reach the next test."""
        for definition in list(self._made_from):
            if definition.argname in MODEL_FIXTURES:
                fixture_graph.finish(definition, item)
        self._forget_torn_down()
        self.owner.release()

    def _forget_torn_down(self) -> None:
        if "owner" in vars(self):
            for definition in self._torn_down:
                self.owner.forget(definition)
        self._torn_down.clear()

    # ---- after a test ------------------------------------------------------------------------------------

    def judge(self, item: pytest.Item) -> str | None:
        """After tear-down: say if the test changed the shared model, and give the next test a clean one."""
        if self.access.broken:  # nothing can be read any more, and no later test will
            self._watched = frozenset()
            return None
        base: list[str] = []
        adapter: list[str] = []
        if self._watched:
            base, adapter = self.owner.base_changes(), self.owner.adapter_changes()
        if base or (adapter and not self.owner.restore_adapter()) or self._got_unannounced:
            self._finish_models(item)
        self._forget_torn_down()
        self._watched = frozenset()
        changed = [*base, *adapter]
        if not changed or self._changed_in_setup:
            return None
        more = f" and {len(changed) - NAMED_CHANGES} more tensors" if len(changed) > NAMED_CHANGES else ""
        return (
            f"{item.nodeid} changed the shared model and did not put it back: "
            f"{', '.join(changed[:NAMED_CHANGES])}{more}. Train in a fixture of module or class scope that "
            f"takes {LORA_FIXTURE}, or restore what the test changes"
        )

    def begin_teardown(self, item: pytest.Item, errors: list[BaseException]) -> None:
        """The test's own fixtures are torn down next, then perhaps wider ones.

        Args:
            item: The test.
            errors: What it raised so far; their frames are let go if memory is missing.
        """
        self._left = ""
        self._tearing_down = (item, errors) if fixture_graph.requested_models(item) else None

    def judge_memory(self) -> str | None:
        """After tear-down: say if a test that uses the model left memory allocated."""
        self._judge_memory()
        return self._left or None

    def _judge_memory(self) -> None:
        # Once per test: before the first wider fixture goes, whose memory would make up for what the test left.
        if self._tearing_down is None or self.access.broken:
            return
        (item, errors), self._tearing_down = self._tearing_down, None

        def let_go() -> None:
            self._let_go_of(errors)
            forget_last()
            if hasattr(item, "funcargs"):
                item.funcargs.clear()  # pytest does it a moment later
            if "owner" in vars(self):
                self.owner.free_buffers()

        left = self.leaks.left_by_test(let_go, lambda: self.owner.storages() if "owner" in vars(self) else frozenset())
        if left:
            failed = item.nodeid in self._first_met.values()
            after = "a load that failed half-way" if failed else "the test and its tear-down"
            amount, *holders = left.splitlines()
            self._left = "\n".join([f"{item.nodeid} leaks: {amount}, after {after}", *holders])

    def _let_go_of(self, errors: list[BaseException]) -> None:
        for error in errors:
            release_frames(error)
            forget(error)
        for definition in self._made_from:
            fixture_graph.forget_traceback(definition)

    def judge_session(self, session: pytest.Session) -> list[Verdict]:
        """After all fixtures are torn down: is all memory of models free again?"""
        if "leaks" not in vars(self) or session.exitstatus in STOPPED:
            return []
        self._release_model()
        left = self.leaks.left_by_session(forget_last) if self.meter.alive() else ""
        if self.access.broken:
            return [Verdict("leak", "not judged", f"CUDA was broken by {self.access.breaker}: {self.access.broken}")]
        if not self.meter.alive():
            return []
        if left:
            return [Verdict("leak", "BROKEN", left)]
        return [Verdict("leak", "kept", "all memory of models is free again")]

    def close(self) -> None:
        """Give the model's memory back, the device as it was, and then the GPU."""
        self._release_model()
        with suppress(RuntimeError) if self.access.broken else nullcontext():
            self._undo_device.close()
        self.access.gpu.release()

    def _release_model(self) -> None:
        self._first_met.clear()
        if "owner" in vars(self):
            with suppress(RuntimeError) if self.access.broken else nullcontext():
                self.owner.release()


def _failure_key(definition: Definition, item: Any) -> FailureKey:
    return definition, fixture_graph.lineage(definition, item), fixture_graph.parameters(definition, item)


def _used_by(item: Any) -> frozenset[Definition]:
    return frozenset(d for name in fixture_graph.fixture_names(item) for d in fixture_graph.definitions(item, name))


def _depends_on_model(definition: Definition, item: Any) -> bool:
    return bool(MODEL_FIXTURES & fixture_graph.resolved_dependencies(definition, item))


def _unannounced(item: pytest.Item) -> str:
    return (
        f"{item.nodeid} gets a model by request.getfixturevalue, which nobody knows before the test runs, so the model "
        f"may be in the state of another test. Name the fixture as an argument, or with "
        f"@pytest.mark.usefixtures({LORA_FIXTURE!r})"
    )


STATE_KEY = pytest.StashKey[State]()
