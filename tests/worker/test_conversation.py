"""A worker asks its server: what it does after each kind of refusal, and which answer it goes on with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cluster import DIGEST, layout_of

from danaz.optimizers import SGD
from danaz.protocol.messages import Fetched, Final, Join, Leave, Noted, Parameters, Plan, Push, Refusal, Reply
from danaz.protocol.refusals import COMPLETE
from danaz.rules import find_algorithm
from danaz.worker.conversation import Conversation, RefusedError
from danaz.worker.core import Request, Role, Step, WorkerCore

SIZE = 3
NO_BUFFERS = torch.empty(0)
Answer = Callable[[Request], Reply]


class ScriptedLink:
    """Answers each request with the next of the answers that the test gives."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.heard: list[Request] = []

    def exchange(self, request: Request) -> Reply:
        self.heard.append(request)
        return self.answers.pop(0)(request)

    def close(self) -> None:
        """Do nothing, because nothing is held."""


def view(*, version: int = 0, applied: bool = False, done: bool = False) -> Answer:
    return lambda request: Parameters(
        request.request, version, applied, "", (0, 1), done, 0.0, 0, None, torch.zeros(SIZE)
    )


def refusal(reason: str = "given up", *, rejoin: bool = False, newest: int = 0) -> Answer:
    return lambda request: Refusal(request.request, reason, rejoin=rejoin, newest=newest)


def final(request: Request) -> Final:
    return Final(request.request, 1, False, torch.ones(SIZE), NO_BUFFERS)


@pytest.fixture
def link() -> ScriptedLink:
    return ScriptedLink()


@pytest.fixture
def conversation(link: ScriptedLink) -> Conversation:
    """Return a conversation whose worker has joined, as its first incarnation."""
    rule = find_algorithm("dana").rule().worker_rule
    conversation = Conversation(WorkerCore(Role(0, 1, DIGEST, SGD, layout_of(SIZE), Plan(10, 1)), rule), link)
    link.answers = [view()]
    conversation.ask(conversation.core.join(torch.zeros(SIZE)), Parameters)
    link.heard.clear()
    return conversation


def push(conversation: Conversation) -> Push:
    return conversation.core.push(Step(0, (0.1,), 1, 1.0), torch.ones(SIZE))


def test_a_push_that_is_refused_because_the_worker_was_given_up_is_answered_by_the_view_of_the_next_join(
    conversation, link
) -> None:
    link.answers = [refusal(rejoin=True), view(version=5)]
    assert conversation.ask(push(conversation), Parameters).version == 5
    assert [type(request) for request in link.heard] == [Push, Join]
    assert conversation.refused_pushes == 1


def test_pushes_that_are_not_applied_are_counted(conversation, link) -> None:
    for applied in (True, False, True, False):
        link.answers = [view(applied=applied)]
        conversation.ask(push(conversation), Parameters)
    assert conversation.refused_pushes == 2


def test_a_leave_is_made_again_after_the_worker_has_joined_again(conversation, link) -> None:
    link.answers = [refusal(rejoin=True), view(done=True), final]
    left = conversation.ask(conversation.core.leave(NO_BUFFERS), Final)
    assert left.params.tolist() == [1, 1, 1]
    first, join, second = link.heard
    assert isinstance(first, Leave)
    assert isinstance(join, Join)
    assert isinstance(second, Leave)
    assert first.request < join.request < second.request
    assert (first.done, second.done) == (False, True), "the view of the join said that the run is over"


def test_a_worker_that_left_a_complete_run_does_not_leave_one_that_went_back(conversation, link) -> None:
    link.answers = [view(done=True)]
    conversation.ask(conversation.core.pull(), Parameters)
    link.answers = [refusal(rejoin=True), view(done=False)]
    with pytest.raises(RefusedError, match="went back to before the end of the run"):
        conversation.ask(conversation.core.leave(NO_BUFFERS), Final)


def test_an_incarnation_that_is_not_the_newest_joins_as_a_newer_one(link) -> None:
    rule = find_algorithm("dana").rule().worker_rule
    conversation = Conversation(WorkerCore(Role(0, 4, DIGEST, SGD, layout_of(SIZE), Plan(10, 1)), rule), link)
    link.answers = [refusal("replaced", newest=7), view()]
    params, untrained = torch.ones(SIZE), torch.ones(2)
    conversation.ask(conversation.core.join(params, untrained), Parameters)
    first, second = link.heard
    assert (first.incarnation, second.incarnation) == (4, 8)
    assert (second.params, second.untrained) == (params, untrained), "it brings the same once more"


@pytest.mark.parametrize("make", [push, lambda conversation: conversation.core.pull()])
def test_a_run_that_is_complete_leaves_nothing_to_do(conversation, link, make) -> None:
    link.answers = [refusal(COMPLETE)]
    answer = conversation.ask(make(conversation), Parameters)
    assert (answer.done, answer.leases) == (True, ())
    assert conversation.came_late
    assert conversation.refused_pushes == 0


def test_any_other_refusal_is_an_error(conversation, link) -> None:
    link.answers = [refusal("another configuration")]
    with pytest.raises(RefusedError, match="refused this worker's push: another configuration"):
        conversation.ask(push(conversation), Parameters)


def test_an_answer_of_another_kind_is_an_error(conversation, link) -> None:
    link.answers = [refusal(rejoin=True), view()]
    with pytest.raises(RefusedError, match="answered this worker's fetch with Parameters"):
        conversation.ask(conversation.core.fetch(), Fetched)


def test_a_refused_report_or_good_bye_ends_nothing(conversation, link) -> None:
    link.answers = [final, refusal("too many"), refusal("unknown")]
    conversation.ask(conversation.core.leave(NO_BUFFERS), Final)
    assert isinstance(conversation.send(conversation.core.report({})), Refusal)
    assert isinstance(conversation.send(conversation.core.bye()), Refusal)
    link.answers = [lambda request: Noted(request.request)]
    assert isinstance(conversation.send(conversation.core.bye()), Noted)
