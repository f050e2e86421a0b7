"""Choose the joint blocks that are worth training from a scored library: writes a search space that has them."""
from pathlib import Path

import yaml

from puzzle_core import coupling, tables
from puzzle_core.config import ROOT, plain, stage
from puzzle_core.files import atomic
from puzzle_core.spec import SUBBLOCKS

HEAD = "# Written by `python -m stages.couple`: what the layers could become before, and joint blocks of what looked best there.\n"


@stage("couple", reads="bld")
def run(cfg):
    data, path = Path(cfg.data), ROOT / "conf" / "search_space" / f"{cfg.couple.preset}.yaml"
    library, scores = tables.read("library", data / "library.parquet"), tables.read("scores", data / "scores.parquet")
    blocks = coupling.promising(library, scores, cfg.couple.metric, {s: cfg.couple[s] for s in SUBBLOCKS}, cfg.couple.context_len)
    with atomic(path) as part:
        space = coupling.with_blocks(plain(cfg.search_space), blocks)
        part.write_text(HEAD + yaml.safe_dump(space, sort_keys=False, default_flow_style=None, width=140))
    count = sum(map(len, blocks.values()))
    print(f"couple: {count} joint blocks in {path}; set `search_space: {path.stem}` in params.yaml, then `dvc repro`")


if __name__ == "__main__":
    run()
