"""Choose one variant per layer and subblock: the least total score within the constraints. Tables in, solution out."""
from pathlib import Path

from puzzle_core import plots, search, tables, targets
from puzzle_core.config import fill, plain, stage
from puzzle_core.files import write_json
from puzzle_core.spec import Scenario


@stage("search")
def run(cfg):
    data, out = Path(cfg.data), Path(cfg.out)
    scores, costs = tables.read("scores", data / "scores.parquet"), tables.read("costs", data / "costs.parquet")
    scores = targets.expressible(scores, cfg.search.export_target)
    problem = search.Problem.from_tables(scores, costs, cfg.search.metric, str(fill(Scenario, cfg.workload)))
    constraints = search.constraints_from(plain(cfg.constraints), problem)
    solution = search.solve(problem, constraints, cfg.search.time_limit_s)
    write_json(out / "solution.json", solution.to_json())
    write_json(out / "metrics" / "predicted.json", solution.predicted())
    plots.architecture_picture(solution.architecture, out / "plots" / "architecture.png", solution.title)
    print(f"search: {solution.title}; {out}/solution.json")
    return solution.score


if __name__ == "__main__":
    run()
