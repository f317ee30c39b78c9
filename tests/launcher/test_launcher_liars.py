"""Agents that are broken or lie. They are real processes that speak the protocol and break its rules."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from launcher.channel import Channel, ChannelError
from launcher.hosts import Host, parse_hosts
from launcher.logs import quiet
from launcher.plan import Returns, Service, Workers, plan
from launcher.reports import FILE_PIECE_BYTES, REPORTS, read_report
from launcher.run import Outcome, Timeouts, run
from launcher.transport import local_agent_command

# Answers as an agent does, up to the moment when a process is started; then it says what it is told to say.
LIAR = """
import json, os, sys, time
def say(report): os.write(1, (json.dumps(report) + "\\n").encode())
HELLO = {"is": "hello", "pid": 1, "cores": 1, "gpus": 0, "address": None, "launcher_address": None, "interface": None,
         "interfaces": {}, "identity": None}
lies = json.loads(sys.argv[1])
for line in sys.stdin:
    order = json.loads(line)
    if order["do"] == "hello": say(HELLO)
    if order["do"] == "world": say({"is": "world", "world": order["world"], "rendezvous_port": 1, "master_port": 2})
    if order["do"] == "stop": sys.exit(0)
    if order["do"] == "start":
        say({"is": "started", "name": order["name"], "pid": 1})
        if order["name"].startswith("server"): say({"is": "output", "name": order["name"], "stream": "stdout",
                                                    "text": "SERVER=x\\n"})
        for lie in lies if order["name"] == sys.argv[2] else []: say(lie)
"""


def liar(lies: Sequence[object], about: str) -> Callable[[Host], list[str]]:
    """Return a command for agents: on host b, the agent that starts the process `about` lies; all others are honest."""

    def agent_command(host: Host) -> Sequence[str]:
        honest = local_agent_command(Host("localhost"))
        return [sys.executable, "-c", LIAR, json.dumps(lies), about] if host.name == "b" else honest

    return agent_command


def play(folder: Path, lies: Sequence[object], about: str = "rank.1", **options: Any) -> Outcome:
    """Run a server and a worker here, and a worker on b, whose agent lies."""
    serve = "import time; print('SERVER=x', flush=True); time.sleep(600)"
    returns = Returns("FOLDER", (r"updates\.jsonl", r"checkpoints/[0-9]+\.json"))
    where = parse_hosts("b" if about == "server" else "localhost")[0]
    server = Service("server", [sys.executable, "-c", serve], announces="SERVER", returns=returns, host=where)
    laid = plan(parse_hosts("localhost:1,b:1"), Workers(["sleep", "600"]), [server], env=dict(os.environ), cwd="/")
    agents = liar(lies, about)
    return run(laid, folder, echo=quiet, agent_command=agents, timeouts=Timeouts(grace_s=0.5, finish_s=0.5), **options)


def piece(path: str, data: bytes = b"planted", last: bool = True) -> dict[str, object]:
    return {"is": "file", "path": path, "data": base64.b64encode(data).decode(), "last": last}


def output(name: str, stream: str = "stdout") -> dict[str, object]:
    return {"is": "output", "name": name, "stream": stream, "text": "planted\n"}


def end(name: str, **changes: object) -> dict[str, object]:
    honest = {"status": 0, "error": None, "reached": [], "leaving_s": 0.0, "out_of_memory": False}
    return {"is": "exit", "name": name, **honest, **changes}


NAMES = [
    *("config.yaml", "launch.yaml", "invitations/worker-2.json", "summary.json", "updates.jsonl", "checkpoints/1.json"),
    *("logs/localhost", "../planted", "/tmp/planted", "checkpoints/../config.yaml", ".server.lock", "x\n", ""),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_that_owes_no_file_can_plant_none(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    outcome = play(folder, [piece(name)])
    assert outcome.exit_code == 1
    assert "the agent on b sent something else than an answer: " in str(outcome.failure)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"planted" in path.read_bytes()]
    assert [path.name for path in folder.iterdir()] == ["logs"]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("updates.jsonl", "checkpoints/1.json")])
def test_a_server_elsewhere_can_bring_what_it_owes_and_nothing_else(tmp_path: Path, name: str) -> None:
    outcome = play(tmp_path, [piece("updates.jsonl"), piece("checkpoints/1.json"), piece(name)], about="server")
    assert "the agent on b sent something else than an answer: " in str(outcome.failure)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {path for path in found if not path.startswith("logs/")} == {"updates.jsonl", "checkpoints/1.json"}


def test_no_file_is_written_through_a_link(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    folder.mkdir()
    (folder / "checkpoints").symlink_to(outside)
    (folder / ".updates.jsonl.part").symlink_to(outside / "victim")
    (outside / "victim").write_text("as it was")
    pieces = [piece("updates.jsonl", last=False), piece("updates.jsonl"), piece("checkpoints/1.json")]
    outcome = play(folder, [*pieces, end("server", status=3)], about="server")
    assert outcome.exit_code == 3
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"victim": "as it was"}
    assert (folder / "updates.jsonl").read_bytes() == b"plantedplanted"


LIES: list[tuple[object, str]] = [
    (output("rank.0"), "'rank.0', which it does not run"),
    (output("server"), "'server', which it does not run"),
    (output("../../x"), "'../../x', which it does not run"),
    (output("rank.1", "../../../planted"), "'stream' is '../../../planted'; expected stdout or stderr"),
    (end("rank.0"), "'rank.0', which it does not run"),
    ({"is": "started", "name": "rank.0", "pid": 1}, "'rank.0', which it does not run"),
    ({"is": "world", "world": 0, "rendezvous_port": 1, "master_port": 2}, "the ports of world 0, for which nobody"),
    ({"is": "steal \x1b]0;title\x07"}, "a report of the kind 'steal"),
    (7, "answer: 7"),
]


@pytest.mark.parametrize(("lie", "said"), LIES, ids=range(len(LIES)))
def test_a_lie_is_a_failure_of_its_agent(tmp_path: Path, lie: object, said: str) -> None:
    outcome = play(tmp_path, [lie])
    assert outcome.exit_code == 1
    assert outcome.failure is not None
    assert outcome.failure.host == "b"
    assert said in str(outcome.failure)
    assert "\x1b" not in str(outcome.failure)
    assert not list(tmp_path.rglob("planted"))
    assert not [path for path in tmp_path.rglob("std*") if b"planted" in path.read_bytes()]


@pytest.mark.parametrize(
    ("report", "said"),
    [
        ({**output("rank.1"), "text": 7}, "'text' is 7"),
        ({**output("rank.1"), "text": "\ud800"}, "'text' is '\\ud800'"),
        (end("rank.1", status=256), "'status' is 256; expected a whole number from -65 to 255"),
        (end("rank.1", status=True), "'status' is True"),
        (end("rank.1", status=10**30), "'status' is 10"),
        (end("rank.1", status=0.0), "'status' is 0.0"),
        (end("rank.1", error=["x"]), "'error' is ['x']"),
        (end("rank.1", reached=["finish"] * 33), "'reached' is "),
        (end("rank.1", leaving_s=-1.0), "'leaving_s' is -1.0"),
        (end("rank.1", leaving_s=float("nan")), "'leaving_s' is nan"),
        ({"is": "world", "world": 1, "rendezvous_port": 1, "master_port": 65536}, "'master_port' is 65536"),
        ({"is": "hello"}, "the kind hello in which 'address' is missing"),
        ({"is": ["x"]}, "a report of the kind ['x']"),
        ({}, "a report of the kind None"),
        (piece("updates.jsonl", bytes(FILE_PIECE_BYTES + 1)), "expected at most 1048576 bytes in base64"),
        ({**piece("updates.jsonl"), "data": "é"}, "expected at most 1048576 bytes in base64"),
        ({"is": "stopping", "why": "x", "more": 1}, "in which 'more' is not known"),
    ],
)
def test_what_no_agent_says_is_named(report: dict[str, object], said: str) -> None:
    with pytest.raises(ChannelError) as caught:
        read_report(report)
    assert said in str(caught.value)


def test_an_agent_that_has_lied_is_not_listened_to(tmp_path: Path) -> None:
    lies = [output("rank.0"), output("rank.1"), piece("updates.jsonl")]
    assert play(tmp_path, lies).exit_code == 1
    assert (tmp_path / "logs/b/rank.1/stdout").read_bytes() == b""


def test_a_line_without_an_end_is_cut_off(tmp_path: Path) -> None:
    script = "while True: __import__('os').write(1, b'x' * (1 << 20))"
    laid = plan(parse_hosts("localhost:1"), Workers(["true"]), env={}, cwd="/")
    command = [sys.executable, "-c", script]
    timeouts = Timeouts(grace_s=0.1)
    outcome = run(laid, tmp_path, echo=quiet, agent_command=lambda host: command, timeouts=timeouts)
    reason = str(outcome.failure)
    assert reason.startswith("the agent on localhost sent something else than an answer: xxx")
    assert len(reason) < 1000


def test_a_channel_keeps_no_more_than_its_longest_line() -> None:
    reader, writer = os.pipe()
    channel = Channel(reader, writer, longest_bytes=1000)
    os.write(writer, b'{"is": 1}\n' + b"x" * 900)
    assert channel.receive() == [{"is": 1}]
    os.write(writer, b"x" * 200)
    with pytest.raises(ChannelError, match="a line of more than"):
        channel.receive()
    os.write(writer, b"[" * 990 + b"\n")
    with pytest.raises(ChannelError, match=r"\[\[\["):
        channel.receive()
    os.close(reader)
    os.close(writer)


def test_every_field_of_every_report_has_a_range() -> None:
    """Whatever a field holds, the report is read, or refused with a reason."""
    odd: list[object] = [None, True, -1, 1 << 80, 1.5, "", "x" * 10_000, "\x1b[2J", [], [[]], {}, {"a": {}}]
    for kind, (_, checks) in REPORTS.items():
        for key in checks:
            for value in odd:
                report = {"is": kind, **dict.fromkeys(checks, 1), key: value}
                try:
                    read_report(report)
                except ChannelError as error:
                    assert len(str(error)) < 400  # noqa: PT017
