"""Every module computes what its definition says, on the input that it really had."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.greedy import STEPS
from pytest_qvl.checks.support.layers import linears
from pytest_qvl.checks.support.layers.adapters import Adapters
from pytest_qvl.checks.support.layers.copies import place_of, resting, trained_copies
from pytest_qvl.checks.support.layers.exact import exact_products
from pytest_qvl.checks.support.layers.flow import Flow
from pytest_qvl.checks.support.layers.mixers import CHUNKS
from pytest_qvl.checks.support.layers.recomputed import judge_recomputation
from pytest_qvl.checks.support.layers.returned import Returned
from pytest_qvl.checks.support.layers.tally import Tally
from pytest_qvl.checks.support.layers.text import Text
from pytest_qvl.checks.support.layers.tower import Tower
from pytest_qvl.checks.support.packing import is_packed
from pytest_qvl.checks.support.placeholders import attended
from pytest_qvl.checks.support.unpacked_weights import require_unpacked_weights
from pytest_qvl.evidence import CannotJudge, Evidence, Judge
from pytest_qvl.models.adapters import adapter_configs, base_modules
from pytest_qvl.models.anatomy import TOWER, anatomy
from pytest_qvl.models.layers import language_layers, vision_theta
from pytest_qvl.models.mixer_kernels import PYTORCH, mixer_kernels
from pytest_qvl.models.renamed import kv_cache_in, kv_cache_name
from pytest_qvl.models.state import preserved
from pytest_qvl.models.taps import forget_positions
from pytest_qvl.models.training import checkpointing, is_checkpointing

if TYPE_CHECKING:
    import torch

    from pytest_qvl.checks.support.layers.flow import Call
    from pytest_qvl.models.anatomy import Parts

# Calls of a generation whose linears are judged: prefill and the first step; all later steps are the second again.
FULLY_JUDGED = 2
# Linear attention hands its state on from one chunk of tokens to the next: a row of two chunks and a bit shows it.
SEVERAL_CHUNKS = 2 * max(CHUNKS) + 2
# Of the tokens that were generated, where they go on behind the state that they left.
PIECES = 2


@check(promise=12)
def layer_arithmetic(model: Any, batch: dict[str, torch.Tensor], lora_config: Any = None) -> Evidence:
    """Every linear, norm, attention, rotary embedding, MLP and adapter computes what its definition says.

    The batch goes through ``generate`` for eight forced tokens, and through a forward in train mode, without and with
    gradient checkpointing; where layers keep a state (linear attention), the eight first go on behind it in two pieces,
    as a prompt that is prefilled in pieces does. Each module's input and output are held, as it runs, to an independent
    reference on that very input (:mod:`pytest_qvl.oracles`): errors do not accumulate, so that 1 % in one layer is seen
    where logits hide it. No second model and no recorded reference is needed: a model that was damaged before anything
    was recorded is judged the same. B of every adapter is random for that time, and put back bitwise. Copies that are
    trained in full (``modules_to_save``) are judged in place of the modules whose work they do, and the logits that the
    model returns are its head's, bitwise. Where the backbone has linear attention (Qwen3.5) and no row of the batch has
    130 tokens, two chunks of its kernels and two tokens more, a row of the batch's text goes through one forward more.

    Every limit is the rounding of the operation itself, from its dtype and number of terms: see
    docs/limits.md#layer-arithmetic and the oracles' docstrings. The figures are error over limit.

    Args:
        model: Wrapped or not; 4-bit, 16-bit or float32.
        batch: Model inputs, left-padded.
        lora_config: The ``peft.LoraConfig`` that was asked for, of the active adapter (the first, if several are); None
            takes the one that the adapter came with.

    Raises:
        CheckFailed: A module computes something else.
        CannotJudge: Weights were rewritten for a CPU kernel or have no data, the batch is packed, or an adapter learns
            a prompt.
    """
    parts = anatomy(model)
    judge = Judge("layer_arithmetic", "every layer computes what its definition says")
    require_unpacked_weights(parts)
    _require_data(parts)
    if is_packed(batch):
        raise CannotJudge("the batch is packed: give one sample a row")
    for name, config in adapter_configs(parts).items():
        if getattr(config, "is_prompt_learning", False):
            raise CannotJudge(f"the adapter {name} ({type(config).__name__}) puts tokens of its own before the batch")
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "position_ids")}
    tally = Tally()
    with preserved(model, training=False, seed=0), exact_products():
        adapters = Adapters(parts, lora_config, tally)
        adapters.judge_sharing()
        with adapters.with_random_b():
            _run(parts, inputs, adapters, tally)
            judge_recomputation(parts, inputs, adapters, tally)
    several = {name for layer in adapters.layers.values() for name in adapters.active(layer)}
    if len(several) > 1:
        judge.note(f"{len(several)} adapters are active and judged as a sum: {', '.join(sorted(several))}")
    if "pixel_values" in inputs:
        judge.report("base of the tower's rotary embedding", vision_theta(parts))
    else:
        judge.note("the vision tower was not judged: the batch has no image")
    _report_kernels(judge, parts)
    tally.report(judge)
    rows = [(name, op.judged, op.worst) for name, op in tally.operations.items()]
    return judge.verdict(("operation", "comparisons", "largest error / limit"), rows)


def _report_kernels(judge: Judge, parts: Parts) -> None:
    """Say what computed linear attention: a package that is missing is replaced without a word but a warning."""
    kernels = mixer_kernels(parts)
    for what, package in kernels.items():
        judge.report(f"linear attention, {what}, computed by", package)
    if PYTORCH in kernels.values() and parts.device.type == "cuda":
        judge.note(
            "linear attention ran in Transformers' PyTorch code, which is right and an order of magnitude slower than "
            "kernels: install flash-linear-attention and causal-conv1d (huggingface/transformers#48718)"
        )


def _require_data(parts: Parts) -> None:
    empty = next((name for name, tensor in parts.base.named_parameters() if tensor.device.type == "meta"), "")
    if empty:
        raise CannotJudge(
            f"{empty} has no data between two calls (meta device): layers whose weights are offloaded, or never came, "
            "cannot be computed again; load the whole model onto its devices"
        )


def _run(parts: Parts, inputs: dict[str, Any], adapters: Adapters, tally: Tally) -> None:
    """Generate eight tokens, then one forward in train mode, and its head again in eval mode, judging every module.

    Where layers keep a state, the eight go on behind it before that. After it comes the same forward with gradient
    checkpointing, or without where the model has it on, but for its linears; at the end a row of several chunks, if
    linear attention was given none so far.
    """
    import torch
    from transformers import GenerationConfig

    flow = Flow()
    text = Text(parts, tally, flow, attended(inputs).bool())
    modules, returned = _Modules(parts, tally, flow, adapters), Returned(parts, tally, flow)
    with flow.running(), torch.no_grad():
        modules.watch()
        text.watch()
        Tower(parts, tally, flow).watch()
        returned.watch()
        flow.before(parts.language_backbone, lambda _a, _k: modules.next_call())
        forget_positions(parts)
        model: Any = parts.wrapped
        # The user's own settings are set aside (``preserved`` puts them back), and with them whatever ends a reply.
        parts.base.generation_config = GenerationConfig()
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=STEPS,
            pad_token_id=0,
            suppress_tokens=list(parts.vision_token_ids),
            use_cache=True,
            return_dict_in_generate=True,
        )
        made = model.generate(**inputs, generation_config=config)
        if any(not layer.attends for layer in language_layers(parts)):
            _go_on(parts, inputs, made, modules)

        def forward(given: dict[str, Any], phase: str, *, training: bool = True, linears_too: bool = True) -> None:
            text.restart(attended(given).bool())
            forget_positions(parts)
            modules.restart(f" ({phase})", linears_too=linears_too)
            model.train(training)
            model(**given, use_cache=False, logits_to_keep=1)
            model.eval()

        forward(inputs, "in train mode")
        returned.call_again(inputs)
        # The other way of the two calls layers in a way of its own, and shows what the first forward left behind.
        other = not is_checkpointing(parts)
        with checkpointing(parts, enabled=other):
            phase = f"in train mode, {'' if other else 'not '}checkpointed"
            forward(inputs, phase, linears_too=False)
        if (row := _row_of_several_chunks(parts, inputs)) is not None:
            forward(row, f"in a row of {SEVERAL_CHUNKS} tokens", training=False)
        modules.note_uncalled(with_image="pixel_values" in inputs)


def _row_of_several_chunks(parts: Parts, inputs: dict[str, Any]) -> dict[str, torch.Tensor] | None:
    """One row of text, ``(1, 130)`` int64, from that of the batch; None where it is needless or there is no text."""
    import torch

    mask = attended(inputs).bool()
    if all(layer.attends for layer in language_layers(parts)) or int(mask.sum(dim=1).max()) >= SEVERAL_CHUNKS:
        return None
    ids = inputs["input_ids"][mask]
    ids = ids[~torch.isin(ids, torch.tensor(parts.vision_token_ids, device=ids.device))]
    if not len(ids):
        return None
    return {"input_ids": ids.repeat(SEVERAL_CHUNKS // len(ids) + 1)[None, :SEVERAL_CHUNKS]}


def _go_on(parts: Parts, inputs: dict[str, Any], made: Any, modules: _Modules) -> None:
    """Give the model the tokens that it generated again, several at a time, behind the state that they left.

    Neither ``generate`` nor training does that, and code for several tokens that begins with an empty state passes
    both; pieces of a long prompt and a further turn behind a kept cache are what it spoils. The second piece reads the
    state that the first one has to have written.
    """
    import torch

    cache, new = kv_cache_in(made), made.sequences[:, inputs["input_ids"].shape[1] :]
    mask = attended(inputs).long()
    mask = torch.cat((mask, mask.new_ones(len(mask), cache.get_seq_length() - mask.shape[1])), dim=1)
    for number, piece in enumerate(new.split(STEPS // PIECES, dim=1), 1):
        modules.restart(f" (piece {number} behind a state)")
        mask = torch.cat((mask, mask.new_ones(piece.shape)), dim=1)
        positions = (mask.long().cumsum(dim=1) - 1)[:, -piece.shape[1] :].expand(3, -1, -1)
        if parts.core.rope_deltas is not None:
            positions = positions + parts.core.rope_deltas.to(positions.device)
        wrapped: Any = parts.wrapped
        given = {"input_ids": piece, "attention_mask": mask, "position_ids": positions}
        wrapped(**given, **{kv_cache_name(parts): cache}, use_cache=True, logits_to_keep=1)


class _Modules:
    """Judges single modules as they run: linears, norms, adapters and the embedding table.

    Linears and their adapters are judged at prefill and at the first decode step, whose kernels differ; all later steps
    are the same call again.
    """

    def __init__(self, parts: Parts, tally: Tally, flow: Flow, adapters: Adapters) -> None:
        self._parts, self._tally, self._flow, self._adapters = parts, tally, flow, adapters
        self._calls, self._suffix = 0, ""
        self._dropped: dict[str, dict[str, Call]] = {}
        self._probed: set[str] = set()
        self._waiting: set[str] = set()

    def next_call(self) -> None:
        """The language backbone is called once more."""
        self._calls += 1
        step = f" (decode step {self._calls - 1})" if self._calls > 1 else ""
        self._tally.phase = self._suffix or step

    def restart(self, suffix: str, *, linears_too: bool = True) -> None:
        """Another forward begins, which messages call so."""
        self._calls, self._suffix = 0 if linears_too else FULLY_JUDGED, suffix
        self._tally.phase = suffix

    def watch(self) -> None:
        """Put hooks on every module that is judged by itself."""
        from torch import nn

        for name, module in {**base_modules(self._parts), **trained_copies(self._parts)}.items():
            if isinstance(module, nn.Linear):
                self._waiting.add(name)
                linears.judge_code_book(self._tally, name, module)
                self._flow.watch(module, partial(self._linear, name))
            elif linears.is_norm(self._parts, place_of(name)):
                self._flow.watch(module, partial(self._norm, name))
            elif place_of(name) == self._parts.roots["embeddings"] and isinstance(module, nn.Embedding):
                self._waiting.add(name)
                self._flow.watch(module, partial(self._embedding, name))
        for name, layer in self._adapters.layers.items():
            for adapter, dropout in layer.lora_dropout.items():
                self._flow.watch(dropout, partial(self._dropout, name, adapter))
            self._flow.record(layer.lora_B.values())
            self._flow.watch(layer, partial(self._adapted, name))

    def note_uncalled(self, *, with_image: bool) -> None:
        """Say which linears and tables have not run: a fused kernel may have computed in their place.

        Those of the tower are not due without an image, nor those in whose place a trained copy runs, or the other way.
        """
        for name in sorted(self._waiting - resting(self._parts)):
            if with_image or self._parts.group_of(name) not in TOWER:
                self._tally.leave_out("its module is never called: a fused kernel may compute in its place", name)

    def _embedding(self, name: str, call: Call) -> None:
        self._waiting.discard(name)
        linears.judge_embedding(self._tally, name, call)

    def _linear(self, name: str, call: Call) -> None:
        self._waiting.discard(name)
        if self._calls <= FULLY_JUDGED:
            linears.judge_linear(self._tally, self._parts, name, call)

    def _norm(self, name: str, call: Call) -> None:
        linears.judge_norm(self._tally, self._parts, name, call)
        if name not in self._probed:
            self._probed.add(name)
            linears.judge_epsilon(self._tally, self._parts, name, call.module, call.given)

    def _dropout(self, name: str, adapter: str, call: Call) -> None:
        self._dropped.setdefault(name, {})[adapter] = call
        self._flow.forget((call.module,))

    def _adapted(self, name: str, call: Call) -> None:
        base, ups = call.module.get_base_layer(), call.module.lora_B
        dropped = self._dropped.pop(name, {})
        if not self._flow.seen((base,)):
            self._tally.leave_out("its base layer is not called", name)
        elif self._calls <= FULLY_JUDGED:
            flow = self._flow
            computed_in = {adapter: flow.made_by(up).dtype for adapter, up in ups.items() if flow.seen((up,))}
            self._adapters.judge(name, call, dropped, flow.made_by(base), computed_in)
        self._flow.forget((base, *ups.values()))
