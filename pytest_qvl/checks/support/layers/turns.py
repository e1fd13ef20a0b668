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
# Roundings to the dtype within which an estimated base turns; in words only.
STEPS = 4
# Angles, in radians, and positions that a base is read from; in words only.
SMALLEST, LARGEST = 1e-3, 6


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
        self._axes = axes if len(axes) == int(head_sizes(parts)[2] * self._rope.share) // 2 else None
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

    def _angles(self, positions: torch.Tensor, *, apart: bool, theta: float | None = None) -> torch.Tensor:
        """Angles of every token, and of every axis where a release hands the axes on apart."""
        import torch

        assert self._axes is not None
        theta, count = self._rope.theta if theta is None else theta, len(self._axes)
        if not apart:
            return rotary.text_angles(positions, theta, self._axes)
        return torch.stack([rotary.text_angles(positions, theta, [axis] * count) for axis in range(3)])

    def _words(self, positions: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> str:
        assert self._axes is not None
        return (
            (self._sections_words(positions, cosines, sines) if cosines.ndim == 3 else "")
            or self._base_words(positions, cosines, sines)
            or self._frequency_words(positions, cosines, sines)
            or "turns by other angles than position times theta^(-2i/d) along mrope_section"
        )

    def _misfit(
        self, angles: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, theta: float, slack: float = 0.0
    ) -> torch.Tensor:
        """The largest error over its limit of each frequency, over cosines and sines of all tokens; at most 1 fits.

        Args:
            angles: ``(..., head_dim / 2)`` float64.
            cosines: As they were made, ``(..., head_dim)``.
            sines: Ditto.
            theta: Base of the frequencies.
            slack: Share by which the angles may be off, where they are an estimate.
        """
        import torch

        count = angles.shape[-1]
        ratios = []
        for got, claim in zip((cosines, sines), rotary.turned(angles, theta, cosines.dtype), strict=True):
            limit = claim.limit[..., :count] + slack * angles.abs().float()
            ratios.append(((got.float() - claim.value)[..., :count].abs() / limit).flatten(0, -2).amax(dim=0))
        return torch.maximum(*ratios)

    def _sections_words(self, positions: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> str:
        """That frequencies turn along other axes, if each turns by the right base along one of the three."""
        import torch

        assert self._axes is not None
        count, theta = len(self._axes), self._rope.theta
        each = [rotary.text_angles(positions, theta, [axis] * count) for axis in range(3)]
        apart = torch.stack([self._misfit(one, cosines, sines, theta) for one in each])
        # A frequency that no position tells apart counts for the axis that it has to turn along.
        nearest = [
            axis if float(apart[axis, number]) <= 1 else int(apart[:, number].argmin())
            for number, axis in enumerate(self._axes)
        ]
        found, asked = ([axes.count(axis) for axis in range(3)] for axes in (nearest, self._axes))
        if found == asked or float(apart.amin(dim=0).max()) > 1:
            return ""
        return (
            f"turns {', '.join(map(str, found))} frequencies by time, height and width, where mrope_section is "
            f"{', '.join(map(str, asked))}"
        )

    def _turned(self, positions: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> dict[int, float]:
        """The angle per position of each frequency, from the token nearest to the start; unknown ones left out.

        Angles are told to within a turn, and small sines of float16 have no digits left.
        """
        import torch

        assert self._axes is not None
        found = {}
        for number, axis in enumerate(self._axes):
            at = positions[axis if cosines.ndim == 3 else 0].flatten()
            if not bool((at > 0).any()):
                continue
            token = int(at.where(at > 0, at.max() + 1).argmin())
            flat = (each.reshape(-1, each.shape[-1])[token, number].double() for each in (cosines, sines))
            cosine, sine = flat
            angle = float(torch.atan2(sine, cosine)) % (2 * math.pi)
            if angle >= SMALLEST and float(at[token]) <= LARGEST:
                found[number] = angle / float(at[token])
        return found

    def _base_words(self, positions: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> str:
        """That frequencies turn by another base, if all of them do; of one of them alone that says nothing."""
        turned = self._turned(positions, cosines, sines)
        last = max(turned, default=0)
        if not last:
            return ""
        base = float(turned[last] ** -(len(self._axes or ()) / last))
        if abs(base / self._rope.theta - 1) <= BASE or base <= 1:
            return ""
        angles = self._angles(positions, apart=cosines.ndim == 4, theta=base)
        if float(self._misfit(angles, cosines, sines, base, STEPS * unit(cosines.dtype)).max()) > 1:
            return ""
        return f"turns as with base {float(f'{base:.4g}'):g}, not {self._rope.theta:g} (rope_theta)"

    def _frequency_words(self, positions: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> str:
        """Which frequencies are off, and the first one's factor, if others are not."""
        angles = self._angles(positions, apart=cosines.ndim == 4)
        off = (self._misfit(angles, cosines, sines, self._rope.theta) > 1).nonzero().flatten().tolist()
        count = angles.shape[-1]
        if not off or len(off) == count:
            return ""
        turned = self._turned(positions, cosines, sines).get(off[0])
        right = float(rotary.frequencies(self._rope.theta, count)[off[0]])
        times = f" by {turned / right:.3g} times its angle" if turned else ""
        return (
            f"turns frequency {off[0]}{times}; {len(off)} of {count} frequencies do not turn by position times "
            "theta^(-2i/d)"
        )
