"""Everything of a case that a fault may change, to see that nothing of it is left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_qvl.faults.case import Case


def state(case: Case) -> tuple[Any, ...]:
    """Digests of every tensor, and the settings of modules, processor and configurations; comparable."""
    from pytest_qvl.models.anatomy import anatomy
    from pytest_qvl.models.fingerprint.digests import digests
    from pytest_qvl.models.quantized import base_tensors

    parts = anatomy(case.model)
    tensors = dict((*base_tensors(parts), *case.model.named_parameters(), *case.model.named_buffers()))
    processor = vars(case.processor.image_processor)
    modules = [
        (name, m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m)))
        for name, m in case.model.named_modules()
    ]
    return (
        digests(tensors.items()),
        modules,
        [parameter.requires_grad for parameter in case.model.parameters()],
        repr({name: value for name, value in processor.items() if not callable(value)}),
        sorted(processor),
        parts.base.generation_config.to_dict(),
        case.lora_config.to_dict(),
    )
