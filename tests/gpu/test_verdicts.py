"""A leak, a limit, out of memory and a crash on a real GPU: each ends in the verdict that names it."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.gpu


@pytest.fixture
def run(torch, pytester):  # torch first: pytester forgets what is imported after it, and torch cannot come twice
    """Run a test file on the embedded model on CUDA, in a process of its own that uses this one's lease."""

    def run_file(text):
        pytester.makepyfile(test_x="import pytest, torch\nMiB = 1 << 20\n" + text)
        return pytester.runpytest_subprocess(
            "-m", "gpu", "-p", "no:cacheprovider", "--qvl-record", "record.json", "--junitxml=out.xml"
        )

    return run_file


def session(pytester):
    return {one["name"]: one["state"] for one in json.loads((pytester.path / "record.json").read_text())["session"]}


def test_what_only_trains_and_generates_leaks_nothing(run, pytester):
    result = run("""
def test_generates(qvl_lora_model, qvl_batch, qvl_image_samples):
    qvl_lora_model.generate(**qvl_batch(qvl_image_samples[:2]), max_new_tokens=4, do_sample=False)
def test_trains(qvl_lora_model, qvl_batch, qvl_image_samples):
    qvl_lora_model.train()
    qvl_lora_model(**qvl_batch(qvl_image_samples[:2], padding_side="right", answers=True)).loss.backward()
def test_base(qvl_quantized_model): pass
def test_fails(qvl_lora_model):
    kept = torch.empty(512 * MiB, dtype=torch.uint8, device="cuda")
    assert kept is None
def test_fails_in_a_closure(qvl_lora_model):
    kept = torch.empty(512 * MiB, dtype=torch.uint8, device="cuda")
    def inner(): assert kept is qvl_lora_model
    inner()
""")
    result.assert_outcomes(passed=3, failed=2)
    assert session(pytester) == {"leak": "kept"}


def test_a_leak_is_named(run, pytester):
    result = run("""
KEPT = []
def test_leaks(qvl_lora_model): KEPT.append(torch.empty(512 * MiB, dtype=torch.uint8, device="cuda"))
def test_innocent(qvl_lora_model): pass
""")
    result.assert_outcomes(passed=2, errors=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "test_x.py::test_leaks[[]embedded-cuda] leaks: 512 MiB of GPU memory stayed allocated*",
            "  512 MiB held by a tensor * of uint8, kept by a list in test_x.KEPT",
        ]
    )
    assert session(pytester) == {"leak": "BROKEN"}


def test_a_limit_names_test_and_session(run, pytester):
    result = run("""
@pytest.mark.limit_vram("100 MiB", of="allocated")
@pytest.mark.limit_vram("100 MiB", of="allocated", scope="session")
def test_over(qvl_lora_model): torch.empty(200 * MiB, dtype=torch.uint8, device="cuda")
""")
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["peak allocated * above the limit of 100 MiB in test_x.py::test_over*"])
    assert session(pytester) == {"peak allocated": "BROKEN", "leak": "kept"}


def test_out_of_memory_says_how_much_and_leaves_room(run, pytester):
    result = run("""
def test_greedy(qvl_lora_model, qvl_vram):
    half = torch.empty(torch.cuda.mem_get_info()[0] // 2, dtype=torch.uint8, device="cuda")
    with qvl_vram.phase("train step"):
        torch.empty(torch.cuda.mem_get_info()[1], dtype=torch.uint8, device="cuda")
def test_next(qvl_lora_model): torch.empty(torch.cuda.mem_get_info()[0] * 3 // 4, dtype=torch.uint8, device="cuda")
""")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["qvl: *test_greedy*: out of GPU memory in phase 'train step': * GiB were asked for;*"])
    assert session(pytester) == {"leak": "kept"}


def test_a_crash_names_its_test_and_the_rest_is_not_run(run, pytester):
    result = run("""
def test_breaks(qvl_lora_model): torch.zeros(4, device="cuda")[torch.tensor([9], device="cuda")]
def test_after(qvl_lora_model): pass
@pytest.mark.gpu
def test_own(): torch.ones(1, device="cuda")
""")
    result.assert_outcomes(failed=1, errors=2)
    result.stdout.fnmatch_lines(["qvl: *test_breaks* broke CUDA (call): *; 2 later GPU tests were not run"])
    assert session(pytester) == {"leak": "not judged"}
