"""Checkpoints on disk, and the journal beside them: damage of any kind is recognised."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
import torch
from axis import under
from cluster import DIGEST, Cluster
from safetensors import SafetensorError
from safetensors.torch import load_file
from stimuli import JOIN

from danaz.optimizers import SGD, Optimizers
from danaz.protocol.messages import Leave, Plan, Report
from danaz.run.folder import read_summary
from danaz.server.core import ServerCore
from danaz.server.records import Update
from danaz.server.settings import ServerSettings
from danaz.server.snapshot import ResumeError, Snapshot
from danaz.serving.checkpoint import (
    FOLDER,
    FORMAT,
    complete_numbers,
    newest_number,
    read_newest,
    worth_keeping,
    write_checkpoint,
)
from danaz.serving.journal import RunWriter
from danaz.serving.keeper import Checkpoints, RunKeeper

SIZE = 5


def snapshot_of(version: int, algorithm: str = "dana-zero", optimizers: Optimizers = SGD) -> Snapshot:
    """Return a snapshot of a server after ``version`` updates by two workers in turn, of which one has left."""
    cluster = Cluster(algorithm, 3, torch.ones(SIZE), groups=(2, 3), buffers=2, optimizers=optimizers)
    cluster.leave(2, torch.tensor([3.0, 4.0]))
    for number in range(version):
        grad, absent = torch.randn(SIZE, generator=torch.Generator().manual_seed(number)), ((2, 4),) * (number == 1)
        cluster.push(number % 2, grad, (0.1, 0.2), absent=absent)
    return cluster.server.snapshot()


def same(one: Snapshot, other: Snapshot) -> bool:
    equal = all(torch.equal(one.tensors[name], tensor) for name, tensor in other.tensors.items())
    return one.facts == json.loads(json.dumps(other.facts)) and one.tensors.keys() == other.tensors.keys() and equal


def newest(folder: Path) -> Snapshot:
    found = read_newest(folder)
    assert found is not None
    return found[0]


class TestCheckpoints:
    @under(
        {**dict.fromkeys(("dana", "dana-zero", "dana-ga", "asgd"), "sgd adamw"), "nag-asgd": "nadam", "easgd": "sgd"}
    )
    def test_a_state_comes_back(self, algorithm, optimizers, tmp_path):
        """So do its counts, which differ where a layer had no gradient now and then."""
        state = snapshot_of(7 if algorithm != "easgd" else 0, algorithm, optimizers)
        write_checkpoint(tmp_path, 1, state)
        assert same(newest(tmp_path), state)
        again = ServerCore(settings_of(algorithm))
        again.restore(newest(tmp_path), [], 1, 0.0)
        assert again.job.optimizers == optimizers
        assert [m["counts"] for m in again.snapshot().facts["members"]] == [m["counts"] for m in state.facts["members"]]
        tensors = again.snapshot().tensors
        assert all(torch.equal(tensor, state.tensors[name]) for name, tensor in tensors.items())

    def test_one_of_an_earlier_version_is_read(self):
        """It held the buffers of each worker that had left, vectors of these too, and the first loss of the run."""
        cluster = Cluster("dana-zero", 2, torch.ones(SIZE), buffers=2)
        cluster.push(0, torch.ones(SIZE), 0.1, loss=2.0)
        cluster.push(1, torch.ones(SIZE), 0.1, loss=3.0)
        cluster.leave(1, torch.tensor([3.0, 4.0]))
        state = cluster.server.snapshot()
        del state.facts["buffers"], state.facts["figures"]["first_losses"]
        state.facts["figures"]["first_loss"] = 2.0
        state.facts["buffers_of"] = [1, 3]
        before = {"buffers.0": torch.tensor([3.0, 4.0]), "buffers.1": torch.tensor([7.0, 8.0])}
        before["member.1.velocity"] = torch.ones(SIZE)
        tensors = {name: tensor for name, tensor in state.tensors.items() if not name.startswith("buffers.")}
        core = ServerCore(cluster.settings)
        core.restore(Snapshot(json.loads(json.dumps(state.facts)), tensors | before), [], 1, 0.0)
        assert core.mean_buffers().tolist() == [6.0, 7.0]
        assert core.totals.first_losses == {0: 2.0, 1: 2.0}
        assert core.members[0].vectors.keys() == {"velocity"}

    def test_epochs_of_different_lengths_come_back(self, tmp_path):
        cluster = Cluster("dana", 1, torch.ones(SIZE), plan=Plan.of([2, 3]))
        for _ in range(3):
            cluster.push(0, torch.ones(SIZE), 0.1)
        write_checkpoint(tmp_path, 1, cluster.server.snapshot())
        core = ServerCore(cluster.settings)
        core.restore(newest(tmp_path), [], 1, 0.0)
        assert core.job == cluster.server.job
        assert core.leases.epoch == cluster.server.leases.epoch == pytest.approx(1 + 1 / 3)

    def test_a_copy_does_not_move_with_the_run(self):
        cluster = Cluster("dana-zero", 1, torch.ones(SIZE))
        state = cluster.server.snapshot()
        cluster.push(0, torch.ones(SIZE), 0.1)
        assert torch.equal(state.tensors["params"], torch.ones(SIZE))
        assert torch.equal(state.tensors["member.0.velocity"], torch.zeros(SIZE))

    def test_the_tensors_are_plain_safetensors(self, tmp_path):
        write_checkpoint(tmp_path, 3, snapshot_of(4))
        assert {"params", "shared.sum", "member.0.velocity"} <= load_file(tmp_path / "000003.safetensors").keys()

    def test_no_more_stay_than_are_to_be_kept(self, tmp_path):
        for number in range(1, 6):
            write_checkpoint(tmp_path, number, snapshot_of(number), keep=[3, number - 1])
        assert complete_numbers(tmp_path) == [3, 4, 5]
        assert len([*tmp_path.iterdir()]) == 6
        assert newest(tmp_path).version == 5

    @pytest.mark.parametrize(
        ("numbers", "common", "kept"),
        [
            ([3, 4, 5, 6], [4, 5], [4, 5, 6]),  # with one shard, the last two are those of all
            ([1, 2, 3, 5, 6, 7], [3], [3, 5, 6, 7]),
            ([1, 2, 3], [], [1, 2, 3]),  # another shard may have any of them
            ([1, *range(3, 20)], [1, 3], [1, 3, *range(12, 20)]),  # another shard cannot write any more
        ],
    )
    def test_what_all_shards_can_go_back_to_is_kept(self, numbers, common, kept):
        assert worth_keeping(numbers, common) == kept

    def test_none_is_no_fault(self, tmp_path):
        assert read_newest(tmp_path / "none") is None

    def test_one_that_was_not_finished_is_none_but_its_number_is_taken(self, tmp_path):
        write_checkpoint(tmp_path, 1, snapshot_of(1))
        (tmp_path / "000001.json").unlink()
        assert read_newest(tmp_path) is None
        assert newest_number(tmp_path) == 1

    @pytest.mark.parametrize("kind", ["json", "safetensors"])
    def test_any_cut_or_flipped_bit_is_seen_and_the_one_before_is_taken(self, kind, tmp_path):
        for number in (1, 2):
            write_checkpoint(tmp_path, number, snapshot_of(number), keep=[1])
        path, chance = tmp_path / f"000002.{kind}", random.Random(1)
        whole = path.read_bytes()
        for _ in range(200):
            damaged, at = bytearray(whole), chance.randrange(len(whole))
            damaged[at] ^= 1 << chance.randrange(8)
            for content in (whole[:at], damaged):
                path.write_bytes(content)
                state, why = read_newest(tmp_path)
                assert state.version == 1
                assert "checkpoint 2 is damaged" in why[0]
        path.write_bytes(whole)
        assert newest(tmp_path).version == 2

    def test_a_missing_file_is_seen(self, tmp_path):
        write_checkpoint(tmp_path, 1, snapshot_of(1))
        (tmp_path / "000001.safetensors").unlink()
        with pytest.raises(ResumeError, match=r"checkpoint 1 is damaged.*missing"):
            read_newest(tmp_path)

    def test_if_none_is_sound_nothing_is_made_up(self, tmp_path):
        for number in (1, 2):
            write_checkpoint(tmp_path, number, snapshot_of(number), keep=[1])
            (tmp_path / f"{number:06d}.json").write_text("[]")
        with pytest.raises(ResumeError, match=r"no checkpoint in .* is sound"):
            read_newest(tmp_path)


UPDATES = [
    Update(1, 0, 0, (0.1,), 0.5, "lookahead", 1.5, 0, samples=4, incarnation=1, request=2),
    Update(
        2, 1, 1, (0.1, 0.2), None, "lookahead", None, 3, samples=8, earlier=(1, 2), incarnation=7, request=5, life=3
    ),
    Update(3, 1, 1, (0.1,), None, "lookahead", None, 4, samples=8, incarnation=7, request=6, life=3),
]


class TestJournal:
    def folder(self, path: Path) -> RunWriter:
        folder = RunWriter(path, {})
        for update in UPDATES:
            folder.record(update)
        return folder

    def test_updates_come_back(self, tmp_path):
        folder = self.folder(tmp_path)
        assert folder.read_journal(after=0) == UPDATES
        assert folder.read_journal(after=2) == UPDATES[2:]
        assert folder.read_journal(after=3) == []

    def test_each_is_on_its_way_to_the_disk_before_its_worker_hears(self, tmp_path):
        """The kernel has it, and no SIGKILL takes it away."""
        folder = RunWriter(tmp_path, {})
        for number, update in enumerate(UPDATES, 1):
            folder.record(update)
            assert len((tmp_path / "updates.jsonl").read_bytes().splitlines()) == number

    def test_a_cut_leaves_whole_lines_and_writing_goes_on_behind_it(self, tmp_path):
        folder = self.folder(tmp_path)
        assert folder.cut_journal(1) == 2
        folder.record(UPDATES[1])
        assert folder.read_journal(after=0) == UPDATES[:2]

    def test_it_ends_before_a_torn_line(self, tmp_path):
        folder = self.folder(tmp_path)
        path = tmp_path / "updates.jsonl"
        path.write_bytes(path.read_bytes()[:-9])
        assert folder.read_journal(after=0) == UPDATES[:2]
        folder.cut_journal(2)
        assert path.read_bytes().endswith(b"}\n")

    def test_it_ends_before_a_hole(self, tmp_path):
        folder = RunWriter(tmp_path, {})
        for update in (UPDATES[0], UPDATES[2]):
            folder.record(update)
        assert folder.read_journal(after=0) == UPDATES[:1]


def settings_of(algorithm: str, digest: str = DIGEST) -> ServerSettings:
    """Return the settings of a server that goes on from snapshot_of."""
    return ServerSettings(algorithm, workers=2, digest=digest)


def resumed(run: Path, digest: str = DIGEST) -> RunKeeper:
    """Start the server's process again, and return its keeper."""
    keeper = RunKeeper(RunWriter(run, {}), settings_of("dana-zero", digest))
    keeper.resume()
    return keeper


NESTED = "[" * 100_000 + "]" * 100_000


class TestKeeper:
    def test_another_configuration_cannot_go_on(self, tmp_path):
        write_checkpoint(tmp_path / FOLDER, 1, snapshot_of(1))
        with pytest.raises(ResumeError, match=r"another configuration .*digest the same eve, here deadbeef"):
            resumed(tmp_path, digest="deadbeef")

    def test_nor_what_a_state_of_an_earlier_version_says_nothing_of(self, tmp_path):
        state = snapshot_of(1)
        del state.facts["digest"]
        write_checkpoint(tmp_path / FOLDER, 1, state)
        assert resumed(tmp_path, digest="deadbeef").core.started

    def test_each_restart_counts_also_one_that_came_to_nothing(self, tmp_path):
        """A server that is killed while it waits for its workers has written nothing else."""
        write_checkpoint(tmp_path / FOLDER, 1, snapshot_of(1))
        for _ in range(3):
            assert resumed(tmp_path).core.recovery is not None
        keeper = resumed(tmp_path)
        keeper.core.tick(1e12)
        assert keeper.core.recovery is None
        assert keeper.core.summary()["restarts"] == 4
        assert resumed(tmp_path).core.totals.restarts == 5

    def test_and_one_before_any_checkpoint(self, tmp_path):
        TestJournal().folder(tmp_path)
        for restarts in (1, 2):
            figures = resumed(tmp_path).core.totals
            assert (figures.restarts, figures.lost_updates) == (restarts, 3)

    def test_a_run_that_is_complete_leaves_no_count(self, tmp_path):
        write_checkpoint(tmp_path / FOLDER, 1, snapshot_of(1))
        Checkpoints(tmp_path, resumed(tmp_path).core).delete()
        assert not (tmp_path / FOLDER).exists()

    @pytest.mark.parametrize("damage", [NESTED, f'{{"format": "{FORMAT}", "sha256": "", "facts": {NESTED}}}'])
    def test_a_checkpoint_that_nests_without_end_is_damaged(self, damage, tmp_path):
        for number in (1, 2):
            write_checkpoint(tmp_path, number, snapshot_of(number), keep=[1])
        (tmp_path / "000002.json").write_text(damage)
        state, why = read_newest(tmp_path)
        assert state.version == 1
        assert "checkpoint 2 is damaged" in why[0]

    def test_a_journal_ends_before_a_line_that_nests_without_end(self, tmp_path):
        folder = TestJournal().folder(tmp_path)
        path = tmp_path / "updates.jsonl"
        first, second, _ = path.read_text().splitlines()
        path.write_text("\n".join([first, second, NESTED]))
        assert folder.read_journal(after=0) == UPDATES[:2]

    @pytest.mark.parametrize("content", [NESTED, "", "[1]", '{"compl'])
    def test_a_summary_that_is_none_is_named(self, content, tmp_path):
        (tmp_path / "summary.json").write_text(content)
        with pytest.raises(ValueError, match=r"summary\.json"):
            read_summary(tmp_path)

    def test_what_was_before_training_diverged_stays(self, tmp_path):
        """The checkpoints since then cannot be used, and are deleted when the run is over."""
        core = ServerCore(settings_of("dana-zero"))
        core.restore(snapshot_of(4), [], 1, 0.0)
        checkpoints = Checkpoints(tmp_path, core)
        for number in (1, 2, 3):
            checkpoints.write(number)
            checkpoints.wait()
        core.state.diverge("the loss rose")
        for number in (4, 5, 6):
            checkpoints.write(number)
            checkpoints.wait()
        folder = tmp_path / FOLDER
        assert complete_numbers(folder) == [2, 3, 5, 6]
        again = ServerCore(settings_of("dana-zero"))
        again.restore(newest(folder), [], 2, 0.0)
        assert again.state.sound == (2, 3), "a restart keeps this"
        Checkpoints(tmp_path, again).delete()
        assert complete_numbers(folder) == [2, 3]

    def test_of_parameters_that_are_not_finite_there_is_no_checkpoint(self, tmp_path, capsys):
        core = ServerCore(settings_of("dana-zero"))
        core.restore(snapshot_of(4), [], 1, 0.0)
        checkpoints = Checkpoints(tmp_path, core)
        checkpoints.write(1)
        core.master.replace(torch.full((SIZE,), float("nan")))
        checkpoints.write(2)
        checkpoints.wait()
        assert complete_numbers(tmp_path / FOLDER) == [1]
        assert "no checkpoint is written" in capsys.readouterr().err

    def test_another_algorithm_cannot_go_on(self, tmp_path):
        write_checkpoint(tmp_path / FOLDER, 1, snapshot_of(1))
        keeper = RunKeeper(RunWriter(tmp_path, {}), settings_of("asgd"))
        with pytest.raises(ResumeError, match="algorithm dana-zero, this server has asgd"):
            keeper.resume()

    def test_without_a_checkpoint_it_begins_afresh_and_says_so(self, tmp_path, capsys):
        folder = TestJournal().folder(tmp_path)
        keeper = RunKeeper(folder, settings_of("dana-zero"))
        keeper.resume()
        assert not keeper.core.started
        assert "begins afresh" in capsys.readouterr().err
        assert folder.read_journal(after=0) == []
        assert keeper.core.totals.lost_updates == 3

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left")])
    def test_a_full_disk_ends_no_run(self, error, tmp_path, capsys, monkeypatch):
        def full(*_):
            raise error

        write_checkpoint(tmp_path / FOLDER, 1, snapshot_of(1))
        monkeypatch.setattr("danaz.serving.checkpoint.save_file", full)
        keeper = resumed(tmp_path)
        keeper.core.tick(1e12)  # no worker comes
        assert "could not be written" in capsys.readouterr().err
        assert keeper.core.master.version == 1

    def test_what_was_reported_outlives_a_kill_without_a_checkpoint_of_its_own(self, tmp_path):
        settings = ServerSettings("asgd", 1, DIGEST, recovery_s=0.0)
        keeper = RunKeeper(RunWriter(tmp_path, {}), settings)
        core = keeper.begin()
        core.handle(0, JOIN, 0.0)
        core.handle(0, Leave(0, 1, 2, None, torch.zeros(2)), 0.0)
        written = complete_numbers(tmp_path / FOLDER)
        for request in range(3, 20):
            core.handle(0, Report(0, 1, request, {"accuracy": float(request)}), 0.0)
        assert complete_numbers(tmp_path / FOLDER) == written

        again = RunKeeper(RunWriter(tmp_path, {}), settings)  # the process before was killed
        core = again.resume()
        assert isinstance(core, ServerCore)
        assert core.summary()["reported"] == {"accuracy": 19.0}
        core.tick(time.monotonic())
        again.finish()
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert summary["reported"] == {"accuracy": 19.0}
        assert not list(tmp_path.glob("reported*"))

    def test_the_error_that_a_script_reported_stands_in_its_own_place_too(self, tmp_path):
        """Comparisons read the loss that a script measured. The server's own figure stays in the file."""
        keeper = RunKeeper(RunWriter(tmp_path, {}), ServerSettings("asgd", 1, DIGEST))
        core = keeper.begin()
        core.handle(0, JOIN, 0.0)
        core.handle(0, Leave(0, 1, 2, None, torch.zeros(2)), 0.0)
        core.handle(0, Report(0, 1, 3, {"test_error_percent": 2.5, "final_train_loss": 0.125, "updates": "none"}), 0.0)
        keeper.finish()
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert (summary["test_error_percent"], summary["final_train_loss"], summary["updates"]) == (2.5, None, 0)
        assert read_summary(tmp_path) == {**summary, "final_train_loss": 0.125}

    @pytest.mark.parametrize("loss", [0.5, None])
    def test_a_folder_of_an_earlier_version_is_still_read(self, loss, tmp_path):
        summary = {"test_error_percent": 3.0, "final_train_loss": loss, "updates": 7}
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        assert read_summary(tmp_path) == summary
