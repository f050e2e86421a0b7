"""Train the block library: one file per layer, subblock and variant. A rerun keeps every finished file that still matches."""
from pathlib import Path

from puzzle_core import bld, ranks, tables
from puzzle_core.config import fill, plain, refuse_in_dvc, stage
from puzzle_core.corpus import Corpus
from puzzle_core.files import lock
from puzzle_core.parents import load_parent, pick_device
from puzzle_core.subblocks import resolve_layers


def plan(cfg, settings):
    """Print what the library will take: reads no weights, makes nothing."""
    refuse_in_dvc("bld.plan_only")
    parent = fill(load_parent, cfg.parent, device="meta", skeleton=True)
    print(bld.forecast(parent, resolve_layers(plain(cfg.search_space), parent.model.config, parent.family), settings))


@stage("bld", launches=lambda cfg: not cfg.bld.get("plan_only"))
def run(cfg):
    out, settings = Path(cfg.out), fill(bld.Settings, cfg.bld)
    if settings.plan_only:
        plan(cfg, settings)
        return
    with ranks.joined() as mine, lock(out, mine.tag("bld")):
        parent = fill(load_parent, cfg.parent, device=mine.device(pick_device(cfg.parent.get("device", "auto"))), in_parts=True)
        corpus = Corpus(parent.tokenizer, plain(cfg.corpus))
        spaces = resolve_layers(plain(cfg.search_space), parent.model.config, parent.family)
        jobs = bld.jobs(parent, spaces, settings, cfg.seed, corpus)
        library, num_made = bld.train_library(parent, jobs, corpus, settings, cfg.seed, out / "blocks", mine)
        if mine.first:
            tables.write("library", library, out / "library.parquet")
            print(f"bld: {num_made} variants made, {len(library) - num_made} kept; {out}/library.parquet")


if __name__ == "__main__":
    run()
