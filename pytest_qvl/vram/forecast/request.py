"""What a forecast is asked, checked before anything heavy is imported. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, get_args

from pytest_qvl.vram.forecast.known_settings import asks_for_nothing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Optimizer = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "sgd",
    "adafactor",
]
Dtype = Literal["bfloat16", "float16"]
Checkpoint = Literal["16bit", "nf4", "synthetic"]
Trainer = Literal["hf", "trl", "unsloth", "loop"]
Precision = Literal["bf16", "fp16", "bf16-pure", "fp16-pure"]
LinearAttention = Literal["torch", "fla", "fla+causal-conv1d"]
PreprocessLogits = Literal["", "argmax"]
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
CHECKPOINTS: tuple[Checkpoint, ...] = get_args(Checkpoint)
PREPROCESS_LOGITS: tuple[PreprocessLogits, ...] = get_args(PreprocessLogits)
LINEAR_ATTENTIONS: tuple[LinearAttention, ...] = get_args(LinearAttention)
TRAINERS: tuple[Trainer, ...] = get_args(Trainer)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
BASE_BITS = (4, 8, 16)
# What ``lora_targets`` may be beside names of modules.
LORA_TARGETS = ("language", "all-linear")
_PATTERN = re.compile(r"[\\^$*+?{}\[\]|()]")  # what a regular expression has, and no module's name
# Settings with which Liger's kernels do what is not followed: gradients of the weights of norms and of the head, whose
# size the card decides, and a forward of their own in generation.
_NOT_WITH_LIGER = ("modules_to_save", "trainable_tokens", "generate_in_training")
# Settings that Unsloth's own code serves, where the forecast follows no other value than the usual one.
_NOT_BY_UNSLOTH = (
    *("resume", "init_lora_weights"),
    *("base_bits", "use_dora", "modules_to_save", "trainable_tokens", "kbit_upcast", "compute_metrics", "lora_options"),
)
# Ways to initialise an adapter that PEFT 0.21 does not have for a quantized base, and its rule.
_OF_AN_UNQUANTIZED_BASE = {
    "pissa": "PEFT initializes PiSSA under float32, float16 or bfloat16 only: do it on the 16-bit base, quantize what "
    "that leaves of it, and train the saved adapter with init_lora_weights=True",
    "loftq": "PEFT's LoftQ is not to be given a quantized model, as it quantizes itself: do it on the 16-bit base, "
    "and train the saved adapter with init_lora_weights=True",
    "orthogonal": "PEFT makes orthogonal matrices in the dtype of the base's weights, and integers have no gradients",
}
# Words that ``get_peft_model_state_dict`` looks for in the targets: with one, it saves whole embeddings as well.
_EMBEDDINGS = ("embed_tokens", "lm_head")
# What autocast of a precision computes in.
DTYPE_OF: dict[str, Dtype] = {"bf16": "bfloat16", "fp16": "float16"}


# Settings of ``LoraConfig`` that PEFT is given as they are, with values that ask for nothing beside the usual ones.
_LORA_OPTIONS: dict[str, tuple[str, ...]] = {
    "exclude_modules": (),
    "layers_to_transform": (),
    "layers_pattern": (),
    "rank_pattern": (),
    "bias": ("none",),
    "lora_bias": (),
    "ensure_weight_tying": (),
}


# Whole numbers, and the least that each may be.
_LEAST = {
    **dict.fromkeys(("images", "batch", "accumulation", "evaluation_batches", "pad_to_multiple_of", "max_length"), 1),
    "ddp_bucket_cap_mb": 1,
    **dict.fromkeys(("lora_r", "generate", "evaluation", "generate_in_training", "trainable_tokens"), 0),
    "eval_accumulation_steps": 0,
}


@dataclass(frozen=True)
class Sample:
    """One sample of a batch.

    Attributes:
        images: Height and width of each of its images in pixels, before the processor resizes them.
        tokens: Text tokens, the markers around images and videos included; visual tokens come on top.
        videos: Frames, height and width of each of its videos: the frames that are sampled, and their pixels before the
            processor resizes them. They come behind the images.
    """

    images: tuple[tuple[int, int], ...]
    tokens: int
    videos: tuple[tuple[int, int, int], ...] = ()


def lora_options(settings: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Those settings of a ``LoraConfig`` that :attr:`Request.lora_options` takes and that ask for something."""
    found = {name: settings.get(name) for name in _LORA_OPTIONS}
    return tuple(
        (name, _plain(value)) for name, value in found.items() if not asks_for_nothing(value, _LORA_OPTIONS[name])
    )


def _plain(value: Any) -> Any:
    """A value as JSON has it, and always the same."""
    if isinstance(value, (set, frozenset, tuple, list)):
        return sorted(value)
    return value


def is_pattern(targets: str) -> bool:
    """Whether a text is a regular expression of modules' names, and not a name."""
    return _PATTERN.search(targets) is not None


@dataclass(frozen=True)
class Request:
    """One configuration to forecast.

    Attributes:
        model: Released name (``"qwen2.5-vl-7b"``) or a local folder with a ``config.json``.
        image: Height and width of each image in pixels, before the processor resizes it.
        images: Images per sample.
        batch: Samples per step, all of the same length (no padding).
        tokens: Text tokens per sample, the markers around images included; visual tokens come on top.
        samples: The samples of one batch, where they differ: they are padded to the longest. They take the place of
            ``image``, ``images``, ``batch`` and ``tokens``.
        packed: Whether a collator of one's own puts the samples of a batch into one row without padding, and tells them
            apart by ``position_ids``.
        max_length: Tokens that a trainer cuts a sample to, visual ones included; ``None`` for no limit.
        pad_to_multiple_of: Of what a batch's length in training is made a multiple, by padding.
        lora_r: Rank of the LoRA; 0 for the bare quantized model, without a training step.
        gradient_checkpointing: Whether decoder layers (and vision blocks) are recomputed in backward.
        optimizer: By its name in Transformers' ``TrainingArguments``.
        reentrant: Whether checkpointing is reentrant (``use_reentrant``); ``None`` for what ``trainer`` does where
            nobody says: Transformers before 5 asks for it, TRL and a loop do not.
        compute_dtype: Dtype of 4-bit products and of everything that is not quantized.
        vision_hook: Whether the vision patch embed keeps the hook that ``gradient_checkpointing_enable`` of
            Transformers 5 puts on it, so that the frozen vision tower is back-propagated through. ``None`` for what
            ``trainer`` does: with checkpointing a trainer leaves it on, Unsloth always, a loop takes it off.
        kbit_upcast: Whether ``prepare_model_for_kbit_training`` raised all 16-bit parameters to fp32.
        autocast: Whether forward and loss of a loop run under autocast to ``compute_dtype``; ``None`` for what
            ``precision`` and ``trainer`` say.
        generate: New tokens to decode; 0 for none.
        pixel_dtype: Dtype in which images reach the device; processors give float32.
        all_logits: Whether the inference forward keeps the logits of every position (a plain
            ``model(**batch)``) rather than of the last one (``generate``).
        checkpoint: Whether a 16-bit checkpoint is quantized while it loads, one saved in NF4 is loaded, or random
            weights are drawn layer by layer (``synthetic:`` models).
        capability: CUDA compute capability, which decides attention kernels and library workspaces.
        device_bytes: All memory that torch sees of the card, by which Unsloth chooses its loss; ``None`` for a card of
            more than 24.5 GiB.
        trainer: Who runs the steps: Transformers' ``Trainer`` (``"hf"``), TRL's ``SFTTrainer`` (``"trl"``), Unsloth's
            (``"unsloth"``) or a plain loop over ``model(**batch).loss`` (``"loop"``).
        precision: ``"bf16"`` and ``"fp16"`` are autocast, as by ``TrainingArguments(bf16=True)``, the second with a
            gradient scaler; ``"bf16-pure"`` and ``"fp16-pure"`` are without. ``None`` for autocast to
            ``compute_dtype`` by a trainer; by a loop only after the fp32 upcast and for float16.
        accumulation: Batches per update (``gradient_accumulation_steps``).
        evaluation: Samples per batch of an evaluation between two steps; 0 for none.
        evaluation_batches: Batches of that evaluation.
        compute_metrics: Whether the trainer has ``compute_metrics``, so that an evaluation keeps the logits of every
            batch on the device. What the function itself computes on the device is not followed.
        preprocess_logits: What ``preprocess_logits_for_metrics`` leaves of them: ``"argmax"`` the likeliest token;
            empty for no such function.
        eval_accumulation_steps: Batches after which what is kept goes to the host; 0 for after all.
        eval_do_concat_batches: Whether what is kept is one tensor, made anew with every batch.
        batch_eval_metrics: Whether metrics are computed batch by batch, and nothing is kept.
        prediction_loss_only: Whether an evaluation hands on its loss alone, whatever ``compute_metrics`` says.
        generate_in_training: New tokens to generate between two steps, for as many samples as an evaluation has, or
            for one; 0 for none.
        lora_targets: ``"language"`` for every language linear, ``"all-linear"`` for PEFT's target of that name (the
            vision tower's too), names as for ``LoraConfig(target_modules=[...])``, or a regular expression of whole
            names, as for ``LoraConfig(target_modules="...")``.
        lora_dropout: Dropout of the adapter's inputs.
        use_dora: Whether the adapter is DoRA.
        lora_options: Other settings of ``LoraConfig`` by name, which PEFT is given as they are: ``exclude_modules``,
            ``layers_to_transform``, ``layers_pattern``, ``rank_pattern``, ``bias``, ``lora_bias`` and
            ``ensure_weight_tying``.
        modules_to_save: Names of modules trained whole beside the adapter, as in ``LoraConfig``.
        trainable_tokens: How many rows of the input embeddings are trained (``trainable_token_indices``).
        base_bits: 4 for NF4, 8 for ``LLM.int8()``, 16 for no quantization.
        compiled: Whether Unsloth compiles layers, as it does unless ``UNSLOTH_COMPILE_DISABLE`` is 1; no other trainer
            does.
        ddp: Whether the trainer wraps the model in ``DistributedDataParallel``, as it does on each of several cards.
        ddp_bucket_cap_mb: MiB of a bucket of gradients then; ``None`` for torch's 25, and a first one of 1.
        linear_attention: What computes the linear attention of Qwen3.5: Transformers' PyTorch code (``"torch"``), the
            kernels of flash-linear-attention (``"fla"``), or with them those of causal-conv1d for the convolution
            (``"fla+causal-conv1d"``). Other models have none.
        init_lora_weights: How PEFT finds the first values of the adapter, by its name in ``LoraConfig``; empty where
            they are drawn. What finding them takes, a layer at a time before the training, is not followed.
        resume: Whether the trainer goes on from a checkpoint (``trainer.train(resume_from_checkpoint=...)``), and so
            loads adapter and optimizer states before the first step.
        load_best: Whether the trainer loads the best adapter when it has trained (``load_best_model_at_end``).
        liger: Whether the trainer has ``use_liger_kernel``: Liger's kernels take the place of norms, gated MLPs and
            rotary embeddings, and by ``"hf"`` its fused linear cross-entropy that of head and loss.
    """

    model: str = "qwen2.5-vl-7b"
    image: tuple[int, int] = (1024, 1024)
    images: int = 1
    batch: int = 1
    tokens: int = 256
    lora_r: int = 16
    gradient_checkpointing: bool = True
    optimizer: Optimizer = "paged_adamw_8bit"
    compute_dtype: Dtype = "bfloat16"
    vision_hook: bool | None = None
    kbit_upcast: bool = False
    autocast: bool | None = None
    generate: int = 0
    pixel_dtype: str = "float32"
    all_logits: bool = False
    checkpoint: Checkpoint = "16bit"
    capability: tuple[int, int] = (9, 0)
    device_bytes: int | None = None
    trainer: Trainer = "hf"
    precision: Precision | None = None
    accumulation: int = 1
    samples: tuple[Sample, ...] = ()
    evaluation: int = 0
    generate_in_training: int = 0
    lora_targets: str | tuple[str, ...] = "language"
    lora_dropout: float = 0.0
    use_dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    trainable_tokens: int = 0
    base_bits: int = 4
    compiled: bool = True
    ddp: bool = False
    ddp_bucket_cap_mb: int | None = None
    liger: bool = False
    lora_options: tuple[tuple[str, Any], ...] = ()
    reentrant: bool | None = None
    evaluation_batches: int = 1
    compute_metrics: bool = False
    preprocess_logits: PreprocessLogits = ""
    eval_accumulation_steps: int = 0
    eval_do_concat_batches: bool = True
    batch_eval_metrics: bool = False
    prediction_loss_only: bool = False
    max_length: int | None = None
    pad_to_multiple_of: int = 1
    linear_attention: LinearAttention = "torch"
    init_lora_weights: str = ""
    packed: bool = False
    resume: bool = False
    load_best: bool = False

    def __post_init__(self) -> None:
        """Refuse values that describe no run, and runs that the forecast does not follow.

        Raises:
            ValueError: Names the field, what it was and what it may be.
        """
        self._check_counts()
        self._check_samples()
        choices: dict[str, tuple[object, ...]] = {
            "optimizer": OPTIMIZERS,
            "compute_dtype": DTYPES,
            "pixel_dtype": ("float32", *DTYPES),
            "checkpoint": CHECKPOINTS,
            "trainer": TRAINERS,
            "precision": (None, *PRECISIONS),
            "base_bits": BASE_BITS,
            "preprocess_logits": PREPROCESS_LOGITS,
            "linear_attention": LINEAR_ATTENTIONS,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: known are {', '.join(map(str, known))}")
        self._check_targets()
        if unknown := [name for name, _ in self.lora_options if name not in _LORA_OPTIONS]:
            raise ValueError(f"lora_options has {unknown[0]!r}: known are {', '.join(_LORA_OPTIONS)}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}: it must be at least 0 and less than 1")
        if self.autocast is not None and self.precision is not None and self.autocast == self._is_pure:
            raise ValueError(f"precision {self.precision!r} and autocast={self.autocast} contradict each other")
        self._check_followed()

    def _check_counts(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if name in {"max_length", "ddp_bucket_cap_mb"} and value is None:
                continue
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}: it must be a whole number")
            if value < least:
                raise ValueError(f"{name} is {value}: it must be at least {least}")

    def _check_targets(self) -> None:
        targets = self.lora_targets
        if self.lora_r and not targets:
            raise ValueError(
                "lora_targets is empty, and PEFT has no default for these models: name the modules that get an adapter"
            )
        if not isinstance(targets, str) or targets in LORA_TARGETS:
            return
        if not is_pattern(targets):
            raise ValueError(f"lora_targets is {targets!r}: known are {', '.join(LORA_TARGETS)} and a tuple of names")
        try:
            re.compile(targets)
        except re.error as error:
            raise ValueError(f"lora_targets is {targets!r}, which is no regular expression: {error}") from None

    def _check_samples(self) -> None:
        for sample in self.batch_of_samples:
            for height, width in sample.images:
                if height < 1 or width < 1:
                    raise ValueError(f"image {height}x{width} has no pixels: both sides must be at least 1")
            for frames, height, width in sample.videos:
                if min(frames, height, width) < 1:
                    raise ValueError(
                        f"video {frames}x{height}x{width} has no pixels: frames, height and width must be at least 1"
                    )
            if sample.tokens < 2 * (len(sample.images) + len(sample.videos)) + 2:
                many = f"{len(sample.images)} images" + (f" and {len(sample.videos)} videos" if sample.videos else "")
                raise ValueError(
                    f"tokens is {sample.tokens}: each of {many} needs two marker tokens, and a sample one token at its "
                    "start and end"
                )

    def _check_followed(self) -> None:
        if self.liger:
            self._check_liger()
        if self.base_bits != 4 and self.checkpoint == "nf4":
            raise ValueError(f"checkpoint is 'nf4' and base_bits is {self.base_bits}: one saved in NF4 has 4 bits")
        if self.base_bits == 8 and self.use_dora:
            raise ValueError(
                "use_dora is True and base_bits is 8: DoRA's norm of an 8-bit weight is not followed; use 4 or 16"
            )
        if self.adapter_in_bfloat16 and self.autocast_dtype == "float16":
            raise ValueError(
                "trainer is 'trl' and autocasts to float16: SFTTrainer keeps the adapter of a quantized model in "
                "bfloat16, whose gradients torch's GradScaler cannot unscale; use precision='bf16'"
            )
        for name, unsaid in (("compute_metrics", False), ("evaluation_batches", 1), ("load_best", False)):
            if getattr(self, name) != unsaid and not self.evaluation:
                raise ValueError(
                    f"{name} is {getattr(self, name)} and evaluation is 0: say how many samples a batch of it has"
                )
        if self.ddp and self.trainer not in {"hf", "trl"}:
            raise ValueError(f"ddp is True and trainer is {self.trainer!r}: it is followed by the trainers hf and trl")
        self._check_resumed()
        self._check_packed()
        self._check_initialisation()
        if self.preprocess_logits and not self.compute_metrics:
            raise ValueError(
                f"preprocess_logits is {self.preprocess_logits!r} and compute_metrics is False: without metrics a "
                "trainer keeps no logits"
            )
        if self.trainer == "unsloth":
            self._check_unsloth()
        elif not self.compiled:
            raise ValueError(
                f"compiled is False and trainer is {self.trainer!r}: only Unsloth compiles; leave it unsaid"
            )

    def _check_unsaid(self, names: Iterable[str], why: str, instead: str) -> None:
        """Refuse what was said for a field of these names, which another field rules out."""
        for name in names:
            value, unsaid = getattr(self, name), getattr(Request, name)
            if value != unsaid:
                raise ValueError(f"{name} is {value!r} and {why}: leave it at {unsaid!r}, or use {instead}")

    def _check_liger(self) -> None:
        """Refuse what Liger's kernels are not followed with."""
        if self.trainer not in {"hf", "trl"}:
            raise ValueError(
                f"liger is True and trainer is {self.trainer!r}: it is followed by the trainers hf and trl"
            )
        self._check_unsaid(_NOT_WITH_LIGER, "liger is True, whose kernels are not followed with it", "liger=False")
        if dict(self.lora_options).get("bias", "none") != "none":
            raise ValueError(
                "lora_options has a bias and liger is True, whose gradients of biases are not followed: use 'none', or "
                "liger=False"
            )

    def _check_unsloth(self) -> None:
        """Refuse what Unsloth replaces by code that is not followed, or does not do."""
        why = "trainer is 'unsloth', whose own code for it is not followed"
        self._check_unsaid(_NOT_BY_UNSLOTH, why, "another trainer")
        if self.reentrant is False:
            raise ValueError(
                "reentrant is False and trainer is 'unsloth', whose checkpoints always are: leave it unsaid"
            )
        if self.autocast_dtype is None:
            raise ValueError(
                f"precision is {self.precision!r} and trainer is 'unsloth', which trains an adapter under autocast: "
                "use 'bf16' or 'fp16'"
            )

    def _check_packed(self) -> None:
        if not self.packed:
            return
        if self.trainer in {"trl", "unsloth"}:
            raise ValueError(
                f"packed is True and trainer is {self.trainer!r}: SFTTrainer packs no data with images and refuses "
                "packing and padding_free for them; use trainer='hf' or 'loop' with a collator of your own"
            )
        if self.pad_to_multiple_of > 1:
            raise ValueError(
                f"packed is True and pad_to_multiple_of is {self.pad_to_multiple_of}: a packed row has no padding"
            )

    def _check_initialisation(self) -> None:
        name = self.init_lora_weights
        if not name:
            return
        kind = "pissa" if re.fullmatch(r"pissa(_niter_[0-9]+)?", name) else name
        known = (*_OF_AN_UNQUANTIZED_BASE, "olora", "eva")
        if kind not in known:
            raise ValueError(f"init_lora_weights is {name!r}, which is not forecast: followed are {', '.join(known)}")
        of = f"init_lora_weights is {name!r} and base_bits is {self.base_bits}"
        if self.base_bits < 16 and kind in _OF_AN_UNQUANTIZED_BASE:
            raise ValueError(f"{of}: {_OF_AN_UNQUANTIZED_BASE[kind]}")
        if kind == "olora" and (self.base_bits == 8 or (self.base_bits == 4 and self.use_dora)):
            beside = "" if self.base_bits == 8 else " beside use_dora"
            raise ValueError(f"{of}{beside}: the base that OLoRA quantizes again is followed in NF4 and without DoRA")

    def _check_resumed(self) -> None:
        for name in ("resume", "load_best"):
            if not getattr(self, name):
                continue
            if self.trainer == "loop":
                raise ValueError(f"{name} is True and trainer is 'loop', which has no checkpoints: use another trainer")
            if saved := [word for word in _EMBEDDINGS if word in self.lora_targets]:
                raise ValueError(
                    f"{name} is True and lora_targets has {saved[0]!r}, with which PEFT saves whole embeddings beside "
                    "the adapter: what loading them takes is not followed"
                )

    @property
    def batch_of_samples(self) -> tuple[Sample, ...]:
        """The samples of one batch, whichever way they were given."""
        return self.samples or (Sample((self.image,) * self.images, self.tokens),) * self.batch

    @property
    def _is_pure(self) -> bool:
        return self.precision is not None and self.precision.endswith("-pure")

    @property
    def autocast_dtype(self) -> Dtype | None:
        """The dtype that the training forward is autocast to; ``None`` without autocast."""
        if self.precision is not None:
            return None if self._is_pure else DTYPE_OF[self.precision]
        if self.trainer == "loop":
            return self.inference_dtype
        return None if self.autocast is False else self.compute_dtype

    @property
    def inference_dtype(self) -> Dtype | None:
        """The dtype that inference before the training is autocast to, as a loop is; ``None`` without autocast."""
        usual = self.kbit_upcast or self.compute_dtype == "float16"
        return self.compute_dtype if (usual if self.autocast is None else self.autocast) else None

    def of_batch(self, size: int) -> Request:
        """The same with that many samples, begun anew where there are fewer that differ."""
        repeated = self.samples * -(-size // len(self.samples)) if self.samples else ()
        return replace(self, batch=size, samples=repeated[:size])

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled, as float16 gradients need it."""
        pure_loop = self.trainer == "loop" and self.precision is None and self.compute_dtype == "float16"
        return self.autocast_dtype == "float16" or pure_loop

    @property
    def keeps_logits(self) -> bool:
        """Whether an evaluation hands its logits on."""
        return self.compute_metrics and not self.prediction_loss_only

    @property
    def keeps_vision_hook(self) -> bool:
        """Whether the hook on the vision patch embed stays, where this Transformers puts one."""
        if self.vision_hook is None:
            return self.trainer == "unsloth" or (self.gradient_checkpointing and self.trainer != "loop")
        return self.vision_hook

    @property
    def adapter_in_bfloat16(self) -> bool:
        """Whether the trainer casts the adapter: ``SFTTrainer`` does that of a quantized model; PEFT's is in fp32."""
        return self.trainer == "trl" and self.base_bits < 16
