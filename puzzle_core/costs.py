"""Costs: what each variant takes on given hardware, as a table; what was measured before under the same conditions is not again.

A variant's time is found in place (`Torch`): in every layer of the whole model, in turn with the parent, and once more where the other
subblock does nothing. So overhead and memory traffic are those of real use, and the parent's predicted total is its measured time.
"""
import functools
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, dataclass, fields
from functools import partial
from importlib.metadata import version

import pandas as pd
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from puzzle_core.errors import UserError
from puzzle_core.files import fingerprint
from puzzle_core.footprint import Footprint, alike
from puzzle_core.llama_cpp import LlamaCpp
from puzzle_core.parents import Parent
from puzzle_core.roofline import Roofline
from puzzle_core.serving import Eager, Static, pick_serving, place, served
from puzzle_core.spec import ALL_LAYERS, ATTENTION, NO_OP, PARENT, SUBBLOCKS, Scenario, Variant, did_you_mean
from puzzle_core.subblocks import build_subblock, randomised, swapped
from puzzle_core.turns import Costs, Layers, Option, Turn, base_options, base_times, check_counts, in_turn, num_turns, times_of

VERSION = 4  # raise when a change here, or in a module below, changes what a cost is
UNITS = {"prefill_ms": "ms", "decode_ms": "ms", "num_params": "count", "param_bytes": "bytes"}
UNITS |= {"kv_bytes_per_token": "bytes", "kv_window": "tokens"}


@contextmanager
def _with(parent: Parent, modules: Mapping[tuple[int, str], nn.Module]) -> Iterator[PreTrainedModel]:
    """The parent with other modules in the place of its own, by layer and subblock."""
    with ExitStack() as stack:
        for (layer, subblock), module in modules.items():
            stack.enter_context(swapped(parent, layer, subblock, module))
        yield parent.model


@dataclass(frozen=True)
class Torch:
    """Measured here, in transformers: one preset of conf/hardware/. Of one variant at a time the weights are in memory."""

    device: str = "auto"
    serving: str = "auto"  # eager, cuda_graph or compile; auto: cuda_graph on a GPU, eager on a CPU
    repeats: int = 5  # turns of each variant's models and the parent's; twice as many of no_op's
    warmup: int = 1  # turns before
    decode_contexts: int = 3  # context lengths, spread over the generation, at which tokens are timed
    decode_steps: int | None = 4  # tokens timed at each; None: all
    source = "measured"

    def __post_init__(self):
        check_counts(self, repeats=1, warmup=0, decode_contexts=1)

    def place(self, parent: Parent) -> str:
        """What the costs are true of, in words."""
        return place(parent.model, pick_serving(self.serving, parent.device))

    def conditions(self, parent: Parent) -> list:
        """All besides place, parent, variant and workload that determines a cost."""
        return [*(version(name) for name in ("torch", "transformers")), self.repeats, self.warmup, self.decode_contexts, self.decode_steps]

    def refused(self, subblock: str, variant: Variant) -> str | None:
        """Why this option has no costs; None if it has."""
        return None

    def measure(
        self, parent: Parent, scenario: Scenario, groups: list[Layers], options: list[Option], base: Mapping[Option, Costs] | None
    ) -> Iterator[tuple[Option, Costs]]:
        """The costs of each of `options`, and first those of the base if there is none."""
        itemsize = parent.model.dtype.itemsize
        footprint = Footprint(parent, groups, itemsize, itemsize)

        def modules_of(layers: Layers, subblock: str, variant: Variant) -> dict[tuple[int, str], nn.Module]:
            return {(layer, subblock): randomised(build_subblock(parent, layer, subblock, variant)) for layer in layers}

        def session_of(modules: Mapping[tuple[int, str], nn.Module]) -> Eager | Static:
            return served(partial(_with, parent, modules), scenario, pick_serving(self.serving, parent.device))

        whole = session_of({})

        @functools.lru_cache(maxsize=1)
        def alone(layers: Layers, subblock: str) -> tuple[dict[tuple[int, str], nn.Module], Eager | Static]:
            (other,) = set(SUBBLOCKS) - {subblock}
            nothing = modules_of(layers, other, NO_OP)
            return nothing, session_of(nothing)

        def turns(option: Option) -> tuple[list[Turn], nn.Module]:
            """Turns of the four models, and the variant's module in one of its layers."""
            layers, subblock, variant = option
            own = modules_of(*option)
            nothing, without_other = alone(layers, subblock)
            sessions = whole, session_of(own), without_other, session_of({**nothing, **own})
            timed = in_turn([partial(self._times, each, scenario) for each in sessions], num_turns(self.repeats, variant), self.warmup)
            return timed, own[layers[0], subblock]

        if base is None:
            base = base_times({layers: turns((layers, ATTENTION, NO_OP))[0] for layers in groups})
            for option in base:
                base[option] |= footprint.sizes(option)
            yield from base.items()
        for option in options:
            if option not in base:
                timed, module = turns(option)
                yield option, times_of(timed, *option[:2], base) | footprint.sizes(option, module)

    def _times(self, session: Eager | Static, scenario: Scenario) -> dict[str, float]:
        return {"prefill_ms": session.prefill(), "decode_ms": self._decode_ms(session, scenario)}

    def _decode_ms(self, session: Eager | Static, scenario: Scenario) -> float:
        """Of a step, on the average of the context lengths: at each the median; 0 of a request that prefill answers."""
        if not scenario.num_decode_steps:
            return 0.0
        parts = min(self.decode_contexts, scenario.num_decode_steps)
        edges = [scenario.num_decode_steps * part // parts for part in range(parts + 1)]
        medians = []
        for start, end in zip(edges, edges[1:], strict=False):
            steps = min(self.decode_steps or end - start, end - start)
            first = scenario.prompt_len + start + (end - start - steps) // 2
            medians.append(statistics.median(session.decode(first, steps)))
        return statistics.mean(medians)


Backend = Torch | LlamaCpp | Roofline
BACKENDS = {"torch": Torch, "llama_cpp": LlamaCpp, "roofline": Roofline}


def backend(preset: Mapping[str, object]) -> Backend:
    """What a preset of conf/hardware/ says; ValueError that names an unknown backend or key."""
    name, values = preset.get("backend"), {key: value for key, value in preset.items() if key != "backend"}
    if name not in BACKENDS:
        raise UserError(f"hardware.backend is '{name}'.{did_you_mean(name, BACKENDS)} Known: {', '.join(BACKENDS)}.")
    known = fields(BACKENDS[name])
    names = [field.name for field in known]
    for key in values.keys() - set(names):
        raise UserError(f"unknown key '{key}' in hardware.{did_you_mean(key, names)} Known of backend {name}: {', '.join(names)}.")
    if lacking := [field.name for field in known if field.default is MISSING and field.name not in values]:
        raise UserError(f"hardware lacks {', '.join(lacking)}: see the presets of backend {name} in conf/hardware/")
    return BACKENDS[name](**values)


def _geometry(parent: Parent) -> dict:
    """What of the parent's config its speed depends on: all but names and tokens."""
    config = parent.model.config.to_dict()
    unseen = ("_name_or_path", "architectures", "transformers_version", "initializer_range")
    plain = {key: value for key, value in config.items() if key not in unseen and not key.endswith("_token_id")}
    return {**plain, "attention": parent.model.config._attn_implementation, "class": type(parent.model).__name__}


def profile(
    parent: Parent,
    space: Mapping[str, list[Variant]],
    scenarios: list[Scenario],
    backend: Backend,
    known: pd.DataFrame,
    keep: Callable[[pd.DataFrame], None] = lambda table: None,
) -> tuple[pd.DataFrame, int]:
    """The costs table: every variant of `space`, no_op, and what is outside the blocks, for each scenario; and how many were made now.

    Where the parent's layers differ each layer has rows of its own. Rows of `known` with a matching fingerprint are taken over;
    `keep(table)` is called with the rows so far after each variant.
    """
    where, rows, num_made, groups = backend.place(parent), {}, 0, alike(parent)
    base_of = base_options(groups)
    reasons = {(s, v): reason for s in SUBBLOCKS for v in (*space[s], PARENT, NO_OP) if (reason := backend.refused(s, v))}
    for (subblock, variant), reason in reasons.items():
        print(f"no costs of {subblock} {variant}: {reason}; `search.export_target` leaves such variants out", file=sys.stderr)
    every = dict.fromkeys([*base_of, *((layers, s, v) for layers in groups for s in SUBBLOCKS for v in space[s])])
    options = [option for option in every if option[1:] not in reasons]
    told = fingerprint(VERSION, where, backend.conditions(parent), _geometry(parent))
    done = dict(list(known.groupby("fingerprint")))
    for scenario in scenarios:
        wanted = {option: fingerprint(told, option[0], option[1], str(option[2]), str(scenario)) for option in options}
        found = {option: _costs(done[mark]) for option, mark in wanted.items() if mark in done}
        base = {option: found[option] for option in base_of} if all(option in found for option in base_of) else None
        missing = [option for option in options if base is None or option not in found]
        measured = backend.measure(parent, scenario, groups, missing, base) if missing else ()
        progress = tqdm(measured, total=len(missing), desc=f"costs of {scenario}", unit="variant")
        for option, costs in found.items() if base else ():
            rows[option, scenario] = _rows(option, scenario, costs, backend.source, where, wanted[option], len(groups) > 1)
        for option, costs in progress:
            rows[option, scenario] = _rows(option, scenario, costs, backend.source, where, wanted[option], len(groups) > 1)
            keep(_table(rows.values()))
        num_made += len(missing)
    order = {option: number for number, option in enumerate(options)}
    return _table(rows[key] for key in sorted(rows, key=lambda key: (scenarios.index(key[1]), order[key[0]]))), num_made


def unsure(table: pd.DataFrame) -> str:
    """How many of a table's times are no larger than their spread, in words; "" where all are."""
    times = table[(table["unit"] == "ms") & (table["variant"] != str(NO_OP)) & (table[["value", "spread"]] > 0).any(axis=1)]
    count = int((times["value"] <= times["spread"]).sum())
    return f", {count} of {len(times)} times are within their spread (raise hardware.repeats)" if count else ""


def _costs(rows: pd.DataFrame) -> Costs:
    return {row.metric: (row.value, row.spread) for row in rows.itertuples()}


def _rows(option: Option, scenario: Scenario, costs: Costs, source: str, where: str, mark: str, layers_differ: bool) -> list[dict]:
    layers, subblock, variant = option
    return [
        {
            "layer": layer,
            "subblock": subblock,
            "variant": str(variant),
            "scenario": str(scenario),
            "metric": metric,
            "value": value,
            "unit": UNITS[metric],
            "source": source if UNITS[metric] == "ms" else "computed",
            "hardware": where,
            "spread": spread,
            "fingerprint": mark,
        }
        for layer in (layers if layers and layers_differ else (ALL_LAYERS,))
        for metric, (value, spread) in costs.items()
    ]


def _table(rows: Iterable[list[dict]]) -> pd.DataFrame:
    return pd.DataFrame([row for some in rows for row in some])
