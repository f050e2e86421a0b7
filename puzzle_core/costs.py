"""Costs: what each variant takes on given hardware, as a table; what was measured before under the same conditions is not again.

A variant's time is found in place (`Torch`): in every layer of the whole model, in turn with the parent, and once more where the other
subblock does nothing. So overhead and memory traffic are those of real use, and the parent's predicted total is its measured time.
"""
import functools
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
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
from puzzle_core.llama_cpp import LlamaCpp
from puzzle_core.parents import Parent
from puzzle_core.roofline import Roofline
from puzzle_core.serving import Eager, Static, pick_serving, place, served
from puzzle_core.spec import ATTENTION, NO_OP, OUTSIDE, PARENT, SUBBLOCKS, Scenario, Variant, did_you_mean
from puzzle_core.subblocks import build_subblock, num_params, randomised, swapped
from puzzle_core.turns import BASE, Costs, Option, Turn, base_times, check_counts, in_turn, num_turns, times_of

VERSION = 3  # raise when a change here, or in a module below, changes what a cost is
UNITS = {"prefill_ms": "ms", "decode_ms": "ms", "num_params": "count", "param_bytes": "bytes", "kv_bytes_per_token": "bytes"}


@contextmanager
def _everywhere(parent: Parent, modules: Mapping[str, list[nn.Module]]) -> Iterator[PreTrainedModel]:
    """The parent with other modules in every layer."""
    with ExitStack() as stack:
        for subblock, some in modules.items():
            for layer, module in enumerate(some):
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
        self, parent: Parent, scenario: Scenario, options: list[Option], base: Mapping[Option, Costs] | None
    ) -> Iterator[tuple[Option, Costs]]:
        """The costs of each of `options`, and first those of the base if there is none."""
        num_layers, itemsize, num_tokens = len(parent.layers), parent.model.dtype.itemsize, scenario.batch_size * scenario.sequence_len

        def modules_of(subblock: str, variant: Variant) -> list[nn.Module]:
            return [randomised(build_subblock(parent, layer, subblock, variant)) for layer in range(num_layers)]

        def session_of(modules: dict[str, list[nn.Module]]) -> Eager | Static:
            return served(partial(_everywhere, parent, modules), scenario, pick_serving(self.serving, parent.device))

        nothing = {s: modules_of(s, NO_OP) for s in SUBBLOCKS}
        whole = session_of({})

        @functools.lru_cache(maxsize=1)
        def alone(subblock: str) -> Eager | Static:
            return session_of({s: nothing[s] for s in SUBBLOCKS if s != subblock})

        def turns(subblock: str, variant: Variant) -> tuple[list[Turn], int, int]:
            """Turns of the four models, the parameters of the variant, and the bytes of the KV cache with it."""
            own = {subblock: modules_of(subblock, variant)}
            sessions = whole, session_of(own), alone(subblock), session_of({**nothing, **own})
            timed_by = [partial(self._times, session, scenario) for session in sessions]
            timed = in_turn(timed_by, num_turns(self.repeats, variant), self.warmup)
            return timed, num_params(parent, 0, subblock, own[subblock][0]), sessions[1].kv_bytes()

        def sizes(count: int, kv_bytes: float = 0) -> Costs:
            values = {"num_params": count, "param_bytes": count * itemsize, "kv_bytes_per_token": kv_bytes / num_layers / num_tokens}
            return {metric: (float(value), 0.0) for metric, value in values.items()}

        def sized(subblock: str, count: int, kv_bytes: int) -> Costs:
            return sizes(count, kv_bytes if subblock == ATTENTION else 0)

        if base is None:
            of_none, _, kv_bytes = turns(ATTENTION, NO_OP)
            base = base_times(of_none, num_layers, num_layers)
            counts = {s: num_params(parent, 0, s, parent.module(0, s)) for s in SUBBLOCKS}
            for s in SUBBLOCKS:
                base[s, PARENT] |= sized(s, counts[s], whole.kv_bytes())
                base[s, NO_OP] |= sized(s, num_params(parent, 0, s, nothing[s][0]), kv_bytes)
            base[OUTSIDE, PARENT] |= sizes(sum(p.numel() for p in parent.model.parameters()) - num_layers * sum(counts.values()))
            yield from base.items()
        for subblock, variant in options:
            if (subblock, variant) not in BASE:
                some, count, kv_bytes = turns(subblock, variant)
                yield (subblock, variant), times_of(some, subblock, base, num_layers, num_layers) | sized(subblock, count, kv_bytes)

    def _times(self, session: Eager | Static, scenario: Scenario) -> dict[str, float]:
        return {"prefill_ms": session.prefill(), "decode_ms": self._decode_ms(session, scenario)}

    def _decode_ms(self, session: Eager | Static, scenario: Scenario) -> float:
        """Of a token, on the average of the context lengths: at each the median."""
        parts = min(self.decode_contexts, scenario.generation_len)
        edges = [scenario.generation_len * part // parts for part in range(parts + 1)]
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

    Rows of `known` with a matching fingerprint are taken over; `keep(table)` is called with the rows so far after each variant.
    """
    where, rows, num_made = backend.place(parent), {}, 0
    options = list(dict.fromkeys([*BASE, *((s, v) for s in SUBBLOCKS for v in space[s])]))
    reasons = {option: reason for option in options if (reason := backend.refused(*option))}
    for (subblock, variant), reason in reasons.items():
        print(f"no costs of {subblock} {variant}: {reason}; `search.export_target` leaves such variants out", file=sys.stderr)
    options = [option for option in options if option not in reasons]
    told = fingerprint(VERSION, where, backend.conditions(parent), _geometry(parent))
    done = dict(list(known.groupby("fingerprint")))
    for scenario in scenarios:
        wanted = {(s, v): fingerprint(told, s, str(v), str(scenario)) for s, v in options}
        found = {option: _costs(done[mark]) for option, mark in wanted.items() if mark in done}
        base = {option: found[option] for option in BASE} if all(option in found for option in BASE) else None
        missing = [option for option in options if base is None or option not in found]
        measured = backend.measure(parent, scenario, missing, base) if missing else ()
        progress = tqdm(measured, total=len(missing), desc=f"costs of {scenario}", unit="variant")
        for option, costs in found.items() if base else ():
            rows[option, scenario] = _rows(option, scenario, costs, backend.source, where, wanted[option])
        for option, costs in progress:
            rows[option, scenario] = _rows(option, scenario, costs, backend.source, where, wanted[option])
            keep(_table(rows))
        num_made += len(missing)
    order = {option: number for number, option in enumerate(options)}
    return _table(dict(sorted(rows.items(), key=lambda item: (scenarios.index(item[0][1]), order[item[0][0]])))), num_made


def unsure(table: pd.DataFrame) -> str:
    """How many of a table's times are no larger than their spread, in words; "" where all are."""
    times = table[(table["unit"] == "ms") & (table["variant"] != str(NO_OP))]
    count = int((times["value"] <= times["spread"]).sum())
    return f", {count} of {len(times)} times are within their spread (raise hardware.repeats)" if count else ""


def _costs(rows: pd.DataFrame) -> Costs:
    return {row.metric: (row.value, row.spread) for row in rows.itertuples()}


def _rows(option: Option, scenario: Scenario, costs: Costs, source: str, where: str, mark: str) -> list[dict]:
    return [
        {
            "subblock": option[0],
            "variant": str(option[1]),
            "scenario": str(scenario),
            "metric": metric,
            "value": value,
            "unit": UNITS[metric],
            "source": source if UNITS[metric] == "ms" else "computed",
            "hardware": where,
            "spread": spread,
            "fingerprint": mark,
        }
        for metric, (value, spread) in costs.items()
    ]


def _table(rows: Mapping[object, list[dict]]) -> pd.DataFrame:
    return pd.DataFrame([row for some in rows.values() for row in some])
