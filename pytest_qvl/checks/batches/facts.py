"""What a batch is judged by: numbers of the model's configuration, and the batch itself, ids and masks on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.registry import SHARDED, WRAPPERS
from pytest_qvl.checks.support.packing import samples_in_rows
from pytest_qvl.checks.support.placeholders import attended, kinds
from pytest_qvl.checks.support.turns import TurnReader
from pytest_qvl.evidence import CannotJudge, InputError
from pytest_qvl.models.anatomy import unwrap
from pytest_qvl.models.families import FAMILIES
from pytest_qvl.samples.batch import IGNORED

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from pytest_qvl.checks.support.placeholders import Kind
    from pytest_qvl.checks.support.turns import Turn
    from pytest_qvl.models.families import Family

TAKES = "a Qwen-VL model (wrapped or not), its configuration, or the folder of one"


@dataclass(frozen=True)
class Facts:
    """What the configuration says.

    Attributes:
        family: Qwen2-VL, Qwen2.5-VL or Qwen3-VL.
        config: The whole configuration.
        image: Id of the placeholder of images.
        video: Id of the placeholder of videos.
        vision: All ids that stand for vision.
        merge: Patches per visual token along each side.
        vocabulary: Rows of the text embeddings.
    """

    family: Family
    config: Any
    image: int
    video: int
    vision: tuple[int, ...]
    merge: int
    vocabulary: int

    @property
    def kinds(self) -> tuple[Kind, Kind]:
        """Images and videos, by these ids."""
        return kinds(self.image, self.video)

    @property
    def tokens_per_second(self) -> float | None:
        """Temporal ids per second of video; None where time is counted in temporal patches."""
        if self.family.video_time != "seconds":
            return None
        return float(getattr(self.config.vision_config, "tokens_per_second", 1.0))

    @property
    def frames_apart(self) -> bool:
        """Whether the frames of a video are written apart, each behind its time as text (Qwen3-VL)."""
        return self.family.video_time == "words"


def facts(model_or_config: Any) -> Facts:
    """What a model, a configuration or a folder says.

    Raises:
        InputError: It is none of them.
        CannotJudge: It is of a family that is not known.
    """
    config = _config(model_or_config)
    family = FAMILIES.get(str(getattr(config, "model_type", None)))
    if family is None:
        known = ", ".join(each.label for each in FAMILIES.values())
        raise CannotJudge(
            f"batches are judged for {known}; model_type of the configuration is "
            f"{getattr(config, 'model_type', None)!r}"
        )
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id")
    vision = sorted({i for name in names if isinstance(i := getattr(config, name, None), int)})
    return Facts(
        family,
        config,
        int(config.image_token_id),
        int(config.video_token_id),
        tuple(vision),
        int(config.vision_config.spatial_merge_size),
        int(config.get_text_config().vocab_size),
    )


def _config(given: Any) -> Any:
    if isinstance(given, str | Path):
        return _config_of_folder(given)
    inner = given
    while (kind := type(inner).__name__) in (*WRAPPERS, *SHARDED):
        inner = getattr(inner, WRAPPERS.get(kind, "module"))
    inner = unwrap(inner)
    config = getattr(inner, "config", inner)
    if not hasattr(config, "model_type"):
        raise InputError(f"batch: model_or_config is {TAKES}, got a value of type {type(given).__name__}")
    return config


def _config_of_folder(folder: str | Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"batch: no configuration can be read from {str(folder)!r}: {reason}") from None


class View:
    """A batch and the tokenizer that reads it.

    Attributes:
        batch: Names and tensors as they were given, without those that are None.
        ids: ``input_ids`` ``(rows, length)`` int64 on the CPU.
        tokenizer: Of the processor.
        reader: Finds the turns of a row.
        end: Id of ``<|im_end|>``.
        training: Whether labels are judged.
    """

    def __init__(self, batch: Mapping[str, Any], processor: Any, known: Facts, *, training: bool) -> None:
        self.batch = {name: batch[name] for name in batch.keys() if batch[name] is not None}  # noqa: SIM118
        self.known, self.training = known, training
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.reader = TurnReader(self.tokenizer)
        self.ids: torch.Tensor = self.batch["input_ids"].cpu().long()
        self._tokens = len(self.tokenizer)  # Transformers 4 counts them anew each time
        self.end = self.reader.end

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.ids)

    def aligned(self, name: str) -> torch.Tensor | None:
        """A tensor of the shape of ``input_ids`` on the CPU; None where it is missing or of another shape."""
        value = self.batch.get(name)
        return None if value is None or tuple(value.shape) != tuple(self.ids.shape) else value.cpu()

    @cached_property
    def mask(self) -> torch.Tensor:
        """Which tokens are attended to, ``(rows, length)`` bool; all where no mask of that shape says otherwise."""
        return attended({"input_ids": self.ids, "attention_mask": self.aligned("attention_mask")})

    @cached_property
    def labels(self) -> torch.Tensor | None:
        """``labels`` on the CPU where they are judged."""
        given = self.aligned("labels") if self.training else None
        return None if given is None else given.long()

    @cached_property
    def padding(self) -> torch.Tensor:
        """Tokens at either end of a row that are padding for certain, ``(rows, length)`` bool."""
        return self._ends(certain=True)

    @cached_property
    def text(self) -> torch.Tensor:
        """Tokens that are no padding for certain, ``(rows, length)`` bool."""
        return ~self._ends(certain=False)

    def _ends(self, *, certain: bool) -> torch.Tensor:
        """Runs of pad tokens at either end of a row; of one that may end a text, the first behind it is uncertain."""
        import torch

        pad = self.tokenizer.pad_token_id
        if pad is None:
            return torch.zeros_like(self.ids, dtype=torch.bool)
        pads = self.ids == pad
        leading = pads.long().cumprod(dim=1).bool()
        trailing = pads.flip(1).long().cumprod(dim=1).flip(1).bool()
        if certain:
            first = trailing & ~trailing.roll(1, dims=1)
            first[:, 0] = trailing[:, 0]
            if pad not in (self.end, self.tokenizer.eos_token_id):
                first &= self.mask & (torch.zeros_like(pads) if self.labels is None else self.labels != IGNORED)
            trailing &= ~first
        ends: torch.Tensor = leading | trailing
        return ends

    def decoded(self, ids: list[int], *, special: bool = True) -> str:
        """Ids as text, without those that are no token, and with `special` tokens or not."""
        known = [each for each in ids if 0 <= each < self._tokens]
        text: str = self.tokenizer.decode(known, skip_special_tokens=not special)
        return text

    def said_in(self, row: int, turn: Turn) -> str:
        """The text of a turn, without what stands for vision."""
        vision = {*self.known.vision}
        return self.decoded([each for each in self.ids[row, turn.start : turn.stop].tolist() if each not in vision])

    def shown(self, ids: list[int] | torch.Tensor) -> str:
        """Ids as text, cut to what a sentence can hold."""
        text = self.decoded((ids if isinstance(ids, list) else ids.tolist())[:40])
        return repr(text if len(text) <= 60 else text[:57] + "...")

    def token(self, row: int, place: int) -> str:
        """One token as it is written."""
        given = int(self.ids[row, place])
        if not 0 <= given < self._tokens:
            return str(given)
        return repr(self.tokenizer.convert_ids_to_tokens(given))

    @cached_property
    def _packing(self) -> tuple[str, torch.Tensor]:
        """What says where samples of a packed row begin, and the number of each token's sample ``(rows, length)``."""
        import torch

        mask, lengths = self.batch.get("attention_mask"), self.batch.get("cu_seq_lens_q")
        if lengths is not None and self.rows == 1:
            places = torch.arange(self.ids.shape[1])[None]
            return "lengths", (places[..., None] >= lengths.cpu().flatten()[1:-1]).long().sum(dim=-1)
        if mask is not None and mask.ndim == 4:
            return "mask", self._blocks(mask)
        if (own := self.aligned("attention_mask")) is not None and int(own.max()) > 1:
            return "mask", (own.long() - 1).clamp(min=0)
        if not self._has_positions_of_its_shape():
            return "", torch.zeros_like(self.ids)
        return "positions", samples_in_rows({"input_ids": self.ids, "attention_mask": own, **self._positions()})

    def _positions(self) -> dict[str, Any]:
        """``position_ids``; of a batch that brings text positions apart from them (ms-swift), those."""
        given = self.batch.get("text_position_ids", self.batch["position_ids"]).cpu()
        return {"position_ids": given}

    def _has_positions_of_its_shape(self) -> bool:
        given = self.batch.get("position_ids")
        return given is not None and given.ndim in (2, 3) and tuple(given.shape[-2:]) == tuple(self.ids.shape)

    def _blocks(self, mask: torch.Tensor) -> torch.Tensor:
        """Samples by a mask ``(rows, 1, length, length)``: one begins where a token does not see the one before it."""
        import torch

        own = mask[:, 0].cpu()
        sees = own if own.dtype == torch.bool else own == 0 if own.is_floating_point() else own > 0
        if tuple(sees.shape[1:]) != (self.ids.shape[1],) * 2:
            return torch.zeros_like(self.ids)
        before = sees.diagonal(offset=-1, dim1=1, dim2=2)
        itself = sees.diagonal(dim1=1, dim2=2)
        begins = torch.zeros_like(self.ids)
        begins[:, 1:] = (~before & itself[:, 1:] & itself[:, :-1]).long()
        numbers: torch.Tensor = begins.cumsum(dim=1)
        return numbers

    @property
    def parted_by(self) -> str:
        """``"lengths"``, ``"mask"``, ``"positions"`` or nothing."""
        return self._packing[0]

    @property
    def segments(self) -> torch.Tensor:
        """Number of each token's sample within its row, ``(rows, length)`` int64; 0 where nothing is packed."""
        return self._packing[1]

    @cached_property
    def starts(self) -> list[set[int]]:
        """Places at which the next sample of a packed row begins, row by row."""
        return [
            {place for place in range(1, len(row)) if row[place] != row[place - 1]} for row in self.segments.tolist()
        ]

    @property
    def is_packed(self) -> bool:
        """Whether any row holds more than one sample."""
        return bool(self.segments.any())

    @cached_property
    def behind_text(self) -> torch.Tensor:
        """Tokens that stand for vision behind everything that a row attends to, ``(rows, length)`` bool."""
        later = self.mask.flip(1).long().cumsum(dim=1).flip(1) == 0
        return self.vision & later

    @cached_property
    def vision(self) -> torch.Tensor:
        """Tokens that stand for vision, ``(rows, length)`` bool."""
        import torch

        return torch.isin(self.ids, torch.tensor(self.known.vision))
