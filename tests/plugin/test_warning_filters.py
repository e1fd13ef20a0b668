"""Under ``-W error``: other packages' warnings fail no test of the suite, this package's and the user's own still do."""

from __future__ import annotations

from importlib import import_module

import pytest

from pytest_qvl import samples

WARNS = "import warnings\ndef call(): warnings.warn('of another package', FutureWarning)\n"
RAISED = "*FutureWarning: of another package*"


@pytest.fixture
def in_suite(pytester, run_light, monkeypatch):
    """One test of the shipped suite; a fixture of it calls into a module of this name, and skips the rest."""

    def run(module, *arguments, filters=("error",)):
        pytester.makeini("[pytest]\nfilterwarnings =\n" + "".join(f"  {line}\n" for line in filters))
        pytester.makeconftest(
            f"import pytest\nspace = {{'__name__': {module!r}}}\nexec({WARNS!r}, space)\n"
            "@pytest.fixture\ndef qvl_quantized_model():\n    space['call']()\n    pytest.skip('enough')\n"
        )
        return run_light("--pyargs", "pytest_qvl.suite", "-k", "test_checkpoint_complete", *arguments)

    return run


@pytest.mark.parametrize("module", ["other_package", "transformers.modeling_utils", "pytest_qvl_extra"])
@pytest.mark.parametrize("arguments", [(), ("-W", "error")], ids=["ini", "flag"])
def test_a_third_partys_warning_is_shown_and_not_raised(in_suite, module, arguments):
    result = in_suite(module, *arguments)
    result.assert_outcomes(skipped=1, warnings=1)
    result.stdout.fnmatch_lines([RAISED])


@pytest.mark.parametrize(
    "module", ["pytest_qvl.models.owner", "pytest_qvl", "conftest", "some.folder.conftest", "test_x", "a/b/conftest"]
)
def test_error_holds_for_this_package_and_the_users_files(in_suite, module):
    in_suite(module).assert_outcomes(errors=1)


def test_a_filter_that_names_the_module_is_meant(in_suite):
    in_suite("other_package", filters=["error::FutureWarning:other_package"]).assert_outcomes(errors=1)


def test_what_the_user_ignores_stays_ignored(in_suite):
    in_suite("other_package", filters=["error", "ignore:of another"]).assert_outcomes(skipped=1, warnings=0)


def test_a_users_own_test_keeps_its_filters_but_our_fixtures_are_made(pytester, run_light, monkeypatch):
    pytester.makepyfile(other_package=WARNS)
    pytester.syspathinsert()
    monkeypatch.setattr(samples, "probe_samples", lambda *_: import_module("other_package").call() or [])
    pytester.makeconftest(
        "import pytest\n"
        "from pytest_qvl.samples import ProbeSizes\n"
        "@pytest.fixture(scope='session')\n"  # the real one imports torch
        "def qvl_probe_sizes(): return ProbeSizes(28, 4, 28, 28, 28, 84, one_size=True)\n"
    )
    pytester.makepyfile(
        "from other_package import call\n"
        "def test_made(qvl_image_samples): pass\n"
        "def test_called(qvl_image_samples): call()\n"
    )
    run_light("-W", "error").assert_outcomes(passed=1, failed=1, warnings=1)
