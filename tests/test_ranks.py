"""The rank harness itself: what it returns, and that no failure of a rank goes unseen or outlives its test."""

import os
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

from tests.gpus import rotated
from tests.ranks import RankFailure, RankPool

Ranks = Callable[..., RankPool]


@dataclass(frozen=True)
class Parcel:
    """An argument and a result whose class lives in a test file."""

    rank: int


def own_rank() -> int:
    return dist.get_rank()


def wrap(parcel: Parcel, *, plus: int) -> Parcel:
    return Parcel(parcel.rank + plus + dist.get_rank())


def all_reduced(device_type: str) -> float:
    value = torch.full((3,), float(dist.get_rank() + 1), device=device_type)
    dist.all_reduce(value)
    return value.sum().item()


def environment() -> dict[str, str]:
    return {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}


def hash_of_a_text() -> int:
    return hash("a text")


def process_id() -> int:
    return os.getpid()


def skip_on(*ranks: int) -> None:
    if dist.get_rank() in ranks:
        pytest.skip("not today")


def compare_unequal_tensors() -> None:
    torch.testing.assert_close(torch.zeros(2), torch.ones(2))


def warn() -> None:
    warnings.warn("it will go", FutureWarning, stacklevel=1)


def return_a_lambda() -> object:
    return lambda: None


def go_wrong(how: str, culprit: int) -> None:
    """Let one rank go wrong while the others wait for it in a collective."""
    if dist.get_rank() != culprit:
        dist.barrier()
    elif how == "raise":
        assert dist.get_rank() < culprit
    elif how == "exit":
        os._exit(3)
    elif how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "hang":
        time.sleep(600)


def hang_alone(culprit: int) -> None:
    if dist.get_rank() == culprit:
        time.sleep(600)


def raise_like_a_victim_first(culprit: int) -> None:
    if dist.get_rank() == culprit:
        time.sleep(0.3)
        raise ValueError("the cause")
    raise RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1234")


@pytest.mark.ranks(4)
def test_results_come_in_rank_order(ranks: Ranks) -> None:
    assert ranks().run(own_rank) == [0, 1, 2, 3]


@pytest.mark.ranks(2)
def test_arguments_and_results_of_a_test_files_own_class_travel(ranks: Ranks) -> None:
    assert ranks().run(wrap, Parcel(10), plus=5) == [Parcel(15), Parcel(16)]


@pytest.mark.ranks(2)
def test_all_reduce_sums_over_two_ranks(ranks: Ranks) -> None:
    pool = ranks()
    assert pool.run(all_reduced, pool.device_type) == [9.0, 9.0]


@pytest.mark.gpu
@pytest.mark.ranks(2)
def test_ranks_with_gpus_reduce_on_them(ranks: Ranks) -> None:
    assert ranks().device_type == "cuda"
    assert ranks().run(all_reduced, "cuda") == [9.0, 9.0]


@pytest.mark.ranks(1)
def test_one_rank_is_a_world_too(ranks: Ranks) -> None:
    assert ranks().run(all_reduced, "cpu") == [3.0]


@pytest.mark.ranks(2)
def test_ranks_see_torchruns_environment(ranks: Ranks) -> None:
    sizes = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    assert ranks().run(environment) == [sizes | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


@pytest.mark.ranks(4)
def test_neighbours_have_hash_seeds_of_their_own(ranks: Ranks) -> None:
    found = ranks().run(hash_of_a_text)
    assert all(one != other for one, other in pairwise(found))


@pytest.mark.ranks(2)
def test_one_set_of_processes_serves_all_tests(ranks: Ranks) -> None:
    assert ranks().run(process_id) == ranks(2).run(process_id)


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("how", "headline"),
    [
        ("raise", "rank 2 raised AssertionError"),
        ("exit", "rank 2 died with exit code 3"),
        ("kill", "rank 2 died with exit code -9 (SIGKILL)"),
    ],
)
def test_the_culprit_is_named_first_while_others_wait_for_it(ranks: Ranks, how: str, headline: str) -> None:
    with pytest.raises(RankFailure) as failure:
        ranks().run(go_wrong, how, 2)
    assert str(failure.value).startswith(headline)
    if how == "raise":
        assert "assert dist.get_rank() < culprit" in str(failure.value)
        assert "still running after 1 s after the first failure: rank 0, 1, 3" in str(failure.value)
    assert ranks().run(own_rank) == [0, 1, 2, 3]


@pytest.mark.ranks(2)
def test_a_rank_that_hangs_is_named_within_the_limit(ranks: Ranks) -> None:
    ranks().run(own_rank)
    with pytest.raises(RankFailure, match="^still running after 2 s: rank 1\n") as failure:
        ranks().run(hang_alone, 1, timeout_s=2)
    assert "hang_alone" in str(failure.value).split("rank 1 is here:")[1]
    assert ranks().run(own_rank) == [0, 1]


@pytest.mark.ranks(2)
def test_ranks_that_wait_for_one_that_hangs_show_where_each_is(ranks: Ranks) -> None:
    with pytest.raises(RankFailure, match="^still running after 2 s: rank 0, 1\n") as failure:
        ranks().run(go_wrong, "hang", 1, timeout_s=2)
    waiting, hanging = str(failure.value).split("rank 1 is here:")
    assert "barrier" in waiting
    assert "barrier" not in hanging


@pytest.mark.ranks(4)
def test_a_victim_that_reports_first_is_not_the_first_named(ranks: Ranks) -> None:
    with pytest.raises(RankFailure, match="^rank 3 raised ValueError: the cause"):
        ranks().run(raise_like_a_victim_first, 3)


@pytest.mark.ranks(2)
def test_the_first_line_names_the_error_when_its_message_is_long(ranks: Ranks) -> None:
    with pytest.raises(RankFailure, match="^rank 0 raised AssertionError: Tensor-likes are not close!"):
        ranks().run(compare_unequal_tensors)


@pytest.mark.ranks(2)
def test_a_rank_that_died_between_two_runs_is_named(ranks: Ranks) -> None:
    os.kill(ranks().run(process_id)[1], signal.SIGKILL)
    with pytest.raises(RankFailure, match="^rank 1 died with exit code -9"):
        ranks().run(own_rank)


@pytest.mark.ranks(2)
def test_a_warning_in_a_rank_is_an_error(ranks: Ranks) -> None:
    with pytest.raises(RankFailure, match="^rank 0 raised FutureWarning: it will go"):
        ranks().run(warn)


@pytest.mark.ranks(2)
@pytest.mark.filterwarnings("ignore:it will go")
def test_a_tests_own_warning_filter_holds_in_its_ranks(ranks: Ranks) -> None:
    ranks().run(warn)


@pytest.mark.ranks(2)
def test_a_result_that_cannot_be_pickled_fails(ranks: Ranks) -> None:
    with pytest.raises(RankFailure, match="return_a_lambda"):
        ranks().run(return_a_lambda)


@pytest.mark.ranks(2)
def test_a_test_is_skipped_when_all_its_ranks_skip(ranks: Ranks) -> None:
    with pytest.raises(pytest.skip.Exception, match="not today"):
        ranks().run(skip_on, 0, 1)


@pytest.mark.ranks(2)
def test_a_skip_of_some_ranks_only_is_a_failure(ranks: Ranks) -> None:
    with pytest.raises(RankFailure, match="^rank 1 skipped not today"):
        ranks().run(skip_on, 1)


@pytest.mark.ranks(2)
def test_a_nested_body_is_refused(ranks: Ranks) -> None:
    with pytest.raises(TypeError, match="must stand at the top of its file"):
        ranks().run(lambda: None)


def test_processes_that_share_gpus_begin_with_different_ones_and_see_all() -> None:
    orders = [rotated(["2", "3", "5"], worker) for worker in ("gw0", "gw1", "gw2", "gw3")]
    assert orders == ["2,3,5", "3,5,2", "5,2,3", "2,3,5"]
