"""Patch order, rotary embedding, windows and attention of the vision tower, and its mergers."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.layers.compose import FUSED, judge_merger, judge_mlp, judge_order, judge_residuals
from pytest_qvl.checks.support.layers.linears import judge_patch_embedding
from pytest_qvl.checks.support.layers.scores import other_scaling
from pytest_qvl.checks.support.layers.tally import HANDED_ON, error_over_limit, multiple
from pytest_qvl.checks.support.rounding import coarsest
from pytest_qvl.models.layers import mergers, vision_blocks, vision_theta
from pytest_qvl.models.taps import vision_features
from pytest_qvl.oracles import attention as oracle
from pytest_qvl.oracles import patches, rotary
from pytest_qvl.oracles.bounds import Claim

if TYPE_CHECKING:
    import torch

    from pytest_qvl.checks.support.layers.flow import Call, Flow
    from pytest_qvl.checks.support.layers.tally import Tally
    from pytest_qvl.models.anatomy import Parts
    from pytest_qvl.models.layers import Layer, Merger

ROTARY, ATTENTION = "vision rotary embedding", "vision attention"


class Tower:
    """Judges the vision tower while it runs.

    Args:
        parts: The model.
        tally: Where findings go.
        flow: What modules are given and make.
    """

    def __init__(self, parts: Parts, tally: Tally, flow: Flow) -> None:
        self._parts, self._tally, self._flow = parts, tally, flow
        vision = parts.config.vision_config
        self._merge = parts.merge_size
        pixels = getattr(vision, "window_size", None) if parts.family == "Qwen2.5-VL" else None
        self._window = int(pixels // (vision.patch_size * self._merge)) if pixels else None
        everywhere = getattr(vision, "fullatt_block_indexes", None)
        self._full = set(range(vision.depth)) if everywhere is None or not self._window else set(everywhere)
        self._eager = vision._attn_implementation == "eager"
        self._theta = vision_theta(parts)
        self._laid: patches.Patches | None = None
        self._given: torch.Tensor | None = None
        self._before: torch.Tensor | None = None
        self._next, self._count = 0, len(parts.blocks)
        # Qwen3-VL's learned positions.
        self._table: torch.Tensor | None = getattr(getattr(parts.vision_tower, "pos_embed", None), "weight", None)

    def watch(self) -> None:
        """Put hooks on the tower."""
        flow, tower = self._flow, self._parts.vision_tower
        flow.before(tower, self._begin)
        flow.watch(self._parts.patch_embed, self._judge_patches)
        for block in vision_blocks(self._parts):
            flow.record(block.parts)
            flow.watch(block.attention, partial(self._judge_attention, block))
            flow.watch(block.mlp.module, partial(judge_mlp, self._tally, flow, block.mlp))
            flow.watch(block.module, partial(self._judge_block, block))
        for merger in mergers(self._parts):
            flow.record((merger.norm, merger.first, merger.second))
            flow.watch(merger.module, partial(self._judge_merger, merger))
        flow.watch(tower, self._judge_end)

    def _begin(self, args: Any, kwargs: Any) -> None:
        grids = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        self._laid = patches.patches([tuple(grid) for grid in grids.tolist()], self._merge, self._window)
        self._given = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).detach()
        self._before, self._next = None, 0

    def _order(self, device: torch.device) -> torch.Tensor:
        import torch

        assert self._laid is not None
        return torch.tensor(self._laid.order, device=device)

    def _judge_patches(self, call: Call) -> None:
        name = f"{self._parts.roots['vision']}.patch_embed"
        if self._given is not None:
            self._tally.handed_on(name, call.given, self._given, "is not given the pixels that the tower is given")
        judge_patch_embedding(self._tally, name, call)
        order = self._order(call.made.device)
        grouped = call.made.reshape(len(order), -1, call.made.shape[-1])
        self._before = grouped[order].flatten(0, 1)

    def _judge_block(self, block: Layer, call: Call) -> None:
        if block.number == 0 and self._before is not None and self._table is not None:
            assert self._laid is not None
            embedded, table = (each.detach().to(call.given.device) for each in (self._before, self._table))
            claim = patches.with_learned_positions(embedded, table, self._laid.relative)
            words = "is not given each patch plus its learned position, between the corners of the table bilinearly"
            self._tally.hold("learned positions", block.name, call.given, claim, lambda: words)
        elif self._before is not None:
            words = "is not given what the block before it returned"
            if block.number == 0:
                words = "is not given the patches in the order of the windows, row by row"
            self._tally.handed_on(block.name, call.given, self._before, words)
        judge_order(self._tally, block, self._next)
        self._next = block.number + 1
        judge_residuals(self._tally, self._parts, self._flow, block)
        self._before = call.made
        self._flow.forget((block.module,))

    def _judge_merger(self, merger: Merger, call: Call) -> None:
        if merger.module is self._parts.merger and self._before is not None and self._next == self._count:
            words = "is not given what the last block returned"
            self._tally.handed_on(merger.name, call.given.flatten(), self._before.flatten(), words)
        judge_merger(self._tally, self._parts, self._flow, merger, call)

    def _judge_end(self, call: Call) -> None:
        """Visual tokens leave the tower in the order in which the processor sent their patches."""
        import torch

        merger, name = self._parts.merger, self._parts.roots["vision"]
        if 0 < self._next < self._count:
            self._tally.fail(HANDED_ON, f"{name}.blocks.{self._next}", "is never called, as if it were not there")
        if not self._flow.seen((merger,)):
            self._tally.leave_out(FUSED, self._parts.roots["merger"])
        else:
            merged = self._flow.made_by(merger)
            merged = merged[torch.argsort(self._order(merged.device))]
            words = "does not return the merger's visual tokens in the order of the images' rows"
            self._tally.handed_on(name, vision_features(call.output).detach(), merged, words)
        self._flow.forget((merger, self._parts.vision_tower))
        self._given = self._before = None

    def _judge_attention(self, block: Layer, call: Call) -> None:
        flow, tally, name = self._flow, self._tally, f"{block.name}.attn"
        if not flow.seen((*block.inputs, block.output)):
            tally.leave_out(FUSED, name)
            flow.forget((*block.inputs, block.output))
            return
        joint = flow.made_by(block.inputs[0])
        tally.handed_on(name, flow.given_to(block.inputs[0]), call.given, "does not give its own input to qkv")
        tally.handed_on(name, call.made, flow.made_by(block.output), "does not return what proj does")
        heads = int(self._parts.config.vision_config.num_heads)
        query, key, value = joint.reshape(len(joint), 3, heads, -1).permute(1, 2, 0, 3)
        turns = call.kwargs.get("position_embeddings")
        if turns is None:
            tally.leave_out("it is given no rotary positions", name)
            return
        self._judge_rotary(name, query.shape[-1], turns)
        cosines, sines = (each.float() for each in turns)
        query, key = (rotary.rotated(each.float(), cosines, sines).to(joint.dtype) for each in (query, key))
        joint = flow.given_to(block.output)
        got = joint.view(len(joint), heads, -1).transpose(0, 1)
        # It rounds to the dtype in which it gives what it makes: kernels, autocast.
        query, key, value = (each.to(coarsest((each.dtype, got.dtype))) for each in (query, key, value))
        everywhere = block.number in self._full
        claim = self._claim(query, key, value, everywhere=everywhere)
        tally.hold(
            ATTENTION, name, got, claim, lambda: self._words(got, claim, (query, key, value), everywhere=everywhere)
        )
        flow.forget((*block.inputs, block.output))

    def _judge_rotary(self, name: str, width: int, turns: Any) -> None:
        import torch

        assert self._laid is not None
        positions = torch.tensor(self._laid.positions, device=turns[0].device)
        claims = rotary.turned(rotary.vision_angles(positions, width, self._theta), self._theta, turns[0].dtype)
        for got, claim in zip(turns, claims, strict=True):
            self._tally.hold(ROTARY, name, got, claim, lambda: _rotary_words(turns, self._theta))

    def _claim(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        everywhere: bool,
        scaling: float | None = None,
    ) -> Claim:
        """What attention has to give within each window, or within each frame of an image."""
        import torch

        assert self._laid is not None
        sizes = self._laid.frames if everywhere else self._laid.windows
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        attend = partial(oracle.attention, allowed=None, scaling=scaling, eager=self._eager)
        whole = Claim(*(torch.empty(query.shape, dtype=torch.float32, device=query.device) for _ in range(2)))
        starts = torch.tensor([0, *sizes], device=query.device).cumsum(0)[:-1]
        for size in set(sizes):
            # Groups of one size are so many heads more.
            begun = starts[torch.tensor([each == size for each in sizes], device=query.device)]
            places = begun[:, None] + torch.arange(size, device=query.device)
            claim = attend(*(each[:, places].flatten(0, 1) for each in (query, key, value)))
            for made, part in zip(whole, claim, strict=True):
                made[:, places] = part.view(len(query), *places.shape, -1)
        return whole

    def _words(self, got: torch.Tensor, claim: Claim, inputs: tuple[torch.Tensor, ...], *, everywhere: bool) -> str:
        query, key, value = inputs
        if self._window and error_over_limit(got, self._claim(query, key, value, everywhere=not everywhere)) <= 1:
            if everywhere:
                return "stays inside its window, where the configuration has full attention"
            return "attends over the whole image, where the configuration has windows"

        def attend(scaling: float) -> Claim:
            return self._claim(query, key, value, everywhere=everywhere, scaling=scaling)

        return other_scaling(got, claim, attend, query.shape[-1] ** -0.5) or (
            f"{multiple(got, claim.value)}: softmax(q·kᵀ / sqrt(d))·v over its window or image"
        )


def _rotary_words(turns: Any, theta: float) -> str:
    cosines, sines = turns
    if bool((cosines == 1).all()) and not bool(sines.any()):
        return "is given no rotation: every cosine is 1, every sine 0"
    return f"is given other angles than row and column times {theta:,.10g}^(-2i/d)"
