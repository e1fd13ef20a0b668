"""Where the adapter sits, how large it is, and what is trained beside it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.lora import foreign_types, layer_of, matrix_of, no_adapter, peft_type_of
from pytest_qvl.checks.support.lora_request import (
    adaptable_modules,
    bare_mixers,
    expected_size,
    frozen_on_purpose,
    is_lorafa,
    patterned,
    requested_modules,
)
from pytest_qvl.checks.support.wording import some, tally
from pytest_qvl.evidence import CannotJudge, Evidence, InputError, InputTypeError, Judge
from pytest_qvl.models.adapters import active_adapters, adapted_layers, adapter_parameters, chosen_adapter
from pytest_qvl.models.anatomy import GROUPS, TOWER, Group, Parts, anatomy
from pytest_qvl.models.policy import AdapterPolicy
from pytest_qvl.models.quantized import dtype_name
from pytest_qvl.models.training import asked_biases, trained_copies, trained_on_purpose

if TYPE_CHECKING:
    from torch import nn

_COUNTED = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
# One division of two numbers, done here and in PEFT: equal up to the rounding of a square root.
_SAME_FACTOR = 1e-12


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

    candidates = adaptable_modules(parts)
    asked = requested_modules(parts, lora_config, candidates)
    expected = {name for name in asked if parts.group_of(name) in groups}
    actual = {layer_of(name) for name in adapters if matrix_of(name)}
    copies = trained_copies(parts)

    _judge_active(judge, parts)
    _judge_placement(judge, parts, groups=groups, expected=expected, actual=actual, config=lora_config)
    if bare := bare_mixers(parts, lora_config, candidates, actual):
        judge.note(bare)
    _judge_copies(judge, parts, groups, copies, lora_config)
    frozen = {n for n, p in adapters.items() if matrix_of(n) in frozen_on_purpose(lora_config, optimizer)}
    counted = {name: p for name, p in adapters.items() if p.requires_grad or name in frozen}
    _judge_counts(judge, counted, copies, {name: candidates[name] for name in expected}, lora_config)
    if frozen:
        judge.note(
            f"{len(frozen)} matrices belong to the adapter and are not trained (MiCA, LoRA-FA): {some(sorted(frozen))}"
        )
    _judge_shared(judge, parts, adapters)
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
    judge.every(
        "modules asked for that have an adapter",
        expected,
        missing,
        else_say=lambda _: f"{len(missing)} modules that were asked for have no adapter: {some(missing)}",
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
        rank = patterned(config.rank_pattern, name, config.r)
        alpha = patterned(config.alpha_pattern, name, config.lora_alpha)
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


def _judge_counts(
    judge: Judge,
    trainable: Mapping[str, nn.Parameter],
    copies: Mapping[str, nn.Parameter],
    expected: Mapping[str, nn.Module],
    config: Any,
) -> None:
    foreign = sorted(name for name in trainable if matrix_of(name) not in _COUNTED)
    sizes = Counter[str]()
    for name, parameter in trainable.items():
        if matrix_of(name) in _COUNTED:
            sizes[layer_of(name)] += parameter.numel()
    wanted = {name: expected_size(config, name, module) for name, module in expected.items()}
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


def _judge_shared(judge: Judge, parts: Parts, adapters: Mapping[str, nn.Parameter]) -> None:
    """A matrix belongs to one module; PEFT ties those of a head and of embeddings that are tied themselves."""
    ends = (parts.roots["lm_head"], parts.roots["embeddings"])
    homes: dict[int, list[str]] = {}
    for name, parameter in adapters.items():
        if matrix_of(name) and layer_of(name) not in ends:
            homes.setdefault(id(parameter), []).append(name)
    shared = [names for names in homes.values() if len(names) > 1]
    if shared:
        judge.problem(
            f"{len(shared)} adapter matrices are one tensor in several modules, which then all learn the same: "
            f"{some(shared[0])}; attach the adapter to a model whose modules were not copied or tied by hand"
        )


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
    biases = [name for name in asked_biases(parts) if parts.group_of(name) not in TOWER]
    if biases and config.bias != "none":
        idle = [name for name in biases if name not in allowed]
        judge.every(
            "biases trained as asked for",
            biases,
            idle,
            else_say=lambda _: (
                f"bias={config.bias!r} asks to train {len(biases)} biases, {len(idle)} are frozen: {some(idle)}"
            ),
        )


def _judge_optimizer(judge: Judge, parts: Parts, optimizer: Any) -> None:
    held = Counter(id(parameter) for group in optimizer.param_groups for parameter in group["params"])
    trainable = {id(p): name for name, p in parts.base.named_parameters() if p.requires_grad}
    names = {id(p): name for name, p in parts.base.named_parameters()}
    missing = [name for key, name in trainable.items() if key not in held]
    others = [key for key in held if key not in trainable and not (is_lorafa(optimizer) and key in names)]
    foreign = [names.get(key, "a tensor that is not in the model") for key in others]
    twice = [names.get(key, "a tensor that is not in the model") for key, count in held.items() if count > 1]
    judge.every(
        "trainable tensors in the optimizer",
        trainable,
        missing,
        else_say=lambda off: (
            f"the optimizer misses {off} trainable tensors: {some(missing)}; was it made before the adapter was "
            "attached?"
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


def _short(request: str | Iterable[str]) -> str:
    if isinstance(request, str):
        return repr(request)
    names = sorted(request)
    return repr(names) if len(names) <= 12 else f"({len(names)} names, {names[0]} first)"
