"""A GPU's pushes and views have the same bits as a CPU's, whatever the order in which its streams do their work."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from cluster import DIGEST, layout_of
from fake_gpu import FakeGpu
from sockets import PATIENCE_S, serving
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from danaz.optimizers import SGD
from danaz.protocol.messages import Heartbeat, Join, Parameters, Plan, Push
from danaz.rules import Context, WorkerRule, find_algorithm
from danaz.rules.base import Vectors
from danaz.server.core import ServerCore
from danaz.server.settings import ServerSettings
from danaz.torch.alone import LocalLink
from danaz.torch.exchange import Verdict
from danaz.torch.optimizer import DistributedOptimizer
from danaz.vectors.codecs import Compressor, push_codec
from danaz.vectors.cutting import SLICE_FLOATS, Spans, chunks
from danaz.vectors.model import FlatModel
from danaz.worker.conversation import Conversation
from danaz.worker.core import Request, Role, Step, WorkerCore
from danaz.worker.group import SoloGroup
from danaz.worker.link import DealerLink
from danaz.worker.sharded import connect
from danaz.worker.staging import IN_PLACE, Cuda, GpuStaging, Staging, staging_for
from danaz.worker.worker import Worker

Work = Callable[[], object]

SIZE, PIECE = 50, 8  # number of floats in a vector, and in each slice that travels
LAYOUT = layout_of(30, 20)


class Slices(GpuStaging):
    """Staging that cuts a small vector into several slices."""

    slice_floats = PIECE


class Launched(WorkerRule):
    """A rule whose arithmetic is launched on the device."""

    def __init__(self, rule: WorkerRule, launch: Callable[[Work], object]):
        self.pushes, self.worker_state = rule.pushes, rule.worker_state
        self._rule, self._launch = rule, launch

    def push(self, out: Tensor, grad: Tensor, old: Vectors, new: Vectors, ctx: Context) -> None:
        self._launch(lambda: self._rule.push(out, grad, old, new, ctx))


class Loop:
    """A training loop whose forward, backward and rule are launched, and a link to a server that sends anything."""

    def __init__(self, staging: Staging, launch: Callable[[Work], object], codec: str, device: str = "cpu"):
        rule = Launched(find_algorithm("dana").rule().worker_rule, launch)
        compressor = None if codec == "fp32" else Compressor(push_codec(codec), list(chunks(SIZE)))
        self.core = WorkerCore(Role(0, 1, DIGEST, SGD, LAYOUT, Plan(99, 1)), rule, device, staging, compressor)
        self.staging, self.launch = staging, launch
        self.params, self.grad = torch.ones(SIZE, device=device), torch.zeros(SIZE, device=device)
        self.rooms = [staging.room(SIZE), staging.room(SIZE)]
        self.views = torch.Generator().manual_seed(5)
        self.version = 0
        self.sent: list[list[float | None]] = []  # vectors and losses, as the link found them

    def exchange(self, request: Request, with_view: bool = True) -> Tensor:
        """Do the link's part. It receives into a room no matter what the room still holds."""
        request = self.core.complete(request)
        if isinstance(request, Join):
            assert request.params is not None
            self.sent.append(request.params.tolist())
        if isinstance(request, Push):
            self.sent.append([*request.push.tolist(), request.loss])
        view = self._receive() if with_view else torch.empty(0)
        applied = isinstance(request, Push)
        self.core.receive(Parameters(request.request, self.version, applied, "", (0,), False, 0.0, 0, None, view))
        return view

    def _receive(self) -> Tensor:
        values = torch.randn(SIZE, generator=self.views)
        self.version += 1
        if self.version % 3 == 0:
            return values  # short views come in one piece
        room = self.rooms[1].fill_(torch.nan)
        for start, stop in ((start, start + PIECE) for start in range(0, SIZE, PIECE)):
            room[start:stop] = values[start:stop]
            self.staging.arrived(room[start:stop])
        self.rooms.reverse()
        return room

    def compute(self, view: Tensor) -> None:
        self.staging.load(self.params, view)
        self.launch(lambda: self.grad.copy_(self.params.sin()))

    def push(self, step: int, wants_view: bool) -> Push:
        loss = torch.tensor(float(step), dtype=torch.float64, device=self.grad.device)
        return self.core.push(Step(0, (0.1, 0.2 / (1 + step)), 1, loss), self.grad, wants_view=wants_view)


def one_after_the_other(loop: Loop) -> None:
    view = loop.exchange(loop.core.join(loop.staging.lift(loop.params)))
    for step in range(6):
        loop.compute(view)
        view = loop.exchange(loop.push(step, wants_view=True))
        for _ in range(step):  # load the view again without computing a batch
            loop.staging.load(loop.params, view)
            view = loop.exchange(loop.core.pull())


def in_a_pipeline(loop: Loop) -> None:
    loop.compute(loop.exchange(loop.core.join(loop.staging.lift(loop.params))))
    fetched = loop.exchange(loop.core.pull(ahead=True))
    for step in range(6):
        push = loop.push(step, wants_view=False)
        loop.compute(fetched)
        loop.exchange(push, with_view=False)
        fetched = loop.exchange(loop.core.pull(ahead=True))


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
@pytest.mark.parametrize("train", [one_after_the_other, in_a_pipeline])
def test_the_link_sends_the_same_bits_as_without_a_gpu(train, codec):
    expected = Loop(IN_PLACE, lambda work: work(), codec)
    train(expected)
    for seed in range(40):
        gpu = FakeGpu(seed)
        loop = Loop(Slices(gpu, SIZE), gpu.launch, codec)
        train(loop)
        assert loop.sent == expected.sent, f"seed {seed}"


def test_in_a_pipeline_only_the_link_waits_for_the_device():
    gpu = FakeGpu(0, eagerness=0)
    loop = Loop(Slices(gpu, SIZE), gpu.launch, "fp32")
    loop.compute(loop.exchange(loop.core.join(loop.staging.lift(loop.params))))
    fetched = loop.exchange(loop.core.pull(ahead=True))
    before = gpu.waits
    push = loop.push(0, wants_view=False)
    loop.compute(fetched)
    assert gpu.waits == before
    assert push.push.isnan().all(), "nothing has arrived yet, so a link that sent it now would send NaN"
    assert not loop.core.complete(push).push.isnan().any()
    assert gpu.waits > before


def test_in_a_pipeline_the_batch_ends_when_the_device_has_computed_it(monkeypatch):
    """Otherwise the next view would be fetched when the batch begins."""
    gpu, flat, computed = FakeGpu(0, eagerness=0), FlatModel(nn.Linear(2, 2)), []
    core = WorkerCore(Role(0, 1, "", SGD, flat.layout, Plan(9, 1)), WorkerRule(), "cpu", GpuStaging(gpu, 6))
    link = LocalLink(ServerCore(ServerSettings("dana", 1)))
    worker = Worker(SoloGroup(), flat, 1, Conversation(core, link), pipelined=True)

    class BatchEnded(Exception):
        pass

    def end() -> None:
        assert computed == ["backward"]
        raise BatchEnded

    monkeypatch.setattr(worker.pipeline, "end", end)
    gpu.launch(lambda: computed.append("backward"))
    assert computed == []
    with pytest.raises(BatchEnded):
        worker.push(Step(0, (0.1,), 1, None), flat.grads)
    monkeypatch.undo()
    worker.close(in_good_order=False)


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Parameter(torch.ones(2 * SLICE_FLOATS + 999)), nn.Parameter(torch.ones(77))


class Reads(TorchDispatchMode):
    """Counts the numbers that this thread reads from tensors. On a GPU, each read waits for all launched work."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Live:
    """A worker that trains to the end over sockets. It notes what it computed on, and how many reads each step made."""

    def __init__(self, shards: int, pipelined: bool, sync_period: int | None, gpu: FakeGpu | None):
        model = Weights()
        sgd = torch.optim.SGD(
            [{"params": [model.outer], "lr": 0.1}, {"params": [model.inner]}], lr=0.05, momentum=0.9, nesterov=True
        )
        self.optimizer = DistributedOptimizer(sgd, model, SoloGroup())
        self.params, layout = self.optimizer.flat.params, self.optimizer.flat.layout
        self.seen, self.reads = [], []
        staging = IN_PLACE if gpu is None else GpuStaging(gpu, layout.size)
        servers = [
            ServerSettings("dana", 1, "", sync_period=sync_period, gap_every=0, shard=shard, shards=shards)
            for shard in range(shards)
        ]
        rule = servers[0].rule()
        with ExitStack() as stack:
            addresses = [stack.enter_context(serving(ServerCore(each)))[0] for each in servers]
            dealer = partial(DealerLink, heartbeat=Heartbeat(0, 1), give_up_s=PATIENCE_S, staging=staging)
            role = Role(0, 1, "", SGD, layout, Plan(12, 1), ahead=4)
            core = WorkerCore(role, rule.worker_rule, "cpu", staging, push_moves_view=rule.push_moves_view)
            link = connect(addresses, layout, dealer, staging)
            self.worker = Worker(SoloGroup(), self.optimizer.flat, 4, Conversation(core, link), pipelined=pipelined)
            self.worker.sync_period = rule.worker_rule.sync_period
            self.optimizer.joint.connect(self)
            self.train()

    def is_edited(self) -> bool:
        return self.worker.is_edited()

    def push(self, grad: Tensor, absent: Spans, verdict: Verdict) -> None:
        self.worker.push(Step(self.worker.batches.begin(), tuple(verdict.lr), 1, verdict.loss, absent), grad)

    def skip(self) -> None:
        raise AssertionError("every batch makes a step")

    def train(self) -> None:
        self.worker.join(bring_params=True)
        while not self.worker.done:
            if not self.worker.batches.any:
                self.worker.pull()
                continue
            self.seen.append(self.params.clone())
            loss = sum(p.cos().sum() for p in self.optimizer.flat.trained)
            self.optimizer.zero_grad()
            loss.backward()
            with Reads() as reads:
                self.optimizer.step()
            self.reads.append(reads.count)
        self.worker.leave()
        self.worker.close(in_good_order=True)
        self.seen.append(self.params.clone())


@pytest.mark.parametrize(
    ("shards", "pipelined", "sync_period"), [(1, False, None), (1, True, None), (1, False, 3), (3, False, None)]
)
def test_training_over_sockets_gives_the_same_bits(shards, pipelined, sync_period):
    expected = Live(shards, pipelined, sync_period, None)
    assert len(expected.seen) == 13
    for seed in range(3):
        gpu = FakeGpu(seed, launches_block=True)
        live = Live(shards, pipelined, sync_period, gpu)
        for step, (one, other) in enumerate(zip(live.seen, expected.seen, strict=True)):
            assert torch.equal(one, other), f"seed {seed}, step {step}"
        assert gpu.brought <= SLICE_FLOATS, "a view is brought to the device slice by slice, as it arrives"


def test_a_step_reads_nothing_from_the_device():
    """The only exception is what the link reads for each slice of a view, and those numbers are in host memory."""
    in_a_pipeline = Live(1, True, None, None).reads
    assert in_a_pipeline[:-1] == [2] * 11, (
        "the smallest and the largest value of a push that it computes on before it is applied"
    )
    assert in_a_pipeline[-1] > 2, "no batch follows the last push, so the training loop itself makes that exchange"
    with_local_steps = Live(1, False, 3, None).reads
    assert [reads > 0 for reads in with_local_steps] == [False, False, True] * 4


def test_on_a_cpu_a_push_is_not_copied():
    staging = staging_for(torch.device("cpu"), SIZE)
    vector = torch.ones(SIZE)
    assert staging is IN_PLACE
    assert staging.lift(vector) is vector


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies to and from a GPU")
@pytest.mark.parametrize("train", [one_after_the_other, in_a_pipeline])
def test_on_a_gpu(train):
    expected = Loop(IN_PLACE, lambda work: work(), "fp32")
    loop = Loop(Slices(Cuda(torch.device("cuda")), SIZE), lambda work: work(), "fp32", "cuda")
    train(expected)
    train(loop)
    torch.testing.assert_close(torch.tensor(loop.sent), torch.tensor(expected.sent))
