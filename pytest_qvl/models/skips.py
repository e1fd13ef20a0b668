"""Skip lists as the installed Transformers understands them: to explain a census, never to make one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_qvl.models.anatomy import Parts


def skip_list(parts: Parts) -> list[str] | None:
    """``llm_int8_skip_modules`` as the model's configuration has it; ``None`` if none was given."""
    config: Any = getattr(parts.config, "quantization_config", None)
    given = config.get("llm_int8_skip_modules") if isinstance(config, dict) else None
    if config is not None and not isinstance(config, dict):
        given = getattr(config, "llm_int8_skip_modules", None)
    return None if given is None else list(given)


def skipped_by(pattern: str, module_name: str) -> bool:
    """Whether the installed Transformers keeps a module out of the quantization because of this pattern.

    Transformers 5 matches the pattern, a regular expression, from the start of the module's full name, or
    takes it as the end of the name. Transformers 4 (``_replace_with_bnb_linear``) takes it as the module's
    own name, or as a parent's name anywhere in the full name.
    """
    try:
        from transformers.quantizers.quantizers_utils import should_convert_module
    except ImportError:
        return f"{pattern}." in module_name or pattern in (module_name, module_name.rpartition(".")[2])
    return not should_convert_module(module_name, [pattern])
