"""The command line for ssh, the choice of hosts, and the survey of machines, all without ssh itself."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from launcher import checks, machine
from launcher.checks import number, optional, record
from launcher.hosts import Host, HostsError, parse_hosts
from launcher.machine import this_machine
from launcher.plan import LAUNCHING_MACHINE, PYTHON
from launcher.selection import select_hosts
from launcher.ssh import NEWER_OPTIONS, Ssh
from launcher.survey import ANY_HOST, Probe, survey
from launcher.transport import local_agent_command

ROOT = Path(__file__).parents[2]
AGENT = "cd / && exec /there/python -m launcher.agent"


def told(ssh: Ssh, host: Host) -> list[str]:
    """Return the command without the options that are always the same."""
    words = list(ssh(host))
    assert words.pop(0) == "ssh"
    while words[0] == "-o":
        assert "StrictHostKeyChecking" not in words[1]
        del words[:2]
    return words


def test_what_ssh_is_told() -> None:
    ssh = Ssh(2222, Path("/id"), python="/there/python")
    assert told(ssh, Host("b")) == ["-p", "2222", "-i", "/id", "--", "b", AGENT]
    assert told(ssh, Host("b", user="u", ssh_port=23)) == ["-p", "23", "-i", "/id", "--", "u@b", AGENT]
    assert told(Ssh(python="/two words"), Host("fe80::1")) == [
        *("--", "fe80::1", "cd / && exec '/two words' -m launcher.agent")
    ]


def options_of(words: Sequence[str]) -> dict[str, str]:
    return dict(words[at + 1].split("=", 1) for at, word in enumerate(words) if word == "-o")


def test_every_option_of_ssh_is_one_that_it_knows_and_takes() -> None:
    """`ssh -G` prints the configuration that ssh would use, in small letters."""
    asked = options_of(Ssh()(Host("b")))
    words = [word for name, value in asked.items() for word in ("-o", f"{name}={value}")]
    told = subprocess.run(["ssh", "-G", *words, "b"], stdout=subprocess.PIPE, text=True, check=True).stdout
    used = dict(line.split(" ", 1) for line in told.splitlines() if " " in line)
    for name in ("ForwardAgent", "ForwardX11", "PermitLocalCommand", "StdinNull", "ForkAfterAuthentication", "Tunnel"):
        assert (asked[name], used[name.lower()]) in (("no", "no"), ("no", "false"))
    assert used["requesttty"] in ("no", "false")


def test_an_older_ssh_is_not_told_what_it_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "ssh"
    old.write_text("#!/bin/sh\necho 'OpenSSH_8.0p1, OpenSSL 1.1.1k' >&2\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    # Another process, because this one asks for the version only once.
    code = "import json, launcher.hosts as h, launcher.ssh as s; print(json.dumps(s.Ssh()(h.Host('b'))))"
    words = json.loads(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout)
    assert words[0] == "ssh"
    assert not options_of(words).keys() & NEWER_OPTIONS.keys()
    assert options_of(Ssh()(Host("b"))).keys() & NEWER_OPTIONS.keys()


def test_this_machine_needs_no_ssh() -> None:
    for host in (Host("localhost"), Host("127.0.0.1"), Host(os.uname().nodename)):
        assert Ssh()(host) == local_agent_command(host)
        assert Ssh(always=True)(host)[0] == "ssh"
    assert Ssh()(Host("localhost", user="somebody-else"))[0] == "ssh"
    assert Ssh()(Host("localhost", ssh_port=2222))[0] == "ssh"


NAMES = {"front.cluster.example": ["10.9.8.7"], "front.elsewhere.example": ["10.9.8.6"], "node.example": ["10.9.8.7"]}


def test_this_machine_by_its_addresses_and_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(name: str, port: None, **_: object) -> list[tuple[object, ...]]:
        if name not in NAMES:
            raise socket.gaierror
        return [(None, None, None, None, (address, 0)) for address in NAMES[name]]

    monkeypatch.setattr(socket, "gethostname", lambda: "Front")
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    own_interfaces = {"127.0.0.1": "lo", "10.9.8.7": "eth0", "fd77::7": "eth0"}
    monkeypatch.setattr(machine, "interfaces", lambda: own_interfaces)
    for own in ("localhost", "127.0.1.1", "::1", "front", "FRONT", "10.9.8.7", "fd77::7", "front.cluster.example"):
        assert machine.is_this_machine(own), own
    for other in ("10.9.8.6", "fd77::6", "front.elsewhere.example", "front.nowhere.example", "back", "node.example"):
        assert not machine.is_this_machine(other), other


def test_what_tells_a_machine_from_all_others() -> None:
    assert this_machine().identity == this_machine().identity is not None
    assert survey(HOSTS[:1], local_agent_command, hub=HOSTS[0], cwd="/")["localhost"].machine.identity is not None


@pytest.mark.parametrize(
    ("include", "exclude", "chosen"),
    [
        (None, None, [("a", 4, None), ("b", 2, None), ("c", None, None)]),
        ("b", None, [("b", 2, None)]),
        ("a:2,0@c", None, [("a", 2, (0, 2)), ("c", None, None)]),
        ("c:1", None, [("c", 1, (1,))]),
        (None, "b", [("a", 4, None), ("c", None, None)]),
        (None, "a:0@b:0,1@c", [("a", 3, (1, 2, 3))]),
    ],
)
def test_some_hosts_and_slots(include: str | None, exclude: str | None, chosen: list[object]) -> None:
    hosts = select_hosts(parse_hosts("a:4,b:2,c"), include, exclude)
    assert [(host.name, host.slots, host.devices) for host in hosts] == chosen


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("a", "b", "--include and --exclude cannot be given together"),
        ("d", None, "--include: 'd' is none of the hosts: a, b, c"),
        ("a@a:1", None, "--include names a twice"),
        ("a:4", None, "--include: a has 4 slots, 0 to 3; not 4"),
        ("a:", None, "'a:' should be host:slot,slot"),
        ("a:x", None, "'a:x' should be host:slot,slot"),
        ("a:1,1", None, "'a:1,1' names a slot twice"),
        (None, "c:0", "needs to know how many slots c has; write c:N"),
        (None, "a@b@c", "--exclude a@b@c leaves no host"),
        ("", None, "--include: '' is none of the hosts"),
    ],
)
def test_what_cannot_be_chosen(include: str | None, exclude: str | None, message: str) -> None:
    with pytest.raises(HostsError) as error:
        select_hosts(parse_hosts("a:4,b:2,c"), include, exclude)
    assert message in str(error.value)


def test_every_address_of_this_machine_has_its_interface() -> None:
    interfaces = this_machine().interfaces
    assert interfaces["127.0.0.1"] == "lo"
    assert set(interfaces.values()) <= set(os.listdir("/sys/class/net"))


HOSTS = parse_hosts("localhost,127.0.0.1")


def test_hosts_of_this_machine_meet_on_loopback() -> None:
    findings = survey(HOSTS, local_agent_command, hub=LAUNCHING_MACHINE, cwd="/")
    assert [finding.problem for finding in findings.values()] == [None, None]
    assert {(found.machine.address, found.machine.interface) for found in findings.values()} == {("127.0.0.1", "lo")}
    assert findings["localhost"].machine.cores == this_machine().cores


def test_an_interface_by_name() -> None:
    findings = survey(HOSTS, local_agent_command, hub=HOSTS[0], cwd="/", interfaces={ANY_HOST: "lo"})
    assert [finding.machine.interface for finding in findings.values()] == ["lo", "lo"]
    findings = survey(HOSTS, local_agent_command, hub=HOSTS[0], cwd="/", interfaces={"127.0.0.1": "eth99"})
    assert findings["localhost"].problem is None
    assert "127.0.0.1: it has no network interface eth99 with an address; it has lo (127.0.0.1)" in str(
        findings["127.0.0.1"].problem
    )


def test_a_probe_may_say_more_and_travels_with_variables(tmp_path: Path) -> None:
    code = "import json, os; print(json.dumps({'address': '127.0.0.1', 'unreachable': None, 'is': os.environ['KEY']}))"
    probe = Probe((PYTHON, "-c", code))
    findings = survey(HOSTS, local_agent_command, hub=HOSTS[0], cwd=str(tmp_path), probe=probe, env={"KEY": "value"})
    assert [finding.report["is"] for finding in findings.values()] == ["value", "value"]


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("raise SystemExit('not today')", "localhost: not today; is this program whole there?"),
        ("pass", "localhost: it said nothing; is this program whole there?"),
        (
            "import json; print(json.dumps({'address': None, 'unreachable': 'no route'}))",
            "localhost: cannot connect to this machine at 127.0.0.1: no route; let its firewall",
        ),
        ("import time; time.sleep(60)", "localhost: it did not say within 2 s what it is"),
    ],
)
def test_a_machine_that_cannot_take_part(code: str, problem: str) -> None:
    host = HOSTS[0]
    findings = survey([host], local_agent_command, hub=host, cwd="/", probe=Probe((PYTHON, "-c", code)), timeout_s=2.0)
    assert str(findings["localhost"].problem).startswith(problem)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("what is this?", "'what is this?' is not JSON"),
        ("[" * 5000, "is not JSON"),
        ("7", "'7' is not a JSON object"),
        ('{"address": "127.0.0.1", "size": 1}', "'unreachable' is missing"),
        ('{"address": "a b", "unreachable": null, "size": 1}', "'address' is 'a b'; expected an IP address"),
        ('{"address": null, "unreachable": 7, "size": 1}', "'unreachable' is 7; expected text of at most"),
        ('{"address": null, "unreachable": null}', "'size' is missing"),
        ('{"address": null, "unreachable": null, "size": -1}', "'size' is -1; expected bytes from 0 to 100"),
        ('{"address": null, "unreachable": null, "size": NaN}', "'size' is nan"),
        ('{"address": null, "unreachable": null, "size": true}', "'size' is True"),
        ('{"address": null, "unreachable": null, "size": "\\u001b[2J"}', r"'size' is '\x1b[2J'"),
        ('{"address": null, "unreachable": null, "size": 1, "more": []}', "'more' is []; expected text"),
        ('{"address": null, "unreachable": null, "size": 1, "list": {"a": 7}}', "'a' is 7; expected 1 to 255"),
        ('{"address": null, "unreachable": null, "size": 1, "list": 7}', "'list' is 7; expected an object with a"),
    ],
)
def test_a_machine_whose_probe_lies_is_named(answer: str, said: str) -> None:
    may_tell = {"list": record({"a": optional(checks.name)})}
    code = f"import sys; sys.stdout.write({answer!r})"
    probe = Probe((PYTHON, "-c", code), {"size": number(0, 100, "bytes")}, may_tell)
    [finding] = survey(HOSTS[1:], local_agent_command, hub=HOSTS[1], cwd="/", probe=probe).values()
    assert str(finding.problem).startswith("127.0.0.1: its probe sent something else than an answer: ")
    assert said in str(finding.problem)
    assert "\x1b" not in str(finding.problem)


def test_what_a_probe_says_cannot_act_on_the_terminal() -> None:
    code = """print('{"address": null, "unreachable": "no \\\\u001b[2J\\\\ud800 route"}')"""
    probe = Probe((PYTHON, "-c", code))
    [finding] = survey(HOSTS[1:], local_agent_command, hub=HOSTS[1], cwd="/", probe=probe).values()
    assert r"127.0.0.1: no \x1b[2J\ud800 route;" in str(finding.problem)


def test_an_agent_that_does_not_come_up() -> None:
    def command(host: Host) -> Sequence[str]:
        return ["sh", "-c", "echo no way >&2"] if host.name == "127.0.0.1" else local_agent_command(host)

    findings = survey(HOSTS, command, hub=HOSTS[0], cwd="/")
    assert findings["localhost"].problem is None
    assert findings["127.0.0.1"].problem == "127.0.0.1: no way"
    findings = survey(HOSTS, command, hub=HOSTS[1], cwd="/")
    assert findings["localhost"].problem == "localhost: not looked at, because of 127.0.0.1"


def test_a_survey_is_given_up_by_ctrl_c(tmp_path: Path) -> None:
    code = f"import os, signal, time; os.kill({os.getpid()}, signal.SIGINT); time.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        survey([HOSTS[0]], local_agent_command, hub=HOSTS[0], cwd="/", probe=Probe((PYTHON, "-c", code)))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
