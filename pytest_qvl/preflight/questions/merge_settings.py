"""Question 7 with ``--merged``: does config.json of the merged checkpoint say what the base's says?

Shapes do not show a wrong number of heads, rotary base or epsilon: such a checkpoint loads and answers differently.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pytest_qvl.preflight.findings import Finding, neutral
from pytest_qvl.preflight.heads import HEAD_APART, has_own_head, tied_over
from pytest_qvl.preflight.merged import same_values
from pytest_qvl.preflight.packed import CONFIGURATION_LOST

if TYPE_CHECKING:
    from pytest_qvl.preflight.questions.merge_files import Case

NUMBER = 7
# Fields that decide no value of a forward pass: provenance, storage, training, and what generate() takes from elsewhere
# (question 6). How head and embeddings are tied is judged by itself.
_FREE = frozenset(
    {
        *("_name_or_path", "name_or_path", "transformers_version", "architectures", "model_type", "dtype"),
        *("torch_dtype", "use_cache", "initializer_range", "attention_dropout", "tie_word_embeddings"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "_attn_implementation"),
        *("output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id", "problem_type"),
    }
)
_SHOWN = 4


def settings_of(case: Case) -> Iterator[Finding]:
    """Settings of the merged checkpoint against the base's, as the installed Transformers reads both."""
    mine, theirs = (dict(_flat(each.config.to_dict())) for each in (case.checkpoint, case.subject.base))
    # Of a field that only one of them has, the class has filled in its default for the other or does not know it.
    off = {name: (theirs[name], mine[name]) for name in theirs if name in mine and theirs[name] != mine[name]}
    if off:
        said = ", ".join(f"{neutral(n, 80)} is {neutral(b, 60)} and not {neutral(a, 60)}"
                         for n, (a, b) in list(off.items())[:_SHOWN])  # fmt: skip
        more = f", and {len(off) - _SHOWN} more" if len(off) > _SHOWN else ""
        yield case.red(
            "configuration-differs",
            f"config.json of the merged checkpoint differs from the base's in {len(off)} settings: {said}{more}",
            cause="it was edited, or written by another tool; no tensor's shape shows it, so the model loads and "
            "answers differently",
            fix="copy the base's config.json into the folder",
        )  # fmt: skip
    yield from _quantization(case)


def _flat(fields: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if name in _FREE:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", list(value) if isinstance(value, tuple) else value


def _quantization(case: Case) -> Iterator[Finding]:
    """A quantization that the files do not have, or the other way round."""
    packed = [name for name in case.found if case.there.is_packed(name)]
    says = case.checkpoint.quantization is not None
    if says and not packed:
        yield case.red(
            "configuration-quantized",
            "config.json of the merged checkpoint has a quantization_config, and no weight is packed in 4 bits",
            cause="the configuration was taken over from a 4-bit base, and from_pretrained looks for packed weights",
            fix="take quantization_config out of config.json",
        )  # fmt: skip
    if packed and not says:
        yield case.red(
            "configuration-lost",
            f"{len(packed)} weights of the merged checkpoint are packed in 4 bits, and its config.json has no "
            "quantization_config",
            cause=CONFIGURATION_LOST,
            fix="put quantization_config back into config.json",
        )  # fmt: skip


def head_of(case: Case) -> Iterator[Finding]:
    """A head that is tied to the embeddings in one of base and merged checkpoint, and not in the other."""
    if not (case.was_tied or case.is_tied):
        return
    there, head = case.there, case.head
    differs = has_own_head(there, head, case.embeddings)
    trained = case.subject.updates.copies.get(head)
    if case.is_tied and differs:
        yield tied_over(NUMBER, case.subject, "the merged checkpoint")
    elif case.is_tied and _is_lost(case, trained):
        yield case.red(
            "head-tied-over",
            "the configuration of the merged checkpoint ties lm_head to the embeddings, and its own values were "
            "trained: they are nowhere in the file",
            cause=HEAD_APART,
            fix='set "tie_word_embeddings": false in config.json before saving, with both tensors in the file',
        )  # fmt: skip
    elif case.was_tied and not case.is_tied:
        is_trained = trained is not None or {case.head, case.embeddings} & case.touched.keys()
        if head not in there or not (is_trained or differs):
            what = "a copy of them is stored as lm_head" if head in there else "no lm_head.weight is in the file"
            yield case.red(
                "head-untied",
                f"the base ties lm_head to the embeddings, the merged checkpoint does not, and {what}",
                cause="tie_word_embeddings was lost when the checkpoint was saved",
                fix='set "tie_word_embeddings": true at the top of config.json, and take lm_head.weight out',
            )  # fmt: skip


def _is_lost(case: Case, trained: object) -> bool:
    """Whether a trained copy of a tied head is nowhere in the file."""
    if trained is None or case.head in case.there or case.embeddings not in case.there:
        return False
    copy, table = case.subject.updates.copies[case.head], case.there[case.embeddings]
    return copy.shape == table.shape and not same_values(copy, table)
