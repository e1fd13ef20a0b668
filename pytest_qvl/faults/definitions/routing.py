"""Placeholders, visual tokens and images that do not belong together."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import fault
from pytest_qvl.faults.tools import attribute, before
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.taps import embeddings_changed, features_replaced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from pytest_qvl.faults.case import Case

SEQUENCES = ("input_ids", "attention_mask", "mm_token_type_ids", "labels")


def _images(case: Case, batch: dict[str, Any]) -> torch.Tensor:
    places: torch.Tensor = batch["input_ids"] == anatomy(case.model).image_token_id
    return places


@fault(
    "truncated-placeholders",
    "max_length cuts placeholders off; pixel_values stay whole.",
    target="batch",
    check="placeholder_counts",
    expected_words=("placeholders", "visual tokens"),
    source="huggingface/trl#4289, #5927, hiyouga/LlamaFactory#8329",
    silent=False,
)
def _truncated(case: Case) -> Iterator[None]:
    def cut(batch: dict[str, Any], _samples: Any) -> dict[str, Any]:
        keep = int(_images(case, batch).any(dim=0).nonzero()[-1])
        return {name: t[:, :keep] if name in SEQUENCES else t for name, t in batch.items()}

    case.collators.append(cut)
    yield


@fault(
    "embedding-prompts-truncated",
    "The collator for embeddings, which pads prompts on the right and has no labels, cuts placeholders off.",
    target="batch",
    check="placeholder_counts",
    expected_words=("placeholders", "visual tokens"),
    source="TIGER-AI-Lab/VLM2Vec#38",
    silent=False,
)
def _embedding_truncated(case: Case) -> Iterator[None]:
    def cut(batch: dict[str, Any], _samples: Any) -> dict[str, Any]:
        mask = batch["attention_mask"]
        if "labels" in batch or not bool(mask[:, 0].all()) or bool(mask[:, -1].all()):
            return batch
        keep = int(_images(case, batch).any(dim=0).nonzero()[-1])
        return {name: t[:, :keep] if name in SEQUENCES else t for name, t in batch.items()}

    case.collators.append(cut)
    yield


@fault(
    "one-placeholder-too-many",
    "The text carries one placeholder more than the image has visual tokens.",
    target="batch",
    check="placeholder_counts",
    expected_words=("placeholders, but grid", "visual tokens"),
    source="verl-project/verl#3469, 2U1/Qwen-VL-Series-Finetune#128",
    silent=False,
)
def _one_too_many(case: Case) -> Iterator[None]:
    def add(batch: dict[str, Any], _samples: Any) -> dict[str, Any]:
        row, token = _images(case, batch).nonzero()[-1].tolist()
        ids = batch["input_ids"].clone()
        ids[row, token + 1] = anatomy(case.model).image_token_id
        return {**batch, "input_ids": ids}

    case.collators.append(add)
    yield


@fault(
    "pictures-lost",
    "A collator drops pixel_values; the placeholders stay and are read as text.",
    target="batch",
    check="placeholder_counts",
    expected_words=("but no pixel_values", "raises nothing"),
    source="hiyouga/LlamaFactory#7157, hiyouga/EasyR1#530",
)
def _images_lost(case: Case) -> Iterator[None]:
    gone = ("pixel_values", "image_grid_thw")
    case.collators.append(lambda batch, _: {k: v for k, v in batch.items() if k not in gone})
    yield


@fault(
    "ids-in-int32",
    "The collator makes tensors of numpy arrays of int32.",
    target="batch",
    check="placeholder_counts",
    expected_words=("token ids have to be int64", "the batch has input_ids int32"),
    silent=False,
)
def _int32(case: Case) -> Iterator[None]:
    def cast(batch: dict[str, Any], _samples: Any) -> dict[str, Any]:
        return {**batch, **{name: batch[name].int() for name in ("input_ids", "labels") if name in batch}}

    case.collators.append(cast)
    yield


@fault(
    "side-inputs-not-cut",
    "input_ids are truncated, mm_token_type_ids are not.",
    target="batch",
    check="placeholder_counts",
    expected_words=("mm_token_type_ids has shape", "cut and pad together"),
    source="huggingface/trl#5283",
    silent=False,
    transformers=(5, 3),
)
def _side_inputs(case: Case) -> Iterator[None]:
    def lengthen(batch: dict[str, Any], _samples: Any) -> dict[str, Any]:
        import torch

        types = batch["mm_token_type_ids"]
        return {**batch, "mm_token_type_ids": torch.cat([types, types[:, -1:]], dim=1)}

    case.collators.append(lengthen)
    yield


@fault(
    "placeholder-moved-to-the-next-picture",
    "One placeholder of the first image stands at the second: the total is right.",
    target="batch",
    check="placeholder_counts",
    expected_words=("placeholders, but grid", "makes"),
    source="Blaizzy/mlx-vlm#1941, EricLBuehler/mistral.rs#1950",
)
def _moved_placeholder(case: Case) -> Iterator[None]:
    def move(batch: dict[str, Any], _samples: Any) -> dict[str, Any]:
        places = _images(case, batch)
        ids = batch["input_ids"].clone()
        for row, token in places.nonzero().tolist():
            following = places[row, token + 1 :].nonzero().flatten().tolist()
            if not places[row, token + 1] and following:
                start = token + 1 + following[0]
                ids[row, token], ids[row, start - 1] = ids[row, start - 1].item(), ids[row, token].item()
                break
        return {**batch, "input_ids": ids}

    case.collators.append(move)
    yield


@contextmanager
def _unchecked_mask(parts: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Scatter visual tokens, DeepStack's too, to where a changed mask of the images says, as many as it has places."""

    def get_placeholder_mask(input_ids: torch.Tensor, **_kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        mask = change(input_ids == parts.image_token_id)
        return mask.unsqueeze(-1), (input_ids == parts.video_token_id).unsqueeze(-1)

    add = getattr(parts.language_backbone, "_deepstack_process", None)

    def add_what_fits(hidden: torch.Tensor, mask: torch.Tensor, features: torch.Tensor) -> Any:
        assert add is not None
        return add(hidden, mask, features[: int(mask.sum())])

    deepstack = attribute(parts.language_backbone, "_deepstack_process", add_what_fits) if add else nullcontext()
    with attribute(parts.core, "get_placeholder_mask", get_placeholder_mask), deepstack:
        yield


@fault(
    "count-check-disabled",
    "The check of features against placeholders is commented out, and it works.",
    target="model",
    check="malformed_inputs",
    expected_words=("the model takes one placeholder too few", "its count check is off"),
    source="huggingface/transformers#34625",
)
def _count_check(case: Case) -> Iterator[None]:
    with _unchecked_mask(anatomy(case.model), lambda mask: mask):
        yield


@fault(
    "scatter-off-by-one",
    "Every visual token lands one place to the right of its placeholder.",
    target="model",
    check="feature_scatter",
    expected_words=("still holds the placeholder's own text embedding", "tokens in"),
    source="verl-project/verl#3469",
)
def _off_by_one(case: Case) -> Iterator[None]:
    with _unchecked_mask(anatomy(case.model), lambda mask: mask.roll(1, dims=1)):
        yield


@contextmanager
def features_regrouped(parts: Any, change: Callable[[list[Any]], Any]) -> Iterator[None]:
    """Change the list of images' visual tokens on its way from the tower to the placeholders."""
    original = parts.core.get_image_features

    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        if hasattr(made, "pooler_output"):
            made.pooler_output = tuple(change(list(made.pooler_output)))
            return made
        return tuple(change(list(made)))

    with attribute(parts.core, "get_image_features", get_image_features):
        yield


@fault(
    "pictures-exchanged-after-the-tower",
    "The visual tokens of the first two images are dealt out in the wrong order.",
    target="model",
    check="feature_scatter",
    expected_words=("(image 0, visual token 0) holds visual token 0 of row 1, image 0",),
    source="Blaizzy/mlx-vlm#565, EricLBuehler/mistral.rs#1950",
)
def _exchanged(case: Case) -> Iterator[None]:
    with features_regrouped(anatomy(case.model), lambda f: [*f[1:2], *f[:1], *f[2:]]):
        yield


@fault(
    "padded-with-zeros",
    "The last visual token is cut and replaced by zeros to make the counts agree.",
    target="model",
    check="feature_scatter",
    expected_words=("holds neither a visual token of this batch nor its text embedding", "1 tokens in 1 rows"),
    source="verl-project/verl#3469",
)
def _zero_padded(case: Case) -> Iterator[None]:
    def pad(images: list[Any]) -> list[Any]:
        last = images[-1].clone()
        last[-1] = 0
        return [*images[:-1], last]

    with features_regrouped(anatomy(case.model), pad):
        yield


@fault(
    "features-scaled",
    "The embedding scale is applied to visual tokens as well.",
    target="model",
    check="feature_scatter",
    expected_words=("holds neither a visual token of this batch nor its text embedding",),
)
def _scaled(case: Case) -> Iterator[None]:
    with features_regrouped(anatomy(case.model), lambda images: [p * 2 for p in images]):
        yield


@fault(
    "only-the-first-row-sees",
    "Images are scattered into the first row of a batch only.",
    target="model",
    check="feature_scatter",
    expected_words=("still holds the placeholder's own text embedding",),
    source="EvolvingLMMs-Lab/lmms-eval#648",
)
def _first_row(case: Case) -> Iterator[None]:
    def keep_first(mask: torch.Tensor) -> torch.Tensor:
        mask = mask.clone()
        mask[1:] = False
        return mask

    with _unchecked_mask(anatomy(case.model), keep_first):
        yield


@fault(
    "visual-token-leaks-back",
    "Each visual token also leaks into the text token before its image.",
    target="model",
    check="causality",
    expected_words=("changing visual token 0", "(text)", "its own placeholder only"),
    source="huggingface/transformers#34625",
)
def _leaks_back(case: Case) -> Iterator[None]:
    def leak(embeds: torch.Tensor) -> torch.Tensor:
        return embeds if embeds.shape[1] == 1 else embeds + embeds.roll(-1, dims=1) / 128

    with embeddings_changed(anatomy(case.model), leak):
        yield


@fault(
    "mixed-batch-misorders",
    "Where a batch also has rows without an image, the first two visual tokens change places.",
    target="model",
    check="visual_token_order",
    expected_words=("visual token 0 of row 0, image 0 is made of the patches of visual token 1",),
    source="2U1/Qwen-VL-Series-Finetune#17, modelscope/ms-swift#2147",
)
def _mixed_batch(case: Case) -> Iterator[None]:
    import torch

    parts = anatomy(case.model)
    mixed = [False]

    def note(_module: Any, _args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids")
        mixed[0] = ids is not None and bool((ids != parts.image_token_id).all(dim=1).any())

    def exchange(features: torch.Tensor) -> torch.Tensor:
        return torch.cat([features[1:2], features[:1], features[2:]]) if mixed[0] else features

    with before([parts.core], note), features_replaced(parts, exchange):
        yield


@fault(
    "two-visual-tokens-exchanged",
    "The first two visual tokens leave the tower in each other's place.",
    target="model",
    check="visual_token_order",
    expected_words=("visual token 0 of row 0, image 0 is made of the patches of visual token 1",),
)
def _two_exchanged(case: Case) -> Iterator[None]:
    import torch

    with features_replaced(anatomy(case.model), lambda f: torch.cat([f[1:2], f[:1], f[2:]])):
        yield


@fault(
    "tokens-rolled-by-one",
    "All visual tokens leave the tower one place late.",
    target="model",
    check="visual_token_order",
    expected_words=("is made of the patches of visual token", "visual tokens are wrong"),
)
def _rolled(case: Case) -> Iterator[None]:
    with features_replaced(anatomy(case.model), lambda f: f.roll(1, dims=0)):
        yield


@fault(
    "window-order-not-undone",
    "The tower sorts patches into attention windows and does not sort its output back.",
    target="model",
    check="visual_token_order",
    expected_words=("is made of the patches of visual token", "visual tokens are wrong"),
    source="Blaizzy/mlx-swift-lm#238",
)
def _window_order(case: Case) -> Iterator[None]:
    """Sort the tower's output into windows of 2 × 2 visual tokens, an order that nothing undoes."""
    parts = anatomy(case.model)

    def sort(_module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        grids = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        order, start = [], 0
        for _, rows, columns in grids.tolist():
            height, width = rows // parts.merge_size, columns // parts.merge_size
            places = [(r // 2, c // 2, r, c) for r in range(height) for c in range(width)]
            order += [start + r * width + c for _, _, r, c in sorted(places)]
            start += height * width
        if hasattr(output, "pooler_output"):
            output.pooler_output = output.pooler_output[order]
            return output
        return output[order]

    handle = parts.vision_tower.register_forward_hook(sort, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@fault(
    "merger-mixes-neighbours",
    "The merger groups patches shifted by one: each visual token is made of two groups.",
    target="model",
    check="visual_token_order",
    expected_words=("is made of several patch groups",),
)
def _merger_mixes(case: Case) -> Iterator[None]:
    def shift(_module: Any, args: Any, kwargs: Any) -> Any:
        return (args[0].roll(1, dims=0), *args[1:]), kwargs

    with before([anatomy(case.model).merger], shift):
        yield


def _tower(case: Case) -> Any:
    return anatomy(case.model).vision_tower


@fault(
    "deepstack-never-computed",
    "deepstack_visual_indexes lie beyond the tower's depth: no merger runs, and nothing is added.",
    target="model",
    check="feature_scatter",
    expected_words=("DeepStack's merger 0 makes no features", "deepstack_visual_indexes"),
    source="huggingface/trl#5779",
    requires=("DeepStack",),
)
def _deepstack_never(case: Case) -> Iterator[None]:
    tower, depth = _tower(case), len(anatomy(case.model).blocks)
    beyond = [depth + index for index in tower.deepstack_visual_indexes]
    config = anatomy(case.model).config.vision_config
    with attribute(tower, "deepstack_visual_indexes", beyond), attribute(config, "deepstack_visual_indexes", beyond):
        yield


@fault(
    "deepstack-computed-and-not-added",
    "A patched backbone takes the features of the DeepStack mergers and adds none.",
    target="model",
    check="feature_scatter",
    expected_words=("behind layer 0, at row", "the feature of DeepStack's merger 0 is due and nothing is added"),
    requires=("DeepStack",),
)
def _deepstack_not_added(case: Case) -> Iterator[None]:
    backbone: Any = anatomy(case.model).language_backbone
    with attribute(backbone, "_deepstack_process", lambda hidden, _places, _features: hidden):
        yield


@fault(
    "deepstack-one-token-late",
    "The features of the DeepStack mergers are added one token to the right of their placeholders.",
    target="model",
    check="feature_scatter",
    expected_words=("behind layer 0, at row", "is due and nothing is added"),
    requires=("DeepStack",),
)
def _deepstack_late(case: Case) -> Iterator[None]:
    def shift(_module: Any, args: Any, kwargs: Any) -> Any:
        places = kwargs.get("visual_pos_masks")
        return args, kwargs if places is None else {**kwargs, "visual_pos_masks": places.roll(1, dims=1)}

    with before([anatomy(case.model).language_backbone], shift):
        yield


@fault(
    "deepstack-of-another-image",
    "The features of the DeepStack mergers are dealt out from the last visual token to the first.",
    target="model",
    check="feature_scatter",
    expected_words=("the feature of DeepStack's merger 0 is due and what merger 0 made of visual token", "is added"),
    requires=("DeepStack",),
)
def _deepstack_reversed(case: Case) -> Iterator[None]:
    def reverse(_module: Any, args: Any, kwargs: Any) -> Any:
        features = kwargs.get("deepstack_visual_embeds")
        return args, kwargs if not features else {**kwargs, "deepstack_visual_embeds": [f.flip(0) for f in features]}

    with before([anatomy(case.model).language_backbone], reverse):
        yield


@fault(
    "deepstack-of-the-next-block",
    "The DeepStack mergers are given what the next block returned: indexes are counted from 1.",
    target="model",
    check="feature_scatter",
    expected_words=("DeepStack's merger 0 is given that of block", "instead of what block"),
    requires=("DeepStack",),
)
def _deepstack_next_block(case: Case) -> Iterator[None]:
    tower = _tower(case)
    last = len(anatomy(case.model).blocks) - 1
    with attribute(tower, "deepstack_visual_indexes", [min(i + 1, last) for i in tower.deepstack_visual_indexes]):
        yield


@fault(
    "deepstack-in-every-row",
    "The features of the DeepStack mergers are added in every row of the batch at the places that any row has.",
    target="model",
    check="feature_scatter",
    expected_words=("behind layer 0, at row",),
    source="Blaizzy/mlx-vlm#1635",
    requires=("DeepStack",),
)
def _deepstack_every_row(case: Case) -> Iterator[None]:
    backbone: Any = anatomy(case.model).language_backbone
    own = backbone._deepstack_process

    def everywhere(hidden: torch.Tensor, places: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = own(0 * hidden, places, features)
        return hidden + added.sum(dim=0, keepdim=True)

    with attribute(backbone, "_deepstack_process", everywhere):
        yield


@fault(
    "deepstack-one-layer-late",
    "The features of each DeepStack merger are added behind the layer after its own, and the last one's not at all.",
    target="model",
    check="feature_scatter",
    expected_words=("behind layer 0, at row", "the feature of DeepStack's merger 0 is due and nothing is added"),
    requires=("DeepStack",),
)
def _deepstack_layer_late(case: Case) -> Iterator[None]:
    backbone: Any = anatomy(case.model).language_backbone
    own = backbone._deepstack_process
    waiting: list[torch.Tensor] = []

    def begin(_module: Any, _args: Any, _kwargs: Any) -> None:
        waiting.clear()

    def late(hidden: torch.Tensor, places: torch.Tensor, features: torch.Tensor) -> Any:
        due = waiting.pop() if waiting else None
        waiting.append(features)
        return hidden if due is None else own(hidden, places, due)

    with before([backbone], begin), attribute(backbone, "_deepstack_process", late):
        yield
