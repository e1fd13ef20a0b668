"""Patch order, rotary embedding, windows and attention of the vision tower, and its mergers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.layers.compose import FLOW, FUSED, judge_merger, judge_mlp, judge_residuals
from pytest_qvl.checks.support.layers.linears import judge_patch_embedding
from pytest_qvl.checks.support.layers.tally import multiple
from pytest_qvl.models.layers import VISION_THETA, mergers, vision_blocks
from pytest_qvl.oracles import attention as oracle
from pytest_qvl.oracles import patches, rotary

if TYPE_CHECKING:
    import torch

    from pytest_qvl.checks.support.layers.flow import Flow
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
        self._laid: patches.Patches | None = None

    def watch(self) -> None:
        """Put hooks on the tower."""
        flow, tower = self._flow, self._parts.vision_tower
        flow.before(tower, self._begin)
        flow.watch(self._parts.patch_embed, self._judge_patches)
        for block in vision_blocks(self._parts):
            flow.watch(block.attention, lambda _m, _a, k, _o, block=block: self._judge_attention(block, k))
            flow.watch(block.mlp.module, lambda *_call, block=block: judge_mlp(self._tally, flow, block.mlp))
            flow.watch(block.module, lambda *_call, block=block: self._judge_block(block))
        for merger in mergers(self._parts):
            flow.watch(merger.module, lambda *_call, merger=merger: self._judge_merger(merger))

    def _begin(self, args: Any, kwargs: Any) -> None:
        grids = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        self._laid = patches.patches([tuple(grid) for grid in grids.tolist()], self._merge, self._window)

    def _judge_patches(self, module: Any, _args: Any, _kwargs: Any, output: Any) -> None:
        name = f"{self._parts.roots['vision']}.patch_embed"
        given = self._flow.given[id(module)]
        judge_patch_embedding(self._tally, name, module.proj, given.reshape(given.shape[0], -1), output)

    def _ordered(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of patches in the order of the blocks."""
        import torch

        assert self._laid is not None
        order = torch.tensor(self._laid.order, device=rows.device)
        grouped = rows.reshape(len(order), -1, rows.shape[-1])
        return grouped[order].reshape(rows.shape)

    def _judge_block(self, block: Layer) -> None:
        given = self._flow.given[id(block.module)]
        patch_embed: Any = self._parts.patch_embed
        if block.number == 0 and self._flow.seen((patch_embed,)) and self._parts.family != "Qwen3-VL":
            embedded = self._flow.made[id(patch_embed)].reshape(given.shape)
            words = "is not given the patches in the order of the windows, row by row"
            self._tally.same(FLOW, block.name, given, self._ordered(embedded), words)
            self._flow.forget((patch_embed,))
        elif block.number:
            before: Any = self._flow.made.pop(-1)
            self._tally.same(FLOW, block.name, given, before, "is not given what the block before it returned")
        judge_residuals(self._tally, self._flow, block)
        self._flow.made[-1] = self._flow.made[id(block.module)]
        self._flow.forget((block.module,))

    def _judge_merger(self, merger: Merger) -> None:
        judge_merger(self._tally, self._flow, merger)

    def _judge_attention(self, block: Layer, kwargs: Any) -> None:
        flow, tally, name = self._flow, self._tally, f"{block.name}.attn"
        if not flow.seen((*block.inputs, block.output)):
            tally.leave_out(FUSED, name)
            return
        hidden, joint = flow.given[id(block.attention)], flow.made[id(block.inputs[0])]
        tally.same(FLOW, name, flow.given[id(block.inputs[0])], hidden, "does not give its own input to qkv")
        tally.same(
            FLOW, name, flow.made[id(block.attention)], flow.made[id(block.output)], "does not return proj's output"
        )  # fmt: skip
        heads = int(self._parts.config.vision_config.num_heads)
        query, key, value = joint.reshape(len(joint), 3, heads, -1).permute(1, 2, 0, 3)
        turns = kwargs.get("position_embeddings")
        if turns is None:
            tally.leave_out("it is given no rotary positions", name)
            return
        self._judge_rotary(name, query.shape[-1], turns)
        cosines, sines = (each.float() for each in turns)
        query, key = (rotary.rotated(each.float(), cosines, sines).to(joint.dtype) for each in (query, key))
        self._judge_scores(block, name, query, key, value)
        flow.forget((*block.inputs, block.output))

    def _judge_rotary(self, name: str, width: int, turns: Any) -> None:
        import torch

        assert self._laid is not None
        positions = torch.tensor(self._laid.positions, device=turns[0].device)
        claims = rotary.turned(rotary.vision_angles(positions, width), VISION_THETA, turns[0].dtype)
        for got, claim in zip(turns, claims, strict=True):
            self._tally.hold(ROTARY, name, got, claim, lambda: _rotary_words(turns))

    def _judge_scores(
        self, block: Layer, name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        import torch

        assert self._laid is not None
        everywhere = block.number in self._full
        sizes = self._laid.frames if everywhere else self._laid.windows
        got = self._flow.given[id(block.output)].unflatten(-1, (query.shape[0], -1)).transpose(0, 1)
        scaling = query.shape[-1] ** -0.5
        values, limits = [], []
        for q, k, v in zip(*(torch.split(each, sizes, dim=1) for each in (query, key, value)), strict=True):
            claim = oracle.attention(q, k, v, None, scaling, eager=self._eager)
            values.append(claim.value)
            limits.append(claim.limit)
        claim = oracle.Claim(torch.cat(values, dim=1), torch.cat(limits, dim=1))

        def words() -> str:
            own = getattr(block.attention, "scaling", scaling)
            if abs(own / scaling - 1) > 1e-6:
                return f"scales its scores by {own:.4g}, {own / scaling:.4g} times 1 / sqrt(head width)"
            if not everywhere or self._window:
                other = self._laid.windows if everywhere else self._laid.frames  # type: ignore[union-attr]
                turned = [
                    oracle.attention(q, k, v, None, scaling, eager=self._eager).value
                    for q, k, v in zip(*(torch.split(each, other, dim=1) for each in (query, key, value)), strict=True)
                ]
                if bool(((got.float() - torch.cat(turned, dim=1)).abs() <= 2 * claim.limit).float().mean() > 0.9):
                    return (
                        "stays inside its window, where the configuration has full attention"
                        if everywhere
                        else "attends over the whole image, where the configuration has windows"
                    )
            return f"{multiple(got, claim.value)}: softmax(q·kᵀ / sqrt(d))·v over its window or image"

        self._tally.hold(ATTENTION, name, got, claim, words)


def _rotary_words(turns: Any) -> str:
    cosines, sines = turns
    if bool((cosines == 1).all()) and not bool(sines.any()):
        return "is given no rotation: every cosine is 1, every sine 0"
    return "is given other angles than row and column times 10,000^(-2i/d)"
