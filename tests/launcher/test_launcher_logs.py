"""Output: byte for byte into files, line by line to the terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.channel import bytes_to_text, text_to_bytes
from launcher.hosts import Host
from launcher.logs import MAX_LINE_BYTES, LineSplitter, Logs, Terminal, printable, quiet
from launcher.plan import Process

RANK = Process("rank.3", Host("a"), ("train",), {}, rank=3, world=0)
OTHER = Process("rank.4", Host("b"), ("train",), {}, rank=4, world=0)
SERVER = Process("server", Host("a"), ("serve",), {})


@given(st.lists(st.binary(max_size=40)))
def test_any_bytes_survive_json_wherever_they_are_cut(pieces: list[bytes]) -> None:
    assert b"".join(text_to_bytes(bytes_to_text(piece)) for piece in pieces) == b"".join(pieces)


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n")), cut=st.integers(0, 50))
def test_lines_are_put_together(text: str, cut: int) -> None:
    data = f"{text}\n{text}\r\nrest".encode()
    splitter = LineSplitter()
    assert splitter.feed(data[:cut]) + splitter.feed(data[cut:]) + splitter.flush() == [
        printable(text),
        printable(text),
        "rest",
    ]
    assert splitter.flush() == []


def test_lines_as_a_terminal_would_show_them() -> None:
    assert LineSplitter().feed(b" 10%\r 50%\r100%\n") == ["100%"]
    assert LineSplitter().feed(b"caf\xe9\n") == ["caf\\xe9"]


def test_a_line_without_end_is_shown_in_pieces() -> None:
    splitter = LineSplitter()
    assert splitter.feed(b"x" * MAX_LINE_BYTES) == []
    assert splitter.feed(b"x") == ["x" * (MAX_LINE_BYTES + 1)]


def test_files_hold_what_was_written(tmp_path: Path) -> None:
    shown: list[tuple[str, str, str]] = []
    logs = Logs(tmp_path, lambda process, stream, line: shown.append((process.name, stream, line)))
    for process in (RANK, SERVER):
        logs.open(process)
    assert logs.write(RANK, "stdout", b"one\ntw") == ["one"]
    assert logs.write(RANK, "stdout", b"o\n\xff") == ["two"]
    logs.write(SERVER, "stderr", b"oops\n")
    logs.close(RANK)
    files = {str(file.relative_to(tmp_path)): file.read_bytes() for file in tmp_path.rglob("std*")}
    assert files == {
        "logs/a/rank.3/stdout": b"one\ntwo\n\xff",
        "logs/a/rank.3/stderr": b"",
        "logs/a/server/stdout": b"",
        "logs/a/server/stderr": b"oops\n",
    }
    assert shown == [
        ("rank.3", "stdout", "one"),
        ("rank.3", "stdout", "two"),
        ("server", "stderr", "oops"),
        ("rank.3", "stdout", "\\xff"),
    ]
    assert [line.text for line in logs.tail(RANK, "stdout")] == ["one", "two", "\\xff"]


def test_the_terminal_shows_who_speaks() -> None:
    out, err = io.StringIO(), io.StringIO()
    terminal = Terminal(out=out, err=err)
    terminal(RANK, "stdout", "hello")
    terminal(SERVER, "stdout", "up")
    terminal(RANK, "stderr", "oops")
    assert (out.getvalue(), err.getvalue()) == ("[a:3] hello\n[a:server] up\n", "[a:3] oops\n")


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for process in (RANK, OTHER, SERVER):
        quiet(process, "stdout", "hello")
    assert capsys.readouterr().out == ""


def shown_on_a_terminal(encoding: str) -> bytes:
    reader, writer = pty.openpty()
    with open(writer, "w", encoding=encoding) as file:
        terminal = Terminal(out=file)
        for process, line in ((RANK, "θ"), (OTHER, "y"), (RANK, "z")):
            terminal(process, "stdout", line)
        shown = b""
        while shown.count(b"\n") < 3:
            shown += os.read(reader, 4096)
    os.close(reader)
    return shown


def test_hosts_have_colours_on_a_real_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    first, second = b"\x1b[36m[a:3]\x1b[0m", b"\x1b[33m[b:4]\x1b[0m"
    lines = [first + " θ".encode(), second + b" y", first + b" z", b""]
    assert shown_on_a_terminal("utf-8").split(b"\r\n") == lines
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown_on_a_terminal("ascii") == b"[a:3] \\u03b8\r\n[b:4] y\r\n[a:3] z\r\n"


def test_a_reader_that_has_gone_stops_nothing() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    file = io.TextIOWrapper(io.FileIO(writer, "w"), write_through=True)
    err = io.StringIO()
    terminal = Terminal(out=file, err=err)
    terminal(RANK, "stdout", "into nothing")
    terminal(RANK, "stdout", "into nothing")
    terminal(RANK, "stderr", "heard")
    assert err.getvalue() == "[a:3] heard\n"
    file.close()


def test_a_returned_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    (tmp_path / ".x.part").write_bytes(b"left by a run that was killed")
    logs = Logs(tmp_path, quiet)
    for _ in range(2):
        logs.keep_file("x", b"one ", last=False)
        logs.keep_file("x", b"two", last=True)
        assert (tmp_path / "x").read_bytes() == b"one two"
    logs.keep_file("x", b"three", last=False)
    assert (tmp_path / "x").read_bytes() == b"one two"


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("\x1b[1;31mred\x1b[0m and plain", "\x1b[1;31mred\x1b[0m and plain"),
        ("\x1b[31mred to the end", "\x1b[31mred to the end\x1b[0m"),
        ("tabs\tstay, θ too", "tabs\tstay, θ too"),
        ("\x1b]0;a title\x07text", "text"),
        ("\x1b]52;c;Y2xpcGJvYXJk\x1b\\text", "text"),
        ("\x1b]8;;http://elsewhere\x1b\\a link\x1b]8;;\x1b\\", "a link"),
        ("\x1bPq#0\x1b\\text", "text"),
        ("\x1b[2J\x1b[1;1H\x1b[6n\x1b[?1049htext", "text"),
        ("\x1bc\x1b(0text", "text"),
        ("\x9b2J\x9d0;a title\x9ctext", "text"),
        ("\x08\x00\x07\x7ftext", "text"),
        ("cut off \x1b[3", "cut off "),
        ("\x1b\x1b[31m\x1b", "\x1b[31m\x1b[0m"),
    ],
)
def test_a_line_can_colour_the_terminal_and_nothing_else(tmp_path: Path, written: str, shown: str) -> None:
    assert printable(written) == shown
    out = io.StringIO()
    logs = Logs(tmp_path, Terminal(out=out))
    logs.open(RANK)
    logs.write(RANK, "stdout", written.encode() + b"\n")
    assert out.getvalue() == f"[a:3] {shown}\n"
    assert (tmp_path / "logs/a/rank.3/stdout").read_bytes() == written.encode() + b"\n", "the log is as it was written"


@given(text=st.text(st.sampled_from("\x1b\x9b\x9d\x9c\x07[]();?0123mHJ\\Pa\x00\x7f\t")))
def test_no_control_character_reaches_the_terminal(text: str) -> None:
    left = re.sub(r"\x1b\[[0-9;:]*m", "", printable(text))
    assert all(character.isprintable() or character == "\t" for character in left)
    assert printable(printable(text)) == printable(text)


def test_output_that_does_not_fit_is_shown_and_told_once(tmp_path: Path) -> None:
    shown: list[str] = []
    logs = Logs(tmp_path, lambda process, stream, line: shown.append(line))
    logs.open(RANK)
    (tmp_path / "logs/a/rank.3/stdout").unlink()
    (tmp_path / "logs/a/rank.3/stdout").symlink_to("/dev/full")
    for line in (b"one\n", b"two\n"):
        logs.write(RANK, "stdout", line)
    assert shown == ["one", "two"]
    missing = f"some of the output is missing in {tmp_path}/logs: No space left on device"
    assert logs.missing_output == missing
    assert logs.take_news() == [f"{missing}. The run goes on, and what fits again is kept"]
    logs.write(RANK, "stderr", b"three\n")
    assert (tmp_path / "logs/a/rank.3/stderr").read_bytes() == b"three\n"
    assert logs.take_news() == []


def test_the_folder_of_a_run_goes_away_while_it_runs(tmp_path: Path) -> None:
    logs = Logs(tmp_path / "run", quiet)
    logs.open(RANK)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").touch()
    logs.write(RANK, "stdout", b"one\n")
    logs.open(RANK)
    logs.keep_file("x", b"one", last=False)
    logs.keep_file("x", b"two", last=True)
    assert logs.lost_files == ["x"]
    assert [news.partition(": ")[0] for news in logs.take_news()] == [
        f"some of the output is missing in {tmp_path}/run/logs",
        f"the returned file x cannot be kept in {tmp_path}/run",
    ]
