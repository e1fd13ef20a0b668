"""A folder of ``--qvl-images`` is looked at before a model is loaded, where a test is going to use it."""

from __future__ import annotations

import pytest

USES_IMAGES = "def test_it(qvl_image_samples): pass"
NO_FILE = "--qvl-images: */samples.jsonl does not exist; write one JSON object per line with image, question and answer"


@pytest.fixture
def folder(pytester):
    """A folder that names an image which is none."""
    made = pytester.mkdir("mine")
    (made / "samples.jsonl").write_text('{"image": "a.png", "question": "What?", "answer": "a"}')
    (made / "a.png").write_bytes(b"no image")
    return made


def refusals(result):
    return [line for line in [*result.outlines, *result.errlines] if "--qvl-images:" in line]


def test_an_unreadable_image_is_one_sentence(pytester, run_light, folder):
    pytester.makepyfile(USES_IMAGES)
    result = run_light("--qvl-images", "mine")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = refusals(result)
    assert f"{folder}/samples.jsonl, line 1: image 'a.png' cannot be read" in line
    assert line.endswith("save it as PNG or JPEG")


def test_a_folder_without_samples_is_one_sentence(pytester, run_light):
    pytester.mkdir("empty")
    pytester.makepyfile(USES_IMAGES)
    result = run_light("--qvl-images", "empty")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert len(refusals(result)) == 1
    result.stderr.fnmatch_lines([f"ERROR: {NO_FILE}"])


OVERRIDES = """
    import pytest
    from pytest_qvl.samples import Sample
    @pytest.fixture(scope="session")
    def qvl_image_samples(): return [Sample((), "What is 1 + 1?", "2", skill="custom", id="sum")]
"""


def test_where_no_test_takes_images_from_it_the_folder_is_let_alone(pytester, run_light, folder):
    pytester.makepyfile("def test_it(qvl_model): pass")
    assert run_light("--qvl-images", "mine").ret == 0
    pytester.makepyfile(USES_IMAGES)
    assert run_light("--qvl-images", "mine", "--collect-only").ret == 0
    pytester.makeconftest(OVERRIDES)
    assert run_light("--qvl-images", "mine").ret == 0
