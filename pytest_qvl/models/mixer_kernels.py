"""What computes the linear attention of Qwen3.5: Transformers' own PyTorch code, a package's kernels, or the hub's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pytest_qvl.models.layers import language_layers

if TYPE_CHECKING:
    from pytest_qvl.models.anatomy import Parts

# As Transformers' module has them; each wraps whatever was found when it was imported. Before 5.17 a mixer has them as
# attributes, named without "torch_"; one that is None is computed by a module of PyTorch's.
FUNCTIONS = {
    "prompts": "torch_chunk_gated_delta_rule",
    "single tokens": "torch_recurrent_gated_delta_rule",
    "convolution of prompts": "causal_conv1d_fn",
    "convolution of single tokens": "causal_conv1d_update",
}
PYTORCH, UNKNOWN = "PyTorch", "not known"


def mixer_kernels(parts: Parts) -> dict[str, str]:
    """By what is computed (:data:`FUNCTIONS`), the package that does: ``"fla"``, ``"causal_conv1d"``, :data:`PYTORCH`.

    :data:`UNKNOWN` where somebody has put a function of their own in its place; empty for a model without linear
    attention.
    """
    mixers = [layer.attention for layer in language_layers(parts) if not layer.attends]
    if not mixers:
        return {}
    home = sys.modules[type(mixers[0]).__module__]
    own = vars(mixers[0])
    whole = own.get("forward")  # a kernel of the hub in place of the whole layer
    if whole is not None:
        return dict.fromkeys(FUNCTIONS, _package(whole))
    found = {}
    for what, name in FUNCTIONS.items():
        attribute = name.removeprefix("torch_")
        found[what] = _package(own[attribute]) if attribute in own else _computed_by(getattr(home, name, None))
    return found


def _computed_by(wrapped: Any) -> str:
    names = getattr(getattr(wrapped, "__code__", None), "co_freevars", ())
    if "implementation" not in names:
        return UNKNOWN
    return _package(wrapped.__closure__[names.index("implementation")].cell_contents)


def _package(function: Callable[..., Any] | None) -> str:
    if function is None:
        return PYTORCH
    package = str(getattr(function, "__module__", None) or UNKNOWN).partition(".")[0]
    return PYTORCH if package == "transformers" else package
