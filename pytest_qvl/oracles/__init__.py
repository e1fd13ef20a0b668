"""What each layer of a Qwen-VL model has to compute, written from the papers, and how far rounding may lead.

Nothing here imports Transformers, PEFT or bitsandbytes, nor anything else of this package: an oracle that shared code
with what it judges would share its mistakes. What is held to a limit comes as a
:class:`~pytest_qvl.oracles.bounds.Claim`.
"""
