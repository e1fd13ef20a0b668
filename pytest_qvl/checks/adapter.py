"""Where the adapter sits, how large it is, and that it changes nothing before it has learned something."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.unpacked_weights import require_unpacked_weights
from pytest_qvl.checks.support.wording import some, tally
from pytest_qvl.evidence import CannotJudge, Evidence, InputError, InputTypeError, Judge
from pytest_qvl.models.adapters import (
    AdapterSlot,
    active_adapters,
    adapted_layers,
    adapter_configs,
    adapter_parameters,
    base_modules,
    chosen_adapter,
    copies_disabled,
    is_merged,
    original_module,
)
from pytest_qvl.models.anatomy import GROUPS, Group, Parts, anatomy
from pytest_qvl.models.compiled import uncompiled
from pytest_qvl.models.fingerprint.digests import digests
from pytest_qvl.models.policy import AdapterPolicy
from pytest_qvl.models.quantized import dtype_name
from pytest_qvl.models.state import preserved
from pytest_qvl.models.training import asked_biases, checkpointing, trained_biases, trained_copies, trained_on_purpose

if TYPE_CHECKING:
    import torch
    from torch import nn

    Batch = Mapping[str, torch.Tensor]

# The matrices that PEFT starts at zero, so that a fresh adapter adds nothing: B, but A where it adapts an
# embedding; with AdaLoRA the singular values E between the two, and B is random.
_GATES = ("lora_B", "lora_embedding_A")
SINGULAR_VALUES = "lora_E"
_COUNTED = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_MAGNITUDE = "lora_magnitude_vector"
# Initialisations that write into the base weights when they attach (PEFT's LoraConfig, "init_lora_weights").
_REWRITES_BASE = ("olora", "pissa", "corda", "loftq", "lora_ga")
_SEED = 20_311
# One division of two numbers, done here and in PEFT: equal up to the rounding of a square root.
_SAME_FACTOR = 1e-12


def gates(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The adapter matrices (of :func:`pytest_qvl.models.adapters.adapter_parameters`) that start at zero."""
    by_values = {layer_of(name) for name in parameters if matrix_of(name) == SINGULAR_VALUES}
    return {
        name: parameter
        for name, parameter in parameters.items()
        if (matrix_of(name) == SINGULAR_VALUES if layer_of(name) in by_values else matrix_of(name) in _GATES)
    }


def rewrites_base(config: Any) -> bool:
    """Whether attaching an adapter of this ``LoraConfig`` writes into the base weights."""
    kind = getattr(config, "init_lora_weights", True)
    return isinstance(kind, str) and kind.lower().startswith(_REWRITES_BASE)


def foreign_types(parts: Parts) -> list[str]:
    """Kinds of the adapters on the model that have no matrices A and B (``"IA3"``), by PEFT's names."""
    kinds = {peft_type_of(config) for config in adapter_configs(parts).values()}
    return sorted(kinds - {"LORA", "ADALORA", "TRAINABLE_TOKENS"})


def peft_type_of(config: Any) -> str:
    """PEFT's name of a configuration's kind: ``"LORA"``, ``"IA3"`` and so on; empty for what is none of PEFT's."""
    kind = getattr(config, "peft_type", "")
    return str(getattr(kind, "value", kind) or "")


def layer_of(name: str) -> str:
    """The adapted layer's name, from the name of one of its LoRA matrices; another name as it is."""
    return name.partition(".lora_")[0]


def matrix_of(name: str) -> str:
    """``"lora_A"``, ``"lora_B"`` and so on from an adapter parameter's name; empty if no LoRA matrix."""
    _, dot, rest = name.partition(".lora_")
    return f"lora_{rest.split('.')[0]}" if dot else ""


@check(promise=2)
def adapter_census(
    model: Any,
    lora_config: Any,
    optimizer: Any = None,
    *,
    policy: AdapterPolicy | None = None,
) -> Evidence:
    """Prove that LoRA sits where it was asked for and nowhere else, and that nothing else is trained.

    The set of modules to expect is worked out here from the model's linear layers and the configuration's
    request (list of names, regular expression or ``"all-linear"``; ``exclude_modules``,
    ``layers_to_transform``, ``layers_pattern`` and ``modules_to_save`` included), not taken from PEFT. A
    rank-``r`` adapter on a linear layer has exactly ``r * (in + out)`` parameters (LoRA, arXiv:2106.09685,
    section 4.1), plus ``out`` with DoRA and ``out`` with ``lora_bias``, and is applied with the factor
    ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with rsLoRA (arXiv:2312.03732); ``rank_pattern`` and
    ``alpha_pattern`` are honoured. All comparisons are exact.

    Args:
        model: The model wrapped by PEFT, its adapter trainable.
        lora_config: The ``peft.LoraConfig`` that was asked for.
        optimizer: A ``torch.optim.Optimizer`` that must hold exactly what is trainable, by identity.
        policy: Parts of the model where an adapter or a trained copy may sit, and whose own weights may be trained;
            the text side, frozen under its adapter, if not given.

    Raises:
        CheckFailed: An adapter in another part, a module without one, another number of trainable parameters,
            another scaling, anything else that requires grad, or an optimizer that holds too much, too
            little or something twice.
        CannotJudge: The configuration adapts parameters and not modules (``target_parameters``).
        TypeError: No ``LoraConfig``, or no optimizer.
        ValueError: The model has no adapter, or the configuration names no target.
    """
    parts = anatomy(model)
    _check_census_arguments(lora_config, optimizer)
    policy = policy or AdapterPolicy()
    groups = policy.adapted
    adapters = adapter_parameters(parts)
    if not adapters:
        raise InputError(no_adapter(parts))
    if foreign := foreign_types(parts):
        raise CannotJudge(f"the adapter on the model is {', '.join(foreign)}; the census knows where LoRA belongs only")
    judge = Judge("adapter_census", "where LoRA sits, and what is trained")

    candidates = _candidates(parts)
    asked = _asked_for(parts, lora_config, candidates)
    expected = {name for name in asked if parts.group_of(name) in groups}
    actual = {layer_of(name) for name in adapters if matrix_of(name)}
    copies = trained_copies(parts)

    _judge_active(judge, parts)
    _judge_placement(judge, parts, groups=groups, expected=expected, actual=actual, config=lora_config)
    _judge_copies(judge, parts, groups, copies, lora_config)
    _judge_counts(judge, adapters, copies, {name: candidates[name] for name in expected}, lora_config)
    _judge_scaling(judge, parts, lora_config)
    _judge_nothing_else(judge, parts, {**adapters, **copies, **trained_on_purpose(parts, policy)}, lora_config)
    note_unused(judge, parts, policy, {*actual, *copies, *trained_on_purpose(parts, policy)})
    if optimizer is not None:
        _judge_optimizer(judge, parts, optimizer)
    judge.report("adapter dtype", tally(dtype_name(p.dtype) for p in adapters.values()))
    rows = [
        (group, *(sum(parts.group_of(name) == group for name in names) for names in (asked, actual)))
        for group in GROUPS
    ]
    return judge.verdict(("group", "modules asked for", "modules with LoRA"), [row for row in rows if any(row[1:])])


def _check_census_arguments(lora_config: Any, optimizer: Any) -> None:
    kind = peft_type_of(lora_config)
    if not kind:
        raise InputTypeError(f"expected a peft.LoraConfig, got {type(lora_config).__name__}")
    if kind != "LORA":
        raise CannotJudge(
            f"{type(lora_config).__name__} asks for {kind}; the census knows what LoRA's configuration asks for only"
        )
    if getattr(lora_config, "target_parameters", None):
        raise CannotJudge("the LoRA config adapts bare parameters (target_parameters); only modules are counted here")
    if not lora_config.target_modules:
        raise InputError("the LoRA config names no target_modules, so there is nothing to compare the adapter with")
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise InputTypeError(f"expected a torch optimizer, got {type(optimizer).__name__}")


def _asked_for(parts: Parts, config: Any, candidates: Mapping[str, nn.Module]) -> set[str]:
    """Modules that the configuration names, and those tied to them where ``ensure_weight_tying`` asks for it.

    PEFT's documentation of ``ensure_weight_tying``: tied layers get one adapter, whichever of them is named.
    """
    asked = {name for name, module in candidates.items() if _is_asked_for(config, name, module)}
    tied = {parts.roots["embeddings"], parts.roots["lm_head"]}
    if getattr(config, "ensure_weight_tying", False) and heads_are_tied(parts) and asked & tied:
        asked |= tied
    return asked


def heads_are_tied(parts: Parts) -> bool:
    """Whether head and embeddings of the base model are one tensor, as in Qwen2.5-VL-3B."""
    modules = base_modules(parts)
    head, embeddings = (modules[parts.roots[group]] for group in ("lm_head", "embeddings"))
    return head.weight is embeddings.weight


def no_adapter(parts: Parts) -> str:
    """What to say of a model without adapter layers."""
    kinds = sorted({peft_type_of(config) for config in adapter_configs(parts).values()})
    if kinds:
        return (
            f"the model's adapter is {', '.join(kinds)}, which has no layers of its own to judge; LoRA is judged here"
        )
    return "the model carries no adapter; wrap it with peft.get_peft_model first"


def _candidates(parts: Parts) -> dict[str, nn.Module]:
    """Every module that LoRA can adapt, by the name it has without an adapter."""
    from torch import nn

    return {
        name: module
        for name, module in base_modules(parts).items()
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv3d)
    }


def _is_asked_for(config: Any, name: str, module: nn.Module) -> bool:
    """PEFT's documented matching: a regex fits the whole name, a list entry its dotted end or all of it."""
    from torch import nn

    if config.exclude_modules and _matches(config.exclude_modules, name):
        return False
    if any(re.match(rf"(.*\.)?{saved}(\..*)?$", name) for saved in config.modules_to_save or ()):
        return False
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        return isinstance(module, nn.Linear) and name != "lm_head"
    if not _matches(config.target_modules, name):
        return False
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    patterns = config.layers_pattern or r"[^.]*"
    index = next(
        (
            int(found.group(1))
            for pattern in ([patterns] if isinstance(patterns, str) else patterns)
            if (found := re.match(rf"(?:.*?\.)?{pattern}\.(\d+)\.", name))
        ),
        None,
    )
    return index in ([layers] if isinstance(layers, int) else layers)


def _matches(request: str | Iterable[str], name: str) -> bool:
    if isinstance(request, str):
        return re.fullmatch(request, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in request)


def _judge_placement(
    judge: Judge,
    parts: Parts,
    *,
    groups: tuple[Group, ...],
    expected: set[str],
    actual: set[str],
    config: Any,
) -> None:
    leaks = sorted(name for name in actual if parts.group_of(name) not in groups)
    by_group = tally(parts.group_of(name) for name in leaks)
    ends = "|".join(sorted({name.rpartition(".")[2] for name in expected})) or "q_proj|v_proj"
    judge.equal(
        "adapters outside the text side" if groups == AdapterPolicy().adapted else "adapters in other parts",
        len(leaks),
        0,
        else_say=(
            f"LoRA leaked into {by_group}: target_modules {_short(config.target_modules)} also match "
            f"{some(leaks)}; name the language backbone, "
            f'target_modules=r".*{parts.roots["language"].rpartition(".")[2]}.*\\.({ends})", '
            "or declare what is adapted on purpose (qvl_adapter_policy)"
        ),
    )
    missing = sorted(expected - actual)
    judge.equal(
        "modules asked for that have an adapter",
        len(expected) - len(missing),
        len(expected),
        else_say=f"{len(missing)} modules that were asked for have no adapter: {some(missing)}",
    )
    surplus = sorted(name for name in actual - expected if parts.group_of(name) in groups)
    judge.equal(
        "adapters that were not asked for",
        len(surplus),
        0,
        else_say=(f"{len(surplus)} modules have an adapter that the LoRA config does not ask for: {some(surplus)}"),
    )
    if not expected:
        judge.problem(
            f"target_modules {_short(config.target_modules)} match nothing in {', '.join(groups)}: "
            "the text side is not adapted at all"
        )


def _judge_copies(
    judge: Judge, parts: Parts, groups: tuple[Group, ...], copies: Mapping[str, nn.Parameter], config: Any
) -> None:
    asked = config.modules_to_save or ()
    idle = [name for name in asked if not any(f".{name}." in f".{copy}" for copy in copies)]
    if idle:
        judge.problem(f"modules_to_save {', '.join(idle)}: no trained copy of such a module exists")
    astray = sorted(name for name in copies if parts.group_of(name) not in groups)
    if astray:
        judge.problem(
            f"{len(astray)} trained copies (modules_to_save) are in {parts.group_of(astray[0])}: "
            f"{some(astray)}; if that part is trained on purpose, declare it (qvl_adapter_policy)"
        )


def _patterned(pattern: Mapping[str, int], name: str, default: int) -> int:
    """PEFT's documented matching of ``rank_pattern`` and ``alpha_pattern``: a key fits the end of the name."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _judge_active(judge: Judge, parts: Parts) -> None:
    active = active_adapters(parts)
    if len(active) > 1:
        judge.problem(
            f"{len(active)} adapters take part in every forward ({', '.join(active)}), and the LoRA config describes "
            f"one: choose it with model.set_adapter({active[0]!r}), or merge the other into the base"
        )


def _judge_scaling(judge: Judge, parts: Parts, config: Any) -> None:
    adapter = chosen_adapter(parts)
    off: list[str] = []
    silent: list[str] = []
    for name, layer in adapted_layers(parts).items():
        rank = _patterned(config.rank_pattern, name, config.r)
        alpha = _patterned(config.alpha_pattern, name, config.lora_alpha)
        factor = alpha / (rank**0.5 if config.use_rslora else rank)
        if not factor:
            silent.append(name)
        if not math.isclose(getattr(layer, "scaling", {}).get(adapter, factor), factor, rel_tol=_SAME_FACTOR):
            off.append(f"{name} ({layer.scaling[adapter]:g} instead of {factor:g})")
    judge.equal(
        "adapted layers with another scaling",
        len(off),
        0,
        else_say=(
            f"{len(off)} adapted layers are not applied with the factor that the LoRA config gives (r={config.r}, "
            f"lora_alpha={config.lora_alpha}): {some(off)}"
        ),
    )
    if silent:
        judge.problem(
            f"lora_alpha is 0 for {len(silent)} adapted layers, so that whatever they learn is multiplied by 0: "
            f"{some(silent)}"
        )


def _expected_size(config: Any, name: str, module: nn.Module) -> int:
    """Parameters of the adapter on one module."""
    import torch

    rank = _patterned(config.rank_pattern, name, config.r)
    if isinstance(module, torch.nn.Linear):
        fan_in, fan_out = module.in_features, module.out_features
    elif isinstance(module, torch.nn.Embedding):
        fan_in, fan_out = module.num_embeddings, module.embedding_dim
    else:
        weight: Any = module.weight
        fan_in, fan_out = weight[0].numel(), weight.shape[0]
    vectors = bool(config.use_dora) + bool(getattr(config, "lora_bias", False))
    return int(rank * (fan_in + fan_out) + vectors * fan_out)


def _judge_counts(
    judge: Judge,
    adapters: Mapping[str, nn.Parameter],
    copies: Mapping[str, nn.Parameter],
    expected: Mapping[str, nn.Module],
    config: Any,
) -> None:
    trainable = {name: p for name, p in adapters.items() if p.requires_grad}
    foreign = sorted(name for name in trainable if matrix_of(name) not in _COUNTED)
    sizes = Counter[str]()
    for name, parameter in trainable.items():
        if matrix_of(name) in _COUNTED:
            sizes[layer_of(name)] += parameter.numel()
    wanted = {name: _expected_size(config, name, module) for name, module in expected.items()}
    off = next((name for name in sorted({*wanted, *sizes}) if sizes[name] != wanted.get(name, 0)), "")
    if not trainable:
        story = (
            "no adapter parameter requires grad: the adapter was loaded for inference (is_trainable=False) "
            "or switched off when it was attached"
        )
    else:
        story = (
            f"the adapter does not have the size of its config (r={config.r}): first at {off}, which has "
            f"{sizes[off]:,} trainable parameters instead of {wanted.get(off, 0):,}"
        )
    judge.equal("trainable LoRA parameters", sizes.total(), sum(wanted.values()), else_say=story)
    if off and sizes.total() == sum(wanted.values()):
        judge.problem(story)
    extra = [*foreign, *(name for name, p in copies.items() if p.requires_grad)]
    if extra:
        # By identity: tied layers have their rows and copies under two names.
        count = sum({id(p): p.numel() for n, p in {**trainable, **copies}.items() if n in set(extra)}.values())
        judge.note(f"{count:,} trainable parameters beside LoRA: {some(extra)}")


def note_unused(judge: Judge, parts: Parts, policy: AdapterPolicy, changed: Iterable[str]) -> None:
    """Say which parts the policy declares although training does not change them."""
    unused = policy.unused(map(parts.group_of, changed))
    if unused:
        judge.note(f"declared but neither adapted nor trained (qvl_adapter_policy): {', '.join(unused)}")


def _judge_nothing_else(judge: Judge, parts: Parts, allowed: Mapping[str, nn.Parameter], config: Any) -> None:
    own = {id(parameter) for parameter in allowed.values()}
    stray = [name for name, p in parts.base.named_parameters() if p.requires_grad and id(p) not in own]
    hint = f"; bias={config.bias!r} in the LoRA config trains them" if config.bias != "none" else ""
    judge.equal(
        "other tensors that require grad",
        len(stray),
        0,
        else_say=(
            f"{len(stray)} tensors that are not the adapter's require grad "
            f"({tally(parts.group_of(name) for name in stray)}): {some(stray)}{hint}"
        ),
    )
    biases = [name for name in asked_biases(parts) if parts.group_of(name) not in ("vision", "merger")]
    if biases and config.bias != "none":
        idle = [name for name in biases if name not in allowed]
        judge.equal(
            "biases trained as asked for",
            len(biases) - len(idle),
            len(biases),
            else_say=f"bias={config.bias!r} asks to train {len(biases)} biases, {len(idle)} are frozen: {some(idle)}",
        )


def _judge_optimizer(judge: Judge, parts: Parts, optimizer: Any) -> None:
    held = Counter(id(parameter) for group in optimizer.param_groups for parameter in group["params"])
    trainable = {id(p): name for name, p in parts.base.named_parameters() if p.requires_grad}
    names = {id(p): name for name, p in parts.base.named_parameters()}
    missing = [name for key, name in trainable.items() if key not in held]
    foreign = [names.get(key, "a tensor that is not in the model") for key in held if key not in trainable]
    twice = [names.get(key, "a tensor that is not in the model") for key, count in held.items() if count > 1]
    judge.equal(
        "trainable tensors in the optimizer",
        len(trainable) - len(missing),
        len(trainable),
        else_say=(
            f"the optimizer misses {len(missing)} of {len(trainable)} trainable tensors: {some(missing)}; "
            "was it made before the adapter was attached?"
        ),
    )
    judge.equal(
        "other tensors in the optimizer",
        len(foreign),
        0,
        else_say=f"the optimizer holds {len(foreign)} tensors that are not trainable: {some(foreign)}",
    )
    if twice:
        judge.problem(f"the optimizer holds {len(twice)} tensors more than once: {some(twice)}")


@check(promise=3)
def adapter_neutrality(model: Any, batches: Batch | Sequence[Batch]) -> Evidence:
    """Prove that an adapter which has learned nothing, or is switched off, leaves the logits bitwise alone.

    Three computations of the same logits, in eval and in train mode, over the same kernels:

    - the base model, its own layers put back in place of PEFT's;
    - the wrapped model inside PEFT's ``disable_adapter()``;
    - the wrapped model with its adapter on and B = 0 (the adapter's own B is set aside and put back bitwise).

    The second takes the same path as the first. The third adds ``B A x * scaling``, which is a zero of either
    sign whatever A and dropout are, and adding a zero is exact in every format; so all three are compared for
    equality (a zero equals a zero of the other sign), with no tolerance. What torch.compile has compiled is run
    as it was written, since it rounds by what it fused. The base model is run twice: where its own kernels do
    not repeat themselves, equality proves nothing and the check says so.

    What is said and not judged: that initialisations which write into the base weights (OLoRA, PiSSA, CorDA,
    LoftQ, LoRA-GA) leave a base model that is no longer the one loaded; how far the adapter as found moves
    the logits; and B = 0 with DoRA, whose output is the base's times magnitude over norm: PEFT rounds the
    magnitude to the weights' dtype and computes the norm in another, so that even a fresh one is not neutral
    bitwise.

    Args:
        model: The model wrapped by PEFT; its adapter may be fresh or trained.
        batches: Model inputs, at least one with ``pixel_values``; labels are ignored.

    Raises:
        CheckFailed: Logits differ; names the first adapted layer whose output does.
        CannotJudge: No pictures in any batch, a merged adapter, repacked weights or kernels that do not
            repeat.
        ValueError: The model is not wrapped, or has no adapter.
    """
    import torch

    parts = anatomy(model)
    parameters = adapter_parameters(parts)
    if not parameters:
        raise InputError(no_adapter(parts))
    given = [batches] if isinstance(batches, Mapping) else list(batches)
    if not any("pixel_values" in batch for batch in given):
        raise CannotJudge("no batch has pictures (pixel_values), so the adapter would only be seen on text")
    if is_merged(parts):
        raise CannotJudge("the adapter is merged into the base weights, so there is no base model to compare with")
    require_unpacked_weights(parts)
    judge = Judge("adapter_neutrality", "an untrained or disabled adapter changes nothing")
    found = {name: p.detach().to("cpu", copy=True) for name, p in gates(parameters).items()}
    fresh = not any(bool(value.any()) for value in found.values()) and not trained_copies(parts)
    probe = _Probe(parts, given, gates(parameters), found)
    modes = _modes(judge, parts)
    unjudged = _not_zero_by_b(parts, parameters)
    with (
        preserved(model),
        torch.no_grad(),
        checkpointing(parts, False),
        uncompiled() as compiled,
    ):
        _enable(parts)
        for mode in modes:
            for number in range(len(given)):
                probe.judge_disabled(judge, mode, number)
                if not unjudged:
                    probe.judge_zero(judge, mode, number)
        if unjudged or not fresh:
            judge.report("adapter as found: largest logit change", probe.effect())
    if compiled:
        judge.note("what torch.compile has compiled was run as it was written, since compiled code rounds as it fuses")
    if unjudged:
        judge.note(unjudged)
    if trained_biases(parts):
        judge.note(
            f"{len(trained_biases(parts))} biases of the base model are trained with the adapter (bias of its "
            "configuration) and stay as trained while it is off: the base model here has the trained ones"
        )
    _note_initialisation(judge, parts, fresh=fresh)
    return judge.verdict()


def _not_zero_by_b(parts: Parts, parameters: Mapping[str, nn.Parameter]) -> str:
    """Why the adapter is not zero where B is; empty for LoRA."""
    if any(matrix_of(name) == _MAGNITUDE for name in parameters):
        return (
            "DoRA: B = 0 is not judged, because the magnitude vector scales the base output, by a ratio "
            "that rounding keeps from 1 even before training"
        )
    others = foreign_types(parts)
    return (
        f"{', '.join(others)}: only the disabled adapter is judged, because it has no B as LoRA has" if others else ""
    )


class _Probe:
    """Runs one model as base, disabled and with B = 0 on the same inputs."""

    def __init__(
        self,
        parts: Parts,
        batches: Sequence[Batch],
        gate_parameters: Mapping[str, nn.Parameter],
        found: Mapping[str, torch.Tensor],
    ) -> None:
        self._parts = parts
        self._inputs = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
        self._gates = gate_parameters
        self._found = found
        self._slot = AdapterSlot.of(parts.wrapped)
        self._base: dict[tuple[str, int], torch.Tensor] = {}

    def judge_disabled(self, judge: Judge, mode: str, number: int) -> None:
        self._compare(judge, "disabled adapter", self._disabled, mode, number)

    def judge_zero(self, judge: Judge, mode: str, number: int) -> None:
        self._compare(judge, "adapter with B = 0", self._zeroed, mode, number)

    def effect(self) -> float:
        """Largest change of a logit in eval mode by the adapter as it was found."""
        return max(
            _largest(self._run(number, "eval"), self._reference("eval", number)) for number in range(len(self._inputs))
        )

    def _run(self, number: int, mode: str, model: Any = None) -> torch.Tensor:
        import torch

        run = self._parts.wrapped if model is None else model
        run.train(mode == "train")
        torch.manual_seed(_SEED)
        self._parts.core.rope_deltas = None
        logits: torch.Tensor = run(**self._inputs[number], use_cache=False).logits
        return logits.cpu()

    def _bare(self, number: int, mode: str) -> torch.Tensor:
        self._slot.detach()
        try:
            # The wrapper passes everything through, but may look for its adapter first.
            return self._run(number, mode, self._parts.base)
        finally:
            self._slot.attach()

    def _disabled(self, number: int, mode: str) -> torch.Tensor:
        with warnings.catch_warnings():
            # PEFT's tuners_utils.py; what it says about trained biases is said by adapter_census.
            warnings.filterwarnings("ignore", "Careful, disabling adapter layers with bias", UserWarning)
            with _disabled(self._parts):
                return self._run(number, mode)

    def _zeroed(self, number: int, mode: str) -> torch.Tensor:
        try:
            for parameter in self._gates.values():
                parameter.zero_()
            with copies_disabled(self._parts):
                return self._run(number, mode)
        finally:
            for name, parameter in self._gates.items():
                parameter.copy_(self._found[name])

    def _reference(self, mode: str, number: int) -> torch.Tensor:
        if (mode, number) not in self._base:
            first, second = self._bare(number, mode), self._bare(number, mode)
            if not _same(first, second):
                raise CannotJudge(
                    f"two forwards of the base model alone ({mode} mode, batch {number}) differ by up to "
                    f"{_largest(first, second):.4g}: this device's kernels do not repeat themselves bitwise"
                )
            self._base[mode, number] = first
        return self._base[mode, number]

    def _compare(self, judge: Judge, what: str, run: Any, mode: str, number: int) -> None:
        base, logits = self._reference(mode, number), run(number, mode)
        if logits.dtype != base.dtype:
            judge.problem(f"{what} ({mode} mode): logits are {logits.dtype} but {base.dtype} in the base model")
        same = _same(base, logits)
        name = f"{what}, {mode} mode: largest logit change"
        if same:
            judge.equal(name, 0.0, 0.0, else_say="")
            return
        differ = int((base != logits).sum())
        judge.equal(
            name,
            _largest(base, logits) or float("nan"),
            0.0,
            else_say=(
                f"{what} ({mode} mode, batch {number}) changes {differ:,} of {base.numel():,} logits of the "
                f"base model; {self._first_difference(run, mode, number)}"
            ),
        )

    def _first_difference(self, run: Any, mode: str, number: int) -> str:
        base = self._layer_outputs(self._bare, mode, number)
        for place, value in self._layer_outputs(run, mode, number).items():
            if base.get(place) != value:
                return f"first at the output of {place}"
        return "no adapted layer's output differs, so it comes from elsewhere in the model"

    def _layer_outputs(self, run: Any, mode: str, number: int) -> dict[str, int]:
        """Digest of each adapted layer's output in order of the calls, whichever layer is in its place."""
        seen: dict[str, int] = {}
        handles = []

        def watch(place: str) -> Any:
            def hook(_module: Any, _args: Any, output: torch.Tensor) -> None:
                seen[place] = digests([("", output + 0)])[""]  # + 0 turns a negative zero into a positive one

            return hook

        for place, (_, _, layer) in self._slot.layers.items():
            module = original_module(layer) if run == self._bare else layer
            handles.append(module.register_forward_hook(watch(place)))
        try:
            run(number, mode)
        finally:
            for handle in handles:
                handle.remove()
        return seen


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality of every element; NaN equals NaN, and zeros are equal whatever their sign."""
    import torch

    return a.dtype == b.dtype and bool(((a == b) | (torch.isnan(a) & torch.isnan(b))).all())


def _largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def _enable(parts: Parts) -> None:
    if parts.is_peft:
        layers: Any = parts.wrapped.base_model
        layers.enable_adapter_layers()
    else:
        parts.base.enable_adapters()


@contextmanager
def _disabled(parts: Parts) -> Iterator[None]:
    """Adapters off the way users switch them off: by PEFT, or by Transformers where ``add_adapter`` was used."""
    if parts.is_peft:
        model: Any = parts.wrapped
        with model.disable_adapter():
            yield
        return
    parts.base.disable_adapters()
    try:
        yield
    finally:
        parts.base.enable_adapters()


def _modes(judge: Judge, parts: Parts) -> tuple[str, ...]:
    dropout = float(getattr(parts.text_config, "attention_dropout", 0.0) or 0.0)
    if dropout:
        judge.note(f"eval mode only: the base model's own attention dropout ({dropout}) draws other numbers under LoRA")
        return ("eval",)
    return ("eval", "train")


def _note_initialisation(judge: Judge, parts: Parts, *, fresh: bool) -> None:
    for config in adapter_configs(parts).values():
        kind = getattr(config, "init_lora_weights", True)
        if rewrites_base(config):
            judge.note(
                f"init_lora_weights={kind!r} wrote into the base weights when it attached: with the adapter "
                "off this is not the model that was loaded, and what was judged holds for the rewritten "
                "weights; it fits no other base unless PEFT converts it when it is saved "
                "(path_initial_model_for_weight_conversion)"
            )
        elif kind is False and not fresh:
            judge.note("init_lora_weights=False starts with a random B: as attached, the adapter is not neutral")


def _short(request: str | Iterable[str]) -> str:
    if isinstance(request, str):
        return repr(request)
    names = sorted(request)
    return repr(names) if len(names) <= 12 else f"({len(names)} names, {names[0]} first)"
