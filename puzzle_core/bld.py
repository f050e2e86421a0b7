"""Blockwise local distillation: every variant of every layer, each trained on its own to do what the parent does there.

The parent runs once over each batch, and all variants of a window of layers learn from what it sees and says on the way.
Where the hidden states of the whole training budget fit in memory, a window is one layer and the parent's run goes on
from where the last window ended; else windows are as large as memory allows, and each runs the parent's layers below it
again (`plan`). Layers are independent, so ranks share nothing but rows.
"""
import functools
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from puzzle_core.corpus import Corpus
from puzzle_core.files import fingerprint
from puzzle_core.parents import Parent
from puzzle_core.plan import Wanted, memory_limit, plan, work
from puzzle_core.ranks import ALONE, Ranks, divide_in_order
from puzzle_core.shards import GIB, num_bytes
from puzzle_core.spec import PARENT, Joint, Variant
from puzzle_core.subblocks import build_subblock, variant_row
from puzzle_core.trace import ParentRun
from puzzle_core.trainees import Job, Settings
from puzzle_core.windows import Window, unfinished

VERSION = 3  # raise when a change here, or in a module below, changes what a variant's weights are


def jobs(parent: Parent, spaces: list[dict[str, list[Variant | Joint]]], settings: Settings, seed: int, corpus: Corpus) -> list[Job]:
    """Every row of the library, layer by layer, from the variants by subblock of each layer.

    A row's fingerprint does not depend on which other rows there are.
    """

    def job(layer: int, subblock: str, variant: Variant | Joint) -> Job:
        halves = tuple(job(layer, *half) for half in variant.halves) if isinstance(variant, Joint) else ()
        shared = (VERSION, seed, settings.determining(variant), parent.identity, corpus.fingerprint)
        begun = [half.fingerprint for half in halves]
        return Job(layer, subblock, variant, fingerprint(*shared, *begun, layer, subblock, str(variant)), halves)

    return [
        job(layer, subblock, variant)
        for layer, space in enumerate(spaces)
        for subblock, variants in space.items()
        for variant in variants
    ]


def train_library(
    parent: Parent, wanted: list[Job], corpus: Corpus, settings: Settings, seed: int, blocks: Path, ranks: Ranks = ALONE
) -> tuple[pd.DataFrame, int]:
    """Make every wanted variant's file, keep those that are whole and still match, remove what is not wanted.

    Returns the library table and the number of variants made; the same on every rank. With several, each makes its share
    of the variants: neighbouring layers, and part of one, so that no rank runs the parent further up than it must.
    """
    blocks.mkdir(parents=True, exist_ok=True)
    rows = {job: row for job in wanted if (row := _finished(job, blocks)) is not None}
    missing = sorted((job for job in wanted if job not in rows), key=lambda job: job.layer)
    ranks.wait()  # all know the same rows before anyone makes more
    for some in rounds(missing, lambda job: job.variant):
        rows |= _shared(parent, some, corpus, settings, seed, blocks, ranks)
    if ranks.first:
        for stray in {p.name for p in blocks.iterdir()} - {job.file_name for job in wanted}:
            (blocks / stray).unlink()
        for state in unfinished(blocks).glob("*.pt"):  # of runs that were killed and never taken up again
            state.unlink()
    return pd.DataFrame([rows[job] for job in wanted]), len(missing)


def _shared(
    parent: Parent, missing: list[Job], corpus: Corpus, settings: Settings, seed: int, blocks: Path, ranks: Ranks
) -> dict[Job, dict]:
    """Make this rank's share of the missing variants; the rows of all, once every rank has made its own."""
    mine = [missing[i] for i in ranks.mine_in_order(*work(parent, wanted_of(missing), settings))]
    made = _make(parent, mine, corpus, settings, seed, blocks, show=ranks.first) if mine else {}
    return dict(ranks.gather(list(made.items())))


def wanted_of(some: list[Job]) -> list[Wanted]:
    return [(job.layer, job.subblock, job.variant) for job in some]


def rounds(some: list, variant_of: Callable[[object], Variant | Joint]) -> list[list]:
    """What is made one after the other: joint blocks need their halves. Neither is empty."""
    joint = [isinstance(variant_of(one), Joint) for one in some]
    return [part for now in (False, True) if (part := [one for one, is_joint in zip(some, joint, strict=True) if is_joint is now])]


def forecast(parent: Parent, spaces: list[dict[str, list[Variant | Joint]]], settings: Settings) -> str:
    """The whole library's plan as a table, for 1, 8 and 64 processes with a GPU each; `parent` may have no weights.

    What a process does is its fullest rank's: windows, layers that a training token goes through, bytes, FLOPs. Days are FLOPs at
    `bld.plan_tflops`, with the closed form's in float32 and float64 counted as often as it is slower (`plan.work`). ValueError where
    one layer does not fit.
    """
    wanted = [(layer, s, v) for layer, space in enumerate(spaces) for s, variants in space.items() for v in variants]
    bytes_of = functools.cache(lambda subblock, variant: num_bytes(build_subblock(parent, 0, subblock, variant)))
    size = sum(bytes_of(s, v) for _, s, v in wanted if v != PARENT)
    config, limit = parent.model.config.get_text_config(), memory_limit(parent.device, settings.memory_gib)
    lines = [
        f"{config.model_type}, {len(spaces)} layers, hidden size {config.hidden_size}, {str(parent.model.dtype).removeprefix('torch.')}: "
        f"{len(wanted)} variants, {size / GIB:,.1f} GiB on disk; {settings.train_tokens:,} tokens each; "
        + (f"{limit / GIB:,.4g} GiB of memory" if limit < math.inf else "memory without limit (bld.memory_gib)"),
        "",
        "| GPUs | windows | layers run per token | peak GiB | training FLOPs | parent FLOPs | closed form, as FLOPs | days |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for num in (1, 8, 64):
        all_of = functools.reduce(_Load.__add__, (_fullest(parent, part, settings, num) for part in rounds(wanted, lambda one: one[2])))
        columns = [str(all_of.num_windows), str(all_of.layer_passes), f"{all_of.peak_bytes / GIB:,.1f}"]
        columns += [f"{flops:.3g}" for flops in (all_of.training_flops, all_of.parent_flops, all_of.closed_form_flops)]
        lines.append(f"| {num} | {' | '.join(columns)} | {all_of.flops / (settings.plan_tflops * 1e12) / 86400:,.3g} |")
    return "\n".join([*lines, "", f"Of the busiest GPU; days at {settings.plan_tflops:g} TFLOP/s (bld.plan_tflops)."])


@dataclass(frozen=True)
class _Load:
    """What one rank has to do."""

    num_windows: int
    layer_passes: int
    peak_bytes: int
    training_flops: float
    parent_flops: float
    closed_form_flops: float

    @property
    def flops(self) -> float:
        return self.training_flops + self.parent_flops + self.closed_form_flops

    def __add__(self, later: "_Load") -> "_Load":
        """One after the other."""
        sums = {name: value + getattr(later, name) for name, value in vars(self).items()}
        return _Load(**sums | {"peak_bytes": max(self.peak_bytes, later.peak_bytes)})


def _fullest(parent: Parent, wanted: list[Wanted], settings: Settings, num: int) -> _Load:
    """Of `num` ranks the one with most to do, and the most memory that any takes."""
    owner = divide_in_order(*work(parent, wanted, settings), num)
    closed, reach = work(parent, wanted, replace(settings, train_tokens=0))
    loads = []
    for rank in sorted(set(owner)):
        mine = [index for index, whose in enumerate(owner) if whose == rank]
        its = plan(parent, [wanted[index] for index in mine], settings)
        before = sum(closed[index] for index in mine) + max(reach[index] for index in mine)
        loads.append(_Load(len(its.windows), its.layer_passes, its.peak_bytes, its.training_flops, its.parent_flops, before))
    return replace(max(loads, key=lambda load: load.flops), peak_bytes=max(load.peak_bytes for load in loads))


def text_of(corpus: Corpus, settings: Settings, seed: int) -> dict[str, list]:
    """[B, T] token batches of each use: what variants learn from, and what their losses are measured on."""
    shape = {"seq_len": settings.seq_len, "batch_size": settings.batch_size}
    return {
        "calibration": corpus.batches("train", settings.calibration_tokens, seed=f"bld-calibration-{seed}", **shape),
        "train": corpus.batches("train", settings.train_tokens, seed=f"bld-{seed}", **shape),
        "val": corpus.batches("development", settings.val_tokens, seed=f"bld-val-{seed}", **shape),
    }


def _make(parent: Parent, missing: list[Job], corpus: Corpus, settings: Settings, seed: int, blocks: Path, show: bool) -> dict[Job, dict]:
    """Train the missing variants, window by window; the rows of their files."""
    it_takes, batches = plan(parent, wanted_of(missing), settings), text_of(corpus, settings, seed)
    run = ParentRun(parent, {use: some for use, some in batches.items() if it_takes.holds_training or use != "train"})
    rows = {}
    title = f"bld: {len(missing)} variants, {len(it_takes.windows)} windows"
    with tqdm(total=it_takes.num_steps, desc=title, unit="step", disable=not show) as progress:
        position = 0
        for layers in it_takes.windows:
            for layer in range(position, layers.start):
                run.skip(layer)
            here = [job for job in missing if job.layer in layers]
            with parent.present(*layers):
                rows |= Window(run, layers, here, settings, len(batches["train"]), blocks).train(batches["train"], progress)
            gc.collect()  # the window's optimizer and graph hold each other, and most of the memory
            position = layers.stop
    return rows


def _finished(job: Job, blocks: Path) -> dict | None:
    """The row of a variant whose file is whole and was made exactly as `job` would be; else None."""
    row = variant_row(blocks / job.file_name)
    return row if row.get("fingerprint") == job.fingerprint else None
