"""The command and the function: exit codes, formats, refusals, and what a newcomer with a folder sees."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time

import pytest
from preflight_corpus import Workshop
from preflight_corpus.making import CONFIG, edit

from pytest_qvl.cli import main
from pytest_qvl.evidence import CannotJudge, CheckFailed
from pytest_qvl.models.policy import AdapterPolicy
from pytest_qvl.models.quantized_layers import QuantizedLayers
from pytest_qvl.models.sources import hub
from pytest_qvl.models.sources.embedded import embedded_model_dir
from pytest_qvl.models.sources.model_source import ModelSourceError
from pytest_qvl.preflight import preflight, require_green
from pytest_qvl.preflight.evidence import verdict
from pytest_qvl.preflight.questions import QUESTIONS

EMBEDDED = str(embedded_model_dir())


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("command"))


def test_a_healthy_pair_is_green_and_exits_with_0(shop, capsys):
    base, adapter = shop.base("qwen2_5_vl"), shop.adapter("qwen2_5_vl")
    assert main(["preflight", str(base), str(adapter)]) == 0
    out = capsys.readouterr().out
    assert "GREEN: 0 red" in out
    assert "all 42 keys of the file land, on 21 modules (language 21)" in out
    assert out.count(f"--qvl-model {base} --qvl-adapter {adapter} -k preflight") == 1


def test_a_broken_one_exits_with_1_and_json_says_all(shop, capsys):
    base = shop.base("qwen2_5_vl")
    assert main(["preflight", str(base), "--skip", "lm_head", "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["state"] == "red"
    assert data["counts"]["red"] == 1
    (red,) = [finding for finding in data["findings"] if finding["state"] == "red"]
    assert (red["question"], red["name"]) == (1, "vision-in-four-bits")
    assert red["cause"]
    assert red["fix"]
    assert red["keeps_green"]


def test_markdown_is_one_table(shop, capsys):
    assert main(["preflight", str(shop.base("qwen3_vl")), "--format", "md"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("**green**")
    assert {line.count("|") for line in lines[2:-2]} == {6}
    assert lines[-1].startswith("To keep it green: `pytest ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["qwen9-vl-1b"], "is unknown"),
        (["./nowhere"], "does not exist"),
        ([EMBEDDED, "./nowhere"], "does not exist"),
        ([EMBEDDED, EMBEDDED, "--merged", "./nowhere"], "--merged: the folder 'nowhere' does not exist"),
        ([EMBEDDED, "--processor", "./nowhere"], "--processor: the folder 'nowhere' does not exist"),
        ([EMBEDDED, EMBEDDED], "no adapter_config.json"),
        ([EMBEDDED, f"{EMBEDDED}/config.json"], "is a file; give the folder"),
        ([EMBEDDED, "--merged", "out"], "give its folder too"),
        ([EMBEDDED, "--card", "t5"], "card 't5' is unknown"),
        ([EMBEDDED, "--lora", "nowhere.json"], "there is no file"),
    ],
)
def test_invalid_input_is_one_line_and_exit_code_2(arguments, words, capsys):
    assert main(["preflight", *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_a_folder_of_another_kind_is_invalid_input(shop, capsys):
    base, adapter = str(shop.base("qwen2_5_vl")), shop.adapter("qwen2_5_vl")
    (output := shop.root / "output").mkdir()
    shop.copy(adapter).rename(output / "checkpoint-4")
    for arguments, words in (
        ([adapter], "which is no hub id: give the base first"),
        ([base, adapter, "--merged", adapter], "holds an adapter"),
        ([base, output], "checkpoint-4', one level down"),
        ([base, output / "checkpoint-4"], ""),
    ):
        assert main(["preflight", *map(str, arguments)]) == (2 if words else 0)
        assert words in capsys.readouterr().err


def test_another_method_is_not_judged_and_exits_with_2(shop, capsys):
    adapter = shop.adapter("qwen2_5_vl")
    edit(adapter / CONFIG, peft_type="IA3")
    assert main(["preflight", str(shop.base("qwen2_5_vl")), str(adapter)]) == 2
    out = capsys.readouterr().out
    assert "says peft_type 'IA3', and this package tests LoRA" in out
    assert "NOT JUDGED: 0 red" in out


@pytest.mark.parametrize(
    ("layers", "code", "said"),
    [
        ("language, q_proj:16bit", 0, "--qvl-quantized-layers 'language, q_proj:16bit' -k preflight"),
        (
            "language",
            1,
            "that the declaration (qvl_quantized_layers, --quantized-layers) has in 4 bits will stay in 16",
        ),
        (".*q_proj", 2, "is neither a part (language, "),
    ],
)
def test_declared_layers(shop, capsys, layers, code, said):
    skip = [word for entry in ("q_proj", "model.visual", "lm_head") for word in ("--skip", entry)]
    assert main(["preflight", str(shop.base("qwen2_5_vl")), *skip, "--quantized-layers", layers]) == code
    printed = capsys.readouterr()
    assert said in printed.out + printed.err


def test_a_base_saved_in_4_bits_may_name_layers_by_their_path_and_must_declare_others(shop):
    def judged(*entries):
        base = str(shop.packed("qwen2_5_vl", skip=("model.visual", "lm_head", *entries)))
        return {finding.name for finding in preflight(base, layers=QuantizedLayers()).red}

    assert judged("model.language_model.layers.0.mlp.down_proj") == set()
    assert judged("down_proj") == {"quantized-layers-in-16-bits"}


@pytest.mark.parametrize("made", ["AdaLoraConfig", "IA3Config"])
def test_a_configuration_of_another_method_is_not_judged(shop, made):
    from peft import AdaLoraConfig, IA3Config
    from transformers import BitsAndBytesConfig

    usual = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["model.visual", "lm_head"])
    config = {
        "AdaLoraConfig": lambda: AdaLoraConfig(init_r=6, target_r=4, total_step=20, target_modules=["q_proj"]),
        "IA3Config": lambda: IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    }[made]()
    said = {"AdaLoraConfig": "ADALORA", "IA3Config": "IA3"}[made]
    with pytest.raises(CannotJudge, match=f"configuration says peft_type '{said}', and this package tests LoRA"):
        require_green(str(shop.base("qwen2_5_vl")), None, config, usual)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"adapter": {"lora_alpha": "16"}}, "bad-setting"),
        ({"adapter": {"modules_to_save": ["lm_head"]}}, "keys-missing"),
        ({"adapter": {"target_modules": []}}, "no-target"),
        ({"base": {"quant_type": "fp4"}}, "not-nf4"),
        ({"config": {"hidden_act": "no such"}}, "bad-setting"),
    ],
)
def test_one_condition_is_one_red_line(shop, broken, said):
    base, adapter = shop.base("qwen2_vl"), shop.adapter("qwen2_vl")
    if "base" in broken:
        base = shop.packed("qwen2_vl", bnb_4bit_quant_type="fp4")
    if "config" in broken:
        base = shop.copy(base)
        edit(base / "config.json", lambda content: content["text_config"].update(broken["config"]))
    edit(adapter / CONFIG, **broken.get("adapter", {}))
    report = preflight(base, adapter)
    assert [finding.name for finding in report.red] == [said]
    assert not [f for f in report.red if "download" in f.fix]


def test_a_hub_that_does_not_answer_is_one_clear_error(monkeypatch):
    def offline(source):
        raise ModelSourceError(f"model {str(source)!r} is not in the local cache, and the hub does not answer")

    monkeypatch.setattr(hub, "_cache_only", offline)
    with pytest.raises(ModelSourceError, match="does not answer"):
        preflight("somebody/qwen2.5-vl-7b-finetuned")
    # Of releases the configuration is built in.
    report = preflight("Qwen/Qwen2.5-VL-7B-Instruct")
    assert report.state == "green"
    assert "built-in configuration of the release, because" in report.of(0)[0].line


def test_another_family_and_absurd_sizes_are_refused(shop):
    folder = shop.copy(shop.base("qwen2_5_vl"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llava\x1b[31m"}))
    with pytest.raises(ModelSourceError, match=r"model_type 'llava\\\\?x1b"):
        preflight(folder)
    (folder / "config.json").write_text(json.dumps({**config, "model_type": {}}))
    with pytest.raises(ModelSourceError, match="says model_type"):
        preflight(folder)
    config["text_config"]["num_hidden_layers"] = 10**9
    (folder / "config.json").write_text(json.dumps(config))
    report = preflight(folder)
    assert [finding.name for finding in report.red] == ["base-unsafe"]


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_a_list_in_place_of_a_table_is_red(shop, name):
    adapter = shop.adapter("qwen2_5_vl")
    fields = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**fields, name: ["q_proj"]}))
    report = preflight(shop.base("qwen2_5_vl"), adapter)
    assert any(f"{name} of adapter" in finding.line and "no table" in finding.line for finding in report.red)
    assert not any("error of its own" in finding.line for finding in report.findings)


def test_what_a_configuration_asks_to_run_is_not_run(shop):
    folder = shop.copy(shop.base("qwen2_5_vl"))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForImageTextToText": "evil.Evil"}, "attn_implementation": "stranger/kernel"}
    config["text_config"]["_attn_implementation"] = "stranger/kernel"
    (folder / "config.json").write_text(json.dumps(config))
    adapter = shop.adapter("qwen2_5_vl")
    fields = json.loads((adapter / "adapter_config.json").read_text())
    fields |= {"megatron_config": {"a": 1}, "megatron_core": "antigravity", "eva_config": {"rho": 2.0}}
    fields |= {"auto_mapping": {"base_model_class": "X", "parent_library": "antigravity"}, "init_lora_weights": "pissa"}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    assert preflight(folder, adapter).state == "green"
    assert "antigravity" not in sys.modules


def test_a_regular_expression_without_end_is_stopped(shop, monkeypatch):
    monkeypatch.setattr("pytest_qvl.preflight.timing.PATIENCE_S", 0.5)
    report = preflight(shop.base("qwen2_5_vl"), lora={"r": 8, "target_modules": r"(?:(?:\w+\.?)+)+Z"})
    assert "unsafe" in {finding.name for finding in report.of(2)}
    adapter = shop.adapter("qwen2_5_vl")
    edit(adapter / CONFIG, target_modules=r"(?:(?:\w+\.?)+)+Z")
    before = time.perf_counter()
    report = preflight(shop.base("qwen2_5_vl"), adapter)
    assert [finding.name for finding in report.red] == ["unsafe"]
    assert time.perf_counter() - before < 20  # it is waited for once, and not by every question


@pytest.mark.slow
def test_a_card_is_judged_by_the_forecast():
    assert [f.name for f in preflight(EMBEDDED, card="t4").of(8)] == ["fits"]
    assert [f.state for f in preflight(EMBEDDED).of(8)] == ["not judged"]


def test_a_base_that_cannot_run_has_no_forecast(shop):
    folder = shop.copy(shop.base("qwen2_vl"))
    edit(folder / "config.json", lambda content: content["text_config"].update(num_key_value_heads=3))
    report = preflight(folder, card="t4")
    assert "cannot-run" in {finding.name for finding in report.red}
    (finding,) = report.of(8)
    assert "there is no forecast" in finding.line


@pytest.mark.slow  # a forecast at true size
def test_a_card_that_is_too_small():
    (finding,) = preflight("qwen2.5-vl-7b", lora={"r": 1024, "target_modules": ["q_proj"]}, card="rtx3060-12gb").of(8)
    assert finding.name == "does-not-fit"
    assert "out of memory in" in finding.cause


def test_numbers_of_questions_are_those_of_the_documentation():
    assert [question.number for question in QUESTIONS] == sorted(question.number for question in QUESTIONS)
    assert {question.number for question in QUESTIONS} <= set(range(9))


def test_importing_it_is_cheap():
    code = "import sys, pytest_qvl.preflight.command; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_suite_fails_with_cause_and_fix(shop):
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    usual = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["model.visual", "lm_head"])
    leaking = LoraConfig(r=8, target_modules=["q_proj", "gate_proj"])
    base = str(shop.base("qwen2_5_vl"))
    assert require_green(base, None, LoraConfig(r=8, target_modules=["q_proj"]), usual).ok
    assert require_green(base, None, leaking, usual, policy=AdapterPolicy(("language", "vision"))).ok
    with pytest.raises(CheckFailed, match=r"vision 4.*match by name.*--adapter-policy language,vision"):
        require_green(base, None, leaking, usual)
    with pytest.raises(CheckFailed, match="from the quantization configuration; no entry of the list keeps vision"):
        require_green(base, None, None, BitsAndBytesConfig(load_in_4bit=True))


def test_messages_of_other_packages_are_as_they_were(shop):
    before = {name: logging.getLogger(name).level for name in ("bitsandbytes", "transformers")}
    preflight(shop.base("qwen2_5_vl"))
    assert {name: logging.getLogger(name).level for name in before} == before


def test_an_adapter_file_without_tensors_is_red(shop):
    from safetensors.torch import save_file

    adapter = shop.adapter("qwen2_vl")
    save_file({}, adapter / "adapter_model.safetensors", metadata={"format": "pt"})  # DeepSpeed#7900
    report = preflight(shop.base("qwen2_vl"), adapter)
    assert [finding.name for finding in report.red] == ["adapter-unreadable"]
    assert "holds no tensor" in report.red[0].line
    assert "ZeRO-3" in report.red[0].cause


def test_a_rank_of_millions_takes_no_memory(shop):
    import resource

    adapter = shop.adapter("qwen2_5_vl")
    edit(adapter / CONFIG, rank_pattern={"q_proj": 10**9})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = preflight(shop.base("qwen2_5_vl"), adapter)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB
    assert "other-rank" in {finding.name for finding in report.red}


def test_a_matrix_that_is_a_number_is_named(shop):
    import torch
    from safetensors.torch import load_file, save_file

    adapter = shop.adapter("qwen2_5_vl")
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    save_file({**tensors, name: torch.tensor(1.0)}, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    report = preflight(shop.base("qwen2_5_vl"), adapter)
    assert report.state == "red"
    assert "own-error" not in {finding.name for finding in report}


def test_a_question_that_breaks_off_is_not_green(shop, monkeypatch):
    from pytest_qvl.preflight.questions import targets

    def broken(subject):
        raise ZeroDivisionError("of its own")

    monkeypatch.setattr(targets, "answer", broken)
    report = preflight(shop.base("qwen2_5_vl"), shop.adapter("qwen2_5_vl"))
    assert report.state == "not judged"
    with pytest.raises(CannotJudge, match="error of its own: ZeroDivisionError"):
        verdict(report)


def test_a_plan_with_a_mistyped_field_is_red(shop):
    report = preflight(shop.base("qwen2_5_vl"), lora={"rank": 8, "target_modules": ["q_proj"]})
    assert {finding.name for finding in report.red} == {"bad-setting"}
    assert "has rank, which peft.LoraConfig does not know" in report.red[0].line


def test_a_quantization_that_is_a_text_is_red(shop):
    folder = shop.copy(shop.base("qwen2_vl"))
    edit(folder / "config.json", quantization_config="nf4")
    assert [finding.name for finding in preflight(folder).red] == ["base-bad-setting"]


def test_a_base_without_processor_files_is_told_so(shop, tmp_path):
    (tmp_path / "config.json").write_bytes((shop.base("qwen2_5_vl") / "config.json").read_bytes())
    found = [finding for finding in preflight(tmp_path) if finding.question == 6]
    assert [finding.state for finding in found] == ["not judged"]
    assert "neither the base nor the adapter has processor files at hand" in found[0].line
