"""What a model makes of the probes, bit by bit: whether a mutation changes anything at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.definitions.disk import trained
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.attention import other_attention
from pytest_qvl.models.renamed import kv_cache_name
from pytest_qvl.models.state import preserved

if TYPE_CHECKING:
    import torch

    from pytest_qvl.faults.case import Case

NEW_TOKENS = 8
# A gradient of a sum in another order may differ by so many times what another attention kernel makes of it: the
# factor of the noise floor (docs/limits.md#noise-floor), for the same reason: one other order is a sample of many.
FACTOR = 4.0


@dataclass(frozen=True)
class Probed:
    """What came out, all on the CPU.

    Attributes:
        logits: Of the evaluation batch, of each step of its generation, and of the training batch, one after the other,
            float32; and of a token that follows the first with the cache, as a decoding loop of one's own does. A step
            may be off without another token winning, and generate() brings positions of its own.
        loss: Of the training batch.
        gradients: Of every adapter parameter, one after the other, float32.
        replies: Generated ids.
    """

    logits: torch.Tensor
    loss: torch.Tensor
    gradients: torch.Tensor
    replies: torch.Tensor

    def equals(self, other: Probed) -> bool:
        """Whether all of it is bitwise the same."""
        import torch

        return all(torch.equal(one, two) for one, two in zip(vars(self).values(), vars(other).values(), strict=True))


@dataclass(frozen=True)
class Healthy:
    """What the healthy model makes of the probes, and by how much rounding alone moves that.

    Attributes:
        probed: It.
        logits: Largest difference of a logit that rounding explains, see
            :meth:`pytest_qvl.checks.support.noise_floor.NoiseFloor.limit_for`.
        gradients: Largest relative difference (L2 norm) of all gradients that it explains: four times what eager
            attention in place of SDPA makes of them.
    """

    probed: Probed
    logits: float
    gradients: float

    @classmethod
    def of(cls, case: Case) -> Healthy:
        """Measure both on a healthy case with a reference."""
        made = probed(case)
        with other_attention(anatomy(case.model)):
            other = probed(case)
        limit = case.reference.floor.limit_for(made.logits.abs().max().item())
        return cls(made, limit, FACTOR * _relative(other.gradients, made.gradients))

    def resolves(self, mutated: Probed) -> bool:
        """Whether what the mutated model makes differs by more than rounding explains.

        A loss is a mean of log-probabilities, each of which moves by no more than twice what the logits do.
        """
        before = self.probed
        if mutated.logits.shape != before.logits.shape or not mutated.replies.equal(before.replies):
            return True
        moved = (mutated.logits - before.logits).abs().max().item()
        loss = (mutated.loss - before.loss).abs().item()
        gradients = _relative(mutated.gradients, before.gradients)
        return not (moved <= self.logits and loss <= 2 * self.logits and gradients <= self.gradients)


def _relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def probed(case: Case) -> Probed:
    """Run the probes: one forward, one training step without a step, and a generation, with an adapter that acts.

    Under a fresh adapter B is zero: then neither A nor the scaling takes part in a forward.
    """
    import torch

    model = case.model
    batch, training = case.batch(), case.batch(padding_side="right", answers=True)
    with preserved(model, training=False, seed=0), trained(case, 0.02):
        with torch.no_grad():
            prompt = model(**batch, use_cache=True)
            followed = model(**_following(prompt, kv_cache_name(anatomy(model)))).logits
            replies = model.generate(
                **batch,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        model.train()
        model.zero_grad(set_to_none=True)
        made = model(**training, use_cache=False)
        made.loss.backward()
        # One that no gradient reaches counts as zero: a mutation may cut it off.
        gradients = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
    return Probed(
        torch.cat(
            [one.detach().float().flatten().cpu() for one in (prompt.logits, followed, *replies.logits, made.logits)]
        ),
        made.loss.detach().float().cpu(),
        torch.cat([gradient.float().flatten().cpu() for gradient in gradients]),
        replies.sequences.cpu(),
    )


def _following(prompt: Any, cache: str) -> dict[str, Any]:
    """Inputs of the most probable next tokens, with the cache of the prompt under the name that the forward has for it.

    Without a mask: with one, Transformers 5.17 counts positions for all of it, and asks for these of its own.
    """
    next_tokens = prompt.logits[:, -1:].argmax(dim=-1)
    return {"input_ids": next_tokens, cache: prompt[cache], "use_cache": True}
