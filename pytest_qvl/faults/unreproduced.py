"""Known failures that are no fault of the catalogue, and why."""

from __future__ import annotations

GPU = "CUDA kernels only"
UNSLOTH = "Unsloth needs CUDA; the same checks run on its models there"
OLD = "an older release only; the defect itself is in the catalogue"
FILES = "about files beside the model; no check of this package reads them"

UNREPRODUCED: tuple[tuple[str, str, str], ...] = (
    ("float16 GradScaler meets bf16 adapters on a T4", "MakazhanAlpamys/Soup#425", GPU),
    ("8-bit load with a skip list crashes", "bitsandbytes-foundation/bitsandbytes#1634", GPU),
    ("vision part in another 16-bit dtype on a T4", "unslothai/unsloth#4970", f"{GPU}; raises by itself"),
    ("adapters stay float32 although autocast is off", "huggingface/peft#2891",
     "reported by adapter_census (adapter dtype), not judged: float32 is the safe side"),
    ("k-bit preparation casts all that is not quantized to float32", "bitsandbytes-foundation/bitsandbytes#1569",
     "reported by quantization_census with the MiB it costs; limit_vram judges it"),
    ("eager, SDPA and flash attention differ", "huggingface/transformers#35749",
     f"{GPU}; eager and SDPA agree on CPU and are a healthy variation"),
    ("vision tower without gradient checkpointing runs out of memory", "huggingface/transformers#34724", GPU),
    ("loading needs full-precision memory", "huggingface/transformers#43032", f"{GPU}; limit_vram(load)"),
    ("one large image fills the memory", "unslothai/unsloth#1326", f"{GPU}; the VRAM forecast covers it"),
    ("max_pixels accepted and ignored", "huggingface/transformers#41955", "the torchvision image processor only"),
    ("device map splits the multimodal path", "huggingface/transformers#33816", "needs two GPUs"),
    ("tensors left on the meta device", "vllm-project/llm-compressor#1432", "raises by itself"),
    ("packed rows get wrong positions", "hiyouga/LlamaFactory#7754", "packed batches are no input of the checks"),
    ("M-RoPE skipped because of the processor's class", "verl-project/verl#1947", OLD),
    ("patched forward rejects mm_token_type_ids", "linkedin/Liger-Kernel#1117", "raises by itself"),
    ("hand-written decoding without a mask reuses rope_deltas", "huggingface/transformers#36009",
     "reads the state by design; every check resets it"),
    ("merging into 4-bit changes more than the adapter did", "huggingface/peft#2321",
     "adapter_neutrality refuses to judge a merged adapter"),
    ("merged checkpoint equals its base", "huggingface/peft#2586", FILES),
    ("saved keys in another layout", "huggingface/transformers#38489", FILES),
    ("processor missing beside the adapter", "unslothai/unsloth#4671", f"{FILES}; loading names what is missing"),
    ("resized vocabulary and a stale loss", "hiyouga/LlamaFactory#8823", f"{OLD}; raises by itself"),
    ("compiled cache of another version", "unslothai/unsloth#1934", UNSLOTH),
    ("gibberish after the stock notebook", "unslothai/unsloth#2120", UNSLOTH),
    ("batched generation with a shared cache position", "unslothai/unsloth#4078", UNSLOTH),
    ("vision gradients vanish in a patched model", "unslothai/unsloth#5039", UNSLOTH),
    ("AWQ checkpoint garbled", "QwenLM/Qwen3-VL#1033", "another quantization"),
)  # fmt: skip
