"""Which settings of ``TrainingArguments``, ``SFTConfig`` and ``LoraConfig`` move no memory, and which are refused.

Of Transformers 4.48 to 5.24, TRL to 1.15 and PEFT 0.21. What is in none of the tables is either read into a request or
unknown; an unknown setting that is set is refused, since nobody can say what it does to memory. Standard library only.
"""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Values that ask for nothing, whatever the setting is.
_OFF: tuple[Any, ...] = (None, False, "", [], {}, (), set())

# Settings of a trainer that are read into a request, and those that only count beside one of them.
TAKEN = _names(
    """
    per_device_train_batch_size gradient_accumulation_steps optim gradient_checkpointing gradient_checkpointing_kwargs
    activation_checkpointing activation_checkpointing_kwargs
    bf16 fp16 eval_strategy evaluation_strategy per_device_eval_batch_size use_liger_kernel liger_kernel_config
    eval_accumulation_steps eval_do_concat_batches batch_eval_metrics prediction_loss_only
    resume_from_checkpoint load_best_model_at_end
    ddp_bucket_cap_mb fsdp_config packing_strategy max_length pad_to_multiple_of dataset_text_field
    """
)
# How long, how fast, what is logged, saved, shuffled and prepared: nothing of it is on the card.
NEUTRAL = _names(
    """
    output_dir overwrite_output_dir run_name project logging_dir report_to disable_tqdm log_level log_level_replica
    log_on_each_node logging_strategy logging_first_step logging_steps logging_nan_inf_filter trackio_space_id
    trackio_bucket_id trackio_static_space_id include_num_input_tokens_seen include_tokens_per_second
    num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio
    weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm seed data_seed tf32 average_tokens_across_devices
    eval_steps eval_delay do_train do_eval do_predict metric_for_best_model greater_is_better
    eval_use_gather_object
    save_strategy save_steps save_total_limit save_safetensors save_only_model save_on_each_node enable_jit_checkpoint
    ignore_data_skip restore_callback_states_from_checkpoint push_to_hub push_to_hub_model_id
    push_to_hub_organization push_to_hub_token hub_token hub_private_repo hub_model_id hub_strategy hub_always_push
    hub_revision auto_find_batch_size use_cpu no_cuda use_mps_device accelerator_config dispatch_batches split_batches
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order remove_unused_columns label_names
    train_sampling_strategy group_by_length length_column_name skip_memory_metrics local_rank ddp_backend ddp_timeout
    ddp_broadcast_buffers ray_scope tpu_num_cores tpu_metrics_debug fsdp_min_num_params
    fsdp_transformer_layer_cls_to_wrap fp16_opt_level fp16_backend use_legacy_prediction_loop trust_remote_code
    chat_template_path dataset_kwargs dataset_num_proc
    eos_token pad_token truncation_mode shuffle_dataset router_aux_loss_coef
    mixed_precision distributed_state deepspeed_plugin fsdp_plugin_args xla_fsdp_config hf_deepspeed_config
    """
)
# Of SFTTrainer (TRL 1.16), in its own words.
_PACKED = "SFTTrainer refuses it for data with images ('{}'); rows that a collator of yours packs are --packed"
# What moves memory and is not forecast, with the values that ask for nothing beside those of ``_OFF``, and why.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "deepspeed": ((), "it spreads or offloads what a single card holds"),
    "fsdp": ((), "it spreads what a single card holds"),
    "parallelism_config": ((), "it spreads what a single card holds"),
    "mp_parameters": ((), "it spreads what a single card holds"),
    "torch_compile": ((), "a compiled step makes other tensors"),
    "torch_compile_backend": ((), "a compiled step makes other tensors"),
    "torch_compile_mode": ((), "a compiled step makes other tensors"),
    "torchdynamo": ((), "a compiled step makes other tensors"),
    "jit_mode_eval": ((), "a compiled model makes other tensors"),
    "use_ipex": ((), "it puts other kernels in place"),
    "half_precision_backend": (("auto", "cuda_amp", "cpu_amp"), "only torch's own autocast is followed"),
    "packing": ((), _PACKED.format("Packing is not supported for vision datasets")),
    "eval_packing": ((), "SFTTrainer packs no data with images; leave it out"),
    "padding_free": ((), _PACKED.format("Padding-free training is yet not supported for vision datasets")),
    "activation_offloading": ((), "activations are kept in host memory"),
    "neftune_noise_alpha": ((), "the noise is a second copy of the embeddings"),
    "fp16_full_eval": ((), "it casts the model"),
    "bf16_full_eval": ((), "it casts the model"),
    "label_smoothing_factor": ((0,), "its loss keeps all log-probabilities"),
    "use_cache": ((), "a training step with a KV cache is not followed"),
    "past_index": ((-1,), "what a batch hands on to the next is not followed"),
    "torch_empty_cache_steps": ((), "what an emptied cache does to reserved memory is not followed"),
    "full_determinism": ((), "deterministic kernels have other workspaces"),
    "debug": ((), "its hooks make copies of every activation"),
    "eval_on_start": ((), "it evaluates without optimizer states; leave it out and name eval_strategy"),
    "include_for_metrics": ((["loss"],), "inputs that metrics keep are not followed"),
    "include_inputs_for_metrics": ((), "inputs that metrics keep are not followed"),
    "optim_args": ((), "they may change what the optimizer keeps"),
    "optim_target_modules": ((), "they belong to optimizers that are not followed"),
    "adafactor": ((), "it is an old name; say optim='adafactor'"),
    "ddp_find_unused_parameters": ((True,), "of several cards only the trainers' own way is followed"),
    "ddp_static_graph": ((), "of several cards only the trainers' own way is followed"),
    "per_gpu_train_batch_size": ((), "it is an old name; say per_device_train_batch_size"),
    "per_gpu_eval_batch_size": ((), "it is an old name; say per_device_eval_batch_size"),
    "model_init_kwargs": ((), "how the model is loaded is said by --checkpoint, --base-bits and --compute-dtype"),
    "assistant_only_loss": ((), "every token is taken to be learnt, and fewer make TRL's head smaller"),
    "completion_only_loss": ((), "every token is taken to be learnt, and fewer make TRL's head smaller"),
    "loss_type": (("nll",), "only TRL's nll is followed"),
}

# The same for a LoRA configuration; ``target_modules`` and the rest of this line are read.
LORA_TAKEN = _names(
    """
    r target_modules lora_dropout init_lora_weights use_dora modules_to_save trainable_token_indices
    exclude_modules layers_to_transform layers_pattern rank_pattern bias lora_bias ensure_weight_tying
    """
)
LORA_NEUTRAL = _names(
    """
    task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode lora_alpha
    fan_in_fan_out use_rslora alpha_pattern megatron_core qalora_group_size loftq_config eva_config corda_config
    lora_ga_config
    """
)
LORA_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "megatron_config": ((), "Megatron's layers are not followed"),
    "layer_replication": ((), "a model with more layers than its configuration says is not followed"),
    "target_parameters": ((), "adapters of parameters are not followed"),
    "alora_invocation_tokens": ((), "activated LoRA is not followed"),
    "use_qalora": ((), "QALoRA is not followed"),
    "use_bdlora": ((), "BD-LoRA is not followed"),
    "velora_config": ((), "VeLoRA is not followed"),
    "monteclora_config": ((), "MonteCLoRA is not followed"),
    "arrow_config": ((), "Arrow is not followed"),
    "kasa_config": ((), "KaSA is not followed"),
    "runtime_config": (({"ephemeral_gpu_offload": False},), "offloading is not followed"),
}


def refuse_unknown(
    where: str,
    settings: Mapping[str, Any],
    refused: Mapping[str, tuple[tuple[Any, ...], str]],
    known: Collection[str],
) -> None:
    """Refuse the first setting that moves memory and is not forecast, or of which nobody knows whether it does.

    Args:
        where: What holds the settings, for the message.
        settings: All of them by name; names that begin with an underscore are a class's own.
        refused: What is not forecast: values that ask for nothing, and why.
        known: What is read, or moves no memory.

    Raises:
        ValueError: Names the setting and its value.
    """
    for name, value in settings.items():
        if name in known or name.startswith("_") or asks_for_nothing(value):
            continue
        harmless, why = refused.get(
            name, ((), "it is no setting whose memory the forecast knows; leave it out if it moves none")
        )
        if not asks_for_nothing(value, harmless):
            raise ValueError(f"{where} has {name}={value!r}, which is not forecast: {why}")


def asks_for_nothing(value: Any, harmless: Collection[Any] = ()) -> bool:
    """Whether it is one of a setting's harmless values, or of those that are for every setting: 0 is no ``False``."""
    plain = vars(value) if is_dataclass(value) else getattr(value, "value", value)
    return any(plain == one and isinstance(plain, bool) == isinstance(one, bool) for one in (*_OFF, *harmless))
