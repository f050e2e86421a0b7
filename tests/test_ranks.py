"""Processes that share a job: the work is divided the same way everywhere, rows come together, a lost rank is noticed."""
import os
import socket

import pytest
import torch
from torch import multiprocessing

from puzzle_core import ranks


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_two_processes(job, *args) -> None:
    """Run `job(ranks, *args)` in two processes with the environment that torchrun gives; raises what either raises."""
    multiprocessing.start_processes(_process, (free_port(), job, args), nprocs=2, start_method="fork")


def _process(rank: int, port: int, job, args) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    with ranks.joined() as mine:
        job(mine, *args)


def test_a_process_of_its_own_is_the_first_of_one():
    with ranks.joined() as alone:
        assert alone == ranks.Ranks(0, 1, 0) and alone.first
        assert alone.mine([3.0, 1.0]) == [0, 1] and alone.gather(["a"]) == ["a"]
        assert alone.tag("score") == "score" and alone.device(torch.device("cpu")) == torch.device("cpu")


def test_work_is_divided_largest_first_and_every_item_once():
    assert ranks.divide([1, 5, 4, 3, 1], 2) == [0, 0, 1, 1, 0]
    work = [16.0 - layer for layer in range(16)]
    for world_size in (1, 3, 5):
        owner = ranks.divide(work, world_size)
        loads = [sum(w for w, o in zip(work, owner, strict=True) if o == rank) for rank in range(world_size)]
        assert max(loads) - min(loads) <= max(work) and max(loads) <= 1.15 * sum(work) / world_size
        parts = [ranks.Ranks(rank, world_size).mine(work) for rank in range(world_size)]
        assert sorted(item for part in parts for item in part) == list(range(16))


def gather_rows(mine: ranks.Ranks, folder) -> None:
    rows = mine.gather([{"rank": mine.rank, "row": i} for i in range(mine.rank + 1)])
    assert rows == [{"rank": 0, "row": 0}, {"rank": 1, "row": 0}, {"rank": 1, "row": 1}]
    (folder / mine.tag("done")).touch()


def test_rows_of_all_ranks_come_together_on_each(tmp_path):
    in_two_processes(gather_rows, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"done", "done.1"}


def lose_one(mine: ranks.Ranks, folder) -> None:
    if not mine.first:
        os._exit(0)
    with pytest.raises(ConnectionError, match="rank 0 of 2 lost another rank.*Run the same command again"):
        mine.wait()
    (folder / "noticed").touch()


def test_a_rank_that_is_lost_is_noticed_by_the_others(tmp_path):
    in_two_processes(lose_one, tmp_path)
    assert (tmp_path / "noticed").exists()
