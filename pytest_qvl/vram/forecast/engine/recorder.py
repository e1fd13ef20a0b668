"""Tensors without data, and a record of the device memory they would take.

Inside a :class:`Recorder` the real model code runs unchanged, on the CPU build of torch:

- A **tensor without data** has shape, strides, dtype and autograd but no bytes. Weights, images and whatever is
  computed from them are of that kind; each operation runs on ``meta``, so shapes and aliasing are torch's own.
- **Everything else is real**: token ids, grids, masks, positions, window indices keep their values, so code
  that looks at values (``.tolist()``, ``.all()``, splitting by lengths) runs as written. An integer that is
  computed from tensors without data (the argmax of fake logits) becomes zeros.
- Storages are followed: an allocation is recorded when an operation returns a new
  storage, a free when the last tensor, autograd node or Python frame lets go of it, exactly when CUDA memory
  would be released.

Tensors without data call themselves CPU tensors because Python indexing of fake CUDA tensors needs a CUDA build; what
differs on CUDA (attention kernels, scratch memory inside kernels, what autocast casts) comes from :mod:`.kernels`.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_qvl.vram.forecast.engine import kernels
from pytest_qvl.vram.forecast.engine.chunks import Chunks
from pytest_qvl.vram.forecast.engine.dataless import DatalessTensor, Layout, Storage
from pytest_qvl.vram.forecast.engine.following import Following
from pytest_qvl.vram.forecast.engine.shapes import Call, Plan, Plans, Returned

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_qvl.vram.forecast.engine.trace import AllocationTrace, Kind

aten = torch.ops.aten

# Floats computed from real values stay real up to this size, so that index arithmetic through floats keeps
# its values; larger ones (cos and sin of a whole sequence) are activations and carry no information anyone
# looks at.
REAL_FLOAT_ELEMENTS = 4096
# Integers computed from tensors without data become real zeros up to this size (token ids); larger ones get no data.
REAL_INTEGER_ELEMENTS = 1 << 20
_META = torch.device("meta")
_DISCRETE = (torch.int64, torch.int32, torch.bool)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records on a trace what operations on tensors without data would allocate on a CUDA device.

    Args:
        trace: Where to record.
        device: What the device's kernels do.
        vocabulary: Width of the logits; floats with that last dimension count as ``"logits"``.
    """

    def __init__(self, trace: AllocationTrace, device: kernels.Device, vocabulary: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = trace
        self.device = device
        self.vocabulary = vocabulary
        self._kind: Kind = "activations"
        self._following = Following(trace)
        self._workspaces: dict[tuple[str, bool], int] = {}
        self._plans = Plans()
        self.chunks = Chunks(lambda: self.trace)
        self._functions = _PythonCalls(self)
        self._autocast_questions: list[Any] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and keeping the compiler out of each call takes two frames more

    def __enter__(self) -> Recorder:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._functions.__enter__()  # type: ignore[no-untyped-call]
        self._autocast_questions.append(torch.is_autocast_enabled)
        torch.is_autocast_enabled = _is_autocast_enabled
        return self

    def __exit__(self, *exc: Any) -> None:
        torch.is_autocast_enabled = self._autocast_questions.pop()
        self._functions.__exit__(*exc)  # type: ignore[no-untyped-call]
        super().__exit__(*exc)  # type: ignore[no-untyped-call]

    def continue_on(self, trace: AllocationTrace, common: int) -> None:
        """Record on ``trace`` from now on, whose first ``common`` allocations are those of the trace so far.

        Anything newer that is still alive (until garbage collection) belongs to another continuation.
        """
        self.trace = trace
        self._workspaces.clear()
        self._following.continue_on(trace, common)

    @contextmanager
    def labelled(self, kind: Kind) -> Iterator[None]:
        """Allocations inside count as ``kind``."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    @contextmanager
    def off_device(self) -> Iterator[None]:
        """Allocations inside are not device memory of the caching allocator (paged optimizer states)."""
        following = self._following
        before, following.counting = following.counting, False
        try:
            yield
        finally:
            following.counting = before

    def recomputed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` under these rules in backward too, where torch switches function modes off."""

        def run(*args: Any) -> Any:
            with nullcontext() if torch._C._current_graph_task_id() == -1 else _PythonCalls(self):
                return function(*args)

        return run

    def dataless(self, shape: tuple[int, ...], dtype: torch.dtype) -> DatalessTensor:
        """A new tensor without data, recorded as an allocation."""
        return self._adopt(torch.empty(shape, dtype=dtype, device="meta"))

    def place(self, tensor: torch.Tensor) -> None:
        """``tensor`` was made off the device and is on it from now on."""
        if isinstance(tensor, DatalessTensor):
            self._following.follow(tensor.storage_, self._kind)
        else:
            self._following.follow_real(tensor.untyped_storage(), self._kind)

    def follow_reserved(self, storage: Storage) -> int:
        """Follow a storage whose allocation is recorded later; returns its number."""
        return self._following.follow_reserved(storage)

    def relabel(self, tensor: torch.Tensor, kind: Kind) -> None:
        """``tensor``'s storage counts as ``kind`` from now on."""
        number = self._following.number_of(tensor)
        if number is not None:
            self.trace.relabel(number, kind)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.detach.default and type(args[0]) is DatalessTensor:  # a third of all calls
            source = args[0]
            self._following.follow(source.storage_, self._kind_of(source.layout_))
            return DatalessTensor(source.layout_, source.offset, source.storage_)
        call = Call(args, kwargs)
        if not call.dataless:
            return self._run_real(func, args, kwargs)
        if func is aten._local_scalar_dense.default:
            raise RuntimeError("the model asked for the value of a tensor without data: a forecast cannot follow it")
        return self._run_dataless(func, call)

    def _run_dataless(self, func: Any, call: Call) -> Any:
        coordinates: list[int] = []
        if func in _INDEXING:
            indices, coordinates = _without_masks(call.args[1])
            call = Call((call.args[0], indices, *call.args[2:]), call.kwargs)
        if "device" in call.kwargs:
            call = Call(call.args, {**call.kwargs, "device": "meta"})
        plan = self._plans.find(func, call)
        scratch = coordinates or (kernels.scratch(func, call.args) if plan is None else plan.scratch)
        held = [self.trace.alloc(size, "activations") for size in scratch]
        self._count_workspace(func)
        if plan is None:
            plan = self._plans.make(func, call, () if coordinates else tuple(scratch))
        out = self._returns(func, plan, call.dataless)
        for number in held:
            self.trace.free(number)
        return out

    def _run_real(self, func: Any, args: Any, kwargs: Any) -> Any:
        if kwargs.get("device") == _META:
            return func(*args, **kwargs)
        if not _has_tensor(args) and _may_be_large_float(kwargs):
            # A factory: ask for the shape first, so that a big one never takes real memory.
            shaped = func(*args, **{**kwargs, "device": "meta"}) if "device" in kwargs else None
            if isinstance(shaped, torch.Tensor) and shaped.is_floating_point() and _large(shaped):
                return self._adopt(shaped)
        out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            return self._keep_real(out)
        if isinstance(out, (list, tuple)):
            return type(out)(self._keep_real(item) if isinstance(item, torch.Tensor) else item for item in out)
        return out

    def _keep_real(self, out: torch.Tensor) -> torch.Tensor:
        if out.is_meta:
            return out
        if out.is_floating_point() and _large(out):
            return self._adopt(torch.empty_strided(out.size(), out.stride(), dtype=out.dtype, device="meta"))
        self._following.follow_real(out.untyped_storage(), "inputs" if self._kind == "activations" else self._kind)
        return out

    def _returns(self, func: Any, plan: Plan, dataless: list[DatalessTensor]) -> Any:
        if plan.container is None:
            return self._return(func, plan.results[0], dataless)
        if func in kernels.LAST_RESULT_FIRST:
            made = [self._return(func, item, dataless) for item in reversed(plan.results)]
            return plan.container(reversed(made))
        return plan.container([self._return(func, item, dataless) for item in plan.results])

    def _return(self, func: Any, result: Any, dataless: list[DatalessTensor]) -> Any:
        if type(result) is not Returned:
            return result
        if result.argument >= 0:
            return dataless[result.argument]
        layout, offset = result.layout, result.offset
        if layout.dtype in _DISCRETE and layout.size.numel() <= REAL_INTEGER_ELEMENTS and not func.is_view:
            return self._keep_real(torch.zeros(layout.size, dtype=layout.dtype))
        if result.viewed >= 0:
            source = dataless[result.viewed]
            storage, offset = source.storage_, offset + source.offset
        else:
            storage = Storage(result.nbytes)
        self._following.follow(storage, self._kind_of(layout))
        return DatalessTensor(layout, offset, storage)

    def _kind_of(self, layout: Layout) -> Kind:
        if self._kind == "activations" and len(layout.size) > 1 and layout.size[-1] == self.vocabulary:
            return "logits"
        return self._kind

    def _adopt(self, elem: torch.Tensor) -> DatalessTensor:
        """A tensor without data like ``elem``, which is on ``meta`` and has a storage of its own."""
        layout, storage = Layout.of(elem), Storage(elem.untyped_storage().nbytes())
        self._following.follow(storage, self._kind_of(layout))
        return DatalessTensor(layout, int(elem.storage_offset()), storage)

    def keep_workspaces(self) -> None:
        """From here on every library workspace is allocated, as after the first step of a training."""
        for backward in (False, True):
            for libraries in kernels.WORKSPACES_OF.values():
                self._take_workspaces(libraries, backward)

    def drop_workspaces(self) -> None:
        """Every library gives its workspace back, as before a measurement, and takes a new one when it needs it."""
        for number in self._workspaces.values():
            self.trace.free(number)
        self._workspaces.clear()

    def _count_workspace(self, func: Any) -> None:
        libraries = kernels.WORKSPACES_OF.get(func)
        if libraries is not None:
            self._take_workspaces(libraries, torch._C._current_graph_task_id() != -1)

    def _take_workspaces(self, libraries: tuple[str, ...], backward: bool) -> None:
        # Backward runs on autograd's own thread on CUDA, and each thread has its own handle and workspace.
        for library in libraries:
            if (library, backward) not in self._workspaces:
                number = self.trace.alloc(self.device.workspaces[library], "workspace")
                self._workspaces[library, backward] = number


class _PythonCalls(TorchFunctionMode):
    """The Python-level calls whose CUDA behaviour is not what dispatch on CPU shows."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._device = recorder.device
        self._chunks = recorder.chunks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        attention = self._chunks.attention
        if attention is not None:
            if func is torch.split:
                return attention.split(*args, **kwargs)
            if func is torch.cat:
                return attention.joined(*args, **kwargs)
            if func is torch.nn.functional.scaled_dot_product_attention:
                attention.begins()
        if func is torch.nn.functional.scaled_dot_product_attention:
            return kernels.attention(self._device, *args, **kwargs)
        if func is torch.nn.functional.dropout:
            return kernels.dropout(*args, **kwargs)
        if func is torch.nn.functional.layer_norm and torch.is_autocast_enabled("cpu"):
            args, kwargs = kernels.in_float32(args, kwargs)
        out = func(*args, **kwargs)
        if func == _SET_DATA and isinstance(args[0], DatalessTensor):
            args[0].layout_, args[0].offset, args[0].storage_ = args[1].layout_, args[1].offset, args[1].storage_
        return out


_ask_autocast = torch.is_autocast_enabled


def _is_autocast_enabled(device_type: str = "cpu") -> bool:
    """``torch.is_autocast_enabled`` of a process whose device is the one that tensors without data say they are on.

    The original means CUDA where no device is named. PEFT's 4-bit layers ask it so, and copy their input to fp32 where
    autocast is off.
    """
    return _ask_autocast(device_type)


_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


def _has_tensor(values: Any) -> bool:
    return any(
        isinstance(value, torch.Tensor) or (isinstance(value, (list, tuple)) and _has_tensor(value)) for value in values
    )


def _without_masks(indices: Any) -> tuple[list[Any], list[int]]:
    """Indices with each mask as the coordinates it selects, and the bytes those coordinates take.

    On ``meta`` a mask would select an unknown number of elements; CUDA kernels turn it into coordinates as
    well.
    """
    expanded: list[Any] = []
    sizes: list[int] = []
    for index in indices:
        if isinstance(index, torch.Tensor) and index.dtype == torch.bool and not isinstance(index, DatalessTensor):
            count = int(index.sum())
            expanded += [torch.empty(count, dtype=torch.int64, device="meta") for _ in range(index.dim())]
            sizes.append(8 * count * index.dim())
        else:
            expanded.append(index)
    return expanded, sizes


def _may_be_large_float(kwargs: Any) -> bool:
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    return bool(dtype.is_floating_point)


def _large(tensor: torch.Tensor) -> bool:
    return tensor.numel() > REAL_FLOAT_ELEMENTS
