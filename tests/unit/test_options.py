"""Every setting is told once and read the same way, whoever speaks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pytest_qvl.options import SETTINGS, SETTINGS_KEY, Settings
from pytest_qvl.session.rootdir import joined

# A value that each setting takes, and what comes of it; `folder` and `adapter` stand for folders made by a fixture.
VALID = {
    "qvl_model": ("embedded", "embedded"),
    "qvl_adapter": ("{adapter}", "{adapter}"),
    "qvl_backend": ("transformers", "transformers"),
    "qvl_reference_model": ("embedded", "embedded"),
    "qvl_device": ("cuda", "cuda"),
    "qvl_compute_dtype": ("float16", "float16"),
    "qvl_fault": ("scatter-off-by-one", "scatter-off-by-one"),
    "qvl_fault_reference": ("damaged", "damaged"),
    "qvl_adapter_policy": ("language, merger:full", "language, merger:full"),
    "qvl_quantized_layers": ("language,in_proj_a:16bit", "language, in_proj_a:16bit"),
    "qvl_seed": ("7", "7"),
    "qvl_samples": ("9", "9"),
    "qvl_images": ("{folder}", "{folder}"),
    "qvl_card": ("t4", "t4"),
    "qvl_gpu_patience": ("60", "60"),
    "qvl_record": ("{folder}/record.json", "{folder}/record.json"),
    "qvl_html": ("{folder}/page.html", "{folder}/page.html"),
    "qvl_compare": ("shipped", "shipped"),
    "qvl_known_failures": ("{known}", "{known}"),
    "qvl_vram_limit": ("15 GiB", str(15 * 2**30)),
    "qvl_require_gpu": ("true", "True"),
}
BY_NAME = {setting.name: setting for setting in SETTINGS}


@pytest.fixture
def settings(pytester, monkeypatch):
    """The settings of a run with these arguments and environment."""
    for setting in SETTINGS:
        monkeypatch.delenv(setting.env, raising=False)

    def read(*arguments, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        # As the run has them that starts over where a value passes for a path to tests.
        return pytester.parseconfigure(*joined(arguments)[0]).stash[SETTINGS_KEY]

    return read


@pytest.fixture
def places(pytester):
    """Folders to fill into :data:`VALID`."""
    adapter = pytester.mkdir("adapter")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (adapter / "adapter_model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    known = pytester.path / "known.toml"
    known.write_text("")
    return {"known": str(known), "adapter": str(adapter), "folder": str(pytester.mkdir("folder"))}


def test_every_setting_has_an_example_here():
    assert set(VALID) >= set(BY_NAME)


def test_every_setting_has_its_row_in_the_documentation():
    page = (Path(__file__).parents[2] / "docs" / "settings.md").read_text(encoding="utf-8")
    row = r"^\| `(--[\w-]+)(?: (\w+))?`( \(repeatable\))? \| `(\w+)` \| `(\w+)`(?: \(comma-separated\))? \| (?:`(.+?)` )?\| "
    rows = {name: (flag, *more) for flag, *more in re.findall(row, page, re.MULTILINE) for name in [more[2]]}
    many = {True: " (repeatable)", False: ""}
    assert rows == {
        s.name: (s.flag, "" if s.switch else s.metavar, many[s.many], s.name, s.env, s.default or "") for s in SETTINGS
    }


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("by", ["flag", "environment", "ini", "toml"])
def test_every_setting_is_heard_from_everybody(pytester, settings, places, name, by):
    setting = BY_NAME[name]
    text, expected = (value.format(**places) for value in VALID[name])
    if by == "flag":
        chosen, source = settings(*([setting.flag] if setting.switch else [setting.flag, text])), setting.flag
    elif by == "environment":
        chosen, source = settings(**{setting.env: text}), setting.env
    elif by == "ini":
        pytester.makeini(f"[pytest]\n{name} = {text}\n")
        chosen, source = settings(), "tox.ini"
    else:
        native = {"linelist": f'["{text}"]', "int": text, "bool": text, "string": f'"{text}"'}[setting.ini_type]
        pytester.makepyprojecttoml(f"[tool.pytest]\n{name} = {native}\n")
        chosen, source = settings(), "pyproject.toml"
    value = getattr(chosen, name.removeprefix("qvl_"))
    shown = ", ".join(map(str, value)) if setting.many else str(value)
    assert shown == expected
    assert chosen.source(name.removeprefix("qvl_")) == source


@pytest.mark.parametrize("file", ["pytest.ini", "setup.cfg", "pyproject.toml", "pytest.toml"])
def test_a_setting_that_does_not_exist_is_refused_by_the_file_that_has_it(pytester, settings, file):
    section = {"setup.cfg": "tool:pytest", "pyproject.toml": "tool.pytest"}.get(file, "pytest")
    (pytester.path / file).write_text(f'[{section}]\nqvl_seed = "1"\nqvl_devise = "cpu"\n# qvl_cart\n')
    with pytest.raises(pytest.UsageError, match=rf"^qvl_devise \(.*{file}\): .*; did you mean qvl_device\?$"):
        settings()


def test_defaults_are_not_shown_but_for_the_model(settings):
    assert settings().described() == ["model embedded (default)"]


def test_a_repeated_flag_and_a_comma_separated_variable_are_lists_without_doubles(settings):
    several = settings("--qvl-model", "embedded", "--qvl-model", "a/b", "--qvl-model", "embedded")
    assert [str(source) for source in several.model] == ["embedded", "hub:a/b"]
    assert [str(s) for s in settings(QVL_MODEL=" a/b , embedded").model] == ["hub:a/b", "embedded"]


def test_relative_folders_of_a_flag_start_where_pytest_was_called(pytester, settings, monkeypatch):
    folder = pytester.mkdir("pictures")
    assert settings("--qvl-images", "pictures").images == folder
    monkeypatch.setenv("HOME", str(pytester.path))
    assert settings("--qvl-images", "~/pictures").images == folder
    assert settings("--qvl-record", "out/record.json").record == Path(pytester.path) / "out" / "record.json"


@pytest.mark.parametrize(("text", "value"), [("1", True), ("ON", True), ("yes", True), ("0", False), ("no", False)])
def test_truth_in_the_environment(settings, text, value):
    assert settings(QVL_REQUIRE_GPU=text).require_gpu is value


def test_settings_are_typed_and_frozen(settings):
    from dataclasses import FrozenInstanceError

    chosen = settings()
    assert {f"qvl_{name}" for name, kind in Settings.__annotations__.items() if kind != "Any"} >= set(BY_NAME)
    with pytest.raises(AttributeError, match="nothing"):
        chosen.nothing  # noqa: B018
    with pytest.raises(FrozenInstanceError):
        chosen.seed = 1


def test_the_header_says_what_the_reference_of_a_4_bit_folder_is(pytester, settings):
    import json
    import shutil

    from pytest_qvl.models.sources.embedded import embedded_model_dir

    folder = shutil.copytree(embedded_model_dir(), pytester.path / "saved")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    assert "its own 4-bit weights dequantized" in settings(f"--qvl-model={folder}").described()[-1]
    named = settings(f"--qvl-model={folder}", "--qvl-reference-model=embedded").described()
    assert named[1:] == ["reference model embedded (--qvl-reference-model)"]


TWICE = "given more than once, with the values"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--qvl-seed", "1", "--qvl-seed=2"), f"--qvl-seed: {TWICE} '1' and '2'; give it once"),
        (
            ("--qvl-fault", "scatter-off-by-one", "-q", "--qvl-fault", "rope-deltas-kept"),
            f"--qvl-fault: {TWICE} 'scatter-off-by-one' and 'rope-deltas-kept'; give it once",
        ),
        (
            ("--qvl-require-gpu", "--no-qvl-require-gpu"),
            f"--qvl-require-gpu: {TWICE} '--qvl-require-gpu' and '--no-qvl-require-gpu'; give it once",
        ),
        (("-o", "qvl_seed=1", "--override-ini=qvl_seed=2"), f"qvl_seed (-o): {TWICE} '1' and '2'; give it once"),
        (
            ("-o", "qvl_model=embedded", "-o", "qvl_model=a/b"),
            f"qvl_model (-o): {TWICE} 'embedded' and 'a/b'; give --qvl-model for each",
        ),
        (("@more.txt", "--qvl-device", "cpu"), f"--qvl-device: {TWICE} 'cuda' and 'cpu'; give it once"),
    ],
    ids=["flag", "name", "switch", "-o", "-o of a list", "file"],
)
def test_two_values_of_one_setting_are_refused_with_both_named(pytester, settings, arguments, says):
    (pytester.path / "more.txt").write_text("--qvl-device\ncuda\n")
    with pytest.raises(pytest.UsageError) as refused:
        settings(*arguments)
    assert str(refused.value) == says


def test_the_same_value_twice_and_a_nearer_place_are_no_contradiction(pytester, settings):
    pytester.makeini("[pytest]\naddopts = --qvl-seed 1 --qvl-samples=8\n")
    assert settings("--qvl-samples", "8", "--qvl-samples=8").samples == 8
    near = settings("--qvl-seed", "3", PYTEST_ADDOPTS="--qvl-seed=2 --qvl-device=cuda")
    assert (near.seed, near.device, near.samples) == (3, "cuda", 8)
    pytester.makeini("[pytest]\naddopts = --qvl-seed 1 --qvl-seed 2\n")
    with pytest.raises(pytest.UsageError, match="--qvl-seed: given more than once"):
        settings()
