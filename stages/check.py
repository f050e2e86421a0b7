"""Say what is wrong with the tables of a folder, row by row, and how to mend it. Foreign tables first of all."""
from pathlib import Path

from puzzle_core import checks
from puzzle_core.config import stage
from puzzle_core.errors import UserError


@stage("check", reads="search")
def run(cfg):
    tables = checks.load(Path(cfg.data))
    faults = checks.faults(tables)
    for fault in faults:
        print(f"- {fault}")
    if faults:
        raise UserError(f"{len(faults)} faults in the tables of {cfg.data}/; docs/tables.md describes what is expected")
    print(f"check: {cfg.data}/ is in order: {checks.summary(tables)}")


if __name__ == "__main__":
    run()
