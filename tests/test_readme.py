"""What the documents say is so."""

import re

import pytest

from tests.jobs import ROOT
from userdiff.config import make_parser
from userdiff.dataset.rows import COLUMNS

README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
FLAGS = sorted({flag for action in make_parser("p")._actions for flag in action.option_strings} - {"-h", "--help"})


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_is_in_the_table(flag):
    assert re.search(rf"^\| [^|]*`{flag}`", README, re.MULTILINE)


def test_the_table_names_no_other_flag():
    table = README[README.index("| flag | default |") : README.index("`userdiff generate` is the same program")]
    assert set(re.findall(r"`(--\w+)`", table)) == set(FLAGS)


@pytest.mark.parametrize("flag", FLAGS)
def test_every_default_is_the_one_in_the_table(flag):
    default = make_parser("p").get_default(flag.removeprefix("--"))
    if default not in (None, False):
        row = next(line for line in README.splitlines() if line.startswith(f"| `{flag}`"))
        assert str(default) in row


def test_files_and_targets_named_in_the_readme_exist():
    for path in re.findall(r"accelerate_configs/\w+\.yaml|docs/\w+\.png", README):
        assert (ROOT / path).is_file(), path
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^make (\w+)", README + CONTRIBUTING, re.MULTILINE)):
        assert f"\n{target}:" in makefile


def test_the_columns_are_those_of_the_manifest():
    assert ", ".join(COLUMNS) in " ".join(README.split())


def test_ci_runs_the_readmes_test_command():
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and line[0] != "#"]
    assert commands[-1] == "make test"
    assert "\nmake test\n" in README


def test_contributing_names_what_is_there():
    """Every path, folder and `module.function` that the drawing and the tour name."""
    drawn = CONTRIBUTING[CONTRIBUTING.index("## The house") : CONTRIBUTING.index("## Tests")]
    folders = {path.parent.name for path in (ROOT / "userdiff").glob("*/__init__.py")}
    assert folders <= set(re.findall(r"\b(\w+)/", drawn))
    for path, function in re.findall(r"`(\w+/\w+\.py|\w+\.py)`, `(\w+)", drawn):
        source = (ROOT / "userdiff" / path).read_text()
        assert re.search(rf"^ *(def|class) {function}\b", source, re.MULTILINE), (path, function)


def test_every_dependency_is_pinned():
    pyproject = (ROOT / "pyproject.toml").read_text()
    needed = set(re.findall(r'"([a-z-]+)>=', pyproject)) - {"requires-python"}
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {"torch", "diffusers", "pytest"} <= needed
    assert needed <= pinned
