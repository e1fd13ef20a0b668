"""Question 5: whether the base's files hold every tensor, and whether what was saved in 4 bits fits together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.quantization import QuantizationPolicy
from pytest_qvl.evidence import CannotJudge
from pytest_qvl.models import skip_rules
from pytest_qvl.models.sources.loading import compared_with, has_tied_head
from pytest_qvl.preflight.base import EDITED, PUT_BACK
from pytest_qvl.preflight.commands import pytest_line, red
from pytest_qvl.preflight.files.values import FLOATS
from pytest_qvl.preflight.findings import Finding, neutral, some
from pytest_qvl.preflight.heads import has_own_head, tied_over
from pytest_qvl.preflight.hub_headers import write_headers
from pytest_qvl.preflight.packed import CONFIGURATION_LOST, Packed, packed_weights, without_state
from pytest_qvl.preflight.questions.base_values import values
from pytest_qvl.preflight.questions.four_bits import in_four_bits
from pytest_qvl.preflight.questions.release_facts import release_facts
from pytest_qvl.preflight.refusals import split_fix
from pytest_qvl.preflight.timing import patience
from pytest_qvl.preflight.weights import Weights
from pytest_qvl.vram.forecast.runnable import why_not_runnable

if TYPE_CHECKING:
    from pytest_qvl.models.sources.loading import LoadingReport
    from pytest_qvl.preflight.files.folder import Folder
    from pytest_qvl.preflight.subject import Subject

NUMBER = 5
_red = partial(red, NUMBER)
_POLICY = QuantizationPolicy()
_AGAIN = "quantize its 16-bit base again with the installed bitsandbytes and Transformers, or download it again"


def answer(subject: Subject) -> Iterator[Finding]:
    """Completeness of the base's files; states, statistics and skip list of one that was saved in 4 bits."""
    base = subject.base
    yield from _runs(subject)
    yield from release_facts(subject)
    if not base.described or base.folder is None:
        raise CannotJudge(f"{base.label} has no weight files at hand: {base.note or 'configuration only'}")
    report = _compared(subject, base.folder)
    for problem in report.problems:
        said, fix = split_fix(problem)
        yield _red(
            subject, "incomplete", said, cause="the files and config.json do not belong together",
            fix=fix or "give the config.json that the weights were saved with, or download the base again",
        )  # fmt: skip
    if not report.problems:
        yield Finding(
            NUMBER, "complete", "green", f"all {len(base.described)} tensors of {base.label} have their place"
        )
    if base.tensors:
        yield from values(subject)
    else:
        yield Finding(
            NUMBER, "values-not-fetched", "not judged",
            f"only headers of {base.label} were fetched: its values (NaN, zeros, the states of 4-bit weights, a head "
            "that is not the embeddings) are judged in a folder (`hf download`)",
        )  # fmt: skip
    head, table = (f"{subject.parts.roots[name]}.weight" for name in ("lm_head", "embeddings"))
    if has_tied_head(subject.parts) and has_own_head(subject.weights, head, table):
        yield tied_over(NUMBER, subject, "the base")
    if base.quantization is None:
        yield from _packed_without_configuration(subject)
        yield from _integers_without_configuration(subject)
        return
    packed = packed_weights(base.described, with_states=bool(base.tensors))
    wrong = [*_settings(subject, base.quantization, packed), *_lost(subject, packed), *_places(subject, packed)]
    if base.tensors:
        wrong += _states(subject, packed)
    yield from wrong
    if not wrong:
        sizes = {name: f"block size {each.state['blocksize']}, " if each.state else "" for name, each in packed.items()}
        kinds = Counter((each.kind, sizes[name], each.nested) for name, each in packed.items())
        said = ", ".join(
            f"{count} of {kind}, {size}{'double' if nested else 'single'} quantization"
            for (kind, size, nested), count in kinds.items()
        )
        yield Finding(
            NUMBER, "states", "green", f"{len(packed)} weights in 4 bits with their states: {said}",
            keeps_green=pytest_line(subject),
        )  # fmt: skip


def _compared(subject: Subject, folder: Folder) -> LoadingReport:
    """The model's tensors against the headers, which of a model on the hub are put into a file first."""
    if not subject.base.headers:
        return compared_with(subject.parts.base, folder.path, "the base")
    with TemporaryDirectory() as made:
        write_headers(subject.base.headers, Path(made))
        return compared_with(subject.parts.base, Path(made), "the base")


def _runs(subject: Subject) -> Iterator[Finding]:
    """Whether a model of this configuration can run; of a release that is known."""
    if subject.base.released:
        return
    subject.parts  # a configuration that no model can be built from is refused here  # noqa: B018
    if said := why_not_runnable(subject.base.config):
        yield _red(
            subject, "cannot-run", f"no model runs with config.json of {subject.base.label}: {neutral(said, 300)}",
            cause=EDITED, fix=PUT_BACK,
        )  # fmt: skip


def _packed_without_configuration(subject: Subject) -> Iterator[Finding]:
    described = subject.base.described
    packed = [*packed_weights(described, with_states=False), *without_state(described)]
    if packed:
        yield _red(
            subject, "configuration-lost",
            f"{len(packed)} weights are packed in 4 bits, and config.json has no quantization_config: {some(packed)}",
            cause=CONFIGURATION_LOST,
            fix="put quantization_config back into config.json, or download the base again",
        )  # fmt: skip


def _integers_without_configuration(subject: Subject) -> Iterator[Finding]:
    """Parameters that are stored as whole numbers, or as floating point of 8 bits, and nothing says by which scale."""
    weights = Weights(subject.base.described)
    names = [name for name, _ in subject.parts.base.named_parameters() if name in weights]
    odd = [name for name in names if weights[name].dtype not in FLOATS and not weights.is_packed(name)]
    if odd and not without_state(subject.base.described):
        yield _red(
            subject, "odd-dtype",
            f"{len(odd)} tensors of the base are stored as {', '.join(sorted({weights[n].dtype for n in odd}))} "
            f"({subject.by_group(odd)}), and config.json has no quantization_config: {some(odd)}",
            cause="they were quantized or cast, and from_pretrained takes the stored numbers for the weights",
            fix="download the base again, or put back the quantization_config that it was saved with",
        )  # fmt: skip


def _settings(subject: Subject, saved: Mapping[str, Any], packed: Mapping[str, Packed]) -> Iterator[Finding]:
    """What config.json says against what is stored, and against what QLoRA is proven with."""
    kind = str(saved.get("bnb_4bit_quant_type", "fp4"))
    kinds = Counter(each.kind for each in packed.values())
    if kinds and set(kinds) != {kind}:
        yield _red(
            subject, "type-differs",
            f"config.json says {neutral(kind, 40)}, the files hold "
            f"{', '.join(f'{count} weights in {name}' for name, count in kinds.items())}",
            cause="config.json was edited, or belongs to another folder", fix="put back the config.json of this base",
        )  # fmt: skip
    elif kind != _POLICY.quant_type:
        yield _red(
            subject, "not-nf4", f"the base was saved in {neutral(kind, 40)}",
            cause="BitsAndBytesConfig defaults to fp4, and QLoRA is proven with NF4 (arXiv:2305.14314)",
            fix="quantize its 16-bit base again with bnb_4bit_quant_type='nf4'",
        )  # fmt: skip
    nested = bool(saved.get("bnb_4bit_use_double_quant", False))
    others = [name for name, each in packed.items() if each.nested != nested]
    if others:
        yield _red(
            subject, "nesting-differs",
            f"config.json says bnb_4bit_use_double_quant={nested}, and {len(others)} of {len(packed)} weights are "
            f"stored otherwise: {some(others)}",
            cause="config.json was edited, or belongs to another folder", fix="put back the config.json of this base",
        )  # fmt: skip
    compute = saved.get("bnb_4bit_compute_dtype", "float32")
    if compute not in ("bfloat16", "float16"):
        yield _red(
            subject, "slow-compute", f"config.json says bnb_4bit_compute_dtype {neutral(repr(compute), 40)}",
            cause="BitsAndBytesConfig defaults to float32, which is several times slower, without a warning",
            fix='"bnb_4bit_compute_dtype": "bfloat16" (float16 on a T4) in quantization_config of config.json',
        )  # fmt: skip


def _lost(subject: Subject, packed: Mapping[str, Packed]) -> Iterator[Finding]:
    """Weights in 4 bits that have no state."""
    lost = without_state(subject.base.described)
    if lost or not packed:
        yield _red(
            subject, "states-missing",
            f"{len(lost) or 'all'} weights have no quantization state: {some(lost) or 'the files hold none'}",
            cause="the folder was saved by something that does not keep what bitsandbytes needs to unpack a weight",
            fix=_AGAIN,
        )  # fmt: skip


def _states(subject: Subject, packed: Mapping[str, Packed]) -> Iterator[Finding]:
    """Each weight's state and statistics against its data and the model's shape."""
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in subject.parts.named_linears()
        if isinstance(module.out_features, int) and isinstance(module.in_features, int)
    }
    broken: dict[str, list[str]] = {}
    for name, each in packed.items():
        for fault in each.faults(shapes.get(name)):
            broken.setdefault(fault, []).append(name)
    sizes = {each.state.get("blocksize") for each in packed.values()} - {_POLICY.blocksize}
    for fault, names in list(broken.items())[:3]:
        yield _red(
            subject, "state-broken", f"{len(names)} packed weights do not fit together ({fault}): {some(names)}",
            cause="statistics were cast, cut or taken from another base, so the weights unpack to other values",
            fix=_AGAIN,
        )  # fmt: skip
    if sizes and not broken:
        yield _red(
            subject, "block-size", f"the base was saved with block size {some(map(str, sorted(map(str, sizes))))}",
            cause=f"QLoRA is proven with {_POLICY.blocksize} weights per block; larger blocks round more coarsely",
            fix="quantize its 16-bit base again with the default block size",
        )  # fmt: skip


def _places(subject: Subject, packed: Mapping[str, Packed]) -> Iterator[Finding]:
    """Which modules are stored in 4 bits against those that the skip list leaves to be."""
    given = subject.saved_skip
    entries = skip_rules.DEFAULT if given is None else given
    linears = {name: subject.parts.group_of(name) for name, _ in subject.parts.named_linears()}
    rule = skip_rules.installed_rule()
    with patience("llm_int8_skip_modules"):
        asked = set(in_four_bits(linears, entries, rule))
        fine = [other for other in skip_rules.others() if set(in_four_bits(linears, entries, other)) == set(packed)]
    notes = tuple(f"{other.title} reads the same list as it was meant" for other in fine)
    kept = [name for name in linears if name in asked and name not in packed]
    skipped = [name for name in linears if name in packed and name not in asked]
    if kept:
        yield _red(
            subject, "kept-but-not-skipped",
            f"{len(kept)} layers are stored in 16 bits, and the skip list {neutral(list(entries), 200)} leaves them to "
            f"be in 4 bits with {rule.title}: {some(kept)}",
            cause=f"{rule.title} takes an entry as {rule.words}, so it makes 4-bit layers of them that find no state",
            fix=f"write the paths of these modules into llm_int8_skip_modules of config.json: {_paths(subject, kept)}",
            notes=notes,
        )  # fmt: skip
    if skipped:
        yield _red(
            subject, "packed-but-skipped",
            f"{len(skipped)} layers are stored in 4 bits, and the skip list {neutral(list(entries), 200)} keeps them "
            f"in 16 with {rule.title}: {some(skipped)}",
            cause=f"{rule.title} takes an entry as {rule.words}, and takes packed bytes for weights then",
            fix="take the entry that covers them out of config.json, or quantize the base again", notes=notes,
        )  # fmt: skip


def _paths(subject: Subject, names: list[str]) -> str:
    """The shortest list of paths that covers layers and nothing else of the model."""
    every = [name for name, _ in subject.parts.named_linears()]
    wanted, found = set(names), []
    roots = sorted({name.rsplit(".", cut)[0] for name in names for cut in range(1, name.count(".") + 1)}, key=len)
    for root in [*roots, *names]:
        inside = {name for name in every if f"{name}.".startswith(f"{root}.")}
        if inside and inside <= wanted:
            found.append(root)
            wanted -= inside
    return some(map(repr, found), 6)
