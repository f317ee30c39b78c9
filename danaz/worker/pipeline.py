"""The exchange with the server while the training loop runs: a push, and then a late fetch of the view to use next."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from time import monotonic

from danaz.protocol.messages import Parameters, Push, Reply
from danaz.worker.core import Request, WorkerCore

Exchange = Callable[[Callable[[WorkerCore], Request]], Reply]
MARGIN = 2.0  # a view is fetched earlier by this number of deviations of the times to compute and to fetch


class Estimate:
    """A running mean and mean deviation, as TCP estimates a round trip (RFC 6298)."""

    def __init__(self) -> None:
        self.mean = self.deviation = 0.0
        self._is_first = True

    def saw(self, value: float) -> None:
        if self._is_first:
            self.mean, self.deviation, self._is_first = value, value / 2, False
            return
        self.deviation += (abs(value - self.mean) - self.deviation) / 4
        self.mean += (value - self.mean) / 8


class Pipeline:
    """Runs at most one exchange at a time. From ``begin`` to ``end``, only it may use the link and the worker core.

    The pipeline estimates from earlier batches when to fetch the view, so that it arrives just as the batch ends. If
    the view arrives late, the worker waits for it. If it arrives early, it is a little older than it could be. Neither
    is wrong.
    """

    def __init__(self, exchange: Exchange):
        self._exchange = exchange
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="danaz-pipeline")
        self._under_way: Future[Parameters] | None = None
        self._batch_ended = threading.Event()
        self._began = 0.0
        self._computing, self._fetching = Estimate(), Estimate()

    @property
    def busy(self) -> bool:
        return self._under_way is not None

    def begin(self, push: Push | None) -> None:
        """Send ``push``, if there is one, and fetch a view ahead."""
        assert self._under_way is None
        self._batch_ended.clear()
        self._began = monotonic()
        self._under_way = self._thread.submit(self._push_and_fetch, push, self._began + self._patience_s)

    @property
    def _patience_s(self) -> float:
        computing, fetching = self._computing, self._fetching
        return computing.mean - fetching.mean - MARGIN * (computing.deviation + fetching.deviation)

    def end(self) -> Parameters | None:
        """The batch has ended: wait for the view that was fetched meanwhile, and return it; None if none was under way.

        Raises the exceptions that the exchange raised.
        """
        if self._under_way is None:
            return None
        self._computing.saw(monotonic() - self._began)
        self._batch_ended.set()
        under_way, self._under_way = self._under_way, None
        return under_way.result()

    def close(self) -> None:
        """Return when nothing is under way."""
        self._batch_ended.set()
        self._thread.shutdown()

    def _push_and_fetch(self, push: Push | None, due: float) -> Parameters:
        if push is not None:
            reply = self._ask(lambda core: push)
            if reply.view.numel():
                return reply  # this worker had to join again, and got a view with that
        self._batch_ended.wait(max(0.0, due - monotonic()))
        began = monotonic()
        fetched = self._ask(lambda core: core.pull(ahead=True))
        self._fetching.saw(monotonic() - began)
        return fetched

    def _ask(self, request: Callable[[WorkerCore], Request]) -> Parameters:
        reply = self._exchange(request)
        assert isinstance(reply, Parameters), "a push or pull is answered so, or refused"
        return reply
