"""Overrides that give what a fixture cannot be: one sentence, whatever the fixture; and those that give what it can."""

from __future__ import annotations

import pytest

from pytest_qvl import fixtures
from pytest_qvl.session import fixture_graph
from pytest_qvl.session.fixture_values import EXPECTED

# Judged by whoever loads, attaches or looks at them.
JUDGED_ELSEWHERE = {
    "qvl_model",
    "qvl_backend",
    "qvl_quantization_config",
    "qvl_lora_config",
    "qvl_adapter",
    "qvl_quantized_model",
    "qvl_lora_model",
}
SHORT = 15  # lines between the headings of two failures
OVERRIDE = """
import pytest
@pytest.fixture(scope="session")
def {name}(): {code}
"""
ASKS = """
def test_one({name}): pass
def test_two({name}): pass
"""
WRONG = [
    ("qvl_processor", "return None", "None; it has to give a processor with tokenizer"),
    ("qvl_processor", "return {}", "a value of type dict, without tokenizer, image_processor, apply_chat_template; "),
    ("qvl_processor", "import types; return types.SimpleNamespace", "the class SimpleNamespace; "),
    ("qvl_image_samples", "return None", "None; it has to give a list of pytest_qvl.samples.Sample"),
    ("qvl_image_samples", "return {'a': 1}", "a value of type dict; "),
    ("qvl_image_samples", "return []", "an empty list; "),
    ("qvl_image_samples", "return [{'question': 'what?'}]", "a list with a value of type dict at index 0; "),
    ("qvl_batch", "return None", "None; it has to give a function: qvl_batch(samples"),
    ("qvl_batch", "return {'input_ids': 1}", "a value of type dict; "),
    ("qvl_dataset", "return []", "an empty list; it has to give rows of your data with len() and indices"),
    ("qvl_collator", "return {}", "a value of type dict; it has to give a function from a list of rows of qvl_dataset"),
    ("qvl_training_batch", "return []", "a value of type list; it has to give a function: qvl_training_batch(samples)"),
    ("qvl_probe_sizes", "return None", "None; it has to give a pytest_qvl.samples.ProbeSizes"),
    ("qvl_probe_sizes", "return 448", "a value of type int; "),
    ("qvl_adapter_policy", "return {'adapted': ['vision']}", "a value of type dict; "),
    ("qvl_adapter_policy", "return None", "None; it has to give a pytest_qvl.checks.AdapterPolicy, or its text"),
    ("qvl_adapter_policy", "return 'eyes'", "'eyes' (part 'eyes' is unknown; known: "),
    ("qvl_quantized_layers", "return ['in_proj_a']", "a value of type list; "),
    ("qvl_quantized_layers", "return None", "None; it has to give a pytest_qvl.checks.QuantizedLayers, or its text"),
    ("qvl_quantized_layers", "return '.*in_proj_a'", "'.*in_proj_a' ('.*in_proj_a' is neither a part "),
    ("qvl_make_optimizer", "return 'adamw'", "a value of type str; it has to give a function from the list of"),
    ("qvl_optimizer", "return lambda parameters: None", "a value of type function, without param_groups, step; "),
    ("qvl_trainer", "return 'sft'", "a value of type str, without args, get_batch_samples, training_step; "),
    ("qvl_compute_dtype", "return 'fp16'", "'fp16'; it has to give the name of a dtype, one of bfloat16"),
    ("qvl_compute_dtype", "return 16", "a value of type int; "),
    ("qvl_target", "return None", "None; "),
    ("qvl_reference", "return {}", "a value of type dict; it has to give a pytest_qvl.checks.Reference"),
    ("qvl_vram", "return None", "None; "),
    ("qvl_card", "return 't1000000'", "'t1000000' ("),
    ("qvl_card", "return 16", "a value of type int; "),
    ("qvl_vram_limit", "return 'much'", "'much' ("),
    ("qvl_vram_limit", "return 1.5", "a value of type float; it has to give a number of bytes"),
]


def test_every_public_fixture_is_judged():
    public = {name for name in fixture_graph.fixtures_of(fixtures) if name.startswith("qvl_")}
    assert public == EXPECTED.keys() | JUDGED_ELSEWHERE
    assert {name for name, _, _ in WRONG} == EXPECTED.keys()


@pytest.mark.parametrize(("name", "code", "says"), WRONG, ids=lambda value: value[:30])
def test_a_wrong_override_is_one_sentence(pytester, run_light, failures, name, code, says):
    pytester.makepyfile(
        **{"own/conftest": OVERRIDE.format(name=name, code=code), "own/test_it": ASKS.format(name=name)}
    )
    result = run_light()
    result.assert_outcomes(errors=2)
    said = failures(result)
    assert {test: len(lines) <= SHORT for test, lines in said.items()} == {"test_one": True, "test_two": True}
    first = "\n".join(said["test_one"])
    assert f"the fixture {name} (own/conftest.py:2) gives {says}" in first
    assert "it has to give " in first
    if name not in ("qvl_optimizer", "qvl_trainer"):  # made anew for every test
        assert "see the error of own/test_it.py::test_one" in "\n".join(said["test_two"])


def test_text_is_read_as_the_flag_reads_it(pytester, run_light):
    given = {"qvl_adapter_policy": "vision, merger:full", "qvl_card": "t4", "qvl_vram_limit": "15 GiB"}
    given["qvl_quantized_layers"] = "language, in_proj_a:16bit"
    overrides = [OVERRIDE.format(name=name, code=f"yield {value!r}") for name, value in given.items()]
    pytester.makeconftest("".join(overrides))
    pytester.makepyfile(
        """
    from pytest_qvl.models.policy import AdapterPolicy
    from pytest_qvl.vram.cards import card
    def judge(policy, gpu, limit):
        assert policy == AdapterPolicy(("vision", "merger"), ("merger",))
        assert gpu == card("t4")
        assert limit == 15 << 30
    def test_one(qvl_adapter_policy, qvl_card, qvl_vram_limit, qvl_quantized_layers):
        judge(qvl_adapter_policy, qvl_card, qvl_vram_limit)
        assert (qvl_quantized_layers.quantized, qvl_quantized_layers.kept) == (("language",), ("in_proj_a",))
    def test_two(qvl_adapter_policy, qvl_card, qvl_vram_limit, request):
        judge(qvl_adapter_policy, qvl_card, qvl_vram_limit)
        assert request.getfixturevalue("qvl_vram_limit") == 15 << 30
    """
    )
    run_light().assert_outcomes(passed=2)


def test_what_a_fixture_can_be_passes(pytester, run_real):
    pytester.makeconftest(
        """
    import functools, pytest, torch
    from pytest_qvl import checks, samples
    @pytest.fixture(scope="session")
    def qvl_target(qvl_target): return qvl_target
    @pytest.fixture(scope="session")
    def qvl_vram(qvl_vram): return qvl_vram
    @pytest.fixture(scope="session")
    def qvl_processor(qvl_processor): return qvl_processor
    @pytest.fixture(scope="session")
    def qvl_batch(qvl_processor): return functools.partial(samples.make_batch, qvl_processor)
    @pytest.fixture(scope="session")
    def qvl_probe_sizes(): return samples.ProbeSizes(28, 4, 28, 28, 28, 84)
    @pytest.fixture(scope="session")
    def qvl_image_samples(): return tuple(samples.scenes(0, 1)[:2])
    @pytest.fixture(scope="session")
    def qvl_adapter_policy(): return checks.AdapterPolicy()
    @pytest.fixture(scope="session")
    def qvl_make_optimizer(): return torch.optim.SGD
    @pytest.fixture
    def qvl_optimizer(): return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    @pytest.fixture
    def qvl_trainer(): return lambda model, batches: None
    @pytest.fixture(scope="session")
    def qvl_compute_dtype(): return "float32"
    @pytest.fixture(scope="session")
    def qvl_card(): return None
    @pytest.fixture(scope="session")
    def qvl_vram_limit(): return 1 << 30
    @pytest.fixture(scope="session")
    def qvl_reference(): return checks.Reference("by hand", {}, None, "float32", (None, None))
    """
    )
    names = ", ".join(EXPECTED)
    pytester.makepyfile(f"def test_one({names}): pass\ndef test_two({names}): assert callable(qvl_batch)")
    run_real(dtype="auto").assert_outcomes(passed=2)


def test_a_parameter_in_place_of_a_fixture_is_judged_too(pytester, run_light):
    pytester.makepyfile(
        "import pytest\n@pytest.mark.parametrize('qvl_batch', [1])\ndef test_it(qvl_target, qvl_batch): pass\n"
    )
    result = run_light()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["the fixture qvl_batch (a parameter of the test) gives a value of type int; *"])


NARROW = """
import pytest
@pytest.fixture
def qvl_model(): return "embedded"
"""
TOO_NARROW = (
    "the fixture qvl_model (conftest.py:2) has the scope function, and qvl_processor, which uses it, the scope session; "
    'write @pytest.fixture(scope="session")'
)


def test_an_override_of_too_narrow_a_scope_is_refused_with_what_to_write(pytester, run_light, run_apart):
    pytester.makeconftest(NARROW)
    pytester.makepyfile("def test_one(qvl_processor): pass\ndef test_two(qvl_processor): pass\ndef test_own(): pass")
    result = run_light()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert result.errlines == [f"ERROR: {TOO_NARROW}", ""]
    run_light("-k", "own").assert_outcomes(passed=1, deselected=2)
    result = run_apart("-n", "1", plugins=["xdist"])
    assert TOO_NARROW in result.outlines
    assert result.ret != 0


def test_a_parameter_of_too_narrow_a_scope_is_an_error_of_its_test(pytester, run_light):
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.parametrize("qvl_model", ["embedded"])
        def test_narrow(qvl_model, qvl_processor): pass
        @pytest.mark.parametrize("qvl_model", ["embedded"], scope="session")
        def test_wide(qvl_model, qvl_processor): pass
        """
    )
    result = run_light()
    result.assert_outcomes(passed=1, errors=1)
    assert (
        "the fixture qvl_model (a parameter of the test) has the scope function, and qvl_processor, which uses it, the "
        'scope session; write @pytest.mark.parametrize(..., scope="session")'
    ) in result.outlines


def test_scopes_are_looked_at_once_for_each_test(pytester, run_light, monkeypatch):
    from pytest_qvl.session import fixture_scopes

    looked, too_narrow = [], fixture_scopes._too_narrow
    monkeypatch.setattr(fixture_scopes, "_too_narrow", lambda item: looked.append(item.name) or too_narrow(item))
    pytester.makepyfile("import pytest\n@pytest.mark.parametrize('n', [1, 2])\ndef test_it(qvl_model, n): pass")
    run_light().assert_outcomes(passed=2)
    assert looked == ["test_it[embedded-cpu-1]", "test_it[embedded-cpu-2]"]


def test_an_override_that_nothing_wider_uses_may_be_of_any_scope(pytester, run_light):
    pytester.makeconftest(NARROW + "@pytest.fixture\ndef qvl_optimizer(): return None")
    pytester.makepyfile("def test_it(qvl_model, qvl_optimizer): assert qvl_model == 'embedded'")
    run_light().assert_outcomes(passed=1)
