"""The table of model families: every row holds on the installed Transformers, and nobody keeps a table beside it."""

from __future__ import annotations

import ast
from dataclasses import fields
from pathlib import Path

import pytest
import transformers

import pytest_qvl
from pytest_qvl.faults.matrix.random_models import RANDOM_FAMILIES, random_config
from pytest_qvl.models.families import DEFAULT, FAMILIES, Family
from pytest_qvl.models.sources.embedded import embedded_model_dir
from pytest_qvl.models.sources.released import released_config, released_names

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))


@every_family
def test_classes_are_those_of_the_model_type(family: Family) -> None:
    assert transformers.AutoConfig.for_model(family.model_type).__class__.__name__ == family.config_class
    processors = transformers.models.auto.processing_auto.PROCESSOR_MAPPING_NAMES
    assert processors[family.model_type] == family.processor_class


@every_family
def test_the_typical_release_is_of_the_family(family: Family) -> None:
    config = released_config(family.typical)
    assert config.model_type == family.model_type
    assert config.vision_config.patch_size == family.small_vision["patch_size"]


@every_family
def test_the_small_model_has_every_field_of_its_row(family: Family) -> None:
    small, default = (
        random_config(family.model_type).vision_config,
        type(released_config(family.typical))().vision_config,
    )
    for name, value in family.small_vision.items():
        assert hasattr(default, name), f"{name} is no field of {type(default).__name__}"
        assert getattr(small, name) == value


def test_every_release_has_a_family_and_every_family_is_drawn() -> None:
    assert {released_config(name).model_type for name in released_names()} == set(FAMILIES)
    assert set(RANDOM_FAMILIES) == set(FAMILIES)
    assert transformers.AutoConfig.from_pretrained(embedded_model_dir()).model_type == DEFAULT.model_type


@pytest.fixture(scope="module")
def literals() -> dict[str, set[object]]:
    """The constants of every module of the package."""
    root = Path(pytest_qvl.__file__).parent
    return {
        file.relative_to(root).as_posix(): {
            node.value
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant)
        }
        for file in root.rglob("*.py")
    }


@pytest.mark.parametrize("field", ["model_type", "config_class", "processor_class"])
def test_no_module_keeps_a_table_of_its_own(field: str, literals: dict[str, set[object]]) -> None:
    assert field in {known.name for known in fields(Family)}
    spelled = {getattr(family, field) for family in FAMILIES.values()}
    # One name alone asks about one family; two are rows.
    assert [file for file, found in literals.items() if len(found & spelled) > 1] == ["models/families.py"]
