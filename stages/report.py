"""One HTML page of a run that needs no network: tables, pictures, curves, continuations by parent and child, settings."""
from pathlib import Path

from puzzle_core import evaluation, report
from puzzle_core.children import load_child
from puzzle_core.config import fill, plain, stage
from puzzle_core.corpus import Corpus
from puzzle_core.files import atomic
from puzzle_core.parents import load_parent, pick_device
from puzzle_core.serving import hardware_name

PRESETS = ("parent", "corpus", "search_space", "bld", "score", "hardware", "workload", "gkd")
SECTIONS = ("use", "search", "constraints", "frontier", "evaluation", "realised")


@stage("report", command=("seed", "continuations", *SECTIONS, *PRESETS))
def run(cfg):
    data, device, texts = Path(cfg.data), pick_device(cfg.hardware.device), []
    made = report.Run.read(data)
    if cfg.continuations:
        parent = fill(load_parent, cfg.parent, device=device)
        models = {"parent": parent.model, **{name: load_child(data / name, parent.model.dtype, device) for name in made.children}}
        texts = evaluation.continuations(models, Corpus(parent.tokenizer, plain(cfg.corpus)), **plain(cfg.continuations))
    settings = {"seed": cfg.seed, **{key: plain(cfg[key]) for key in (*SECTIONS, *PRESETS)}}
    page = report.page(made, texts, cfg.frontier.constraint, settings, hardware_name(device))
    with atomic(Path(cfg.out) / "report.html") as part:
        part.write_text(page)
    print(f"report: {cfg.out}/report.html, {len(page) / 1e6:.1f} MB, needs no network")


if __name__ == "__main__":
    run()
