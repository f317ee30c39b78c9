"""What the documentation shows works as shown, and what it names is there."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import typer
from packages import ORDER

import danaz.torch as danaz
from danaz.cli.main import app
from danaz.rules import ALGORITHMS
from danaz.worker.link import GIVE_UP_S, RETRY_FIRST_S, RETRY_LONGEST_S, Backoff
from danaz.worker.sharded import ASK_LONGEST_S

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")),
]
LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")
NAMED = re.compile(r"\[`([\w.]+)`\]\(\.\./([\w/.]+\.py)\)")  # [`Name.of_something`](../the/file.py)
SOURCE = re.compile(r"`((?:danaz|launcher|tests|benchmarks|scripts|examples|configs)/[\w./-]+)`")
TEST = re.compile(r"`(?:(?:tests/\w+/)?(test_\w+\.py)::)?((?:Test\w+|test_\w+)(?:::test_\w+)?)`")
NEW = "danaz/rules/my_dana.py danaz/workloads/line.py configs/line.yaml danaz/protocol/framing.py danaz/worker/tcp.py"
FENCES = re.DOTALL | re.MULTILINE
WRITTEN = {*NEW.split(), "danaz/serving/tcp.py", "tests/serving/test_tcp.py"}  # by readers who follow a page
ADDED = {"--note"}  # by who follows docs/adding-an-option.md
OTHERS = {"--ntasks-per-node", "--nodes", "--my"}  # options of other programs


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def code_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text_of(page), FENCES)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    broken = []
    for link in LINK.findall(text_of(page)):
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent.joinpath(file) if file else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES)
def test_files_and_tests_that_are_named_are_there(page: str) -> None:
    text = text_of(page)
    gone = [path for path in SOURCE.findall(text) if path not in WRITTEN and not any(ROOT.glob(path.split("::")[0]))]
    gone += [
        f"{file}::{name}" for file, name in TEST.findall(text) if not is_a_test(file, name) and name not in WRITTEN
    ]
    assert not gone


@cache
def sources_of_tests() -> dict[str, str]:
    return {path.name: path.read_text() for path in ROOT.glob("tests/*/test_*.py")}


def is_a_test(file: str, name: str) -> bool:
    """Return whether any test, or one of ``file``, has this name."""
    texts = [text for other, text in sources_of_tests().items() if file in ("", other)]
    return any(all(re.search(rf"(class|def) {part}\b", text) for part in name.split("::")) for text in texts)


def defined(tree: ast.Module) -> set[str]:
    """Return what a module defines: f, C, C.method, NAME."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("page", PAGES)
def test_a_name_that_links_to_a_file_is_defined_there(page: str) -> None:
    named = [(name, file) for name, file in NAMED.findall(text_of(page)) if not name.endswith(".py")]
    assert page != "docs/code-tour.md" or len(named) > 20
    assert not [f"{name} is not in {file}" for name, file in named if name not in defined(ast.parse(text_of(file)))]


@pytest.mark.parametrize("package", ORDER)
def test_the_architecture_page_has_a_sentence_for_each_package(package: str) -> None:
    assert re.search(rf"^- \*\*`{package}/`\*\* \w.*\.$", text_of("docs/architecture.md"), re.MULTILINE)


def test_the_architecture_page_has_the_packages_in_their_order() -> None:
    assert tuple(re.findall(r"^- \*\*`(\w+)/`\*\*", text_of("docs/architecture.md"), re.MULTILINE)) == ORDER


# ---- commands --------------------------------------------------------------------------------------------------------


def shown_in(page: str) -> str:
    """Return all lines of commands and of inline code. A command that goes on in the next line is one line."""
    text = text_of(page)
    fenced = [code for kind, code in re.findall(r"^```(\w*)\n(.*?)^```", text, FENCES) if kind in ("", "sh")]
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=FENCES))
    return "\n".join([*fenced, *(" ".join(code.split()) for code in inline)]).replace("\\\n", " ")


def commands_of(page: str) -> list[list[str]]:
    """Return the words of each `danaz …` that a page shows, up to the user's own command or a comment."""
    lines = re.findall(r"^(?:\S+\$ )?(?:salloc .* )?danaz ([a-z][^\n#|]*)", shown_in(page), re.MULTILINE)
    return [
        line.split(" -- ")[0].split() for line in lines if ":" not in line.split()[0]
    ]  # output such as `danaz server: …`


@cache
def options() -> dict[str, set[str]]:
    """Return the options of each command of `danaz`."""
    group = typer.main.get_command(app)
    commands = dict(getattr(group, "commands", {}))
    commands |= {f"horovod {name}": each for name, each in getattr(commands.pop("horovod"), "commands", {}).items()}
    return {
        name: {"--help", *(word for param in command.params for word in (*param.opts, *param.secondary_opts))}
        for name, command in commands.items()
    }


def wrong_with(words: list[str]) -> str:
    """Return what is wrong with `danaz WORDS`, or an empty text."""
    known = options()
    name = " ".join(words[:2]) if words[0] == "horovod" else words[0]
    if name not in known:
        return f"there is no command danaz {name}"
    given = {word.partition("=")[0].strip("'\"`,.;:)") for word in words if re.match(r"--?[a-zA-Z]", word)}
    unknown = given - known[name] - ADDED
    return f"danaz {name} has no option {', '.join(sorted(unknown))}" if unknown else ""


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_their_options_are_there(page: str) -> None:
    assert not [wrong for wrong in map(wrong_with, commands_of(page)) if wrong]


@pytest.mark.parametrize("page", PAGES)
def test_options_that_are_named_are_there(page: str) -> None:
    known = set().union(*options().values()) | OTHERS | ADDED
    benchmarks = "".join(path.read_text() for path in ROOT.glob("benchmarks/*.py"))
    named = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", shown_in(page)))
    assert not [option for option in named if option not in known and f'"{option}"' not in benchmarks]


@pytest.mark.parametrize("page", PAGES)
def test_targets_of_make_are_there(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z-]+)", shown_in(page), re.MULTILINE))
    assert not named - targets


def test_a_wrong_command_is_seen() -> None:
    assert wrong_with(["lunch", "--hosts", "a"]) == "there is no command danaz lunch"
    assert wrong_with(["launch", "--hots=a"]) == "danaz launch has no option --hots"
    assert not wrong_with(["launch", "x.yaml", "--hosts", "a:4,b:4", "-a", "ssgd"])


# ---- what pages tell of ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_algorithms_page_tells_of_every_algorithm(name: str) -> None:
    assert f"`{name}`" in text_of("docs/algorithms.md")


def test_the_page_on_scripts_tells_of_every_function() -> None:
    page = text_of("docs/your-script.md")
    for name in set(danaz.__all__) - {"metrics", "progress", "NotInitializedError"}:
        assert re.search(rf"\b{name}\b", page), name


def test_the_script_on_that_page_trains(tmp_path: Path) -> None:
    script = code_blocks("docs/your-script.md")[0]
    made = """
def make_model():
    return nn.Linear(3, 1)


train_set = torch.utils.data.TensorDataset(torch.randn(300, 3), torch.zeros(300, 1))
"""
    imports, rest = script.split("danaz.init()")
    (tmp_path / "train.py").write_text(f"{imports}{made}danaz.init(){rest}")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "train.py"], cwd=tmp_path, env=env, check=True, timeout=100)
    weight = torch.load(tmp_path / "model.pt")["weight"]
    assert weight.abs().max() < 0.5


def test_how_often_a_worker_asks_again_is_what_pages_say() -> None:
    """Backoff adds a random part, up to half of each wait."""

    def waits(seconds: float) -> str:
        return f"{seconds:g} to {1.5 * seconds:g} s"

    performance, failures = (
        " ".join(text_of(f"docs/{page}.md").split()) for page in ("performance", "when-things-fail")
    )
    first, longest = Backoff(1.0, 1.0, 0), [Backoff(1.0, 1.0, seed).wait_s() for seed in range(1000)]
    assert 1.0 <= first.wait_s() <= 1.5
    assert min(longest) < 1.01
    assert max(longest) > 1.49
    assert f"within {waits(RETRY_FIRST_S)} after" in performance
    assert f"doubles with each repetition, up to {waits(RETRY_LONGEST_S)}" in performance
    assert f"at last every {waits(ASK_LONGEST_S)}, and give up after {GIVE_UP_S:g} s" in failures
