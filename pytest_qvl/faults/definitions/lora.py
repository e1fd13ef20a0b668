"""LoRA layers that add something else than their configuration says: kernels of their own, shared pairs, dropout."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import fault
from pytest_qvl.faults.definitions.adapters import another_adapter
from pytest_qvl.faults.tools import after, all_of, attribute, before
from pytest_qvl.models.adapters import adapted_layers, chosen_adapter
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.layers import language_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    import torch

    from pytest_qvl.faults.case import Case

    Rows = Callable[[Any, torch.Tensor], torch.Tensor]
    Times = Callable[[float, torch.Tensor], float]


@contextmanager
def low_rank_of(case: Case, rows: Rows, *, times: float | Times | None = None) -> Iterator[None]:
    """LoRA layers with a forward of their own, as a fused kernel has.

    Args:
        case: Its adapted layers get it.
        rows: What A is given: ``rows(layer, x) -> x``.
        times: Factor of ``B(A(x))``, or ``times(layer's scaling, x)``; the layer's scaling if not given.
    """
    parts = anatomy(case.model)
    name = chosen_adapter(parts)

    def forward_of(layer: Any) -> Any:
        def forward(x: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
            base: torch.Tensor = layer.base_layer(x)
            if layer.disable_adapters:
                return base
            down, up = layer.lora_A[name], layer.lora_B[name]
            scaling = layer.scaling[name]
            factor = times(scaling, x) if callable(times) else scaling if times is None else times
            added: torch.Tensor = up(down(rows(layer, x).to(down.weight.dtype))) * factor
            return base + added.to(base.dtype)

        return forward

    layers = list(adapted_layers(parts).values())
    with all_of([attribute(layer, "forward", forward_of(layer)) for layer in layers]):
        yield


@fault(
    "lora-applies-alpha",
    "A LoRA kernel multiplies by lora_alpha where it should by alpha / r; layer.scaling itself is right.",
    target="adapter",
    check="layer_arithmetic",
    expected_words=(
        "LoRA: model.language_model.layers.0",
        "adds 16·B(A(x)) where its scaling is 2",
        "lora_alpha is taken for",
    ),
    source="vllm-project/vllm#39278",
)
def _applies_alpha(case: Case) -> Iterator[None]:
    with low_rank_of(case, lambda _layer, x: x, times=16.0):
        yield


@fault(
    "lora-ignores-rslora",
    "A LoRA kernel applies alpha / r to an adapter with use_rslora.",
    target="adapter",
    check="layer_arithmetic",
    expected_words=("LoRA: model.language_model.layers.0", "where its scaling is 5.66: use_rslora is ignored"),
)
def _ignores_rslora(case: Case) -> Iterator[None]:
    from dataclasses import replace

    stabilised = replace(case.lora_config, use_rslora=True)
    with another_adapter(case, stabilised), low_rank_of(case, lambda _layer, x: x, times=2.0):
        yield


@fault(
    "lora-ignores-scaling",
    "A LoRA kernel does not multiply by the scaling.",
    target="adapter",
    check="layer_arithmetic",
    expected_words=("LoRA: model.language_model.layers.0", "where its scaling is 2: the scaling is ignored"),
)
def _ignores_scaling(case: Case) -> Iterator[None]:
    with low_rank_of(case, lambda _layer, x: x, times=1.0):
        yield


@fault(
    "lora-reads-elsewhere",
    "A LoRA kernel gives A the token before the one that the base layer is given.",
    target="adapter",
    check="layer_arithmetic",
    expected_words=("LoRA: model.language_model.layers.0", "something else than scaling·B(A(x)) of its own input"),
)
def _reads_elsewhere(case: Case) -> Iterator[None]:
    with reads_elsewhere(case, 1):
        yield


def reads_elsewhere(case: Case, share: float) -> AbstractContextManager[None]:
    """LoRA layers whose A is given a mixture of their input with that of the token before, by a share of the way."""
    return low_rank_of(case, lambda _layer, x: x.lerp(x.roll(1, dims=1), share))


@fault(
    "lora-pair-shared",
    "Two layers hold one and the same pair of adapter matrices.",
    target="adapter",
    check="layer_arithmetic",
    expected_words=(
        "LoRA's matrices: model.language_model.layers.1.{first_input} has one lora_A together with",
        "layers.0",
    ),
)
def _pair_shared(case: Case) -> Iterator[None]:
    first, second = (original.inputs[0] for original in language_layers(anatomy(case.model))[:2])
    name = chosen_adapter(anatomy(case.model))
    kept = {kind: getattr(second, kind)[name] for kind in ("lora_A", "lora_B")}
    for kind in kept:
        getattr(second, kind)[name] = getattr(first, kind)[name]
    try:
        yield
    finally:
        for kind, matrix in kept.items():
            getattr(second, kind)[name] = matrix


@fault(
    "lora-dropout-on-in-eval",
    "LoRA's dropout stays on when the model is put into eval mode.",
    target="adapter",
    check="layer_arithmetic",
    expected_words=("LoRA: model.language_model.layers.0", "LoRA dropout is on"),
)
def _dropout_on(case: Case) -> Iterator[None]:
    with dropout_in_eval(case, 0.1):
        yield


@contextmanager
def dropout_in_eval(case: Case, rate: float) -> Iterator[None]:
    """An adapter with dropout that stays on in eval mode."""
    from dataclasses import replace

    with another_adapter(case, replace(case.lora_config, lora_dropout=rate)):
        name = chosen_adapter(anatomy(case.model))
        dropouts = [layer.lora_dropout[name] for layer in adapted_layers(anatomy(case.model)).values()]

        def awake(module: Any, _args: Any, _kwargs: Any) -> None:
            module.training = True

        with before(dropouts, awake):
            yield


@fault(
    "alpha-saved-twice-as-large",
    "The adapter's configuration was saved with twice its lora_alpha: it loads with twice the scaling.",
    target="adapter",
    check="layer_arithmetic",
    expected_words=(
        "LoRA: model.language_model.layers.0",
        "adds 4·B(A(x)) where its scaling is 2: lora_alpha has doubled",
    ),
)
def _alpha_doubled(case: Case) -> Iterator[None]:
    with alpha_times(case, 2):
        yield


def alpha_times(case: Case, times: float) -> AbstractContextManager[None]:
    """An adapter that was saved with another lora_alpha than was asked for."""
    from dataclasses import replace

    loaded = replace(case.lora_config, lora_alpha=times * case.lora_config.lora_alpha)
    return another_adapter(case, loaded, asked=case.lora_config)


@fault(
    "recomputes-with-another-mask",
    "Checkpointing does not keep the random state: dropout falls on other numbers when it recomputes.",
    target="adapter",
    check="layer_arithmetic",
    expected_words=(
        "recomputed dropout: model.language_model.layers",
        "drops other numbers when checkpointing recomputes",
    ),
)
def _another_mask(case: Case) -> Iterator[None]:
    with another_mask(case, 0.1):
        yield


@contextmanager
def another_mask(case: Case, rate: float) -> Iterator[None]:
    """An adapter with dropout, and checkpointing that does not keep the random state."""
    from dataclasses import replace
    from functools import partial

    from torch.utils.checkpoint import checkpoint

    with another_adapter(case, replace(case.lora_config, lora_dropout=rate)):
        layers = [module for module in anatomy(case.model).base.modules() if hasattr(module, "gradient_checkpointing")]
        forgetful = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        changes = [attribute(layer, "gradient_checkpointing", True) for layer in layers]
        with all_of([*changes, *(attribute(layer, "_gradient_checkpointing_func", forgetful) for layer in layers)]):
            yield


@fault(
    "lora-lost-while-decoding",
    "The decoding kernel of LoRA layers leaves the adapter out; prefill has it.",
    target="adapter",
    check="layer_arithmetic",
    expected_words=("LoRA: model.language_model.layers.0", "the adapter is left out (decode step 1)"),
)
def _lost_while_decoding(case: Case) -> Iterator[None]:
    with low_rank_of(case, lambda _layer, x: x, times=lambda scaling, x: scaling if x.shape[1] > 1 else 0.0):
        yield


@fault(
    "dropout-does-not-rescale",
    "LoRA's dropout zeroes inputs in training and does not divide the others by 1 - p.",
    target="adapter",
    check="layer_arithmetic",
    expected_words=("LoRA dropout: model.language_model.layers.0", "returns 0.9 times what it has to (in train mode)"),
)
def _not_rescaled(case: Case) -> Iterator[None]:
    from dataclasses import replace

    with another_adapter(case, replace(case.lora_config, lora_dropout=0.1)):
        name = chosen_adapter(anatomy(case.model))
        dropouts = [layer.lora_dropout[name] for layer in adapted_layers(anatomy(case.model)).values()]
        with after(dropouts, lambda module, _args, output: output * (1 - module.p) if module.training else output):
            yield


@fault(
    "dora-magnitude-ignored",
    "A kernel for LoRA runs on DoRA layers: the magnitude is not applied.",
    target="adapter",
    check="layer_arithmetic",
    expected_words=("LoRA: model.language_model.layers.0", "DoRA's magnitude is not applied"),
)
def _magnitude_ignored(case: Case) -> Iterator[None]:
    from dataclasses import replace

    with another_adapter(case, replace(case.lora_config, use_dora=True)), low_rank_of(case, lambda _layer, x: x):
        yield
