"""What the command line says of the faults; the listing is light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pytest_qvl.cli import main
from pytest_qvl.faults import catalogue


def test_listing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["faults"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in catalogue())
    assert f"{len(catalogue())} faults" in out
    headings = [line for line in out.splitlines()[:-3] if line and not line.startswith(" ")]
    assert len(headings) == len(set(headings)), "each family once"


def test_explaining_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["faults", "scatter-off-by-one"]) == 0
    out = capsys.readouterr().out
    assert "caught by:  feature_scatter" in out
    assert main(["faults", "all-linear"]) == 0
    assert "which says: LoRA leaked into vision (20), merger (2)" in capsys.readouterr().out
    assert main(["faults", "says-token-zero"]) == 0
    assert "needs:      knowledge" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["scatter-of-by-one"],
            "no fault is called 'scatter-of-by-one'; did you mean 'scatter-off-by-one' or 'axis-off-by-one'?",
        ),
        (["zzz"], "no fault is called 'zzz'; `pytest-qvl faults` lists them"),
        (["--docs", "docs"], "--docs says where to write the pages of --matrix or --table: give one of them"),
        (
            ["--matrix", "scatter-off-by-one"],
            "--matrix takes every fault: drop 'scatter-off-by-one', or write --only scatter-off-by-one",
        ),
    ],
)
def test_nonsense_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    assert main(["faults", *arguments]) == 2
    assert capsys.readouterr().err == f"pytest-qvl faults: error: {says}\n"


def test_listing_imports_no_torch() -> None:
    code = "import sys; from pytest_qvl.faults.command import listed; listed(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


POOL = """
import multiprocessing, time
from concurrent.futures import ProcessPoolExecutor
from pytest_qvl.faults.matrix.pool import end_with_parent

def work():
    print("working", flush=True)
    time.sleep(30)
    print("outlived", flush=True)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent) as pool:
        pool.submit(work).result()
"""


def test_no_process_of_the_matrix_outlives_the_one_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "working\n"
        started.kill()
        assert started.stdout.read() == ""  # until the last process that holds the pipe's other end is gone
