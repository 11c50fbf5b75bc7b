from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch.distributed as dist

from localpipe.errors import RunError
from localpipe.pipeline.workers import attempt as attempts
from localpipe.pipeline.workers.attempt import JobFinishedError, join_attempt, mark_finished

_ENOUGH_S = 20.0


def _ignore(attempt: dist.Store) -> None:
    pass


def join(pool: ThreadPoolExecutor, store: dist.Store, ranks: list[int]) -> list[Future[dist.Store]]:
    """Start to join as some ranks of 3."""
    return [pool.submit(join_attempt, store, rank, 3, _ignore, _ENOUGH_S) for rank in ranks]


def write_and_read(attempts: list[Future[dist.Store]], text: str) -> list[str]:
    """Write as the first, read as all."""
    attempts[0].result().set("job", text)
    return [attempt.result().get("job").decode() for attempt in attempts]


def test_all_ranks_share_a_store_and_the_next_attempt_finds_it_empty() -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as pool:
        assert write_and_read(join(pool, store, [0, 1, 2]), "first") == ["first"] * 3
        again = join(pool, store, [2, 1, 0])
        assert not again[0].result().check(["job"])
        assert write_and_read(again, "second") == ["second"] * 3


def test_a_rank_that_died_while_joining_comes_again() -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(5) as pool:
        with pytest.raises(RunError, match="mesh: rank 1 waited 0.2 s until every rank"):
            join_attempt(store, 1, 3, _ignore, 0.2)
        assert write_and_read(join(pool, store, [0, 1, 2]), "job") == ["job"] * 3


def test_the_others_follow_a_rank_0_that_died_while_joining_and_came_again() -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as pool:
        (waits,) = join(pool, store, [1])
        with pytest.raises(RunError, match="mesh: rank 2 has not started within 0.5 s; look at"):
            join_attempt(store, 0, 3, _ignore, 0.5)
        assert not waits.done()
        assert write_and_read([*join(pool, store, [0, 2]), waits], "job") == ["job"] * 3


def test_a_rank_that_comes_again_ends_the_attempt_before() -> None:
    store = dist.HashStore()
    ended: list[dist.Store] = []
    with ThreadPoolExecutor(3) as pool:
        first = join(pool, store, [0, 1, 2])
        assert write_and_read(first, "first") == ["first"] * 3
        with pytest.raises(RunError):
            join_attempt(store, 2, 3, ended.append, 0.1)
    assert [attempt.get("job") for attempt in ended] == [b"first"]


def test_a_worker_that_comes_again_after_its_run_has_ended_has_nothing_to_do() -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as pool:
        first = [joined.result() for joined in join(pool, store, [0, 1, 2])]
        mark_finished(first[0])
        for rank in (0, 2):
            with pytest.raises(JobFinishedError):
                join_attempt(store, rank, 3, _ignore, 0.2)


def test_what_an_earlier_torchrun_has_left_in_the_store_is_not_this_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as pool:
        first = [joined.result() for joined in join(pool, store, [0, 1, 2])]
        mark_finished(first[0])
        monkeypatch.setattr(attempts, "_identity_key", lambda name: f"torchrun/{name}/another")
        assert write_and_read(join(pool, store, [0, 1, 2]), "second") == ["second"] * 3
