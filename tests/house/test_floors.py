"""The imports show that a package uses only those before it, and that pure ones have no clock, socket or file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from packages import ORDER

from danaz.rules import ALGORITHMS

ROOT = Path(__file__).parents[2]

# Neither package of a pair imports the other: they meet in protocol/.
STRANGERS = (("worker", "server"), ("worker", "serving"))

# Packages and modules without clock, socket, thread, process or file.
PURE = ("danaz.rules", "danaz.vectors", "danaz.server", "danaz.worker.core", "danaz.worker.staging")
PURE = (*PURE, "danaz.protocol.messages", "danaz.protocol.wire", "danaz.protocol.inbox")

WORLDLY = {
    "asyncio",
    "concurrent",
    "io",
    "multiprocessing",
    "os",
    "pathlib",
    "selectors",
    "signal",
    "socket",
    "subprocess",
    "tempfile",
    "threading",
    "time",
}
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


@dataclass(frozen=True)
class Module:
    name: str
    path: Path

    @property
    def package(self) -> str:
        """The danaz package that the module belongs to; empty for `danaz` itself and `danaz.__main__`."""
        parts = self.name.split(".")
        return "" if self.name == "danaz.__main__" or len(parts) == 1 else parts[1]

    @property
    def is_pure(self) -> bool:
        return any(f"{self.name}.".startswith(f"{name}.") for name in PURE)

    def tree(self) -> ast.Module:
        return _parsed(self.path)

    def imports(self) -> Iterator[tuple[str, int]]:
        """Yield (module, line) of every import, also inside functions. `from a import b` may mean a.b."""
        for node in ast.walk(self.tree()):
            if isinstance(node, ast.Import):
                yield from ((alias.name, node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.path}:{node.lineno}: imports here are absolute"
                yield node.module or "", node.lineno
                yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def modules(package: str) -> dict[str, Module]:
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = Module(name, path)
    return found


DANAZ, LAUNCHER = modules("danaz"), modules("launcher")
EVERYTHING = [*DANAZ.values(), *LAUNCHER.values()]


def at(module: Module, line: int) -> str:
    return f"{module.path.relative_to(ROOT)}:{line}"


def none_of(broken: list[str]) -> None:
    assert not broken, "\n".join(["", *broken])


def breaches(module: Module) -> Iterator[str]:
    """Yield what a module imports although its package may not."""
    for name, line in module.imports():
        if name not in DANAZ or not DANAZ[name].package or not module.package:
            continue
        own, other = module.package, DANAZ[name].package
        if ORDER.index(other) > ORDER.index(own):
            yield f"{at(module, line)}: {own}/ imports {name}, and {other}/ comes after {own}/ in the order of packages"
        elif (own, other) in STRANGERS or (other, own) in STRANGERS:
            yield f"{at(module, line)}: {own}/ imports {name}, and {own}/ and {other}/ meet only in protocol/"


def test_every_package_has_its_place_in_the_order():
    assert {module.package for module in DANAZ.values()} - {""} == set(ORDER)


def test_every_folder_of_modules_is_a_package():
    """Setuptools leaves any other folder out of a wheel."""
    folders = {module.path.parent for module in EVERYTHING}
    none_of(
        [
            f"{folder.relative_to(ROOT)} has no __init__.py"
            for folder in folders
            if not (folder / "__init__.py").exists()
        ]
    )


def test_nobody_imports_a_package_that_comes_later():
    none_of([breach for module in DANAZ.values() for breach in breaches(module)])


def arrows_of_files(modules: dict[str, Module]) -> dict[str, set[str]]:
    """Return each file with the files that it imports, wherever the imports stand."""
    return {
        name: {other for other, _ in module.imports() if other in modules and other != name}
        for name, module in modules.items()
    }


def arrows_of_packages(modules: dict[str, Module]) -> dict[str, set[str]]:
    """Return each package, such as `danaz.server`, with the packages whose files its files import."""
    home = {name: ".".join(name.split(".")[:2]) for name in modules}
    arrows: dict[str, set[str]] = {package: set() for package in home.values()}
    for name, others in arrows_of_files(modules).items():
        arrows[home[name]] |= {home[other] for other in others} - {home[name]}
    return arrows


def circles(arrows: dict[str, set[str]]) -> list[str]:
    """Return every group of files or packages that import each other in a circle."""
    reachable = {name: reach(name, arrows) for name in arrows}
    found = {frozenset(b for b in reachable[a] if a in reachable[b]) for a in arrows if a in reachable[a]}
    return sorted(f"a circle of imports: {', '.join(sorted(group))}" for group in found)


def reach(start: str, arrows: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = set(arrows[start])
    while waiting:
        name = waiting.pop()
        seen.add(name)
        waiting |= arrows[name] - seen
    return seen


def test_no_files_of_danaz_import_each_other_in_a_circle():
    none_of(circles(arrows_of_files(DANAZ)))


def test_no_files_of_the_launcher_import_each_other_in_a_circle():
    none_of(circles(arrows_of_files(LAUNCHER)))


def test_no_packages_import_each_other_in_a_circle():
    none_of(circles(arrows_of_packages(DANAZ | LAUNCHER)))


def test_what_is_pure_has_no_clock_socket_thread_or_file():
    """Cores are handed messages and the time, so that every fault can be tried in a test."""
    pure = [module for module in DANAZ.values() if module.is_pure]
    assert {"danaz.server.core", "danaz.server.master", "danaz.worker.core"} <= {module.name for module in pure}
    none_of(
        [
            f"{at(module, line)}: {module.name} imports {name}"
            for module in pure
            for name, line in module.imports()
            if name.split(".")[0] in WORLDLY | {"zmq"}
        ]
    )


def test_the_launcher_imports_nothing_of_danaz():
    none_of(
        [
            f"{at(module, line)}: imports {name}"
            for module in LAUNCHER.values()
            for name, line in module.imports()
            if name.split(".")[0] == "danaz"
        ]
    )


def test_the_launcher_names_nothing_of_danaz():
    """What concerns danaz is handed in: commands, names of variables, names of folders, and the words for the user."""
    none_of(
        [
            f"{at(module, number)}: {line.strip()}"
            for module in LAUNCHER.values()
            for number, line in enumerate(module.path.read_text().splitlines(), start=1)
            if "danaz" in line.lower()
        ]
    )


def test_nothing_unpickles():
    """torch.load and numpy.load unpickle, too, but not torch.load with weights_only=True."""
    imports = [
        f"{at(module, line)}: imports {name}"
        for module in EVERYTHING
        for name, line in module.imports()
        if name.split(".")[0] in UNPICKLERS
    ]
    calls = [
        f"{at(module, node.lineno)}: calls {ast.unparse(node.func)}"
        for module in EVERYTHING
        for node in ast.walk(module.tree())
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in {"torch.load", "np.load", "numpy.load"}
        and "weights_only=True" not in map(ast.unparse, node.keywords)
    ]
    none_of(imports + calls)


def strings_compared(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield the texts with which something is compared by ==, in or match."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides: list[ast.AST] = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            sides = [node.value]
        else:
            continue
        for side in sides:
            for part in ast.walk(side) if isinstance(side, (ast.Tuple, ast.List, ast.Set)) else [side]:
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.value, node.lineno


def test_nobody_asks_which_algorithm_it_is():
    """A rule declares what it needs; the rest of the program asks for that."""
    none_of(
        [
            f"{at(module, line)}: compares with the name of an algorithm, {text!r}"
            for module in EVERYTHING
            for text, line in strings_compared(module.tree())
            if text in ALGORITHMS
        ]
    )


@dataclass(frozen=True)
class Made(Module):
    """A module whose source is a text and not a file."""

    source: str = ""

    def tree(self) -> ast.Module:
        return ast.parse(self.source)


class TestTheseTests:
    """The tests above can fail."""

    @pytest.mark.parametrize(
        "source",
        [
            "x == 'dana'",
            "'ssgd' != x",
            "x in ('a', 'dana')",
            "x not in {'easgd'}",
            "match x:\n  case 'dana' | 'b': pass",
        ],
    )
    def test_a_comparison_is_seen(self, source):
        assert any(text in ALGORITHMS for text, _ in strings_compared(ast.parse(source)))

    def test_an_import_within_a_function_is_seen(self, tmp_path):
        path = tmp_path / "core.py"
        path.write_text("def f():\n    from danaz.server import router\n    import time as t\n")
        names = {name for name, _ in Module("danaz.server.core", path).imports()}
        assert {"danaz.server.router", "time"} <= names

    @pytest.mark.parametrize(
        "source",
        [
            "from danaz.launch import reach",
            "if TYPE_CHECKING:\n    import danaz.cli.main",
            "def f():\n    from danaz.serving.router import Router",
        ],
    )
    def test_an_import_from_a_later_package_is_seen(self, source, tmp_path):
        path = ROOT / "danaz/server/made_up.py"
        assert list(breaches(Made("danaz.server.made_up", path, source)))

    @pytest.mark.parametrize(("own", "other"), [("server", "worker.core"), ("serving", "worker.link")])
    def test_an_import_between_strangers_is_seen(self, own, other):
        path = ROOT / f"danaz/{own}/made_up.py"
        assert list(breaches(Made(f"danaz.{own}.made_up", path, f"import danaz.{other}")))

    @pytest.mark.parametrize(
        "back",
        [
            "import danaz.server.a",
            "from danaz.server import a",
            "from danaz.server.a import A",
            "if TYPE_CHECKING:\n    from danaz.server.a import A",
            "def f():\n    import danaz.server.a",
        ],
    )
    def test_a_circle_of_files_is_seen(self, back):
        sources = {"a": "import danaz.server.b", "b": "import danaz.server.c", "c": back, "d": "import danaz.server.a"}
        made = self.made({f"danaz.server.{name}": source for name, source in sources.items()})
        assert circles(arrows_of_files(made)) == ["a circle of imports: danaz.server.a, danaz.server.b, danaz.server.c"]
        del made["danaz.server.c"]
        assert circles(arrows_of_files(made)) == []

    def test_a_circle_of_packages_is_seen_where_files_make_none(self):
        sources = {"run.a": "import danaz.server.a", "server.a": "", "server.b": "import danaz.run.b", "run.b": ""}
        made = self.made({f"danaz.{name}": source for name, source in sources.items()})
        assert circles(arrows_of_files(made)) == []
        assert circles(arrows_of_packages(made)) == ["a circle of imports: danaz.run, danaz.server"]

    @staticmethod
    def made(sources):
        return {name: Made(name, ROOT / name.replace(".", "/"), source) for name, source in sources.items()}
