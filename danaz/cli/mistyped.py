"""Advice for two known mistakes on a command line: a script without ``--`` before it, and a config key as an option.

For the first, the option parser would say that there is no such option, which misleads the reader.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from shlex import join

CONFIGS = (".yaml", ".yml")
SCRIPTS = (".py", ".sh")

Options = Mapping[str, bool]  # every option of a command, as it is typed, and whether a value follows it


def advice(command: str, words: Sequence[str], script_words: Sequence[str], options: Options) -> str | None:
    """Return what to type instead of ``danaz COMMAND WORDS -- SCRIPT_WORDS``; None if that has no known mistake."""
    at = _first_argument(words, options)
    if command == "launch" and at is not None and _is_command(words[at]):
        typed = ["danaz", "launch", *_as_meant(words[:at], words[at:], script_words, options)]
        return (
            f"`danaz launch` takes the YAML of an experiment, or a command of your own after `--`; {words[at]} is no "
            f"YAML. Type: {join(typed)}"
        )
    if "--set" in options:
        return _key_of_the_config(words, options)
    return None


def _first_argument(words: Sequence[str], options: Options) -> int | None:
    """Return the index of the first word that is neither an option nor the value of one."""
    at = 0
    while at < len(words):
        if not _is_option(words[at]):
            return at
        at += 2 if options.get(words[at], False) else 1
    return None


def _is_option(word: str) -> bool:
    return word.startswith("-") and word != "-"


def _is_command(word: str) -> bool:
    suffix = Path(word).suffix
    return suffix in SCRIPTS or (suffix not in CONFIGS and shutil.which(word) is not None)


def _as_meant(
    before: Sequence[str], command: Sequence[str], script_words: Sequence[str], options: Options
) -> Iterable[str]:
    """Return the options of `danaz launch`, ``--``, and the command.

    Options after the script are the script's own, unless danaz knows all of them.
    """
    rest = command[1:]
    danaz_alone = _first_argument(rest, options) is None and all(
        word.partition("=")[0] in options for word in rest if _is_option(word)
    )
    if danaz_alone:
        before, command = [*before, *rest], command[:1]
    python = ["python"] if command[0].endswith(".py") else []
    return [*before, "--", *python, *command, *script_words]


def _key_of_the_config(words: Sequence[str], options: Options) -> str | None:
    unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in options]
    if not unknown:
        return None
    from danaz.run.config import Config

    for word in unknown:
        name, equals, value = word.removeprefix("--").partition("=")
        key = name.replace("-", "_")
        if key in Config.model_fields:
            following = words[words.index(word) + 1 :]
            value = value if equals or not following or _is_option(following[0]) else following[0]
            return f"there is no option --{name}, but a key {key} of the config; type: --set {key}={value or '…'}"
    return None
