"""Will it fit? Device memory of loading, inference and training, without a GPU and without weights.

The real model code (Transformers, PEFT, bitsandbytes) runs on tensors without data; every allocation and free
is followed through a simulation of torch's caching allocator. Importing this package is cheap: torch comes
with the first forecast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.vram.forecast.request import Request, Sample
from pytest_qvl.vram.forecast.result import Forecast

if TYPE_CHECKING:
    from pytest_qvl.vram.cards import Card

__all__ = ["Forecast", "Request", "Sample", "forecast"]


def forecast(
    model: str = "qwen2.5-vl-7b", *, card: str | Card | None = None, compute_dtype: str | None = None, **settings: Any
) -> Forecast:
    """Forecast the device memory of one configuration.

    Args:
        model: Released name or a local folder with a ``config.json``.
        card: The card to judge, such as ``"t4"``.
        compute_dtype: ``None`` for bfloat16 where the card has it, else float16.
        settings: Any other field of :class:`Request`, such as ``image=(1024, 1024)``, ``batch=4`` or
            ``trainer="loop"``.

    Raises:
        TypeError: A setting that :class:`Request` does not have.
        ValueError: Unknown model, card or option; an image without pixels; a negative rank; bfloat16 on a
            card that lacks it.
    """
    request = Request(model=model, **settings)
    from pytest_qvl.vram.forecast.run import make_forecaster

    forecaster, request = make_forecaster(request, card, compute_dtype)
    return forecaster.forecast(request)
