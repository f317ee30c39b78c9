"""The grammar of hostfiles: what it accepts, and what the error says about anything else."""

from __future__ import annotations

import ast
import contextlib
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import launcher
from launcher.hosts import Host, HostsError, parse_hostfile, parse_hosts


def test_command_line_lists() -> None:
    assert parse_hosts("localhost:4,b:2") == (Host("localhost", 4), Host("b", 2))
    assert parse_hosts(" a , me@b-1.example.org:3 ") == (Host("a"), Host("b-1.example.org", 3, user="me"))
    assert parse_hosts("[FE80::1]:2,[::1]") == (Host("fe80::1", 2), Host("::1"))


def test_a_hostfile_of_every_dialect(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_bytes(
        b"\xef\xbb\xbf# the cluster\r\n"
        b"\r\n"
        b"a:4\r\n"  # MPICH, Horovod
        b"b\tslots=8   # DeepSpeed, CNTK\r\n"
        b"c slots = 2 max-slots=4\n"  # Open MPI
        b"   \t \n"
        b"me@d slots=1 max_slots=1 ssh_port=2222#no space\n"
        b"[2001:db8::7]:3 ssh_port=22\n"
        b"e"  # no end of line
    )
    assert parse_hostfile(file) == (
        Host("a", 4),
        Host("b", 8),
        Host("c", 2, max_slots=4),
        Host("d", 1, user="me", ssh_port=2222, max_slots=1),
        Host("2001:db8::7", 3, ssh_port=22),
        Host("e"),
    )


NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?(\.[a-z][a-z0-9]{0,5})?", fullmatch=True)
ADDRESSES = st.ip_addresses(v=6).map(str)
HOSTS = st.builds(
    lambda host, most: Host(host.name, host.slots, host.user, host.ssh_port, most and most + (host.slots or 0)),
    st.builds(
        Host,
        name=NAMES | ADDRESSES,
        slots=st.none() | st.integers(1, 512),
        user=st.none() | st.from_regex(r"[a-z_][a-z0-9_.-]{0,8}", fullmatch=True),
        ssh_port=st.none() | st.integers(1, 65535),
    ),
    st.none() | st.integers(1, 512),
)
SPACE = st.sampled_from(["", " ", "\t", " \t "])
END = st.sampled_from(["\n", "\r\n", " # four: slots=9\n", "\n\n", "\n# \u03b8\r\n", "\t\r\n"])


@given(hosts=st.lists(HOSTS, min_size=1, max_size=6, unique_by=lambda host: host.name), data=st.data())
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, hosts: list[Host], data: st.DataObject
) -> None:
    file = tmp_path_factory.mktemp("hosts") / "hosts"
    lines = [data.draw(SPACE) + str(host).replace(" ", data.draw(SPACE) + " ") + data.draw(END) for host in hosts]
    file.write_bytes("".join(lines).encode())
    assert parse_hostfile(file) == tuple(hosts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--hosts is empty; expected host:slots,…, for example localhost:4"),
        ("a:1,,b:1", "--hosts entry 2 is empty in 'a:1,,b:1'; remove the comma"),
        ("a slots=4", "--hosts entry 1: 'a slots=4' holds a space; put options such as slots= into a --hostfile"),
        ("a:22", "looks like a port; in a hostfile write a ssh_port=22, or a slots=22 if you mean 22 slots"),
        ("a:50000", "--hosts entry 1: slots is 50000; expected 1 to 1024; if it is a port, write ssh_port=50000"),
        ("a:0", "--hosts entry 1: zero slots; remove the host to leave it out"),
        ("a:", "--hosts entry 1: slots is ''; expected a number from 1 to 1024"),
        ("a:-1", "slots is '-1'; expected a number from 1 to 1024"),
        ("a:\u0664", "slots is '\u0664'; expected a number from 1 to 1024"),
        ("b:1,a:1,B:2", "B is named twice: --hosts entry 1 and --hosts entry 3; write it once, with all its slots"),
        ("fe80::1", "holds several colons; write an IPv6 address in brackets, [fe80::1]:4"),
        ("[fe80::xyz]", "[fe80::xyz] is not an IPv6 address"),
        ("[fe80::1%../../etc]", "'../../etc' is not an interface name"),
        ("-oProxyCommand=x", "'-oProxyCommand=x' is not a host name"),
        ("../a", "'../a' is not a host name"),
        ("-l@a", "'-l' is not a user name"),
        ("@a", "'' is not a user name"),
        ("[::1", "'[::1' is not a host; expected [user@]host[:slots]"),
    ],
)
def test_mistakes_on_the_command_line(text: str, message: str) -> None:
    with pytest.raises(HostsError) as error:
        parse_hosts(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"# nobody\n\n", "names no host; expected lines such as: localhost slots=4"),
        (b"\na slots=2\nb\na:3\n", "a is named twice: {file} line 2 and {file} line 4; write it once"),
        (b"a\nb\na slots=2\n", "a is named twice: {file} line 1 and {file} line 3; write it once"),
        (b"a slots=2\na slots=2\n", "a is named twice: {file} line 1 and {file} line 2; write it once"),
        (b"u@a\nv@a\n", "a is named twice: {file} line 1 and {file} line 2; write it once"),
        (b"a\na ssh_port=2\n", "a is named twice: {file} line 1 and {file} line 2; write it once"),
        (b"a max_slots=2\n" * 3, "a is named 3 times, more than its 2 slots"),
        (b"a slots=0", "{file} line 1: zero slots"),
        (b"a slots=two", "{file} line 1: slots is 'two'; expected a number from 1 to 1024"),
        (b"a:2 slots=2", "{file} line 1: slots is given twice; remove one"),
        (b"a slots=4 max_slots=2", "{file} line 1: slots=4 is more than max_slots=2"),
        (b"a\nb 4", "{file} line 2: '4' is not known; expected slots=N, max_slots=N or ssh_port=N"),
        (b"a sslots=4", "{file} line 1: 'sslots=4' is not known"),
        (b"a ssh_port=70000", "{file} line 1: ssh_port is 70000; expected 1 to 65535"),
        (b"a ssh_port=0", "{file} line 1: ssh_port is 0; expected 1 to 65535"),
        (b"a\n\xff\xfe", "is not text in UTF-8 (byte 2)"),
    ],
)
def test_mistakes_in_a_hostfile(tmp_path: Path, text: bytes, message: str) -> None:
    file = tmp_path / "hosts"
    file.write_bytes(text)
    with pytest.raises(HostsError) as error:
        parse_hostfile(file)
    assert message.format(file=file) in str(error.value)


def test_a_node_file_names_a_host_once_for_each_slot(tmp_path: Path) -> None:
    """PBS ($PBS_NODEFILE), LSF ($LSB_DJOB_HOSTFILE) and Open MPI write such files."""
    file = tmp_path / "nodes"
    file.write_text("n1\nn1\nn2\nN1\nn3 slots=4\nn2\nn4\n")
    assert parse_hostfile(file) == (Host("n1", 3), Host("n2", 2), Host("n3", 4), Host("n4", 1))
    file.write_text("n1\nn2\n")
    assert parse_hostfile(file) == (Host("n1"), Host("n2")), "where none is repeated, a name says nothing of slots"
    assert parse_hosts("u@n1,u@n1") == (Host("n1", 2, "u"),)


def test_a_hostfile_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(HostsError, match="hosts does not exist"):
        parse_hostfile(tmp_path / "hosts")
    with pytest.raises(HostsError, match="cannot be read: Is a directory"):
        parse_hostfile(tmp_path)


@given(st.binary(max_size=200))
def test_any_bytes_are_hosts_or_a_clear_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.mktemp("hosts") / "hosts"
    file.write_bytes(content)
    with contextlib.suppress(HostsError):
        assert parse_hostfile(file)


def test_the_launcher_needs_nothing_but_python() -> None:
    for file in Path(launcher.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.partition(".")[0] in {"launcher", *sys.stdlib_module_names}, f"{file} imports {name}"
