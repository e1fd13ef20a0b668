"""Quantization census: which parts of the model really are NF4, and how."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.bitwise import identity_of
from pytest_qvl.checks.support.unpacked_weights import repacked_sentence
from pytest_qvl.checks.support.wording import listed, some
from pytest_qvl.evidence import Evidence, InputError, Judge
from pytest_qvl.models.adapters import adapted_layers, adapter_parameters
from pytest_qvl.models.anatomy import GROUPS, TOWER, Group, Parts, anatomy
from pytest_qvl.models.quantized import (
    LinearState,
    asks_for_4bit,
    dtype_name,
    linear_states,
    with_foreign_tables,
)
from pytest_qvl.models.quantized_layers import QuantizedLayers, check_entries, is_named, naming_nothing, parts_of
from pytest_qvl.models.skip_rules import skipped_by
from pytest_qvl.models.skips import (
    chosen_by_name,
    entries_keeping,
    entries_to_keep,
    idle_entries,
    list_to_keep,
    saved_quantized,
    skip_list,
    unheeded_entries,
)
from pytest_qvl.models.sources.loading import has_tied_head, unusable_layers
from pytest_qvl.models.training import copied_parameters

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

QUANT_TYPES = ("nf4", "fp4")
MIB = 2**20
OWN = (
    "; the checkpoint was saved in 4 bits, so its own configuration counts and a BitsAndBytesConfig given now does "
    "not: quantize its 16-bit base again"
)
SAVED_IN_FP4 = (
    "; the checkpoint was saved in FP4, and QLoRA is proven with NF4: quantize its 16-bit base again with "
    "bnb_4bit_quant_type='nf4', or declare FP4 if you chose it (the fixture qvl_quantization_config, or "
    "QuantizationPolicy(quant_type='fp4'))"
)
DEFAULT_FP4 = "; BitsAndBytesConfig defaults to fp4: pass bnb_4bit_quant_type='nf4'"
_COLUMNS = ("group", "linears", "quantized", "stored as", "double quantized", "block size", "compute")


@dataclass(frozen=True)
class QuantizationPolicy:
    """What must be quantized, how, and what must not.

    Attributes:
        quant_type: ``"nf4"`` or ``"fp4"``.
        double_quant: Whether the block statistics are quantized too.
        blocksize: Weights per block statistic (64 in the QLoRA paper, arXiv:2305.14314, section 3).
        compute_dtype: Dtype of the matrix products: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
        quant_storage: Dtype of the tensors that hold the packed weights, such as ``"uint8"``; ``None`` for any.
        quantized: Parts whose every linear layer must be quantized, and names of such layers
            (:class:`~pytest_qvl.checks.QuantizedLayers`), which count more than parts.
        kept: Parts of which nothing may be quantized, and names of such layers, which count most.

    Raises:
        ValueError: An unknown type, no part and no name, or one that is both quantized and kept.
    """

    quant_type: str = "nf4"
    double_quant: bool = True
    blocksize: int = 64
    compute_dtype: str = "bfloat16"
    quant_storage: str | None = None
    quantized: tuple[str, ...] = ("language",)
    kept: tuple[str, ...] = (*TOWER, "lm_head", "embeddings")

    def __post_init__(self) -> None:
        if self.quant_type not in QUANT_TYPES:
            raise InputError(f"quant_type {self.quant_type!r} is unknown; known: {', '.join(QUANT_TYPES)}")
        check_entries(self.quantized, self.kept)

    @classmethod
    def from_config(cls, config: Any, layers: QuantizedLayers | None = None) -> QuantizationPolicy:
        """The policy that a ``transformers.BitsAndBytesConfig`` asks for.

        Only type, double quantization, compute and storage dtype are read. Which layers they are about is never read
        from the configuration, because its skip list is exactly what may not work.

        Args:
            config: The configuration.
            layers: Which layers are in 4 bits; those of the language backbone if not given.

        Raises:
            TypeError: No ``BitsAndBytesConfig``.
            ValueError: The configuration does not ask for 4 bits.
        """
        asks_for_4bit(config)
        layers = layers or QuantizedLayers()
        return cls(
            quantized=layers.quantized,
            kept=layers.all_kept,
            quant_type=config.bnb_4bit_quant_type,
            double_quant=config.bnb_4bit_use_double_quant,
            compute_dtype=dtype_name(config.bnb_4bit_compute_dtype) or "float32",
            quant_storage=dtype_name(config.bnb_4bit_quant_storage),
        )

    def wants_in_4bit(self, name: str, group: Group) -> bool | None:
        """Whether a linear layer has to be in 4 bits (``True``), or must not be (``False``); ``None`` if nobody said.

        Args:
            name: Its dotted name in the base model.
            group: The part of the model that it is in.
        """
        named = self.names_in_4bit(name)
        if named is not None:
            return named
        return True if group in self.quantized else False if group in self.kept else None

    def names_in_4bit(self, name: str) -> bool | None:
        """The same by names alone; ``None`` for a layer that none of them means."""
        return False if is_named(self.kept, name) else True if is_named(self.quantized, name) else None


@dataclass
class _Census:
    """The linears of one part of the model."""

    states: list[LinearState] = field(default_factory=list)

    @property
    def quantized(self) -> list[LinearState]:
        return [state for state in self.states if state.is_quantized]

    def row(self, group: Group) -> tuple[str | int, ...]:
        four_bit = [state for state in self.states if state.is_4bit]
        return (
            group,
            len(self.states),
            len(self.quantized),
            _counted(state.storage for state in self.states),
            _counted("yes" if state.double_quantized else "no" for state in four_bit),
            _counted(str(state.blocksize) for state in four_bit),
            _counted(str(state.compute_dtype) for state in four_bit),
        )


def _counted(values: Any) -> str:
    counts = Counter(values)
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{value} x{count}" for value, count in counts.most_common())


@check(promise=1)
def quantization_census(model: Any, policy: QuantizationPolicy | None = None) -> Evidence:
    """Prove that exactly the parts which should be quantized are, in the way they should.

    Read from the type and the quantization state of every linear layer, never from a configuration: on
    Transformers 5 the skip list ``["visual", "lm_head"]`` sits in the configuration and does nothing
    (patterns are matched from the start of a module's name or as its end, and the tower is ``model.visual``).
    Nothing is computed; no limit is needed, because counts are exact.

    What stays out of the quantization is judged as "not quantized"; its dtype is reported, since
    ``prepare_model_for_kbit_training`` casts it to float32 in healthy use.

    Args:
        model: The model, bare or wrapped by PEFT.
        policy: What must be quantized and how, by parts of the model and names of layers; NF4 with double
            quantization, blocks of 64 and bfloat16 compute, in the language backbone only, if not given.

    Raises:
        CheckFailed: A part or a named layer leaked into the quantization or out of it, or is quantized in another
            way, a name means no linear layer, or a CPU kernel has rewritten the weights.
    """
    policy = policy or QuantizationPolicy()
    parts = anatomy(model)
    judge = Judge("quantization_census", "what is quantized, and how")
    found: dict[Group, _Census] = {group: _Census() for group in GROUPS}
    for state in linear_states(parts):
        found[state.group].states.append(state)

    _judge_names(judge, parts, policy)
    wants = {state.name: policy.wants_in_4bit(state.name, group) for group in GROUPS for state in found[group].states}
    for group, census in found.items():
        packed = [state for state in census.states if wants[state.name]]
        if packed or group in policy.quantized:
            _judge_quantized(judge, parts, group, packed, policy)
    judge.equal(
        "linears whose class and weight do not belong together",
        sum(bool(state.misfit) for census in found.values() for state in census.states),
        0,
        else_say=unusable_layers(parts),
    )
    plain = [state for census in found.values() for state in census.states if wants[state.name] is False]
    leaked = [group for group in parts_of(policy.kept) if _of_part(plain, group, policy).quantized]
    wanted = [name for name, in_4bit in wants.items() if in_4bit]
    works = list_to_keep(parts, policy.kept, [state.name for state in plain if state.is_quantized], wanted)
    for group in parts_of(policy.kept):
        cause = _cause(parts, leaked, works) if group in leaked[:1] else "for the same reason"
        _judge_kept(judge, group, _of_part(plain, group, policy), cause)
    _judge_kept_by_name(judge, parts, [state for state in plain if policy.names_in_4bit(state.name) is False], wanted)
    if "embeddings" in policy.kept:
        _judge_embeddings(judge, parts)
    _judge_tie(judge, parts)
    _judge_adapter_classes(judge, parts)
    if saved_quantized(parts):
        judge.note("the checkpoint was saved in 4 bits: its own quantization_config counts")
    if not leaked:  # else the finding says it
        quantized = {state.name for census in found.values() for state in census.quantized}
        for sentence in unheeded_entries(parts, quantized):
            judge.note(sentence)
    _note_wide_parts(judge, parts, policy, {state.name for state in plain})
    return judge.verdict(_COLUMNS, [census.row(group) for group, census in found.items() if census.states])


def _of_part(states: Iterable[LinearState], group: Group, policy: QuantizationPolicy) -> _Census:
    """The linears of a part that no name of the policy means."""
    return _Census([each for each in states if each.group == group and policy.names_in_4bit(each.name) is None])


def _judge_names(judge: Judge, parts: Parts, policy: QuantizationPolicy) -> None:
    """Names of layers that the policy has and the model has not."""
    names = [entry for entry in (*policy.quantized, *policy.kept) if entry not in GROUPS]
    wrong = naming_nothing(names, [name for name, _ in parts.named_linears()]) if names else []
    for sentence in wrong:
        judge.problem(f"the policy (qvl_quantized_layers): {sentence}")


def _judge_quantized(
    judge: Judge, parts: Parts, group: Group, states: Sequence[LinearState], policy: QuantizationPolicy
) -> None:
    if not states:
        judge.problem(f"{group}: there is no linear layer to quantize")
        return
    census = _Census(list(states))
    plain = [state.name for state in states if not (state.is_quantized or state.misfit)]
    chosen = [name for name in chosen_by_name(parts, plain) if not policy.names_in_4bit(name)]
    if chosen:
        judge.note(
            f"{group}: the checkpoint keeps {len(chosen)} linears in 16 bits by naming them in its own skip list "
            f"(first: {chosen[0]})"
        )
    # Those whose class and weight do not belong together are a finding of their own.
    counted = [state for state in census.states if state.name not in chosen and not state.misfit]
    wrong = [state for state in counted if state.storage != policy.quant_type]
    nothing = "" if census.quantized else "nothing is quantized: "
    judge.every(
        f"{group} linears in {policy.quant_type}",
        counted,
        wrong,
        else_say=lambda off: (
            f"{nothing}{group}: {off} linears are {_counted(state.storage for state in wrong)} instead of "
            f"{policy.quant_type} (first: {wrong[0].name}){_why_not_packed(parts, census, wrong, policy)}"
        ),
    )

    four_bit = [state for state in counted if state.is_4bit]
    repacked = [state.name for state in four_bit if state.repacked]
    if repacked:
        judge.problem(f"{group}: {repacked_sentence(repacked)}")
    # Rewriting changes the statistics and their dtype, so those figures would only repeat the finding above.
    _judge_packing(judge, parts, group, [state for state in four_bit if not state.repacked], policy)


def _why_not_packed(parts: Parts, census: _Census, wrong: Sequence[LinearState], policy: QuantizationPolicy) -> str:
    """Why these linears are not packed as the policy asks, as the end of a sentence; empty where nobody knows."""
    plain = [state.name for state in wrong if not state.is_quantized]
    if parts.roots["lm_head"] in plain and has_tied_head(parts):
        return "; it is tied to the embeddings, which are not quantized: take it out of what is declared in 4 bits"
    keeping = entries_keeping(parts, plain)
    if keeping:
        return f"; of the skip list {skip_list(parts)}, {keeping}{_declaration(parts, census, plain, policy)}"
    if not census.quantized:
        return "; the quantization config was not given, or was dropped on the way"
    if {state.storage for state in wrong} == {"fp4"}:
        return SAVED_IN_FP4 if saved_quantized(parts) else DEFAULT_FP4
    return ""


def _declaration(parts: Parts, census: _Census, plain: Sequence[str], policy: QuantizationPolicy) -> str:
    """How to declare linears that stay in 16 bits on purpose, as the end of a sentence; empty where no name means them.

    Only names of layers that are in 16 bits wherever the part has them: a wrong skip list mostly hits some.
    """
    names = sorted({name.rpartition(".")[2] for name in plain})
    packed = [state.name for state in census.states if state.name not in plain]
    if not packed or any(is_named(names, name) for name in packed) or any(name.isdigit() for name in names):
        return ""
    linears = [name for name, _ in parts.named_linears()]
    quantized, kept = (
        [entry for entry in entries if entry in GROUPS or any(is_named([entry], name) for name in linears)]
        for entries in (policy.quantized, [entry for entry in policy.kept if entry not in GROUPS])
    )
    declared = QuantizedLayers(tuple(quantized), tuple(kept)).but(names) if quantized else None
    if declared is None:
        return ""
    return (
        "; if they stay so on purpose, declare it: qvl_quantized_layers (--qvl-quantized-layers, ini or fixture) = "
        f"{str(declared)!r}"
    )


def _judge_packing(
    judge: Judge, parts: Parts, group: Group, packed: Sequence[LinearState], policy: QuantizationPolicy
) -> None:
    """Hold how 4-bit linears are packed and multiplied against the policy, one property after the other."""
    own = OWN if saved_quantized(parts) else ""
    wanted: list[tuple[str, str, Any, str]] = [
        (
            "double-quantized" if policy.double_quant else "without double quantization",
            "double_quantized",
            policy.double_quant,
            "bnb_4bit_use_double_quant",
        ),
        (f"in blocks of {policy.blocksize}", "blocksize", policy.blocksize, "the loader"),
        (f"computing in {policy.compute_dtype}", "compute_dtype", policy.compute_dtype, "bnb_4bit_compute_dtype"),
    ]
    if policy.quant_storage is not None:
        storage = policy.quant_storage
        wanted.append((f"stored in {storage}", "quant_storage", storage, "bnb_4bit_quant_storage"))
    for words, attribute, value, setting in wanted:
        name = f"{group} linears {words}"
        _judge_property(judge, name, packed, attribute=attribute, value=value, setting=setting + own)
    tables = with_foreign_tables(parts)
    foreign = [state.name for state in packed if state.name in tables]
    judge.every(
        f"{group} linears with the values of their type",
        packed,
        foreign,
        else_say=lambda off: (
            f"{group}: {off} quantized linears look their values up in another table than that of their type (first: "
            f"{foreign[0]}): quant_map or nested_quant_map of the checkpoint was exchanged, cast to another dtype, or "
            "saved by bitsandbytes 0.49 on the CPU, which writes -1 over entry 0; quantize its 16-bit base again"
        ),
    )


def _judge_property(
    judge: Judge, name: str, packed: Sequence[LinearState], *, attribute: str, value: Any, setting: str
) -> None:
    off = [state for state in packed if getattr(state, attribute) != value]
    judge.every(
        name,
        packed,
        off,
        else_say=lambda count: (
            f"{off[0].group}: {count} quantized linears have {attribute} "
            f"{_counted(str(getattr(state, attribute)) for state in off)} instead of {value} (first: {off[0].name}); "
            f"it is set by {setting}"
        ),
    )


def _judge_kept(judge: Judge, group: Group, census: _Census, cause: str) -> None:
    leaks = census.quantized
    if not census.states:
        return
    kinds = _counted(state.storage.upper() for state in leaks)
    judge.equal(
        f"{group} linears quantized",
        len(leaks),
        0,
        else_say=(
            f"{group}: {len(leaks)} of {len(census.states)} linears are {kinds} but must stay 16-bit "
            f"(first: {leaks[0].name if leaks else ''}); {cause}"
        ),
    )


def _judge_kept_by_name(judge: Judge, parts: Parts, states: Sequence[LinearState], wanted: Sequence[str]) -> None:
    """The linears that the policy keeps in 16 bits by their names."""
    if not states:
        return
    leaks = [state for state in states if state.is_quantized]
    keep = entries_to_keep([state.name for state in leaks], wanted)
    again = ", and quantize the 16-bit base again: the checkpoint was saved so" if saved_quantized(parts) else ""
    first = leaks[0] if leaks else states[0]
    judge.equal(
        "linears kept by name quantized",
        len(leaks),
        0,
        else_say=(
            f"{first.group}: {len(leaks)} of {len(states)} linears that the policy names to stay 16-bit are quantized, "
            f"as {_counted(state.storage.upper() for state in leaks or states)} (first: {first.name}); no entry of the "
            f"skip list {skip_list(parts)} covers them: add "
            f"{some([*map(repr, keep)])} to llm_int8_skip_modules{again}"
        ),
    )


def _judge_embeddings(judge: Judge, parts: Parts) -> None:
    weight = next(parts.embeddings.parameters())
    judge.equal(
        "embeddings quantized",
        not weight.is_floating_point() or getattr(weight, "quant_state", None) is not None,
        False,
        else_say=(
            f"embeddings: {parts.roots['embeddings']} is stored as {dtype_name(weight.dtype)} "
            f"({type(parts.embeddings).__name__}) but must stay 16-bit"
        ),
    )


def _judge_tie(judge: Judge, parts: Parts) -> None:
    """Where the configuration ties head and embeddings, they must be one tensor in memory."""
    if not getattr(parts.config, "tie_word_embeddings", False):
        return
    head, table = next(parts.lm_head.parameters()), next(parts.embeddings.parameters())
    judge.equal(
        "lm_head shares the embeddings' storage",
        identity_of(head) == identity_of(table),
        True,
        else_say=(
            "lm_head and embeddings are tied by the configuration but are two tensors "
            f"({dtype_name(head.dtype)} and {dtype_name(table.dtype)}, {head.nbytes / MIB:.4g} MiB more): a "
            "quantized or copied head"
        ),
    )


def _judge_adapter_classes(judge: Judge, parts: Parts) -> None:
    """PEFT has a class of its own for 4-bit layers; the other one merges into the packed bytes."""
    quantized = {state.name: state.is_4bit for state in linear_states(parts)}
    wrong = [
        (name, type(layer).__name__, type(layer.get_base_layer()).__name__)
        for name, layer in adapted_layers(parts).items()
        if name in quantized and type(layer).__name__.endswith("4bit") != quantized[name]
    ]
    first, adapter, base = wrong[0] if wrong else ("", "", "")
    judge.equal(
        "adapter layers of another class than their base layer needs",
        len(wrong),
        0,
        else_say=(
            f"{len(wrong)} adapter layers are not of the class that PEFT has for their base layer (first: {first}, a "
            f"{adapter} over a {base}): merging would write into packed bytes, or take plain weights for packed ones; "
            "quantize first, then attach the adapter"
        ),
    )


def _note_wide_parts(judge: Judge, parts: Parts, policy: QuantizationPolicy, kept: Collection[str]) -> None:
    """Say what float32 costs where 16 bits would do; no defect, since k-bit preparation casts so."""
    extra: Counter[Group] = Counter()
    added = {id(parameter) for parameter in (*adapter_parameters(parts).values(), *copied_parameters(parts).values())}
    for name, parameter in parts.base.named_parameters():
        group = parts.group_of(name)
        stays = group in policy.kept or name.rpartition(".")[0].removesuffix(".base_layer") in kept
        if stays and dtype_name(parameter.dtype) == "float32" and id(parameter) not in added:
            extra[group] += parameter.nbytes // 2
    if extra and policy.compute_dtype != "float32":
        judge.note(
            f"{', '.join(extra)}: not quantized, float32, {sum(extra.values()) / MIB:.4g} MiB more than in "
            "16 bits (prepare_model_for_kbit_training casts all that is not quantized)"
        )


def _cause(parts: Parts, leaked: Sequence[Group], works: Sequence[str]) -> str:
    """Why the skip list did not protect these parts, and the list that does."""
    import transformers

    given = skip_list(parts)
    if given is None and saved_quantized(parts):
        return (
            "the checkpoint was saved in 4 bits, and without a skip list: quantize its 16-bit base again with "
            f"llm_int8_skip_modules={works}"
        )
    if given is None:
        return f"no skip list was given: pass llm_int8_skip_modules={works}"
    again = ", and quantize the 16-bit base again: the checkpoint was saved so" if saved_quantized(parts) else ""
    if idle := idle_entries(parts):
        written = ", ".join(
            f"{entry!r}" + (f" for {listed([*map(repr, meant.instead)])}" if meant.instead else "")
            for entry, meant in idle.items()
        )
        return (
            f"the skip list {given} in the model's config has entries that match no module on Transformers "
            f"{transformers.__version__} ({written}; a pattern has to match from the start of the module's name): "
            f"use {works}{again}"
        )
    if "lm_head" in leaked and not any(skipped_by(pattern, parts.roots["lm_head"]) for pattern in given):
        return f"the skip list {given} replaces the default one, so the head has to be in it too: use {works}{again}"
    return f"the skip list {given} in the model's config does not cover it: use {works}{again}"
