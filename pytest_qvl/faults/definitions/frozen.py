"""Training that moves what must stay, or leaves what must move."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.case import lora_config
from pytest_qvl.faults.catalogue import fault
from pytest_qvl.faults.tools import after, before, values
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.layers import vision_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from pytest_qvl.faults.case import Case


def stepping(meddle: Callable[[], None]) -> Any:
    """A factory of AdamW optimizers that also call a function after their first step."""
    import torch

    class Meddling(torch.optim.AdamW):
        meddled = False

        def step(self, *args: Any, **kwargs: Any) -> Any:
            done = super().step(*args, **kwargs)
            if not self.meddled:
                self.meddled = True
                meddle()
            return done

    return lambda parameters: Meddling(parameters, lr=1e-3, weight_decay=0.0)


@contextmanager
def _written_in_training(case: Case, tensor: torch.Tensor, meddle: Callable[[], None]) -> Iterator[None]:
    case.make_optimizer = stepping(meddle)
    with values(tensor, lambda unchanged: unchanged):
        yield


@fault(
    "vision-tower-unfrozen",
    "The base model was not frozen: the vision tower is trained with the adapter.",
    target="model",
    check="frozen_vision",
    expected_words=("base tensors require grad and go to the optimizer, in vision", "before the adapter is attached"),
    source="modelscope/ms-swift#7318",
)
def _unfrozen(case: Case) -> Iterator[None]:
    for parameter in anatomy(case.model).blocks.parameters():
        parameter.requires_grad_(True)
    yield


@fault(
    "one-bit-flips-in-training",
    "Something writes one bit of one vision weight while the adapter is trained.",
    target="run",
    check="frozen_vision",
    expected_words=("base tensors moved, in vision (1): model.visual.blocks.3.{tower_down}.weight", "wrote into them"),
)
def _one_bit(case: Case) -> Iterator[None]:
    weight = vision_blocks(anatomy(case.model))[3].mlp.down.weight

    def flip() -> None:
        weight.data.view(-1)[7:8].view(_int16()).bitwise_xor_(1)

    with _written_in_training(case, weight, flip):
        yield


def _int16() -> torch.dtype:
    import torch

    return torch.int16


@fault(
    "weight-decay-on-the-base",
    "An optimizer that decays every parameter of the model shrinks the frozen ones.",
    target="run",
    check="frozen_vision",
    expected_words=("base tensors moved, in", "embeddings", "so something wrote into them"),
)
def _weight_decay(case: Case) -> Iterator[None]:
    table = anatomy(case.model).embeddings.weight

    def decay() -> None:
        table.data.mul_(1 - 0.01)

    with _written_in_training(case, table, decay):
        yield


@fault(
    "permuted-rows",
    "Two rows of one vision weight change places in training: every sum stays the same.",
    target="run",
    check="frozen_vision",
    expected_words=("base tensors moved, in vision (1): model.visual.blocks.0.{tower_up}.weight",),
)
def _permuted_rows(case: Case) -> Iterator[None]:
    weight = vision_blocks(anatomy(case.model))[0].mlp.up.weight

    def swap() -> None:
        weight.data[[0, 1]] = weight.data[[1, 0]]

    with _written_in_training(case, weight, swap):
        yield


@fault(
    "optimizer-forgets-one-tensor",
    "The optimizer of the training run leaves one adapter matrix out.",
    target="run",
    check="frozen_vision",
    expected_words=("1 of {adapter} adapter tensors did not move", "the optimizer does not hold them"),
)
def _forgets(case: Case) -> Iterator[None]:
    import torch

    case.make_optimizer = lambda parameters: torch.optim.AdamW(parameters[1:], lr=1e-3, weight_decay=0.0)
    yield


@fault(
    "forward-writes-statistics",
    "A layer of the tower keeps running statistics: a forward in train mode alone changes it.",
    target="model",
    check="frozen_vision",
    expected_words=("a forward without any training step changed 1 base tensors", "model.visual.blocks.1.norm2.weight"),
)
def _writes_statistics(case: Case) -> Iterator[None]:
    parts = anatomy(case.model)
    block: Any = parts.blocks[1]
    weight = block.norm2.weight

    def write(module: Any, _args: Any, _kwargs: Any) -> None:
        if module.training:
            weight.data.mul_(1.01)

    with values(weight, lambda w: w), before([parts.vision_tower], write):
        yield


@fault(
    "features-follow-training",
    "No weight moves, but the tower's output depends on how many steps were taken.",
    target="run",
    check="frozen_vision",
    expected_words=("the vision tower's output is not bitwise what it was before training",),
)
def _features_follow(case: Case) -> Iterator[None]:
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1

    case.make_optimizer = stepping(count)
    with after([anatomy(case.model).merger], lambda _m, _a, out: out * (1 + steps / 64)):
        yield


@fault(
    "merger-trained-detached",
    "The merger is trained beside the adapter, but its output is detached: it never learns.",
    target="load",
    check="training_step",
    expected_words=("tensors that are trained beside LoRA", "merger", "detached"),
)
def _merger_detached(case: Case) -> Iterator[None]:
    case.lora_config = lora_config(modules_to_save=["merger"])
    case.model = case.load(lora=case.lora_config)
    with after([anatomy(case.model).merger], lambda _m, _a, out: out.detach()):
        yield


@fault(
    "deepstack-mergers-unfrozen",
    "Blocks and patch embedding of the tower were frozen by name; the DeepStack mergers are trained with the adapter.",
    target="model",
    check="frozen_vision",
    expected_words=("base tensors require grad and go to the optimizer, in", "deepstack_merger_list.0"),
    source="hiyouga/LlamaFactory#9399",
    requires=("DeepStack",),
)
def _mergers_unfrozen(case: Case) -> Iterator[None]:
    tower: Any = anatomy(case.model).vision_tower
    for parameter in tower.deepstack_merger_list.parameters():
        parameter.requires_grad_(True)
    yield
