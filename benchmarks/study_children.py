"""The children of the study: the parent in memory once, each row's child made, healed and measured with it."""
import contextlib
import gc
import importlib.metadata
import importlib.util
import platform
import tempfile
import time
from dataclasses import asdict, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch

from benchmarks.study_rows import LOSSES, Row, Study
from puzzle_core import evaluation, gkd, realised, rivals, search, tables
from puzzle_core.children import make_child
from puzzle_core.config import fill, plain
from puzzle_core.constraints import constraints_from
from puzzle_core.corpus import Corpus
from puzzle_core.files import fingerprint, lock, read_json, write_json
from puzzle_core.parents import load_parent, pick_device
from puzzle_core.serving import hardware_name, side_by_side
from puzzle_core.spec import Architecture, Workload
from puzzle_core.tasks import Exam, Task


class TokenizedOnce(Corpus):
    """A corpus that keeps the token sequences that it was asked for last: rows share their text."""

    def __init__(self, *args):
        super().__init__(*args)
        self.sequences = lru_cache(maxsize=6)(self.sequences)


class Bench:
    """The parent in memory, and what every child is measured with."""

    def __init__(self, study: Study):
        cfg, asked = study.cfg, study.asked
        self.study, self.cfg = study, cfg
        self.parent = fill(load_parent, cfg.parent, device=pick_device(cfg.hardware.device))
        self.corpus = TokenizedOnce(self.parent.tokenizer, plain(cfg.corpus))
        self.settings = fill(evaluation.Settings, cfg.evaluation)
        self.text, self.pool_text = self.settings.batches(self.corpus), fill(realised.Settings, cfg.realised)
        self.exam = _exam(asked.tasks, asked.questions, self.settings.task_batch_size)
        self.machine = hardware_name(self.parent.device)
        self.versions = {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in ("torch", "transformers")}}

    @cached_property
    def of_parent(self) -> dict:
        return self.exam.ask(self.parent.model, self.corpus.tokenizer)

    def weights_of(self, library: str):
        table = tables.read("library", self.study.results / "tables" / library / "library.parquet")
        return tables.variant_files(table, self.study.folder / library / "blocks")

    def joint_kls(self, library: str, architectures: list[Architecture]) -> list[float]:
        batches = self.pool_text.batches(self.corpus, self.text)
        return realised.joint_kl(self.parent, architectures, self.weights_of(library), batches, self.pool_text)

    def heal(self, row: Row, architecture: Architecture) -> dict:
        """The child of `architecture` healed as `row` says, measured before and after; its time beside the parent's."""
        clock, settings, curve = [time.perf_counter()], gkd_settings(self.study, row), []
        child = make_child(self.parent, architecture, self.weights_of(row.library))
        record = {"library": row.library, "seed": row.seed, "gkd": gkd_json(self.study, row), "architecture": architecture.to_json()}
        record["before"] = evaluation.compare(self.parent.model, child, self.text)["child"]
        clock.append(time.perf_counter())
        try:
            if settings is not None:
                child = child.float().requires_grad_(True)
                with tempfile.TemporaryDirectory() as work:
                    curve = gkd.heal(self.parent, child, self.corpus, settings, self.cfg.seed + row.seed, Path(work))
            clock.append(time.perf_counter())
            record |= self.measured(child)
        except FloatingPointError as error:
            record["failed"] = str(error)
        torch.compiler.reset()  # the graphs of this child's layers: torch has room for a few hundred
        clock.append(time.perf_counter())
        steps = zip(("make", "heal", "measure"), clock, clock[1:], strict=False)
        seconds = {name: end - start for name, start, end in steps}
        return record | {"held_out": gkd.held_out_rows(curve), "seconds": seconds, "machine": self.machine, "versions": self.versions}

    def measured(self, child) -> dict[str, dict[str, float]]:
        """Rows of the parent and of the child `after` whatever it went through: quality, accuracies, times of requests in turn."""
        models, scenario = {"parent": self.parent.model, "child": child}, fill(Workload, self.cfg.workload).scenario
        rows = evaluation.compare(self.parent.model, child, self.text)
        answers = evaluation.accuracy_rows(self.of_parent, self.exam.ask(child, self.corpus.tokenizer)) if self.exam else {}
        totals = side_by_side(models, scenario, self.cfg.hardware.serving, self.settings.repeats, warmup=1)
        for name in models:
            speedup = totals["parent"]["latency_ms"] / totals[name]["latency_ms"]
            rows[name] |= {"speedup": speedup, **totals[name], **answers.get(name, {})}
        return {"parent": rows["parent"], "after": rows["child"]}


def _exam(folder: str | None, num_questions: int, batch_size: int) -> Exam | None:
    """The questions of every .jsonl file of a folder; None without a folder, or without lm-eval, which is said."""
    if folder is None:
        return None
    files = sorted(Path(folder).glob("*.jsonl"))
    if not files:
        raise FileNotFoundError(f"no .jsonl file in {folder}/, the folder of --tasks")
    if not importlib.util.find_spec("lm_eval"):
        print("lm-eval is not installed: no questions are asked", flush=True)
        return None
    return Exam([Task(file.stem, str(file), num_questions) for file in files], batch_size)


def gkd_json(study: Study, row: Row) -> dict | None:
    settings = gkd_settings(study, row)
    return settings and asdict(settings)


def gkd_settings(study: Study, row: Row) -> gkd.Settings | None:
    """How the row's child is healed; None: not at all. No checkpoints: a row that was killed begins anew, and its last state counts."""
    settings = replace(fill(gkd.Settings, study.cfg.gkd), save_every_steps=None)
    if row.losses is None:
        return settings
    if row.losses == LOSSES["none"]:
        return None
    lm, cosine, kl = row.losses
    tokens = study.asked.ablation_tokens
    return replace(settings, lm_weight=lm, cosine_weight=cosine, kl_weight=kl, train_tokens=tokens, phases=[])


def needs_measuring(study: Study, row: Row) -> bool:
    """Whether the row has several architectures, and which is best is not known."""
    chosen = study.read("chosen", row.name)
    return chosen is not None and len(chosen["pool"]) > 1 and study.read("pools", row.name) is None


def architecture_of(study: Study, row: Row) -> Architecture | None:
    """The row's architecture; None where nothing was found or it is not known yet."""
    chosen = study.read("chosen", row.name)
    if chosen is None or not chosen["pool"] or needs_measuring(study, row):
        return None
    number = (study.read("pools", row.name) or {"chosen": 0})["chosen"]
    return Architecture.from_json(chosen["pool"][number]["architecture"])


def healing_of(study: Study, row: Row, architecture: Architecture) -> str:
    """The name of what becomes of the row's child: the same for rows that differ in nothing that determines it."""
    settings = gkd_json(study, row)
    return fingerprint(row.library, architecture.to_json(), settings, row.seed if settings else None)


def measure_pool(bench: Bench, row: Row) -> None:
    """Write the joint KL of each of the row's architectures, and which has the least."""
    pool = bench.study.read("chosen", row.name)["pool"]
    kls = bench.joint_kls(row.library, [Architecture.from_json(one["architecture"]) for one in pool])
    measured = {"joint_kl": kls, "predicted": [one["kl"] for one in pool], "chosen": kls.index(min(kls))}
    write_json(bench.study.file("pools", row.name), measured)


def heal(study: Study, until: float) -> None:
    """Heal and measure the rows that no other process has in hand, as many as there is time for."""
    bench = lru_cache(lambda: Bench(study))  # a process that finds nothing to do loads nothing
    for row in (row for row in study.rows if study.has_weights(row.library)):
        if needs_measuring(study, row) and time.time() < until:
            with lock(study.locks, row.name, wait=True):
                if needs_measuring(study, row):
                    measure_pool(bench(), row)
        architecture = architecture_of(study, row)
        if architecture is None:
            continue
        name = healing_of(study, row, architecture)
        with contextlib.suppress(BlockingIOError), lock(study.locks, name):
            if not study.file("healed", name).exists() and time.time() + expected_s(study, row) < until:
                record = bench().heal(row, architecture)
                write_json(study.file("healed", name), record)
                gc.collect()
                torch.cuda.empty_cache()
                print(f"{row.name}: {summary(record)}", flush=True)


def summary(record: dict) -> str:
    seconds = f"{sum(record['seconds'].values()):.0f} s"
    if "failed" in record:
        return f"{record['failed']}, {seconds}"
    before, after = record["before"], record["after"]
    kls = f"KL {before['kl']:.4g} before, {after['kl']:.4g} ± {after['kl_stderr']:.2g} after"
    return f"{kls}, speed-up {after['speedup']:.2f}, {seconds}"


def expected_s(study: Study, row: Row) -> float:
    """Seconds that the longest row of as many tokens took; 0 where none is known."""
    times = [0.0]
    for path in (study.results / "healed").glob("*.json"):
        record = read_json(path)
        if _num_tokens(record["gkd"]) == _num_tokens(gkd_json(study, row)):
            times.append(sum(record["seconds"].values()))
    return max(times)


def _num_tokens(settings: dict | None) -> int:
    return gkd.Settings(**settings).num_tokens if settings else 0


def additivity(study: Study, until: float) -> None:
    """Random architectures at each speed-up, and the frontier's: the sum of scores and the joint KL of each."""
    if not study.has_weights("full"):
        raise FileNotFoundError(f"{study.folder}/full/ has no library: `python -m benchmarks.study libraries` makes it")
    bench = lru_cache(lambda: Bench(study))
    problem, numbers = study.problem("full", "kl"), study.asked.speedups
    groups = {f"random-{speedup:g}": speedup for speedup in numbers} | {"frontier": None}
    for number, (name, speedup) in enumerate(groups.items()):
        with contextlib.suppress(BlockingIOError), lock(study.locks, name):
            if study.file("additivity", name).exists() or time.time() > until:
                continue
            start = time.perf_counter()
            if speedup is None:
                points = search.frontier(problem, study.limits(None), "speedup", study.asked.frontier)
                found = [solution.architecture for solution in points]
            else:
                share = len(range(number, study.asked.random, len(numbers)))
                limits = constraints_from(study.limits(speedup), problem)
                settings = fill(rivals.Settings, study.cfg.rivals, seed=study.cfg.rivals.seed + number)
                found = rivals.random_architectures(problem, limits, share, settings)
            kls = bench().joint_kls("full", found)
            rows = [
                {"predicted": problem.score(problem.rows_of(one)), "realised": kl, "architecture": one.to_json()}
                for one, kl in zip(found, kls, strict=True)
            ]
            write_json(study.file("additivity", name), {"seconds": time.perf_counter() - start, "rows": rows})
            print(f"{name}: {len(rows)} architectures, {time.perf_counter() - start:.0f} s", flush=True)
