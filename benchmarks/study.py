"""Is it the search that did it? One library, many ways to choose from it, each child healed and measured: the study's table.

    SETTINGS=(parent.dtype=bfloat16 corpus=files corpus.path=text corpus.development_fraction=0.03 corpus.test_fraction=0.03
      search_space=paper bld=full score=full hardware=cuda hardware.repeats=5 hardware.warmup=1 hardware.decode_steps=8
      workload=throughput workload.batch_size=256 workload.generation_len=128
      gkd=full search.pool_distance=12 rivals.time_limit_s=10 evaluation.task_batch_size=64
      "evaluation.text={num_tokens:65536,seq_len:1024,batch_size:8}"
      "realised={num_tokens:65536,seq_len:1024,batch_size:8,head_tokens:4096,memory_gib:8}"
      "+evaluation.tasks.lambada={path:data/questions/lambada_openai.jsonl,num_questions:1500}"
      "+evaluation.tasks.piqa={path:data/questions/piqa.jsonl,delimiter:'Answer: ',metric:acc_norm}"
      "+evaluation.tasks.winogrande={path:data/questions/winogrande.jsonl}")
    python -m benchmarks.study all --out study --minutes 25 --rates 4e-4,8e-4,16e-4,32e-4 "${SETTINGS[@]}"
    python -m benchmarks.study all --out study --minutes 25                   # goes on, while anything can be done
    python -m benchmarks.study page --out study                               # docs/results/study.json, study.md, README's block

`all` is these, which may be run one by one; each says what is not known yet:

    libraries     bld and score of each library that a row needs, and one table of costs, by the stages themselves
    choose        the searches: no GPU, and no model
    parent        what the parent answers to evaluation.tasks; needs no library
    joint         the joint KL of the pool's architectures, of random ones and of the frontier's; the rows that drop whole layers by it
    speeds        of each chosen architecture, alone on a GPU; needs no library
    heal          GKD of each distinct child, and its quality before and after; before all others at each of --rates

Work is divided over the GPUs that are there (CUDA_VISIBLE_DEVICES), `--per-gpu` processes on each: while one compiles, tokenises or
asks questions, another trains. Speeds are therefore measured apart. With `--minutes` nothing is begun that will not end in time, as
far as is known, and what still runs then is ended (a search by its own limit); the same command goes on: a row that was ended begins
anew, a library goes on from its last checkpoint. All that is known is in small files under OUT/results/, the libraries' weights beside
it. Carried to another machine and put there, `libraries` keeps scores and costs and makes those weights again that are still needed.
Without OUT/results/, `page` writes study.md and README's block from study.json.
"""
import argparse
import contextlib
import math
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig

from benchmarks import study_page
from benchmarks.machine import in_folder
from benchmarks.study_children import Turn, architectures_left, has_weights_of, heal, joint, parent, space_of, speeds
from benchmarks.study_rows import LIBRARIES, Study
from puzzle_core.config import ROOT, fill
from puzzle_core.evaluation import Settings
from puzzle_core.files import lock, write_json

PYTHON = sys.executable
WORK = {"parent": parent, "joint": joint, "speeds": speeds, "heal": heal}  # what GPUs share
STEPS = ("libraries", "choose", *WORK)  # in this order: of those that need another's results, each comes after it
Device = str | None  # of CUDA_VISIBLE_DEVICES; None: there is none


def devices() -> list[Device]:
    if chosen := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return chosen.split(",")
    return list(map(str, range(torch.cuda.device_count()))) or [None]


def run(command: list[str], device: Device, until: float) -> bool:
    """Run `command` with one GPU; whether it ended in time. ChildProcessError where it failed."""
    environment = os.environ | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        code = process.wait(timeout=None if until == math.inf else max(0.0, until - time.time()))
    except subprocess.TimeoutExpired:
        return False
    finally:
        process.kill()
        process.wait()
    if code:
        raise ChildProcessError(f"{shlex.join(command)}: exit status {code}")
    return True


def shared(jobs: list, work: Callable[[object, Device], object]) -> list:
    """What `work(job, device)` gives of each job, each device taking the next one when it is free. The first error is raised."""
    waiting, done, errors = queue.SimpleQueue(), {}, []
    for numbered in enumerate(jobs):
        waiting.put(numbered)

    def take(device: Device) -> None:
        with contextlib.suppress(queue.Empty):
            while not errors:
                number, job = waiting.get_nowait()
                try:
                    done[number] = work(job, device)
                except Exception as error:
                    errors.append(error)

    threads = [threading.Thread(target=take, args=(device,)) for device in devices()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [done[number] for number in sorted(done)]


def libraries(study: Study, until: float) -> None:
    """The libraries that are still needed with their scores, and one table of costs.

    Where an earlier machine's tables say what is chosen, of a library only those variants that rows without a healed child need.
    """
    choosing = threading.Lock()

    def stages(name: str, steps: dict[str, list[str]], device: Device) -> bool:
        folder = study.folder / name
        if name in LIBRARIES:
            with choosing:
                study.choose(until)
                left = architectures_left(study, name)
            if left == []:
                return True
            steps["library"] += space_of(study, left)
            if study.has_weights(name) and not has_weights_of(study, name, left):
                (folder / "library.parquet").unlink()  # of fewer variants than are needed now; bld keeps their weights
        study.bring_back(name, list(steps)[-1])
        for table, (stage, *more) in steps.items():
            if (folder / f"{table}.parquet").exists():
                continue
            command = [PYTHON, "-m", f"stages.{stage}", *study.asked.overrides, *more, *in_folder(folder)]
            if time.time() > until or not run(command, device, until):
                return False
            study.keep_tables(name)
        return True

    jobs = [(name, {"library": ["bld", *overrides], "scores": ["score"]}) for name, overrides in LIBRARIES.items()]
    jobs.insert(1, ("costs", {"costs": ["profile_hardware"]}))  # beside the first: by those two most rows can be chosen
    ended = shared(jobs, lambda job, device: stages(*job, device))
    unfinished = [name for (name, _), whole in zip(jobs, ended, strict=True) if not whole]
    print(f"libraries: unfinished are {', '.join(unfinished)}: run the command again" if unfinished else "libraries: all needed are there")


def in_processes(step: str, study: Study, turn: Turn) -> None:
    """`step` in processes on each GPU; in this one where it is alone and nothing has to be ended."""
    places = devices() * turn.per_gpu
    if turn.until == math.inf and len(places) == 1:
        WORK[step](study, turn)
        return
    command = [PYTHON, "-m", "benchmarks.study", step, "--out", str(study.folder)]
    command += ["--per-gpu", str(turn.per_gpu), "--worker", str(turn.until)]
    with ThreadPoolExecutor(len(places)) as pool:
        ended = list(pool.map(lambda device: run(command, device, turn.until), places))
    if not all(ended):
        print(f"{step}: stopped before its end; what was under way is lost")


def do(step: str, study: Study, turn: Turn) -> None:
    """One step, as far as there is time for it."""
    if step == "libraries":
        libraries(study, turn.until)
    elif step == "choose":
        study.choose(turn.until)
    else:
        in_processes(step, study, replace(turn, per_gpu=1) if step == "speeds" else turn)


@contextlib.contextmanager
def noted(study: Study, command: list[str]) -> Iterator[None]:
    """Write down how long a command took on how many GPUs: results/commands/."""
    start = time.time()
    try:
        yield
    finally:
        gpus = len(devices()) if devices() != [None] else 0
        words = shlex.join(["python", "-m", "benchmarks.study", *command])
        with lock(study.locks, "commands", wait=True):  # steps may run side by side
            number = len(list((study.results / "commands").glob("*.json"))) + 1
            write_json(study.file("commands", f"{number:03}"), {"command": words, "seconds": time.time() - start, "gpus": gpus})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["all", *STEPS, "page"])
    parser.add_argument("--out", type=Path, required=True, help="the study's folder")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which nothing is begun, and what runs is ended")
    parser.add_argument("--per-gpu", type=int, default=1, help="processes on each GPU, of joint and heal; default 1")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)  # one of them, until then
    fixed = parser.add_argument_group("fixed by the study's first command")
    for name, kind, meaning in (
        ("speedups", _numbers, "default 1.25,1.5,2.0"),
        ("compared-at", float, "the speed-up of all rows but the MIP's; default 1.5"),
        ("seeds", int, "of GKD, of the MIP's rows; default 3"),
        ("pool", int, "solutions; default 16"),
        ("ablation-tokens", int, "of GKD in the rows that compare its losses; default 4,194,304"),
        ("rates", _numbers, "learning rates of GKD to compare on so many tokens; all other rows take the best; default that of gkd.lr"),
        ("rows", lambda text: text.split(","), "names of rows to make beside the first, e.g. depth-iterative,healed-pool; default all"),
        ("random", int, "random architectures of joint; default 100"),
        ("frontier", int, "architectures of the frontier, of joint; default 20"),
    ):
        fixed.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=meaning)
    fixed.add_argument("overrides", nargs="*", help="as the stages take them")
    given = vars(parser.parse_intermixed_args(arguments))
    step, folder, minutes, per_gpu, worker = (given.pop(key) for key in ("step", "out", "minutes", "per_gpu", "worker"))
    if step == "speeds" and per_gpu > 1:
        parser.error("speeds are measured by one process on each GPU: leave --per-gpu out")
    study, turn = Study(folder), Turn(time.time() + 60 * minutes if worker is None else worker, per_gpu)
    from_json = step == "page" and not study.results.exists()
    if from_json and not study_page.json_of(study).exists():
        parser.error(f"a page is made of {study.results}, or of {study_page.json_of(study)}: neither is there")
    try:
        if not from_json:
            study.ask({key: value for key, value in given.items() if value != []}, can_be_asked)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if worker is not None:
        WORK[step](study, turn)
    elif step == "page":
        print(f"page: {study_page.write(study)}")
    else:
        with noted(study, sys.argv[1:] if arguments is None else arguments):
            for part in STEPS if step == "all" else [step]:
                if step != "all" or time.time() < turn.until:
                    do(part, study, turn)
        missing = study_page.missing(study)
        print(f"{step}: missing of " + "; ".join(f"{what}: {', '.join(names) or 'nothing'}" for what, names in missing.items()))


def can_be_asked(cfg: DictConfig) -> None:
    """ValueError or OSError for questions that cannot be put, before anything is begun."""
    fill(Settings, cfg.evaluation).exam()


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
