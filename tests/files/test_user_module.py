"""A user's ``module:name`` is found in the current folder, and its errors are shown as the user's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from danaz.files.user_module import UserModuleError, import_user_name
from danaz.rules import find_algorithm
from danaz.run.config import ConfigError, load_config
from danaz.workloads import build

ROOT = Path(__file__).parents[2]
MODULE = "users_own"  # no other module has this name


@pytest.fixture(autouse=True)
def current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Enter an empty folder. What a test imports from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith(MODULE)]:
        del sys.modules[name]


def refused(spec: str) -> str:
    with pytest.raises(UserModuleError) as caught:
        import_user_name(spec, f"model = {spec!r}")
    return str(caught.value)


class TestFound:
    def test_in_the_current_folder(self, current_folder: Path) -> None:
        (current_folder / f"{MODULE}.py").write_text("def rule(): return 3\n")
        assert import_user_name(f"{MODULE}:rule", "algorithm")() == 3

    def test_in_a_package_there(self, current_folder: Path) -> None:
        (current_folder / MODULE).mkdir()
        (current_folder / MODULE / "nets.py").write_text("class Net: pass\n")
        assert import_user_name(f"{MODULE}.nets:Net", "model").__name__ == "Net"

    def test_before_a_module_of_that_name_elsewhere(self, current_folder: Path, monkeypatch) -> None:
        elsewhere = current_folder / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / f"{MODULE}.py").write_text("def where(): return 'elsewhere'\n")
        (current_folder / f"{MODULE}.py").write_text("def where(): return 'here'\n")
        monkeypatch.syspath_prepend(elsewhere)
        sys.path.append(str(current_folder))
        assert import_user_name(f"{MODULE}:where", "model")() == "here"

    def test_what_is_imported_later_is_no_file_there(self, current_folder: Path) -> None:
        (current_folder / f"{MODULE}.py").write_text("def rule(): return 3\n")
        (current_folder / "imaplib.py").write_text("raise RuntimeError('the wrong one')\n")
        import_user_name(f"{MODULE}:rule", "algorithm")
        import imaplib

        assert imaplib.__file__ != str(current_folder / "imaplib.py")


class TestNotThere:
    @pytest.mark.parametrize("spec", ["rule", f"{MODULE}:", ":rule", f"{MODULE}:a:b", "..:rule", "my-rules:rule"])
    def test_what_is_no_module_and_name(self, spec: str) -> None:
        assert refused(spec) == f"model = {spec!r}: expected package.module:name"

    def test_a_file_name_in_the_place_of_a_module(self) -> None:
        assert f"without .py: {MODULE}:rule" in refused(f"{MODULE}.py:rule")

    def test_no_such_module(self, current_folder: Path) -> None:
        (current_folder / MODULE).mkdir()
        (current_folder / MODULE / "__init__.py").touch()
        sentence = refused(f"{MODULE}.net:Net")
        assert sentence == f"model = '{MODULE}.net:Net': no module '{MODULE}.net' here or on PYTHONPATH"

    def test_no_such_name(self, current_folder: Path) -> None:
        (current_folder / f"{MODULE}.py").write_text("constant = 3\ndef build(): pass\n")
        assert refused(f"{MODULE}:biuld").endswith(f"{MODULE} has no callable 'biuld'; did you mean 'build'?")
        assert f"{MODULE} has no callable 'constant'" in refused(f"{MODULE}:constant")


FAILURES = {
    "an attribute error": ("import os\n\nos.no_such_function()\n", 3, "AttributeError: "),
    "a name error": ("\nno_such_name\n", 2, "NameError: "),
    "a syntax error": ("x = 1\ndef rule(:\n    pass\n", 2, "SyntaxError: "),
    "a module that is not there": ("import no_such_library\n", 1, "ModuleNotFoundError: No module named"),
    "a name that its library lacks": ("from os import no_such_name\n", 1, "ImportError: cannot import name"),
    "an end": ("import sys\nsys.exit('not today')\n", 2, "SystemExit: not today"),
    "an error in danaz": ("from danaz.rules import chain\nx = chain()\n", 2, "Error: "),
    "an error of danaz's import": ("from danaz.rules import no_such_rule\n", 1, "ImportError: "),
    "an error in the standard library": ("import json\njson.loads('{')\n", 2, "JSONDecodeError: "),
}


class TestFailsAtImport:
    @pytest.mark.parametrize("what", FAILURES)
    def test_file_line_error_and_the_users_own_frames_are_shown(self, what: str, current_folder: Path) -> None:
        code, line, error = FAILURES[what]
        file = current_folder / f"{MODULE}.py"
        file.write_text(code)
        sentence, _, traceback = refused(f"{MODULE}:rule").partition("\n")
        assert sentence.startswith(f"model = '{MODULE}:rule': {file}, line {line}, fails when it is imported: ")
        assert error in sentence
        assert traceback.startswith(("Traceback (most recent call last):\n", "  File "))
        assert f'File "{file}", line {line}' in traceback
        assert code.splitlines()[line - 1] in traceback
        for other in (ROOT / "danaz", "<frozen importlib"):
            assert f'File "{other}' not in traceback

    def test_the_cure_is_named(self, current_folder: Path) -> None:
        file = current_folder / f"{MODULE}.py"
        file.write_text("import no_such_library\n")
        assert "install no_such_library on every machine" in refused(f"{MODULE}:rule")
        file.write_text("no_such_name\n")
        assert f'mend it; `python -c "import {MODULE}"` tries it alone' in refused(f"{MODULE}:rule")

    def test_the_line_is_that_of_the_users_file_that_fails(self, current_folder: Path) -> None:
        """One module of the user imports another, which fails."""
        (current_folder / f"{MODULE}.py").write_text(f"import {MODULE}_helper\n")
        helper = current_folder / f"{MODULE}_helper.py"
        helper.write_text("\n\nhelp_me\n")
        said = refused(f"{MODULE}:rule")
        assert f"{helper}, line 3, fails" in said
        assert f'File "{current_folder / MODULE}.py", line 1' in said

    def test_a_chain_of_errors_is_shown_whole(self, current_folder: Path) -> None:
        file = current_folder / f"{MODULE}.py"
        file.write_text("try:\n    {}['key']\nexcept KeyError as error:\n    raise ValueError('no key') from error\n")
        said = refused(f"{MODULE}:rule")
        assert "KeyError: 'key'" in said
        assert "direct cause" in said
        assert f"{file}, line 4, fails when it is imported: ValueError: no key" in said

    def test_ctrl_c_goes_through(self, current_folder: Path) -> None:
        (current_folder / f"{MODULE}.py").write_text("raise KeyboardInterrupt\n")
        with pytest.raises(KeyboardInterrupt):
            import_user_name(f"{MODULE}:rule", "algorithm")


RULE = "from danaz.rules import dana_zero\n\ndef my_dana(momentum=0.9):\n    return dana_zero(momentum)\n"
BROKEN = "import os\n\ndef my_dana():\n    pass\n\nos.no_such_function()\n"


class TestEveryPlace:
    """Algorithm, model and data are imported alike."""

    def test_an_algorithm(self, current_folder: Path) -> None:
        (current_folder / f"{MODULE}.py").write_text(RULE)
        assert find_algorithm(f"{MODULE}:my_dana").rule(momentum=0.5).optimizers.of(0).momentum == 0.5

    def test_an_algorithm_that_makes_no_rule(self, current_folder: Path) -> None:
        (current_folder / f"{MODULE}.py").write_text("def my_dana():\n    pass\n")
        with pytest.raises(
            UserModuleError, match=r"'users_own:my_dana' returned NoneType, expected a danaz\.rules\.Rule"
        ):
            find_algorithm(f"{MODULE}:my_dana").rule()

    @pytest.mark.parametrize("key", ["data", "model"])
    def test_data_and_model(self, key: str, current_folder: Path) -> None:
        (current_folder / f"{MODULE}.py").write_text(BROKEN)
        names = {"data": "torchvision.FakeData", "model": "torchvision.alexnet", key: f"{MODULE}:my_dana"}
        config = load_config(ROOT / "configs" / "fashion-mnist-mobilenet.yaml", [f"{k}={v}" for k, v in names.items()])
        with pytest.raises(ConfigError) as caught:
            build(config)
        assert f"{MODULE}.py, line 6, fails when it is imported: AttributeError" in str(caught.value)
        assert "os.no_such_function()" in str(caught.value)


def danaz(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the command in the current folder, which is not on Python's path, as for an installed command."""
    return subprocess.run(
        [sys.executable, "-m", "danaz", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


class TestCommand:
    def test_an_algorithm_in_the_current_folder_trains(self, current_folder: Path) -> None:
        (current_folder / f"{MODULE}.py").write_text(RULE)
        done = danaz(
            *("simulate", str(ROOT / "configs" / "quadratic.yaml"), "--algorithm", f"{MODULE}:my_dana"),
            *("--set", "epochs=1", "--out", "run"),
        )
        assert done.returncode == 0, done.stderr

    @pytest.mark.timeout(300)  # on a busy machine, torch takes long to import
    def test_one_that_fails_ends_the_command_with_the_users_traceback(self, current_folder: Path) -> None:
        """An algorithm and a model; the commands run at once, because each imports torch."""
        (current_folder / f"{MODULE}.py").write_text(BROKEN)
        quadratic, mobilenet = (
            str(ROOT / "configs" / f"{name}.yaml") for name in ("quadratic", "fashion-mnist-mobilenet")
        )
        model = ("--set", "data=torchvision.FakeData", "--set", f"model={MODULE}:my_dana", "--out", "run")
        commands = [
            ("simulate", quadratic, "--algorithm", f"{MODULE}:my_dana"),
            ("launch", quadratic, "--algorithm", f"{MODULE}:my_dana"),
            ("simulate", mobilenet, *model),
        ]
        with ThreadPoolExecutor() as threads:
            for done in threads.map(lambda command: danaz(*command), commands):
                assert done.returncode == 2
                assert f"{MODULE}.py, line 6, fails when it is imported: AttributeError" in done.stderr
                assert "os.no_such_function()" in done.stderr
                assert str(ROOT / "danaz") not in done.stderr
