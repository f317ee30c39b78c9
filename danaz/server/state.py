"""What the server knows, and those changes to it that several parts of the server make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from danaz.optimizers import Optimizers
from danaz.protocol.messages import Join, Plan
from danaz.server.full_model import FullModel
from danaz.server.health import PushHealth
from danaz.server.leases import LeasedElsewhere, Leases
from danaz.server.master import Master
from danaz.server.members import MeanBuffers, Member
from danaz.server.records import RunTotals
from danaz.server.settings import ServerSettings
from danaz.vectors.codecs import view_codec
from danaz.vectors.layout import Layout


@dataclass(frozen=True)
class Job:
    """What all workers of a run agree on; the first to join brings it."""

    layout: Layout
    plan: Plan
    optimizers: Optimizers


class ServerState:
    """Everything that a server knows of its run. It sends nothing.

    ``on_notice`` is told what a person should know. For ``ahead`` see Master.
    """

    def __init__(
        self,
        settings: ServerSettings,
        on_notice: Callable[[str], None] = lambda text: None,
        ahead: Callable[[], Tensor] | None = None,
    ):
        self.settings = settings
        self.on_notice = on_notice
        self.ahead = ahead
        self.members: dict[int, Member] = {}
        self.totals = RunTotals()
        self.health = PushHealth(on_notice)
        self.life = 0  # grows with each restart
        self.generation = 0  # number of shard 0's newest checkpoint
        self.kept: tuple[int, ...] = ()  # numbers of this shard's checkpoints, as its workers are told
        self.sound: tuple[int, ...] = ()  # once training has diverged, the checkpoints from before, which stay
        self.started = False
        self.diverged = ""  # the reason, if training diverged
        self.stopped = ""  # the script's reason, if it ended the run early
        self.final = False  # whether a worker has the trained model; from then on nobody can change it
        self.buffers = MeanBuffers(0)
        self.untrained = torch.empty(0)  # f32[U], the bytes of what the model holds besides the parameters
        self._job: Job | None = None
        self._leases: Leases | None = None
        self._full_model: FullModel | None = None
        self._master: Master | None = None

    # ---- what the first workers bring ----------------------------------------------------------------------------

    @property
    def has_job(self) -> bool:
        """Whether a worker has joined: from then on there are a job, leases and a full model."""
        return self._job is not None

    @property
    def has_params(self) -> bool:
        """Whether worker 0 has brought the first parameters: from then on there is a master."""
        return self._master is not None

    @property
    def job(self) -> Job:
        assert self._job is not None, "nobody has joined yet"
        return self._job

    @property
    def full_model(self) -> FullModel:
        assert self._full_model is not None, "nobody has joined yet"
        return self._full_model

    @property
    def leases(self) -> Leases:
        assert self._leases is not None, "nobody has joined yet"
        return self._leases

    @property
    def master(self) -> Master:
        assert self._master is not None, "worker 0 has not brought the first parameters yet"
        return self._master

    @property
    def epoch(self) -> float:
        """Completed epochs of the whole cluster."""
        return self._leases.epoch if self._leases else 0.0

    def learn(self, join: Join, full_layout: Layout) -> None:
        """Take over what ``join`` is the first to bring: the job and, from worker 0, the model's values.

        ``join`` has the layout of this shard's part of the model, ``full_layout`` that of the full model.
        """
        if not self.has_job:
            leases = (LeasedElsewhere if self.settings.shard else Leases)(join.plan)
            self.take_job(Job(join.layout, join.plan, join.optimizers), leases, FullModel(full_layout))
        if not self.has_params and join.params is not None:
            self.take_params(join.params)
            if join.untrained is not None:
                self.untrained = join.untrained.clone()

    def take_job(self, job: Job, leases: Leases, full_model: FullModel) -> None:
        self._job, self._leases, self._full_model = job, leases, full_model
        self.buffers = MeanBuffers(job.layout.buffer_size)

    def take_params(self, params: Tensor) -> Master:
        """Make the master of this job, with these first parameters f32[P]."""
        rule, codec = self.settings.rule(self.job.optimizers), view_codec(self.settings.wire_view)
        self._master = Master(rule, self.job.layout, params, self.ahead, codec)
        return self._master

    # ---- workers -------------------------------------------------------------------------------------------------

    def start(self, now: float) -> None:
        """Begin training, as enough workers have joined."""
        self.started = True
        self.totals.started_at = now
        self.admit(*(m for m in self.members.values() if m.alive))

    def admit(self, *members: Member, afresh: bool = False) -> None:
        """Give members the vectors that they lack; with ``afresh``, replace the ones that they have."""
        for member in members:
            if afresh or not member.vectors:
                self.master.enter(member)
        self.resum()

    def resum(self, but: Member | None = None) -> None:
        """Sum again the velocities of all workers that take part, except ``but``."""
        self.master.resum(m for m in self.members.values() if m.takes_part and m is not but)

    def release(self, member: Member) -> None:
        """Give the batches of a worker's process that is gone to others, and take it out of the look-ahead."""
        self.leases.give_up(member.worker)
        self.health.forget(member.worker)
        if self.started:
            self.resum(but=member)

    # ---- the run -------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Finish the last update, which may be only partly applied."""
        if self._master is not None:
            self._master.settle()

    def refuse(self, reason: str) -> None:
        """Count a message that is refused, or that could not be read."""
        self.totals.refusals[reason] += 1

    def diverge(self, reason: str) -> None:
        """End the run early, and let the checkpoints from before stay."""
        if not self.diverged:
            self.diverged, self.sound = reason, self.kept
            self.leases.close()

    def stop(self, worker: int, reason: str) -> None:
        """End the run early, as the script of ``worker`` asks. The other workers learn it with their next view."""
        self.stopped = reason
        self.on_notice(f"worker {worker} ends the run early: {reason}")
        self.leases.stop()
