"""The MIP beside reinforcement learning, greedy and simpler choices: same tables, same constraints; a table and a picture."""
from pathlib import Path

from puzzle_core import plots, rivals, search
from puzzle_core.config import fill, plain, stage
from puzzle_core.constraints import constraints_from
from puzzle_core.files import write_json
from puzzle_core.spec import Workload


@stage("rivals", reads="search")
def run(cfg):
    data, out = Path(cfg.data), Path(cfg.out)
    problem = search.posed(data, fill(search.Settings, cfg.search), fill(Workload, cfg.workload).scenario)
    constraints = constraints_from(plain(cfg.constraints), problem)
    entries = rivals.compete(problem, constraints, fill(rivals.Settings, cfg.rivals))
    rows = [{**entry.to_json(), "source": problem.source, "hardware": problem.hardware} for entry in entries]
    write_json(out / "rivals.json", rows)
    title = ", ".join(map(str, constraints)) or "no constraint"
    plots.rivals_picture(rows, problem.metric, out / "plots" / "rivals.png", f"{title}, {problem.source} costs")
    print(rivals.table(entries, problem.totals_there))
    costs_of = f"{problem.source} costs of {problem.hardware}"
    print(f"rivals: {title} on {problem.scenario}, total {problem.metric}; {costs_of}; {out}/rivals.json, {out}/plots/rivals.png")


if __name__ == "__main__":
    run()
