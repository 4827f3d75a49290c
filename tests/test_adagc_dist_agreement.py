"""Whatever ranks are asked and whenever: they answer alike, at the same step."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adagc_dist.agreement import Agreement, Answer, NoRequests, Requests, Stopped
from adagc_dist.comm import Comm
from adagc_dist.reasons import StopReason
from tests.ranks import run_ranks, run_threads

STEPS = 6
QUIET = Answer(None, False)


class Scripted(NoRequests):
    """Requests that a test makes."""

    def __init__(self) -> None:
        self.stop: StopReason | None = None  # type: ignore[assignment]
        self.save = False
        self.told: list[StopReason] = []

    def stopping(self, reason: StopReason) -> None:
        self.told.append(reason)


Script = Sequence[tuple[int, int, StopReason | str]]  # at a step, a rank is asked to stop, or to "save"


def answers(comm: Comm, script: Script, *, late: bool = False) -> list[Answer]:
    """Of all steps; ``late``: what is asked for comes between question and answer."""
    requests = Scripted()
    agreement = Agreement(comm, requests)
    found = []
    for step in range(STEPS):
        if late:
            agreement.ask()
        requests.save = False
        for at, rank, asked in script:
            if (at, rank) == (step, comm.rank):
                if isinstance(asked, StopReason):
                    requests.stop = requests.stop or asked
                else:
                    requests.save = True
        if not late:
            agreement.ask()
        found.append(agreement.answer())
    return found


def expected(script: Script, step: int) -> Answer:
    """From the first request on; of several reasons the first in the order of StopReason."""
    first: dict[int, StopReason] = {}
    for at, rank, asked in sorted(script, key=lambda event: event[0]):
        if isinstance(asked, StopReason) and at <= step:
            first.setdefault(rank, asked)
    stop = min(first.values(), key=list(StopReason).index) if first else None
    return Answer(stop, any((at, rank, asked) == (step, 0, "save") for at, rank, asked in script))


@st.composite
def scripts(draw: st.DrawFn) -> tuple[int, Script]:
    size = draw(st.integers(1, 4))
    event = st.tuples(
        st.integers(0, STEPS - 1), st.integers(0, size - 1), st.one_of(st.sampled_from(StopReason), st.just("save"))
    )
    return size, draw(st.lists(event, max_size=6))


@settings(max_examples=60, deadline=None)
@given(scripts())
def test_all_ranks_get_the_same_answer_at_the_same_step(case: tuple[int, Script]) -> None:
    size, script = case
    found = run_threads(size, lambda comm: answers(comm, script))
    assert found == [[expected(script, step) for step in range(STEPS)]] * size


def test_what_is_asked_between_question_and_answer_counts_at_the_next_step() -> None:
    script: Script = [(2, 1, StopReason.SIGTERM)]
    found = run_threads(3, lambda comm: answers(comm, script, late=True))
    assert found == [[QUIET] * 3 + [Answer(StopReason.SIGTERM, False)] * 3] * 3


def test_processes_agree_as_threads_do() -> None:
    script: Script = [(1, 0, "save"), (2, 1, "save"), (3, 1, StopReason.BUDGET), (4, 0, StopReason.SIGUSR1)]
    budget = Answer(StopReason.BUDGET, False)
    expected = [QUIET, Answer(None, True), QUIET, budget, Answer(StopReason.SIGUSR1, False)]
    assert [found[:5] for found in run_ranks(2, answers, script)] == [expected] * 2


def test_a_rank_that_was_not_asked_is_told_the_reason() -> None:
    def check(comm: Comm) -> tuple[StopReason, list[StopReason]]:
        requests = Scripted()
        agreement = Agreement(comm, requests)
        agreement.check()
        requests.stop = StopReason.SIGINT if comm.rank == 2 else None
        with pytest.raises(Stopped) as stopped:
            agreement.check()
        return stopped.value.reason, requests.told

    assert run_threads(3, check) == [(StopReason.SIGINT, [StopReason.SIGINT])] * 3


def test_nobody_asks_for_anything() -> None:
    requests: Requests = NoRequests()

    def check(comm: Comm) -> bool:
        Agreement(comm, requests).check()
        return True

    assert run_threads(2, check) == [True, True]
