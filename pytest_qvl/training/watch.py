"""What passes the model in the training's own forwards: batches on their way in, losses on their way out.

The guard draws nothing from the data loader, which would change the order of the data and the state of the generators
that shuffle it; it looks at what the trainer hands to the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from pytest_qvl.evidence import CannotJudge
from pytest_qvl.models.layers import language_layers
from pytest_qvl.models.taps import vision_features

if TYPE_CHECKING:
    import torch

    from pytest_qvl.models.anatomy import Parts

# What a trainer adds to a batch for the loss and the output alone.
_NO_INPUTS = ("num_items_in_batch", "return_dict", "return_outputs", "use_cache")
# Those whose hooks are on a model.
_HOOKED: WeakSet[Watch] = WeakSet()


class Watch:
    """Hooks on the model that a trainer trains.

    Args:
        parts: Of the model.
        look_at_batch: Is given each batch of a training forward before the model is.
        no_path: Is called where the loss of a training forward has no path to any parameter.
        compiled: Whether ``torch.compile`` compiles the model; it leaves the hooks out of its graphs then.
        alive: Whether the training goes on. A training that ends by an exception tells no callback of it, so the hooks
            ask at every forward, and come off by themselves once it is over.

    Attributes:
        losses: Of every training forward since they were taken; tensors without a graph, on their device.
        images: Whether a batch of the present step had images.
        calls: Calls of the vision tower in training forwards.
        followed: Those whose output requires grad.
        pixels_require_grad: Whether ``pixel_values`` did.
    """

    def __init__(
        self,
        parts: Parts,
        look_at_batch: Callable[[dict[str, Any]], None],
        no_path: Callable[[], None],
        *,
        compiled: bool,
        alive: Callable[[], bool],
    ) -> None:
        for earlier in list(_HOOKED):
            earlier.remove_if_over()
        self._parts, self._look_at_batch, self._no_path, self._alive = parts, look_at_batch, no_path, alive
        self.losses: list[torch.Tensor] = []
        self.images = False
        self.calls = self.followed = 0
        self.pixels_require_grad = False
        wrap = _not_compiled if compiled else _as_it_is
        self._compiled = compiled
        before, after, after_vision = map(wrap, (self._before, self._after, self._after_vision))
        self._after_vision_hook = after_vision
        self._handles = [
            parts.wrapped.register_forward_pre_hook(before, with_kwargs=True),
            parts.wrapped.register_forward_hook(after),
            parts.vision_tower.register_forward_hook(after_vision),
        ]
        _HOOKED.add(self)

    def look_at_attention(self, look: Callable[[dict[str, Any]], None]) -> None:
        """Give what the next training forward calls the first layer with attention with, by name, to a function.

        Raises:
            CannotJudge: The model is compiled, or no layer of it has attention.
        """
        if self._compiled:
            raise CannotJudge("the model is compiled, and a hook on a layer would break its graph")
        layer = next((layer.module for layer in language_layers(self._parts) if layer.attends), None)
        if layer is None:
            raise CannotJudge("no layer of the language model has attention")

        def once(_layer: Any, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._is_trained(self._parts.wrapped):
                self._handles.remove(handle)
                handle.remove()
                look(kwargs)

        handle = layer.register_forward_pre_hook(once, with_kwargs=True)
        self._handles.append(handle)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        _HOOKED.discard(self)

    def remove_if_over(self) -> bool:
        """Take the hooks off if the training is over; whether it is."""
        over = not self._alive()
        if over:
            self.remove()
        return over

    def take_losses(self) -> list[torch.Tensor]:
        """The losses so far; the list begins anew."""
        taken, self.losses = self.losses, []
        return taken

    def vision_hooks(self) -> list[str]:
        """Names of the forward hooks on tower and patch embedding that are not the guard's."""
        found = {**self._parts.vision_tower._forward_hooks, **self._parts.patch_embed._forward_hooks}
        others = [hook for hook in found.values() if hook is not self._after_vision_hook]
        return [getattr(hook, "__name__", type(hook).__name__) for hook in others]

    def _is_trained(self, model: Any) -> bool:
        """Whether a forward of the model is one of the training that is watched, no evaluation and no later one."""
        import torch

        return model.training and torch.is_grad_enabled() and not self.remove_if_over()

    def _before(self, model: Any, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        import torch

        if not self._is_trained(model):
            return
        batch = {
            name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor) and name not in _NO_INPUTS
        }
        pixels = batch.get("pixel_values", batch.get("pixel_values_videos"))
        if pixels is not None:
            self.images = True
            self.pixels_require_grad |= pixels.requires_grad
        self._look_at_batch(batch)

    def _after(self, model: Any, _args: tuple[Any, ...], output: Any) -> None:
        if not self._is_trained(model):
            return
        loss = _loss_of(output)
        if loss is not None:
            self.losses.append(loss.detach())
            if not loss.requires_grad:
                self._no_path()

    def _after_vision(self, _module: Any, _args: tuple[Any, ...], output: Any) -> None:
        # Reentrant checkpointing of a whole model would call this without gradients.
        if self._is_trained(self._parts.wrapped):
            self.calls += 1
            self.followed += vision_features(output).requires_grad


def _loss_of(output: Any) -> torch.Tensor | None:
    """The loss in a model's output; of TRL's fused head (1.15), which leaves it to the trainer, the sum over tokens."""
    import torch

    def named(name: str) -> Any:
        return output.get(name) if isinstance(output, dict) else getattr(output, name, None)

    loss = named("loss")
    if loss is None and isinstance(likelihoods := named("log_probs"), torch.Tensor):
        loss = -likelihoods.sum()
    return loss if isinstance(loss, torch.Tensor) and loss.numel() == 1 else None


def _as_it_is(hook: Callable[..., None]) -> Callable[..., None]:
    return hook


def _not_compiled(hook: Callable[..., None]) -> Callable[..., None]:
    import torch

    excluded: Callable[..., None] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return excluded
