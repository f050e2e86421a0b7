"""The joint KL of each of many architectures beside the sum of scores predicted for it: a table and a picture."""
from pathlib import Path

from puzzle_core import plots, realised, rivals, search, tables
from puzzle_core.config import fill, plain, stage
from puzzle_core.constraints import constraints_from
from puzzle_core.corpus import Corpus
from puzzle_core.files import write_json
from puzzle_core.parents import load_parent, pick_device
from puzzle_core.spec import Workload


@stage("realised", reads="assemble", command=("architectures", "random", "search", "constraints", "workload", "rivals"))
def run(cfg):
    data, out, settings = Path(cfg.data), Path(cfg.out), fill(realised.Settings, cfg.realised)
    problem = search.posed(data, fill(search.Settings, cfg.search), fill(Workload, cfg.workload).scenario)
    rows = [row for name in cfg.architectures for row in realised.read_architectures(data / name)]
    if cfg.random:
        constraints = constraints_from(plain(cfg.constraints), problem)
        drawn = rivals.random_architectures(problem, constraints, cfg.random, fill(rivals.Settings, cfg.rivals))
        rows += [{"group": "random", "name": f"random {n}", "architecture": one} for n, one in enumerate(drawn, start=1)]
    parent = fill(load_parent, cfg.parent, device=pick_device(cfg.hardware.device), in_parts=True)
    corpus = Corpus(parent.tokenizer, plain(cfg.corpus))
    batches = settings.batches(corpus)
    weights_of = tables.variant_files(tables.read("library", data / "library.parquet"), data / "blocks")
    rows = realised.measure(parent, rows, lambda one: problem.score(problem.rows_of(one)), weights_of, batches, settings)
    summary = realised.agreement(rows)
    write_json(out / "realised.json", rows)
    write_json(out / "metrics" / "realised.json", summary)
    title = f"{len(rows)} architectures, {sum(batch.size for batch in batches):,} development tokens"
    plots.realised_picture(rows, problem.metric, out / "plots" / "realised.png", title)
    print(realised.table(rows))
    print(f"realised: {title}: {realised.in_words(summary)}; {out}/realised.json, {out}/plots/realised.png")


if __name__ == "__main__":
    run()
