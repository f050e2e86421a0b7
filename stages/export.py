"""Write a checkpoint in the form that a serving engine reads: a command for what the pipeline made, not a DVC stage."""
from pathlib import Path

from puzzle_core import export_gguf, nemotron
from puzzle_core.config import stage
from puzzle_core.export import SavedChild
from puzzle_core.targets import target_named

WRITERS = {"gguf": (export_gguf.write, ".gguf"), "nemotron-nas": (nemotron.write, "-nemotron-nas")}


@stage("export", command=("target", "checkpoint", "dtype"))
def run(cfg):
    target = target_named(cfg.target)
    write, suffix = WRITERS[cfg.target]
    child = SavedChild.read(Path(cfg.data) / cfg.checkpoint)
    path = Path(cfg.out) / f"{child.path.name}{suffix}"
    write(child, path, cfg.dtype)
    print(f"export: {path} for {target.engines}, {cfg.dtype}")


if __name__ == "__main__":
    run()
