from __future__ import annotations

from types import ModuleType

import pytest
import torch

from pytest_qvl.models.attributes import attributes_replaced


class Base(torch.nn.Module):
    def forward(self) -> int:
        return 0


class Derived(Base):
    pass


def test_own_attributes_come_back_and_inherited_ones_are_inherited_again() -> None:
    module, python = Derived(), ModuleType("python")
    python.setting = 1
    changes = [(module, "forward", lambda: 1), (Derived, "forward", lambda _: 2), (python, "setting", 3)]

    def failing() -> None:
        with attributes_replaced(changes):
            assert (module.forward(), Derived().forward(), python.setting) == (1, 2, 3)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        failing()
    assert (module.forward(), Derived().forward(), python.setting) == (0, 0, 1)
    assert "forward" not in vars(module) | vars(Derived)


def test_what_a_torch_module_has_registered_is_hidden_and_stays() -> None:
    linear = torch.nn.Linear(2, 2)
    weight = linear.weight
    with attributes_replaced([(linear, "weight", None)]):
        assert linear.weight is None
        assert dict(linear.named_parameters())["weight"] is weight
    assert linear.weight is weight
