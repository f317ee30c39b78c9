"""A snapshot: the server's state as plain values and tensors, which a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from danaz.optimizers import Optimizers, optimizers_from_lists, optimizers_to_lists
from danaz.protocol.messages import Plan
from danaz.server.full_model import FullModel
from danaz.server.leases import LeasedElsewhere, Leases
from danaz.server.members import Member, restored_state
from danaz.server.records import RunTotals
from danaz.server.state import Job, ServerState
from danaz.vectors.counts import Counts
from danaz.vectors.layout import Layout

# The attributes of a member that a snapshot holds. It holds nothing that only one server process can use, such as the
# route, and nothing that a worker is sent again when it rejoins. Three facts stand for the member's state.
STATE_FACTS = ("alive", "left", "said_bye")
OTHER_FACTS = ("updates", "applied_request", "lag", "gap", "strikes")
LASTING = ("worker", "incarnation", "request", "ahead", *STATE_FACTS, *OTHER_FACTS)


class ResumeError(ValueError):
    """The run cannot go on from what is left of it."""


@dataclass(frozen=True)
class Snapshot:
    """The state of a server at one moment."""

    facts: dict[str, Any]  # all values but tensors, as JSON has them
    tensors: dict[str, Tensor]  # f32[P] or f32[B] each; one is a sum f64[B]

    @property
    def version(self) -> int:
        version: int = self.facts["master"]["version"]
        return version

    @property
    def done(self) -> bool:
        """Whether there was nothing more to train."""
        return Leases.restored(_plan(self.facts["job"]), self.facts["leases"]).done


def snapshot_of(state: ServerState, reuse: Snapshot | None = None) -> Snapshot:
    """Return a copy of the state of a server that has started, in the memory of ``reuse``, which nobody needs any more.

    Raises UnsettledError.
    """
    master, job = state.master, state.job
    members = sorted(state.members.values(), key=lambda member: member.worker)
    facts = {
        "digest": state.settings.digest,
        "algorithm": state.settings.algorithm,
        "sync_period": state.settings.sync_period,
        "shards": state.settings.shards,
        "shard": state.settings.shard,
        "generation": state.generation,
        "whole": state.full_model.layout.to_lists(),
        "job": {
            "layout": job.layout.to_lists(),
            "plan": asdict(job.plan),
            "optimizers": optimizers_to_lists(job.optimizers),
        },
        "master": {
            "version": master.version,
            "max_lr": list(master.max_lr),
            "counts": master.shared_counts.to_lists(),
        },
        "members": [
            {**{name: getattr(member, name) for name in LASTING}, "counts": member.counts.to_lists()}
            for member in members
        ],
        "leases": state.leases.facts(),
        "figures": state.totals.facts(),
        "sick_workers": state.health.summary(),
        "diverged": state.diverged,
        "sound": list(state.sound),
        "stopped": state.stopped,
        "final": state.final,
        "buffers": {"updates": state.buffers.updates},
        "rest_version": state.full_model.version,
    }
    tensors = {"params": master.params}
    tensors |= {"untrained": state.untrained} if state.untrained.numel() else {}
    tensors |= {} if state.full_model.rest is None else {"rest": state.full_model.rest}
    tensors |= {f"shared.{name}": vector for name, vector in master.shared.items()}
    tensors |= {f"member.{m.worker}.{name}": vector for m in members for name, vector in m.vectors.items()}
    tensors |= {"buffers.total": state.buffers.total, "buffers.last": state.buffers.last}
    memory = {} if reuse is None else reuse.tensors
    copies = {n: memory[n].copy_(t) if n in memory else t.clone() for n, t in tensors.items()}
    return Snapshot(facts, copies)


def restore_state(state: ServerState, saved: Snapshot, now: float) -> None:
    """Put ``saved`` into a new state. Raises ResumeError if the two have different settings."""
    facts, tensors, settings = saved.facts, saved.tensors, state.settings
    for name in ("algorithm", "sync_period", "shards", "shard"):
        if facts[name] != (asked := getattr(settings, name)):
            raise ResumeError(f"the checkpoint is of a run with {name} {facts[name]}, this server has {asked}")
    if facts.get("digest", settings.digest) != settings.digest:  # a checkpoint of an earlier version has none
        raise ResumeError(
            "the checkpoint is of a run with another configuration than this server's "
            f"(digest {facts['digest'][:12] or 'none'}, here {settings.digest[:12] or 'none'}); resume it with the "
            "config.yaml that it began with"
        )
    job, plan = facts["job"], _plan(facts["job"])
    state.take_job(
        Job(Layout.from_lists(job["layout"]), plan, _optimizers(job)),
        (LeasedElsewhere if settings.shard else Leases).restored(plan, facts["leases"]),
        FullModel(Layout.from_lists(facts["whole"]), tensors.get("rest"), facts["rest_version"]),
    )
    master = state.take_params(tensors["params"])
    master.version = facts["master"]["version"]
    master.max_lr = tuple(facts["master"]["max_lr"])
    master.shared_counts = _counts(facts["master"], master.layout, master.version)
    for name in master.shared:
        master.shared[name].copy_(tensors[f"shared.{name}"])
    for each in facts["members"]:
        member = _member(each, now)
        member.counts = _counts(each, master.layout, member.updates)
        kept = () if member.left else master.rule.worker_state
        member.vectors = {name: tensors[f"member.{member.worker}.{name}"].clone() for name in kept}
        state.members[member.worker] = member
    state.totals = RunTotals.restored(facts["figures"], now)
    state.health.restore(facts["sick_workers"])
    state.diverged, state.stopped = facts["diverged"], facts.get("stopped", "")
    state.final, state.generation = facts["final"], facts["generation"]
    state.untrained = tensors.get("untrained", state.untrained)
    state.sound = tuple(facts.get("sound", ()))
    _fill_buffers(state, facts, tensors)


def _plan(job: Mapping[str, Any]) -> Plan:
    """A checkpoint of an earlier version has no lengths, because its epochs were all alike."""
    return Plan(**{**job["plan"], "lengths": tuple(job["plan"].get("lengths", ()))})


def _optimizers(job: Mapping[str, Any]) -> Optimizers:
    """A checkpoint of an earlier version of danaz holds the momentum of SGD in their place."""
    return optimizers_from_lists(job.get("optimizers") or ["sgd", [{"momentum": job["momentum"]}]])


def _member(values: Mapping[str, Any], now: float) -> Member:
    state = restored_state(*(values[name] for name in STATE_FACTS))
    others = {name: values[name] for name in LASTING if name not in STATE_FACTS}
    return Member(**others, route=b"", vectors={}, heard_at=now, state=state)


def _counts(values: Mapping[str, Any], layout: Layout, updates: int) -> Counts:
    """The counts of a member, or of the shared state, after ``updates`` updates.

    A checkpoint of an earlier version has one last rate for each parameter group, ``lr``, in place of one for each run.
    Before that, it had no counts, since every gradient had an element for each parameter.
    """
    lists = values.get("counts")
    counts = Counts.from_lists(lists) if lists else Counts.of(layout.size, updates)
    if counts.stops[-1] != layout.size:  # of a member that was known from the journal alone, without a state
        return Counts.of(layout.size)
    return counts.at_rates(layout.groups, values["lr"]) if "lr" in values else counts


def _fill_buffers(state: ServerState, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Restore the buffers. A checkpoint of an earlier version holds separate buffers for each worker that had left."""
    buffers = state.buffers
    if "buffers" in facts:
        buffers.updates = facts["buffers"]["updates"]
        buffers.total, buffers.last = tensors["buffers.total"].clone(), tensors["buffers.last"].clone()
    for number, updates in enumerate(facts.get("buffers_of", ())):
        buffers.updates += updates
        buffers.total.add_(tensors[f"buffers.{number}"], alpha=updates)
        buffers.last = tensors[f"buffers.{number}"].clone()
