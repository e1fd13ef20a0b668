"""The doors of the forecast: options, training arguments and LoRA configurations, and what was assumed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from pytest_qvl.cli import main
from pytest_qvl.models.sources.embedded import embedded_model_dir
from pytest_qvl.vram.forecast import Request, known_settings
from pytest_qvl.vram.forecast.asked import Asked, ask
from pytest_qvl.vram.forecast.engine.dry_run import DryRun
from pytest_qvl.vram.forecast.options import add_options
from pytest_qvl.vram.forecast.source import find_source
from pytest_qvl.vram.forecast.trainer_settings import from_lora, from_trainer

EMBEDDED = str(embedded_model_dir())


def _ask(*options: str) -> Asked:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return ask(parser.parse_args(options))


@pytest.fixture(scope="module")
def training_arguments(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A file that real training arguments were saved in, changed as asked."""
    from transformers import TrainingArguments

    from pytest_qvl.vram.forecast.validation.trainers.training import checkpointing_argument

    folder = tmp_path_factory.mktemp("arguments")
    plain = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        **{checkpointing_argument(): True},
        optim="paged_adamw_32bit",
        report_to="none",
        use_cpu=True,
    )

    def saved(**changes: Any) -> str:
        file = folder / "training_args.json"
        file.write_text(json.dumps({**json.loads(plain.to_json_string()), **changes}), encoding="utf-8")
        return str(file)

    return saved


def test_nothing_said_is_the_default_request_and_is_said_to_be_assumed() -> None:
    asked = _ask()
    assert asked.request == Request()
    assert asked.assumed == (
        *("--trainer hf", "--precision bf16", "--accumulation 1"),
        *("--gradient-checkpointing", "--lora-r 16", "--optimizer paged_adamw_8bit"),
    )
    assert "--precision fp16" in _ask("--card", "t4").assumed
    assert "--precision bf16-pure" in _ask("--trainer", "loop").assumed
    assert _ask("--lora-r", "0").assumed == ()


def test_options_make_the_request_and_are_not_assumed() -> None:
    said = (
        "--trainer trl --precision bf16 --accumulation 4 --no-gradient-checkpointing --lora-r 8 --optimizer adamw_torch"
    )
    asked = _ask(*said.split(), "--no-vision-hook", "--batch", "2", "--image", "448x448")
    assert asked.assumed == ()
    assert asked.compute_dtype == "bfloat16"
    assert asked.request == Request(
        trainer="trl",
        precision="bf16",
        accumulation=4,
        gradient_checkpointing=False,
        lora_r=8,
        optimizer="adamw_torch",
        vision_hook=False,
        batch=2,
        image=(448, 448),
    )


def test_training_arguments_are_read_from_json_and_options_go_first(training_arguments: Any) -> None:
    asked = _ask("--from-trainer", training_arguments(bf16=True), "--batch", "3")
    assert asked.request == Request(
        batch=3, accumulation=4, gradient_checkpointing=True, optimizer="paged_adamw_32bit", precision="bf16"
    )
    assert asked.assumed == ("--lora-r 16",)


@pytest.mark.parametrize(
    ("card", "precision"), [((), "bf16-pure"), (("--card", "l4"), "bf16-pure"), (("--card", "t4"), "fp16-pure")]
)
def test_training_arguments_without_mixed_precision_train_without_autocast(
    training_arguments: Any, card: tuple[str, ...], precision: str
) -> None:
    assert _ask("--from-trainer", training_arguments(), *card).request.precision == precision


def test_bf16_of_training_arguments_on_a_card_without_it_is_refused(
    training_arguments: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["forecast", "--model", EMBEDDED, "--from-trainer", training_arguments(bf16=True), "--card", "t4"]
    assert main(command) == 2
    assert "t4 has no bfloat16" in capsys.readouterr().err


def test_a_training_that_resumes_or_loads_its_best_adapter_is_read(training_arguments: Any) -> None:
    file = training_arguments(resume_from_checkpoint="checkpoint-500")
    assert _ask("--from-trainer", file).request.resume
    assert not _ask("--from-trainer", file, "--no-resume").request.resume
    file = training_arguments(load_best_model_at_end=True, eval_strategy="steps")
    assert _ask("--from-trainer", file).request.load_best


def test_an_sft_config_is_known_by_its_own_settings(training_arguments: Any) -> None:
    """As TRL 1.15 has them where nobody says anything."""
    unset = """
        model_init_kwargs chat_template_path dataset_kwargs dataset_num_proc eos_token pad_token eval_packing
        completion_only_loss router_aux_loss_coef pad_to_multiple_of
    """
    off = "trust_remote_code shuffle_dataset packing padding_free assistant_only_loss activation_offloading"
    settings: dict[str, Any] = {**dict.fromkeys(unset.split()), **dict.fromkeys(off.split(), False)}
    settings |= {"dataset_text_field": "text", "truncation_mode": "keep_start", "packing_strategy": "bfd"}
    found = from_trainer(training_arguments(**settings, loss_type="nll", max_length=1024))
    assert (found["trainer"], found["max_length"], found["pad_to_multiple_of"]) == ("trl", 1024, 1)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"deepspeed": {"zero_optimization": {}}},
            "deepspeed={'zero_optimization': {}}, which is not forecast: it spreads",
        ),
        ({"packing": True}, "packing=True, which is not forecast: SFTTrainer refuses it for data with images"),
        ({"padding_free": True}, "padding_free=True, which is not forecast: SFTTrainer refuses it for data with"),
        ({"eval_packing": True}, "eval_packing=True, which is not forecast: SFTTrainer packs no data with images"),
        ({"torch_compile_backend": "inductor"}, "torch_compile_backend='inductor', which is not forecast: a compiled"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1, which is not forecast: its loss keeps"),
        ({"freeze_head": True}, "freeze_head=True, which is not forecast: it is no setting whose memory"),
        ({"include_for_metrics": ["inputs"]}, r"include_for_metrics=\['inputs'\], which is not forecast"),
        ({"per_device_train_batch_size": "8"}, r"batch is '8': it must be a whole number \(settings were read from"),
        ({"num_generations": 8}, "of a trainer with a reference or generations"),
        (
            {"gradient_checkpointing_kwargs": {"determinism_check": "none"}},
            "of its settings only use_reentrant is followed",
        ),
        ({"optim": "lomo"}, r"optimizer is 'lomo': known are .* \(settings were read from .*; options go first\)"),
    ],
)
def test_what_training_arguments_ask_for_and_no_forecast_follows_is_refused(
    training_arguments: Any, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        _ask("--from-trainer", training_arguments(**changes))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"bf16": "false"}, "bf16='false': it must be true or false"),
        ({"gradient_checkpointing": "false"}, "gradient_checkpointing='false': it must be true or false"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": "false"}}, "use_reentrant='false': it must be true or"),
        (
            {"gradient_checkpointing_kwargs": "none"},
            "gradient_checkpointing_kwargs='none': it must be settings by name",
        ),
        ({"use_liger_kernel": True, "liger_kernel_config": "all"}, "liger_kernel_config='all': it must be settings by"),
        ({"eval_strategy": "yes"}, "eval_strategy='yes': it must be one of no, steps, epoch"),
        ({"bf16": True, "fp16": True}, "bf16 and fp16: TrainingArguments takes one of them"),
        ({"per_device_train_batch_size": True}, "batch is True: it must be a whole number"),
    ],
)
def test_a_value_that_is_none_of_a_training_argument_is_not_taken_for_one(
    training_arguments: Any, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        _ask("--from-trainer", training_arguments(**changes))


def test_an_evaluation_strategy_that_yaml_read_as_false_is_none(training_arguments: Any) -> None:
    assert not _ask("--from-trainer", training_arguments(eval_strategy=False)).request.evaluation


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"r": 0}, "r=0: a LoRA has a rank of at least 1; inference alone is --lora-r 0"),
        ({"lora_dropout": "0.05"}, "lora_dropout='0.05': it must be a number"),
        ({"use_dora": "false"}, "use_dora='false': it must be true or false"),
        ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head': it must be a list of names"),
        ({"target_modules": [1, 2]}, r"target_modules=\[1, 2\]: it must be a list of names, or one"),
        ({"bias": "weird"}, "bias='weird': it must be one of none, all, lora_only"),
        ({"layers_to_transform": "all"}, "layers_to_transform='all': it must be a number of a layer, or a list"),
        ({"rank_pattern": {"q_proj": "8"}}, "rank_pattern={'q_proj': '8'}: it must be ranks by name of a module"),
        ({"trainable_token_indices": 5}, "trainable_token_indices=5: it must be a list of token ids"),
        (
            {"trainable_token_indices": {"embed_tokens": 5}},
            "it must be a list of token ids, or one by name of a module",
        ),
        ({"init_lora_weights": ["pissa"]}, r"init_lora_weights=\['pissa'\]: it must be true, false or a name"),
        ({"init_lora_weights": "EVA"}, "init_lora_weights is 'EVA', which is not forecast: followed are pissa"),
        ({"init_lora_weights": "eva", "eva_config": {"rho": "1"}}, "rho='1': it must be a number"),
        ({"init_lora_weights": "eva", "eva_config": "usual"}, "eva_config='usual': it must be settings by name"),
    ],
)
def test_a_value_that_is_none_of_a_lora_setting_is_not_taken_for_one(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"], **changes}))
    with pytest.raises(ValueError, match=complaint):
        _ask("--from-lora", str(tmp_path))


@pytest.mark.parametrize("name", ["training_args.bin", "training_args.json"])
def test_a_pickle_is_refused_and_never_run(tmp_path: Path, name: str) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    file = tmp_path / name
    file.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=f"{name} is a pickle, and reading it would run whatever code is in it: save"):
        from_trainer(str(file))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("{", "is not JSON"), ("[]", "holds a list"), ('{"lr": 1}', "holds no training arguments: it has no per_device")],
)
def test_files_that_hold_no_training_arguments_are_refused(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "some.json").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        from_trainer(str(tmp_path / "some.json"))


def test_arguments_are_read_from_a_module_and_from_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "qvl_my_training.py"
    script.write_text(
        "class TrainingArguments:\n    def __init__(self):\n        self.per_device_train_batch_size = 5\n"
        "class SFTConfig(TrainingArguments): pass\nclass DPOConfig(TrainingArguments): pass\n"
        "arguments, sft, dpo = TrainingArguments(), SFTConfig(), DPOConfig()\n"
    )
    assert from_trainer("qvl_my_training:arguments")["batch"] == 5
    assert from_trainer("qvl_my_training.py:sft")["trainer"] == "trl"
    with pytest.raises(ValueError, match="is a DPOConfig; the forecast follows TrainingArguments"):
        from_trainer("qvl_my_training:dpo")
    with pytest.raises(ValueError, match="qvl_my_training:nothing cannot be imported: AttributeError"):
        from_trainer("qvl_my_training:nothing")
    with pytest.raises(ValueError, match="'nothing' is neither a file nor MODULE:NAME"):
        from_trainer("nothing")


def test_what_a_script_prints_stays_out_of_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "talkative.py").write_text(
        "class TrainingArguments: per_device_train_batch_size = 5\narguments = TrainingArguments()\n"
        "arguments.per_device_train_batch_size = 5\nprint('epoch 1')\n"
    )
    assert from_trainer("talkative.py:arguments")["batch"] == 5
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "epoch 1\n")


def test_a_lora_configuration_is_read_from_what_peft_saved(tmp_path: Path) -> None:
    from peft import LoraConfig

    LoraConfig(r=64, lora_dropout=0.05, target_modules=["v_proj", "q_proj"]).save_pretrained(str(tmp_path))
    assert from_lora(str(tmp_path)) == {
        "lora_r": 64,
        "lora_dropout": 0.05,
        "use_dora": False,
        "modules_to_save": (),
        "trainable_tokens": 0,
        "lora_targets": ("q_proj", "v_proj"),
        "lora_options": (),
    }
    LoraConfig(r=4, target_modules=r".*layers.*_proj").save_pretrained(str(tmp_path))
    assert from_lora(str(tmp_path))["lora_targets"] == ".*layers.*_proj"
    LoraConfig(r=4, target_modules=None).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="lora_targets is empty, and PEFT has no default for these models"):
        _ask("--from-lora", str(tmp_path))
    assert _ask("--from-lora", str(tmp_path), "--lora-targets", "q_proj").request.lora_targets == ("q_proj",)
    assert _ask("--lora-targets", r".*\.q_proj").request.lora_targets == r".*\.q_proj"


def test_every_setting_of_the_installed_classes_is_read_neutral_or_refused() -> None:
    """A setting that a new release brings is in none of the tables, and somebody has to say what it does to memory."""
    from peft import LoraConfig
    from transformers import TrainingArguments

    trainer = known_settings.TAKEN | known_settings.NEUTRAL | known_settings.REFUSED.keys()
    lora = known_settings.LORA_TAKEN | known_settings.LORA_NEUTRAL | known_settings.LORA_REFUSED.keys()
    assert {f.name for f in dataclasses.fields(TrainingArguments) if not f.name.startswith("_")} <= trainer
    assert {f.name for f in dataclasses.fields(LoraConfig)} <= lora


def test_the_defaults_of_the_installed_classes_ask_for_nothing_that_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig
    from transformers import TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    known_settings.refuse_unknown(
        "them", vars(arguments), known_settings.REFUSED, known_settings.TAKEN | known_settings.NEUTRAL
    )
    lora = vars(LoraConfig(r=4, target_modules=["q_proj"]))
    known_settings.refuse_unknown(
        "it", lora, known_settings.LORA_REFUSED, known_settings.LORA_TAKEN | known_settings.LORA_NEUTRAL
    )


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"peft_type": "ADALORA"}, "peft_type='ADALORA', which is not forecast"),
        ({"target_parameters": ["a.b"]}, r"target_parameters=\['a.b'\], which is not forecast"),
        ({"trainable_token_indices": {"lm_head": [1]}}, "trainable_token_indices of lm_head, which is not forecast"),
        ({"use_newlora": True}, "use_newlora=True, which is not forecast: it is no setting whose memory"),
    ],
)
def test_what_a_lora_configuration_asks_for_and_no_forecast_follows_is_refused(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], **changes}))
    with pytest.raises(ValueError, match=complaint):
        from_lora(str(tmp_path))


def test_what_an_evaluation_keeps_is_read(training_arguments: Any) -> None:
    """Whether there are metrics no training argument says."""
    file = training_arguments(eval_strategy="steps", eval_accumulation_steps=4, eval_do_concat_batches=False)
    asked = _ask(
        "--from-trainer", file, "--compute-metrics", "--evaluation-batches", "9", "--preprocess-logits", "argmax"
    )
    request = asked.request
    assert (request.evaluation, request.evaluation_batches, request.eval_accumulation_steps) == (8, 9, 4)
    assert request.keeps_logits
    assert "--evaluation-batches 1" in _ask("--from-trainer", file, "--compute-metrics").assumed
    assert "--evaluation-batches 1" not in _ask("--from-trainer", file).assumed
    assert not request.eval_do_concat_batches
    assert not _ask(
        "--from-trainer", training_arguments(eval_strategy="steps"), "--evaluation-batches", "9"
    ).request.keeps_logits


def test_reentrant_checkpointing_is_read_and_left_to_the_trainer_where_nobody_says(training_arguments: Any) -> None:
    said = from_trainer(training_arguments(gradient_checkpointing_kwargs={"use_reentrant": True}))
    assert said["reentrant"] is True
    assert "reentrant" not in from_trainer(training_arguments())


def test_checkpointing_has_another_name_since_transformers_5_23(training_arguments: Any) -> None:
    """The new name goes first, and says the same as the old one wherever both are saved."""
    old = {"gradient_checkpointing": None, "gradient_checkpointing_kwargs": None}
    said = from_trainer(
        training_arguments(
            **old, activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": False}
        )
    )
    assert said["gradient_checkpointing"] is True
    assert said["reentrant"] is False
    assert not from_trainer(training_arguments(activation_checkpointing=False))["gradient_checkpointing"]
    with pytest.raises(
        ValueError, match=r"activation_checkpointing_kwargs=\{'every_n_layers': 2\}, which is not forecast"
    ):
        from_trainer(training_arguments(activation_checkpointing_kwargs={"every_n_layers": 2}))


def test_what_decides_which_layers_are_adapted_is_given_to_peft(tmp_path: Path) -> None:
    """Two layers of all, one matrix of them with another rank, none of the MLPs."""
    from peft import LoraConfig

    def adapter(**settings: Any) -> Any:
        LoraConfig(r=4, target_modules=["q_proj", "o_proj", "up_proj"], **settings).save_pretrained(str(tmp_path))
        request = _ask("--model", EMBEDDED, "--from-lora", str(tmp_path), "--image", "112x112").request
        wrapped: Any = DryRun(request, find_source(EMBEDDED))._parts.wrapped
        return wrapped.get_nb_trainable_parameters()[0]

    some = adapter(exclude_modules=["up_proj"], layers_to_transform=[0, 1], layers_pattern="layers")
    width = find_source(EMBEDDED).config.get_text_config().hidden_size
    more = adapter(
        exclude_modules=["up_proj"], layers_to_transform=[0, 1], layers_pattern="layers", rank_pattern={"o_proj": 8}
    )
    assert some == 2 * 2 * 4 * 2 * width
    assert more == some + 2 * 4 * 2 * width


def test_the_first_layer_alone_and_tied_weights_are_asked_for_too(tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    settings = {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": 0, "ensure_weight_tying": True}
    file.write_text(json.dumps({**settings, "exclude_modules": [], "rank_pattern": {}, "bias": "none"}))
    assert from_lora(str(tmp_path))["lora_options"] == (("layers_to_transform", 0), ("ensure_weight_tying", True))


def test_several_sizes_beside_a_number_of_images_are_refused() -> None:
    with pytest.raises(ValueError, match="--images 2 beside 3 sizes of --image: each size is one image"):
        _ask("--image", "448x448", "224x448", "100x100", "--images", "2")


def test_the_command_says_what_was_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["forecast", "--model", EMBEDDED, "--image", "112x112", "--tokens", "20", "--lora-r", "8"]) == 0
    said = "assumed, as nothing was said: --trainer hf --precision bf16 --accumulation 1 --gradient-checkpointing --optimizer"
    assert said in capsys.readouterr().out
