"""What each variant costs on the hardware, for each workload: prefill and decode time, bytes, parameters."""
from pathlib import Path

from puzzle_core import costs, tables
from puzzle_core.config import fill, plain, stage
from puzzle_core.files import lock
from puzzle_core.parents import load_parent, pick_device
from puzzle_core.spec import Workload
from puzzle_core.subblocks import resolve_space


@stage("profile-hardware")
def run(cfg):
    out, scenarios, backend = Path(cfg.out), fill(Workload, cfg.workload).scenarios, costs.backend(plain(cfg.hardware))
    with lock(out, "profile-hardware"):  # two at once would time each other
        path, partial = out / "costs.parquet", out / ".costs.partial.parquet"
        parent = fill(load_parent, cfg.parent, device=pick_device(cfg.hardware.device))
        space = resolve_space(plain(cfg.search_space), parent.model.config, parent.family)
        known = tables.read_known("costs", path, partial)
        table, made = costs.profile(parent, space, scenarios, backend, known, lambda rows: tables.write("costs", rows, partial))
        tables.write("costs", table, path)
        partial.unlink(missing_ok=True)
    kept = table["fingerprint"].nunique() - made
    print(f"profile-hardware: {made} costs {backend.source} on {table.hardware[0]}, {kept} kept{costs.unsure(table)}; "
          f"{', '.join(map(str, scenarios))}; {path}")  # fmt: skip


if __name__ == "__main__":
    run()
