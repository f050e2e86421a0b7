"""The rows of the study: what each one asks of library, search and GKD, and which architecture that gives. Tables in; never torch."""
import functools
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from puzzle_core import rivals, search, tables
from puzzle_core.config import composed, fill, plain
from puzzle_core.constraints import constraints_from
from puzzle_core.errors import UserError
from puzzle_core.files import atomic, read_json, write_json
from puzzle_core.problem import Problem
from puzzle_core.spec import Architecture, Constraint, Workload, did_you_mean
from puzzle_core.targets import expressible

RETIRED = "validation_fraction"  # in conf/corpus/, until development_fraction and test_fraction took its place
LIBRARIES = {  # name: overrides of the stage bld
    "full": [],
    "unrefitted": ["bld.ridge=null"],
    "initialised": ["bld.train_tokens=0"],
}
RIVALS = {
    "random": "random architecture that fits",
    "greedy": "greedy",
    "uniform": "the same pair of variants in every layer",
    "depth": "whole layers dropped, by the sum of their scores",
    "rl": "reinforcement learning",
}
DEPTHS = {  # rivals that choose by the joint KL of whole children: they need the parent, and are chosen by `joint`
    "depth-alone": "whole layers dropped, by the KL of each alone",
    "depth-run": "a run of neighbouring layers dropped, by joint KL",
    "depth-iterative": "layers dropped one after the other, each by joint KL",
}
POOLS = {  # how others than the best are found, of which one is taken once their children are measured, or healed briefly and measured
    "pool": {},  # search.pool_distance apart
    "healed-pool": {"pool_weights": 4.0, "pool_distance": 4},
}
LOSSES = {  # of GKD, as in the paper's ablation (arXiv 2411.19146): weights of LM, cosine, KL
    "none": (0.0, 0.0, 0.0),
    "lm": (1.0, 0.0, 0.0),
    "lm-kl": (1.0, 0.0, 1.0),
    "kl": (0.0, 0.0, 1.0),
    "cosine": (0.0, 1.0, 0.0),
    "lm-cosine-kl": (1.0, 1.0, 1.0),
    "cosine-kl": (0.0, 1.0, 1.0),
}


@dataclass(frozen=True)
class Asked:
    """What a study is of: fixed by its first command, read by all others."""

    overrides: list[str] = field(default_factory=list)  # of params.yaml and conf/, as the stages take them
    speedups: list[float] = field(default_factory=lambda: [1.25, 1.5, 2.0])
    compared_at: float = 1.5  # the speed-up of all rows but the first ones
    seeds: int = 3  # of GKD, at each speed-up
    pool: int = 16  # solutions of each of POOLS
    ablation_tokens: int = 4_194_304  # of GKD, for the rows that compare its losses
    rates: list[float] = field(default_factory=list)  # of GKD's learning, compared with as few tokens; the best is all other rows'
    rows: list[str] = field(default_factory=list)  # names of those to make beside the first; none: all
    random: int = 100  # architectures whose joint KL is held against the sum of scores
    frontier: int = 20  # and so many of the frontier's


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    group: str
    title: str
    speedup: float
    library: str = "full"
    method: str = "mip"
    metric: str = "kl"  # the score that is made least
    seed: int = 0  # of GKD
    losses: tuple[float, float, float] | None = None  # weights of LM, cosine and KL; None: those of the preset
    rate: float | None = None  # of learning; None: the best of those that are compared
    tokens_of: str | None = None  # the row that trained on as many tokens, those for choosing among its pool's children too; None: GKD's


def rows_of(asked: Asked) -> list[Row]:
    """The rows that are asked for; ValueError for a name that no row has, or a row without the one that it is compared with."""
    rows = _all_rows(asked)
    names = [row.name for row in rows]
    for name in asked.rows:
        if name not in names:
            raise UserError(f"--rows: no row '{name}'.{did_you_mean(name, names)} Known: {', '.join(names)}.")
    chosen = [row for row in rows if not asked.rows or row.name in (names[0], *asked.rows)]
    for row in chosen:
        if row.tokens_of not in (None, *(other.name for other in chosen)):
            raise UserError(f"--rows: {row.name} trains on as many tokens as {row.tokens_of}, which is not among the rows: name it too")
    return chosen


def _all_rows(asked: Asked) -> list[Row]:
    """First those that need a library of their own, then those that matter most if time is short."""
    at = asked.compared_at
    rows = [
        Row(f"mip-{at:g}-0", "mip", "Puzzle: MIP on the full library", at),
        Row("initialised", "libraries", "without BLD: initialisation only", at, library="initialised"),
        Row("unrefitted", "libraries", "without ridge refit", at, library="unrefitted"),
    ]
    rows += [Row(method, "rivals", title, at, method=method) for method, title in (RIVALS | DEPTHS).items()]
    rows += [Row(f"mip-{speedup:g}-0", "mip", rows[0].title, speedup) for speedup in asked.speedups if speedup != at]
    rows += [Row("pool", "pool", "best of a pool by joint KL", at, method="pool")]
    for metric in ("lm_loss", "cosine_distance", "top1_disagreement"):
        rows.append(Row(metric, "scores", f"{metric.replace('_', ' ')} as score", at, metric=metric))
    rows += [Row(f"losses-{name}", "losses", name.replace("-", " + "), at, losses=losses) for name, losses in LOSSES.items()]
    rows.append(Row("healed-pool", "pool", "best of a pool by KL after brief GKD", at, method="healed-pool"))
    title = f"{rows[0].title}, GKD with as many tokens as the pool that is healed briefly"
    rows.append(Row(f"mip-{at:g}-tokens", "tokens", title, at, tokens_of="healed-pool"))
    rows += [Row(f"rate-{rate:g}", "rates", f"learning rate {rate:g}", at, rate=rate) for rate in asked.rates]
    speedups = sorted(asked.speedups, key=lambda speedup: speedup != at)
    more = [(speedup, seed) for speedup in speedups for seed in range(1, asked.seeds)]
    return rows + [Row(f"mip-{speedup:g}-{seed}", "mip", rows[0].title, speedup, seed=seed) for speedup, seed in more]


def groups_of(asked: Asked) -> dict[str, float | None]:
    """Groups of architectures whose joint KL is held against the sum of scores: random ones at a speed-up, or the frontier's."""
    return ({f"random-{speedup:g}": speedup for speedup in asked.speedups} if asked.random else {}) | (
        {"frontier": None} if asked.frontier else {}
    )


def today(overrides: list[str]) -> list[str]:
    """The overrides of a study by the keys of this version: RETIRED becomes two shares, each as large."""
    new = []
    for override in overrides:
        key, _, share = override.partition("=")
        new += [f"corpus.{split}_fraction={share}" for split in ("development", "test")] if key == f"corpus.{RETIRED}" else [override]
    return new


class Study:
    """A study's folders. `results` has small files only, one for each thing that is known: it may be carried to another machine."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.results, self.locks = self.folder / "results", self.folder / "locks"

    def ask(self, given: dict[str, object], check: Callable[[DictConfig], object] = plain) -> None:
        """Begin with what is `given`, if its settings pass `check`, or go on; ValueError where it was begun with something else."""
        path = self.results / "asked.json"
        if not path.exists():
            asked = Asked(**given)
            rows_of(asked)
            check(self.composed(asked))
            write_json(path, asdict(asked))
        begun = asdict(Asked(**read_json(path)))  # with what could not be asked yet when it was begun
        for key, value in given.items():
            if begun[key] != value:
                raise ValueError(f"{path}: the study was begun with {key} {begun[key]}, not {value}; take another --out, or leave it out")

    @functools.cached_property
    def asked(self) -> Asked:
        return Asked(**read_json(self.results / "asked.json"))

    @functools.cached_property
    def rows(self) -> list[Row]:
        return rows_of(self.asked)

    @functools.cached_property
    def cfg(self) -> DictConfig:
        return self.composed(self.asked)

    def composed(self, asked: Asked) -> DictConfig:
        return composed(*asked.overrides, f"out='{self.folder}'")

    def file(self, kind: str, name: str) -> Path:
        return self.results / kind / f"{name}.json"

    def read(self, kind: str, name: str) -> dict | None:
        path = self.file(kind, name)
        return read_json(path) if path.exists() else None

    def all(self, kind: str) -> list[dict]:
        return [read_json(path) for path in sorted((self.results / kind).glob("*.json"))]

    def keep_tables(self, library: str) -> None:
        """Beside what is known, unless it is there: weights that are made again are those of the first table, but for rounding."""
        kept = self.results / "tables" / library
        kept.mkdir(parents=True, exist_ok=True)
        for table in (self.folder / library).glob("*.parquet"):
            if not (kept / table.name).exists():
                with atomic(kept / table.name) as part:
                    shutil.copy(table, part)

    def bring_back(self, library: str, name: str) -> None:
        """The table `name` of `library`, where an earlier machine has made it."""
        kept, there = (folder / library / f"{name}.parquet" for folder in (self.results / "tables", self.folder))
        if kept.exists() and not there.exists():
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(kept, there)

    def table(self, library: str, name: str) -> pd.DataFrame:
        """The table `name` of `library`, or of `costs`, as it was first made; not to be changed."""
        return _read(name, self.results / "tables" / library / f"{name}.parquet")

    def problem(self, library: str, metric: str) -> Problem:
        scores = expressible(self.table(library, "scores"), self.cfg.search.export_target)
        return Problem.from_tables(scores, self.table("costs", "costs"), metric, str(fill(Workload, self.cfg.workload).scenario))

    def limits(self, speedup: float | None) -> dict[str, object]:
        return {**plain(self.cfg.constraints), "speedup": speedup}

    def has_weights(self, library: str) -> bool:
        """Whether bld has finished `library` on this machine."""
        return (self.folder / library / "library.parquet").exists()

    def choose(self, until: float) -> None:
        """Write results/chosen/ROW.json for every row whose tables are all that it needs: the architectures that it chooses from."""
        for row in self.rows:
            needed = [self.results / "tables" / name for name in (f"{row.library}/scores.parquet", "costs/costs.parquet")]
            if row.method in DEPTHS or not all(path.exists() for path in needed):
                continue
            if not self.file("chosen", row.name).exists() and time.time() < until:
                seconds, architectures = self._chosen(row)
                problem = self.problem(row.library, "kl")
                pool = [predicted(problem, one) for one in architectures]
                write_json(self.file("chosen", row.name), {"seconds": seconds, "pool": pool})
                print(f"{row.name}: " + (f"sum of KL scores {pool[0]['kl']:.4g}" if pool else "nothing that fits") + f", {seconds:.1f} s")

    def _chosen(self, row: Row) -> tuple[float, list[Architecture]]:
        """Seconds that it took, and the architectures, best first: several of a pool, none where nothing was found."""
        start = time.perf_counter()
        try:
            if row.method not in ("mip", *POOLS):
                entry = next(entry for entry in self._rivals if entry.method == row.method)
                return entry.seconds, [entry.architecture] if entry.architecture else []
            more = {"pool_size": self.asked.pool, **POOLS[row.method]} if row.method in POOLS else {"pool_size": 1}
            settings = fill(search.Settings, self.cfg.search, metric=row.metric, **more)
            found = search.search(self.problem(row.library, row.metric), self.limits(row.speedup), settings)
        except search.InfeasibleError:
            found = []
        return time.perf_counter() - start, [solution.architecture for solution in found]

    def competition(self) -> tuple[Problem, tuple[Constraint, ...], rivals.Settings]:
        """What the rivals are given."""
        problem = self.problem("full", "kl")
        return problem, constraints_from(self.limits(self.asked.compared_at), problem), fill(rivals.Settings, self.cfg.rivals)

    @functools.cached_property
    def _rivals(self) -> list[rivals.Entry]:
        return rivals.compete(*self.competition())


@functools.cache
def _read(name: str, path: Path) -> pd.DataFrame:
    """A kept table: once there it stays as it is, and every row of the study asks for it."""
    return tables.read(name, path)


def predicted(problem: Problem, architecture: Architecture) -> dict:
    rows = problem.rows_of(architecture)
    totals = problem.totals(rows)
    speedup = problem.parent_totals["latency_ms"] / totals["latency_ms"]
    return {"kl": problem.score(rows), "speedup": speedup, **totals, "architecture": architecture.to_json()}
