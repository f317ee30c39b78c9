"""The ways to check the code agree: `make`, continuous integration and pre-commit run the same tools."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
HOOKS = [
    hook for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"] for hook in repo["hooks"]
]


# Otherwise the variables of a `make test T=…` that runs these tests would reach the `make` that they start.
ENV = {key: value for key, value in os.environ.items() if key not in {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "T", "K"}}


def make(*arguments: str) -> str:
    return subprocess.run(["make", *arguments], cwd=ROOT, env=ENV, capture_output=True, text=True, check=True).stdout


def commands(*arguments: str) -> list[str]:
    """Return what `make` would run for a target after the set-up."""
    return make("-n", "-o", ".venv/.packages-installed", "-o", ".venv/.horovod-installed", *arguments).splitlines()


def test_pre_commit_runs_what_make_lint_runs() -> None:
    assert [hook["entry"] for hook in HOOKS] == commands("lint")
    assert {hook["language"] for hook in HOOKS} == {"system"}, "hooks run the tools of .venv"


def test_pre_commit_is_installed_with_the_other_tools() -> None:
    assert "    pre-commit" in (ROOT / "setup.cfg").read_text().partition("\ndev =\n")[2]
    assert re.search(r"^pre_commit==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def test_make_test_and_the_rest_are_all_tests() -> None:
    pytest_ = ".venv/bin/python -m pytest"
    assert [line.split() for line in commands("test")] == [[*pytest_.split(), "-m", '"not', 'slow"']]
    assert [line.split() for line in commands("test-rest")] == [[*pytest_.split(), "-m", "slow"]]
    assert [line.split() for line in commands("test-all")] == [pytest_.split()]


@pytest.mark.parametrize(
    ("given", "run"),
    [
        (["T=tests/x/test_y.py"], "tests/x/test_y.py"),
        (["K=this or that"], '-k "this or that"'),
        (["T=tests/x", "K=that"], '-k "that" tests/x'),
    ],
)
def test_some_tests_are_chosen_by_file_and_name(given: list[str], run: str) -> None:
    [line] = commands("test", *given)
    assert line.split() == [".venv/bin/python", "-m", "pytest", *run.split()]


def test_continuous_integration_runs_every_test_once_and_the_linters() -> None:
    run = re.findall(r"^make .*", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert run == ["make test", "make test-rest", "make lint"]


def test_make_help_lists_every_target() -> None:
    [phony] = re.findall(r"^\.PHONY: (.*)", MAKEFILE, re.MULTILINE)
    assert sorted(re.findall(r"^  make (\S+) +[A-Z]", make("help"), re.MULTILINE)) == sorted(phony.split())


def test_the_page_on_helpers_names_each_of_them() -> None:
    support = ROOT / "tests/support"
    named = set(re.findall(r"`(\w+\.py)`", (support / "README.md").read_text()))
    assert named == {path.name for path in support.glob("*.py")}


def test_no_test_module_imports_another() -> None:
    """What several test modules need stands in tests/support."""
    importing = re.compile(r"^\s*(?:from|import) test_\w+", re.MULTILINE)
    assert importing.search("from test_rules import Pair")
    assert [path.name for path in (ROOT / "tests").rglob("test_*.py") if importing.search(path.read_text())] == []
