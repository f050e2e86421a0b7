"""The children of the study: the parent in memory once, each row's child made, healed and measured with it; and how fast each is."""
import collections
import contextlib
import gc
import importlib.metadata
import json
import math
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.study_rows import DEPTHS, LOSSES, Row, Study, groups_of, predicted
from puzzle_core import bld, costs, evaluation, gkd, pools, realised, rivals, scoring, search, tables
from puzzle_core.children import make_child, random_weights
from puzzle_core.config import fill, plain
from puzzle_core.constraints import constraints_from
from puzzle_core.corpus import Corpus
from puzzle_core.files import fingerprint, lock, write_json
from puzzle_core.parents import Parent, load_parent, pick_device
from puzzle_core.serving import hardware_name, side_by_side
from puzzle_core.spec import SUBBLOCKS, Architecture, Workload
from puzzle_core.tasks import Answers, Exam

KEY = ["layer", "subblock", "variant"]
STAGES = {"bld": bld.VERSION, "score": scoring.VERSION, "profile-hardware": costs.VERSION, "gkd": gkd.VERSION}  # what a row is made by


class TokenizedOnce(Corpus):
    """A corpus that keeps the token sequences that it was asked for last: rows share their text."""

    def __init__(self, *args):
        super().__init__(*args)
        self.sequences = lru_cache(maxsize=6)(self.sequences)


@dataclass(frozen=True)
class ReadAgain:
    """A corpus whose training text has `epoch_tokens` tokens: who asks for more reads it again, in another order each time."""

    corpus: Corpus
    epoch_tokens: int

    def sequences(self, split: str, num_tokens: int, seq_len: int, seed: str) -> np.ndarray:
        if split != "train" or num_tokens <= self.epoch_tokens:
            return self.corpus.sequences(split, num_tokens, seq_len, seed=seed)
        num_epochs = math.ceil(num_tokens / self.epoch_tokens)
        seeds = [seed, *(f"{seed}-epoch{number}" for number in range(1, num_epochs))]
        epochs = [self.corpus.sequences(split, self.epoch_tokens, seq_len, seed=one) for one in seeds]
        return np.concatenate(epochs)[: math.ceil(num_tokens / seq_len)]


@dataclass(frozen=True)
class Turn:
    """The time that a process has, and how many of them share its GPU."""

    until: float = math.inf
    per_gpu: int = 1
    start: float = field(default_factory=time.time)

    def allows(self, known_s: list[float]) -> bool:
        """Whether what took `known_s` before will end in time; where nothing is known, whether more time is left than has gone by."""
        now = time.time()
        return now + max(known_s, default=now - self.start) < self.until


def once(
    study: Study,
    turn: Turn,
    kind: str,
    name: str,
    known_s: list[float],
    make: Callable[[], dict],
    is_known: Callable[[], bool] | None = None,
) -> None:
    """Write what `make` gives to results/KIND/NAME.json, unless it is there (and counts), another process is at it, or time is short."""
    with contextlib.suppress(BlockingIOError), lock(study.locks, f"{kind}-{name}"):
        if not (is_known or study.file(kind, name).exists)() and turn.allows(known_s):
            start = time.perf_counter()
            found = make()
            found["took_s"] = time.perf_counter() - start
            write_json(study.file(kind, name), found)
            gc.collect()
            torch.cuda.empty_cache()
            print(f"{kind} {name}: {summary(found)}{found['took_s']:.0f} s", flush=True)


def load(study: Study) -> Parent:
    return fill(load_parent, study.cfg.parent, device=pick_device(study.cfg.hardware.device))


def made_with(parent: Parent) -> dict:
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in ("torch", "transformers")}}
    return {"machine": hardware_name(parent.device), "versions": versions, "stages": STAGES}


class Bench:
    """The parent in memory, and what the quality of every child is measured with."""

    def __init__(self, study: Study):
        self.study, self.cfg = study, study.cfg
        self.parent = load(study)
        self.corpus = TokenizedOnce(self.parent.tokenizer, plain(self.cfg.corpus))
        self.settings = fill(evaluation.Settings, self.cfg.evaluation)
        self.text, self.pool_text = self.settings.batches(self.corpus), fill(realised.Settings, self.cfg.realised)

    @cached_property
    def exam(self) -> Exam | None:
        return self.settings.exam()

    def answers(self, model: PreTrainedModel) -> dict[str, Answers]:
        return self.exam.ask(model, self.corpus.tokenizer) if self.exam else {}

    @cached_property
    def of_parent(self) -> dict[str, Answers]:
        kept = self.study.read("parent", "answers")
        if kept is None:
            return self.answers(self.parent.model)
        return {name: Answers(np.array(one["right"]), one["chance"]) for name, one in kept["tasks"].items()}

    def weights_of(self, library: str):
        folder = self.study.folder / library  # with the table that was written beside the weights, of which some may not be needed
        return tables.variant_files(tables.read("library", folder / "library.parquet"), folder / "blocks")

    @cached_property
    def deciding(self) -> list:
        """Batches of the text by which architectures are chosen."""
        return self.pool_text.batches(self.corpus)

    def joint_kls(self, library: str, architectures: list[Architecture]) -> list[float]:
        def weights_of(*row):  # layers that are dropped have none, and no library then
            return self.weights_of(library)(*row)

        return realised.joint_kl(self.parent, architectures, weights_of, self.deciding, self.pool_text)

    def depth(self, row: Row) -> dict:
        """What the row's method chooses by the joint KL of whole children, as `Study.choose` writes it of other rows."""
        start, num_measured, competition = time.perf_counter(), 0, self.study.competition()

        def losses(architectures: list[Architecture]) -> list[float]:
            nonlocal num_measured
            num_measured += len(architectures)
            return self.joint_kls(row.library, architectures)

        chosen = rivals.measured(row.method, *competition, losses)
        pool = [] if chosen is None else [predicted(competition[0], chosen)]
        return {"seconds": time.perf_counter() - start, "num_measured": num_measured, "pool": pool}

    def heal(self, row: Row, architecture: Architecture, per_gpu: int) -> dict:
        """The child of `architecture` healed as `row` says, measured before and after."""
        of_parent = self.of_parent  # first: questions that cannot be asked are no news for after the training
        clock, settings, curve = [time.perf_counter()], gkd_settings(self.study, row), []
        child = make_child(self.parent, architecture, self.weights_of(row.library))
        record = {"library": row.library, "seed": row.seed, "gkd": gkd_json(self.study, row), "architecture": architecture.to_json()}
        record["before"] = evaluation.compare(self.parent.model, child, self.text)["child"]
        clock.append(time.perf_counter())
        try:
            if settings is not None:
                child = child.float().requires_grad_(True)
                with tempfile.TemporaryDirectory() as work:
                    text = ReadAgain(self.corpus, fill(gkd.Settings, self.cfg.gkd).train_tokens) if row.tokens_of else self.corpus
                    curve = gkd.heal(self.parent, child, text, settings, self.cfg.seed + row.seed, Path(work))
            clock.append(time.perf_counter())
            rows = evaluation.compare(self.parent.model, child, self.text)
            if not math.isfinite(rows["child"]["kl"]):
                raise FloatingPointError(f"KL after GKD is {rows['child']['kl']}")
            chosen_by = evaluation.compare(self.parent.model, child, self.pool_text.batches(self.corpus))["child"]  # a learning rate is
            answers = evaluation.accuracy_rows(of_parent, self.answers(child))
            record |= {"development_kl": chosen_by["kl"]}
            record |= {"parent": rows["parent"] | answers["parent"], "after": rows["child"] | answers["child"]}
        except (FloatingPointError, OverflowError) as error:
            record["failed"] = str(error)
        torch.compiler.reset()  # the graphs of this child's layers: torch has room for a few hundred
        clock.append(time.perf_counter())
        steps = zip(("make", "heal", "measure"), clock, clock[1:], strict=False)
        seconds = {name: end - start for name, start, end in steps}
        return record | {"held_out": gkd.held_out_rows(curve), "seconds": seconds, "per_gpu": per_gpu, **made_with(self.parent)}

    def pool(self, row: Row) -> dict:
        """The joint KL of each of the row's architectures, and which has the least."""
        kls = self.joint_kls(row.library, pool_of(self.study, row))
        return {"joint_kl": kls, "chosen": kls.index(min(kls))}

    def briefly(self, row: Row, architecture: Architecture) -> dict:
        """The KL of the child of `architecture`, one of the row's pool, after brief GKD; None where that diverges."""
        more = (self.weights_of(row.library), self.corpus, self.deciding, brief_settings(self.study), self.cfg.seed + row.seed)
        return {"architecture": architecture.to_json(), "kl": pools.healed_kl(self.parent, architecture, *more)}


def gkd_json(study: Study, row: Row) -> dict | None:
    settings = gkd_settings(study, row)
    return settings and asdict(settings)


def gkd_settings(study: Study, row: Row) -> gkd.Settings | None:
    """How the row's child is healed; None: not at all. No checkpoints: a row that was killed begins anew."""
    if row.rate is not None:
        return brief_settings(study, row.rate)
    if row.losses is None:
        settings = replace(fill(gkd.Settings, study.cfg.gkd), save_every_steps=None, lr=rate_of(study) or study.cfg.gkd.lr)
        more = choosing_tokens(study, named(study, row.tokens_of)) if row.tokens_of else 0
        return replace(settings, train_tokens=settings.train_tokens + more)
    if row.losses == LOSSES["none"]:
        return None
    lm, cosine, kl = row.losses
    return replace(brief_settings(study), lm_weight=lm, cosine_weight=cosine, kl_weight=kl)


def brief_settings(study: Study, rate: float | None = None) -> gkd.Settings:
    """Those of the preset with fewer tokens, at the learning `rate`; None: the best."""
    lr = rate or rate_of(study) or study.cfg.gkd.lr
    return replace(fill(gkd.Settings, study.cfg.gkd), save_every_steps=None, train_tokens=study.asked.ablation_tokens, phases=[], lr=lr)


def named(study: Study, name: str) -> Row:
    return next(row for row in study.rows if row.name == name)


def choosing_tokens(study: Study, row: Row) -> int:
    """On how many tokens children are trained so that the row can choose one."""
    return len(pool_of(study, row)) * brief_settings(study).num_tokens if row.method == "healed-pool" else 0


def tokens_of(study: Study, row: Row) -> int:
    """On how many tokens children are trained for the row: for choosing its own, and by GKD. BLD's, the library's, are not among them."""
    return _num_tokens(gkd_json(study, row)) + choosing_tokens(study, row)


def rates_left(study: Study) -> list[Row]:
    """The rows of learning rates that are not known yet."""
    return [row for row in study.rows if row.rate is not None and not is_settled(study, row)]


def rate_of(study: Study) -> float | None:
    """The learning rate whose row has the least KL on development text; None where none is compared, or not all are known."""
    compared = [row for row in study.rows if row.rate is not None and architecture_of(study, row) is not None]
    if not compared or rates_left(study):
        return None
    healed = {row.rate: study.read("healed", healing_of(study, row, architecture_of(study, row))) for row in compared}
    kls = {rate: one["development_kl"] for rate, one in healed.items() if "after" in one}
    return min(kls, key=kls.get, default=None)


def pool_of(study: Study, row: Row) -> list[Architecture]:
    """The architectures that the row takes one of, best first; [] where nothing was found or it is not known yet."""
    return [Architecture.from_json(one["architecture"]) for one in (study.read("chosen", row.name) or {"pool": []})["pool"]]


def needs_measuring(study: Study, row: Row) -> bool:
    """Whether the row has several architectures whose joint KL is not known."""
    return len(pool_of(study, row)) > 1 and study.read("pools", row.name) is None


def brief_names(study: Study, row: Row) -> list[str]:
    """The name of what comes of brief GKD, of each architecture of the row's pool."""
    settings = brief_settings(study).determining
    return [fingerprint(origins(study, row.library, one), one.to_json(), settings, row.seed) for one in pool_of(study, row)]


def brief_kls(study: Study, row: Row) -> list[float | None]:
    """The KL after brief GKD of each of the row's architectures, infinite where that diverged; None where it is not known."""
    found = [study.read("briefly", name) for name in brief_names(study, row)]
    return [one and (math.inf if one["kl"] is None else one["kl"]) for one in found]


def all_diverged(study: Study, row: Row) -> bool:
    """Whether brief GKD of every child of the row's pool diverged: then none can be taken."""
    return row.method == "healed-pool" and {math.inf} == set(brief_kls(study, row))


def number_of(study: Study, row: Row) -> int | None:
    """Which of the row's architectures it takes; None where that is not known yet, or on how many tokens to train it, or there is none."""
    pool = pool_of(study, row)
    if row.tokens_of and study.read("chosen", row.tokens_of) is None:
        return None
    if len(pool) < 2:
        return 0 if pool else None
    if row.method == "healed-pool":
        kls = brief_kls(study, row)
        return None if None in kls or min(kls) == math.inf else kls.index(min(kls))
    return (study.read("pools", row.name) or {"chosen": None})["chosen"]


def architecture_of(study: Study, row: Row) -> Architecture | None:
    """The row's architecture; None where nothing was found or it is not known yet."""
    number = number_of(study, row)
    return None if number is None else pool_of(study, row)[number]


def healing_of(study: Study, row: Row, architecture: Architecture) -> str:
    """The name of what becomes of the row's child: the same for rows that differ in nothing that determines it."""
    settings = gkd_settings(study, row)
    settings = settings and settings.determining
    return fingerprint(origins(study, row.library, architecture), architecture.to_json(), settings, row.seed if settings else None)


def origins(study: Study, library: str, architecture: Architecture) -> list[str]:
    """What determines the weights of each variant: how it was initialised, or the library where that is not all."""
    known = _origins(study, library)
    return [known[layer, subblock, str(variant)] for layer, subblock, variant in architecture.rows()]


@lru_cache
def _origins(study: Study, library: str) -> dict[tuple[int, str, str], str]:
    """Of every variant in the kept table, which stays as it is: rows and pools ask for it many times."""
    known = {}
    for key, init, outcome in study.table(library, "library").set_index(KEY)[["init", "outcome"]].itertuples():
        of_library = outcome not in ("untrained", "rolled back") or init.startswith(("halves", "random"))  # trained halves; drawn anew
        known[key] = library if of_library else init
    return known


def distinct(study: Study) -> list[Row]:
    """The rows without those whose child is an earlier one's, as far as is known."""
    rows = {}
    for row in study.rows:
        architecture = architecture_of(study, row)
        rows.setdefault(row.name if architecture is None else healing_of(study, row, architecture), row)
    return list(rows.values())


def speed_of(architecture: Architecture) -> str:
    """The name of what is timed: weights and seed do not matter to it."""
    return fingerprint(architecture.to_json())


def speed(study: Study, architecture: Architecture) -> dict | None:
    """How fast the architecture is, of parent and child; None where it is not known, or the GPU was disturbed meanwhile.

    The parent is timed with each: where it took a twentieth more than at best on the same machine, somebody else was on the GPU.
    """
    found = study.read("speeds", speed_of(architecture))
    if found is None:
        return None
    alike = [one for one in study.all("speeds") if all(one[key] == found[key] for key in ("machine", "versions"))]
    least = min(one["parent"]["latency_ms"] for one in alike)
    return found if found["parent"]["latency_ms"] <= 1.05 * least else None


def is_settled(study: Study, row: Row) -> bool:
    """Whether the row's child is healed and measured, or there is none."""
    chosen, architecture = study.read("chosen", row.name), architecture_of(study, row)
    if architecture is None:
        return chosen is not None and (not chosen["pool"] or all_diverged(study, row))
    return study.file("healed", healing_of(study, row, architecture)).exists()


def architectures_left(study: Study, library: str) -> list[Architecture] | None:
    """Of which architectures weights of `library` are still needed.

    None: of any, since random ones are to be measured, or not all rows are chosen.
    """
    groups, left = groups_of(study.asked) if library == "full" else {}, []
    if not all(study.file("additivity", group).exists() for group in groups):
        return None
    unsettled = {row.name for row in distinct(study) if not is_settled(study, row)}
    for row in (row for row in study.rows if row.library == library):
        architecture = architecture_of(study, row)
        if study.read("chosen", row.name) is None:
            if row.method in DEPTHS:
                continue  # `joint` chooses among layers that are dropped, which have no weights
            return None
        if needs_measuring(study, row) or row.name in unsettled and architecture is None:
            left += pool_of(study, row)
        elif row.name in unsettled:
            left.append(architecture)
    return left


def has_weights_of(study: Study, library: str, architectures: list[Architecture] | None) -> bool:
    """Whether bld has made on this machine what `architectures` need of `library`; None: all that it had first."""
    if not study.has_weights(library):
        return False
    if architectures is None:
        wanted = set(study.table(library, "library")[KEY].itertuples(index=False, name=None))
    else:
        wanted = {(layer, subblock, str(variant)) for one in architectures for layer, subblock, variant in one.rows()}
    return wanted <= set(tables.read("library", study.folder / library / "library.parquet")[KEY].itertuples(index=False, name=None))


def space_of(study: Study, architectures: list[Architecture] | None) -> list[str]:
    """Overrides that leave each layer only what `architectures` have there; [] where all of the search space is needed."""
    if architectures is None or set(study.cfg.search_space) != set(SUBBLOCKS):  # lists for all layers, and no joint blocks
        return []
    layers = {}
    for layer, subblock, variant in (row for architecture in architectures for row in architecture.rows()):
        layers.setdefault(layer, {s: set() for s in SUBBLOCKS})[subblock].add(str(variant))
    own = {layer: {subblock: sorted(some) for subblock, some in lists.items()} for layer, lists in sorted(layers.items())}
    unquoted = json.dumps(own, separators=(",", ":")).replace('"', "")
    return [*(f"search_space.{subblock}=[]" for subblock in SUBBLOCKS), f"+search_space.layers={unquoted}"]


def parent(study: Study, turn: Turn) -> None:
    """What the parent answers to evaluation.tasks, for all children: without this step each process of `heal` asks for itself."""

    def asked() -> dict:
        answers = Bench(study).of_parent
        return {"tasks": {name: {"right": one.right_N.tolist(), "chance": one.chance} for name, one in answers.items()}}

    once(study, turn, "parent", "answers", [], asked)


def heal(study: Study, turn: Turn) -> None:
    """Heal and measure the rows that no other process has in hand, as many as there is time for; first those of learning rates."""
    bench = lru_cache(lambda: Bench(study))  # a process that finds nothing to do loads nothing

    def can_be_healed(row: Row) -> bool:
        return architecture_of(study, row) is not None and study.has_weights(row.library)

    def work(rows: list[Row]) -> None:
        for row in rows:
            if row.method == "healed-pool" and study.has_weights(row.library):
                briefly(row)
            if not can_be_healed(row):
                continue
            architecture = architecture_of(study, row)
            name, known_s = healing_of(study, row, architecture), row_seconds(study, row, turn.per_gpu)
            once(study, turn, "healed", name, known_s, lambda: {"row": row.name, **bench().heal(row, architecture, turn.per_gpu)})

    def briefly(row: Row) -> None:
        for name, architecture in zip(brief_names(study, row), pool_of(study, row), strict=True):
            known_s = [one["took_s"] for one in study.all("briefly")]
            once(study, turn, "briefly", name, known_s, lambda: bench().briefly(row, architecture))

    while (left := rates_left(study)) and all(map(can_be_healed, left)):
        if not any(turn.allows(row_seconds(study, row, turn.per_gpu)) for row in left):
            break
        work(left)
        time.sleep(1)  # others are at what is left; if they end before it does, it is this one's
    if left:
        print(f"heal: the rows wait for {', '.join(row.name for row in left)}")
    else:
        work(distinct(study))


def summary(found: dict) -> str:
    """What a worker says of what it found out."""
    if "architecture" in found and "kl" in found:
        return f"KL {found['kl']} after brief GKD, "
    name = f"{found['row']}, " if "row" in found else ""
    if "after" in found:
        before, after = found["before"], found["after"]
        return f"{name}KL {before['kl']:.4g} before, {after['kl']:.4g} ± {after['kl_stderr']:.2g} after, "
    return f"{name}{found['failed']}, " if "failed" in found else ""


def row_seconds(study: Study, row: Row, per_gpu: int) -> list[float]:
    """What rows of as many tokens took, or else of the next more, where as many workers shared a GPU."""
    times, mine = collections.defaultdict(list), _num_tokens(gkd_json(study, row))
    for record in study.all("healed"):
        if record["per_gpu"] == per_gpu and "failed" not in record:
            times[_num_tokens(record["gkd"])].append(record["took_s"])
    return times[min((number for number in times if number >= mine), default=mine)]


def _num_tokens(settings: dict | None) -> int:
    return gkd.Settings(**settings).num_tokens if settings else 0


def speeds(study: Study, turn: Turn) -> None:
    """Time the child of every architecture that was chosen in turn with the parent. Its weights are random: no library is needed."""
    scenario, settings = fill(Workload, study.cfg.workload).scenario, fill(evaluation.Settings, study.cfg.evaluation)
    parent = lru_cache(lambda: load(study))

    def timed(architecture: Architecture) -> dict:
        with tempfile.TemporaryDirectory() as folder:
            models = {"parent": parent().model, "child": make_child(parent(), architecture, random_weights(parent(), Path(folder)))}
        totals = side_by_side(models, scenario, study.cfg.hardware.serving, settings.repeats, warmup=1)
        return {"architecture": architecture.to_json(), **totals, **made_with(parent())}

    for architecture in filter(None, (architecture_of(study, row) for row in study.rows)):
        known_s = [one["took_s"] for one in study.all("speeds")]
        again = (lambda: timed(architecture), lambda: speed(study, architecture) is not None)
        once(study, turn, "speeds", speed_of(architecture), known_s, *again)


def joint(study: Study, turn: Turn) -> None:
    """The joint KL of the pool's architectures, and, beside the sum of scores, of random ones at each speed-up and the frontier's.

    Rows that drop whole layers by joint KL are chosen here.
    """
    bench = lru_cache(lambda: Bench(study))
    problem, groups = study.problem("full", "kl"), groups_of(study.asked)

    def measured(number: int, speedup: float | None) -> dict:
        if speedup is None:
            found = [one.architecture for one in search.frontier(problem, study.limits(None), "speedup", study.asked.frontier)]
        else:
            share = len(range(number, study.asked.random, len(study.asked.speedups)))
            settings = fill(rivals.Settings, study.cfg.rivals, seed=study.cfg.rivals.seed + number)
            found = rivals.random_architectures(problem, constraints_from(study.limits(speedup), problem), share, settings)
        kls = bench().joint_kls("full", found)
        rows = [
            {"predicted": problem.score(problem.rows_of(one)), "realised": kl, "architecture": one.to_json()}
            for one, kl in zip(found, kls, strict=True)
        ]
        return {"rows": rows}

    for row in study.rows:
        if row.method in DEPTHS:
            once(study, turn, "chosen", row.name, [], lambda: bench().depth(row))
        if needs_measuring(study, row) and study.has_weights(row.library):
            once(study, turn, "pools", row.name, [], lambda: bench().pool(row))
    for number, (name, speedup) in enumerate(groups.items()):
        if not study.file("additivity", name).exists() and not study.has_weights("full"):
            raise FileNotFoundError(f"{study.folder}/full/ has no library: `python -m benchmarks.study libraries` makes it")
        known_s = [one["took_s"] for one in study.all("additivity")]
        once(study, turn, "additivity", name, known_s, lambda: measured(number, speedup))
