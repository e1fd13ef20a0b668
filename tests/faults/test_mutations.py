"""Random mutations: drawn from a seed, made, judged, put back, and told."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import random
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pytest_qvl.checks.declared import declared
from pytest_qvl.cli import main
from pytest_qvl.faults.common_mode import reads_reference
from pytest_qvl.faults.matrix.pool import pooled
from pytest_qvl.faults.mutation import command, judging, running
from pytest_qvl.faults.mutation.code import CHANGES, draw_code, lines_run, sites_of
from pytest_qvl.faults.mutation.drawn import CODE, SETTING, SHARES, TENSOR, Mutation, draw
from pytest_qvl.faults.mutation.judging import (
    CAUGHT,
    EQUIVALENT,
    FIRST,
    MISSED,
    RAISES,
    THEN,
    UNRESOLVED,
    Judged,
    in_order,
    judge_mutation,
)
from pytest_qvl.faults.mutation.places import Places
from pytest_qvl.faults.mutation.probes import Healthy, probed
from pytest_qvl.faults.mutation.record import page, record, share_caught, totals
from pytest_qvl.faults.mutation.settings import draw_setting, settings_of
from pytest_qvl.faults.mutation.tensors import draw_tensor, tensors_of
from pytest_qvl.faults.tools import after, attribute, values
from pytest_qvl.models.anatomy import anatomy

SOURCE = '''
from functools import wraps

def doubled(function):
    @wraps(function)
    def inner(*args):
        return 2 * function(*args)
    return inner

@doubled
def arithmetic(a, b):
    """Mutations leave 3 texts alone."""
    if not a:
        raise ValueError(7)
    pair = (a, b)
    return max(pair[0] - 1, -b) + int(round(number=a, ndigits=b))

def never(a):
    return a + 5
'''


@pytest.fixture
def module(tmp_path: Path) -> Any:
    file = tmp_path / "small.py"
    file.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("small", file)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_code_that_runs_is_changed_behind_its_decorator_and_put_back(module: Any) -> None:
    with lines_run({module.__file__}) as lines:
        healthy = module.arithmetic(5, 3)
    sites = sites_of(lines)
    assert {site.change for site in sites if site.function[1] == "arithmetic"} == CHANGES.keys()
    assert not any(site.function[1] == "never" for site in sites)
    assert not any(site.line == SOURCE.splitlines().index("        raise ValueError(7)") + 1 for site in sites)
    seen = set()
    for number in range(60):
        mutation = draw_code(sites, random.Random(number))
        if mutation is None:
            continue
        with mutation.made():
            try:
                seen.add(module.arithmetic(5, 3))
            except Exception as error:
                seen.add(type(error).__name__)
        assert module.arithmetic(5, 3) == healthy
    assert len(seen) > 5


def test_tensors_are_changed_and_put_back_and_zeros_not_scaled() -> None:
    tensors = [
        ("weight", torch.randn(8, 64)),
        ("packed", torch.arange(256).to(torch.uint8)),
        ("scalar", torch.ones(())),
    ]
    before = [tensor.clone() for _, tensor in tensors]
    made = 0
    for number in range(100):
        mutation = draw_tensor(tensors, random.Random(number))
        if mutation is None:
            continue
        made += 1
        with mutation.made():
            different = [not torch.equal(tensor, old) for (_, tensor), old in zip(tensors, before, strict=True)]
            assert sum(different) == 1
            assert mutation.what.startswith(tensors[different.index(True)][0])
        assert all(torch.equal(tensor, old) for (_, tensor), old in zip(tensors, before, strict=True))
    assert made > 50


def test_settings_are_changed_and_put_back() -> None:
    owner = SimpleNamespace(eps=1e-6, flag=True, sections=[4, 6, 6], rope={"theta": 10.0, "type": "mrope"}, name="x")
    groups = [[("owner", owner, name)] for name in ("eps", "flag", "sections", "rope")]
    before = dict(vars(owner))
    changed = set()
    for number in range(60):
        mutation = draw_setting(groups, random.Random(number))
        if mutation is None:
            continue
        with mutation.made():
            (name,) = (name for name, value in vars(owner).items() if value != before[name])
            changed.add(name)
            assert mutation.what.startswith(f"owner.{name}: {before[name]!r} becomes ")
        assert vars(owner) == before
    assert changed == {"eps", "flag", "sections", "rope"}


def test_the_order_asks_the_healthy_reference_last() -> None:
    assert {*FIRST, *THEN} <= declared().keys()
    first, later = in_order(list(declared()))
    assert first == list(FIRST)
    assert [check for check in later if not reads_reference(check)][-1] == "golden_record"
    readers = [reads_reference(check) for check in later if check != "forecast_agrees"]
    assert readers == sorted(readers)
    assert sum(readers) >= 5


@pytest.fixture(scope="module")
def case() -> Any:
    """The embedded model in float32, without the reference, which takes longest to make."""
    from pytest_qvl import checks
    from pytest_qvl.checks.support.sizing import sizes_for
    from pytest_qvl.faults.case import ROW_SKILLS, Case, load, lora_config
    from pytest_qvl.faults.subject import embedded
    from pytest_qvl.models.sources.synthetic_processor import processor_for
    from pytest_qvl.samples import probe_samples, structure_rows

    torch.set_num_threads(1)
    subject = embedded("float32")
    processor = processor_for(subject.source)
    sizes = sizes_for(subject.source, processor)
    probes = probe_samples(sizes, 0, 1)
    loader = partial(load, subject=subject)
    reference: Any = None
    rows = [sample for sample in structure_rows(probes, sizes) if sample.skill in ROW_SKILLS]
    policy = checks.QuantizationPolicy(compute_dtype="float32")
    return Case(loader(), processor, lora_config(), policy, rows, probes, reference, loader, subject)


@pytest.fixture(scope="module")
def places(case: Any) -> Places:
    return Places.of(case)


@pytest.fixture(scope="module")
def healthy(case: Any) -> Healthy:
    return Healthy(probed(case), 1e-5, 1e-5)


def test_a_mutation_is_that_of_its_seed_and_number(places: Places) -> None:
    first, again, other = (draw(seed, 3, places).what for seed in (0, 0, 1))
    assert first == again != other
    kinds = [draw(0, number, places).kind for number in range(30)]
    assert set(kinds) == SHARES.keys()


def test_every_kind_has_places_of_the_real_model(places: Places, case: Any) -> None:
    names = [name for name, _ in places.tensors]
    assert any(name.endswith(".nested_absmax") for name in names)
    assert not any("lora_" in name for name in names)
    keys = {key for group in places.settings for _, _, key in group}
    assert keys >= {"variance_epsilon", "scaling", "mrope_section", "image_token_id", "image_mean", "eos_token_id"}
    files = {Path(site.file).name for site in places.sites}
    assert files >= {"modeling_qwen2_5_vl.py", "sdpa_attention.py", "bnb.py", "modules.py"}
    assert len(tensors_of(anatomy(case.model))) == len(places.tensors)
    assert len(settings_of(anatomy(case.model), case.processor)) == len(places.settings)


def in_function(places: Places, name: str, change: str) -> Mutation:
    sites = [site for site in places.sites if site.function[1] == name and site.change == change]
    return next(filter(None, (draw_code(sites, random.Random(number)) for number in range(10))))


CHECKS = ("weights_as_stored", "layer_arithmetic")


def test_outcomes_on_the_real_model(case: Any, places: Places, healthy: Healthy) -> None:
    from pytest_qvl.faults.matrix.restored import state

    parts = anatomy(case.model)
    norm: Any = parts.language_backbone.layers[1].input_layernorm
    weight = Mutation(TENSOR, "a weight", lambda: values(norm.weight, lambda w: w * 1.01))
    unused = Mutation(SETTING, "no setting", lambda: attribute(parts.text_config, "initializer_range", 0.5))
    absent = Mutation(CODE, "nothing", lambda: attribute(norm, "variance_epsilon", None))
    rotary = in_function(places, "apply_rotary_pos_emb_vision", "operator")
    before = state(case)
    found = [
        judge_mutation(mutation, 0, case, limits, checks)
        for mutation, limits, checks in (
            (weight, healthy, CHECKS),
            (rotary, healthy, CHECKS),
            (weight, healthy, ()),
            (weight, Healthy(healthy.probed, 1e3, 1e3), ()),
            (unused, healthy, ("layer_arithmetic",)),
            (absent, healthy, ()),
        )
    ]
    assert [one.outcome for one in found] == [CAUGHT, CAUGHT, MISSED, UNRESOLVED, EQUIVALENT, RAISES]
    assert [one.by for one in found] == ["weights_as_stored", "layer_arithmetic", "", "", "", ""]
    assert "layers.1.input_layernorm" in found[0].said
    assert state(case) == before
    assert probed(case).equals(healthy.probed)


def test_a_library_that_runs_no_model_is_not_caught_by_the_sizes_of_probes(case: Any, healthy: Healthy) -> None:
    """Sizes of videos are read from a configuration, which is run first."""
    block: Any = type(anatomy(case.model).vision_tower.blocks[0])  # type: ignore[index]

    def raises(*_: Any, **__: Any) -> None:
        raise IndexError("index 4 is out of bounds")

    broken = Mutation(CODE, "a block that raises", lambda: attribute(block, "forward", raises))
    found = judge_mutation(broken, 0, case, healthy, ["placeholder_counts"])
    assert (found.outcome, found.by) == (RAISES, "placeholder_counts")
    assert "describes a model that cannot run" in found.said


def test_a_step_of_the_generation_that_is_off_is_no_equivalent(case: Any, healthy: Healthy) -> None:
    def larger(_module: Any, _args: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits * 1.01 if logits.shape[1] == 1 else logits

    with after([anatomy(case.model).lm_head], larger):
        mutated = probed(case)
    assert mutated.replies.equal(healthy.probed.replies)
    assert healthy.resolves(mutated)


def test_positions_of_a_decoding_loop_of_ones_own_are_probed(case: Any, places: Places, healthy: Healthy) -> None:
    """``generate()`` counts on by itself and never reads these."""
    sites = [site for site in places.sites if site.function[1] == "get_rope_index" and site.change == "operator"]
    found = (draw_code(sites, random.Random(number)) for number in range(100))
    mutation = next(one for one in found if one is not None and "max() - 1 in mrope_position_deltas" in one.what)
    with mutation.made():
        mutated = probed(case)
    assert mutated.replies.equal(healthy.probed.replies)
    assert healthy.resolves(mutated)


def test_an_endless_mutation_is_stopped(case: Any, healthy: Healthy, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_: object) -> None:
        while True:
            pass

    norm: Any = anatomy(case.model).language_backbone.layers[0].input_layernorm
    monkeypatch.setattr(judging, "LIMIT", 0.2)
    found = judge_mutation(Mutation(CODE, "loop", lambda: attribute(norm, "forward", forward)), 0, case, healthy, ())
    assert found.outcome == RAISES
    assert found.said == "TimeoutError: it takes more than 0.2 s"
    assert probed(case).equals(healthy.probed)


def test_what_is_running_when_a_process_dies_is_left_and_the_rest_goes_on() -> None:
    left: list[Any] = []
    assert list(pooled(os._exit, [3], 1, None, left.extend)) == []
    assert left == [3]
    assert list(pooled(abs, [-1, -2], 1, None, left.extend)) == [(-1, 1), (-2, 2)]
    assert list(pooled(abs, [-1], 1, 0.0, left.extend)) == []


FOUND = [
    Judged(0, TENSOR, "w | all of it: times 0", CAUGHT, "weights_as_stored", seconds=1.0),
    Judged(1, CODE, "modeling.py:3: `a + b` becomes a - b", MISSED, seconds=9.0),
    Judged(2, CODE, "x", RAISES),
    Judged(3, SETTING, "y", EQUIVALENT),
    Judged(4, SETTING, "z", UNRESOLVED),
    Judged(5, CODE, "attention", CAUGHT, "alignment"),
]


def test_the_record_and_its_page_tell_what_was_missed(tmp_path: Path) -> None:
    data = json.loads(json.dumps(record(FOUND, 6, 0)))
    assert data["complete"]
    assert share_caught(data["mutations"]) == pytest.approx(2 / 3)
    assert totals(data)[0] == (
        "2 of 3 mutations that change something are caught (66.7 %), 1 of them only against the healthy reference"
    )
    assert totals(data)[2] == "6 of 6 drawn from seed 0 in 0.2 min of CPU, 9.0 s at most for one"
    text = page(data)
    assert "## Missed\n\n- 1: `modeling.py:3: 'a + b' becomes a - b`\n" in text
    assert "| weights_as_stored | 1 | 0: `w \\| all of it: times 0` |" in text
    file = tmp_path / "mutations.json"
    file.write_text(json.dumps(data))
    assert main(["faults", "--table", str(file), "--docs", str(tmp_path / "docs")]) == 0
    assert (tmp_path / "docs" / "mutations.md").read_text() == text


def test_a_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    asked: list[int] = []

    def judged(_seed: int, todo: list[int], _jobs: int, _deadline: float | None) -> Any:
        for number in todo[:4]:
            asked.append(number)
            yield FOUND[number]

    monkeypatch.setattr(running, "_judged", judged)
    out = tmp_path / "m.json"
    arguments = ["faults", "--random", "6", "--seed", "0", "--jobs", "1", "--out", str(out)]
    assert main(arguments) == command.BAD, "1 of 2 caught"
    assert (tmp_path / "m.json.part").exists()
    assert not json.loads(out.read_text())["complete"]
    assert main(arguments) == command.BAD
    assert asked == [0, 1, 2, 3, 4, 5]
    assert not (tmp_path / "m.json.part").exists()
    assert json.loads(out.read_text())["mutations"] == [asdict(one) for one in FOUND]
    assert "missed: 1, code: modeling.py:3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--random", "0"], "--random is a number of mutations from 1, not 0"),
        (["--random", "5", "--device", "cuda"], "--random takes no --device"),
        (["--random", "5", "--minutes", "-1"], "--minutes is a time above 0, not -1"),
        (["--seed", "5"], "--seed says which mutations --random draws: give both"),
    ],
)
def test_options_that_do_not_go_together(capsys: Any, arguments: list[str], says: str) -> None:
    assert main(["faults", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_functions_that_were_set_aside_are_found(places: Places) -> None:
    """``gc.freeze()`` hides objects from ``gc.get_objects()``: no expression of a model was found after one."""
    gc.freeze()
    files = {site.file: {site.line} for site in places.sites}
    assert {site.file for site in sites_of(files)} == set(files)
    assert gc.get_freeze_count(), "and are set aside again"
