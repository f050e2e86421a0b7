"""Whether several processes make the tables that one makes: bld and score of a whole parent, by the stages themselves.

    python -m benchmarks.same_tables                                                    # params.yaml's parent and presets
    python -m benchmarks.same_tables parent=pico corpus=excerpt search_space=pico bld.train_tokens=2048

Arguments are overrides as the stages take them, and determine both runs; `launcher.processes` is 1 in the first and `--processes` in
the second. Of each table it prints the value that differs most. Times are whole commands', start and compiling included: how the work
scales is `python -m benchmarks.two_gpus`'s question.
"""
import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.demo import ROOT
from benchmarks.machine import in_folder, write_results
from benchmarks.two_gpus import difference
from puzzle_core import tables
from puzzle_core.parents import pick_device

STAGES = {"bld": "library", "score": "scores"}


def made_by(processes: int, folder: Path, overrides: list[str]) -> dict[str, float]:
    """The tables in `folder`; how many seconds each stage took."""
    overrides, seconds = [*overrides, *in_folder(folder), f"launcher.processes={processes}"], {}
    for stage in STAGES:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", f"stages.{stage}", *overrides], cwd=ROOT, check=True)
        seconds[stage] = time.perf_counter() - start
    return seconds


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args(arguments)
    numbers = {"one": 1, "several": options.processes}
    with tempfile.TemporaryDirectory() as directory:
        folders = {name: Path(directory) / name for name in numbers}
        seconds = {name: made_by(number, folders[name], options.overrides) for name, number in numbers.items()}
        figures: dict = {"asked": vars(options), "seconds": seconds, "tables": {}}
        for stage, table in STAGES.items():
            both = [tables.read(table, folder / f"{table}.parquet") for folder in folders.values()]
            figures["tables"][table] = found = {"num_rows": len(both[0]), "largest_difference": difference(stage, *both)}
            print(f"{table}: {found}")
    write_results("same_tables", figures, pick_device())
    return figures


if __name__ == "__main__":
    main()
