"""The weights of the resident base model: whether they are what was loaded, and who changed them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.models.fingerprint.digests import Fingerprint, differences

if TYPE_CHECKING:
    from collections.abc import Hashable

_UNKNOWN = object()


class BaseWeights:
    """A base model under watch: its digests are taken when the watch begins, and compared whenever it is asked.

    Args:
        model: The base model. What its first forward would change in place (the packing of 4-bit weights, the dtype of
            their biases) is settled here: otherwise the test that runs it would be named for the change.

    Attributes:
        model: As given.
        changed_by: Who changed it for good; ``None`` if it is as loaded.
    """

    def __init__(self, model: Any) -> None:
        from pytest_qvl.models.quantized import keep_quantized_weights_in_place

        keep_quantized_weights_in_place(model)
        cast_quantized_biases(model)
        self.model = model
        self.changed_by: Hashable = None
        # Kept from test to test, because the base is read after every one.
        self._fingerprint = Fingerprint()
        self._pristine = self._digests()

    def changes(self) -> list[str]:
        """Names of tensors that are not bitwise what they were at the last snapshot, or come or gone since."""
        return differences(self._pristine, self._digests())

    def snapshot(self, maker: Hashable) -> None:
        """Take the present weights for what the model should be; if they differ from before, ``maker`` changed them."""
        now = self._digests()
        if now != self._pristine:
            self._pristine, self.changed_by = now, maker

    def usable_by(self, users: frozenset[Hashable]) -> bool:
        """Whether the model is as loaded, or as one of ``users`` changed it."""
        return self.changed_by is None or self.changed_by in users

    def forget(self, maker: Hashable) -> None:
        """A model that ``maker`` changed is usable by nobody from now on."""
        if self.changed_by == maker:
            self.changed_by = _UNKNOWN

    def _digests(self) -> dict[str, int]:
        """Digests under the names that the tensors have without PEFT, whatever PEFT has wrapped by now."""
        from pytest_qvl.models.anatomy import anatomy
        from pytest_qvl.models.quantized import base_tensors

        return self._fingerprint.read(base_tensors(anatomy(self.model)))


def cast_quantized_biases(model: Any) -> None:
    """Cast the biases of 4-bit layers to the compute dtype, as their first forward would do in place.

    It does so where the dtypes differ (``Linear4bit.forward`` in bitsandbytes).
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit) and module.bias is not None and module.compute_dtype is not None:
            module.bias.data = module.bias.data.to(module.compute_dtype)
