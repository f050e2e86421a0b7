"""Processes that share one job under torchrun: who am I, which part is mine, and bringing the rows together.

Layers are independent of each other, so bld and score divide their work by layer, and no gradient travels between them: only
finished rows do. A process that torchrun did not start (`launcher`) is rank 0 of 1, and everything here does nothing for it.
"""
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from puzzle_core.errors import UserError
from puzzle_core.launcher import is_launched

PATIENCE = timedelta(days=7)  # a rank with little to do waits for the busiest; a rank that dies is noticed at once


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on this machine

    @property
    def first(self) -> bool:
        """The one that locks the output, writes the tables and talks."""
        return self.rank == 0

    def tag(self, name: str) -> str:
        """`name` for rank 0, `name.RANK` for the others: what each rank writes or locks on its own."""
        return name if self.first else f"{name}.{self.rank}"

    def device(self, device: torch.device) -> torch.device:
        """`device`, or this process' own GPU of the machine; ValueError if there are fewer GPUs than processes."""
        if device.type != "cuda":
            return device
        if self.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {self.local_rank} of this machine has no GPU: torch sees {torch.cuda.device_count()}. "
                "Start as many processes as there are GPUs: launcher.processes=gpu"
            )
        own = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(own)
        return own

    def mine(self, work: list[float]) -> list[int]:
        """Which of the items, whose work is estimated in any unit, are this rank's."""
        return [item for item, rank in enumerate(divide(work, self.world_size)) if rank == self.rank]

    def mine_in_order(self, work: list[float], reach: list[float]) -> list[int]:
        """Which of the items, done in order, are this rank's; see `divide_in_order`."""
        return [item for item, rank in enumerate(divide_in_order(work, reach, self.world_size)) if rank == self.rank]

    def gather(self, rows: list) -> list:
        """The rows of all ranks, rank by rank, on every rank; waits for the slowest.

        Raises ConnectionError where another rank has stopped.
        """
        if self.world_size == 1:
            return rows
        parts: list = [None] * self.world_size
        try:
            dist.all_gather_object(parts, rows)
        except RuntimeError as error:
            raise ConnectionError(
                f"rank {self.rank} of {self.world_size} lost another rank, whose own message says why. "
                "Run the same command again: what was finished is kept."
            ) from error
        return [row for part in parts for row in part]

    def wait(self) -> None:
        """Until every rank is here."""
        self.gather([])


ALONE = Ranks()


def divide(work: list[float], world_size: int) -> list[int]:
    """The rank of each item: the largest first, each to the rank with the least work so far; ties to the lower number."""
    loads, owner = [0.0] * world_size, [0] * len(work)
    for item in sorted(range(len(work)), key=lambda item: (-work[item], item)):
        owner[item] = min(range(world_size), key=lambda rank: (loads[rank], rank))
        loads[owner[item]] += work[item]
    return owner


def divide_in_order(work: list[float], reach: list[float], world_size: int) -> list[int]:
    """The rank of each item where a rank takes neighbours: the fullest rank has as little as it can.

    A rank's load is the `work` of its items and what it costs to `reach` its last one (never less than the one before).
    """

    def filled(limit: float) -> list[int]:
        """Each rank takes items up to `limit`, so this needs the fewest ranks."""
        owner, rank, load = [], 0, 0.0
        for own, there in zip(work, reach, strict=True):
            if load and load + own + there > limit:
                rank, load = rank + 1, 0.0
            load += own
            owner.append(rank)
        return owner

    if not work:
        return []
    low, high = max(map(sum, zip(work, reach, strict=True))), sum(work) + max(reach)
    for _ in range(60):  # halves the error each time, down to what a float can tell
        middle = (low + high) / 2
        low, high = (low, middle) if filled(middle)[-1] < world_size else (middle, high)
    return [min(rank, world_size - 1) for rank in filled(high)]  # a sum in another order may be an ulp off


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that torchrun started, told by its environment variables; alone without them.

    Rows travel over gloo: they are small and live in main memory, whatever the devices are. NCCL is for what lives on GPUs.
    """
    if not is_launched():
        yield ALONE
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))
    finally:
        dist.destroy_process_group()
