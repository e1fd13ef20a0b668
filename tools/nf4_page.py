"""Write docs/qlora-on-qwen3.5.md and the tables of the embedded models' cards from docs/records/nf4-groups-*.json.

Usage: ``python tools/nf4_page.py``, after ``fixtures/nf4_by_group.py`` wrote a record. It needs SciPy.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fixtures"))

from nf4_by_group import CONDITIONS, GATES, LANGUAGE, LINEAR_ATTENTION, ONLY, REST, TOGETHER, Size, sizes, units

from pytest_qvl.models.sources.released import released_config
from pytest_qvl.outputs import between_marks
from pytest_qvl.records.flips import sign_test

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "qlora-on-qwen3.5.md"
RECORDS = ROOT / "docs" / "records"
CARDS = {"qwen3.5": ROOT / "fixtures" / "embedded-qwen3.5", "qwen3-vl": ROOT / "fixtures" / "embedded-qwen3-vl"}
LABELS = {"qwen3.5": "Qwen3.5", "qwen3-vl": "Qwen3-VL"}
SHAPES = {
    "qwen3.5": ("qwen3.5-0.8b", "qwen3.5-2b", "qwen3.5-4b", "qwen3.5-9b"),
    "qwen3-vl": ("qwen3-vl-2b", "qwen3-vl-4b", "qwen3-vl-8b"),
}
LARGEST = "qwen3.5-9b"
LEVEL = 0.95
MIB = 2**20
BEGIN = "<!-- accuracies: written by `python tools/nf4_page.py` -->"
END = "<!-- end of accuracies -->"

Record = Mapping[str, Any]
Sizes = Mapping[str, Mapping[str, Size]]  # by the name of the shape and group


def share_interval(count: int, total: int, level: float) -> tuple[float, float]:
    """Clopper and Pearson's exact interval of a binomial rate."""
    error = (1 - level) / 2
    low = stats.beta.ppf(error, count, total - count + 1) if count else 0.0
    high = stats.beta.ppf(1 - error, count + 1, total - count) if count < total else 1.0
    return float(low), float(high)


def net_loss_interval(lost: int, gained: int, answers: int) -> tuple[float, float]:
    """Interval of the share of answers lost less that of answers gained, the same answers before and after.

    Of each share the exact interval at half of the error, so that both hold at once at :data:`LEVEL` at least, whatever
    the two have to do with each other.
    """
    half = (1 + LEVEL) / 2
    (least_lost, most_lost), (least_gained, most_gained) = (
        share_interval(count, answers, half) for count in (lost, gained)
    )
    return least_lost - most_gained, most_lost - least_gained


@dataclass(frozen=True)
class Pooled:
    """One configuration in one condition, over all models.

    Attributes:
        kl: Mean divergence per answer token of each model, nats.
        differing: Answer tokens whose most likely token is another than in 16 bits, of ``tokens``.
        tokens: Answer tokens of all models.
        lost: Answers that were right in 16 bits and no longer are, of ``answers``.
        gained: The reverse.
        answers: Of all models.
    """

    kl: tuple[float, ...]
    differing: int
    tokens: int
    lost: int
    gained: int
    answers: int

    @property
    def mean(self) -> float:
        """Mean divergence over models."""
        return sum(self.kl) / len(self.kl)

    @property
    def divergence(self) -> str:
        """Mean over models, and the least and the most."""
        return f"{self.mean:.1e} ({min(self.kl):.0e} – {max(self.kl):.0e})"

    @property
    def flips(self) -> str:
        """Answers lost and gained."""
        return f"{self.lost}, {self.gained}"

    @property
    def net(self) -> str:
        """The interval of the net loss in percent."""
        low, high = net_loss_interval(self.lost, self.gained, self.answers)
        return f"{100 * low:+.2f} to {100 * high:+.2f}"


def pooled(record: Record, condition: str, name: str, arithmetic: str = "float32") -> Pooled:
    """A configuration of the record over its models."""
    models = record["models"]
    entries = [model[condition][arithmetic][name] for model in models]
    tokens = sum(model["answer_tokens"] for model in models)
    return Pooled(
        tuple(entry["kl"] for entry in entries),
        tokens - sum(entry["agreeing"] for entry in entries),
        tokens,
        sum(entry["lost"] for entry in entries),
        sum(entry["gained"] for entry in entries),
        sum(model["scenes"] for model in models),
    )


def right(record: Record, condition: str, name: str, arithmetic: str = "float32") -> list[float]:
    """The share of right answers of each model."""
    return [sum(model[condition][arithmetic][name]["right"]) / model["scenes"] for model in record["models"]]


def span(values: Sequence[float], form: Callable[[float], str]) -> str:
    """The least and the most, or the one that they are."""
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} to {high}"


def percent(value: float, digits: int = 1) -> str:
    """``99.5 %``."""
    return f"{100 * value:.{digits}f} %"


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (heading, ["---"] * len(heading), *rows)]
    return "\n".join(lines) + "\n"


def groups_of(record: Record) -> list[str]:
    """The groups of its models."""
    return list(record["models"][0]["relative_error"])


def code(name: str) -> str:
    """A name with its parts of linear attention marked as code."""
    for part in (*LINEAR_ATTENTION, "linear_attn"):
        name = name.replace(part, f"`{part}`")
    return name


# What is bought: a name, and the divergence without and with the part in 16 bits, as configurations.
QUESTIONS = {
    "each quantized alone": (lambda unit: ONLY + unit, lambda _unit: "nothing"),
    "the language backbone in NF4": (lambda _unit: "language", lambda unit: f"language without {unit}"),
    "everything in NF4": (lambda _unit: "everything", lambda unit: f"everything without {unit}"),
}
GATES_UNIT, REST_UNIT = list(TOGETHER)[:2]


@dataclass(frozen=True)
class Bought:
    """How much less the models diverge if a part stays in 16 bits, of the gates and of the rest of linear attention.

    Attributes:
        gates: Nats per answer token, of each model.
        rest: Ditto.
        errors: By how many standard errors over scenes the rest buys more, of each model.
        only_gates: Answers that are right if the gates stay in 16 bits and wrong if the rest does, of all models.
        only_rest: The reverse.
    """

    gates: tuple[float, ...]
    rest: tuple[float, ...]
    errors: tuple[float, ...]
    only_gates: int
    only_rest: int

    @property
    def for_the_rest(self) -> int:
        """In how many models the rest buys more."""
        return sum(rest > gates for gates, rest in zip(self.gates, self.rest, strict=True))

    def per_mib(self, shape: Mapping[str, Size]) -> tuple[float, float]:
        """Mean nats a MiB at a released shape, of the gates and of the rest."""
        return tuple(  # type: ignore[return-value]
            sum(values) / len(values) / (sum(shape[group].extra for group in members) / MIB)
            for values, members in ((self.gates, GATES), (self.rest, REST))
        )


def bought(record: Record, condition: str, question: str) -> Bought:
    """Answers one of :data:`QUESTIONS` in one condition."""
    before, after = QUESTIONS[question]

    def saved(unit: str) -> tuple[float, ...]:
        with_nf4, kept = (pooled(record, condition, name(unit)).kl for name in (before, after))
        return tuple(a - b for a, b in zip(with_nf4, kept, strict=True))

    # Of each pair the first has the gates in 16 bits, and the second the rest.
    number = list(QUESTIONS).index(question)
    pairs = [model[condition]["pairs"][number] for model in record["models"]]
    return Bought(
        saved(GATES_UNIT),
        saved(REST_UNIT),
        tuple(pair["kl_more"] / pair["kl_more_standard_error"] for pair in pairs),
        sum(pair["only_first_right"] for pair in pairs),
        sum(pair["only_second_right"] for pair in pairs),
    )


def finding(found: Mapping[tuple[str, str], Bought]) -> str:
    """Whether the gates buy more, in words; by the questions in every condition."""
    models = len(next(iter(found.values())).gates)
    least, most = (pick(one.for_the_rest for one in found.values()) for pick in (min, max))
    if least == models:
        return f"**No: the rest buys more, in {models} of {models} models and every comparison below.**"
    if most == 0:
        return f"**Yes: they buy more, in {models} of {models} models and every comparison below.**"
    alone = {one.for_the_rest for (_, question), one in found.items() if question == next(iter(QUESTIONS))}
    if alone == {models}:
        return (
            f"**No: alone the rest costs more in {models} of {models} models; with other groups in NF4 beside it, "
            f"keeping it buys more in {least} to {most} of them, by comparison.**"
        )
    return f"**Not decided: by comparison, the rest buys more in {least} to {most} of {models} models.**"


def per_mib(one: Bought, shape: Mapping[str, Size]) -> str:
    """How many times as much a MiB of the gates buys as one of the rest, rounded."""
    gates, rest = one.per_mib(shape)
    return f"{gates / rest:.2g}"


def bought_table(found: Mapping[tuple[str, str], Bought], shape: Mapping[str, Size]) -> str:
    """Every comparison of the gates with the rest of linear attention."""

    def cell(values: tuple[float, ...]) -> str:
        return f"{sum(values) / len(values):.1e} ({min(values):.0e} – {max(values):.0e})"

    rows = []
    for (condition, question), one in found.items():
        models = len(one.gates)
        gates, rest = one.per_mib(shape)
        ratio = f"{gates / rest:.2g}" if gates > 0 and rest > 0 else "–"
        p = sign_test(one.for_the_rest, models - one.for_the_rest)
        said = f"{one.for_the_rest} of {models} (p {p:.2f})"
        flips = f"{one.only_gates}, {one.only_rest} (p {sign_test(one.only_gates, one.only_rest):.2g})"
        errors = f"{min(one.errors):.1f} – {max(one.errors):.1f}"
        rows.append([f"{condition}, {question}", cell(one.gates), cell(one.rest), said, errors, flips, ratio])
    heading = [
        "scenes, and what is in NF4",
        "`in_proj_a` and `in_proj_b` buy",
        "the rest buys",
        "rest buys more in",
        "by standard errors",
        "right only with them, only with the rest",
        "theirs per MiB / the rest's",
    ]
    return table(heading, rows)


def alone_table(record: Record) -> str:
    """Each group quantized alone."""
    groups = groups_of(record)
    rows = []
    for unit, members in units(groups).items():
        errors = [model["relative_error"][group] for group in members for model in record["models"]]
        clear, noisy = (pooled(record, condition, ONLY + unit) for condition in CONDITIONS)
        zero = right(record, "clear", f"zeroed {unit}")
        rows.append(
            [
                code(unit),
                span(errors, lambda error: f"{100 * error:.1f} %"),
                span(zero, percent),
                clear.divergence,
                noisy.divergence,
                str(noisy.differing),
                noisy.flips,
                noisy.net,
            ]
        )
    heading = [
        "in NF4",
        "error of weights",
        "right at zero",
        "KL",
        "KL, noisy",
        "other top-1, noisy",
        "lost, gained, noisy",
        "net loss, noisy, %",
    ]
    return table(heading, rows)


def kept_table(record: Record, whole: str) -> str:
    """Each group kept in 16 bits while the others are quantized: all, or those of the language backbone."""
    groups = groups_of(record)
    shown = [(f"{whole} in NF4", whole)]
    for unit, members in units(groups).items():
        if whole == "everything" or set(members) < set(LANGUAGE):
            shown.append((f"but for {code(unit)}", f"{whole} without {unit}"))
    rows = []
    for label, name in shown:
        clear, noisy = (pooled(record, condition, name) for condition in CONDITIONS)
        row = [label, clear.divergence, noisy.divergence, str(noisy.differing), noisy.flips, noisy.net]
        rows.append(row)
    heading = ["", "KL", "KL, noisy", "other top-1, noisy", "lost, gained, noisy", "net loss, noisy, %"]
    return table(heading, rows)


def arithmetic_table(record: Record) -> str:
    """What bfloat16's products add, by themselves and with NF4."""
    rows = []
    labels = {"nothing": "nothing in NF4", "language": "language backbone in NF4", "everything": "everything in NF4"}
    for name, label in labels.items():
        for arithmetic in ("float32", "bfloat16"):
            if (name, arithmetic) == ("nothing", "float32"):
                continue
            cells = [f"{label}, products in {arithmetic}"]
            for condition in CONDITIONS:
                one = pooled(record, condition, name, arithmetic)
                cells += [one.divergence, str(one.differing), one.flips, one.net]
            rows.append(cells)
    heading = [""]
    for condition in CONDITIONS:
        heading += [f"KL, {condition}", "other top-1", "lost, gained", "net loss, %"]
    return table(heading, rows)


def clear_flips(record: Record) -> str:
    """What happens to answers on clear scenes, in a sentence."""
    names = [n for n in record["models"][0]["clear"]["float32"] if not n.startswith(("zeroed ", "nothing"))]
    found = {name: pooled(record, "clear", name) for name in names}
    moved = {name: one for name, one in found.items() if one.differing or one.lost or one.gained}
    first = next(iter(found.values()))
    of = f"{first.tokens:,} answer tokens and {first.answers:,} answers of {len(first.kl)} models"
    if not moved:
        bound = 100 * net_loss_interval(0, 0, first.answers)[1]
        return (
            f"On clear scenes no configuration in float32 moves a top-1 token or an answer, of {of}: net loss at most "
            f"{bound:.2f} % at {percent(LEVEL, 0)}."
        )
    worst = max(moved.values(), key=lambda one: one.differing)
    name = next(name for name, one in moved.items() if one is worst)
    return (
        f"On clear scenes {len(moved)} of {len(found)} configurations in float32 move a top-1 token at all, of {of}; "
        f"the most is {worst.differing}, with {worst.lost} answers lost and {worst.gained} gained ({code(name)})."
    )


def accuracy_table(record: Record) -> str:
    """Right answers of each model: all, and of the skill that has the fewest."""
    rows = []
    for number, model in enumerate(record["models"]):
        cells = [str(number), f"`{model['sha256'][:12]}`"]
        for condition in CONDITIONS:
            for name in ("nothing", "language", "everything"):
                counts = model[condition]["bfloat16"][name]["right"]
                least = min(counts)
                skill = record["skills"][counts.index(least)]
                worst = "" if least == max(counts) else f" ({skill} {least / record['per_skill']:.3f})"
                cells.append(f"{sum(counts) / model['scenes']:.3f}{worst}")
        rows.append(cells)
    heading = ["seed", "SHA-256 of weights"]
    heading += [f"{label}, {c}" for c in CONDITIONS for label in ("16-bit", "NF4 language", "all NF4")]
    return table(heading, rows)


def sizes_table(shapes: Sizes, names: Sequence[str]) -> str:
    """MiB that keeping a group in 16 bits takes more than NF4."""
    groups = list(shapes[names[0]])
    rows = []
    for unit, members in units(groups).items():
        cells = []
        for name in names:
            size = sum((shapes[name][group] for group in members), Size(0, 0, 0))
            cells.append(f"{size.extra / MIB:,.1f}" if size.layers else "tied")
        rows.append([code(unit), *cells])
    return table(["MiB more in 16 bits", *names], rows)


def family_section(record: Record, shapes: Sizes) -> dict[str, str]:
    """The parts of a family's section."""
    return {
        "label": LABELS[record["family"]],
        "clear": clear_flips(record),
        "alone": alone_table(record),
        "language": kept_table(record, "language"),
        "everything": kept_table(record, "everything"),
        "arithmetic": arithmetic_table(record),
        "sizes": sizes_table(shapes, SHAPES[record["family"]]),
        "accuracy": accuracy_table(record),
    }


def rendered(template: str, **values: Any) -> str:
    """A template of this folder with its values."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    return environment.get_template(template).render(values)


def page(records: Mapping[str, Record], shapes: Sizes) -> str:
    """The whole page, from the records by family and from sizes of released shapes and of the embedded Qwen3.5."""
    hybrid = records["qwen3.5"]
    questions = {
        (condition, asked): bought(hybrid, condition, asked) for condition in CONDITIONS for asked in QUESTIONS
    }
    large = shapes[LARGEST]
    half = {condition: pooled(hybrid, condition, "nothing", "bfloat16") for condition in CONDITIONS}
    language = {condition: pooled(hybrid, condition, "language") for condition in CONDITIONS}

    def share(shape: Mapping[str, Size]) -> str:
        gates, whole = (sum(shape[group].weights for group in members) for members in (GATES, LINEAR_ATTENTION))
        return percent(gates / whole)

    def mib(members: Sequence[str]) -> float:
        return sum(large[group].extra for group in members) / MIB

    def all_of(value: Callable[[Record], Any]) -> str:
        return " and ".join(dict.fromkeys(str(value(record)) for record in records.values()))

    return rendered(
        "nf4_page.md.j2",
        models=len(hybrid["models"]),
        models_of_vl=len(records["qwen3-vl"]["models"]),
        million={family: f"{record['models'][0]['parameters'] / 1e6:.1f}" for family, record in records.items()},
        longest=max(model["longest"] for record in records.values() for model in record["models"]),
        right_without_gates=span(right(hybrid, "clear", f"zeroed {GATES_UNIT}"), percent),
        share_here=share(shapes["embedded-qwen3.5"]),
        share_there=share(large),
        mib_gates=f"{mib(GATES):.1f}",
        mib_rest=f"{mib(REST):,.0f}",
        finding=finding(questions),
        per_mib=per_mib(questions["clear", next(iter(QUESTIONS))], large),
        bought=bought_table(questions, large),
        least_p=f"{sign_test(len(hybrid['models']), 0):.2f}",
        language={
            condition: {
                "kl": f"{one.mean:.1e}",
                "times": f"{one.mean / half[condition].mean:.1f}",
                "lost": one.lost,
                "gained": one.gained,
                "net": one.net,
            }
            for condition, one in language.items()
        },
        half={condition: {"lost": one.lost, "gained": one.gained} for condition, one in half.items()},
        answers=f"{language['clear'].answers:,}",
        right_noisy=span(right(hybrid, "noisy", "nothing"), percent),
        level=percent(LEVEL, 0),
        half_level=percent((1 + LEVEL) / 2),
        scenes=all_of(lambda record: f"{sum(model['scenes'] for model in record['models']):,}"),
        noise=CONDITIONS["noisy"],
        per_skill=hybrid["per_skill"],
        device=all_of(lambda record: record["device"]),
        versions=", ".join(f"{name} {version}" for name, version in hybrid["versions"].items()),
        families=[family_section(record, shapes) for record in records.values()],
    )


def card_block(record: Record) -> str:
    """The tables of a model's card: of the model itself by skill, and of its siblings."""
    own, per_skill = record["models"][0], record["per_skill"]
    labels = {"nothing": "bfloat16", "language": "NF4 language backbone", "everything": "NF4 everywhere"}
    shown = {"float32": own["clear"]["float32"]["nothing"]}
    shown |= {label: own["clear"]["bfloat16"][name] for name, label in labels.items()}
    rows = []
    for label, entry in shown.items():
        by_skill = [f"{count / per_skill:.3f}" for count in entry["right"]]
        rows.append([label, *by_skill, f"{entry['log_probability']:.2f}", f"{entry['kl']:.1e}"])
    others = []
    for number, model in enumerate(record["models"][1:], 1):
        counts = [model["clear"]["bfloat16"][name]["right"] for name in labels]
        others.append([str(number), *(f"{sum(c) / model['scenes']:.4f}, {min(c) / per_skill:.3f}" for c in counts)])
    return rendered(
        "nf4_card.md.j2",
        per_skill=per_skill,
        device=record["device"],
        allowed=f"{percent(1 - share_interval(per_skill, per_skill, LEVEL)[0])} at {percent(LEVEL, 0)}",
        own=table(["", *record["skills"], "log p", "KL"], rows),
        others=table(["seed", *labels.values()], others),
    )


def written(card: str, record: Record) -> str:
    """A card with its block made anew.

    Raises:
        ValueError: The card has no place for it.
    """
    missing = f"the card has no place for accuracies: write {BEGIN} and {END} there"
    return between_marks(card, BEGIN, END, f"\n\n{card_block(record)}\n", missing=missing)


def all_sizes() -> dict[str, dict[str, Size]]:
    """Of the released shapes and of the embedded Qwen3.5."""
    from transformers import AutoConfig

    found = {name: sizes(released_config(name)) for names in SHAPES.values() for name in names}
    return found | {"embedded-qwen3.5": sizes(AutoConfig.from_pretrained(CARDS["qwen3.5"]))}


def read_records() -> dict[str, Any]:
    """The committed records by family."""
    return {
        family: json.loads((RECORDS / f"nf4-groups-{family}.json").read_text(encoding="utf-8")) for family in LABELS
    }


def main() -> None:
    """Write the page and the cards."""
    records = read_records()
    PAGE.write_text(page(records, all_sizes()), encoding="utf-8")
    for family, folder in CARDS.items():
        card = folder / "README.md"
        card.write_text(written(card.read_text(encoding="utf-8"), records[family]), encoding="utf-8")


if __name__ == "__main__":
    main()
