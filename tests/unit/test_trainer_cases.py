"""Predicted first, measured with real trainers: cases, records, shards, the table, and a run without figures on the CPU."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model

from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.sources.embedded import embedded_model_dir
from pytest_qvl.vram.forecast import Request, phases
from pytest_qvl.vram.forecast.engine.build import asked_lora
from pytest_qvl.vram.forecast.source import find_source
from pytest_qvl.vram.forecast.validation import measured
from pytest_qvl.vram.forecast.validation.records import as_plain, digest, read_record, request_of, write_record
from pytest_qvl.vram.forecast.validation.rules_of_thumb import accelerate_int4
from pytest_qvl.vram.forecast.validation.trainers import measure, predict, table
from pytest_qvl.vram.forecast.validation.trainers.cases import (
    CARDS,
    MEASURED,
    PREDICTED,
    cases,
    families_cases,
    kernels_cases,
    kinds_cases,
    later_cases,
    liger_cases,
    name_of,
    olora_cases,
    refused,
    settings_cases,
)
from pytest_qvl.vram.forecast.validation.trainers.training import _as_it_was, check_rewritten, unsloth_flags

EMBEDDED = str(embedded_model_dir())
MIB = 1 << 20
DOCS = Path(__file__).parents[2] / "docs"


def _small(**changes: Any) -> Request:
    plain = {"image": (112, 112), "tokens": 40, "lora_r": 8, "precision": "bf16", "optimizer": "adamw_torch"}
    return Request(model=EMBEDDED, **{"checkpoint": "synthetic", **plain, **changes})


def _entry(request: Request, allocated: int = 1000 * MIB, reserved: int = 1200 * MIB) -> dict[str, Any]:
    verdicts = {
        "t4": {"available": 1100 * MIB, "fits": False, "tight": False, "fails_in": phases.BACKWARD},
        "l4": {"available": 2000 * MIB, "fits": True, "tight": False, "fails_in": None},
    }
    entry = {
        "name": name_of(request),
        "request": asdict(request),
        "allocated": allocated,
        "reserved": reserved,
        "verdicts": verdicts,
    }
    plain: dict[str, Any] = json.loads(json.dumps(entry))
    return plain


def _predictions(folder: Path, *requests: Request) -> Path:
    file = folder / "predictions.json"
    write_record(file, {"schema": PREDICTED, "versions": {}, "cases": [_entry(request) for request in requests]})
    return file


def _measured(folder: Path, predictions: Path, *cases: dict[str, Any], name: str = "measured.json") -> Path:
    file = folder / name
    write_record(
        file, {"schema": MEASURED, "predictions": digest(predictions), "device": "a GPU", "cases": list(cases)}
    )
    return file


def test_cases_cover_what_people_vary_and_have_names_of_their_own() -> None:
    found = cases()
    assert len({name_of(request) for request in found}) == len(found) >= 40
    assert {len(request.batch_of_samples) for request in found} >= {1, 2, 4, 8}
    assert {len(sample.images) for request in found for sample in request.batch_of_samples} >= {1, 2, 4}
    assert {request.lora_r for request in found} >= {8, 16, 32, 64, 128}
    assert len({request.optimizer for request in found}) >= 4
    assert {request.accumulation for request in found} == {1, 4}
    assert {request.gradient_checkpointing for request in found} == {True, False}
    assert {request.precision for request in found} == {"bf16", "fp16"}
    assert {request.trainer for request in found} == {"hf", "trl"}
    assert len({request.model for request in found}) == 5
    assert refused() == []


def test_cases_of_later_settings_have_names_of_their_own_and_come_back_from_a_file() -> None:
    found = [
        *settings_cases(),
        *kinds_cases(),
        *families_cases(),
        *liger_cases(),
        *kernels_cases(),
        *later_cases(),
        *olora_cases(),
    ]
    assert len({name_of(request) for request in (*cases(), *found)}) == len(cases()) + len(found)
    assert [request_of(as_plain({"request": asdict(request)})) for request in found] == found
    some = _small(lora_options=(("layers_to_transform", (0, 1)), ("rank_pattern", {"q_proj": 2})))
    assert request_of(as_plain({"request": asdict(some)})) == some


def test_a_prediction_has_the_peak_of_the_steps_and_a_verdict_for_each_card() -> None:
    request = _small()
    entry = predict.predict(request)
    assert request_of(entry) == request
    steps = {name: phase for name, phase in entry["phases"].items() if name in predict.STEPS}
    assert entry["allocated"] == steps[entry["peak_phase"]]["allocated"] == max(p["allocated"] for p in steps.values())
    assert entry["reserved"] == max(phase["reserved"] for phase in steps.values())
    assert set(entry["verdicts"]) == set(CARDS)
    assert all(verdict["fits"] for verdict in entry["verdicts"].values())


@pytest.mark.slow
def test_the_real_trainer_runs_cases_one_after_the_other_on_one_model(tmp_path: Path) -> None:
    """The first case fails and is recorded; the third would fail if the second left adapter, hooks or checkpointing."""
    saving = {"modules_to_save": ("lm_head",), "lora_dropout": 0.1, "evaluation": 2}
    requests = _small(lora_r=0), _small(accumulation=2, **saving), _small(gradient_checkpointing=False)
    predictions, record = _predictions(tmp_path, *requests), tmp_path / "record.json"
    assert measure.main([str(predictions), str(record), "--device", "cpu", "--steps", "2"]) == 1
    bad, first, second = read_record(record, MEASURED)["cases"]
    assert bad["status"] == "failed"
    assert "ValueError: `r` should be a positive integer" in bad["error"]
    for case in (first, second):
        assert case["status"] == "measured"
        assert case["not_measured"] == "no CUDA here: torch counts no memory of the CPU"
        assert case["updates"] == len(case["losses"]) == 2
        assert "allocated" not in case
    assert (first["vision_backward"], second["vision_backward"]) == (True, False)
    before = record.read_bytes()
    assert measure.main([str(predictions), str(record), "--device", "cpu"]) == 1  # goes on with nothing left to do
    assert record.read_bytes() == before


@pytest.mark.slow
def test_a_case_under_ddp_is_trained_by_two_processes(tmp_path: Path) -> None:
    predictions, record = _predictions(tmp_path, _small(ddp=True, accumulation=2)), tmp_path / "record.json"
    assert measure.main([str(predictions), str(record), "--device", "cpu", "--steps", "2"]) == 0
    (case,) = read_record(record, MEASURED)["cases"]
    assert (case["status"], case["ddp"], case["updates"]) == ("measured", "gloo, 2 processes", 2)


@pytest.mark.slow
def test_a_training_without_ddp_is_not_measured_as_one_with_it() -> None:
    """As the trainers train where there is one process."""
    found = measure.Bench("cpu", 1).run(_entry(_small(ddp=True)))
    assert found["status"] == "failed"
    assert "the trainer trained a PeftModel, not in DistributedDataParallel" in found["error"]


def _capped_bench(monkeypatch: pytest.MonkeyPatch, *, too_small: bool) -> tuple[measure.Bench, list[float]]:
    """A bench on the CPU, where caps are noted, and the caps under which it built its model."""
    fractions, built = [1.0], []
    real = measured.frozen_base

    def build(*arguments: Any) -> Any:
        built.append(fractions[-1])
        if too_small and fractions[-1] < 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*arguments)

    monkeypatch.setattr(measured, "frozen_base", build)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 4000 * MIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    return measure.Bench("cpu", 1), built


@pytest.mark.parametrize("too_small", [False, True])
def test_a_cap_is_on_while_the_model_is_built(monkeypatch: pytest.MonkeyPatch, too_small: bool) -> None:
    bench, built = _capped_bench(monkeypatch, too_small=too_small)
    request = _small()
    bench._model(request)
    found = {"allocated": 100 * MIB, "reserved": 100 * MIB, "built": {"allocated": 50 * MIB, "reserved": 60 * MIB}}
    verdict = {"available": 1000 * MIB, "fits": False, "fails_in": phases.LOAD}
    judged = bench._under_cap(request, verdict, found, 100 * MIB)
    assert built == [1.0, 0.25]
    assert (judged["ran"], judged["fits"]) == (True, not too_small)


def test_what_a_model_takes_to_be_built_decides_whether_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, built = _capped_bench(monkeypatch, too_small=False)
    found = {"allocated": 100 * MIB, "reserved": 100 * MIB, "built": {"allocated": 1500 * MIB, "reserved": 1600 * MIB}}
    verdict = {"available": 1000 * MIB, "fits": True, "fails_in": None}
    assert bench._under_cap(_small(), verdict, found, 100 * MIB) == {"ran": False, "fits": False}
    found["built"] = {"allocated": 500 * MIB, "reserved": 600 * MIB}
    assert bench._under_cap(_small(), verdict, found, 100 * MIB) == {"ran": False, "fits": True}
    assert built == []


@pytest.mark.slow
def test_nothing_holds_a_model_that_was_trained_and_dropped() -> None:
    """A library would: the embedding, where the trainer has asked for an optimizer of 8 bits."""
    bench = measure.Bench("cpu", 1)
    assert bench._train(_small(optimizer="adamw_8bit"), 1)["status"] == "measured"
    assert bench._built is not None
    left = [weakref.ref(parameter) for parameter in bench._built.base.parameters()]
    bench._built = None
    bench._settle()
    assert [parameter.shape for found in left if (parameter := found()) is not None] == []


def test_statistics_that_olora_replaces_are_held_by_nobody_while_it_trains() -> None:
    """1 byte for each 64 values of the base, and old ones that came back with the model afterwards."""
    request = _small(init_lora_weights="olora")
    model = measured.frozen_base(request, find_source(request.model), "cpu")
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    before = [weakref.ref(layer.weight.quant_state) for layer in layers]
    with _as_it_was(model):
        adapted = get_peft_model(model, asked_lora(anatomy(model), request))
        gc.collect()
        assert [found for found in before if found() is not None] == []
        adapted.unload()
    assert all(layer.quant_state is layer.weight.quant_state for layer in layers)


@pytest.mark.parametrize("left", [0, 500 * MIB])
def test_running_out_beside_an_earlier_model_is_no_verdict(monkeypatch: pytest.MonkeyPatch, left: int) -> None:
    bench, _ = _capped_bench(monkeypatch, too_small=True)
    monkeypatch.setattr(bench, "_allocated", lambda: left)
    found = {"allocated": 100 * MIB, "reserved": 100 * MIB, "built": {"allocated": 50 * MIB, "reserved": 60 * MIB}}
    verdict = {"available": 1000 * MIB, "fits": False, "fails_in": phases.LOAD}
    judged = bench._under_cap(_small(), verdict, found, 100 * MIB)
    assert judged["ran"]
    assert judged["fits"] is (None if left else False)
    assert judged.get("why") == ("500 MiB of an earlier model were still on the device" if left else None)


def test_unsloth_is_asked_for_language_linears_by_its_flags_and_not_by_whole_names() -> None:
    """It finds none of ``model.language_model.layers.0.mlp.up_proj`` among names like ``up_proj``."""
    request = _small(trainer="unsloth", checkpoint="nf4")
    names = [f"model.language_model.layers.{layer}.mlp.up_proj" for layer in range(2)]
    flags = unsloth_flags(LoraConfig(r=8, lora_alpha=8, target_modules=names), request)
    assert flags["target_modules"] is None
    assert (flags["finetune_vision_layers"], flags["finetune_language_layers"]) == (False, True)
    assert (flags["r"], flags["use_gradient_checkpointing"]) == (8, "unsloth")
    some = replace(request, lora_targets=("q_proj", "v_proj"), gradient_checkpointing=False)
    flags = unsloth_flags(LoraConfig(target_modules=list(some.lora_targets)), some)
    assert (flags["target_modules"], flags["use_gradient_checkpointing"]) == (["q_proj", "v_proj"], False)


def test_a_record_of_other_predictions_is_not_gone_on_with(tmp_path: Path) -> None:
    predictions = _predictions(tmp_path, _small())
    record = _measured(tmp_path, predictions)
    _predictions(tmp_path, _small(tokens=44))
    with pytest.raises(ValueError, match="was measured for other predictions: name another file"):
        measure.main([str(predictions), str(record), "--device", "cpu"])


def test_shards_share_all_cases_and_keep_those_of_a_model_together() -> None:
    entries = [_entry(request) for request in cases()]
    shards = [measure.in_shard(entries, (k, 3)) for k in (1, 2, 3)]
    names = [entry["name"] for shard in shards for entry in shard]
    assert sorted(names) == sorted(entry["name"] for entry in entries)
    assert max(map(len, shards)) - min(map(len, shards)) <= len(entries) // 4
    for shard in shards:
        kinds = [measure.kind_of(request_of(entry)) for entry in shard]
        assert len(set(kinds)) == 1 + sum(a != b for a, b in pairwise(kinds))


def _found(request: Request, allocated: float, reserved: float, **caps: Any) -> dict[str, Any]:
    sizes = {"allocated": int(allocated * MIB), "reserved": int(reserved * MIB)}
    return {"name": name_of(request), "status": "measured", "seconds": 5.0, **sizes, "caps": caps}


def test_the_table_is_made_from_the_records(tmp_path: Path) -> None:
    near, wrong, lost = _small(), _small(tokens=44), _small(tokens=48)
    predictions = _predictions(tmp_path, near, wrong, lost)
    derived, trained = {"ran": False, "fits": True}, {"ran": True, "fits": False}
    one = _measured(tmp_path, predictions, _found(near, 990, 1250, t4=trained, l4=derived), name="1.json")
    two = _measured(
        tmp_path,
        predictions,
        _found(wrong, 1100, 1210, t4={"ran": True, "fits": True}),
        {"name": name_of(lost), "status": "failed", "error": "RuntimeError: no", "caps": {}, "seconds": 1.0},
        name="2.json",
    )
    text = table.render(table.rows_of(predictions, [one, two]))
    assert "2 of 3 cases are measured." in text
    assert f"allocated: off by 5.05% on average, 9.09% at worst ({name_of(wrong)})" in text
    assert "right in 2 of 3 cases under the caps of cards, 2 of them trained under the cap" in text
    assert f"| {name_of(near)} | 1,000 | 990 | +1.01% | 1,200 | 1,250 | -4.00% | no (trained) | fits |" in text
    assert f"| {name_of(wrong)} | 1,000 | 1,100 | -9.09% |" in text
    assert "**fits (trained); forecast: no**" in text
    assert f"- {name_of(lost)}: RuntimeError: no" in text


def test_what_is_reserved_beside_an_earlier_model_is_not_judged(tmp_path: Path) -> None:
    first, second = _small(), _small(tokens=44)
    predictions = _predictions(tmp_path, first, second)
    beside = {**_found(second, 1010, 1800), "baseline": 600 * MIB}
    text = table.render(
        table.rows_of(predictions, [_measured(tmp_path, predictions, _found(first, 990, 1190), beside)])
    )
    assert f"Peak reserved: off by 0.84% on average, 0.84% at worst ({name_of(first)})" in text
    assert "Not judged (–) is what 1 of them reserved" in text
    assert f"| {name_of(second)} | 1,000 | 1,010 | -0.99% | 1,200 | 1,800 | – |" in text


def test_the_table_goes_between_the_marks_of_a_page_and_is_checked_there(tmp_path: Path) -> None:
    request = _small()
    predictions = _predictions(tmp_path, request)
    record = _measured(tmp_path, predictions, _found(request, 990, 1250))
    page = tmp_path / "page.md"
    page.write_text("no marks\n")
    with pytest.raises(ValueError, match="the page lacks the marks"):
        table.main([str(predictions), str(record), "--write", str(page)])
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    command = [str(predictions), str(record), "--write", str(page)]
    assert table.main([*command, "--check"]) == 1
    assert table.main(command) == 0
    assert table.main([*command, "--check"]) == 0
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")
    assert "| +1.01% |" in page.read_text()


def test_a_model_without_unsloths_loss_is_not_measured(tmp_path: Path) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration as Stock

    with pytest.raises(
        RuntimeError, match="Transformers' own Qwen2_5_VLForConditionalGeneration, which has all logits"
    ):
        check_rewritten(Stock)
    written = tmp_path / "unsloth_compiled_module_qwen2_5_vl.py"  # as its compiler names it
    written.write_text("def forward(self):\n    pass\n")
    found: dict[str, Any] = {}
    exec(compile(written.read_text(), written, "exec"), found)
    check_rewritten(type("Rewritten", (Stock,), {"forward": found["forward"]}))


@pytest.mark.parametrize(
    ("kind", "page"),
    [
        ("trainer", "forecast.md"),
        ("settings", "records/forecast-settings.md"),
        ("kinds", "records/forecast-kinds.md"),
        ("families", "records/forecast-families.md"),
        ("unsloth", "records/forecast-unsloth.md"),
        ("later", "records/forecast-later.md"),
        ("liger", "records/forecast-liger.md"),
        ("kernels", "records/forecast-kernels.md"),
        ("olora", "records/forecast-olora.md"),
    ],
)
def test_the_committed_page_has_the_table_of_the_committed_records(kind: str, page: str) -> None:
    predictions, records = _committed(kind)
    assert records
    assert table.main([*map(str, [predictions, *records, "--write", DOCS / page]), "--check"]) == 0


def test_readme_and_peers_say_what_the_committed_records_say() -> None:
    """Cases and errors of the peak allocated, and verdicts; Unsloth's of the kinds trained another class."""
    others = ("settings", "families", "unsloth", "later", "liger", "kernels", "olora")
    rows = {kind: table.rows_of(*_committed(kind)) for kind in ("trainer", *others, "kinds")}
    rows["kinds"] = [row for row in rows["kinds"] if row.entry["request"]["trainer"] != "unsloth"]
    peers = (DOCS / "peers.md").read_text(encoding="utf-8")
    for of_kind in rows.values():
        mean, worst = _errors([row.error("allocated") for row in of_kind])
        assert f"| {mean} on average, {worst} at worst | {len(of_kind)} |" in peers
    later = [row for kind in others for row in rows[kind]]
    first = [*rows["trainer"], *later]
    assert peers.count(f"{len(first)} trainings by the real") == 1
    verdicts = [_verdicts(of) for of in (first, rows["kinds"])]
    said = " ".join(peers.split())
    assert "{} of {} verdicts of the {}".format(*verdicts[0][:2], len(first)) in said
    assert "{} of {} of the {}".format(*verdicts[1][:2], len(rows["kinds"])) in said
    assert f"{verdicts[0][2] + verdicts[1][2]} of them trained under the card's cap" in said
    readme = " ".join((DOCS.parent / "README.md").read_text(encoding="utf-8").split())
    assert f"Of {len(rows['trainer'])} trainings by the real" in readme
    assert (
        "{} on average and {} at worst".format(*_errors([row.error("allocated") for row in rows["trainer"]])) in readme
    )
    assert f"of {len(later)} more, with DoRA" in readme
    assert "by {} and {} ([tables".format(*_errors([row.error("allocated") for row in later])) in readme


def _committed(kind: str) -> tuple[Path, list[Path]]:
    """The committed predictions of a kind, and the records that measured them."""
    records = DOCS / "records"
    return records / f"forecast-{kind}-predictions.json", sorted(records.glob(f"h200-forecast-{kind}-measured-*.json"))


def test_peers_say_what_accelerate_answers_of_the_same_cases() -> None:
    rows = table.rows_of(*_committed("trainer"))
    models = {row.entry["request"]["model"] for row in rows}
    answers = {model: accelerate_int4(find_source(model).config) for model in models}
    found = [(answers[row.entry["request"]["model"]], row.found) for row in rows if row.found]
    mean, worst = _errors([answer / of["allocated"] - 1 for answer, of in found])
    said = f"int4, of the first {len(found)} ² | {mean} on average, {worst} at worst | {len(found)} |"
    assert said in (DOCS / "peers.md").read_text(encoding="utf-8")


def _errors(errors: list[float]) -> tuple[str, str]:
    """Their mean and the largest, whatever their signs, as pages write them."""
    sizes = [abs(error) for error in errors]
    return f"{sum(sizes) / len(sizes) * 100:.2f} %", f"{max(sizes) * 100:.2f} %"


def _verdicts(rows: list[table.Row]) -> tuple[int, int, int]:
    """Right ones, all, and those trained under a cap."""
    verdicts = [verdict for row in rows for verdict in row.verdicts()]
    return sum(forecast == fits for _, forecast, fits, _ in verdicts), len(verdicts), sum(v[3] for v in verdicts)


def test_a_case_measured_twice_is_refused(tmp_path: Path) -> None:
    request = _small()
    predictions = _predictions(tmp_path, request)
    records = [_measured(tmp_path, predictions, _found(request, 1, 1), name=name) for name in ("1.json", "2.json")]
    with pytest.raises(ValueError, match="name each case once"):
        table.rows_of(predictions, records)
