"""What a session knows about its fixtures, and how errors are said once and then let go."""

from __future__ import annotations

import pytest

from pytest_qvl.session import fixture_graph
from pytest_qvl.session.device import Device
from pytest_qvl.session.errors import UserError, as_usage_error


@pytest.mark.parametrize("error", [ValueError("wrong"), FileNotFoundError("gone"), OSError("offline")])
def test_what_a_user_can_mend_is_one_line(error):
    with pytest.raises(UserError) as caught, as_usage_error("qvl_model"):
        raise error
    assert caught.value.msg == f"qvl_model: {error}"
    assert not caught.value.pytrace
    assert caught.value.__suppress_context__


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), as_usage_error("qvl_model"):
        _ = 1 / 0


def test_bfloat16_is_the_default_without_a_card():
    assert Device(None, None, None).default_dtype("cpu") == "bfloat16"


CONFTEST = """
    import pytest
    @pytest.fixture(scope="session")
    def trained(qvl_lora_model): return qvl_lora_model
    @pytest.fixture
    def measured(trained): return trained
"""


@pytest.fixture
def items(pytester):
    """Collected tests by name, below a conftest with fixtures that stand on the model."""
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(
        **{
            "a/conftest": """
    import pytest
    @pytest.fixture(scope="session")
    def qvl_lora_config(): pass
    """,
            "a/test_a": "def test_in_a(qvl_lora_model): pass\ndef test_trained_in_a(trained): pass",
            "b/test_b": """
    import pytest
    def test_plain(tmp_path): pass
    def test_base(qvl_quantized_model): pass
    def test_lora(qvl_lora_model): pass
    def test_through(measured): pass
    def test_both(measured, qvl_quantized_model): pass
    def test_config(qvl_lora_config, qvl_processor): pass
    @pytest.mark.usefixtures("qvl_quantized_model")
    def test_used(): pass

    class TestWrapped:
        @pytest.fixture
        def qvl_lora_model(self, qvl_lora_model): return qvl_lora_model
        def test_wrapped(self, qvl_lora_model): pass

    class TestOwn:
        @pytest.fixture
        def qvl_lora_model(self, qvl_quantized_model): return qvl_quantized_model
        def test_own(self, qvl_lora_model): pass

    class TestLooks:
        @pytest.fixture(scope="session")
        @staticmethod
        def qvl_lora_config(qvl_quantized_model): pass
        def test_looks(self, qvl_lora_model, qvl_lora_config): pass
    """,
        }
    )
    found, _ = pytester.inline_genitems("--qvl-device", "cpu", "-p", "no:cacheprovider")
    return {getattr(item, "originalname", item.name): item for item in found}


BASE, LORA = "qvl_quantized_model", "qvl_lora_model"


@pytest.mark.parametrize(
    ("test", "views"),
    [
        ("test_plain", set()),
        ("test_config", set()),
        ("test_base", {BASE}),
        ("test_used", {BASE}),
        ("test_lora", {LORA}),
        ("test_through", {LORA}),
        ("test_wrapped", {LORA}),
        ("test_own", {LORA}),
        ("test_looks", {LORA}),
        ("test_both", {BASE, LORA}),
    ],
)
def test_which_views_a_test_asks_for(items, test, views):
    assert fixture_graph.requested_models(items[test]) == views


def test_which_definitions_take_part(items):
    def modules(test):
        return [d.func.__module__.rpartition(".")[2] for d in fixture_graph.active_definitions(items[test], LORA)]

    assert modules("test_lora") == ["fixtures"]
    assert modules("test_wrapped") == ["test_b", "fixtures"]
    assert modules("test_own") == ["test_b"]


def test_the_same_definition_has_another_lineage_where_something_below_it_is_overridden(items):
    (lora,) = fixture_graph.active_definitions(items["test_lora"], LORA)
    assert fixture_graph.active_definitions(items["test_in_a"], LORA) == [lora]
    assert fixture_graph.lineage(lora, items["test_lora"]) == fixture_graph.lineage(lora, items["test_through"])
    assert fixture_graph.lineage(lora, items["test_lora"]) == fixture_graph.lineage(lora, items["test_plain"])
    assert fixture_graph.lineage(lora, items["test_lora"]) != fixture_graph.lineage(lora, items["test_in_a"])
    (trained,) = fixture_graph.active_definitions(items["test_through"], "trained")
    assert fixture_graph.lineage(trained, items["test_through"]) != fixture_graph.lineage(
        trained, items["test_trained_in_a"]
    )
    (base,) = fixture_graph.active_definitions(items["test_base"], BASE)
    assert fixture_graph.lineage(base, items["test_base"]) == fixture_graph.lineage(base, items["test_in_a"])
    assert LORA in fixture_graph.resolved_dependencies(trained, items["test_through"])
    assert LORA not in fixture_graph.resolved_dependencies(base, items["test_through"])
