"""Fine-tunes a Qwen2.5-VL to answer questions about images."""
