"""The whole server core as plain values and tensors: what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

from danaz.protocol.messages import Plan
from danaz.server.admission import Job
from danaz.server.figures import Figures
from danaz.server.leases import LeasedElsewhere, Leases
from danaz.server.master import Master
from danaz.server.members import Member
from danaz.server.whole import WholeModel
from danaz.vectors.codecs import view_codec
from danaz.vectors.flat import Layout

if TYPE_CHECKING:
    from danaz.server.core import ServerCore

# Not of one server process: its clock and routes, and what a worker that joins anew is sent afresh.
PASSING = {"vectors", "route", "heard_at", "awaiting", "pending", "refused", "squares"}
PASSING |= {"sent_version", "view", "ahead_version", "ahead_view"}
LASTING = [field.name for field in fields(Member) if field.name not in PASSING]


class ResumeError(ValueError):
    """A run that cannot go on from what is left of it."""


@dataclass(frozen=True)
class CoreState:
    """A server core at one moment."""

    facts: dict[str, Any]  # as JSON has them
    tensors: dict[str, Tensor]  # f32[P] or f32[B] each, but for a sum f64[B]

    @property
    def version(self) -> int:
        version: int = self.facts["master"]["version"]
        return version

    @property
    def done(self) -> bool:
        """Whether there was nothing more to train."""
        return Leases.restored(Plan(**self.facts["job"]["plan"]), self.facts["leases"]).done


def take(core: ServerCore, reuse: CoreState | None = None) -> CoreState:
    """Copy the state of a core that has started, into the memory of a state that nobody needs any more."""
    master, job = core.master, core.job
    members = sorted(core.members.values(), key=lambda member: member.worker)
    facts = {
        "digest": core.settings.digest,
        "algorithm": core.settings.algorithm,
        "sync_period": core.settings.sync_period,
        "shards": core.settings.shards,
        "shard": core.settings.shard,
        "generation": core.generation,
        "whole": core.whole.layout.to_lists(),
        "job": {"layout": job.layout.to_lists(), "plan": asdict(job.plan), "momentum": job.momentum},
        "master": {"version": master.version, "lr": list(master.lr), "max_lr": list(master.max_lr)},
        "members": [{name: getattr(member, name) for name in LASTING} for member in members],
        "leases": core.leases.facts(),
        "figures": core.figures.facts(),
        "sick_workers": core.health.summary(),
        "diverged": core.diverged,
        "sound": list(core.sound),
        "stopped": core.stopped,
        "final": core.final,
        "buffers": {"updates": core.buffers.updates},
        "rest_version": core.whole.version,
    }
    tensors = {"params": master.params}
    tensors |= {"untrained": core.untrained} if core.untrained.numel() else {}
    tensors |= {} if core.whole.rest is None else {"rest": core.whole.rest}
    tensors |= {f"shared.{name}": vector for name, vector in master.shared.items()}
    tensors |= {f"member.{m.worker}.{name}": vector for m in members for name, vector in m.vectors.items()}
    tensors |= {"buffers.total": core.buffers.total, "buffers.last": core.buffers.last}
    memory = {} if reuse is None else reuse.tensors
    copies = {n: memory[n].copy_(t) if n in memory else t.clone() for n, t in tensors.items()}
    return CoreState(facts, copies)


def fill(core: ServerCore, state: CoreState, now: float) -> None:
    """Put a state into a core that is new. Raises ResumeError if that one has other settings."""
    facts, tensors, settings = state.facts, state.tensors, core.settings
    for name in ("algorithm", "sync_period", "shards", "shard"):
        if facts[name] != (asked := getattr(settings, name)):
            raise ResumeError(f"the checkpoint is of a run with {name} {facts[name]}, this server has {asked}")
    if facts.get("digest", settings.digest) != settings.digest:  # there is none in one of an earlier version
        raise ResumeError(
            "the checkpoint is of a run with another configuration than this server's "
            f"(digest {facts['digest'][:12] or 'none'}, here {settings.digest[:12] or 'none'}); resume it with the "
            "config.yaml that it began with"
        )
    job = facts["job"]
    layout, plan = Layout.from_lists(job["layout"]), Plan(**job["plan"])
    rule, codec = settings.rule(job["momentum"]), view_codec(settings.wire_view)
    core.start_from(
        Job(layout, plan, job["momentum"]),
        (LeasedElsewhere if settings.shard else Leases).restored(plan, facts["leases"]),
        master := Master(rule, layout, tensors["params"], core.ahead, codec),
        WholeModel(Layout.from_lists(facts["whole"]), tensors.get("rest"), facts["rest_version"]),
    )
    master.version = facts["master"]["version"]
    master.lr, master.max_lr = tuple(facts["master"]["lr"]), tuple(facts["master"]["max_lr"])
    for name in master.shared:
        master.shared[name].copy_(tensors[f"shared.{name}"])
    for values in facts["members"]:
        kept = () if values["left"] else master.rule.worker_state
        vectors = {name: tensors[f"member.{values['worker']}.{name}"].clone() for name in kept}
        member = Member(**{**values, "lr": tuple(values["lr"])}, route=b"", vectors=vectors, heard_at=now)
        member.awaiting = "join" if member.takes_part else ""
        core.members[member.worker] = member
    core.figures = Figures.restored(facts["figures"], now)
    core.health.restore(facts["sick_workers"])
    core.diverged, core.stopped = facts["diverged"], facts.get("stopped", "")
    core.final, core.generation = facts["final"], facts["generation"]
    core.untrained = tensors.get("untrained", core.untrained)
    core.sound = tuple(facts.get("sound", ()))
    _fill_buffers(core, facts, tensors)


def _fill_buffers(core: ServerCore, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Those of a checkpoint of an earlier version are of each worker that had left."""
    buffers = core.buffers
    if "buffers" in facts:
        buffers.updates = facts["buffers"]["updates"]
        buffers.total, buffers.last = tensors["buffers.total"].clone(), tensors["buffers.last"].clone()
    for number, updates in enumerate(facts.get("buffers_of", ())):
        buffers.updates += updates
        buffers.total.add_(tensors[f"buffers.{number}"], alpha=updates)
        buffers.last = tensors[f"buffers.{number}"].clone()
