"""The rotary embedding of the language backbone: which angle each frequency turns by, along which axis."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from pytest_qvl.models.layers import head_sizes, rope_of
from pytest_qvl.oracles import rotary
from pytest_qvl.oracles.bounds import unit

if TYPE_CHECKING:
    import torch

    from pytest_qvl.checks.support.layers.flow import Call
    from pytest_qvl.checks.support.layers.tally import Tally
    from pytest_qvl.models.anatomy import Parts

ROTARY = "rotary embedding"
# A base that is off by more is told in words; 16 bits leave a share of it open.
BASE = 0.05
# Roundings to the dtype within which a cosine is that of an angle; in words only.
STEPS = 4


class Turns:
    """Judges the rotary embedding, and keeps what it made.

    Args:
        parts: The model.
        tally: Where findings go.

    Attributes:
        made: Cosines and sines of the last call; empty before one.
    """

    def __init__(self, parts: Parts, tally: Tally) -> None:
        self._parts, self._tally, self._rope = parts, tally, rope_of(parts)
        axes = rotary.axis_of_each_frequency(self._rope.sections, interleaved=self._rope.interleaved)
        self._axes = axes if len(axes) == head_sizes(parts)[2] // 2 else None
        self.made: tuple[torch.Tensor, ...] = ()

    @property
    def known(self) -> bool:
        """Whether it has run, and the configuration says which frequency turns by which axis."""
        return bool(self.made) and self._axes is not None

    def combined(self, turns: torch.Tensor) -> torch.Tensor:
        """Cosines or sines of each token, ``(rows, length, width)``, where a release hands on three axes apart."""
        import torch

        if turns.ndim == 3:
            return turns
        assert self._axes is not None
        axes = torch.tensor([*self._axes, *self._axes], device=turns.device)
        index = axes.expand(1, *turns.shape[1:])
        return turns.gather(0, index)[0]

    def judge(self, call: Call) -> None:
        """The cosines and sines of every token, from the positions that the module was given."""
        name = f"{self._parts.roots['language']}.rotary_emb"
        self.made = call.output
        if self._rope.kind != "default" or self._axes is None:
            self._tally.leave_out(f"rotary positions of kind {self._rope.kind}", name)
            return
        positions = call.kwargs.get("position_ids")
        positions = (call.positional[1] if positions is None else positions).to(call.made.device)
        positions = positions[-3:] if positions.ndim == 3 else positions.expand(3, *positions.shape)
        together = self._angles(positions, apart=call.made.ndim == 4)
        claims = rotary.turned(together, self._rope.theta, call.made.dtype)
        words = partial(self._words, positions, *call.output)
        for got, claim in zip(call.output, claims, strict=True):
            self._tally.hold(ROTARY, name, got, claim, words)

    def _angles(self, positions: torch.Tensor, *, apart: bool) -> torch.Tensor:
        """Angles of every token, and of every axis where a release hands the axes on apart."""
        import torch

        assert self._axes is not None
        if not apart:
            return rotary.text_angles(positions, self._rope.theta, self._axes)
        count = len(self._axes)
        return torch.stack([rotary.text_angles(positions, self._rope.theta, [axis] * count) for axis in range(3)])

    def _base(self, positions: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> float:
        """The base by which the second frequency turns the token nearest to the start; the right one if none tells."""
        import torch

        assert self._axes is not None
        count = len(self._axes)
        at = positions[self._axes[1] if cosines.ndim == 3 else 0].flatten() if count > 1 else positions.flatten()[:0]
        if not bool((at > 0).any()):
            return self._rope.theta
        token = int(at.where(at > 0, at.max() + 1).argmin())
        cosine, sine = (each.reshape(-1, each.shape[-1])[token, 1].double() for each in (cosines, sines))
        turned = float(torch.atan2(sine, cosine)) % (2 * math.pi) / float(at[token])
        return float(turned ** -float(count)) if turned else self._rope.theta

    def _words(self, positions: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> str:

        assert self._axes is not None
        return (
            (self._sections_words(positions, cosines) if cosines.ndim == 3 else "")
            or self._base_words(positions, cosines, sines)
            or "turns by other angles than position times theta^(-2i/d) along mrope_section"
        )

    def _sections_words(self, positions: torch.Tensor, cosines: torch.Tensor) -> str:
        """That frequencies turn along other axes, if each turns by the right base along one of the three."""
        import torch

        assert self._axes is not None
        count = len(self._axes)
        each = [rotary.text_angles(positions, self._rope.theta, [axis] * count).cos() for axis in range(3)]
        apart = torch.stack([(cosines[..., :count].double() - one).abs().amax(dim=(0, 1)) for one in each])
        limit = STEPS * unit(cosines.dtype)
        # A frequency that no position tells apart counts for the axis that it has to turn along.
        nearest = [
            axis if float(apart[axis, number]) <= limit else int(apart[:, number].argmin())
            for number, axis in enumerate(self._axes)
        ]
        found, asked = ([axes.count(axis) for axis in range(3)] for axes in (nearest, self._axes))
        if found == asked or float(apart.amin(dim=0).max()) > limit:
            return ""
        return (
            f"turns {', '.join(map(str, found))} frequencies by time, height and width, where mrope_section is "
            f"{', '.join(map(str, asked))}"
        )

    def _base_words(self, positions: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> str:
        """That frequencies turn by another base, if the second one does."""
        base = self._base(positions, cosines, sines)
        if abs(base / self._rope.theta - 1) <= BASE:
            return ""
        return f"turns as with base {base:.6g}, not {self._rope.theta:g} (rope_theta)"
