"""Costs in llama.cpp, on the CPU: shallow models with a variant in all layers but the first, exported and served in turn.

llama.cpp takes the head size from layer 0, so that keeps its attention; the others differ from the parent's by the variant, whose
cost is their difference. Weights are random: only their sizes matter to the time.
"""
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from puzzle_core import export_gguf
from puzzle_core.children import make_child, random_weights, save_child
from puzzle_core.errors import UserError
from puzzle_core.export import SavedChild
from puzzle_core.families import family_for
from puzzle_core.footprint import Footprint
from puzzle_core.parents import Parent
from puzzle_core.serving import hardware_name
from puzzle_core.spec import ATTENTION, NO_OP, OUTSIDE, PARENT, SUBBLOCKS, Architecture, Scenario, Variant
from puzzle_core.targets import why_not
from puzzle_core.turns import Costs, Layers, Option, Turn, base_options, base_times, check_counts, in_turn, num_turns, times_of

ITEMSIZE = 2  # of weights and KV cache: float16, llama.cpp's default


@dataclass(frozen=True)
class LlamaCpp:
    """Measured in llama.cpp: one preset of conf/hardware/."""

    num_layers: int = 9  # of the models that are exported
    repeats: int = 5  # turns of each variant's models and the parent's; twice as many of no_op's
    warmup: int = 1  # turns before
    device: str = "cpu"  # where and how assemble and gkd time the child: in transformers, not in llama.cpp
    serving: str = "auto"
    source = "measured"

    def __post_init__(self):
        check_counts(self, num_layers=2, repeats=1, warmup=0)

    def place(self, parent: Parent) -> str:
        """What the costs are true of, in words."""
        return f"{hardware_name(torch.device('cpu'))}, llama.cpp, float16"

    def conditions(self, parent: Parent) -> list:
        """All besides place, parent, variant and workload that determines a cost."""
        return [version("xllamacpp"), self.num_layers, self.repeats, self.warmup]

    def refused(self, subblock: str, variant: Variant) -> str | None:
        """Why this option has no costs; None if it has."""
        return None if subblock == OUTSIDE else why_not(export_gguf.TARGET, 1, subblock, variant)

    def measure(
        self, parent: Parent, scenario: Scenario, groups: list[Layers], options: list[Option], base: Mapping[Option, Costs] | None
    ) -> Iterator[tuple[Option, Costs]]:
        """The costs of each of `options`, and first those of the base if there is none. ValueError for more than one sequence at once."""
        if scenario.batch_size != 1:
            raise UserError(f"workload {scenario}: backend llama_cpp times one sequence at a time; set batch_size: 1 in conf/workload/")
        if len(groups) > 1:
            raise UserError(f"backend llama_cpp: layers of {parent.model.config.model_type} parents differ here; use backend torch")
        inner, changed = tuple(range(self.num_layers)), self.num_layers - 1
        footprint = Footprint(parent, groups, ITEMSIZE, ITEMSIZE)
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
            shallow, work = _shallow(parent, self.num_layers), Path(folder)

            def server_of(variants: Mapping[str, Variant]) -> Callable[[], dict[str, float]]:
                pair = tuple(variants.get(s, PARENT) for s in SUBBLOCKS)
                return _served(shallow, Architecture(((PARENT, PARENT), *[pair] * changed)), scenario, work)

            of_parent, alone = server_of({}), {s: server_of({o: NO_OP for o in SUBBLOCKS if o != s}) for s in SUBBLOCKS}

            def turns(subblock: str, variant: Variant) -> list[Turn]:
                nothing = dict.fromkeys(SUBBLOCKS, NO_OP)
                four = of_parent, server_of({subblock: variant}), alone[subblock], server_of({**nothing, subblock: variant})
                return in_turn(four, num_turns(self.repeats, variant), self.warmup)

            if base is None:
                of_shallow = base_times({inner: turns(ATTENTION, NO_OP)}, {inner: changed})
                for option, times in _of_layers(groups[0], of_shallow).items():
                    yield option, times | footprint.sizes(option)
            else:
                of_shallow = _of_layers(inner, base)
            for option in options:
                if option not in base_options(groups):
                    times = times_of(turns(*option[1:]), inner, option[1], of_shallow, changed)
                    yield option, times | footprint.sizes(option)


def _of_layers(layers: Layers, costs: Mapping[Option, Costs]) -> dict[Option, Costs]:
    """Costs of one group of layers as those of another: they are of one layer each, and of what is outside."""
    return {(layers if option[0] else (), *option[1:]): of_option for option, of_option in costs.items()}


def _shallow(parent: Parent, num_layers: int) -> Parent:
    """A parent like `parent`, with random weights and fewer layers."""
    config = type(parent.model.config).from_dict(parent.model.config.to_dict())
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    return replace(parent, model=model, family=family_for(config), shards=None)


def _served(shallow: Parent, architecture: Architecture, scenario: Scenario, work: Path) -> Callable[[], dict[str, float]]:
    """What times one request to llama.cpp with a child of that architecture."""
    import xllamacpp  # an extra: `pip install 'puzzle[llama]'`

    with tempfile.TemporaryDirectory(dir=work) as folder:
        save_child(make_child(shallow, architecture, random_weights(shallow, work)), shallow.tokenizer, Path(folder) / "child")
        path = Path(tempfile.mkdtemp(dir=work)) / "child.gguf"
        export_gguf.write(SavedChild.read(Path(folder) / "child"), path, "float16")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = str(path), scenario.cached_tokens + 8, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(params)
    os.unlink(path)  # it is mapped
    return partial(_request, server, scenario, shallow.model.config.vocab_size)


def _request(server, scenario: Scenario, vocab_size: int) -> dict[str, float]:
    prompt = torch.randint(1, vocab_size, (scenario.prompt_len,), generator=torch.Generator().manual_seed(0)).tolist()
    options = {"n_predict": scenario.generation_len, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    timings = server.handle_completions({"prompt": prompt, **options})["timings"]
    if (timings["prompt_n"], timings["predicted_n"]) != (scenario.prompt_len, scenario.generation_len):
        raise UserError(f"llama.cpp read {timings['prompt_n']} and wrote {timings['predicted_n']} tokens, not those of {scenario}")
    # The clock of the answer starts with the first token, which prefill gives; its mean has been over N and over N - 1 steps.
    steps = scenario.num_decode_steps
    return {"prefill_ms": timings["prompt_ms"], "decode_ms": timings["predicted_ms"] / steps if steps else 0.0}

