"""Mistakes between dataset and model."""

from __future__ import annotations

from .mistake import mistake

IGNORED = -100


def collated(name, *, source, words, check="batch", since_5=False):
    """Register a mistake that is a function from a sound batch to a broken one."""

    def register(change):
        def plant(bench, folder, guard):
            def collate(samples):
                return change(bench, bench.collate(samples)) or {}

            with bench.model() as model:
                yield bench.trainer(model, folder, guard, collate=collate)

        mistake(name, source=source, check=check, words=words, since_5=since_5)(plant)
        return change

    return register


def beside_ids(batch, change):
    """Change everything of the shape of input_ids."""
    shape = batch["input_ids"].shape
    return {name: change(value) if value.shape == shape else value for name, value in batch.items()}


def without(*names):
    return lambda bench, batch: {name: value for name, value in batch.items() if name not in names}


def token(bench, text):
    return bench.processor.tokenizer.convert_tokens_to_ids(text)


def unnormalised(bench, batch):
    """Pixels from 0 to 1."""
    import torch

    own = bench.processor.image_processor
    mean, deviation = (torch.tensor(values)[None, :, None] for values in (own.image_mean, own.image_std))
    pixels = batch["pixel_values"]
    return (pixels.reshape(len(pixels), 3, -1) * deviation + mean).flatten(1)


@collated(
    "prompt-in-the-loss",
    source="unslothai/unsloth#3772, roboflow/maestro#129, huggingface/trl#3751",
    words=("whole-row-learned", "nothing but padding masked"),
)
def prompt(bench, batch):
    labels = batch["input_ids"].clone()
    labels[batch["attention_mask"] == 0] = IGNORED
    for text in ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>"):
        labels[labels == token(bench, text)] = IGNORED
    return batch | {"labels": labels}


@collated(
    "labels-are-a-copy",
    source="NielsRogge/Transformers-Tutorials#511, om-ai-lab/VLM-R1#123",
    words=("whole-row-learned", "image placeholders included"),
)
def copied(bench, batch):
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)}


@collated(
    "placeholders-in-the-loss",
    source="NielsRogge/Transformers-Tutorials#511, Blaizzy/mlx-vlm#824",
    words=("images-learned", "were not masked in labels"),
)
def placeholders(bench, batch):
    labels, image = batch["labels"].clone(), token(bench, "<|image_pad|>")
    labels[batch["input_ids"] == image] = image
    return batch | {"labels": labels}


@collated("padding-in-the-loss", source="NielsRogge/Transformers-Tutorials#511", words=("padding-learned", "-100"))
def padding(bench, batch):
    labels, pad = batch["labels"].clone(), batch["attention_mask"] == 0
    labels[pad] = batch["input_ids"][pad]
    return batch | {"labels": labels}


@collated(
    "answers-not-found",
    source="bytedance/UniVR#13, huggingface/trl#1053",
    words=("nothing-learned", "response template"),
)
def not_found(bench, batch):
    return batch | {"labels": batch["labels"] * 0 + IGNORED}


@collated(
    "answers-cut-off",
    source="hiyouga/LlamaFactory#7943, OpenBMB/MiniCPM-V#662",
    words=("answer-truncated", "max_length"),
)
def cut(bench, batch):
    return beside_ids(batch, lambda value: value[:, :-1])


@collated(
    "end-of-answer-not-learned",
    source="shibing624/MedicalGPT#157, huggingface/trl#976, huggingface/transformers#23530",
    words=("end-not-learned",),
)
def no_end(bench, batch):
    return batch | {"labels": batch["labels"].masked_fill(batch["labels"] == token(bench, "<|im_end|>"), IGNORED)}


@collated(
    "labels-shifted-twice",
    source="huggingface/transformers#44642, InternLM/InternLM#318",
    words=("labels-shifted", "leave them unshifted"),
)
def shifted(bench, batch):
    return batch | {"labels": batch["labels"].roll(-1, dims=1)}


@collated(
    "token-types-dropped",
    source="ModelTC/LightX2V#1416, NVIDIA-NeMo/Megatron-Bridge#3040",
    since_5=True,
    words=("types-missing",),
)
def no_types(bench, batch):
    return without("mm_token_type_ids")(bench, batch)


@collated(
    "token-types-padded-on-the-other-side",
    source="huggingface/trl#5785",
    since_5=True,
    words=("types-apart", "another side"),
)
def types_aside(bench, batch):
    import torch

    rows = zip(batch["mm_token_type_ids"], batch["attention_mask"].bool(), strict=True)
    return batch | {"mm_token_type_ids": torch.stack([torch.cat([row[~own], row[own]]) for row, own in rows])}


@collated(
    "token-types-not-cut", source="huggingface/trl#5283", since_5=True, words=("shapes-apart", "mm_token_type_ids")
)
def types_long(bench, batch):
    return beside_ids(batch, lambda value: value[:, :-1]) | {"mm_token_type_ids": batch["mm_token_type_ids"]}


@collated("mask-of-ones", source="OpenGVLab/InternVL#967", words=("padding-attended",))
def ones(bench, batch):
    return batch | {"attention_mask": batch["attention_mask"] * 0 + 1}


@collated(
    "image-truncated",
    source="huggingface/trl#4289, huggingface/trl#5927, unslothai/unsloth#2764",
    words=("image-truncated", "max_length"),
)
def truncated(bench, batch):
    last = int((batch["input_ids"] == token(bench, "<|image_pad|>")).nonzero()[:, 1].max())
    return beside_ids(batch, lambda value: value[:, :last])


@collated(
    "pixels-dropped-as-an-unused-column",
    source="huggingface/transformers#27535, TIGER-AI-Lab/VLM2Vec#43",
    words=("images-without-pixels", "dropped pixel_values"),
)
def no_pixels(bench, batch):
    return without("pixel_values", "image_grid_thw")(bench, batch)


@collated("grids-dropped", source="Blaizzy/mlx-vlm#1726", words=("pixels-missing", "image_grid_thw"))
def no_grids(bench, batch):
    return without("image_grid_thw")(bench, batch)


@collated("pixels-as-bytes", source="QwenLM/Qwen3-VL#1732", words=("pixels-dtype", "uint8"))
def octets(bench, batch):
    import torch

    return batch | {"pixel_values": (255 * unnormalised(bench, batch)).round().to(torch.uint8)}


@collated("pixels-not-rescaled", source="QwenLM/Qwen3-VL#1732", words=("pixels-not-rescaled",))
def not_rescaled(bench, batch):
    return batch | {"pixel_values": 255 * unnormalised(bench, batch)}


@collated(
    "pixels-rescaled-twice",
    source="huggingface/transformers#25688, vllm-project/vllm-ascend#382",
    words=("pixels-not-normalised", "do_rescale=False"),
)
def rescaled_twice(bench, batch):
    """What the processor makes of images whose pixels are 0 to 1 already."""
    import torch

    own = bench.processor.image_processor
    mean, deviation = (torch.tensor(values)[None, :, None] for values in (own.image_mean, own.image_std))
    raw = unnormalised(bench, batch)
    return batch | {"pixel_values": ((raw.reshape(len(raw), 3, -1) / 255 - mean) / deviation).flatten(1)}


@collated("pixels-not-normalised", source="vllm-project/vllm-ascend#12906", words=("pixels-not-normalised",))
def not_normalised(bench, batch):
    return batch | {"pixel_values": unnormalised(bench, batch)}


@collated("a-patch-lost", source="huggingface/transformers#34625", words=("grids-apart",))
def patch_lost(bench, batch):
    return batch | {"pixel_values": batch["pixel_values"][:-1]}


@collated(
    "ids-without-embedding",
    source="huggingface/transformers#24698, mickeysjm/R-BERT#5",
    words=("ids-without-embedding",),
)
def new_token(bench, batch):
    ids = batch["input_ids"].clone()
    ids[0, 1] = 10**6
    return batch | {"input_ids": ids}


@collated(
    "positions-of-text", source="huggingface/transformers#33487, linkedin/Liger-Kernel#276", words=("positions-apart",)
)
def text_positions(bench, batch):
    counted = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return batch | {"position_ids": counted.expand(3, -1, -1).clone()}


@collated(
    "packed-rows-see-each-other",
    source="axolotl-ai-cloud/axolotl#3817, modelscope/ms-swift#9618",
    words=("packed-not-separated",),
)
def packed(bench, batch):
    import torch

    mask = batch["attention_mask"].bool()
    rows = {name: value[mask][None] for name, value in batch.items() if value.shape == mask.shape}
    rows["position_ids"] = torch.cat([torch.arange(int(own.sum())) for own in mask])[None]
    del rows["attention_mask"]
    return {**{name: value for name, value in batch.items() if value.shape != mask.shape}, **rows}


@mistake(
    "packed-rows-with-a-cache",
    source="huggingface/transformers#46634",
    check="packing",
    words=("attends to token 0, of sample 0", "the forward has a KV cache", "use_cache=False"),
)
def packed_with_a_cache(bench, folder, guard):
    """A row packed as Transformers takes it, which it parts only where there is no cache."""
    from pytest_qvl.checks.support.packing import pack
    from pytest_qvl.models.anatomy import anatomy

    with bench.model() as model:

        def collate(samples):
            packed = pack(anatomy(model), bench.collate(samples))
            return {name: value for name, value in packed.items() if name != "use_cache"}

        yield bench.trainer(model, folder, guard, collate=collate)
