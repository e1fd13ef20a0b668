"""Healthy variations: whatever is no fault must not be called one."""

from __future__ import annotations

import random
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from types import MethodType
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.declared import declared, needing
from pytest_qvl.faults.case import SEED, healthy_case, load, lora_config
from pytest_qvl.faults.subject import Subject
from pytest_qvl.faults.thoughts import put_thoughts, whole
from pytest_qvl.faults.tools import all_of, attribute
from pytest_qvl.models.adapters import LANGUAGE_ONLY
from pytest_qvl.models.families import FAMILIES
from pytest_qvl.models.quantized import usual_quantization

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_qvl.faults.case import Case
    from pytest_qvl.samples import Sample

DEFAULT = "embedded"  # the model, as for ``--qvl-model``
DTYPES = ("bfloat16", "float32", "bfloat16", "float16")
ADAPTERS: dict[str, dict[str, Any]] = {
    "fresh": {},
    "trained": {"init_lora_weights": False},
    "rslora": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.1},
    "dora": {"use_dora": True},
    "rank pattern": {"rank_pattern": {"down_proj": 2}},
    "head adapted": {"target_modules": LANGUAGE_ONLY + "|lm_head"},
    "rank and alpha pattern": {"rank_pattern": {"q_proj": 32}, "alpha_pattern": {"q_proj": 64}},
    "embeddings adapted": {"target_modules": LANGUAGE_ONLY + r"|.*language_model\.embed_tokens"},
    "attention only": {"target_modules": r".*language_model.*\.(q|v)_proj"},
    "renamed": {},
    # The first layers of Qwen3.5 are linear attention, whose linears have other names.
    "first layers": {
        "target_modules": ["q_proj", "v_proj", "o_proj", "in_proj_qkv", "out_proj"],
        "layers_to_transform": [0, 1],
    },
    "dora, rslora, dropout": {"use_dora": True, "use_rslora": True, "lora_dropout": 0.05},
    "copy of the head": {"modules_to_save": ["lm_head"]},
    "token rows": {"trainable_token_indices": [1, 5, 9]},
    "biases trained": {"bias": "lora_only"},
    "biases of its own": {"lora_bias": True},
    "a second one at rest": {},
    "AdaLoRA": {"init_r": 8, "target_r": 4, "total_step": 1_000, "tinit": 100, "tfinal": 200},
}
ADAPTER_NAMES = {"renamed": "step-500"}
ADALORA, AT_REST = "AdaLoRA", "a second one at rest"
MOVES_ANSWERS = ("trained",)  # by random weights: the model's knowledge is lost, as alignment should say
# Tensors that are trained in the model's own dtype, where float16 cannot be trained, as training_step says. K-bit
# preparation makes the head float32; bitsandbytes casts biases back to the compute dtype at the first forward.
COPIES, BIASES = "copy of the head", "biases trained"
KNOWLEDGE = needing("knowledge")
ALWAYS = tuple(
    each.name for each in declared().values() if not {"gpu", "forecast", "time", "knowledge"}.intersection(each.needs)
)
# Those that take turns; generation against a reference shares the noise floor that random weights are measured for.
_TURNS = (
    ("training_step",),
    ("frozen_vision",),
    ("position_state",),
    ("generation_repeatable",),
    ("generation_batch_invariance", "generation_cache_invariance"),
)
ROTATING = (*_TURNS, *((name,) for name in needing("time") if name not in chain(*_TURNS)))
KNOWLEDGE_EVERY = 9  # no divisor in common with other periods: all combinations come up
RANDOM_EVERY = 5
# What stands in front of answers in rows for training, of models whose chat template opens thoughts.
THINKING = ("embedded:qwen3.5",)
THOUGHTS = ("empty", "taught", "left out")
SIDES = tuple(range(56, 197, 28))  # px
OPTIMIZERS = (
    *("derived", "AdamW 2e-4", "SGD 0.1, momentum", "Adafactor 1e-3", "AdamW 1e-5, no decay"),
    *("8-bit AdamW 2e-4", "paged 8-bit AdamW 1e-4"),
)
OPTIMIZER_EVERY = 14  # variations in a row with the same one: two for each turn of checks, so that each meets all


@dataclass(frozen=True)
class Variation:
    """The settings of a healthy setup, and the checks that run on it.

    Attributes:
        number: Its place in the list, and the seed of everything random in it.
        dtype: Load and compute dtype.
        adapter: A key of :data:`ADAPTERS`.
        optimizer: One of :data:`OPTIMIZERS`; ``"derived"`` is the checks' own.
        eager: Eager attention instead of SDPA.
        family: Random weights of this family (``model_type``), or empty for a trained model.
        prepared: Prepared for k-bit training (16-bit parts become float32), its vision hooks removed.
        autocasts: Its forward autocasts and returns float32, as that of a model that a trainer has prepared.
        checks: Which checks have to pass.
        model: The trained model, as for ``--qvl-model``.
        thoughts: One of :data:`THOUGHTS`, or empty for a model whose template has none.
    """

    number: int
    dtype: str
    adapter: str
    optimizer: str
    eager: bool
    family: str
    prepared: bool
    autocasts: bool
    checks: tuple[str, ...]
    model: str = DEFAULT
    thoughts: str = ""

    def __str__(self) -> str:
        weights = f"random {self.family}" if self.family else self.model
        words = [weights, self.dtype, f"{self.adapter} adapter", "eager" if self.eager else "sdpa"]
        words += [self.optimizer] if self.optimizer != OPTIMIZERS[0] else []
        words += ["k-bit prepared"] if self.prepared else []
        words += [f"thoughts {self.thoughts}"] if self.thoughts else []
        return f"#{self.number}: {', '.join([*words, *(['autocasts'] if self.autocasts else [])])}"


def variations(count: int, model: str = DEFAULT) -> list[Variation]:
    """The first `count` healthy variations; the same ones every time.

    Args:
        count: How many.
        model: The trained model that they are of, as for ``--qvl-model``. One that is named has no random ones beside.
    """
    from pytest_qvl.faults.matrix.random_models import RANDOM_FAMILIES

    made = []
    for number in range(count):
        family, knowledge = "", False
        if number % RANDOM_EVERY == RANDOM_EVERY - 1 and model == DEFAULT:
            family = RANDOM_FAMILIES[number // RANDOM_EVERY % len(RANDOM_FAMILIES)]
        else:
            knowledge = number % KNOWLEDGE_EVERY == 0
        adapter = list(ADAPTERS)[number % len(ADAPTERS)]
        if knowledge and adapter in MOVES_ANSWERS:
            adapter = "fresh"
        dtype = DTYPES[number % len(DTYPES)]
        if dtype == "float16" and (adapter == BIASES or (adapter == COPIES and family)):
            dtype = "float32"
        needs_float32 = dtype == "float16" and adapter == COPIES
        turn = number // (RANDOM_EVERY if family else 2) % len(ROTATING)
        always = [name for name in ALWAYS if not family or name not in needing("request")]  # of the embedded model
        checks = (*always, *ROTATING[turn], *(KNOWLEDGE if knowledge else ()))
        made.append(
            Variation(
                number,
                dtype,
                adapter,
                OPTIMIZERS[number // OPTIMIZER_EVERY % len(OPTIMIZERS)],
                eager=number % 7 == 3 and not family,
                family=family,
                prepared=(number % 11 == 6 or needs_float32) and not family,
                autocasts=(number % 13 == 5 or number % 22 == 6) and not family,
                checks=checks,
                model=model,
                thoughts=THOUGHTS[number // len(DTYPES) % len(THOUGHTS)] if model in THINKING else "",
            )
        )
    return made


class Healthy:
    """Makes the case of each variation; full-precision references are recorded once per dtype and seed, and shared.

    Args:
        seed: Which probes all variations are judged on; those that need the model's knowledge have probes of their
            own, and the others those of :data:`~pytest_qvl.faults.case.SEED`, if not given.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._cases: dict[tuple[str, str, int], Case] = {}
        self._seed = seed

    @contextmanager
    def case(self, variation: Variation) -> Iterator[Case]:
        """The case of a variation, its model in the wanted state."""
        from pytest_qvl.models.anatomy import anatomy
        from pytest_qvl.models.attention import other_attention

        knows = "alignment" in variation.checks
        own = variation.number if knows else SEED
        base = self._base(variation, own if self._seed is None else self._seed)
        changed = replace(base, collators=[], rows=_rows(variation.number))
        if variation.thoughts in ("taught", "left out"):
            put_thoughts(changed, partial(whole, taught=variation.thoughts == "taught"))
        changed.lora_config = _adapter_config(variation.adapter)
        changed.make_optimizer = _optimizer(variation.optimizer)
        if variation.family:
            with _random_case(changed, variation) as made:
                yield made
            return
        changed.model = self._model(variation, changed.lora_config)
        if not variation.eager:
            yield changed
            return
        with other_attention(anatomy(changed.model)):
            yield changed

    def _base(self, variation: Variation, seed: int) -> Case:
        key = (variation.model, variation.dtype, seed)
        if key not in self._cases:
            self._cases[key] = healthy_case(seed=seed, subject=_subject(variation))
        return self._cases[key]

    def _model(self, variation: Variation, config: Any) -> Any:
        import torch

        base = load(lora=None, subject=_subject(variation))
        if variation.prepared:
            from peft import prepare_model_for_kbit_training

            base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(variation.number)
            model = _adapted(base, variation, config)
        if variation.prepared:
            from pytest_qvl.models.anatomy import anatomy
            from pytest_qvl.models.backends.transformers import remove_vision_grad_hooks

            remove_vision_grad_hooks(anatomy(model).patch_embed)
        if variation.autocasts:
            _autocast(model, torch.float16 if variation.dtype == "float16" else torch.bfloat16)
        return model


def _subject(variation: Variation) -> Subject:
    return Subject.of(variation.model, dtype=variation.dtype)


@contextmanager
def _random_case(case: Case, variation: Variation) -> Iterator[Case]:
    """The case with a random model of the variation's family in place of the embedded one.

    The image processor cuts patches of that family's size inside the block. The noise floor is measured on the random
    model; nothing else of the reference means anything without knowledge.
    """
    import torch

    from pytest_qvl import checks
    from pytest_qvl.checks.support.noise_floor import noise_floor
    from pytest_qvl.faults.matrix.random_models import random_model

    dtype = getattr(torch, variation.dtype)
    model = random_model(
        variation.family,
        seed=variation.number,
        dtype=dtype,
        quantization_config=usual_quantization(dtype),
    )
    family = FAMILIES[variation.family]
    own = {
        "patch_size": family.small_vision["patch_size"],
        "image_mean": list(family.image_mean),
        "image_std": list(family.image_std),
    }
    processor: Any = case.processor.image_processor
    with all_of([attribute(processor, name, value) for name, value in own.items()]):
        floor: Any = noise_floor(model, case.processor, case.probes)
        model = _adapted(model, variation, case.lora_config)
        policy = checks.QuantizationPolicy(compute_dtype=variation.dtype)
        yield replace(case, model=model, policy=policy, reference=floor)


def _adapter_config(name: str) -> Any:
    from peft import AdaLoraConfig

    if name == ADALORA:
        return AdaLoraConfig(**{"lora_alpha": 16, "target_modules": LANGUAGE_ONLY, **ADAPTERS[name]})
    return lora_config(**ADAPTERS[name])


def _adapted(base: Any, variation: Variation, config: Any) -> Any:
    from peft import get_peft_model

    model = get_peft_model(base, config, ADAPTER_NAMES.get(variation.adapter, "default"))
    if variation.adapter == AT_REST:
        model.add_adapter("second", lora_config(r=2, init_lora_weights=False))
    return model.eval()


def _autocast(model: Any, dtype: Any) -> None:
    """Let a model's forward do what ``Accelerator(mixed_precision=...).prepare`` lets it do."""
    import torch
    from accelerate.utils import convert_outputs_to_fp32

    plain = type(model).forward
    model.forward = MethodType(convert_outputs_to_fp32(torch.autocast("cpu", dtype)(plain)), model)


def _optimizer(name: str) -> Any:
    """A factory of optimizers as people configure them, by its name; ``None`` for the optimizer that checks derive."""
    import bitsandbytes as bnb
    import torch
    from transformers.optimization import Adafactor

    makers: dict[str, Any] = {
        "AdamW 2e-4": lambda p: torch.optim.AdamW(p, lr=2e-4),
        "SGD 0.1, momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "Adafactor 1e-3": lambda p: Adafactor(p, lr=1e-3, relative_step=False, scale_parameter=False),
        "AdamW 1e-5, no decay": lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.0),
        "8-bit AdamW 2e-4": lambda p: bnb.optim.AdamW8bit(p, lr=2e-4, min_8bit_size=0),
        "paged 8-bit AdamW 1e-4": lambda p: bnb.optim.PagedAdamW8bit(p, lr=1e-4, min_8bit_size=0),  # unpaged on a CPU
    }
    return makers.get(name)


def _rows(seed: int) -> list[Sample]:
    """Two or three samples of random skills; every other time over images of other sizes."""
    from pytest_qvl.samples import ALL_SKILLS, TEXT_ONLY_SKILLS, scenes

    rng = random.Random(f"healthy {seed}")
    chosen = rng.sample(ALL_SKILLS, rng.randint(2, 3))
    if rng.random() < 0.5 and TEXT_ONLY_SKILLS[0] not in chosen:
        chosen[-1] = TEXT_ONLY_SKILLS[0]
    rows = scenes(seed, 1, chosen)
    if seed % 2:
        rows = [
            replace(s, images=tuple(i.resize((rng.choice(SIDES), rng.choice(SIDES))) for i in s.images)) for s in rows
        ]
    return rows
