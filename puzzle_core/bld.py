"""Blockwise local distillation: every variant of every layer, each trained on its own to do what the parent does there.

The parent runs once over each batch, and all variants of a window of layers learn from what it sees and says on the way.
Where the hidden states of the whole training budget fit in memory, a window is one layer and the parent's run goes on
from where the last window ended; else windows are as large as memory allows, and each runs the parent's layers below it
again (`plan`).
"""
import gc
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from puzzle_core.corpus import Corpus
from puzzle_core.files import fingerprint
from puzzle_core.parents import Parent
from puzzle_core.plan import plan
from puzzle_core.spec import Variant
from puzzle_core.subblocks import variant_row
from puzzle_core.trace import ParentRun
from puzzle_core.trainees import Job
from puzzle_core.windows import Settings, Window

VERSION = 2  # raise when a change here, or in a module below, changes what a variant's weights are


def jobs(parent: Parent, spaces: list[dict[str, list[Variant]]], settings: Settings, seed: int, corpus: Corpus) -> list[Job]:
    """Every row of the library, layer by layer, from the variants by subblock of each layer.

    A row's fingerprint does not depend on which other rows there are.
    """

    def made_by(*row: object) -> str:
        return fingerprint(VERSION, seed, settings.determining(row[-1]), parent.identity, corpus.fingerprint, *map(str, row))

    return [
        Job(layer, subblock, variant, made_by(layer, subblock, variant))
        for layer, space in enumerate(spaces)
        for subblock, variants in space.items()
        for variant in variants
    ]


def train_library(
    parent: Parent, wanted: list[Job], corpus: Corpus, settings: Settings, seed: int, blocks: Path
) -> tuple[pd.DataFrame, int]:
    """Make every wanted variant's file, keep those that are whole and still match, remove what is not wanted.

    Returns the library table and the number of variants made.
    """
    blocks.mkdir(parents=True, exist_ok=True)
    rows = {job: row for job in wanted if (row := _finished(job, blocks)) is not None}
    missing = [job for job in wanted if job not in rows]
    if missing:
        rows |= _make(parent, missing, corpus, settings, seed, blocks)
    for stray in {p.name for p in blocks.iterdir()} - {job.file_name for job in wanted}:
        (blocks / stray).unlink()
    return pd.DataFrame([rows[job] for job in wanted]), len(missing)


def _make(parent: Parent, missing: list[Job], corpus: Corpus, settings: Settings, seed: int, blocks: Path) -> dict[Job, dict]:
    """Train the missing variants, window by window; the rows of their files."""
    shape = {"seq_len": settings.seq_len, "batch_size": settings.batch_size}
    budgets = {"calibration": settings.calibration_tokens, "train": settings.train_tokens, "val": settings.val_tokens}
    planned = plan(
        parent,
        [(job.layer, job.subblock, job.variant) for job in missing],
        budgets,
        memory_gib=settings.memory_gib,
        ridge=settings.ridge is not None,
        compiled=settings.compile,
        target=settings.target,
        **shape,
    )
    batches = {
        "calibration": corpus.batches("train", settings.calibration_tokens, seed=f"bld-calibration-{seed}", **shape),
        "train": corpus.batches("train", settings.train_tokens, seed=f"bld-{seed}", **shape),
        "val": corpus.batches("validation", settings.val_tokens, seed=f"bld-val-{seed}", **shape),
    }
    run = ParentRun(parent, {use: some for use, some in batches.items() if planned.holds_training or use != "train"})
    rows = {}
    with tqdm(total=planned.num_steps, desc=f"bld: {len(missing)} variants, {len(planned.windows)} windows", unit="step") as progress:
        position = 0
        for layers in planned.windows:
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
