"""Whose checkpoint function layers use while a check turns checkpointing on, and that all is put back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest


@pytest.mark.parametrize("own_way", [False, True])
def test_layers_that_are_prepared_keep_their_own_way_if_asked(own_way):
    from torch import nn

    from pytest_qvl.models.training import checkpointing

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.gradient_checkpointing = False

    def own(function, *args):
        return function(*args)

    prepared, bare = Layer(), Layer()
    prepared._gradient_checkpointing_func = own
    with checkpointing(SimpleNamespace(base=nn.Sequential(prepared, bare)), True, own_way=own_way):
        assert prepared.gradient_checkpointing and bare.gradient_checkpointing
        assert (prepared._gradient_checkpointing_func is own) == own_way
        assert bare._gradient_checkpointing_func.keywords == {"use_reentrant": False}
    assert prepared._gradient_checkpointing_func is own
    assert not hasattr(bare, "_gradient_checkpointing_func")
    assert not prepared.gradient_checkpointing
