"""Files that appear under their name only when they are complete."""

import os
import stat
import subprocess
import sys
import threading

import pytest

from danaz.files.atomic import replacing, write_atomically


@pytest.fixture
def umask():
    """Set the umask of this process; the test's end restores it."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("before", [None, b"before"])
def test_a_file_holds_exactly_what_was_written(tmp_path, before):
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    write_atomically(path, b"one\r\ntwo\n\0")
    assert path.read_bytes() == b"one\r\ntwo\n\0"
    assert [*tmp_path.iterdir()] == [path]


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"before")
    with replacing(path) as part:
        part.write_bytes(b"half")
        assert path.read_bytes() == b"before"
        part.write_bytes(b"after")
    assert path.read_bytes() == b"after"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("error", [OSError(28, "no space left"), ValueError("no such value"), KeyboardInterrupt()])
def test_an_error_half_way_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "file"
    write_atomically(path, b"before")

    def write_half() -> None:
        with replacing(path) as part:
            part.write_bytes(b"half")
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert path.read_bytes() == b"before"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("fails", ["fsync", "open", "replace", "chmod"])
def test_each_step_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, fails):
    path = tmp_path / "file"
    write_atomically(path, b"before")

    def broken(*args, **options):
        raise OSError(28, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, fails, broken)
        with pytest.raises(OSError, match="no space") as caught:
            write_atomically(path, b"after")
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"before"
    assert [*tmp_path.iterdir()] == [path]


def test_file_and_name_are_synced_in_this_order(tmp_path, monkeypatch):
    path, synced, sync = tmp_path / "file", [], os.fsync

    def fsync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        synced.append(("folder" if is_folder else "file", path.exists()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(path, b"content")
    assert synced == [("file", False), ("folder", True)]


def test_a_kill_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"before")
    program = (
        "import os, sys, pathlib, signal\n"
        "from danaz.files.atomic import replacing\n"
        "with replacing(pathlib.Path(sys.argv[1])) as part:\n"
        "    part.write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, path], check=False).returncode == -9
    assert path.read_bytes() == b"before"
    write_atomically(path, b"after")  # what the kill left is not in the way
    assert path.read_bytes() == b"after"


def test_a_part_of_ones_own_replaces_what_a_kill_left_there(tmp_path):
    path, left = tmp_path / "000007.json", tmp_path / "000007.part"
    left.write_bytes(b"a longer part, left by a kill")
    with replacing(path, part=left) as part:
        assert part == left
        part.write_bytes(b"whole")
    assert path.read_bytes() == b"whole"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_is_that_of_any_new_file(tmp_path, umask, mask, expected):
    umask(mask)
    path = tmp_path / "file"
    write_atomically(path, b"")
    assert mode(path) == expected
    with replacing(path) as part:  # as safetensors writes: it renames a private file
        (tmp_path / "private").touch(0o600)
        (tmp_path / "private").rename(part)
    assert mode(path) == expected


@pytest.mark.parametrize("chosen", [0o644, 0o600])
def test_a_chosen_mode_holds_whatever_the_umask_is(tmp_path, umask, chosen):
    for mask in 0o022, 0o077, 0:
        umask(mask)
        with replacing(tmp_path / "file", mode=chosen) as part:
            assert mode(part) & ~chosen == 0  # nor can more people read it before
        assert mode(tmp_path / "file") == chosen


def test_a_folder_that_is_missing_is_not_created(tmp_path):
    path = tmp_path / "deleted" / "file"
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(path, b"")
    assert caught.value.filename == str(path)
    assert not path.parent.exists()


def test_an_error_about_another_file_still_names_it(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "copy"):
        (tmp_path / "missing").read_bytes()
    assert caught.value.filename == str(tmp_path / "missing")
    assert not [*tmp_path.iterdir()]


def test_two_who_replace_one_file_do_not_mix(tmp_path):
    path, both_wrote = tmp_path / "file", threading.Barrier(2, timeout=30)

    def write(letter: bytes) -> None:
        with replacing(path) as part:
            part.write_bytes(1000 * letter)
            both_wrote.wait()

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in (1000 * b"a", 1000 * b"b")
    assert [*tmp_path.iterdir()] == [path]
