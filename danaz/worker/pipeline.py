"""The exchange with the server while the training loop runs: a push, and then, late, a fetch of the next view."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from time import monotonic

from danaz.protocol.messages import Parameters, Push
from danaz.worker.conversation import Conversation

MARGIN = 2.0  # a view is fetched earlier by this number of deviations of the times to compute and to fetch


class Estimate:
    """A running mean and mean deviation, as TCP estimates a round trip (RFC 6298)."""

    def __init__(self) -> None:
        self.mean = self.deviation = 0.0
        self._is_first = True

    def saw(self, value: float) -> None:
        """Take one more value into account."""
        if self._is_first:
            self.mean, self.deviation, self._is_first = value, value / 2, False
            return
        self.deviation += (abs(value - self.mean) - self.deviation) / 4
        self.mean += (value - self.mean) / 8


class FetchDelay:
    """How long after a batch begins to fetch the next view, estimated from the batches and fetches before.

    The view is to arrive just as the batch ends. If it arrives late, the worker waits for it. If it arrives early, it
    is a little older than it could be. Neither is wrong.
    """

    def __init__(self) -> None:
        self._computing, self._fetching = Estimate(), Estimate()

    def saw_batch(self, took_s: float) -> None:
        self._computing.saw(took_s)

    def saw_fetch(self, took_s: float) -> None:
        self._fetching.saw(took_s)

    @property
    def seconds(self) -> float:
        """The delay. It is negative if even a view that is fetched as the batch begins may come late."""
        computing, fetching = self._computing, self._fetching
        return computing.mean - fetching.mean - MARGIN * (computing.deviation + fetching.deviation)


class Pipeline:
    """Runs at most one exchange at a time. From ``begin`` to ``end``, only it may send or receive messages."""

    def __init__(self, conversation: Conversation):
        self._conversation = conversation
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="danaz-pipeline")
        self._under_way: Future[Parameters] | None = None
        self._batch_ended = threading.Event()
        self._began = 0.0
        self._delay = FetchDelay()

    @property
    def busy(self) -> bool:
        return self._under_way is not None

    def begin(self, push: Push | None) -> None:
        """Send ``push``, if there is one, and fetch a view ahead."""
        assert self._under_way is None
        self._batch_ended.clear()
        self._began = monotonic()
        self._under_way = self._thread.submit(self._push_and_fetch, push, self._began + self._delay.seconds)

    def _push_and_fetch(self, push: Push | None, due: float) -> Parameters:
        if push is not None:
            reply = self._conversation.ask(push, Parameters)
            if reply.view.numel():
                return reply  # this worker had to join again, and got a view with that
        self._batch_ended.wait(max(0.0, due - monotonic()))
        began = monotonic()
        fetched = self._conversation.ask(self._conversation.core.pull(ahead=True), Parameters)
        self._delay.saw_fetch(monotonic() - began)
        return fetched

    def wait_for_device(self) -> None:
        """Return when the device has computed the batch, because ``end`` is to be called only then."""
        self._conversation.core.staging.catch_up()

    def end(self) -> Parameters | None:
        """Return the view that was fetched while the batch was computed; None if no exchange was under way.

        Waits for the exchange, and raises what it raised.
        """
        if self._under_way is None:
            return None
        self._delay.saw_batch(monotonic() - self._began)
        self._batch_ended.set()
        under_way, self._under_way = self._under_way, None
        return under_way.result()

    def close(self) -> None:
        """Return when nothing is under way."""
        self._batch_ended.set()
        self._thread.shutdown()
