# SPDX-License-Identifier: Apache-2.0
import pytest
from twisted.internet.defer import Deferred, ensureDeferred

from synapse_lk_jwt.livekit.questions import SharedQuestions


class Server:
    """Answers when the test fires the request's Deferred."""

    def __init__(self) -> None:
        self.requests: list[Deferred[str]] = []

    async def __call__(self) -> str:
        self.requests.append(Deferred())
        return await self.requests[-1]


class Asking:
    """One call of `ask`, and its result."""

    def __init__(self, questions: SharedQuestions[str, str], server: Server, key: str = "") -> None:
        self.results: list[object] = []
        ensureDeferred(questions.ask(key, server)).addBoth(self.results.append)


@pytest.fixture
def server() -> Server:
    return Server()


def test_shared_questions_calls_before_the_answer_share_the_next_request(server: Server) -> None:
    questions: SharedQuestions[str, str] = SharedQuestions()
    first = Asking(questions, server)
    later = [Asking(questions, server) for _ in range(100)]
    assert len(server.requests) == 1
    server.requests[0].callback("old")
    assert first.results == ["old"]
    assert [asking.results for asking in later] == [[]] * 100
    assert len(server.requests) == 2
    server.requests[1].callback("new")
    assert [asking.results for asking in later] == [["new"]] * 100
    assert len(server.requests) == 2


def test_shared_questions_failure_fails_all_that_wait(server: Server) -> None:
    questions: SharedQuestions[str, str] = SharedQuestions()
    asking = [Asking(questions, server) for _ in range(100)]
    server.requests[0].errback(ValueError("no answer"))
    assert len(server.requests) == 1
    for one in asking:
        (failure,) = one.results
        assert "no answer" in str(failure)


def test_shared_questions_after_an_answer_are_asked_again(server: Server) -> None:
    questions: SharedQuestions[str, str] = SharedQuestions()
    Asking(questions, server)
    server.requests[0].callback("old")
    asking = Asking(questions, server)
    server.requests[1].callback("new")
    assert asking.results == ["new"]


def test_shared_questions_of_different_keys_do_not_wait_for_each_other(server: Server) -> None:
    questions: SharedQuestions[str, str] = SharedQuestions()
    Asking(questions, server, "hangs")
    asking = Asking(questions, server, "another")
    server.requests[1].callback("answer")
    assert asking.results == ["answer"]


def test_shared_questions_answered_at_once_are_not_remembered() -> None:
    questions: SharedQuestions[str, int] = SharedQuestions()
    numbers = iter(range(3))

    async def answer() -> int:
        return next(numbers)

    results: list[int] = []
    for _ in range(3):
        ensureDeferred(questions.ask("", answer)).addCallback(results.append)
    assert results == [0, 1, 2]
