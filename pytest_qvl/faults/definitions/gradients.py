"""Losses that are no mean over the answers' tokens, and gradients that are not those of the loss."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import fault
from pytest_qvl.faults.tools import after, attribute, before, on_first
from pytest_qvl.models.adapters import adapted_layers, adapter_parameters
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.samples.batch import IGNORED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    import torch

    from pytest_qvl.faults.case import Case

STEPS = 2
LAYER = 2
DROPOUT = 0.2


def _with_loss(case: Case, loss: Callable[..., torch.Tensor]) -> AbstractContextManager[None]:
    """Give the model a loss of ``(logits, labels, num_items_in_batch)``, as ``loss_function`` lets anybody do."""

    def loss_function(logits: Any, labels: Any, *, num_items_in_batch: Any = None, **_: Any) -> Any:
        return loss(logits.float(), labels.to(logits.device), num_items_in_batch)

    return attribute(anatomy(case.model).base, "_loss_function", loss_function)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor, items: Any, **options: Any) -> torch.Tensor:
    """As Transformers computes it, of logits and labels that are aligned already."""
    import torch

    how = {"reduction": "mean" if items is None else "sum", **options}
    found = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, **how)
    return found if items is None or options else found / items


@fault(
    "loss-not-shifted",
    "A loss of one's own compares each token's logits with that token itself, not with the next.",
    target="model",
    check="loss_arithmetic",
    expected_words=("labels that are not shifted", "mean cross-entropy of"),
)
def _not_shifted(case: Case) -> Iterator[None]:
    with not_shifted(case, None):
        yield


def not_shifted(case: Case, count: int | None) -> AbstractContextManager[None]:
    """Compare the logits of the first so many supervised tokens, of all if ``None``, with the tokens themselves."""

    def loss(logits: torch.Tensor, labels: torch.Tensor, items: Any) -> torch.Tensor:
        rows, places = (labels != IGNORED).nonzero(as_tuple=True)
        before = places - 1
        before[:count] += 1
        return _cross_entropy(logits[rows, before][None], labels[rows, places][None], items)

    return _with_loss(case, loss)


def loss_times(case: Case, times: float) -> AbstractContextManager[None]:
    """Multiply the loss."""
    return _with_loss(case, lambda logits, labels, items: times * _cross_entropy(logits[:, :-1], labels[:, 1:], items))


@fault(
    "loss-shifted-twice",
    "Labels that are shifted already are shifted once more in the loss.",
    target="model",
    check="loss_arithmetic",
    expected_words=("labels that are shifted twice",),
)
def _shifted_twice(case: Case) -> Iterator[None]:
    with _with_loss(case, lambda logits, labels, items: _cross_entropy(logits[:, :-2], labels[:, 2:], items)):
        yield


@fault(
    "loss-summed",
    "The loss is the sum over tokens: steps grow with the length of answers.",
    target="model",
    check="loss_arithmetic",
    expected_words=("the sum over tokens, not their mean",),
)
def _summed(case: Case) -> Iterator[None]:
    def summed(logits: torch.Tensor, labels: torch.Tensor, _items: Any) -> torch.Tensor:
        return _cross_entropy(logits[:, :-1], labels[:, 1:], None, reduction="sum")

    with _with_loss(case, summed):
        yield


@fault(
    "loss-of-the-first-row",
    "The loss counts the first row of a batch only; the others are computed in vain.",
    target="model",
    check="loss_arithmetic",
    expected_words=("what row 0 alone has: the other rows count nothing",),
)
def _first_row(case: Case) -> Iterator[None]:
    with _with_loss(case, lambda logits, labels, items: _cross_entropy(logits[:1, :-1], labels[:1, 1:], items)):
        yield


@fault(
    "loss-mean-of-rows",
    "The loss is the mean of the rows' means: tokens of short answers count more than those of long ones.",
    target="model",
    check="loss_arithmetic",
    expected_words=("the mean of the rows' means",),
)
def _mean_of_rows(case: Case) -> Iterator[None]:
    import torch

    def mean(logits: torch.Tensor, labels: torch.Tensor, _items: Any) -> torch.Tensor:
        rows = [row for row in range(len(labels)) if bool((labels[row, 1:] != IGNORED).any())]
        return torch.stack([_cross_entropy(logits[row, None, :-1], labels[row, None, 1:], None) for row in rows]).mean()

    with _with_loss(case, mean):
        yield


@fault(
    "loss-over-all-places",
    "The sum over supervised tokens is divided by all places of the batch: long prompts make small steps.",
    target="model",
    check="loss_arithmetic",
    expected_words=("the sum over tokens divided by all places of the batch",),
)
def _all_places(case: Case) -> Iterator[None]:
    with more_counted(case, None):
        yield


def more_counted(case: Case, count: int | None) -> AbstractContextManager[None]:
    """Divide the sum over supervised tokens by so many more than there are, or by all places if ``None``."""

    def loss(logits: torch.Tensor, labels: torch.Tensor, items: Any) -> torch.Tensor:
        summed = _cross_entropy(logits[:, :-1], labels[:, 1:], None, reduction="sum")
        own = labels.numel() if count is None else int((labels[:, 1:] != IGNORED).sum()) + count
        return summed / (own if items is None else items)

    return _with_loss(case, loss)


@fault(
    "loss-smoothed",
    "A label smoothing of 0.001 was left in the loss.",
    target="model",
    check="loss_arithmetic",
    expected_words=("have a mean cross-entropy of", "of it"),
)
def _smoothed(case: Case) -> Iterator[None]:
    with smoothed(case, 1e-3):
        yield


def smoothed(case: Case, weight: float) -> AbstractContextManager[None]:
    """Leave a label smoothing in the loss."""

    def loss(logits: torch.Tensor, labels: torch.Tensor, items: Any) -> torch.Tensor:
        return _cross_entropy(logits[:, :-1], labels[:, 1:], items) + weight * _spread(logits, labels)

    return _with_loss(case, loss)


def _spread(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over supervised places of the mean negative log-probability of all tokens."""
    counted = labels[:, 1:] != IGNORED
    spread: torch.Tensor = -logits[:, :-1][counted].log_softmax(-1).mean()
    return spread


@fault(
    "num-items-ignored",
    "The model takes num_items_in_batch and drops it: accumulated gradients grow with the number of micro-batches.",
    target="model",
    check="loss_arithmetic",
    expected_words=("given num_items_in_batch", "that number is ignored", "as there are micro-batches"),
    source="huggingface/transformers#47688",
)
def _items_ignored(case: Case) -> Iterator[None]:
    def loss(logits: torch.Tensor, labels: torch.Tensor, _items: Any) -> torch.Tensor:
        return _cross_entropy(logits[:, :-1], labels[:, 1:], None)

    with attribute(anatomy(case.model).base, "accepts_loss_kwargs", True), _with_loss(case, loss):
        yield


@fault(
    "accumulation-of-means",
    "Transformers' Trainer accumulates over micro-batches by their means, as Qwen-VL's accepts_loss_kwargs has it.",
    target="run",
    check="loss_arithmetic",
    expected_words=("accumulated over micro-batches by your Trainer", "count", "accepts_loss_kwargs"),
    source="huggingface/transformers#40333",
)
def _of_means(case: Case) -> Iterator[None]:
    import tempfile

    from transformers import Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=STEPS,
            report_to=[],
            use_cpu=case.subject.device == "cpu",
        )
        case.trainer = Trainer(case.model, arguments, train_dataset=[0])
        yield


@fault(
    "accumulation-not-divided",
    "A loop of one's own adds up the losses of micro-batches and divides by nothing.",
    target="run",
    check="loss_arithmetic",
    expected_words=("accumulated over micro-batches by your function", "count"),
)
def _not_divided(case: Case) -> Iterator[None]:
    def accumulate(model: Any, batches: list[Any]) -> None:
        for batch in batches:
            model(**batch, use_cache=False).loss.backward()

    case.trainer = accumulate
    yield


def accumulated_times(case: Case, times: float) -> AbstractContextManager[None]:
    """A loop of one's own that weighs micro-batches by their tokens, and is off by a factor where there are several."""

    def accumulate(model: Any, batches: list[Any]) -> None:
        counts = [int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches]
        factor = times if len(batches) > 1 else 1
        for batch, count in zip(batches, counts, strict=True):
            (factor * count / sum(counts) * model(**batch, use_cache=False).loss).backward()

    return attribute(case, "trainer", accumulate)


def _layer(case: Case) -> tuple[str, Any]:
    """A decoder layer in the middle, with a name as messages have it."""
    return f"layers.{LAYER}", anatomy(case.model).language_backbone.layers[LAYER]


@contextmanager
def gradient_times(case: Case, factor: float) -> Iterator[None]:
    """Multiply the gradient of the adapter on one decoder layer."""
    name, _module = _layer(case)
    with ExitStack() as stack:
        parameters: dict[str, Any] = {**adapter_parameters(anatomy(case.model))}
        for key, parameter in parameters.items():
            if f".{name}." in key and parameter.requires_grad:
                stack.callback(parameter.register_hook(lambda gradient: gradient * factor).remove)
        yield


@fault(
    "gradient-lost-in-one-layer",
    "The gradient of one layer's adapter is a thousandth of what it has to be.",
    target="adapter",
    check="gradient_arithmetic",
    expected_words=("the gradient is not the loss's in 1 of", "layers.2", " 0.00"),
)
def _thousandth(case: Case) -> Iterator[None]:
    with gradient_times(case, 1e-3):
        yield


@fault(
    "gradient-a-quarter-too-large",
    "The gradient of one layer's adapter is 1.25 of what it has to be.",
    target="adapter",
    check="gradient_arithmetic",
    expected_words=("the gradient is not the loss's in 1 of", "layers.2"),
)
def _quarter(case: Case) -> Iterator[None]:
    with gradient_times(case, 1.25):
        yield


@fault(
    "gradient-sign-wrong-in-one-layer",
    "The gradient of one layer's adapter has the wrong sign; the others learn against it.",
    target="adapter",
    check="gradient_arithmetic",
    expected_words=("the gradient is not the loss's in 1 of", "layers.2", " has -"),
)
def _flipped(case: Case) -> Iterator[None]:
    with gradient_times(case, -1.0):
        yield


@fault(
    "gradient-halved-on-its-way",
    "Half of the gradient is lost between two layers: all adapters before learn half as fast as those behind.",
    target="model",
    check="gradient_arithmetic",
    expected_words=("the gradient is not the loss's in 1 of", "layers.2", "what goes in gets 0."),
)
def _halved(case: Case) -> Iterator[None]:
    with lost_on_the_way(case, 0.5):
        yield


def lost_on_the_way(case: Case, share: float) -> AbstractContextManager[None]:
    """Lose a share of the gradient between two layers."""

    def less(_module: Any, _args: Any, output: Any) -> Any:
        return on_first(output, lambda hidden: hidden.detach().lerp(hidden, 1 - share))

    return after([_layer(case)[1]], less)


@fault(
    "gradient-of-one-row-lost",
    "The first row of a batch is detached on its way: the layers before learn nothing from it.",
    target="model",
    check="gradient_arithmetic",
    expected_words=("the gradient is not the loss's in 1 of", "layers.2"),
)
def _one_row(case: Case) -> Iterator[None]:
    import torch

    def detach(_module: Any, _args: Any, output: Any) -> Any:
        return on_first(output, lambda hidden: torch.cat([hidden[:1].detach(), hidden[1:]]))

    with after([_layer(case)[1]], detach):
        yield


@fault(
    "mlp-input-detached",
    "The input of one layer's MLP is detached: what lies before it learns by the residual stream alone.",
    target="model",
    check="gradient_arithmetic",
    expected_words=("the gradient is not the loss's in 1 of", "layers.2", "what goes in gets"),
)
def _detached_input(case: Case) -> Iterator[None]:
    with before(
        [_layer(case)[1].post_attention_layernorm], lambda _m, args, kwargs: ((args[0].detach(), *args[1:]), kwargs)
    ):
        yield


@fault(
    "checkpointing-with-other-dropout",
    "Checkpointing does not keep dropout's random state: activations are computed again with another mask.",
    target="adapter",
    check="gradient_arithmetic",
    expected_words=("the gradient is not the loss's", "preserve_rng_state=True", "cosine"),
)
def _other_dropout(case: Case) -> Iterator[None]:
    from functools import partial

    from torch import nn
    from torch.utils.checkpoint import checkpoint

    parts = anatomy(case.model)
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    with ExitStack() as stack:
        for layer in adapted_layers(parts).values():
            held = layer.lora_dropout
            for name, module in list(held.items()):
                stack.callback(held.__setitem__, name, module)
                held[name] = nn.Dropout(DROPOUT)
                held[name].train(module.training)
        for layer in parts.language_backbone.layers:
            stack.enter_context(attribute(layer, "gradient_checkpointing", True))
            stack.enter_context(attribute(layer, "_gradient_checkpointing_func", again))
        yield
