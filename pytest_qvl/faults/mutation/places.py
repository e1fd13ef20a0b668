"""Everything of a live case that a mutation may change."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.mutation.code import Site, draw_code, lines_run, sites_of
from pytest_qvl.faults.mutation.drawn import CODE, SETTING, TENSOR, Mutation
from pytest_qvl.faults.mutation.probes import probed
from pytest_qvl.faults.mutation.settings import Place, draw_setting, settings_of
from pytest_qvl.faults.mutation.tensors import draw_tensor, tensors_of
from pytest_qvl.models.anatomy import anatomy

if TYPE_CHECKING:
    import random

    import torch

    from pytest_qvl.faults.case import Case


@dataclass(frozen=True)
class Places:
    """What can be changed: tensors by name, settings in groups that are alike, expressions that run."""

    tensors: list[tuple[str, torch.Tensor]]
    settings: list[list[Place]]
    sites: list[Site]

    @classmethod
    def of(cls, case: Case) -> Places:
        """Everything of a case; its code is run twice, to see which lines take part every time."""
        parts = anatomy(case.model)
        probed(case)  # what runs in a process once, to fill a cache, would be drawn in some processes and not in others
        with lines_run(_files(case)) as lines:
            probed(case)
        return cls(tensors_of(parts), settings_of(parts, case.processor), sites_of(lines))

    def draw(self, kind: str, generator: random.Random) -> Mutation | None:
        """A mutation of a kind; nothing if the one that was drawn changes nothing."""
        if kind == TENSOR:
            return draw_tensor(self.tensors, generator)
        if kind == SETTING:
            return draw_setting(self.settings, generator)
        assert kind == CODE
        return draw_code(self.sites, generator)


def _files(case: Case) -> set[str]:
    """Sources of the model, its attention, its adapted and 4-bit layers, and its image processor."""
    from transformers.integrations import sdpa_attention

    parts = anatomy(case.model)
    modules: list[Any] = [parts.base, *parts.wrapped.modules()]
    kinds = {type(module) for module in modules if _layer(type(module))}
    return {inspect.getfile(kind) for kind in (*kinds, type(case.processor.image_processor))} | {
        inspect.getfile(sdpa_attention)
    }


def _layer(kind: type) -> bool:
    """Whether a class is a layer of a model, of PEFT or of bitsandbytes: torch's own are tested by others."""
    return kind.__module__.partition(".")[0] in ("transformers", "peft", "bitsandbytes")
