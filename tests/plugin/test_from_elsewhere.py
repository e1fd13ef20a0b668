"""The three lines that a newcomer writes in a folder of their own, and the mistakes that the suite must find there."""

from __future__ import annotations

import pytest

OVERRIDE = """
    import pytest
    @pytest.fixture(scope="session")
    def {name}():
{body}
"""
SEVEN_NAMES = """
        from peft import LoraConfig
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        return LoraConfig(r=16, lora_alpha=32, target_modules=names)
"""
POPULAR_SKIP_LIST = """
        import torch
        from transformers import BitsAndBytesConfig
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=["visual", "lm_head"],
        )
"""
SUITE = ("--pyargs", "pytest_qvl.suite")


@pytest.mark.slow
def test_three_lines_pass_under_warnings_as_errors(pytester, run_apart):
    """In a fresh process, where importing the stack warns."""
    pytester.makepyfile(
        """
    from pytest_qvl import checks
    def test_fails(qvl_lora_model): assert False  # loads the model: what that prints would be shown
    def test_adapter_sits_on_the_language_backbone(qvl_lora_model, qvl_lora_config):
        checks.adapter_census(qvl_lora_model, qvl_lora_config)
    """
    )
    result = run_apart("-W", "error")
    result.stdout.fnmatch_lines(
        ["qvl: embedded on cpu: 1 check kept", "qvl: embedded on cuda: 2 tests not run: needs CUDA: *"]
    )
    result.assert_outcomes(passed=1, failed=1, skipped=2)
    result.stdout.no_fnmatch_line("*Loading weights*")
    result.stdout.no_fnmatch_line("*gemm_4bit_forward*")


def test_the_usual_target_list_fails_the_adapter_census(pytester, run_real):
    pytester.makeini("[pytest]")
    pytester.makeconftest(OVERRIDE.format(name="qvl_lora_config", body=SEVEN_NAMES))
    result = run_real(*SUITE, "-k", "adapter_census")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["E   *CheckFailed: *model.visual.blocks.0.*", "*LoRA on the language backbone*BROKEN*"]
    )


def test_the_popular_skip_list_fails_the_quantization_census(pytester, run_real):
    pytester.makepyfile(override=OVERRIDE.format(name="qvl_quantization_config", body=POPULAR_SKIP_LIST))
    pytester.syspathinsert()
    result = run_real(*SUITE, "-k", "quantization_census", "-p", "override")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "E   *CheckFailed: vision: * of * linears are NF4*",
            "*quantized where it should be*BROKEN*",
            "*verdict: BROKEN*",
        ]
    )
    assert "merger: " in result.stdout.str()


KEEPS_OUTPUTS = POPULAR_SKIP_LIST.replace('"visual", "lm_head"', '"model.visual", "lm_head", "o_proj"')


@pytest.mark.slow
def test_layers_kept_on_purpose_are_declared(pytester, run_real):
    """By ini, which a fixture overrides; the preflight reads the same from files."""
    pytester.makeconftest(OVERRIDE.format(name="qvl_quantization_config", body=KEEPS_OUTPUTS))
    selected = (*SUITE, "-k", "quantization_census or test_preflight")
    result = run_real(*selected)
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["*if they stay so on purpose, declare it: *= 'language, o_proj:16bit'*"])
    pytester.makeini("[pytest]\nqvl_quantized_layers = language, o_proj:16bit")
    result = run_real(*selected)
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["qvl: *, quantized layers language, o_proj:16bit (tox.ini)*"])
    declared = OVERRIDE.format(name="qvl_quantized_layers", body="        return 'language'")
    pytester.makeconftest(OVERRIDE.format(name="qvl_quantization_config", body=KEEPS_OUTPUTS) + declared)
    run_real(*selected).assert_outcomes(failed=2)


def test_a_saved_adapter_is_loaded_and_a_wrong_one_is_one_error(pytester, run_real):
    pytester.makepyfile(
        """
    import torch
    def test_it(qvl_lora_model, qvl_lora_config):
        assert qvl_lora_config.r == 3
        values = {v for n, p in qvl_lora_model.named_parameters() if "lora_B" in n for v in p.unique().tolist()}
        assert values == {0.25}
    """,
        make="""
    from pathlib import Path
    from peft import LoraConfig, get_peft_model
    import torch
    def test_make(qvl_quantized_model):
        config = LoraConfig(r=3, target_modules=r".*language_model.*\\.q_proj")
        model = get_peft_model(qvl_quantized_model, config)
        with torch.no_grad():
            for n, p in model.named_parameters():
                if "lora_B" in n: p.fill_(0.25)
        model.save_pretrained("saved")
        model.unload()
    """,
    )
    run_real("make.py").assert_outcomes(passed=1)
    run_real("--qvl-adapter", "saved").assert_outcomes(passed=1)
    config = pytester.path / "saved" / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 3', '"r": 5'))
    result = run_real("--qvl-adapter", "saved")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        ["qvl_lora_model: no adapter on *: the adapter in *saved does not fit: *its configuration asks for r=*"]
    )


def test_two_models_one_after_the_other(pytester, run_real):
    import shutil

    from pytest_qvl.models.sources.embedded import embedded_model_dir

    shutil.copytree(embedded_model_dir(), pytester.path / "mine")
    pytester.makepyfile(
        """
    import gc, weakref
    seen = []
    def test_one_at_a_time(qvl_quantized_model, qvl_model):
        seen.append(weakref.ref(qvl_quantized_model))
        gc.collect()
        assert sum(ref() is not None for ref in seen) == 1
    def test_lora(qvl_lora_model): pass
    """
    )
    result = run_real("--qvl-model", "embedded", "--qvl-model", "mine", "-v")
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["*embedded-cpu*", "*embedded-cpu*", "*mine-cpu*", "*mine-cpu*"])


def test_a_hub_id_that_nobody_has_is_one_error(pytester, run_real, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets in a fresh process
    pytester.makepyfile("def test_it(qvl_lora_model): pass\ndef test_other(qvl_quantized_model): pass")
    result = run_real("--qvl-model", "nobody/no-such-model")
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(
        [
            "qvl_model: model 'hub:nobody/no-such-model' is not in the local cache (*",
            "not run: see the error of *test_it*",
        ]
    )


def test_the_suite_shows_why_a_promise_could_not_be_judged(pytester, run_real):
    pytester.makeini("[pytest]")
    pytester.makeconftest(
        """
    import pytest
    from pytest_qvl.evidence import CannotJudge
    @pytest.fixture(scope="session")
    def qvl_reference(): raise CannotJudge("no room for it")
    """
    )
    result = run_real(*SUITE, "-k", "vision_stability or test_quantization")
    result.assert_outcomes(passed=3, skipped=1)
    result.stdout.fnmatch_lines(
        [
            "    1  quantized where it should be * kept *",
            "    7  vision and merger are stable * not judged",
            "       not judged: vision_stability: no room for it",
            "   verdict: kept: 1 of * promises kept, 1 not judged, * not run; 3 checks in * s",
        ]
    )


def test_random_numbers_of_one_test_do_not_reach_the_next(pytester, run_real):
    pytester.makepyfile(
        """
    import torch
    seen = []
    def test_one(qvl_lora_model): seen.append(torch.initial_seed()); torch.manual_seed(7)
    def test_two(qvl_lora_model): assert torch.initial_seed() == seen[0]
    """
    )
    run_real().assert_outcomes(passed=2)
