"""DeepStack: features of early vision blocks, added behind the first layers of the backbone at the visual tokens.

Meng et al. 2024 (arXiv:2406.04334), as Qwen3-VL has it: the k-th merger makes features of the block that the k-th entry
of ``deepstack_visual_indexes`` names, and what it made is added to what layer k returned.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.bitwise import bits_of, differs
from pytest_qvl.checks.support.layers.flow import first_tensor
from pytest_qvl.checks.support.placeholders import describe, describe_visual

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from pytest_qvl.checks.support.placeholders import Span
    from pytest_qvl.evidence import Judge
    from pytest_qvl.models.anatomy import Parts


def deepstack_indexes(parts: Parts) -> tuple[int, ...]:
    """The blocks that DeepStack's mergers belong to, by the configuration; empty for a family without DeepStack."""
    if not hasattr(parts.vision_tower, "deepstack_merger_list"):
        return ()
    return tuple(parts.config.vision_config.deepstack_visual_indexes)


@dataclass
class DeepStackTap:
    """What flowed on DeepStack's way while a block ran; each list has an entry a call.

    Attributes:
        blocks: What each vision block returned, ``(patches, width)``.
        taken: What each merger was given, ditto.
        features: What each merger made, ``(visual tokens, hidden)``.
        returned: What each of the first layers returned, ``(rows, length, hidden)``.
        handed_on: What the layer behind each of them, or the last norm, was given.
    """

    blocks: list[list[torch.Tensor]] = field(default_factory=list)
    taken: list[list[torch.Tensor]] = field(default_factory=list)
    features: list[list[torch.Tensor]] = field(default_factory=list)
    returned: list[list[torch.Tensor]] = field(default_factory=list)
    handed_on: list[list[torch.Tensor]] = field(default_factory=list)


@contextmanager
def deepstack_tapped(parts: Parts) -> Iterator[DeepStackTap]:
    """Record DeepStack's way inside the block; nothing of a family without it.

    Tensors are cloned: Transformers 4 adds the features to the layer's own output in place.
    """
    tap, indexes = DeepStackTap(), deepstack_indexes(parts)
    tower, backbone = parts.vision_tower, parts.language_backbone
    blocks: list[Any] = list(parts.blocks) if indexes else []
    mergers: list[Any] = list(getattr(tower, "deepstack_merger_list", ())) if indexes else []
    stages: list[Any] = [*backbone.layers, backbone.norm][: len(indexes) + 1]

    def made(into: list[torch.Tensor]) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is not None:
                into.append(tensor.detach().clone())

        return hook

    def given(into: list[torch.Tensor]) -> Any:
        def hook(_module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            tensor = first_tensor((*args, *kwargs.values()))
            if tensor is not None:
                into.append(tensor.detach().clone())

        return hook

    with ExitStack() as hooks:
        for modules, lists in ((blocks, tap.blocks), (mergers, tap.features), (stages[:-1], tap.returned)):
            for module in modules:
                lists.append([])
                hooks.callback(module.register_forward_hook(made(lists[-1])).remove)
        for modules, lists in ((mergers, tap.taken), (stages[1:], tap.handed_on)):
            for module in modules:
                lists.append([])
                hooks.callback(module.register_forward_pre_hook(given(lists[-1]), with_kwargs=True).remove)
        yield tap


@dataclass
class DeepStack:
    """Judges DeepStack in one forward pass, bitwise.

    Attributes:
        judge: Where figures and problems go.
        parts: The model.
        tap: Of the pass.
        found: The images and videos of the batch.
        order: ``(visual tokens,)`` int64: the place of each visual token among all ``rows * length`` tokens, in the
            order in which the mergers make them.
        mask: ``(rows, length)`` bool: what is no padding.
    """

    judge: Judge
    parts: Parts
    tap: DeepStackTap
    found: Sequence[Span]
    order: torch.Tensor
    mask: torch.Tensor

    def hold(self) -> None:
        """Hold each merger to its block, and what follows each of the first layers to its merger's features."""
        indexes, layers = deepstack_indexes(self.parts), len(self.parts.language_backbone.layers)
        made = {number: self._made_by(number, index) for number, index in enumerate(indexes)}
        features = {number: each for number, each in made.items() if each is not None}
        for number in range(len(indexes)):
            if number >= layers:
                self.judge.problem(
                    f"the features of DeepStack's merger {number} belong behind layer {number}, and the backbone has "
                    f"{layers} layers: they are never added"
                )
            elif number in features:
                self._hold_layer(number, features)

    def _made_by(self, number: int, index: int) -> torch.Tensor | None:
        """The features of one merger, ``(visual tokens, hidden)``; None where they cannot be what is added."""
        import torch

        tap, blocks = self.tap, len(self.tap.blocks)
        if number >= len(tap.features) or not tap.features[number]:
            why = f"block {index} is none of the tower's {blocks}" if index >= blocks else "it is never called"
            self.judge.problem(f"DeepStack's merger {number} makes no features: {why} (deepstack_visual_indexes)")
            return None
        taken = torch.cat(tap.taken[number])
        sources = [torch.cat(calls) if calls else taken[:0] for calls in tap.blocks]
        same = [block for block, source in enumerate(sources) if _equal(source, taken)]
        instead = f"that of block {same[0]}" if same else "what no block returned"
        self.judge.equal(
            f"DeepStack's merger {number} is given what block {index} returned",
            index in same,
            True,
            else_say=f"DeepStack's merger {number} is given {instead} instead of what block {index} returned",
        )
        features, count = torch.cat(tap.features[number]), len(self.order)
        if len(features) != count:
            self.judge.problem(f"DeepStack's merger {number} makes {len(features)} features for {count} visual tokens")
            return None
        return features

    def _hold_layer(self, number: int, features: dict[int, torch.Tensor]) -> None:
        import torch

        if not self.tap.returned[number] or not self.tap.handed_on[number]:
            self.judge.note(f"layer {number} is not called by itself: what DeepStack adds behind it was not seen")
            return
        returned = self.tap.returned[number][0]
        given = self.tap.handed_on[number][0].to(returned.device)
        expected, order = returned.clone(memory_format=torch.contiguous_format), self.order.to(returned.device)
        expected.view(-1, expected.shape[-1])[order] += features[number].to(expected)
        bad = (differs(given, expected) & self.mask.to(returned.device)).nonzero().tolist()
        sentence = ""
        if bad:
            row, token = bad[0]
            visual = row * returned.shape[1] + token in order
            due = f"the feature of DeepStack's merger {number} is" if visual else "nothing is"
            added = self._added(number, returned[row, token], given[row, token], features)
            sentence = (
                f"behind layer {number}, at {describe(self.found, row, token)}, {due} due and {added} is added; "
                f"{len(bad)} tokens in {len({row for row, _ in bad})} rows are wrong"
            )
        name = f"tokens behind layer {number} without their DeepStack features, or with others"
        self.judge.equal(name, len(bad), 0, else_say=sentence)

    def _added(self, number: int, before: torch.Tensor, after: torch.Tensor, features: dict[int, torch.Tensor]) -> str:
        """What was added to one token ``(hidden,)``, if that can be told."""
        here = bits_of(after)
        if bool((bits_of(before) == here).all()):
            return "nothing"
        # The nearest answer first: this merger's features of another visual token, then another merger's.
        for merger in sorted(features, key=lambda each: abs(each - number)):
            sums = before + features[merger].to(before)
            same = (bits_of(sums) == here).all(dim=-1).nonzero().flatten().tolist()
            if same:
                return f"what merger {merger} made of {describe_visual(self.found, same[0])}"
        return "something else"


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.shape == other.shape and one.dtype == other.dtype and not bool(differs(one.to(other.device), other).any())
    )
