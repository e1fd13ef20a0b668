"""The corpus through the preflight, through the libraries' own load, and through rivals: one table in docs/preflight.md.

    pip install --no-deps --target RIVALS peft-doctor adapterbridge deltalint && pip install --target RIVALS typer rich ...
    python tests/preflight/side_by_side.py --rivals RIVALS --docs docs/preflight.md

Every tool gets the same folders. A tool has *said* something of a broken one if it says what it does not say of healthy
ones of the same family; an error, warning or exception counts, whatever its words.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from preflight_corpus import BROKEN, HEALTHY, Case, Workshop

from pytest_qvl.outputs import between_marks
from pytest_qvl.preflight import preflight
from pytest_qvl.releases import stack

BEGIN, END = "<!-- side by side -->", "<!-- end of side by side -->"
PLAIN = (
    "base-alone",
    "language-backbone-by-an-expression",
    "processor-beside-the-adapter",
    "base-saved-in-4-bits",
    "a-plan",
)
PLAIN += ("a-list-with-entries-of-every-family",)
RIVALS = {"peft-doctor": "peft_doctor", "adapterbridge": "adapterbridge", "deltalint": "deltalint"}
# What a file of peft.LoraConfig's fields has beside those that a case is about.
USUAL = {"peft_type": "LORA", "lora_alpha": 16, "lora_dropout": 0.0, "bias": "none", "task_type": "CAUSAL_LM"}
Job = dict[str, Any]
Said = dict[str, list[str]]

# Each is run in a process of its own, with the jobs on stdin; prints {job id: [code of each error or warning]}.
_DOCTOR = """
import json, sys
from typer.testing import CliRunner
from peft_doctor.cli import app
def ask(*words):
    done = CliRunner().invoke(app, [*words, "-o", "json"])
    try:
        issues = json.loads(done.stdout)["issues"]
    except Exception:
        return ["crash"] if done.exception and not isinstance(done.exception, SystemExit) else []
    return [f"{i['severity']}:{i['code']}" for i in issues if i["severity"] in ("error", "warning")]
found = {}
for job in json.load(sys.stdin):
    said = []
    if job.get("adapter"):
        said += ask("adapter-integrity", job["adapter"]) + ask("inspect-adapter", job["adapter"], "-m", job["base"])
        said += ask("adapter-tensors", job["adapter"]) + ask("lora-config-check", job["adapter"] + "/adapter_config.json")
        said += ask("serving-check", job["adapter"], "--engine", "vllm" if job["runtime"] == "vllm" else "transformers")
    if job.get("lora_file"):
        said += ask("lora-config-check", job["lora_file"])
    if job.get("quantization_file"):
        said += ask("quantization-check", job["quantization_file"])
    for folder in job["processors"]:
        said += ask("generation-check", folder) + ask("chat-template-check", folder + "/tokenizer_config.json")
    found[job["id"]] = said
print("RESULT" + json.dumps(found))
"""
_BRIDGE = """
import json, sys
from typer.testing import CliRunner
from adapterbridge.cli import app
found = {}
for job in json.load(sys.stdin):
    if not job.get("adapter"):
        found[job["id"]] = []
        continue
    done = CliRunner().invoke(app, ["check", "-p", job["adapter"], "-t", "vllm", "-f", "json"])
    text = done.stdout.replace("\\n", " ")
    try:
        issues = json.loads(text)["issues"]
        found[job["id"]] = [f"{i['severity']}:{i['code']}" for i in issues if i["severity"] in ("error", "warning")]
    except Exception:
        found[job["id"]] = ["crash"]
print("RESULT" + json.dumps(found))
"""
_DELTALINT = """
import contextlib, io, json, sys
from deltalint.cli import main
found = {}
for job in json.load(sys.stdin):
    said = []
    if job.get("merged"):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                code = main(["check", "--base", job["base"], "--adapter", job["adapter"], "--merged", job["merged"]])
            except SystemExit as end:
                code = end.code
            except Exception:
                code = "crash"
        said = [] if code in (0, 3) else [f"error:exit {code}"]  # 3: it could not judge
    found[job["id"]] = said
print("RESULT" + json.dumps(found))
"""
RUNNERS = {"peft-doctor": _DOCTOR, "adapterbridge": _BRIDGE, "deltalint": _DELTALINT}


def main() -> int:
    """Make the corpus, ask everybody, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rivals", type=Path, action="append", default=[], help="folder that pip installed them into")
    parser.add_argument("--docs", type=Path, help="page with the marks to write the table between; else it is printed")
    options = parser.parse_args()
    logging.disable(logging.NOTSET)
    cases = [*BROKEN, *HEALTHY]
    with tempfile.TemporaryDirectory(prefix="qvl-preflight-") as folder:
        shop = Workshop(Path(folder))
        jobs = [job_of(case, shop, Path(folder)) for case in cases]
        ours = {job["id"]: our_names(job) for job in jobs}
        said = {"the libraries' own load": {job["id"]: libraries(job) for job in jobs}}
        for name, module in RIVALS.items():
            if found := rival(name, module, jobs, options.rivals):
                said[f"{name} {found[0]}"] = found[1]
    text = table(ours, said)
    if options.docs is None:
        print(text)
        return 0
    page = options.docs.read_text(encoding="utf-8")
    missing = f"{options.docs} has no place for the table: write {BEGIN} and {END} there"
    options.docs.write_text(between_marks(page, BEGIN, END, f"\n{text}\n", missing=missing), encoding="utf-8")
    return 0


def job_of(case: Case, shop: Workshop, folder: Path) -> Job:
    """What every tool is given of a case, as plain data."""
    arguments = dict(case.build(shop, case.family))
    base = str(arguments.pop("base"))
    job: Job = {"id": case.id, "base": base, "runtime": "transformers", **arguments}
    for name in ("adapter", "merged", "processor"):
        job[name] = str(job[name]) if job.get(name) else None
    if "lora" in arguments:
        job["lora_file"] = str(folder / f"{case.id}-lora.json")
        Path(job["lora_file"]).write_text(json.dumps({**USUAL, **arguments["lora"]}))
    config = Path(base) / "config.json"
    if "skip" in arguments or (config.is_file() and "quantization_config" in json.loads(config.read_text())):
        asked = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
        asked |= {"bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": arguments.get("skip")}
        saved = json.loads(config.read_text()).get("quantization_config") if "skip" not in arguments else None
        job["quantization_file"] = str(folder / f"{case.id}-quantization.json")
        Path(job["quantization_file"]).write_text(json.dumps(saved or asked))
    places = [job["processor"], job["adapter"]]
    job["processors"] = [place for place in places if place and (Path(place) / "tokenizer_config.json").is_file()]
    return job


def our_names(job: Job) -> list[str]:
    """Names of the preflight's red findings."""
    keep = ("adapter", "merged", "processor", "lora", "skip", "runtime")
    report = preflight(job["base"], **{name: job[name] for name in keep if job.get(name)})
    return [finding.name for finding in report.red]


def libraries(job: Job) -> list[str]:
    """What Transformers and PEFT say when they really load it, on the CPU: exceptions, and warnings of PEFT's."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    if not Path(job["base"]).is_dir():
        return []
    options: dict[str, Any] = {}
    logged = _Logged(level=logging.WARNING)
    logging.getLogger("transformers").addHandler(logged)
    if job.get("skip"):
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=list(job["skip"]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = AutoModelForImageTextToText.from_pretrained(job["base"], **options)
            if job.get("adapter"):
                PeftModel.from_pretrained(model, job["adapter"])
            elif job.get("lora"):
                get_peft_model(model, LoraConfig(**job["lora"]))
        except Exception as error:
            return [f"error:{type(error).__name__}"]
        finally:
            logging.getLogger("transformers").removeHandler(logged)
    texts = [*(str(each.message) for each in caught if issubclass(each.category, UserWarning)), *logged.texts]
    return [f"warning:{' '.join(re.sub(r'[^ -~]|[|`<>]', ' ', text).split()[:6])}" for text in texts]


class _Logged(logging.Handler):
    """What Transformers logs: its report of a load is no warning of Python's."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the text without its path, colours and numbers that differ from folder to folder."""
        self.texts.append(re.sub(r"/\S+|\x1b\[[0-9;]*m", "", record.getMessage()))


def rival(name: str, module: str, jobs: list[Job], folders: Iterable[Path]) -> tuple[str, Said] | None:
    """What a rival says of every job, and its version; ``None`` if it is not installed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "COLUMNS": "100000", "NO_COLOR": "1"}
    there = subprocess.run(
        [sys.executable, "-c", f"import {module}"], env=environment, capture_output=True, check=False
    )
    if there.returncode:
        print(f"{name} is not installed: {there.stderr.decode().splitlines()[-1]}", file=sys.stderr)
        return None
    code = RUNNERS[name]
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(jobs),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"^RESULT(.*)$", done.stdout, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    asked = f"from importlib.metadata import version; print(version({name!r}))"
    number = subprocess.run([sys.executable, "-c", asked], env=environment, capture_output=True, text=True, check=True)
    return number.stdout.strip(), json.loads(found[1])


def table(ours: Said, said: dict[str, Said]) -> str:
    """The table as Markdown, totals first."""
    usual = {tool: _usual(found) for tool, found in said.items()}
    rows: dict[str, list[list[str]]] = {}
    judged = [case for case in BROKEN if not case.versions or _is_broken_here(case)]
    named = sum(set(case.red) <= set(ours[case.id]) for case in judged)
    heard = dict.fromkeys(said, 0)
    for case in judged:
        cells = [case.name, case.family, _link(case.thread), ", ".join(f"`{name}`" for name in case.red)]
        for tool, found in said.items():
            more = [code for code in dict.fromkeys(found[case.id]) if code not in usual[tool][case.family]]
            heard[tool] += bool(more)
            cells.append("; ".join(more[:2]).replace("|", "/") or "–")
        rows.setdefault(case.name, []).append(cells)
    wrong = sum(bool(ours[case.id]) for case in HEALTHY)
    false = {
        tool: sum(any(c.startswith("error") or c == "crash" for c in f[case.id]) for case in HEALTHY)
        for tool, f in said.items()
    }
    head = ["broken", "family", "thread", "preflight", *said]
    totals = [
        "| | preflight | " + " | ".join(said) + " |",
        "| --- |" + " --- |" * (len(said) + 1),
        f"| broken, named or at least said | **{named} of {len(judged)}** | "
        + " | ".join(f"{heard[tool]} of {len(judged)}" for tool in said) + " |",
        f"| healthy, with an error all the same | **{wrong} of {len(HEALTHY)}** | "
        + " | ".join(f"{false[tool]} of {len(HEALTHY)}" for tool in said) + " |",
    ]  # fmt: skip
    lines = [f"With {stack()}; made by `python tests/preflight/side_by_side.py`.", "", *totals, ""]
    lines += [f"| {' | '.join(head)} |", "| --- " * len(head) + "|", *map(_row, rows.values())]
    return "\n".join(lines)


def _row(cases: list[list[str]]) -> str:
    """One line of a way to be broken, its families together."""
    columns = [", ".join(dict.fromkeys(cells)) for cells in zip(*cases, strict=True)]
    return f"| {' | '.join(columns)} |"


def _usual(found: Said) -> dict[str, set[str]]:
    """What a tool says of plain healthy ones, by family."""
    plain = [case for case in HEALTHY if case.name in PLAIN]
    return {
        family: {code for case in plain if case.family == family for code in found[case.id]} for family in _families()
    }


def _families() -> set[str]:
    return {case.family for case in HEALTHY}


def _is_broken_here(case: Case) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(case.versions).contains(version("transformers"), prereleases=True)


def _link(thread: str) -> str:
    if not thread:
        return ""
    parts = thread.removeprefix("https://github.com/").split("/")
    return f"[{parts[1]}#{parts[3]}]({thread})" if len(parts) > 3 else f"<{thread}>"


if __name__ == "__main__":
    sys.exit(main())
