"""One real model, many tests: each gets the state it asks for, whatever ran before it and whatever is overridden."""

from __future__ import annotations

import json

import pytest

HELPERS = """
    import pytest, torch

    def lora_b(model): return [p for name, p in model.named_parameters() if "lora_B" in name]
    def holds(model, value): return bool(lora_b(model)) and all((p == value).all() for p in lora_b(model))
    def has_lora(model): return any("lora" in name for name, _ in model.named_modules())
    def add(model, value):
        with torch.no_grad():
            for p in lora_b(model): p.add_(value)
        return model
    def norm(model): return model.model.language_model.norm.weight
"""

CONFIG = """
    import pytest
    @pytest.fixture(scope="session")
    def qvl_lora_config():
        from peft import LoraConfig
        return LoraConfig(r=4, target_modules=r".*language_model.*\\.q_proj")
"""

OWN_CONFIG = """
    def test_rank(qvl_lora_model): assert qvl_lora_model.peft_config["default"].r == {rank}
    def test_base(qvl_quantized_model): assert not any("lora" in name for name, _ in qvl_quantized_model.named_modules())
    def test_rank_again(qvl_lora_model): assert qvl_lora_model.peft_config["default"].r == {rank}
"""


@pytest.fixture
def two_folders(pytester):
    """``a`` overrides the LoRA configuration, ``b`` does not."""
    pytester.makepyfile(
        **{"a/conftest": CONFIG, "a/test_a": OWN_CONFIG.format(rank=4), "b/test_b": OWN_CONFIG.format(rank=16)}
    )


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a"), ("a/test_a.py::test_rank", "b", "a")], ids=" ".join)
def test_each_folder_sees_its_own_configuration(two_folders, run_real, order):
    result = run_real(*order)
    assert result.ret == 0
    result.assert_outcomes(passed=6)


@pytest.mark.slow
def test_each_folder_sees_its_own_configuration_over_two_workers(two_folders, run_apart):
    result = run_apart("--qvl-device", "cpu", "-n", "2", "b", "a", "-W", "error", plugins=["xdist"])
    result.assert_outcomes(passed=6)


def test_trained_fresh_and_base_in_any_order(pytester, run_real):
    pytester.makepyfile(
        HELPERS
        + """
    @pytest.fixture(scope="module")
    def trained(qvl_lora_model): return add(qvl_lora_model, 1)
    @pytest.fixture(scope="module")
    def trained_more(trained): return add(trained, 1)
    @pytest.fixture
    def briefly(qvl_lora_model): return add(qvl_lora_model, 7)

    def test_base_first(qvl_quantized_model): assert not has_lora(qvl_quantized_model)
    def test_trained_1(trained): assert holds(trained, 1)
    def test_base(qvl_quantized_model): assert not has_lora(qvl_quantized_model)
    def test_fresh(qvl_lora_model): assert holds(qvl_lora_model, 0)
    def test_trained_2(trained): assert holds(trained, 1)
    def test_more(trained_more): assert holds(trained_more, 2)
    def test_trained_3(trained): assert holds(trained, 1)
    def test_more_again(trained_more): assert holds(trained_more, 2)
    def test_briefly(briefly): assert holds(briefly, 7)
    def test_fresh_again(qvl_lora_model): assert holds(qvl_lora_model, 0)

    class TestOverriddenByWhatItOverrides:
        @pytest.fixture
        def qvl_lora_model(self, qvl_lora_model): return add(qvl_lora_model, 3)
        def test_own(self, qvl_lora_model): assert holds(qvl_lora_model, 3)
        def test_own_again(self, qvl_lora_model): assert holds(qvl_lora_model, 3)

    @pytest.fixture(scope="module")
    def made():
        from peft import LoraConfig
        return LoraConfig(r=2, target_modules=r".*language_model.*\\.v_proj")

    class TestOverriddenByAModelOfOnesOwn:
        @pytest.fixture(scope="module")
        @staticmethod
        def qvl_lora_model(qvl_quantized_model, made):
            from peft import get_peft_model, prepare_model_for_kbit_training
            model = prepare_model_for_kbit_training(qvl_quantized_model, use_gradient_checkpointing=False)
            return add(get_peft_model(model, made), 5)
        def test_own(self, qvl_lora_model): assert holds(qvl_lora_model, 5)
        def test_own_again(self, qvl_lora_model): assert holds(qvl_lora_model, 5)
        def test_base(self, qvl_quantized_model):
            assert not has_lora(qvl_quantized_model)
            assert norm(qvl_quantized_model).dtype == torch.bfloat16
        def test_own_after_base(self, qvl_lora_model): assert holds(qvl_lora_model, 5)

    def test_fresh_after_all(qvl_lora_model):
        assert holds(qvl_lora_model, 0)
        assert qvl_lora_model.peft_config["default"].r == 16
    def test_trained_after_all(trained): assert holds(trained, 1)
    """
    )
    result = run_real("-v", dtype="bfloat16")
    result.assert_outcomes(passed=18)
    assert result.ret == 0


def test_who_changes_the_shared_model_is_named_and_the_next_test_gets_a_clean_one(pytester, run_real):
    pytester.makepyfile(
        HELPERS
        + """
    def clean(model):
        assert holds(model, 0) and list(model.peft_config) == ["default"] and not model.training
        assert all(p.requires_grad == ("lora" in name) and p.grad is None for name, p in model.named_parameters())
        assert not model._forward_hooks and not (norm(model.get_base_model()) == 3).any()

    def test_adapter(qvl_lora_model): add(qvl_lora_model, 1)
    def test_clean_1(qvl_lora_model): clean(qvl_lora_model)
    def test_base(qvl_quantized_model):
        with torch.no_grad(): norm(qvl_quantized_model).fill_(3)
    def test_clean_2(qvl_lora_model): clean(qvl_lora_model)
    def test_second_adapter(qvl_lora_model):
        from peft import LoraConfig
        qvl_lora_model.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    def test_clean_3(qvl_lora_model): clean(qvl_lora_model)
    def test_unload(qvl_lora_model): qvl_lora_model.unload()
    def test_clean_4(qvl_lora_model): clean(qvl_lora_model)

    def test_modes(qvl_lora_model):
        qvl_lora_model.train()
        norm(qvl_lora_model.get_base_model()).requires_grad_(True)
        qvl_lora_model.register_forward_hook(print)
        torch.manual_seed(0)
    def test_clean_5(qvl_lora_model): clean(qvl_lora_model)

    @pytest.fixture
    def put_back(qvl_quantized_model):
        before = norm(qvl_quantized_model).clone()
        yield
        with torch.no_grad(): norm(qvl_quantized_model).copy_(before)
    def test_puts_back(qvl_quantized_model, put_back):
        with torch.no_grad(): norm(qvl_quantized_model).fill_(3)
    def test_clean_6(qvl_lora_model): clean(qvl_lora_model)
    """
    )
    result = run_real("-rN")
    result.assert_outcomes(passed=12, errors=4)
    said = [line for line in result.outlines if "changed the shared model and did not put it back" in line]
    assert [line.partition("::")[2].partition("[")[0] for line in said] == [
        "test_adapter", "test_base", "test_second_adapter", "test_unload"
    ]  # fmt: skip
    assert "language_model.layers.0.self_attn.q_proj.lora_B.default.weight, " in said[0]
    assert "put it back: model.language_model.norm.weight. Train in a fixture" in said[1]


def test_both_views_or_an_unannounced_one_are_refused_without_losing_the_rest(pytester, run_real):
    pytester.makepyfile(
        """
    import pytest
    def test_both(qvl_lora_model, qvl_quantized_model): pass
    @pytest.fixture(scope="module")
    def trained(qvl_lora_model): return qvl_lora_model
    def test_both_through_a_fixture(trained, qvl_quantized_model): pass
    @pytest.mark.skip(reason="known")
    def test_both_but_skipped(qvl_lora_model, qvl_quantized_model): pass
    @pytest.mark.parametrize("view", ["qvl_lora_model", "qvl_quantized_model"])
    def test_unannounced(request, view, qvl_batch): request.getfixturevalue(view)
    def test_lora(qvl_lora_model): pass
    @pytest.mark.parametrize("view", ["qvl_lora_model", "qvl_quantized_model"])
    def test_unannounced_when_made(request, view, qvl_batch): request.getfixturevalue(view)
    @pytest.mark.usefixtures("qvl_lora_model")
    def test_announced(request): request.getfixturevalue("qvl_lora_model")
    def test_config_from_the_base(qvl_lora_model, qvl_lora_config): pass
    """
    )
    pytester.makeconftest(
        """
    import pytest
    @pytest.fixture(scope="session")
    def qvl_lora_config(qvl_quantized_model):
        from peft import LoraConfig
        names = {n.rpartition(".")[2] for n, _ in qvl_quantized_model.named_modules() if n.endswith("q_proj")}
        return LoraConfig(r=2, target_modules=sorted(names))
    """
    )
    result = run_real("-rN")
    result.assert_outcomes(errors=2, failed=4, passed=3, skipped=1)
    said = result.stdout.str()
    for test in ("test_both", "test_both_through_a_fixture"):
        assert f"::{test}[embedded-cpu] asks for qvl_quantized_model and qvl_lora_model: " in said
    assert said.count("] gets a model by request.getfixturevalue, which nobody knows before the test runs") == 4
    assert "hidden" not in said


def test_a_fixture_that_nothing_announced_is_one_sentence(pytester, run_light):
    pytester.makepyfile(
        """
    def test_model(request): request.getfixturevalue("qvl_lora_model")
    def test_batch(request): request.getfixturevalue("qvl_batch")
    def test_named(qvl_model, request): assert request.getfixturevalue("qvl_backend") == "transformers"
    """
    )
    result = run_light("-rfN")
    result.assert_outcomes(passed=1, failed=2)
    said = result.stdout.str()
    assert said.count("a fixture of pytest-qvl was asked for by request.getfixturevalue in a test that names none") == 2
    assert "AttributeError" not in said


CANNOT_BE_ATTACHED = """
    import pytest
    @pytest.fixture(scope="session")
    def qvl_lora_config():
        from peft import LoraConfig
        return LoraConfig({arguments})
"""


@pytest.mark.parametrize(
    "arguments",
    ["target_modules=['nothing_is_called_so']", "target_modules=['q_proj'], init_lora_weights='pissa'"],
    ids=["nothing to adapt", "half attached"],
)
def test_an_adapter_that_cannot_be_attached_is_one_error_and_one_load(pytester, run_real, monkeypatch, arguments):
    from pytest_qvl.models.owner import ModelOwner

    held = []
    hold = ModelOwner._hold
    monkeypatch.setattr(ModelOwner, "_hold", lambda self, *rest: (held.append(rest), hold(self, *rest))[1])
    pytester.makeconftest(CANNOT_BE_ATTACHED.format(arguments=arguments))
    pytester.makepyfile(
        """
    def test_a(qvl_lora_model): pass
    def test_b(qvl_lora_model, qvl_processor): pass
    def test_base(qvl_quantized_model): assert not any("lora" in name for name, _ in qvl_quantized_model.named_modules())
    def test_c(qvl_lora_model): pass
    def test_d(qvl_lora_model): pass
    """
    )
    result = run_real("-rN")
    result.assert_outcomes(passed=1, errors=4)
    assert result.stdout.str().count("not run: see the error of ") == 3
    assert len(held) == 1


def test_overrides_of_the_model_itself_and_by_parameters(pytester, run_real):
    pytester.makepyfile(
        **{
            "own/conftest": """
    import pytest
    @pytest.fixture(scope="session")
    def qvl_quantized_model():
        import torch
        from transformers import AutoModelForImageTextToText, BitsAndBytesConfig
        from pytest_qvl.models.sources.embedded import embedded_model_dir
        config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["model.visual", "lm_head"])
        folder = embedded_model_dir()
        model = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
        model.mine = True
        return model
    """,
            "own/test_own": """
    def test_lora(qvl_lora_model): assert qvl_lora_model.get_base_model().mine
    def test_base(qvl_quantized_model):
        assert qvl_quantized_model.mine
        assert not any("lora" in name for name, _ in qvl_quantized_model.named_modules())
    def test_forward(qvl_lora_model, qvl_batch, qvl_image_samples): qvl_lora_model(**qvl_batch(qvl_image_samples[:1]))
    """,
            "test_rank": """
    import pytest
    from peft import LoraConfig
    RANKS = [LoraConfig(r=rank, target_modules=r".*language_model.*q_proj") for rank in (2, 3)]
    @pytest.mark.parametrize("qvl_lora_config", RANKS, ids=["two", "three"], scope="session")
    def test_rank(qvl_lora_model, qvl_lora_config):
        assert qvl_lora_model.peft_config["default"].r == qvl_lora_config.r
        assert not hasattr(qvl_lora_model.get_base_model(), "mine")
    def test_default(qvl_lora_model): assert qvl_lora_model.peft_config["default"].r == 16
    @pytest.mark.parametrize("qvl_lora_config", RANKS, ids=["two", "three"])
    def test_needs_a_scope(qvl_lora_model, qvl_lora_config): pass
    """,
        }
    )
    result = run_real("test_rank.py", "own")
    result.assert_outcomes(passed=6, errors=2)
    says = (
        "the fixture qvl_lora_config (a parameter of the test) has the scope function, and qvl_lora_model, which uses *"
    )
    result.stdout.fnmatch_lines([says])
    result.stdout.no_fnmatch_line("*entries are hidden*")


def test_a_load_that_fails_is_told_once_and_not_tried_again(pytester, run_real):
    pytester.makeconftest(
        """
    import pytest
    tried = []
    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(fixturedef):
        tried.append(fixturedef.argname)
        return (yield)
    def pytest_unconfigure(): print("TRIED", tried.count("qvl_quantized_model"), tried.count("qvl_lora_model"))

    @pytest.fixture(scope="session")
    def qvl_quantization_config():
        from transformers import BitsAndBytesConfig
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf5")
    """
    )
    pytester.makepyfile(
        """
    import pytest
    @pytest.fixture(scope="module")
    def trained(qvl_lora_model): return qvl_lora_model
    def test_first(qvl_quantized_model): pass
    def test_second(qvl_lora_model): pass
    def test_third(trained): pass
    def test_fourth(qvl_quantized_model): pass
    def test_processor(qvl_processor): pass
    """
    )
    result = run_real("-rN")
    result.assert_outcomes(errors=4, passed=1)
    first = "test_a_load_that_fails_is_told_once_and_not_tried_again.py::test_first[[]embedded-cpu]"
    result.stdout.fnmatch_lines(
        [
            "qvl_quantized_model: embedded could not be loaded: *",
            *[f"not run: see the error of {first}"] * 3,
            "TRIED 1 0",
        ]
    )
    assert result.stdout.str().count("could not be loaded") == 1


@pytest.mark.parametrize(
    ("value", "said"),
    [("5", "qvl_adapter gives 5; expected the folder*"), ("'/nope'", "the adapter folder '/nope' does not exist*")],
)
def test_a_fixture_that_gives_no_adapter_is_one_clear_error(pytester, run_real, value, said):
    pytester.makeconftest(
        f"""
    import pytest
    @pytest.fixture(scope="session")
    def qvl_adapter(): return {value}
    """
    )
    pytester.makepyfile("def test_config(qvl_lora_config): pass")
    result = run_real("-rN")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([f"qvl_lora_config: {said}"])


def test_loading_is_a_phase_of_its_own_once_per_model(pytester, run_real):
    pytester.makepyfile(
        """
    def test_base(qvl_quantized_model): pass
    def test_lora(qvl_lora_model, qvl_vram):
        with qvl_vram.phase("mine"): pass
    def test_base_again(qvl_quantized_model): pass
    """
    )
    run_real("--qvl-record", "record.json").assert_outcomes(passed=3)
    phases = json.loads((pytester.path / "record.json").read_text())["vram"]["phases"]
    assert [phase["name"] for phase in phases] == ["load", "attach adapter", "mine"]
    assert all(phase["reason"] for phase in phases)  # no CUDA


def test_a_reference_that_fails_is_told_by_the_first_test_that_asks_for_it(pytester, run_real):
    pytester.makepyfile(
        """
    import gc, weakref
    import pytest
    class Activations: pass
    kept = []
    @pytest.fixture(scope="session")
    def qvl_reference():
        activations = Activations()
        kept.append(weakref.ref(activations))
        def called_with_hooks(): raise RuntimeError(f"no reference of {type(activations).__name__}")
        called_with_hooks()
    def test_first(qvl_quantized_model):
        gc.collect()
        assert kept[0]() is None
    def test_second(qvl_reference): pass
    def test_third(qvl_quantized_model, qvl_reference): pass
    """
    )
    result = run_real("-rN")
    result.assert_outcomes(errors=2, passed=1)
    result.stdout.fnmatch_lines(
        [
            "E * RuntimeError: no reference of Activations",
            "* in qvl_reference",
            "* called_with_hooks()",
            "* in called_with_hooks",
            "not run: see the error of *::test_third*",
        ]
    )


def test_an_adapter_that_cannot_be_attached_leaves_the_base_model_clean(pytester, run_real):
    pytester.makeconftest(
        """
    import pytest
    from peft import LoraConfig
    @pytest.fixture(scope="session", params=[["no_such_layer"], r".*(language_model.*q_proj|norm)"])
    def qvl_lora_config(request): return LoraConfig(target_modules=request.param)
    """
    )
    pytester.makepyfile(
        """
    def test_lora(qvl_lora_model): pass
    def test_base(qvl_quantized_model): assert not any("lora" in name for name, _ in qvl_quantized_model.named_modules())
    """
    )
    result = run_real()
    result.assert_outcomes(errors=2, passed=1)
    result.stdout.fnmatch_lines_random(
        [
            "qvl_lora_model: no adapter on *: Target modules {'no_such_layer'} not found in the base model*",
            "qvl_lora_model: no adapter on *: ValueError: Target module *RMSNorm* is not supported*",
        ]
    )


def test_an_interrupt_leaves_a_sensible_summary_and_gives_the_memory_back(pytester, run_real):
    pytester.makeconftest(
        """
    import gc, weakref, pytest
    seen = []
    @pytest.fixture(autouse=True)
    def remember(qvl_lora_model): seen.append(weakref.ref(qvl_lora_model.get_base_model()))
    def pytest_unconfigure():
        gc.collect()
        print("ALIVE", sum(ref() is not None for ref in seen), "OF", len(seen))
    """
    )
    pytester.makepyfile(
        """
    def test_check(qvl_lora_model, qvl_lora_config):
        from pytest_qvl import checks
        checks.adapter_census(qvl_lora_model, qvl_lora_config)
    def test_stopped(qvl_lora_model): raise KeyboardInterrupt
    def test_never(qvl_lora_model): pass
    """
    )
    result = run_real("-s", no_reraise_ctrlc=True)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["qvl: embedded on cpu: 1 check kept", "*KeyboardInterrupt*", "ALIVE 0 OF 2"])


def test_a_failure_does_not_pin_the_model(pytester, run_real):
    pytester.makeconftest(
        """
    import gc, weakref, pytest
    seen = []
    @pytest.fixture(autouse=True)
    def remember(qvl_quantized_model, request):
        seen.append(weakref.ref(qvl_quantized_model))
        gc.collect()
        print("ALIVE", sum(ref() is not None for ref in dict.fromkeys(seen)), "OF", len(dict.fromkeys(seen)))
    """
    )
    pytester.makepyfile(
        HELPERS
        + """
    def test_fails(qvl_quantized_model):
        held = qvl_quantized_model
        with torch.no_grad(): norm(held).fill_(3)
        assert False
    def test_next(qvl_quantized_model): pass
    """
    )
    result = run_real("-s")
    result.assert_outcomes(failed=1, errors=1, passed=1)
    result.stdout.fnmatch_lines(["*ALIVE 1 OF 1*", "*ALIVE 1 OF 2*"])
