"""One stage as several processes: torchrun starts them, on this machine or on several, each running the same command.

A stage that can share its work is marked `@stage("bld", launches=True)`; inside it, `ranks.joined()` says which process it
is. `launcher` in params.yaml says how many there are. It determines no result, so no stage of dvc.yaml declares it.
"""
import os
import signal
import subprocess
import sys
from dataclasses import dataclass

from puzzle_core.errors import UserError


def is_launched() -> bool:
    """Whether torchrun has started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


@dataclass(frozen=True)
class Launcher:
    """How many processes share a stage: `launcher` in params.yaml."""

    processes: int | str = 1  # on each machine; gpu: as many as it has GPUs
    nodes: int = 1
    rendezvous: str | None = None  # HOST:PORT of the first node, where several find each other

    def __post_init__(self):
        if self.processes != "gpu" and not (isinstance(self.processes, int) and self.processes > 0):
            raise UserError(f"launcher.processes is '{self.processes}'; expected a number of processes on each machine, or gpu")
        if not (isinstance(self.nodes, int) and self.nodes > 0):
            raise UserError(f"launcher.nodes is '{self.nodes}'; expected a number of machines")
        if self.nodes > 1 and not self.rendezvous:
            raise UserError(
                f"launcher.nodes is {self.nodes}, and launcher.rendezvous does not say where they meet: HOST:PORT of one of them, "
                "the same for all; each of them runs this command"
            )

    @property
    def wanted(self) -> bool:
        return (self.processes, self.nodes) != (1, 1)

    def command(self, stage: str, overrides: list[str]) -> list[str]:
        """torchrun's, for the module of `stage` with Hydra `overrides`."""
        where = ["--standalone"]
        if self.nodes > 1:
            meeting = f"--rdzv-endpoint={self.rendezvous}", f"--rdzv-id=puzzle-{stage}"
            where = [f"--nnodes={self.nodes}", "--rdzv-backend=c10d", *meeting]
        module = f"stages.{stage.replace('-', '_')}"
        return [sys.executable, "-m", "torch.distributed.run", *where, f"--nproc-per-node={self.processes}", "-m", module, *overrides]

    def run(self, stage: str, overrides: list[str]) -> None:
        """Run `stage` in all its processes and wait; ChildProcessError where one fails, which stops the others."""
        process = subprocess.Popen(self.command(stage, overrides))
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # else it would outlive this process
        try:
            code = process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
        if code:
            raise ChildProcessError(
                "a process of several failed, its own message is above; all were stopped. Run the same command again: what was "
                "finished is kept"
            )
