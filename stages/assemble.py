"""Choose the pool's best, build its child, prove that the child loads anywhere, measure it beside the parent."""
from pathlib import Path

from puzzle_core import cards, evaluation, gkd, plots, pools, realised, tables
from puzzle_core.architecture_picture import architecture_picture
from puzzle_core.children import make_child, save_child, verify_reload
from puzzle_core.config import fill, plain, stage
from puzzle_core.corpus import Corpus
from puzzle_core.files import atomic, lock, read_json, write_json
from puzzle_core.parents import load_parent, pick_device
from puzzle_core.spec import Solution, without_times


@stage("assemble")
def run(cfg):
    data, out = Path(cfg.data), Path(cfg.out)
    with lock(out, "assemble"):
        pool = [Solution.from_json(one) for one in read_json(data / "pool.json")]
        parent = fill(load_parent, cfg.parent, device=pick_device(cfg.hardware.device))
        weights_of = tables.variant_files(tables.read("library", data / "library.parquet"), data / "blocks")
        corpus, settings = Corpus(parent.tokenizer, plain(cfg.corpus)), fill(evaluation.Settings, cfg.evaluation)
        reported, measured = settings.batches(corpus), fill(realised.Settings, cfg.realised)
        healing = None if measured.heal is None else fill(gkd.Settings, cfg.realised.heal)
        more = (healing, cfg.seed, out / ".pool")
        solution, compared = pools.best_of(parent, pool, weights_of, corpus, measured, *more)
        child = make_child(parent, solution.architecture, weights_of)
        with atomic(out / "child") as part:  # it appears when it is proved, measured and described
            save_child(child, parent.tokenizer, part)
            verify_reload(child, part, reported[0][:1])
            metrics = evaluation.measure(parent.model, child, corpus, solution, cfg.hardware.serving, settings)
            evaluation.record(part, metrics, parent.model, solution, cfg.hardware.serving)
            cards.write(part, parent, solution, metrics, cards.ASSEMBLED, corpus.name)
        predicted = without_times(solution.predicted())  # its times are those of another hour, the parent's too
        for name, row in {**metrics, "predicted": predicted}.items():
            write_json(out / "metrics" / f"{name}.json", row)
        write_json(out / "chosen.json", solution.to_json())
        write_json(out / "plots" / "pool.json", compared)
        plots.predicted_picture(solution, metrics, out / "plots" / "predicted_realised.png")
        architecture_picture(solution.architecture, out / "plots" / "architecture.png", solution.title)
    print(evaluation.table({"parent": metrics["parent"], "predicted": predicted, "child": metrics["child"]}))
    print(f"assemble: {pools.choice(compared)}; {out}/child")


if __name__ == "__main__":
    run()
