"""Forecasts, and the search for what still fits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from pytest_qvl.vram.cards import Card
from pytest_qvl.vram.cards import card as find_card
from pytest_qvl.vram.forecast import phases
from pytest_qvl.vram.forecast.engine.dry_run import DryRun
from pytest_qvl.vram.forecast.engine.trace import AllocationTrace, Replay, replay
from pytest_qvl.vram.forecast.result import Dimension, Forecast, Largest, Refused, Timeline, Verdict
from pytest_qvl.vram.forecast.source import Source, find_source

if TYPE_CHECKING:
    from pytest_qvl.vram.forecast.engine.build import Recipe
    from pytest_qvl.vram.forecast.engine.trace import Kind
    from pytest_qvl.vram.forecast.request import Request

# Share of the card's free memory at which the search looks first; the rest is for gaps between the
# allocator's blocks. It only saves forecasts: what is reported was confirmed by one.
SEARCH_TARGET = 0.95
SEARCH_STEPS = 4
# Sizes known before the middle is tried in place of a neighbour.
GUESSES = 3
# Kinds of bytes that do not grow with the tokens.
_WITHOUT_TOKENS: tuple[Kind, ...] = ("weights", "adapters", "optimizer", "gradients", "workspace")
# Visual tokens of a whole batch beyond which the search for the largest batch does not go: a forecast's time grows with
# them, and cards that hold more are not the ones people ask about.
SEARCH_VISUAL_TOKENS = 16384


class Forecaster:
    """Forecasts for one model and one way of training it; the model is built once.

    Args:
        request: What to forecast; :meth:`forecast` may vary image size, images, batch, tokens and new
            tokens.
        card: The card to judge, if any.
        source: The model's configuration; by default what ``request.model`` names.
        recipe: How it is quantized and adapted; by default every language linear, by ``request.lora_r``.

    Raises:
        ValueError: The model is neither a released name nor a folder with the configuration of a Qwen-VL.
    """

    def __init__(
        self,
        request: Request,
        card: Card | None = None,
        *,
        source: Source | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        self.source: Source = source or find_source(request.model)
        self.card = card
        self._request = request
        self._dry_run = DryRun(request, self.source, recipe)

    def forecast(self, request: Request, *, inference: bool = True, timeline: bool = True) -> Forecast:
        """The forecast for ``request``.

        Args:
            request: What to forecast.
            inference: Whether to make the inference pass too.
            timeline: Whether to keep the live bytes after each event of a training step.

        Raises:
            ValueError: An image the processor refuses.
        """
        return self.read(request, self.trace(request, inference=inference), timeline=timeline)

    def other(self, request: Request) -> Forecast:
        """The forecast for any request on the same model and card, without an inference pass and a timeline."""
        kept = {
            name: getattr(self._request, name)
            for name in ("image", "images", "batch", "tokens", "samples", "accumulation")
        }
        if replace(request, **kept) == self._request:
            return self.forecast(request, inference=False, timeline=False)
        forecaster = Forecaster(request, self.card, source=self.source)
        return forecaster.forecast(request, inference=False, timeline=False)

    def trace(self, request: Request, *, inference: bool = True) -> AllocationTrace:
        """Every allocation and free of the run that ``request`` describes, for :meth:`read` and :func:`judge`."""
        return self._dry_run.run(request, inference=inference)

    def read(
        self, request: Request, trace: AllocationTrace, *, timeline: bool = True, under_limit: Replay | None = None
    ) -> Forecast:
        """The forecast that a trace of ``request`` makes.

        Args:
            request: What was run.
            trace: From :meth:`trace`.
            timeline: Whether to keep the live bytes after each event of a training step.
            under_limit: From :meth:`on_card`, where that was asked before.
        """
        visual, text = max(
            (self.source.lengths(sample, request.max_length) for sample in request.batch_of_samples), key=sum
        )
        points: list[tuple[str, tuple[int, ...]]] = []

        def watch(phase: str, live: tuple[int, ...]) -> None:
            points.append((phase, live))

        under_limit = under_limit or self.on_card(trace)
        free = under_limit
        if free is None or free.met_limit or timeline:
            free = replay(trace, watch=watch if timeline else None, watched=phases.TRAINING)
        found = free.phases
        ready = found.get(phases.PREPARE) or found[phases.LOAD]
        reserved = max(phase.peak_reserved for phase in found.values())
        verdict = None
        if self.card is not None and under_limit is not None:
            verdict = Verdict(self.card, available_on(self.card), reserved, under_limit.failure)
        return Forecast(
            request=request,
            label=self.source.label,
            visual_tokens=visual,
            sequence=visual + text,
            resident=ready.end_allocated,
            phases=tuple(found.values()),
            timeline=Timeline(tuple(p for p, _ in points), tuple(v for _, v in points)),
            verdict=verdict,
            linear_attention=self.source.linear_attention,
        )

    def on_card(self, trace: AllocationTrace) -> Replay | None:
        """The trace with no more memory than the card leaves the allocator; ``None`` without a card."""
        return None if self.card is None else replay(trace, limit=available_on(self.card))


def available_on(card: Card) -> int:
    """Bytes that the allocator can have: what torch sees of the card less the CUDA context."""
    return card.usable_bytes - card.context_bytes


def judge(trace: AllocationTrace, card: Card, reserved: int) -> Verdict:
    """Whether what ``trace`` allocates fits a card.

    Args:
        trace: From :meth:`Forecaster.trace`.
        card: The card, whose attention kernels need not be those of the trace.
        reserved: Most bytes the allocator reserves without a limit.
    """
    available = available_on(card)
    failure = replay(trace, limit=available).failure if reserved > available else None
    return Verdict(card, available, reserved, failure)


def largest(forecaster: Forecaster, first: Forecast, dimension: Dimension) -> Largest:
    """Search the largest image (same aspect ratio) or batch that fits the forecaster's card.

    The peak is nearly linear in the number of tokens, so a line gives a guess, and a run of its own confirms or refutes
    it; next come its neighbour, on the side where the answer is, and the middle of what is left, until the largest that
    fits and the smallest that does not are neighbours (for images: within 5 % of their tokens) or :data:`SEARCH_STEPS`
    runs were made.

    Args:
        forecaster: Has a card.
        first: A forecast already made.
        dimension: What to vary.

    Raises:
        ValueError: The forecaster has no card.
    """
    if forecaster.card is None or first.verdict is None:
        raise ValueError("the largest that fits needs a card")
    if first.request.samples:
        raise ValueError("the largest that fits is searched among samples of one size, and these are of several")
    ladder: _Ladder = _Images(forecaster, first.request) if dimension == "image" else _Batches(first)
    search = _Search(forecaster, first, ladder)
    for steps_left in reversed(range(SEARCH_STEPS)):
        if not search.step(last=steps_left == 0):
            break
    return Largest(
        dimension,
        forecast=search.forecast(),
        refused=search.refused(),
        bounded=dimension == "image" and search.best is not None and search.best >= ladder.largest,
    )


@dataclass
class _Tried:
    """One size that was tried.

    Attributes:
        request: Of that size.
        alive: Most bytes alive at once.
        fits: Whether it fits.
        trace: Its run, if it fits and is not the first.
        replayed: The run on the card.
    """

    request: Request
    alive: int
    fits: bool
    trace: AllocationTrace | None = None
    replayed: Replay | None = None


class _Search:
    """What is known of the sizes of a ladder."""

    def __init__(self, forecaster: Forecaster, first: Forecast, ladder: _Ladder) -> None:
        assert first.verdict is not None
        self._forecaster, self._first, self._ladder = forecaster, first, ladder
        self._available = first.verdict.available
        self._inference = first.peak is not first.training_peak
        peak = first.peak
        fixed = sum(peak.by_kind.get(kind, 0) for kind in _WITHOUT_TOKENS)
        self._line = [(ladder.without_tokens, fixed), (ladder.size_of(first.request), peak.peak_allocated)]
        self._known = {ladder.size_of(first.request): _Tried(first.request, peak.peak_allocated, first.verdict.fits)}

    @property
    def best(self) -> int | None:
        """The largest size that fits."""
        return max((size for size, tried in self._known.items() if tried.fits), default=None)

    @property
    def least_refused(self) -> int | None:
        """The smallest above it that does not."""
        best = self.best
        return min((size for size in self._known if best is None or size > best), default=None)

    def step(self, *, last: bool) -> bool:
        """Try one size more; whether there was one worth it."""
        ladder, best, refused = self._ladder, self.best, self.least_refused
        low = ladder.smallest if best is None else ladder.above(best)
        high = ladder.largest if refused is None else refused - 1
        if low > high:
            return False
        if best is None and last:
            guess: float = ladder.smallest
        elif len(self._known) > GUESSES and refused is not None:
            guess = (low + refused) / 2
        else:
            nearest = high if refused is None else max(low, ladder.below(refused))
            guess = min(max(low, self._crossing()), nearest)
        request = ladder.request(guess)
        if best is None and ladder.size_of(request) in self._known:
            request = ladder.request((low + high) / 2)  # gaps between blocks, which no line through peaks knows of
        size = ladder.size_of(request)
        if size in self._known:
            return False
        self._known[size] = self._try(request)
        self._line.append((size, self._known[size].alive))
        return True

    def _try(self, request: Request) -> _Tried:
        trace = self._forecaster.trace(request, inference=self._inference)
        alive = trace.most_alive()
        if alive > self._available:
            return _Tried(request, alive, fits=False)
        replayed = self._forecaster.on_card(trace)
        if replayed is None or replayed.failure is not None:
            return _Tried(request, alive, fits=False)
        for tried in self._known.values():
            tried.trace = None  # of what is smaller; it is large
        return _Tried(request, alive, True, trace, replayed)

    def _crossing(self) -> float:
        """Where the peak reaches :data:`SEARCH_TARGET`, by the line through the two nearest points."""
        target = SEARCH_TARGET * self._available
        (x0, y0), (x1, y1) = sorted(self._line, key=lambda point: abs(point[1] - target))[:2]
        return x0 + (target - y0) * (x1 - x0) / (y1 - y0) if y1 != y0 else x0

    def forecast(self) -> Forecast | None:
        """Of the largest that fits."""
        if self.best is None:
            return None
        tried = self._known[self.best]
        if tried.trace is None:
            return self._first
        return self._forecaster.read(tried.request, tried.trace, timeline=False, under_limit=tried.replayed)

    def refused(self) -> Refused | None:
        """The smallest that does not."""
        if self.least_refused is None:
            return None
        request = self._known[self.least_refused].request
        sample = request.batch_of_samples[0]
        return Refused(request, self._forecaster.source.lengths(sample, request.max_length)[0])


class _Ladder(Protocol):
    """Requests in order of one size."""

    smallest: int
    largest: int
    # Where the line of sizes would be at a batch without tokens.
    without_tokens: float

    def above(self, size: int) -> int:
        """The next size worth telling apart from ``size``."""

    def below(self, size: int) -> int:
        """The last size that ``size`` is the next of."""

    def request(self, size: float) -> Request:
        """The request nearest to ``size`` from below."""

    def size_of(self, request: Request) -> int:
        """The size of a request: its batch, or the visual tokens of one image."""


class _Batches:
    smallest: int = 1
    without_tokens: float = 0

    def __init__(self, first: Forecast) -> None:
        self._request = first.request
        self.largest: int = max(first.request.batch, SEARCH_VISUAL_TOKENS // first.visual_tokens)

    def above(self, size: int) -> int:
        return size + 1

    def below(self, size: int) -> int:
        return size - 1

    def request(self, size: float) -> Request:
        return replace(self._request, batch=max(1, int(size)))

    def size_of(self, request: Request) -> int:
        return request.batch


class _Images:
    """Images of one aspect ratio, ordered by their visual tokens."""

    def __init__(self, forecaster: Forecaster, request: Request) -> None:
        self._sizes = forecaster.source.sizes
        self._request = request
        step = self._sizes.patch_size * self._sizes.merge_size
        self._pixels_per_token = step * step
        self.without_tokens: float = -request.tokens / request.images
        self.smallest = max(1, self._sizes.min_pixels // self._pixels_per_token)
        self.largest: int = self.size_of(self.request(self._sizes.max_pixels // self._pixels_per_token))

    def above(self, size: int) -> int:
        return size + max(1, size // 20)

    def below(self, size: int) -> int:
        return size - max(1, -(-size // 21))

    def request(self, size: float) -> Request:
        height, width = self._request.image
        tokens = min(max(size, self.smallest), self._sizes.max_pixels // self._pixels_per_token)
        scale = (tokens * self._pixels_per_token / (height * width)) ** 0.5
        return replace(self._request, image=(max(1, int(height * scale)), max(1, int(width * scale))))

    def size_of(self, request: Request) -> int:
        return self._sizes.visual_tokens(*request.image)


def make_forecaster(request: Request, card: str | Card | None, compute_dtype: str | None) -> tuple[Forecaster, Request]:
    """A forecaster, and ``request`` completed with what the card decides: compute dtype and kernels.

    Args:
        request: What to forecast; its ``compute_dtype``, ``capability`` and ``device_bytes`` are replaced.
        card: The card to judge; ``None`` for none.
        compute_dtype: ``None`` for bfloat16 where the card has it, else float16.

    Raises:
        ValueError: Unknown card or model; bfloat16 on a card without it.
    """
    from pytest_qvl.vram.cap import compute_dtype as dtype_for

    known = find_card(card) if isinstance(card, str) else card
    if known is None:
        request = replace(request, compute_dtype=compute_dtype or "bfloat16")  # type: ignore[arg-type]
    else:
        dtype = dtype_for(known, compute_dtype or "auto")
        request = replace(
            request,
            compute_dtype=dtype,  # type: ignore[arg-type]
            capability=known.compute_capability,
            device_bytes=known.usable_bytes,
        )
    return Forecaster(request, known), request
