"""Processes that share a job: the work is divided the same way everywhere, rows come together, a lost rank is noticed."""
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from conftest import EXCERPT, PICO, ROOT, pico_parent, run, stage, started
from torch import multiprocessing

from puzzle_core import bld, ranks
from puzzle_core.corpus import Corpus
from puzzle_core.files import lock
from puzzle_core.launcher import Launcher
from puzzle_core.subblocks import resolve_layers

SETTINGS = bld.Settings(64, 4, 512, 512, 256, [0.01, 0.1], 1e-3, 0.1, 0.0, 1.0)


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


def test_neighbours_stay_together_and_the_fullest_rank_has_the_least():
    work, reach = [0.0, 3.0, 1.0, 2.0, 4.0], [1.0, 2.0, 3.0, 4.0, 5.0]
    for world_size in (1, 2, 3, 7):
        owner = ranks.divide_in_order(work, reach, world_size)

        def fullest(cuts: tuple[int, ...]) -> float:
            parts = [range(a, b) for a, b in itertools.pairwise((0, *cuts, len(work)))]
            return max(sum(work[i] for i in part) + reach[part[-1]] for part in parts if part)

        best = min(fullest(cuts) for cuts in itertools.combinations_with_replacement(range(len(work) + 1), world_size - 1))
        cuts = tuple(owner.index(rank) for rank in range(1, max(owner) + 1))
        assert owner == sorted(owner) and max(owner) < world_size and fullest(cuts) == best
    assert ranks.divide_in_order([], [], 2) == []


def share_a_library(mine: ranks.Ranks, folder: Path) -> None:
    """Every variant is made, and one that goes missing made again, by whichever rank."""
    folder.mkdir(exist_ok=True)
    parent = pico_parent()
    corpus = Corpus(parent.tokenizer, EXCERPT)
    space = {"attention": ["kv1", "linear"], "ffn": ["w80", "w48"], "layers": {"1,3": {"block": ["kv1+w48"]}}}
    jobs = bld.jobs(parent, resolve_layers(space, parent.model.config, parent.family), SETTINGS, 0, corpus)
    arguments = parent, jobs, corpus, SETTINGS, 0, folder / "blocks"
    table, num_made = bld.train_library(*arguments, mine)
    assert num_made == len(jobs)
    table.to_parquet(folder / f"{mine.rank}.parquet")
    made_here = {file.name for file in (folder / "blocks").iterdir()}
    mine.wait()
    (folder / "blocks" / "003-ffn-w48.safetensors").unlink(missing_ok=True)
    mine.wait()
    again, num_made = bld.train_library(*arguments, mine)
    assert num_made == 1 and {file.name for file in (folder / "blocks").iterdir()} == made_here
    pd.testing.assert_frame_equal(again, table)


def test_two_ranks_make_the_library_that_one_makes(tmp_path):
    in_two_processes(share_a_library, tmp_path / "two")
    share_a_library(ranks.ALONE, tmp_path / "one")
    one, *two = (pd.read_parquet(tmp_path / name) for name in ("one/0.parquet", "two/0.parquet", "two/1.parquet"))
    for table in two:
        pd.testing.assert_frame_equal(table, one)
    for name in one.path:
        assert (tmp_path / "two/blocks" / name).read_bytes() == (tmp_path / "one/blocks" / name).read_bytes(), name


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


def test_one_setting_makes_a_stage_several_processes_that_stop_together_also_in_a_job_of_slurm(tmp_path):
    small = ["bld.train_tokens=256", "search_space.ffn=[w80]", "search_space.attention=[kv1]", "launcher.processes=2"]
    command = [sys.executable, "-m", "stages.bld", *PICO, f"out={tmp_path}", *small]
    with lock(tmp_path, "bld.1"):  # the second rank finds that it cannot have it
        lost = run(command, ROOT, check=False)
    assert lost.returncode == 1 and "another 'bld.1' is still writing" in lost.stderr
    assert "bld: error: a process of several failed, its own message is above; all were stopped" in lost.stderr
    assert not (tmp_path / "library.parquet").exists()
    slurm = ["+sweep=slurm_gpus", "hydra/launcher=submitit_local", "launcher.nodes=1", "hydra.launcher.gpus_per_node=null"]
    run([*command, *slurm, "hydra.launcher.cpus_per_task=1", f"hydra.sweep.dir={tmp_path / 'jobs'}"], ROOT)  # Slurm's job, run here
    assert len(pd.read_parquet(tmp_path / "library.parquet")) == 16


def killed(name: str, overrides: list[str], begun: Callable[[], list[Path]]) -> list[Path]:
    """Kill -9 a stage's second rank as soon as there is what `begun` waits for; what is there when all have stopped."""
    process = started(name, overrides, begun, stderr=subprocess.PIPE)
    try:
        family = psutil.Process(process.pid).children(recursive=True)
        second = next(one for one in family if "stages" in " ".join(one.cmdline()) and one.environ().get("RANK") == "1")
        second.kill()
        stderr = process.communicate(timeout=120)[1]
    finally:
        process.terminate()  # the launcher hands it on
        process.wait(timeout=120)
    assert process.returncode == 1 and "a process of several failed" in stderr, stderr
    assert "Run the same command again: what was finished is kept" in stderr
    assert not psutil.wait_procs(family, timeout=10)[1]
    return begun()


def test_a_rank_that_is_killed_stops_all_and_a_rerun_keeps_what_was_finished(tmp_path):
    small = ["launcher.processes=2", "search_space.ffn=[w80]", "search_space.attention=[kv1]"]
    common = [f"out={tmp_path}", f"data={tmp_path}", *small]
    slow_bld = [*common, "bld.train_tokens=65536"]
    finished = killed("bld", slow_bld, lambda: list(tmp_path.glob("blocks/*kv1.safetensors")))
    written = {file: file.stat().st_mtime_ns for file in finished}
    assert 0 < len(finished) < 4 and not (tmp_path / "library.parquet").exists()
    stage("bld", *slow_bld)
    assert {file: file.stat().st_mtime_ns for file in finished} == written and len(pd.read_parquet(tmp_path / "library.parquet")) == 16

    def partial() -> list[Path]:
        files = list(tmp_path.glob(".scores.partial*.parquet"))
        return files if len(files) == 2 else []

    slow_score = [*common, "score.num_tokens=32768", "score.memory_gib=1"]
    tables_of_both = [pd.read_parquet(file) for file in killed("score", slow_score, partial)]
    assert len(tables_of_both) == 2 and not (tmp_path / "scores.parquet").exists()
    known = pd.concat(tables_of_both)[["layer", "subblock", "variant"]].drop_duplicates()
    done = stage("score", *slow_score)
    assert f"score: {16 - len(known)} variants scored, {len(known)} kept" in done.stdout and 0 < len(known) < 16
    assert not list(tmp_path.glob(".scores.partial*.parquet"))


def test_a_plan_launches_no_processes_makes_nothing_and_is_no_stage_of_dvc(tmp_path):
    several = ["launcher.processes=2", "launcher.nodes=2", "launcher.rendezvous=nowhere:1"]
    done = stage("bld", "bld.plan_only=true", *several, f"out={tmp_path}")
    assert done.stdout.count("| GPUs |") == done.stdout.count("\n| 64 |") == 1 and not list(tmp_path.iterdir())
    assert "bld.plan_tflops is 0" in stage("bld", "bld.plan_only=true", "bld.plan_tflops=0", check=False).stderr
    assert "bld.plan_only is for the command line" in stage("bld", "bld.plan_only=true", check=False, DVC_STAGE="bld").stderr


def test_the_command_of_several_machines_names_where_they_meet():
    command = Launcher(8, 2, "first:29500").command("bld", ["out=data"])
    assert command[-3:] == ["-m", "stages.bld", "out=data"]
    assert {"--nnodes=2", "--nproc-per-node=8", "--rdzv-endpoint=first:29500"} <= set(command)
    with pytest.raises(ValueError, match="launcher.rendezvous does not say where they meet"):
        Launcher(8, 2)
    with pytest.raises(ValueError, match="launcher.processes is 'all'; expected a number of processes on each machine, or gpu"):
        Launcher("all")
