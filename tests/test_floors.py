"""A lower floor never imports a higher one, and what has no clock, socket or thread has none. Read from the imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from danaz.rules import ALGORITHMS

ROOT = Path(__file__).parents[1]

# The longest name that fits decides. What is not named here (commands, reports) stands on the top floor.
FLOORS = {
    "danaz.rules": 0,
    "danaz.flat": 0,
    "danaz.codecs": 0,
    "danaz.schedule": 0,
    "danaz.schedulers": 0,
    "danaz.untrained": 0,
    "danaz.config": 0,
    "danaz.plain_yaml": 0,
    "danaz.reading": 0,
    "danaz.keys": 2,
    "danaz.server.messages": 1,
    "danaz.server.settings": 1,
    "danaz.server.leases": 1,
    "danaz.server.members": 1,
    "danaz.server.figures": 1,
    "danaz.server.gap": 1,
    "danaz.server.master": 1,
    "danaz.server.admission": 1,
    "danaz.server.health": 1,
    "danaz.server.recovery": 1,
    "danaz.server.state": 1,
    "danaz.server.refusing": 1,
    "danaz.server.updating": 1,
    "danaz.server.whole": 1,
    "danaz.server.answers": 1,
    "danaz.server.concluded": 1,
    "danaz.server.offering": 1,
    "danaz.server.core": 1,
    "danaz.server.wire": 1,
    "danaz.worker.core": 1,
    "danaz.worker.staging": 1,
    "danaz.server": 2,
    "danaz.worker": 2,
    "danaz.simulate": 2,
    "danaz.simulate.batches": 3,
    "danaz.simulate.step": 3,
    "danaz.simulate.simulator": 3,
    "danaz.simulate.cli": 4,
    "danaz.data": 2,
    "danaz.loop": 2,
    "danaz.models": 2,
    "danaz.pace": 2,
    "danaz.settings": 2,
    "danaz.signals": 2,
    "danaz.units": 0,
    "danaz.milestones": 0,
    "danaz.run_folder": 2,
    "danaz.run_lock": 2,
    "danaz.optimizer": 3,
    "danaz.workloads": 3,
    "danaz.ending": 3,
    "danaz.session": 3,
    "danaz.torch": 3,
    "danaz.training": 3,
    "danaz.keeper": 3,
    "danaz.serve": 3,
}
TOP = 4

WORLDLY = {
    "asyncio",
    "concurrent",
    "multiprocessing",
    "selectors",
    "signal",
    "socket",
    "subprocess",
    "threading",
    "time",
}
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


@dataclass(frozen=True)
class Module:
    name: str
    path: Path

    @property
    def floor(self) -> int:
        if self.path.name == "__init__.py" and len(self.tree().body) == 1:
            return 0  # a docstring
        fitting = [name for name in FLOORS if f"{self.name}.".startswith(f"{name}.")]
        return FLOORS[max(fitting, key=len)] if fitting else TOP

    def tree(self) -> ast.Module:
        return _parsed(self.path)

    def imports(self) -> Iterator[tuple[str, int]]:
        """(module, line) of every import, those inside of functions too; `from a import b` may mean a.b."""
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


def test_the_floors_name_modules_that_exist():
    assert set(FLOORS) <= DANAZ.keys()


def test_every_folder_of_modules_is_a_package():
    """Else setuptools leaves it out of a wheel."""
    folders = {module.path.parent for module in EVERYTHING}
    none_of(
        [
            f"{folder.relative_to(ROOT)} has no __init__.py"
            for folder in folders
            if not (folder / "__init__.py").exists()
        ]
    )


def test_nobody_imports_a_higher_floor():
    none_of(
        [
            f"{at(module, line)}: {module.name} (floor {module.floor}) imports {name} (floor {DANAZ[name].floor})"
            for module in DANAZ.values()
            for name, line in module.imports()
            if name in DANAZ and DANAZ[name].floor > module.floor
        ]
    )


@pytest.mark.parametrize("package", ["danaz.rules", "danaz.flat", "danaz.codecs"])
def test_the_ground_floor_knows_nothing_but_itself(package):
    """torch and arithmetic; rules do not even know the flat vector."""
    none_of(
        [
            f"{at(module, line)}: {module.name} imports {name}"
            for module in DANAZ.values()
            if f"{module.name}.".startswith(f"{package}.")
            for name, line in module.imports()
            if name.startswith(("danaz.", "launcher")) and not name.startswith(package)
        ]
    )


def test_the_lower_floors_have_no_clock_socket_or_thread():
    """Cores are fed messages and the time, so that every fault can be rehearsed."""
    lower = [module for module in DANAZ.values() if module.floor <= 1]
    assert {"danaz.server.core", "danaz.server.master", "danaz.worker.core"} <= {module.name for module in lower}
    none_of(
        [
            f"{at(module, line)}: {module.name} imports {name}"
            for module in lower
            for name, line in module.imports()
            if name.split(".")[0] in WORLDLY | {"zmq"}
        ]
    )


def test_the_clock_and_the_socket_of_the_server_are_read_in_one_place():
    none_of(
        [
            f"{at(module, line)}: {module.name} imports {name}; on the server, only the router may"
            for module in DANAZ.values()
            if module.name.startswith("danaz.server.")
            and module.name not in ("danaz.server.router", "danaz.server.socket", "danaz.server.doorkeeper")
            for name, line in module.imports()
            if name.split(".")[0] in {"time", "zmq", "socket", "threading"}
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


def test_nothing_unpickles():
    """torch.load and numpy.load would, too."""
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
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"torch.load", "np.load", "numpy.load"}
    ]
    none_of(imports + calls)


def strings_compared(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Texts that something is compared with, by ==, in, or match."""
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


class TestTheseTests:
    """They can fail."""

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

    def test_the_longest_name_decides(self):
        assert DANAZ["danaz.server.core"].floor == 1
        assert DANAZ["danaz.server.router"].floor == 2
        assert Module("danaz.flatter", Path()).floor == TOP
