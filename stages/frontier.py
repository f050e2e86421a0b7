"""The best score at many limits of one constraint, solved in one process: a table, a picture and the data of a plot."""
from pathlib import Path

from puzzle_core import plots, search
from puzzle_core.config import fill, plain, stage
from puzzle_core.files import write_json
from puzzle_core.spec import Workload


@stage("frontier")
def run(cfg):
    data, out, settings = Path(cfg.data), Path(cfg.out), fill(search.Settings, cfg.search)
    problem = search.posed(data, settings, fill(Workload, cfg.workload).scenario)
    name, how = cfg.frontier.constraint, plain(cfg.frontier)
    del how["constraint"]
    points = search.frontier(problem, plain(cfg.constraints), name, **how, time_limit_s=settings.time_limit_s)
    write_json(out / "frontier.json", [point.to_json() for point in points])
    rows = [{"limit": point.constraints[-1].limit, "score": point.score, "gap": point.gap, **point.predicted()} for point in points]
    write_json(out / "plots" / "frontier.json", rows)
    title = f"{problem.metric} lost on {problem.scenario}, {problem.source} costs"
    plots.frontier_picture(rows, name, problem.metric, out / "plots" / "frontier.png", title)
    proven = sum(point.status == "optimal" for point in points)
    ends = f"{name} {rows[0]['limit']:.4g} to {rows[-1]['limit']:.4g}, {problem.metric} {points[0].score:.4g} to {points[-1].score:.4g}"
    print(f"frontier: {len(points)} points, {proven} proven optimal: {ends}; {points[0].priced}")
    print(f"frontier: {out}/frontier.json, {out}/plots/frontier.png")


if __name__ == "__main__":
    run()
