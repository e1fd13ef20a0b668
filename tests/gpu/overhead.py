"""What the whole validation costs on top of the model calls that it needs.

    python tests/gpu/overhead.py --model synthetic:qwen2.5-vl-7b --out overhead.json
    python tests/gpu/overhead.py --model embedded --device cpu --out overhead.json
    python tests/gpu/overhead.py --since docs/records/h100-overhead-qwen2.5-vl-7b.json --out overhead.json

Three processes, one after the other on the same machine: the suite with a tape of every model call that its checks make
(:mod:`overhead_spy`; its time is not taken); a bare script (this file with ``--bare``), which imports the same libraries,
loads the same model and replays the tape, forwards, generates, backward passes, optimizer steps and the full-precision
reference, and nothing else; and the suite again, timed. The ratios are the suite's seconds over the script's, imports
included on both sides, and the suite's peak VRAM over the script's, each with and without the reference pass. The table
says where the suite's seconds went, test by test. With ``--since``, tests that an earlier result of this script does not
have are told apart: how long they take, and the ratio of all others over their own bare calls.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
GIB = 2**30


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="synthetic:qwen2.5-vl-7b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--since", type=Path, metavar="JSON", help="an earlier result: tests that it lacks are newer")
    parser.add_argument("--bare", type=Path, metavar="TAPE", help="replay this tape and write seconds to --out")
    options = parser.parse_args()
    if options.bare:
        return write(options.out, bare(options.model, options.device, options.bare))
    with tempfile.TemporaryDirectory(prefix="qvl-overhead-") as folder:
        tape = Path(folder) / "tape"
        taped = suite(options, Path(folder), {"QVL_OVERHEAD_TAPE": str(tape)})
        print(f"1 of 3, the suite with a tape: {taped['seconds']:.1f} s", flush=True)
        script = timed([sys.executable, __file__, "--bare", tape, "--out", tape.with_suffix(".json"), *model(options)])
        script |= json.loads(tape.with_suffix(".json").read_text())
        print(f"2 of 3, the bare script: {script['seconds']:.1f} s, {script['stages']}, {script['peaks']}", flush=True)
        earlier = options.since and json.loads(options.since.read_text())
        result = compared(suite(options, Path(folder), {}), script, earlier)
    print(told(result))
    return write(options.out, {"model": options.model, "device": options.device, **result})


def write(path, result):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def model(options):
    return ["--model", options.model, "--device", options.device]


def timed(command, **environment):
    paths = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))
    started, used = time.perf_counter(), cpu_seconds()
    done = subprocess.run(list(map(str, command)), env={**os.environ, "PYTHONPATH": paths, **environment}, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with exit code {done.returncode}")
    return {"seconds": time.perf_counter() - started, "cpu_seconds": cpu_seconds() - used}


def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def suite(options, folder, environment):
    found, record = folder / "found.json", folder / "record.json"
    command = [sys.executable, "-m", "pytest", "-q", "--pyargs", "pytest_qvl.suite", "-p", "overhead_spy"]
    command += ["-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", folder, "--qvl-record", record]
    command += ["--qvl-model", options.model, "--qvl-device", options.device]
    if options.device == "cuda":
        command += ["-m", "gpu", "--qvl-require-gpu"]
    result = timed(command, QVL_OVERHEAD_OUT=str(found), **environment)
    result |= json.loads(found.read_text())
    result["record"] = json.loads(record.read_text())
    return result


# ---- the bare script -------------------------------------------------------------------------------------


def bare(source, device, tape):
    """Load the model as the suite does, and make the calls on the tape with it; seconds and peaks by stage."""
    from overhead_spy import import_stack

    seconds, peaks, by_test = {}, {}, {}

    @contextlib.contextmanager
    def stage(name):
        if device == "cuda" and torch_cuda().is_initialized():
            torch_cuda().reset_peak_memory_stats()
        started = time.perf_counter()
        yield
        if device == "cuda":
            torch_cuda().synchronize()
            peaks[name] = {
                "allocated": torch_cuda().max_memory_allocated(),
                "reserved": torch_cuda().max_memory_reserved(),
            }
        seconds[name] = time.perf_counter() - started

    started = time.perf_counter()
    import_stack()
    seconds["imports"] = time.perf_counter() - started

    import gc

    import torch
    from peft import LoraConfig, get_peft_model

    from pytest_qvl.models.adapters import LANGUAGE_ONLY
    from pytest_qvl.models.backends import LoadRequest, backend
    from pytest_qvl.models.quantized import usual_quantization
    from pytest_qvl.models.sources.model_source import parse_model

    recorded = torch.load(tape, weights_only=True)
    calls = recorded["calls"]
    config = usual_quantization(torch.bfloat16)
    tensors = {key: value.to(device) for key, value in recorded["tensors"].items()}

    def load(quantization):
        return backend("transformers").load(LoadRequest(parse_model(source), quantization, device, "bfloat16"))

    if any(call["stage"] == "reference" for call in calls):
        with stage("reference"):
            full = load(None)
            replay(full, [call for call in calls if call["stage"] == "reference"], tensors, {})
            del full
            gc.collect()
        if device == "cuda":
            torch_cuda().empty_cache()
    quantized = [call for call in calls if call["stage"] == "quantized"]
    first = next((i for i, call in enumerate(quantized) if call.get("adapted")), len(quantized))
    plain = [call for call in quantized if not call.get("adapted", True)]
    with stage("load"):
        base = load(config)
    with stage("base model"):
        replay(base, plain, tensors, by_test)
    with stage("with adapter"):
        lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, bias="none", target_modules=LANGUAGE_ONLY)
        wrapped = get_peft_model(base, lora)
        replay(wrapped, [call for call in quantized[first:] if call.get("adapted", True)], tensors, by_test)
    counts = {}
    for call in calls:
        name = f"{call['stage']}: {call['kind']}"
        counts[name] = counts.get(name, 0) + 1
    return {"stages": seconds, "peaks": peaks, "calls": counts, "seconds_by_test": by_test}


def torch_cuda():
    import torch

    return torch.cuda


def replay(model, calls, tensors, by_test):
    import torch
    from transformers import GenerationConfig

    from pytest_qvl.models.anatomy import anatomy
    from pytest_qvl.models.training import checkpointing

    parts = anatomy(model)
    parts.base.generation_config = GenerationConfig()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-6) if trainable else None
    last = None
    for call in calls:
        kind = call["kind"]
        switched(by_test, call["test"])
        if kind == "backward":
            if last is not None and last.requires_grad:
                last.backward()
            last = None
            continue
        if kind == "step":
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            continue
        last = None  # a graph that nobody goes back through is let go before the next one grows
        inputs = {n: tensors[v["tensor"]] if isinstance(v, dict) else v for n, v in call["inputs"].items()}
        parts.core.rope_deltas = None
        model.train(call["training"])
        work = {"forward": model, "generate": model.generate, "vision": parts.core.get_image_features}[kind]
        if kind == "generate":
            steps = call.get("new_tokens", 1)  # as many as the check got, whatever made it stop
            only_inputs = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
            config = GenerationConfig(
                do_sample=False, min_new_tokens=steps, max_new_tokens=steps, use_cache=call.get("use_cache", True)
            )
            inputs = {**only_inputs, "generation_config": config}
        # What a check expects to be refused is refused here too, and nothing else may be.
        refused = contextlib.suppress(Exception) if call.get("raised") else contextlib.nullcontext()
        with torch.set_grad_enabled(call["grad"]), checkpointing(parts, call["checkpointing"]), refused:
            last = getattr(work(**inputs), "loss", None)
    switched(by_test, "")


def switched(by_test, test):
    """Calls of another test begin; what ran since the last time it did was the test's before."""
    now, began = by_test.pop("now", ("", 0.0))
    if test != now:
        if torch_cuda().is_initialized():
            torch_cuda().synchronize()
        if now:
            by_test[now] = by_test.get(now, 0.0) + time.perf_counter() - began
        began = time.perf_counter()
    if test:
        by_test["now"] = test, began


# ---- the comparison --------------------------------------------------------------------------------------


def compared(whole, script, earlier=None):
    """Ratios of the timed suite over the bare script, with and without the reference pass, and the table."""
    record = whole.pop("record")
    reference = script["stages"].get("reference", 0.0)
    tests = sorted(record["seconds_by_test"], key=lambda t: -total(t))
    peak = {"all": ("with_reference", None), "after_reference": ("without_reference", "reference")}
    vram = {}
    for key, (name, left_out) in peak.items():
        usage = whole["vram"].get(key)
        stages = [values for stage, values in script["peaks"].items() if stage != left_out]
        for of in ("allocated", "reserved") if usage and not usage["reason"] and stages else ():
            highest = max(values[of] for values in stages)
            vram[f"{name}_{of}"] = {"suite": usage[of], "script": highest, "ratio": usage[of] / highest}
    return {
        "ratio_with_reference": whole["seconds"] / script["seconds"],
        "ratio_without_reference": (whole["seconds"] - whole["reference"]) / (script["seconds"] - reference),
        "ratio_of_cpu_seconds": whole["cpu_seconds"] / script["cpu_seconds"],
        **(newer(earlier, whole, script, tests) if earlier else {}),
        "vram": vram,
        "suite": {key: whole[key] for key in ("seconds", "cpu_seconds", "imports", "reference")},
        "script": script,
        "seconds_by_test": tests,
        "outside_tests": whole["seconds"] - sum(map(total, tests)),
        "environment": record["environment"],
        "tests": record["tests"],
    }


def newer(earlier, whole, script, tests):
    """What the tests take that an earlier result lacks, and the ratio of the others over the calls of their own."""
    known = {function(test) for test in earlier["seconds_by_test"]}
    suite = sum(total(test) for test in tests if function(test) not in known)
    bare = sum(seconds for name, seconds in script["seconds_by_test"].items() if name not in known)
    names = sorted({function(test) for test in tests} - known)
    ratio = (whole["seconds"] - suite) / (script["seconds"] - bare)
    return {"ratio_of_earlier_tests": ratio, "newer_tests": {"names": names, "suite": suite, "script": bare}}


def function(test):
    return test["test"].partition("[")[0]


def total(test):
    return sum(test.get(when, 0.0) for when in ("setup", "call", "teardown"))


def told(result):
    suite, script = result["suite"], result["script"]
    lines = [
        f"suite {suite['seconds']:.1f} s, of which imports {suite['imports']:.1f} s, reference {suite['reference']:.1f} s",
        f"bare script {script['seconds']:.1f} s: " + ", ".join(f"{k} {v:.1f} s" for k, v in script["stages"].items()),
        f"ratio {result['ratio_with_reference']:.2f} with the reference, {result['ratio_without_reference']:.2f} without",
    ]
    ratio = (
        f"{suite['cpu_seconds']:.1f} s over {script['cpu_seconds']:.1f} s, ratio {result['ratio_of_cpu_seconds']:.2f}"
    )
    lines.append(f"CPU time, reference included (says more on a busy machine without a GPU): {ratio}")
    if "newer_tests" in result:
        told_newer = result["newer_tests"]
        lines.append(
            f"{len(told_newer['names'])} newer tests {told_newer['suite']:.1f} s, their calls alone "
            f"{told_newer['script']:.1f} s; ratio of the others {result['ratio_of_earlier_tests']:.2f}"
        )
    for name, values in result["vram"].items():
        sizes = f"{values['suite'] / GIB:.2f} GiB over {values['script'] / GIB:.2f} GiB"
        lines.append(f"peak VRAM {name}: {sizes}, ratio {values['ratio']:.3f}")
    lines += ["", f"{'test':<70} {'setup':>8} {'call':>8} {'teardown':>8}"]
    for test in result["seconds_by_test"]:
        columns = "".join(f" {test.get(when, 0.0):8.2f}" for when in ("setup", "call", "teardown"))
        lines.append(f"{test['test']:<70}{columns}")
    lines.append(f"{'outside of tests (starting, imports, collecting, ending)':<70} {result['outside_tests']:8.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
