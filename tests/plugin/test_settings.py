"""Settings from flag, environment and ini, as a user meets them: precedence, header, one clear error each."""

from __future__ import annotations

import shutil

import pytest

from pytest_qvl.models.sources.embedded import embedded_model_dir
from pytest_qvl.options import SETTINGS

PRINT = """
    def test_it(pytestconfig):
        from pytest_qvl.options import SETTINGS_KEY
        settings = pytestconfig.stash[SETTINGS_KEY]
        print("SEED", settings.seed, settings.source("seed"))
"""


def broken_copy(folder, **changes):
    """A copy of the embedded checkpoint with some files replaced (bytes) or removed (``None``)."""
    shutil.copytree(embedded_model_dir(), folder)
    for name, content in changes.items():
        file = folder / name.replace("__", ".")
        file.unlink() if content is None else file.write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("arguments", "environment", "ini", "seen"),
    [
        ([], {}, "", "SEED 0 default"),
        ([], {}, "qvl_seed = 3", "SEED 3 pyproject.toml"),
        ([], {"QVL_SEED": "2"}, "qvl_seed = 3", "SEED 2 QVL_SEED"),
        (["--qvl-seed", "1"], {"QVL_SEED": "2"}, "qvl_seed = 3", "SEED 1 --qvl-seed"),
        ([], {"QVL_SEED": ""}, "qvl_seed = 3", "SEED 3 pyproject.toml"),
    ],
)
def test_who_is_heard(pytester, monkeypatch, arguments, environment, ini, seen):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    pytester.makepyprojecttoml(f"[tool.pytest]\n{ini}\n")
    pytester.makepyfile(PRINT)
    pytester.runpytest_inprocess("-s", *arguments).stdout.fnmatch_lines([f"*{seen}*"])


def test_the_header_says_what_was_chosen_and_by_whom(pytester, monkeypatch):
    pytester.makeini(
        "[pytest]\nqvl_samples = 8\nqvl_require_gpu = no\nqvl_model =\n  embedded\n  synthetic:qwen2.5-vl-7b"
    )
    monkeypatch.setenv("QVL_DEVICE", "cpu")
    result = pytester.runpytest_inprocess("--qvl-seed", "7")
    result.stdout.fnmatch_lines(
        [
            "qvl: model embedded, synthetic:qwen2.5-vl-7b (tox.ini), device cpu (QVL_DEVICE), seed 7 (--qvl-seed), "
            "samples 8 (tox.ini), require gpu False (tox.ini)"
        ]
    )
    result = pytester.runpytest_inprocess("-o", "qvl_model=embedded", "--no-qvl-require-gpu")
    result.stdout.fnmatch_lines(["qvl: model embedded (-o), *require gpu False (--qvl-require-gpu)"])


def test_folders_in_an_ini_start_from_the_ini(pytester, monkeypatch):
    pytester.mkdir("pictures")
    pytester.makepyprojecttoml('[tool.pytest]\nqvl_images = "pictures"\n')
    monkeypatch.chdir(pytester.mkdir("below"))
    result = pytester.runpytest_inprocess()
    result.stdout.fnmatch_lines([f"qvl: *images {pytester.path}/pictures (pyproject.toml)"])


def test_help_names_every_flag_with_its_ini_and_environment(pytester):
    text = " ".join(pytester.runpytest_inprocess("--help").stdout.str().split())
    for setting in SETTINGS:
        assert setting.flag in text
        assert f"ini {setting.name}, environment {setting.env}, " in text


@pytest.mark.parametrize(
    ("arguments", "environment", "ini", "says"),
    [
        (["--qvl-model", "qwen"], {}, "", "--qvl-model: model 'qwen' is unknown; give 'embedded', a folder*"),
        (["--qvl-model", "./out"], {}, "", "--qvl-model: model './out': the folder '*/out' does not exist; give*"),
        (["--qvl-model", "synthetic:x"], {}, "", "--qvl-model: *no released configuration 'x'; known: *qwen2.5-vl-7b*"),
        (["--qvl-model", ""], {}, "", "--qvl-model: model '' is unknown; give*"),
        (["--qvl-adapter", "out"], {}, "", "--qvl-adapter: the adapter folder '*/out' does not exist; give*"),
        (
            ["--qvl-adapter-policy", "visual"],
            {},
            "",
            "--qvl-adapter-policy: part 'visual' is unknown; known: language, *",
        ),
        (
            ["--qvl-quantized-layers", "language, .*in_proj_[ab]$:16bit"],
            {},
            "",
            "--qvl-quantized-layers: '.*in_proj_[ab]$' is neither a part (language, *) nor a name of layers, * "
            "(it is no regular expression); did you mean 'in_proj_[ab]'?",
        ),
        (
            [],
            {"QVL_QUANTIZED_LAYERS": "in_proj_a:16bit"},
            "",
            "QVL_QUANTIZED_LAYERS: nothing is said to be in 4 bits: *",
        ),
        (
            [],
            {},
            "qvl_quantized_layers = 'language, in_proj_a:8bit'",
            "qvl_quantized_layers (pyproject.toml): 'in_proj_a:8bit': a part or a layer is followed by nothing or by *",
        ),
        (
            ["--qvl-quantized-layers", "language, language:16bit"],
            {},
            "",
            "*: language: either quantized or kept, not both",
        ),
        (["--qvl-images", "out"], {}, "", "--qvl-images: the folder '*/out' does not exist"),
        (["--qvl-images", ""], {}, "", "--qvl-images: no folder was named; leave the setting out, or *"),
        (["--qvl-seed", "-1"], {}, "", "--qvl-seed: -1 is below the smallest value 0"),
        (["--qvl-card", "t5"], {}, "", "--qvl-card: card 't5' is unknown; known: *, t4, *; did you mean t4?"),
        (["--qvl-card", "rtx4080"], {}, "", "--qvl-card: card 'rtx4080' is unknown; *; did you mean rtx4090 or *"),
        (
            ["--qvl-card", "t4"],
            {"QVL_COMPUTE_DTYPE": "bfloat16"},
            "",
            "qvl_compute_dtype (QVL_COMPUTE_DTYPE), qvl_card (--qvl-card): t4 has no bfloat16 *; use float16 or auto",
        ),
        (["--qvl-record", "."], {}, "", "--qvl-record: '*' is a folder, not a regular file"),
        (["--qvl-record", "/dev/null"], {}, "", "--qvl-record: '/dev/null' is a device or a pipe, not a regular file*"),
        ([], {"QVL_MODEL": "embedded,qwen"}, "", "QVL_MODEL: model 'qwen' is unknown; give*"),
        ([], {"QVL_DEVICE": "tpu"}, "", "QVL_DEVICE: 'tpu' is not one of auto, cpu, cuda"),
        ([], {"QVL_REQUIRE_GPU": "maybe"}, "", "QVL_REQUIRE_GPU: 'maybe' is neither true nor false; give one of *"),
        ([], {}, "qvl_backend = ['vllm']", "qvl_backend (pyproject.toml): 'vllm' is not one of transformers*"),
        ([], {}, "qvl_compute_dtype = 'int8'", "qvl_compute_dtype (pyproject.toml): 'int8' is not one of auto*"),
        ([], {}, "qvl_devise = 'cpu'", "qvl_devise (*pyproject.toml): pytest-qvl has no *; did you mean qvl_device?"),
        (["-o", "qvl_devise=cpu"], {}, "", "qvl_devise (-o): pytest-qvl has no *; did you mean qvl_device?"),
        ([], {"PYTEST_ADDOPTS": "-o qvl_devise=cpu"}, "", "qvl_devise (-o): *; did you mean qvl_device?"),
        ([], {}, "qvl_samples = 1", "qvl_samples (pyproject.toml): 1 is below the smallest value 2"),
        ([], {}, "qvl_samples = 'few'", "qvl_samples (pyproject.toml): *expects an int*; give a whole number"),
        ([], {}, "qvl_model = 'embedded'", "qvl_model (pyproject.toml): *expects a list*; give a list (in TOML: *"),
    ],
    ids=str,
)
def test_a_bad_value_is_one_clear_error(pytester, monkeypatch, arguments, environment, ini, says):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    pytester.makepyprojecttoml(f"[tool.pytest]\n{ini}\n")
    pytester.makepyfile("def test_it(): print('RAN')")
    result = pytester.runpytest_inprocess("-s", *arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {says}".replace("[", "[[]")])
    said = result.stdout.str() + result.stderr.str()
    assert said.count("ERROR") == 1
    assert "RAN" not in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"preprocessor_config__json": None}, "has no processor (preprocessor_config.json); save it beside the model*"),
        ({"model__safetensors": b"\x08" + bytes(7) + b"{}garbage"}, "model.safetensors' is corrupt*"),
        ({"config__json": b"{}"}, "config.json says model_type None; this package tests *qwen2_5_vl*"),
    ],
    ids=["no processor", "corrupt weights", "another model"],
)
def test_a_bad_folder_is_refused_before_anything_is_loaded(pytester, changes, says):
    folder = broken_copy(pytester.path / "model", **changes)
    result = pytester.runpytest_inprocess("--qvl-model", str(folder))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: --qvl-model: *{folder}*{says}"])


def test_a_bad_value_under_xdist_is_told_once(run_apart):
    result = run_apart("-n", "2", "--qvl-seed", "x", plugins=["xdist"])
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert result.stderr.str().count("--qvl-seed: 'x' is not a whole number") == 1
