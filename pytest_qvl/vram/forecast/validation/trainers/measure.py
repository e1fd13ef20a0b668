"""Run every predicted case with its real trainer on this GPU and keep what it used, a record after each case.

``python -m pytest_qvl.vram.forecast.validation.trainers.measure PREDICTIONS.json RECORD.json --shard 1/2``. Started
again, it goes on with what the record lacks.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import sys
import time
import traceback
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl.vram.forecast import phases
from pytest_qvl.vram.forecast.validation.records import digest, read_record, request_of, versions, write_record
from pytest_qvl.vram.forecast.validation.trainers.cases import MEASURED, PREDICTED
from pytest_qvl.vram.units import MiB

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    from pytest_qvl.vram.forecast.request import Request

PACKAGES = (
    *("pytest-qvl", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "datasets"),
    *("unsloth", "unsloth_zoo", "liger-kernel", "flash-linear-attention", "fla-core", "causal-conv1d", "triton"),
)
# Nearer than this to the edge of a card, by the forecast, the training is run under the card's cap.
EDGE = 0.15
# What may stay allocated after a case: more means that it left something behind, and the model is built anew.
LEFT = MiB
CUDA_BROKEN = 3
# Seconds that another process of DDP has to end once the first has.
PATIENCE = 60
# Of a case under DDP: accelerate wraps no model in it for one process alone.
PROCESSES = 2


@dataclass
class _Built:
    """A model that serves several cases.

    Attributes:
        base: The model, without an adapter.
        source: Its configuration.
        baseline: Bytes allocated before it was built: what a model that was dropped before has left.
        resident: Bytes allocated once it was built, the baseline included.
        peak: Most bytes allocated, without the baseline, and reserved while it was built; nothing without CUDA.
    """

    base: Any
    source: Any
    baseline: int
    resident: int
    peak: dict[str, int]


class Bench:
    """Measures cases of one kind one after the other, on one model as long as none leaves anything behind.

    Args:
        device: ``"cuda"``, or ``"cpu"`` to see that the cases run.
        steps: Updates of each training.
        ddp_backend: By what the processes of DDP speak; ``None`` for what the trainers take.
    """

    def __init__(self, device: str, steps: int, ddp_backend: str | None = None) -> None:
        self._device, self._steps, self._ddp_backend = device, steps, ddp_backend
        self._built: _Built | None = None

    def run(self, entry: dict[str, Any]) -> dict[str, Any]:
        """One case: what it used, and what came of it under the caps of cards it is near to."""
        started = time.perf_counter()
        request = request_of(entry)
        found = {"name": entry["name"], **self._train(request, self._steps)}
        found["caps"] = {
            card: self._under_cap(request, verdict, found, entry["reserved"])
            for card, verdict in entry["verdicts"].items()
            if found.get("reserved")
        }
        return {**found, "seconds": round(time.perf_counter() - started, 1)}

    def _train(self, request: Request, steps: int) -> dict[str, Any]:
        """What one training used, or the sentence it ended with."""
        import torch

        from pytest_qvl.vram.cap import pinned_attention
        from pytest_qvl.vram.forecast.validation.trainers.training import train_with_trainer

        try:
            built = self._model(request)
            self._settle()
            with pinned_attention(request.capability):
                trained = train_with_trainer(
                    built.base, request, built.source, self._device, steps, ddp_backend=self._ddp_backend
                )
        except torch.OutOfMemoryError as error:
            return {"status": "out of memory", "error": _sentence(error), **self._after(error)}
        except Exception as error:
            return {"status": "failed", "error": _sentence(error), "where": _place(error), **self._after(error)}
        used = trained.peaks.by_phase
        figures: dict[str, Any] = {"not_measured": "no CUDA here: torch counts no memory of the CPU"}
        if used:
            figures = {
                "baseline": built.baseline,
                "resident": built.resident - built.baseline,
                "built": built.peak,
                "allocated": max(allocated for allocated, _ in used.values()) - built.baseline,
                "reserved": max(reserved for _, reserved in used.values()),
                "phases": {
                    name: {"allocated": allocated - built.baseline, "reserved": reserved}
                    for name, (allocated, reserved) in used.items()
                },
            }
        return {
            "status": "measured",
            **figures,
            "updates": trained.updates,
            "losses": trained.losses,
            "vision_backward": trained.vision_backward,
            **({"ddp": trained.ddp} if trained.ddp else {}),
            **self._after(None),
        }

    def _under_cap(
        self, request: Request, verdict: dict[str, Any], found: dict[str, Any], forecast: int
    ) -> dict[str, Any]:
        """Whether it fits what a card leaves the allocator.

        It is built and trained under that cap where it is near, or where the forecast says that it cannot be built;
        else that is derived.
        """
        import torch

        available = verdict["available"]
        near = min(abs(size / available - 1) for size in (forecast, found["built"]["reserved"])) <= EDGE
        asks = near or verdict["fails_in"] in {phases.LOAD, phases.PREPARE}
        allocated, reserved = (max(found[what], found["built"][what]) for what in ("allocated", "reserved"))
        # What is reserved without a cap may be given back under one; what is allocated may not.
        if (reserved <= available or allocated > available) and (request.ddp or not asks):
            return {"ran": False, "fits": reserved <= available}
        total = torch.cuda.mem_get_info()[1]
        if request.ddp:
            return {"ran": False, "fits": None, "why": "the processes of DDP are not trained under a cap"}
        if available > total:
            return {"ran": False, "fits": None, "why": f"this GPU has {total} bytes, less than the card leaves"}
        self._built = None  # the card has to hold its loading too
        self._settle()
        beside = self._allocated()
        torch.cuda.set_per_process_memory_fraction(available / total)
        try:
            run = self._train(request, 2)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        fits = {"measured": True, "out of memory": False}.get(run["status"])
        judged = {"ran": True, "fits": fits, "reserved": run.get("reserved"), "error": run.get("error")}
        if fits is False and beside > LEFT:
            why = f"{beside / MiB:,.0f} MiB of an earlier model were still on the device"
            return {**judged, "fits": None, "why": why}
        return judged

    def _model(self, request: Request) -> _Built:
        import torch

        from pytest_qvl.vram.forecast.source import find_source
        from pytest_qvl.vram.forecast.validation.measured import frozen_base
        from pytest_qvl.vram.forecast.validation.trainers.training import unsloth_base

        if self._built is not None:
            return self._built
        self._settle()  # whoever dropped a model before held it until its training returned
        source, baseline = find_source(request.model), self._allocated()
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if request.trainer == "unsloth":
            base = unsloth_base(request, self._device)
        else:
            base = frozen_base(request, source, self._device)
        if request.kbit_upcast:
            from peft import prepare_model_for_kbit_training

            prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        peak = {}
        if self._device == "cuda":
            allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            peak = {"allocated": allocated - baseline, "reserved": reserved}
        self._settle()
        self._built = _Built(base, source, baseline, self._allocated(), peak)
        return self._built

    def _after(self, error: BaseException | None) -> dict[str, Any]:
        """Clean up; the model is built anew if a case failed or left something on the device."""
        import torch

        if error is not None:
            traceback.clear_frames(error.__traceback__)  # they hold the batch and the graph
        self._settle()
        if self._built is None:
            return {}
        left = self._allocated() - self._built.resident
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        unsloth = "unsloth" in sys.modules  # which changes the model for good
        if unsloth or abs(left) > LEFT or (error is not None and not out_of_memory):
            self._built = None
        return {"left_behind": left} if abs(left) > LEFT and not unsloth else {}

    def _settle(self) -> None:
        """Without garbage, library workspaces and cached memory."""
        import torch

        gc.collect()
        if self._device == "cuda":
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()

    def _allocated(self) -> int:
        import torch

        return torch.cuda.memory_allocated() if self._device == "cuda" else 0


def kind_of(request: Request) -> Hashable:
    """What requests must share for one model in one process to serve them.

    Nothing serves Unsloth, DDP or Liger twice, which patches modules of Transformers for good, nor an adapter whose
    first values PEFT takes from the base: it changes the base for them.
    """
    changes = request.trainer == "unsloth" or request.ddp or request.liger or request.init_lora_weights
    alone = request if changes else None
    return request.model, request.compute_dtype, request.kbit_upcast, request.base_bits, alone


def by_kind(entries: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The entries that one model can serve together, kinds in the order of their first entry."""
    kinds: dict[Hashable, list[dict[str, Any]]] = {}
    for entry in entries:
        kinds.setdefault(kind_of(request_of(entry)), []).append(entry)
    return list(kinds.values())


def in_shard(entries: Sequence[dict[str, Any]], shard: tuple[int, int]) -> list[dict[str, Any]]:
    """The entries of one shard of several, those of one model together.

    Models go to the shard that has least to do, largest first; a model with more than its share is split.
    """
    share = max(1, -(-len(entries) // shard[1]))
    pieces = [group[i : i + share] for group in by_kind(entries) for i in range(0, len(group), share)]
    shards: list[list[dict[str, Any]]] = [[] for _ in range(shard[1])]
    for piece in sorted(pieces, key=len, reverse=True):
        min(shards, key=len).extend(piece)
    return shards[shard[0] - 1]


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"


def _place(error: BaseException) -> list[str]:
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    return [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shard like 1/2")
    return int(match[1]), int(match[2])


def _works(device: str) -> bool:
    import torch

    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main(arguments: list[str]) -> int:
    """Measure the cases of one shard; 1 if one failed, 3 if CUDA broke (start again: it goes on)."""
    parser = argparse.ArgumentParser(
        prog="python -m pytest_qvl.vram.forecast.validation.trainers.measure", description=__doc__
    )
    parser.add_argument("predictions", type=Path, metavar="PREDICTIONS.json")
    parser.add_argument("record", type=Path, metavar="RECORD.json", help="written after every case; one per shard")
    parser.add_argument("--shard", type=_shard, default=(1, 1), metavar="K/N", help="the K-th of N parts")
    parser.add_argument("--only", default="", metavar="REGEX", help="only these cases")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: run, measure nothing")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="updates of each training")
    parser.add_argument("--again", action="store_true", help="run what failed before again")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    gpus = _visible_gpus() if options.device == "cuda" else []
    if options.device == "cuda" and not 1 <= len(gpus) <= PROCESSES:
        parser.error(f"{len(gpus)} GPUs are visible: set CUDA_VISIBLE_DEVICES to one, or to two for DDP by NCCL")
    entries = read_record(options.predictions, PREDICTED)["cases"]
    wanted = [entry for entry in in_shard(entries, options.shard) if re.search(options.only, entry["name"])]
    record = _begin(options.record, digest(options.predictions), options.device)
    done = {e["name"] for e in record["cases"] if e["status"] != "failed" or not options.again}
    left = [entry for entry in wanted if entry["name"] not in done]
    for of_kind in by_kind(left):
        exitcode = _in_processes(of_kind, record, options, gpus)
        record = read_record(options.record, MEASURED) if options.record.is_file() else record
        if exitcode:
            print("CUDA is broken or the process died: start the command again to go on", flush=True)
            return CUDA_BROKEN
    return int(any(e["status"] == "failed" for e in record["cases"]))


def _visible_gpus() -> list[str]:
    """As ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]


def _in_processes(
    entries: Sequence[dict[str, Any]], record: dict[str, Any], options: argparse.Namespace, gpus: list[str]
) -> int:
    """Measure cases of one kind in a process of their own, with another beside it for DDP; what the first ends with.

    A process for each kind, since what libraries keep of the last model has memory reserved around it.
    """
    count = PROCESSES if request_of(entries[0]).ddp else 1
    rest = options, (gpus, _free_port())
    children = [
        get_context("spawn").Process(target=_measure, args=(rank, entries, record, *rest)) for rank in range(count)
    ]
    for child in children:
        child.start()
    first, *others = children
    first.join()
    for other in others:
        other.join(PATIENCE)
        other.terminate()
        other.join()
    return first.exitcode or 0


def _measure(
    rank: int,
    entries: Sequence[dict[str, Any]],
    record: dict[str, Any],
    options: argparse.Namespace,
    machine: tuple[list[str], int],
) -> None:
    """Measure cases of one kind, of which the first process keeps each in the record; exits if CUDA broke."""
    request = request_of(entries[0])
    gpus, port = machine
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[rank % len(gpus)]
    if request.ddp:
        # Each is alone on a machine of one GPU, as it sees it.
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(PROCESSES), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if request.trainer == "unsloth":
        start_unsloth(compiled=request.compiled)
    # NCCL refuses two processes on one GPU.
    bench = Bench(options.device, options.steps, ddp_backend="gloo" if len(gpus) == 1 else None)
    with _quiet():
        for entry in entries:
            found = bench.run(entry)
            if rank:
                continue
            record["cases"] = [*(e for e in record["cases"] if e["name"] != entry["name"]), found]
            write_record(options.record, record)
            print(_line(entry, found), flush=True)
            if not _works(options.device):
                sys.exit(CUDA_BROKEN)


def start_unsloth(*, compiled: bool) -> None:
    """Import Unsloth before what it patches, with the code that it generates in a folder of this process."""
    from pytest_qvl.models.backends.unsloth_start import let_compiled_code_be, quiet, use_own_compile_folder

    os.environ["UNSLOTH_COMPILE_DISABLE"] = str(int(not compiled))
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    use_own_compile_folder()
    with quiet():
        __import__("unsloth")
        let_compiled_code_be()


def _free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _begin(path: Path, predictions: str, device: str) -> dict[str, Any]:
    """The record that is there, or a new one.

    Raises:
        ValueError: The record belongs to other predictions.
    """
    import torch

    if path.is_file():
        record = read_record(path, MEASURED)
        if record["predictions"] != predictions:
            raise ValueError(f"{path} was measured for other predictions: name another file")
        return record
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {
        "schema": MEASURED,
        "predictions": predictions,
        "device": name,
        "versions": versions(*PACKAGES),
        "cases": [],
    }


def _line(entry: dict[str, Any], found: dict[str, Any]) -> str:
    if "allocated" not in found:
        said = found.get("error") or found.get("not_measured")
        return f"{entry['name']}: {found['status']} ({said}), {found['seconds']} s"
    parts = []
    for key in ("allocated", "reserved"):
        forecast, measured = entry[key] / MiB, found[key] / MiB
        parts.append(f"{key} {forecast:,.0f} forecast, {measured:,.0f} measured ({forecast / measured - 1:+.2%})")
    caps = ", ".join(
        f"{card} {'fits' if cap['fits'] else 'does not fit' if cap['fits'] is False else 'unknown'}"
        + ("" if cap["fits"] == entry["verdicts"][card]["fits"] else " BUT FORECAST OTHERWISE")
        for card, cap in found["caps"].items()
    )
    return f"{entry['name']}: {'; '.join(parts)}; {caps}; {found['seconds']} s"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
