"""The model between two tests: which fixtures it was made from, which view of it a test gets, and what became of it.

Imports nothing heavy; the model side is imported when the first test needs it.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

from pytest_qvl.session import fixture_graph
from pytest_qvl.session.errors import UserError
from pytest_qvl.session.fixture_graph import BASE_FIXTURE, LORA_FIXTURE, MODEL_FIXTURES, Definition, Lineage

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from contextlib import AbstractContextManager

    import pytest

    from pytest_qvl.models.owner import ModelOwner
    from pytest_qvl.session.gpu_access import GpuAccess
    from pytest_qvl.vram.meter import Meter

NAMED_CHANGES = 3


class ModelState:
    """Knows what the resident model was made from, and prepares it for each test; one per process.

    Args:
        progress: Shows a line of progress.
        meter: The one meter of this process.
        access: The way to the GPU; says whether CUDA still works.

    Attributes:
        got_unannounced: Whether the running test got a model by ``request.getfixturevalue``.
    """

    def __init__(self, progress: Callable[[str], None], meter: Meter, access: GpuAccess) -> None:
        self._progress, self._meter, self._access = progress, meter, access
        self._owner: ModelOwner | None = None
        self._made_from: dict[Definition, Lineage] = {}
        self._torn_down: list[Definition] = []
        self._watched: frozenset[str] = frozenset()
        self._changed_in_setup = False
        self.got_unannounced = False

    @property
    def owner(self) -> ModelOwner:
        """The owner of the model; made when the first test needs it."""
        if self._owner is None:
            from pytest_qvl.models.owner import ModelOwner

            self._owner = ModelOwner(self._progress, self.apart)
        return self._owner

    def apart(self, phase: str) -> AbstractContextManager[object]:
        """A phase of the meter for what many tests share: never charged to the one that comes first."""
        return self._meter.phase(phase, exclusive=True)

    def storages(self) -> frozenset[int]:
        """Addresses of the model's own storages, which are no leak of a test."""
        return frozenset() if self._owner is None else self._owner.storages()

    def free_buffers(self) -> None:
        """Give back what the owner holds between tests only to be fast."""
        if self._owner is not None:
            self._owner.free_buffers()

    # ---- what fixtures were made from --------------------------------------------------------------------

    def note(self, definition: Definition, item: Any) -> None:
        """Remember what the value depends on that a fixture of a wider scope than one test is about to make."""
        if definition.scope == "function":
            return
        names = (definition.argname, *fixture_graph.resolved_dependencies(definition, item))
        if any(map(fixture_graph.is_ours, names)):
            self._made_from[definition] = fixture_graph.lineage(definition, item)

    def note_trainer(self, definition: Definition, item: Any) -> None:
        """If a fixture of a wider scope than one test has just trained the model, the weights are its own."""
        if self._owner is not None and definition.scope != "function" and _depends_on_model(definition, item):
            self._owner.snapshot_trained(definition)

    def note_end(self, definition: Definition) -> None:
        """A fixture is torn down: what it trained is forgotten once the running test has been judged."""
        self._made_from.pop(definition, None)
        self._torn_down.append(definition)

    @property
    def noted(self) -> Collection[Definition]:
        """Fixtures whose value was made from ours, and which are not torn down."""
        return self._made_from.keys()

    def refuse_unannounced(self, request: pytest.FixtureRequest, name: str) -> None:
        """Refuse ``request.getfixturevalue`` for a model: nobody could put it into the right state before.

        Raises:
            UserError: The test does not name the fixture.
        """
        item = request._pyfuncitem
        if name not in fixture_graph.fixture_names(item):
            self.got_unannounced = True
            raise UserError(_unannounced(item))

    # ---- before a test -----------------------------------------------------------------------------------

    def prepare(self, item: pytest.Item) -> frozenset[str]:
        """Drop what was made for tests that see other overrides, and show the model that this test asks for.

        Returns:
            The fixture of the model that the test asks for, if any.

        Raises:
            UserError: The test asks for the base and the LoRA model at once.
        """
        self._watched = frozenset()
        self._changed_in_setup = self.got_unannounced = False
        wanted = fixture_graph.requested_models(item)
        if wanted == MODEL_FIXTURES:
            raise UserError(
                f"{item.nodeid} asks for {BASE_FIXTURE} and {LORA_FIXTURE}: both show one model; take "
                f"{LORA_FIXTURE} and run the base model inside `with model.disable_adapter():`"
            )
        self._finish_stale(item)
        if wanted and self._owner is not None:
            self._show(self._owner, item, *wanted)
        return wanted

    def _show(self, owner: ModelOwner, item: pytest.Item, name: str) -> None:
        """Put the resident model into the state that a test finds, or let it go where that cannot be done."""
        used = _used_by(item)
        made = any(map(fixture_graph.has_value, fixture_graph.active_definitions(item, name)))
        if not owner.usable_by(used):
            self._finish_models(item)
        elif not made:
            owner.drop_adapter()
        elif not (owner.show_base() if name == BASE_FIXTURE else owner.show_adapted(owner.latest(used))):
            self._finish_models(item)

    def begin_watch(self, item: pytest.Item) -> None:
        """After setup: from here on the test answers for what becomes of the model.

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
            UserError: It has got one.
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
        """Tear down what was made from other definitions than this test sees."""
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
        """Tear down both model fixtures, so that nothing of the resident model reaches the next test."""
        for definition in list(self._made_from):
            if definition.argname in MODEL_FIXTURES:
                fixture_graph.finish(definition, item)
        self._forget_torn_down()
        self.owner.release()

    def _forget_torn_down(self) -> None:
        if self._owner is not None:
            for definition in self._torn_down:
                self._owner.forget(definition)
        self._torn_down.clear()

    # ---- after a test ------------------------------------------------------------------------------------

    def judge(self, item: pytest.Item) -> str | None:
        """After teardown: say if the test changed the shared model, and give the next test a clean one."""
        if self._access.broken:  # nothing can be read any more, and no later test will
            self._watched = frozenset()
            return None
        base: list[str] = []
        adapter: list[str] = []
        if self._watched:
            base, adapter = self.owner.base_changes(), self.owner.adapter_changes()
        if base or (adapter and not self.owner.restore_adapter()) or self.got_unannounced:
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

    def release(self) -> None:
        """Give the model's memory back, at the end of the session."""
        if self._owner is not None:
            with suppress(RuntimeError) if self._access.broken else nullcontext():
                self._owner.release()


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
