"""Costs: what each variant takes on the machine at hand, measured in place, inside the whole model.

A variant's time is found by putting it into every layer. Requests to that model, to the parent and to all the other
variants' models take turns: a variant's cost is the parent's plus the difference within a turn, a layer's share of it.
So framework overhead and memory traffic are those of real use, drift of the machine cancels, and the parent's predicted
total is its measured time (but for costs that noise would push below 0, which are set to 0).
"""
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from puzzle_core.parents import Parent
from puzzle_core.spec import ATTENTION, NO_OP, OUTSIDE, PARENT, SUBBLOCKS, Scenario, Variant
from puzzle_core.subblocks import build_subblock, num_params, swapped
from puzzle_core.trace import ParentRun, kv_bytes_per_token

UNITS = {"prefill_ms": "ms", "decode_ms": "ms", "num_params": "count", "param_bytes": "bytes", "kv_bytes_per_token": "bytes"}


@dataclass(frozen=True)
class Request:
    """One timed request, for the whole batch."""

    prefill_ms: float
    steps_ms: list[float]  # of each generated token
    kv_bytes: int  # in the cache at the end

    @property
    def decode_ms(self) -> float:
        """Of a typical step: the median, which one interruption does not move."""
        return statistics.median(self.steps_ms)

    @property
    def latency_ms(self) -> float:
        return self.prefill_ms + sum(self.steps_ms)


def hardware_name(device: torch.device) -> str:
    """What the timings are true of, e.g. NVIDIA H200 or x86_64 with 2 threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} cpu, {torch.get_num_threads()} threads"


def _now_ms(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() * 1000


@torch.no_grad()
def request(model: PreTrainedModel, scenario: Scenario, decode_steps: int | None = None) -> Request:
    """Answer one batch: prefill `prompt_len` tokens, then generate `generation_len` greedily through the KV cache.

    With `decode_steps`, only that many steps are run and timed, around the middle of the generation.
    """
    device = model.device
    skipped = 0 if decode_steps is None else max(0, scenario.generation_len - decode_steps) // 2
    num_steps = scenario.generation_len if decode_steps is None else min(decode_steps, scenario.generation_len)
    generator = torch.Generator().manual_seed(0)
    shape = (scenario.batch_size, scenario.prompt_len + skipped)
    ids = torch.randint(1, model.config.vocab_size, shape, generator=generator).to(device)
    cache = DynamicCache(config=model.config)

    def step(some_ids: Tensor) -> Tensor:
        return model(input_ids=some_ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)

    start = _now_ms(device)
    chosen = step(ids[:, : scenario.prompt_len])
    prefill_ms = _now_ms(device) - start
    if skipped:
        chosen = step(ids[:, scenario.prompt_len :])
    steps_ms = []
    for _ in range(num_steps):
        start = _now_ms(device)
        chosen = step(chosen)
        steps_ms.append(_now_ms(device) - start)
    kv_bytes = sum(slot.keys.nbytes + slot.values.nbytes for slot in cache.layers if slot.keys is not None)
    return Request(prefill_ms, steps_ms, kv_bytes)


def in_turn(models: list[Callable[[], AbstractContextManager]], repeats: int, warmup: int, **of_request) -> list[list[Request]]:
    """`repeats` timed requests of each model, one of each at a time, so that drift of the machine hits all alike.

    Each of `models` opens a context manager that yields the model ready to be timed.
    """
    requests: list[list[Request]] = [[] for _ in models]
    with tqdm(total=(warmup + repeats) * len(models), desc="timed requests", unit="request") as progress:
        for turn in range(warmup + repeats):
            for model, done in zip(models, requests, strict=True):
                with model() as ready:
                    result = request(ready, **of_request)
                if turn >= warmup:
                    done.append(result)
                progress.update()
    return requests


@contextmanager
def _everywhere(parent: Parent, subblock: str, modules: list[nn.Module]) -> Iterator[PreTrainedModel]:
    with ExitStack() as stack:
        for layer, module in enumerate(modules):
            stack.enter_context(swapped(parent, layer, subblock, module))
        yield parent.model


def _random(module: nn.Module) -> nn.Module:
    """Weights of ordinary size: what is multiplied must not be special, zeros and denormals are faster or slower."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    return module


def profile(
    parent: Parent, space: dict[str, list[Variant]], scenario: Scenario, repeats: int, warmup: int, decode_steps: int | None
) -> pd.DataFrame:
    """The costs table: every variant of `space`, no_op, and what is outside the blocks, for one scenario."""
    num_layers, itemsize = len(parent.layers), parent.model.dtype.itemsize
    options = [(s, v) for s in SUBBLOCKS for v in dict.fromkeys([*space[s], NO_OP]) if v != PARENT]
    modules = {
        (s, v): [_random(build_subblock(parent, layer, s, v)) for layer in range(num_layers)]
        for s, v in tqdm(options, desc="build variants", unit="variant")
    }
    run = ParentRun(parent, {"shape": [torch.ones(1, scenario.sequence_len, dtype=torch.long)]})  # a window keeps no more than itself
    calls = [next(run.advance(layer, "shape"))[ATTENTION] for layer in range(num_layers)]
    values: dict[tuple[str, Variant], dict[str, float]] = {}
    for subblock, variant in [*((s, PARENT) for s in SUBBLOCKS), *options]:
        here = [parent.module(layer, subblock) for layer in range(num_layers)] if variant == PARENT else modules[subblock, variant]
        count, kv_bytes = num_params(parent, 0, subblock, here[0]), 0.0
        if subblock == ATTENTION:
            kv_bytes = statistics.mean(kv_bytes_per_token(m, layer, call) for layer, (m, call) in enumerate(zip(here, calls, strict=True)))
        values[subblock, variant] = {"num_params": count, "param_bytes": count * itemsize, "kv_bytes_per_token": kv_bytes}
    whole = sum(p.numel() for p in parent.model.parameters())
    outside = whole - num_layers * sum(values[s, PARENT]["num_params"] for s in SUBBLOCKS)
    values[OUTSIDE, PARENT] = {"num_params": outside, "param_bytes": outside * itemsize, "kv_bytes_per_token": 0}

    models = [partial(nullcontext, parent.model), *(partial(_everywhere, parent, s, modules[s, v]) for s, v in options)]
    of_parent, *of_variants = in_turn(models, repeats, warmup, scenario=scenario, decode_steps=decode_steps)
    for metric in ("prefill_ms", "decode_ms"):
        # What a layer gains when the variant takes the parent's place; what no_op gains is all that the subblock cost.
        gains = {
            option: statistics.median(getattr(p, metric) - getattr(v, metric) for p, v in zip(of_parent, done, strict=True)) / num_layers
            for option, done in zip(options, of_variants, strict=True)
        }
        total = statistics.median(getattr(r, metric) for r in of_parent)
        for (subblock, variant), gain in gains.items():
            values[subblock, variant][metric] = max(0.0, gains[subblock, NO_OP] - gain)
        for subblock in SUBBLOCKS:
            values[subblock, PARENT][metric] = max(0.0, gains[subblock, NO_OP])
            total -= values[subblock, PARENT][metric] * num_layers
        values[OUTSIDE, PARENT][metric] = max(0.0, total)
    return pd.DataFrame(
        {
            "subblock": subblock,
            "variant": str(variant),
            "scenario": str(scenario),
            "metric": metric,
            "value": float(value),
            "unit": UNITS[metric],
            "source": "measured" if UNITS[metric] == "ms" else "computed",
            "hardware": hardware_name(parent.device),
        }
        for (subblock, variant), of_variant in values.items()
        for metric, value in of_variant.items()
    )


def side_by_side(models: dict[str, PreTrainedModel], scenario: Scenario, repeats: int, warmup: int) -> dict[str, dict[str, float]]:
    """Realised totals of whole models, timed in turn: the same names and units as search predicts them under."""
    requests = in_turn([partial(nullcontext, model) for model in models.values()], repeats, warmup, scenario=scenario)
    totals = {}
    for (name, model), done in zip(models.items(), requests, strict=True):
        params = list(model.parameters())
        latency_ms = statistics.median(r.latency_ms for r in done)
        totals[name] = {
            "latency_ms": latency_ms,
            "prefill_ms": statistics.median(r.prefill_ms for r in done),
            "decode_ms": statistics.median(r.decode_ms for r in done),
            "throughput_tokens_per_s": scenario.batch_size * scenario.generation_len / latency_ms * 1000,
            "memory_mib": (sum(p.nbytes for p in params) + done[-1].kv_bytes) / 2**20,
            "num_params": sum(p.numel() for p in params),
            "kv_mib": done[-1].kv_bytes / 2**20,
        }
    return totals
