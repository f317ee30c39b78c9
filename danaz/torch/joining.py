"""How a process joins a run: which epoch it begins with, which part of each batch is its own, and whom it talks to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.utils.data import DataLoader

from danaz.protocol.messages import Heartbeat, Inquire, Progress
from danaz.run.rates import lr_scale
from danaz.run.settings import RankInfo, Settings
from danaz.server.core import ServerCore
from danaz.serving.journal import RunWriter
from danaz.serving.progress import with_progress
from danaz.torch.alone import LocalLink
from danaz.torch.carried import weight_decays
from danaz.torch.data import Batching, Share, batching_of, read_ahead
from danaz.torch.joint import JointOptimizer
from danaz.torch.models import has_batch_norm
from danaz.vectors.model import FlatModel
from danaz.vectors.untrained import Untrained
from danaz.worker.conversation import Conversation
from danaz.worker.core import Role, WorkerCore
from danaz.worker.group import Group
from danaz.worker.link import DealerLink, Link
from danaz.worker.sharded import connect
from danaz.worker.staging import IN_PLACE, Staging, staging_for
from danaz.worker.worker import Worker


@dataclass(frozen=True)
class Membership:
    """What a process knows once it can take part in the run."""

    worker: Worker
    batching: Batching
    share: Share
    lr_scale: list[float]  # what each group's learning rate is multiplied by, for the number of workers
    moves_at_once: bool  # whether a worker's own steps are known on the worker, before the server has made them


def machines_per_batch(settings: Settings, place: RankInfo) -> int:
    """Return how many workers' batches make one update: those of all workers under ssgd, otherwise one."""
    return settings.workers if place.server is None else 1


def current_epoch(place: RankInfo, group: Group) -> int:
    """Return the epoch that the cluster is in, so that a process that comes back skips the epochs before."""
    if place.server is None:
        return 0
    epoch = torch.zeros(1, dtype=torch.float64)
    if group.rank == 0:
        link = DealerLink(place.server, Heartbeat(place.worker, place.incarnation), keys=place.keys)
        reply = link.exchange(Inquire(place.worker, place.incarnation, 1))
        link.close()
        epoch[0] = reply.epoch if isinstance(reply, Progress) else 0.0  # a restarted shard cannot say
    group.broadcast(first_epoch=epoch)
    return int(epoch.item())


def make_membership(
    settings: Settings,
    place: RankInfo,
    group: Group,
    optimizer: JointOptimizer,
    loader: DataLoader[object],
    epochs: int,
    seed: int,
) -> Membership:
    """Make this rank's part of a worker, which ``enter`` then lets into the run.

    Raises UnsupportedLoaderError, with the reason, for a loader whose batches cannot be leased.
    """
    flat, has_server = optimizer.flat, place.server is not None
    rule = settings.for_server().rule(optimizer.optimizers)
    pipelined = settings.pipeline and has_server
    # A pipeline holds one more batch: the one that is computed while the last one is pushed.
    ahead = read_ahead(loader) + rule.worker_rule.sync_period - 1 + pipelined
    batching = batching_of(loader, machines_per_batch(settings, place), seed)
    conversation = None
    if group.rank == 0 or not has_server:
        role = Role(
            worker=place.worker if has_server else 0,
            incarnation=place.incarnation,
            digest=settings.digest,
            optimizers=optimizer.optimizers,
            layout=flat.layout,
            plan=batching.plan(epochs),
            ahead=ahead,
        )
        device = flat.params.device
        # A server in this process keeps its vectors on the model's device.
        staging = staging_for(device, role.layout.size) if has_server else IN_PLACE
        compressor = settings.compressor(role.layout)
        core = WorkerCore(role, rule.worker_rule, device, staging, compressor, rule.push_moves_view)
        if has_server:
            link = _link_to_server(place, role, staging)
        else:
            link = _link_in_process(settings, place, group, weight_decays(optimizer.param_groups))
        conversation = Conversation(core, link)
    share = replace(_share_of_batch(settings, place, group), least=2 if has_batch_norm(flat.model) else 1)
    worker = Worker(group, flat, ahead, conversation, replicated=not has_server, pipelined=pipelined)
    worker.sync_period = rule.worker_rule.sync_period
    scale = [
        lr_scale(rule, member.optimizers, settings.lr_scaling, settings.workers)
        for member in optimizer.members
        for _ in member.wrapped.param_groups
    ]
    # In a pipeline, the last push is still on its way, and may not be changed meanwhile.
    moves_at_once = rule.pushes != "gradient" and not pipelined
    return Membership(worker, batching, share, scale, moves_at_once)


def _link_to_server(place: RankInfo, role: Role, staging: Staging) -> Link:
    assert place.server is not None
    heartbeat = Heartbeat(role.worker, role.incarnation)
    dealer = partial(DealerLink, heartbeat=heartbeat, keys=place.keys, staging=staging)
    return connect([place.server, *place.followers], role.layout, dealer, staging)


def _link_in_process(settings: Settings, place: RankInfo, group: Group, decays: tuple[float, ...]) -> Link:
    """Link to a server core in this process. The first rank's core writes the run folder, if there is one."""
    server = settings.for_server(workers=1, weight_decay=decays)
    if place.run is None or group.rank != 0:
        return LocalLink(ServerCore(server))
    folder = RunWriter(place.run, settings.facts())
    core = ServerCore(server)
    core.on_update = with_progress(core, folder.record)
    return LocalLink(core, on_close=partial(folder.finish_at_exit, core))


def _share_of_batch(settings: Settings, place: RankInfo, group: Group) -> Share:
    """Return this rank's part of a batch. A world over all machines splits a batch over the machines first."""
    if place.server is not None or group.size == 1:
        return Share(rank=group.rank, ranks=group.size)
    worker_of_rank = torch.zeros(group.size, dtype=torch.float64)
    worker_of_rank[group.rank] = place.worker
    group.wait(group.sum_async(worker_of_rank, "workers"))
    mine = [rank for rank, worker in enumerate(worker_of_rank.tolist()) if worker == place.worker]
    return Share(place.worker, settings.workers, mine.index(group.rank), len(mine))


def enter(worker: Worker, flat: FlatModel, place: RankInfo) -> None:
    """Join the run, and give all ranks of all workers the same model, whatever each of them has built."""
    group, has_server = worker.group, place.server is not None
    untrained = Untrained(flat.model, flat.trained)
    words = untrained.packed()
    group.broadcast(first_params=flat.params)
    flat.show_params()
    if place.worker == 0 or not has_server:
        worker.join(True, words if has_server and untrained.size else None)
    else:
        worker.join(False)
    if not untrained.size or worker.came_late:
        return
    if has_server and group.rank == 0:
        found = worker.fetch_untrained()
        untrained.load(found)  # this raises an error if the models differ
        words.copy_(found)
    group.broadcast(untrained=words)
    untrained.load(words)
