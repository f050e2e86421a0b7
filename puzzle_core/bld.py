"""Blockwise local distillation: every variant of every layer, each trained on its own to do what the parent does there.

The parent runs once over each batch, and all variants of a window of layers learn from what it sees and says on the way.
Where the hidden states of the whole training budget fit in memory, a window is one layer and the parent's run goes on
from where the last window ended; else windows are as large as memory allows, and each runs the parent's layers below it
again (`plan`). Layers are independent, so ranks share nothing but rows.
"""
import gc
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from puzzle_core.corpus import Corpus
from puzzle_core.files import fingerprint
from puzzle_core.parents import Parent
from puzzle_core.plan import Plan, plan, work
from puzzle_core.ranks import ALONE, Ranks
from puzzle_core.spec import Joint, Variant
from puzzle_core.subblocks import variant_row
from puzzle_core.trace import ParentRun
from puzzle_core.trainees import Job
from puzzle_core.windows import Settings, Window, unfinished

VERSION = 2  # raise when a change here, or in a module below, changes what a variant's weights are


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
    for some in ([job for job in missing if not job.halves], [job for job in missing if job.halves]):  # blocks need their halves
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
    shares = work(parent, _variants(missing), settings.budgets, settings.seq_len, len(settings.ridge or []), settings.target)
    mine = [missing[i] for i in ranks.mine_in_order(*shares)]
    made = _make(parent, mine, corpus, settings, seed, blocks, show=ranks.first) if mine else {}
    return dict(ranks.gather(list(made.items())))


def _variants(some: list[Job]) -> list[tuple[int, str, Variant | Joint]]:
    return [(job.layer, job.subblock, job.variant) for job in some]


def planned(parent: Parent, missing: list[Job], settings: Settings) -> Plan:
    """What it takes to make these variants in one process."""
    return plan(
        parent,
        _variants(missing),
        settings.budgets,
        settings.seq_len,
        settings.batch_size,
        settings.memory_gib,
        ridge=settings.ridge is not None,
        compiled=settings.compile,
        target=settings.target,
        channels=settings.channels,
    )


def _make(parent: Parent, missing: list[Job], corpus: Corpus, settings: Settings, seed: int, blocks: Path, show: bool) -> dict[Job, dict]:
    """Train the missing variants, window by window; the rows of their files."""
    shape = {"seq_len": settings.seq_len, "batch_size": settings.batch_size}
    it_takes = planned(parent, missing, settings)
    batches = {
        "calibration": corpus.batches("train", settings.calibration_tokens, seed=f"bld-calibration-{seed}", **shape),
        "train": corpus.batches("train", settings.train_tokens, seed=f"bld-{seed}", **shape),
        "val": corpus.batches("validation", settings.val_tokens, seed=f"bld-val-{seed}", **shape),
    }
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
