"""Follow the pages on adding something to the letter: write files, change files, run commands, and see the results.

On such a page, a line that ends in the name of a file and a colon comes before the block that goes into that file: a
whole file, or a change to it (```diff). A block ```sh holds commands, and a block ```text after it holds lines that
they must print, where … stands for anything. What is under "In a folder of your own" is tried in an empty folder, with
danaz as it is; everything else is tried in a scratch copy of the sources.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

pytestmark = pytest.mark.timeout(300)  # on a busy machine, torch takes long to import
ROOT = Path(__file__).parents[2]
PAGES = sorted(path.name for path in ROOT.glob("docs/adding-*.md"))
OWN = "## In a folder of your own\n"
BLOCK = re.compile(r"(?:`(?P<file>[^`\s]+)`[^`\n]*:\n\n)?```(?P<kind>\w+)\n(?P<text>.*?)```", re.DOTALL)

# Runs all commands in one process, which imports torch once. The terminal is wide, so that no line wraps.
RUNNER = """
import shlex, subprocess, sys
sys.path.insert(0, {root!r})
import pytest
import danaz, danaz.cli.main
assert danaz.__file__.startswith({root!r}), danaz.__file__
for line in {commands!r}:
    first, *rest = shlex.split(line)
    print("$", line, flush=True)
    if first == "danaz":
        sys.argv = ["danaz", *rest]
        try:
            danaz.cli.main.main()
        except SystemExit as end:
            assert not end.code, (line, end.code)
    elif first == "grep":
        subprocess.run([first, *rest], check=True)
    else:
        assert [first, *rest[:2]] == ["python", "-m", "pytest"], line
        code = pytest.main(["-q", "-p", "no:cacheprovider", *rest[2:]])
        assert code == 0, (line, code)
"""


Printed = dict[tuple[Callable[[str, Path], str], str], Future[str]]


@dataclass(frozen=True)
class Block:
    file: str | None
    kind: str
    text: str


def blocks(text: str) -> list[Block]:
    return [Block(*found.group("file", "kind", "text")) for found in BLOCK.finditer(text)]


def halves(page: str) -> tuple[list[Block], list[Block]]:
    """Return what belongs in a folder of one's own, and what belongs in a copy of danaz."""
    before, own, rest = (ROOT / "docs" / page).read_text().partition(OWN)
    at = rest.find("\n## ")
    return (blocks(rest[:at]), blocks(before + rest[at:])) if own else ([], blocks(before))


def changed(text: str, diff: str) -> str:
    """Apply a change to ``text``. Lines are kept ( ), removed (-) or added (+); @@ begins a change at another place."""
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE):
        lines = [(line[:1] or " ", line[1:]) for line in hunk.splitlines()]
        old = "".join(f"{line}\n" for sign, line in lines if sign != "+")
        new = "".join(f"{line}\n" for sign, line in lines if sign != "-")
        assert text.count(old) == 1, f"the page changes text that is not there exactly once:\n{old}"
        text = text.replace(old, new)
    return text


def follow(steps: list[Block], folder: Path) -> str:
    """Write and change the files, then run the commands. Returns what they print."""
    commands: list[str] = []
    for step in steps:
        if step.kind == "sh":
            commands += step.text.splitlines()
        elif step.kind == "diff":
            assert step.file is not None, f"the page does not say which file this changes:\n{step.text}"
            path = folder / step.file
            path.write_text(changed(path.read_text(), step.text))
        elif step.kind != "text":
            assert step.file is not None, f"the page does not say where this goes:\n{step.text}"
            path = folder / step.file
            assert not path.exists(), f"{step.file} is there already"
            path.write_text(step.text)
    root = str(folder if (folder / "danaz").exists() else ROOT)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONDONTWRITEBYTECODE": "1"}
    runner = [sys.executable, "-c", RUNNER.format(root=root, commands=commands)]
    run = subprocess.run(runner, cwd=folder, env=env, text=True, capture_output=True, timeout=280)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    return run.stdout


def see(steps: list[Block], printed: str) -> None:
    for promise in (line for step in steps if step.kind == "text" for line in step.text.splitlines()):
        pattern = r".*?".join(r"\s+".join(map(re.escape, part.split())) for part in promise.split("…"))
        assert re.search(pattern, printed, re.DOTALL), f"{promise!r} is not in\n{printed}"


def with_page(own: bool) -> list[str]:
    return [page for page in PAGES if halves(page)[not own]]


def test_there_are_pages() -> None:
    assert [re.sub("adding-an?-", "", page) for page in PAGES] == [
        "codec.md",
        "rule.md",
        "transport.md",
        "workload.md",
        "option.md",
    ]


def follow_outside(page: str, folder: Path) -> str:
    return follow(halves(page)[0], folder)


def follow_within(page: str, folder: Path) -> str:
    for name in ("danaz", "launcher", "tests", "configs", "docs"):
        copytree(ROOT / name, folder / name, ignore=ignore_patterns("__pycache__", "images", "results"))
    (folder / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    return follow(halves(page)[1], folder)


@pytest.fixture(scope="module")
def printed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Printed]:
    """Follow all pages of the tests that are to run, two at a time: each is a process that imports torch."""
    with ThreadPoolExecutor(2) as threads:
        yield {
            (how, page): threads.submit(how, page, tmp_path_factory.mktemp("page"))
            for item in request.session.items
            if isinstance(item, pytest.Function) and "printed" in item.fixturenames
            for how, page in [(item.callspec.params["how"], item.callspec.params["page"])]
        }


@pytest.mark.parametrize(
    ("how", "page"),
    [
        *(pytest.param(follow_outside, page, id=f"from outside, {page}") for page in with_page(own=True)),
        *(pytest.param(follow_within, page, id=f"within danaz, {page}") for page in with_page(own=False)),
    ],
)
def test_a_page_followed_to_the_letter(how: Callable[[str, Path], str], page: str, printed: Printed) -> None:
    see(halves(page)[how is follow_within], printed[how, page].result())


class TestTheseTests:
    """The tests above can fail."""

    def test_a_change_needs_its_place(self) -> None:
        assert changed("a\nb\n", " a\n+c\n") == "a\nc\nb\n"
        assert changed("a\nb\n", "-a\n+c\n@@\n b\n+d\n") == "c\nb\nd\n"
        with pytest.raises(AssertionError, match="not there"):
            changed("a\n", " b\n+c\n")

    def test_a_promise_is_missed(self) -> None:
        see([Block(None, "text", "updates 4 … good\n")], "updates   4\nall is\ngood\n")
        with pytest.raises(AssertionError, match="is not in"):
            see([Block(None, "text", "updates 4\n")], "updates 5\n")

    def test_a_command_fails(self, tmp_path: Path) -> None:
        with pytest.raises(AssertionError, match="No such command 'train'"):
            follow([Block(None, "sh", "danaz train\n")], tmp_path)
