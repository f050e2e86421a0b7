"""Print what a library will take on 1, 8 and 64 GPUs: a command, not a DVC stage. Reads no weights, makes nothing."""
from puzzle_core import bld
from puzzle_core.config import fill, plain, stage
from puzzle_core.parents import load_parent
from puzzle_core.subblocks import resolve_layers


@stage("plan", reads="bld")
def run(cfg):
    parent = fill(load_parent, cfg.parent, device="meta", skeleton=True)
    spaces = resolve_layers(plain(cfg.search_space), parent.model.config, parent.family)
    print(bld.forecast(parent, spaces, fill(bld.Settings, cfg.bld), cfg.plan.tflops))


if __name__ == "__main__":
    run()
