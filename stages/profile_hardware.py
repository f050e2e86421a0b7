"""Measure what each variant costs on the machine at hand, for the workload: prefill and decode time, bytes, parameters."""
from pathlib import Path

from puzzle_core import costs, tables
from puzzle_core.config import fill, plain, stage
from puzzle_core.files import lock
from puzzle_core.parents import load_parent, pick_device
from puzzle_core.spec import Scenario
from puzzle_core.subblocks import resolve_space


@stage("profile-hardware")
def run(cfg):
    with lock(cfg.out, "profile-hardware"):  # two at once would time each other
        parent = fill(load_parent, cfg.parent, device=pick_device(cfg.hardware.device))
        space = resolve_space(plain(cfg.search_space), parent.model.config, parent.family)
        scenario = fill(Scenario, cfg.workload)
        table = costs.profile(parent, space, scenario, cfg.hardware.repeats, cfg.hardware.warmup, cfg.hardware.decode_steps)
        tables.write("costs", table, Path(cfg.out) / "costs.parquet")
    print(f"profile-hardware: {len(table)} costs for {scenario} on {table.hardware[0]}; {cfg.out}/costs.parquet")


if __name__ == "__main__":
    run()
