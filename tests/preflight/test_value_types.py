"""Values of the wrong type in tokenizer, processor and generation settings, each beside what Transformers does with it.

A value is red only if Transformers raises an error at it, or acts otherwise; one that makes no difference is not.
"""

from __future__ import annotations

import json
import shutil

import pytest
from packaging.version import Version
from preflight_corpus import Workshop
from preflight_corpus.making import copy_processor

from pytest_qvl.models.sources.embedded import embedded_model_dir
from pytest_qvl.models.sources.processors import load_processor
from pytest_qvl.preflight import preflight, value_types
from pytest_qvl.preflight.adapter import find_adapter
from pytest_qvl.preflight.base import find_base
from pytest_qvl.preflight.files.folder import Folder
from pytest_qvl.preflight.processor_files import ProcessorFiles
from pytest_qvl.preflight.questions.processor import answer
from pytest_qvl.preflight.subject import Asked, Subject
from pytest_qvl.releases import installed

TOKENIZER, IMAGE, PROCESSOR, GENERATION = (
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
SPECIAL, ADDED = "special_tokens_map.json", "added_tokens.json"
END = "<|im_end|>"
DESCRIBED = {"content": END, "lstrip": False, "special": True}
TOKEN = {"__type": "AddedToken", **DESCRIBED}
REMOVED = object()

# The table is that of Transformers 5.17; what other releases do with these values is not what is shown here.
as_described = pytest.mark.skipif(
    not Version("5.17") <= Version(installed("transformers") or "0") < Version("5.18"),
    reason="the values are those that Transformers 5.17 takes",
)


def copy(source, target, **changes):
    """A folder's processor, tokenizer and generation settings; ``changes`` are contents by the file's stem."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja", ".txt") and file.name != "qvl_golden.json":
            shutil.copy(file, target)
    for name, values in changes.items():
        path = target / f"{name}.json"
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        content |= values
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not REMOVED}), encoding="utf-8")
    return target


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders of each layout: files of Transformers 4, the size as an object, and one without ``added_tokens_decoder``."""
    root = tmp_path_factory.mktemp("types")
    old = copy(embedded_model_dir(), root / "old")
    sized = copy(
        old,
        root / "sized",
        preprocessor_config={
            "min_pixels": REMOVED,
            "max_pixels": REMOVED,
            "size": {"shortest_edge": 3136, "longest_edge": 12845056},
        },
    )
    settings = json.loads((old / IMAGE).read_text(encoding="utf-8"))
    name = settings.pop("processor_class")
    new = copy(
        old,
        root / "new",
        processor_config={
            "image_processor": settings,
            "video_processor": {"video_processor_type": "Qwen2VLVideoProcessor"},
            "processor_class": name,
        },
        tokenizer_config={"added_tokens_decoder": REMOVED},
    )
    (new / IMAGE).unlink()
    return {"old": old, "sized": sized, "new": new}


def images():
    import numpy
    from PIL import Image

    values = numpy.random.default_rng(0).integers(0, 255, (70, 100, 3), dtype=numpy.uint8)
    return Image.fromarray(values), Image.fromarray(values[:28, :28])


def plain(batch):
    return {name: value.tolist() for name, value in batch.items()}


def tokens(folder):
    """What a tokenizer does; an error of the load or of a use is one of the answers."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = [f"one {END} <|image_pad|>", "a longer one than that"]
    return [
        plain(loaded(texts, padding=True, return_tensors="pt")),
        loaded("a b c " * 700, truncation=True)["input_ids"],
        loaded.all_special_tokens,
        loaded.eos_token,
        [loaded.padding_side, loaded.truncation_side],
    ]


def pixels(folder):
    """What the image processor makes of a large and of a small image."""
    loaded = load_processor(folder)
    return [plain(loaded.image_processor(images=[image], return_tensors="pt")) for image in images()]


def loads(folder):
    """What ``AutoProcessor`` loads; without torchvision it gets as far as the video half, which needs it."""
    from transformers.models.auto.image_processing_auto import AutoImageProcessor
    from transformers.models.auto.processing_auto import AutoProcessor

    AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    try:
        return type(AutoProcessor.from_pretrained(folder, local_files_only=True)).__name__
    except (ImportError, ValueError) as error:
        if "torchvision" in str(error).lower():
            return "as far as without torchvision"
        raise


def outcome(does, folder):
    try:
        return does(folder)
    except Exception as error:
        return type(error).__name__


def change(source, tmp_path, file, values):
    stem = file.removesuffix(".json")
    if file == IMAGE and not (source / IMAGE).exists():
        content = json.loads((source / PROCESSOR).read_text(encoding="utf-8"))
        stem, values = "processor_config", {"image_processor": {**content["image_processor"], **values}}
    return copy(source, tmp_path / "changed", **{stem: values})


def wrong(folder):
    return [each.key for each in ProcessorFiles(Folder(folder)).wrong]


WRONG_TOKENS = [
    *((TOKENIZER, name, value) for name in ("eos_token", "pad_token", "mask_token") for value in (5, True, [END], {})),
    *((TOKENIZER, "eos_token", value) for value in (DESCRIBED, {**TOKEN, "content": 5}, {**TOKEN, "lstrip": None})),
    (TOKENIZER, "eos_token", {"__type": "AddedToken"}),
    *((TOKENIZER, "added_tokens_decoder", value) for value in (None, 5, "x", [], [END])),
    *((TOKENIZER, "added_tokens_decoder", {"398": value}) for value in (None, END, [], {**DESCRIBED, "content": 5})),
    *((TOKENIZER, "added_tokens_decoder", {"398": {**DESCRIBED, "special": value}}) for value in (None, 1, "true")),
    *((TOKENIZER, "added_tokens_decoder", {name: DESCRIBED}) for name in ("x", "398.0", "²")),
    (TOKENIZER, "added_tokens_decoder", {"398": {"special": True}}),
    *((TOKENIZER, "extra_special_tokens", value) for value in (0, 5, True, END, [5], [None], [DESCRIBED])),
    *((TOKENIZER, "extra_special_tokens", {"box_token": value}) for value in (5, None, DESCRIBED)),
    *((TOKENIZER, "additional_special_tokens", value) for value in (5, END, [5], [DESCRIBED], {"box_token": 5})),
    *((TOKENIZER, "auto_map", value) for value in (None, 5, "a.B", [], ["a.B"], ["a.B", 5], [None, None])),
    *((TOKENIZER, "auto_map", {"AutoTokenizer": value}) for value in (5, [], ["a.B"], ["a.B", 5], "")),
    *((TOKENIZER, name, v) for name in ("padding_side", "truncation_side") for v in (None, 0, "Left", "both", [])),
    *((TOKENIZER, "model_max_length", value) for value in (0, -1, True, 2048.0, "2048", [], {})),
    *((TOKENIZER, "model_input_names", value) for value in (None, 0, "input_ids", {})),
    *((TOKENIZER, "tokenizer_class", value) for value in (0, 5, True, [], {}, ["Qwen2Tokenizer", None])),
    *((TOKENIZER, "split_special_tokens", value) for value in (None, 0, 1, "false", [])),
    *((TOKENIZER, "add_prefix_space", value) for value in (0, 1, "false", [])),
    *((TOKENIZER, "init_inputs", value) for value in (None, 5, "x")),
    *((TOKENIZER, "chat_template", value) for value in ([5], [{"name": "default"}], ["x"])),
]
WRONG_LEGACY = [
    *((SPECIAL, "eos_token", value) for value in (5, [END], {"content": 5}, {**DESCRIBED, "lstrip": 0}, {})),
    *((SPECIAL, "extra_special_tokens", value) for value in (5, END, [5], {"box_token": 5})),
    *((ADDED, "<|box|>", value) for value in ("404", None)),
]
WRONG_IMAGE = [
    *(("size", value) for value in (0, 448, 448.0, "448", True, [], [448, 448])),
    *(
        (name, v)
        for name in ("patch_size", "temporal_patch_size", "merge_size")
        for v in (None, 2.0, "2", True, [2], {})
    ),
    *(("resample", value) for value in (None, 6, 99, -1, 3.0, True, "3", "BICUBIC", [], {})),
    *((name, value) for name in ("image_mean", "image_std") for value in (None, "0.5", {}, ["0.5"] * 3)),
    *(("rescale_factor", value) for value in (None, "0.0039", [0.0039], {})),
    *((name, value) for name in ("min_pixels", "max_pixels") for value in ("12845056", [], {})),
    ("max_pixels", True),
    *(("do_resize", value) for value in (None, 0, "", [], {})),
    *((name, value) for name in ("do_rescale", "do_normalize") for value in (None, 0, "")),
]
WRONG_SIZE = [
    *({name: 3136} for name in ("shortest_edge", "longest_edge")),
    *({"shortest_edge": low, "longest_edge": high} for low, high in (("3136", "12845056"), (None, None), ([], []))),
    {"shortest_edge": 3136, "longest_edge": 12845056, "depth": 1},
    {"height": 448, "width": 448},
    {"min_pixels": 3136, "max_pixels": 12845056},
    {},
]
WRONG_LOADS = [
    *((IMAGE, "image_processor_type", value) for value in (0, 5, True, [], {})),
    *((IMAGE, "auto_map", value) for value in (None, 0, 5)),
    (IMAGE, "auto_map", {"AutoImageProcessor": 5}),
    *((name, "processor_class", value) for name in (IMAGE, PROCESSOR) for value in (0, 5, True, [], {})),
    *((PROCESSOR, "auto_map", value) for value in (None, 5)),
    *((PROCESSOR, "image_processor", value) for value in (0, 5, "x", [], ["a"])),
]


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


def named(cases):
    """Each setting once without ``--slow``, all its values with it."""
    seen = set()
    found = []
    for case in cases:
        marks = pytest.mark.slow if case[:-1] in seen else ()
        found.append(pytest.param(*case, id=json.dumps(case), marks=marks))
        seen.add(case[:-1])
    return found


@as_described
@pytest.mark.parametrize(("file", "key", "value"), named(WRONG_TOKENS))
def test_what_a_tokenizer_cannot_take_is_wrong(sources, tmp_path, file, key, value):
    source = sources["old"]
    if key == "added_tokens_decoder" and isinstance(value, dict):
        value = {**json.loads((source / file).read_text(encoding="utf-8"))[key], **value}
    folder = change(source, tmp_path, file, {key: value})
    assert wrong(folder) == [key]
    assert outcome(tokens, folder) != tokens(source)


@as_described
@pytest.mark.parametrize(("file", "key", "value"), named(WRONG_LEGACY))
def test_what_a_tokenizer_of_older_files_cannot_take_is_wrong(sources, tmp_path, file, key, value):
    folder = change(sources["new"], tmp_path, file, {key: value})
    assert wrong(folder) == [key]
    assert outcome(tokens, folder) != tokens(sources["new"])
    beside_a_decoder = copy(sources["old"], tmp_path / "unread", **{file.removesuffix(".json"): {key: value}})
    assert wrong(beside_a_decoder) == []
    assert tokens(beside_a_decoder) == tokens(sources["old"])


@as_described
@pytest.mark.parametrize("layout", ["old", "new"])
@pytest.mark.parametrize(("key", "value"), named(WRONG_IMAGE))
def test_what_an_image_processor_cannot_take_is_wrong(sources, tmp_path, layout, key, value):
    folder = change(sources[layout], tmp_path, IMAGE, {key: value})
    assert wrong(folder) == [key]
    assert outcome(pixels, folder) != pixels(sources[layout])


@as_described
@pytest.mark.parametrize("size", WRONG_SIZE, ids=json.dumps)
def test_a_size_without_its_edges_is_wrong(sources, tmp_path, size):
    folder = change(sources["sized"], tmp_path, IMAGE, {"size": size})
    assert wrong(folder) == ["size"]
    assert isinstance(outcome(pixels, folder), str)


@as_described
@pytest.mark.parametrize(("file", "key", "value"), named(WRONG_LOADS))
def test_what_auto_processor_cannot_take_is_wrong(sources, tmp_path, file, key, value):
    source = sources["new" if file == PROCESSOR else "old"]
    folder = change(source, tmp_path, file, {key: value})
    assert wrong(folder) == [key]
    assert outcome(loads, folder) not in (outcome(loads, source), "ImportError")


@as_described
def test_the_class_that_only_the_tokenizer_names_counts_too(sources, tmp_path):
    nameless = copy(sources["old"], tmp_path / "nameless", preprocessor_config={"processor_class": REMOVED})
    folder = copy(nameless, tmp_path / "changed", tokenizer_config={"processor_class": 5})
    (each,) = ProcessorFiles(Folder(folder)).wrong
    assert (each.file, each.key) == (TOKENIZER, "processor_class")
    assert outcome(loads, folder) != outcome(loads, nameless)


HEALTHY_TOKENS = [
    *((TOKENIZER, "eos_token", value) for value in (END, TOKEN)),
    *((TOKENIZER, "sep_token", value) for value in (None, END)),
    (TOKENIZER, "image_token", 5),
    *((TOKENIZER, "added_tokens_decoder", value) for value in ({}, {" 398 ": DESCRIBED})),
    *((TOKENIZER, "extra_special_tokens", value) for value in (None, [], {}, [END, TOKEN], {"box_token": END})),
    *((TOKENIZER, "additional_special_tokens", value) for value in (None, [], {}, [END, TOKEN])),
    *((TOKENIZER, "auto_map", v) for v in ({}, ["a.B", None], {"AutoTokenizer": ["a.B", None]}, {"AutoConfig": 5})),
    *((TOKENIZER, name, side) for name in ("padding_side", "truncation_side") for side in ("left", "right")),
    *((TOKENIZER, "model_max_length", value) for value in (None, 100, 1e30, 1000000000000000019884624838656)),
    (TOKENIZER, "model_input_names", ["input_ids", "attention_mask"]),
    *((TOKENIZER, "tokenizer_class", value) for value in (None, "", "Qwen2TokenizerFast")),
    *((TOKENIZER, "add_prefix_space", value) for value in (None, False)),
    *((TOKENIZER, "clean_up_tokenization_spaces", value) for value in (None, 0, "false")),
    *((TOKENIZER, "processor_class", value) for value in (None, 5)),
    *((TOKENIZER, "chat_template", value) for value in (None, [], [{"name": "default", "template": "x"}])),
    *((SPECIAL, "eos_token", value) for value in (5, DESCRIBED)),
]
# These have to give what the healthy ones give.
SAME_IMAGE = [
    *(("size", value) for value in (None, {}, {"shortest_edge": "1"}, {"min_pixels": 1, "max_pixels": 2})),
    *(("resample", value) for value in (3,)),
    *(("min_pixels", value) for value in (3136.0, 3136)),
    *(("max_pixels", value) for value in (12845056.0,)),
    *(("do_resize", value) for value in (1, "true", [1])),
    *((name, value) for name in ("do_rescale", "do_normalize") for value in (1, 2.5, "true", "false")),
    *(("image_processor_type", value) for value in (None, "Qwen2VLImageProcessorFast")),
    *(("auto_map", value) for value in ({}, [], {"AutoImageProcessor": "a.B"}, {"AutoProcessor": 5})),
    *((name, None) for name in ("crop_size", "data_format", "device", "do_center_crop", "return_tensors")),
]


@as_described
@pytest.mark.parametrize(("file", "key", "value"), named(HEALTHY_TOKENS))
def test_what_a_tokenizer_takes_is_not_wrong(sources, tmp_path, file, key, value):
    folder = change(sources["old"], tmp_path, file, {key: value})
    assert wrong(folder) == []
    assert not isinstance(outcome(tokens, folder), str)


@as_described
@pytest.mark.parametrize("layout", ["old", "new"])
@pytest.mark.parametrize(("key", "value"), named(SAME_IMAGE))
def test_what_makes_no_difference_to_pixels_is_not_wrong(sources, tmp_path, layout, key, value):
    folder = change(sources[layout], tmp_path, IMAGE, {key: value})
    assert wrong(folder) == []
    assert pixels(folder) == pixels(sources[layout])


@as_described
@pytest.mark.parametrize(
    ("key", "value"),
    named([*(("resample", v) for v in (0, 2, 5)), ("image_mean", 0.5), ("image_std", [1, 1, 1])]),
)
def test_other_values_of_a_right_type_are_not_wrong(sources, tmp_path, key, value):
    folder = change(sources["old"], tmp_path, IMAGE, {key: value})
    assert wrong(folder) == []
    if key != "resample":  # boxes need Pillow: torchvision has none
        assert not isinstance(outcome(pixels, folder), str)


# Generation

PLAIN = {"eos_token_id": [398, 396], "bos_token_id": 396, "pad_token_id": 396, "max_new_tokens": 8}
DRAWN = {**PLAIN, "do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
WRONG_GENERATION = [
    *(("eos_token_id", value) for value in ("398", True, ["398"], [None], {}, {"a": 1})),
    *(("pad_token_id", value) for value in ("396", True, [396], {})),
    *(("bos_token_id", value) for value in ("396", {})),
    *(("do_sample", value) for value in (1, "true", "false")),
    *(("temperature", value) for value in ("0.7", 2, 0, [0.7], {})),
    *(("top_k", value) for value in ("20", 20.0, -1, True, [20])),
    *(("top_p", value) for value in ("0.8", -1, [0.8], {})),
    *(("min_p", value) for value in ("0.1", 2, [])),
    *(("repetition_penalty", value) for value in ("1.05", 2, 0, [1.05], {})),
    *(("max_new_tokens", value) for value in ("8", True, 0, [], {})),
    *(("min_new_tokens", value) for value in ("3", 3.0, [])),
    *(("min_length", value) for value in ("3", 3.0, {})),
    *(("no_repeat_ngram_size", value) for value in ("2", 2.0, True, [])),
    *(("num_beams", value) for value in ("1", 2.0, 0, [])),
    *((name, v) for name in ("suppress_tokens", "begin_suppress_tokens") for v in (5, "5", ["5"], [None])),
    *(("bad_words_ids", value) for value in (5, "x", [], [5], [["5"]], [[]])),
    *(("max_time", value) for value in ("10", [])),
    *(("use_cache", value) for value in (0, "", [])),
]
SAME_GENERATION = [
    *(("eos_token_id", value) for value in (398, 398.0, [398], [398.0], [[398]])),
    *(("pad_token_id", value) for value in (396.0,)),
    *(("bos_token_id", value) for value in (None, True, [396], 396.0)),
    *(("top_p", value) for value in (1, True, 1.5)),
    *(("repetition_penalty", value) for value in (None, 1, True)),
    *(("max_new_tokens", value) for value in (8.0,)),
    *(("max_length", value) for value in (40, "40")),  # not read beside max_new_tokens
    *(("min_length", value) for value in (0, 0.0, -1)),
    *(("num_beams", value) for value in (None, 1, 1.0)),
    *(("no_repeat_ngram_size", value) for value in (None, 0, 0.0)),
    *((name, v) for name in ("suppress_tokens", "begin_suppress_tokens") for v in (None, [], [5.0])),
    *(("use_cache", value) for value in (None, 1, "true", False)),
    *((name, "x") for name in ("transformers_version", "chat_format", "_from_model_config")),
]


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(embedded_model_dir(), dtype="float32").eval()


@pytest.fixture(scope="module")
def replies(model):
    """What ``generate`` writes with a folder's settings, for a padded batch and for one prompt."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir(), local_files_only=True)
    prompts = ["What is this?", "And a longer question than that one, isn't it?"]
    batches = [tokenizer(texts, padding=True, return_tensors="pt") for texts in (prompts, prompts[1:])]

    def generate(folder):
        import torch
        from transformers import GenerationConfig

        settings = GenerationConfig.from_pretrained(folder)
        model.generation_config = settings
        torch.manual_seed(0)
        found = [model.generate(**batch).tolist() for batch in batches]
        if settings.do_sample:  # else every setting that draws is refused, whatever its type
            settings.save_pretrained(folder / "saved")
        return found

    return generate


def generation(tmp_path, name, content):
    (tmp_path / name).mkdir()
    (tmp_path / name / GENERATION).write_text(json.dumps(content), encoding="utf-8")
    return tmp_path / name


@as_described
@pytest.mark.parametrize(("key", "value"), named(WRONG_GENERATION))
def test_what_generate_cannot_take_is_wrong(replies, tmp_path, key, value):
    drawn = key in {"do_sample", "temperature", "top_k", "top_p", "min_p"}
    base = DRAWN if drawn else PLAIN
    if value == "false":  # draws
        base = {**PLAIN, "do_sample": False}
    folder = generation(tmp_path, "changed", {**base, key: value})
    assert wrong(folder) == [key]
    assert outcome(replies, folder) != outcome(replies, generation(tmp_path, "base", base))


@as_described
@pytest.mark.parametrize(("key", "value"), named(SAME_GENERATION))
def test_what_makes_no_difference_to_replies_is_not_wrong(replies, tmp_path, key, value):
    base = {**PLAIN, "eos_token_id": 398} if key == "eos_token_id" else PLAIN
    base = {**DRAWN, "top_p": 1.0} if key == "top_p" else base
    folder = generation(tmp_path, "changed", {**base, key: value})
    assert wrong(folder) == []
    assert replies(folder) == replies(generation(tmp_path, "base", base))


@as_described
@pytest.mark.parametrize(
    ("key", "value"), named([("temperature", "0.7"), ("top_k", 2.5), ("top_p", []), ("min_p", "x"), ("do_sample", 0)])
)
def test_what_draws_is_not_judged_where_nothing_is_drawn(replies, tmp_path, key, value):
    base = {**PLAIN, "do_sample": False}
    folder = generation(tmp_path, "changed", {**base, key: value})
    assert wrong(folder) == []
    assert outcome(replies, folder) == outcome(replies, generation(tmp_path, "base", base))


@as_described
def test_a_length_of_another_type_is_wrong_where_it_is_read(replies, tmp_path):
    base = {**PLAIN, "max_length": 40}
    del base["max_new_tokens"]
    folder = generation(tmp_path, "changed", {**base, "max_length": "40"})
    assert wrong(folder) == ["max_length"]
    assert outcome(replies, folder) != outcome(replies, generation(tmp_path, "base", base))


# The preflight


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("folders"))


@pytest.fixture
def pair(shop):
    """A base and an adapter with the base's processor beside it."""
    base, adapter = shop.base("qwen2_5_vl"), shop.adapter("qwen2_5_vl")
    copy_processor(base, adapter)
    return base, adapter


def write(folder, file, change):
    content = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text(json.dumps({**content, **change}), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "changed", "words"),
    [
        (
            TOKENIZER,
            {"padding_side": "middle"},
            'padding_side of tokenizer_config.json is "middle" and has to be "left"',
        ),
        (TOKENIZER, {"eos_token": 5, "pad_token": ["x"]}, "pad_token of tokenizer_config.json is"),
        (
            IMAGE,
            {"patch_size": "14", "image_mean": None, "min_pixels": []},
            'patch_size of preprocessor_config.json is "14"',
        ),
        (IMAGE, {"do_rescale": 0}, "do_rescale of preprocessor_config.json is 0 and has to be true"),
        (
            GENERATION,
            {"eos_token_id": {"a": 1}},
            'eos_token_id of generation_config.json is {"a": 1} and has to be a token',
        ),
        (GENERATION, {"do_sample": True, "temperature": "1"}, 'temperature of generation_config.json is "1"'),
    ],
)
def test_wrong_types_are_one_red_line_with_file_value_and_fix(pair, file, changed, words):
    base, adapter = pair
    write(adapter, file, changed)
    (red,) = (finding for finding in answer(subject_of(base, adapter)) if finding.state == "red")
    assert (red.question, red.name) == (6, "wrong-types")
    assert words in red.line
    assert red.fix == f"write what is expected, or copy {file} of the base into that folder"


@pytest.mark.parametrize("content", ["[]", *map(slow, ['"x"', "5", "null", '{"a": 1', "[" * 300 + "]" * 300])])
@pytest.mark.parametrize(
    "file",
    [TOKENIZER, *map(slow, [IMAGE, PROCESSOR, GENERATION, SPECIAL, ADDED, "tokenizer.json", "chat_template.json"])],
)
def test_a_file_that_is_no_object_is_one_red_line(pair, file, content):
    base, adapter = pair
    (adapter / file).write_text(content, encoding="utf-8")
    report = preflight(str(base), adapter)
    assert [red.name for red in report.red] == ["unreadable"], report.red
    assert repr(file) in report.red[0].line
    assert not [each for each in report if "error of its own" in each.line]


@pytest.mark.parametrize("values", [("5", '"left"'), ('"left"', "5")])
def test_of_a_setting_given_twice_the_last_counts_as_it_does_for_transformers(sources, tmp_path, values):
    folder = copy(sources["old"], tmp_path / "twice", tokenizer_config={"padding_side": REMOVED})
    text = (folder / TOKENIZER).read_text(encoding="utf-8")
    (folder / TOKENIZER).write_text(
        text[:-1] + "".join(f', "padding_side": {v}' for v in values) + "}", encoding="utf-8"
    )
    assert bool(wrong(folder)) == isinstance(outcome(tokens, folder), str) == (values[-1] == "5")


@pytest.mark.slow
def test_no_value_of_any_setting_is_an_error_of_its_own(pair):
    """Every setting of the tables, and those that other judges of these files read, with values of every kind."""
    base, adapter = pair
    subject = subject_of(base, adapter)
    values = (None, True, 0, -1, 2.5, 10**400, float("inf"), "x", "²", [], [[]], [None], {}, {"²": {}}, {"a": [1]})
    files = {
        TOKENIZER: (*value_types.TOKENIZER, *value_types.TEMPLATE, "processor_class"),
        IMAGE: (*value_types.IMAGE, "processor_class"),
        GENERATION: (*value_types.GENERATION, "length_penalty", "sequence_bias"),
        SPECIAL: value_types.SPECIAL_TOKENS,
        ADDED: ("x",),
        PROCESSOR: (*value_types.PROCESSOR, "processor_class"),
    }
    for file, settings in files.items():
        path = adapter / file
        before = path.read_text(encoding="utf-8") if path.exists() else "{}"
        for setting in settings:
            for value in values:
                text = json.dumps({**json.loads(before), setting: value}).replace("Infinity", "1e999")
                path.write_text(text, encoding="utf-8")
                assert list(answer(subject)), (file, setting, value)
        path.write_text(before, encoding="utf-8")


def subject_of(base, adapter):
    return Subject(Asked(str(base), adapter), find_base(str(base)), find_adapter(adapter))


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        (IMAGE, {"min_pixels": 3136.0, "do_rescale": "true"}),
        (IMAGE, {"image_mean": 0.5, "image_std": 0.5}),
        (GENERATION, {"eos_token_id": [[398.0]], "do_sample": False, "temperature": "1"}),
        (TOKENIZER, {"eos_token": TOKEN, "model_max_length": 1e30}),
    ],
)
def test_what_makes_no_difference_is_green(shop, file, changed):
    base, adapter = shop.base("qwen3_vl"), shop.adapter("qwen3_vl")
    copy_processor(base, adapter)
    write(adapter, file, changed)
    assert {finding.state for finding in answer(subject_of(base, adapter))} == {"green"}


def test_every_kind_of_the_tables_is_shown():
    """Settings that share a kind share what is shown of it."""
    tables = {
        TOKENIZER: {**value_types.TOKENIZER, **value_types.TEMPLATE},
        IMAGE: {**value_types.IMAGE, **value_types.PROCESSOR_CLASS},
        PROCESSOR: {**value_types.PROCESSOR, **value_types.PROCESSOR_CLASS},
        SPECIAL: value_types.SPECIAL_TOKENS,
        GENERATION: value_types.GENERATION,
    }
    shown = {(file, key) for file, key, _ in (*WRONG_TOKENS, *WRONG_LEGACY, *WRONG_LOADS)}
    shown |= {(IMAGE, key) for key, _ in WRONG_IMAGE}
    shown |= {(GENERATION, key) for key, _ in (*WRONG_GENERATION, ("max_length", "40"))}
    for file, table in tables.items():
        kinds = {kind for key, kind in table.items() if (file, key) in shown}
        assert not [key for key, kind in table.items() if kind not in kinds], file
