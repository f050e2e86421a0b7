"""Choose one variant per layer and subblock: the least total score within the constraints. Tables in, solution out."""
from pathlib import Path

from puzzle_core import search
from puzzle_core.architecture_picture import architecture_picture
from puzzle_core.config import fill, plain, stage
from puzzle_core.files import write_json
from puzzle_core.spec import Workload


@stage("search")
def run(cfg):
    data, out, settings = Path(cfg.data), Path(cfg.out), fill(search.Settings, cfg.search)
    problem = search.posed(data, settings, fill(Workload, cfg.workload).scenario)
    pool = search.search(problem, plain(cfg.constraints), settings)
    solution = pool[0]
    write_json(out / "solution.json", solution.to_json())
    write_json(out / "pool.json", [one.to_json() for one in pool])
    architecture_picture(solution.architecture, out / "plots" / "solution.png", solution.title)
    more = f", and {len(pool) - 1} of {settings.pool_size - 1} others" if settings.pool_size > 1 else ""
    print(f"search: {solution.title}{more}; {solution.priced}; {out}/solution.json")
    return solution.value


if __name__ == "__main__":
    run()
