"""A folder saved in 4 bits is a source like others; configurations that ask for something else are refused."""

from __future__ import annotations

import shutil

import pytest

SUITE = ("--pyargs", "pytest_qvl.suite", "--qvl-device", "cpu", "--qvl-samples", "2")


@pytest.fixture(scope="module")
def in_4bit(tmp_path_factory, real_stack):
    """The embedded checkpoint as ``save_pretrained`` of the 4-bit model writes it."""
    from pytest_qvl.faults.case import load
    from pytest_qvl.models.sources.embedded import embedded_model_dir

    folder = shutil.copytree(embedded_model_dir(), tmp_path_factory.mktemp("saved") / "in-4-bits")
    load(lora=None, dtype="float32").save_pretrained(folder)
    return folder


def test_the_suite_keeps_its_promises_against_its_own_weights_dequantized(pytester, run_real, in_4bit):
    pytester.makeini("[pytest]")
    selected = "quantization_census or checkpoint_complete or vision_stability or adapter_neutrality"
    record = pytester.path / "record.json"
    result = run_real(*SUITE, f"--qvl-model={in_4bit}", "-k", selected, f"--qvl-record={record}")
    result.assert_outcomes(passed=4)
    text = record.read_text()
    assert "the reference is its own 4-bit weights dequantized" in text
    assert "its own quantization_config counts" in text


def test_a_checkpoint_saved_in_fp4_is_kept_only_where_fp4_was_declared(pytester, run_real, tmp_path, real_stack):
    from pytest_qvl.faults.case import load
    from pytest_qvl.models.sources.embedded import embedded_model_dir

    folder = shutil.copytree(embedded_model_dir(), tmp_path / "in-fp4")
    load(lora=None, dtype="float32", bnb_4bit_quant_type="fp4").save_pretrained(folder)
    pytester.makeini("[pytest]")
    census = (*SUITE, f"--qvl-model={folder}", "-k", "quantization_census")
    result = run_real(*census)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*linears are fp4 instead of nf4*the checkpoint was saved in FP4*"])
    pytester.makeconftest(
        """
    import json, pathlib, pytest
    @pytest.fixture(scope="session")
    def qvl_quantization_config(qvl_model):
        from transformers import BitsAndBytesConfig
        saved = json.loads((pathlib.Path(qvl_model.removeprefix("local:")) / "config.json").read_text())
        return BitsAndBytesConfig.from_dict(saved["quantization_config"])
    """
    )
    run_real(*census, "--rootdir=.").assert_outcomes(passed=1)


def test_a_named_base_is_the_reference(pytester, run_real, in_4bit):
    pytester.makeini("[pytest]")
    pytester.makepyfile(
        """
    def test_reference(qvl_quantized_model, qvl_reference):
        assert qvl_reference.source == "full precision of embedded, float32"
        assert qvl_reference.caveat == ""
    """
    )
    run_real(
        f"--qvl-model={in_4bit}", "--qvl-reference-model=embedded", "--qvl-device=cpu", "--qvl-samples=2"
    ).assert_outcomes(passed=1)


def test_a_base_that_is_none_is_refused(pytester, run_real, in_4bit):
    pytester.makepyfile("def test_it(qvl_reference): pass")
    result = run_real("--qvl-model=embedded", f"--qvl-reference-model={in_4bit}", "--qvl-device=cpu")
    result.stdout.fnmatch_lines(
        ["qvl_reference: reference model 'local:*' is itself saved in 4 bits; name the 16-bit model"]
    )
    result = run_real("--qvl-model=embedded", "--qvl-reference-model=synthetic:qwen2.5-vl-3b", "--qvl-device=cpu")
    result.stdout.fnmatch_lines(
        ["qvl_reference: reference model 'synthetic:qwen2.5-vl-3b' is not the base of 'embedded': *"]
    )


def test_a_configuration_that_the_folder_does_not_have_is_refused(pytester, run_real, in_4bit):
    pytester.makepyfile(
        """
    import pytest
    import torch
    from pytest_qvl.models.quantized import usual_quantization
    @pytest.fixture(scope="session")
    def qvl_quantization_config(): return usual_quantization(torch.float16, bnb_4bit_use_double_quant=False)
    def test_it(qvl_quantized_model): pass
    """
    )
    result = run_real(f"--qvl-model={in_4bit}", "--qvl-device=cpu")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        [
            "qvl_quantization_config: the model was saved in 4 bits, and its own configuration counts, not this one "
            "(bnb_4bit_use_double_quant False, saved True; bnb_4bit_compute_dtype float16, saved float32): leave the *"
        ]
    )


def test_configurations_that_do_not_ask_for_4_bits(pytester, run_real):
    pytester.makepyfile(
        """
    import pytest
    from transformers import BitsAndBytesConfig
    class TestNone:
        @pytest.fixture(scope="session")
        def qvl_quantization_config(self): return None
        def test_it(self, qvl_quantized_model): pass
    class TestDict:
        @pytest.fixture(scope="session")
        def qvl_quantization_config(self): return {"load_in_4bit": True}
        def test_it(self, qvl_quantized_model): pass
    class TestEightBits:
        @pytest.fixture(scope="session")
        def qvl_quantization_config(self): return BitsAndBytesConfig(load_in_8bit=True)
        def test_it(self, qvl_quantized_model): pass
    class TestNumber:
        @pytest.fixture(scope="session")
        def qvl_model(self): return 5
        def test_it(self, qvl_quantized_model): pass
    """
    )
    result = run_real("--qvl-device=cpu")
    result.assert_outcomes(errors=4)
    text = result.stdout.str()
    for line in (
        "qvl_quantization_config: expected a transformers.BitsAndBytesConfig, got NoneType; give one with load_in_4bit",
        "qvl_quantization_config: expected a transformers.BitsAndBytesConfig, got dict; pass its items to Bits",
        "qvl_quantization_config: the BitsAndBytesConfig does not ask for 4 bits but for 8 bits: set load_in_4bit",
        "qvl_model: model 5 is of type int, not a name or folder; give 'embedded'",
    ):
        assert line in text
    assert "Traceback" not in text
