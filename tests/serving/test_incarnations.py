"""The last process of a worker that was started counts, whatever the clocks say; and some come too late."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch
from cluster import Cluster
from line import Line, make_worker, train
from sockets import PATIENCE_S, serving, settings_for, silent_server
from stimuli import GRADIENT, JOIN, SIZE, answer, make_core

from danaz.optimizers import Optimizers, Sgd
from danaz.protocol.keys import make_keys
from danaz.protocol.messages import Heartbeat, Noted, Parameters, Push, Refusal, Reply, Request
from danaz.protocol.wire import decode, encode
from danaz.server.completed import CompletedRun
from danaz.server.core import ServerCore
from danaz.worker import link as link_module
from danaz.worker.conversation import RefusedError
from danaz.worker.link import DealerLink, Link
from danaz.worker.states import WorkerState

FUTURE = 1 << 45  # milliseconds, by a clock that is centuries ahead


class TestAClockThatIsSlow:
    def cluster(self) -> Cluster:
        """Return a cluster that goes on from a checkpoint, in which worker 1 had another clock."""
        cluster = Cluster("dana", 2, torch.ones(SIZE))
        cluster.join(1, incarnation=FUTURE)
        cluster.push(1, GRADIENT, 0.1)
        state = cluster.server.snapshot()
        cluster.server = ServerCore(cluster.settings)
        cluster.server.restore(state, [], 1, cluster.now)
        return cluster

    def test_the_server_says_which_is_the_newest(self) -> None:
        cluster = self.cluster()
        cluster.join(1, incarnation=5)
        refusal = cluster.replies[1]
        assert isinstance(refusal, Refusal)
        assert (refusal.newest, refusal.rejoin) == (FUTURE, False)
        cluster.say(1, cluster.workers[1].join())
        cluster.come_back(0)
        assert cluster.server.members[1].incarnation == FUTURE + 1
        assert isinstance(cluster.push(1, GRADIENT, 0.1), Parameters), "its pushes and heartbeats follow"
        assert cluster.server.totals.updates == 2

    def test_a_worker_joins_with_the_next_one(self) -> None:
        line = Line("dana")
        worker = make_worker(line)
        core = worker.conversation.core
        assert core is not None
        layout = core.role.layout
        first = replace(JOIN, incarnation=FUTURE, layout=layout, plan=core.role.plan, ahead=2)
        assert isinstance(line.core.handle(0, replace(first, params=torch.ones(layout.size)), 0.0)[0][1], Parameters)
        train(worker)
        assert line.core.members[0].incarnation == FUTURE + 1
        assert line.core.finished

    def test_who_was_in_the_run_and_was_replaced_does_not_come_back(self) -> None:
        """Otherwise the old process and the new one would take each other's place for ever."""
        cluster = Cluster("dana", 2, torch.ones(SIZE))
        replaced = cluster.workers[1]
        cluster.join(1, incarnation=FUTURE)
        newer = cluster.workers[1]
        cluster.workers[1] = replaced
        replaced.state = WorkerState.JOINED
        refusal = cluster.say(1, replaced.join())
        assert isinstance(refusal, Refusal)
        assert refusal.newest == FUTURE
        assert replaced.role.incarnation == 1
        assert newer.role.incarnation == cluster.server.members[1].incarnation == FUTURE

    def test_a_refusal_that_names_none_is_final(self) -> None:
        core = make_core()
        core.handle(0, JOIN, 0.0)
        for change in ({"digest": "another"}, {"optimizers": Optimizers([Sgd(0.5)] * 3)}):
            refusal = answer(core.handle(0, replace(JOIN, request=2, **change), 0.0))
            assert isinstance(refusal, Refusal)
            assert refusal.newest == 0

    def test_no_other_key_learns_it_or_takes_the_place(self) -> None:
        server_keys, (_, of_one) = make_keys(2)
        core = ServerCore(settings_for(2))
        core.handle(b"worker 0", replace(JOIN, incarnation=FUTURE), 0.0)
        with serving(core, keys=server_keys) as (address, _):
            link = DealerLink(address, Heartbeat(0, 1), give_up_s=PATIENCE_S, keys=of_one)
            refusal = link.exchange(replace(JOIN, incarnation=FUTURE + 1))
            link.close()
        assert refusal == Refusal(0, "worker number is not the one of this key", rejoin=False)
        assert core.members[0].incarnation == FUTURE

    def test_heartbeats_are_those_of_the_process_that_joined(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(link_module, "HEARTBEAT_S", 0.05)
        with silent_server() as (socket, address):
            link = DealerLink(address, Heartbeat(0, 1), give_up_s=PATIENCE_S)
            exchange = threading.Thread(target=link.exchange, args=(replace(JOIN, incarnation=8),))
            exchange.start()
            heard: set[int] = set()
            deadline = time.monotonic() + PATIENCE_S
            while 8 not in heard and time.monotonic() < deadline:
                assert socket.poll(PATIENCE_S * 1000)
                route, *frames = socket.recv_multipart()
                message = decode(frames, Request)
                if isinstance(message, Heartbeat):
                    heard.add(message.incarnation)
                else:
                    socket.send_multipart([route, *encode(Noted(message.request))])
            exchange.join(PATIENCE_S)
            link.close()
        assert 8 in heard


class TestTooLate:
    """The server of a complete run tells this to workers that did not know."""

    class Over(Link):
        def __init__(self, line: Line | None = None, pushes: int = 0):
            self.line, self.pushes, self.asked = line, pushes, []
            self.concluded = CompletedRun()

        def exchange(self, request: Request) -> Reply:
            self.asked.append(request)
            if self.line is not None and sum(isinstance(each, Push) for each in self.asked) <= self.pushes:
                return self.line.exchange(request)
            [(_, reply)] = self.concluded.stream(b"", request, 0.0)
            assert isinstance(reply, Refusal)
            return reply

        def close(self) -> None:
            """Nothing is held."""

    @pytest.mark.parametrize("pipelined", [False, True])
    @pytest.mark.parametrize("pushes", [None, 0, 3])
    def test_a_worker_has_nothing_to_do_and_no_fault(self, pushes, pipelined) -> None:
        """The worker was started again, or was given up and did not know."""
        line = Line("dana")
        over = self.Over(line if pushes is not None else None, pushes or 0)
        worker = make_worker(line)
        worker.conversation.link = over
        if not pipelined:
            worker.pipeline = None
        train(worker, says_good_bye=False)
        assert worker.done
        assert worker.came_late
        assert not worker.batches.any

    def test_any_other_refusal_is_a_fault(self) -> None:
        line = Line("dana")
        worker = make_worker(line)
        assert worker.conversation.core is not None
        worker.conversation.core.role = replace(worker.conversation.core.role, digest="another")
        with pytest.raises(RefusedError, match="different configurations"):
            worker.join(bring_params=True)
        worker.close(in_good_order=False)
