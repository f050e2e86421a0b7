"""Requests answered and timed as they are served: step by step by transformers, as CUDA graphs, or compiled.

A request is one batch of a scenario: the prompt goes in at once and the first token of every sequence comes out (prefill); each
further token, the likeliest, is one decode step through a real KV cache. So N generated tokens are one prefill and N - 1 steps, and
the last of them is never fed back. On a GPU, times are the device's own, from events in its stream.
"""
import contextlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from puzzle_core.errors import UserError
from puzzle_core.spec import Scenario, Solution, did_you_mean

EAGER, CUDA_GRAPH, COMPILE = "eager", "cuda_graph", "compile"
SERVINGS = (EAGER, CUDA_GRAPH, COMPILE)
WARMUP_CALLS = 3  # before a graph is captured: libraries take their workspaces at first use
Opened = Callable[[], AbstractContextManager[PreTrainedModel]]  # opens the model ready to run


def hardware_name(device: torch.device) -> str:
    """E.g. NVIDIA H200, or AMD EPYC, 2 threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n") if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor() or platform.machine()])[0]}, {torch.get_num_threads()} threads"


def place(model: PreTrainedModel, serving: str) -> str:
    """What timings of `model` are true of, in words: hardware, way of serving, dtype."""
    return f"{hardware_name(model.device)}, {serving}, {str(model.dtype).removeprefix('torch.')}"


def pick_serving(name: str, device: torch.device) -> str:
    """`auto` is CUDA graphs on a GPU, where single kernels are too short to be launched one by one, and eager on a CPU."""
    if name == "auto":
        return CUDA_GRAPH if device.type == "cuda" else EAGER
    if name not in SERVINGS:
        raise UserError(f"hardware.serving is '{name}'.{did_you_mean(name, SERVINGS)} Known: auto, {', '.join(SERVINGS)}.")
    if name == CUDA_GRAPH and device.type != "cuda":
        raise UserError("hardware.serving is cuda_graph, but the device is a CPU; use eager or compile, or auto")
    return name


def warn_if_elsewhere(solution: Solution, model: PreTrainedModel, serving: str) -> None:
    """Say on stderr if the search went by costs of other hardware, or of another way of serving, than `model` is timed on now."""
    here = place(model, pick_serving(serving, model.device))
    if solution.hardware != here:
        print(
            f"warning: the search went by {solution.priced}, but times are measured on {here}: predicted and realised times are of "
            "different things. For costs of this machine choose its preset in `use.hardware` and run `dvc repro --force profile-hardware`.",
            file=sys.stderr,
        )


@dataclass(frozen=True)
class Request:
    """One timed request, for the whole batch."""

    prefill_ms: float
    steps_ms: list[float]  # of each generated token but the first, which prefill gives
    kv_bytes: int  # of the cache in the last step

    @property
    def decode_ms(self) -> float:
        """Time per output token after the first: the median step, which one interruption does not move; 0 without any."""
        return statistics.median(self.steps_ms) if self.steps_ms else 0.0

    @property
    def latency_ms(self) -> float:
        return self.prefill_ms + sum(self.steps_ms)


def _timed(run: Callable[[], object], times: int, device: torch.device) -> list[float]:
    """Milliseconds of each of `times` runs in a row."""
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
        torch.cuda.synchronize(device)
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        torch.cuda.synchronize(device)
        return [start.elapsed_time(end) for start, end in zip(events, events[1:], strict=False)]
    marks = [time.perf_counter()]
    for _ in range(times):
        run()
        marks.append(time.perf_counter())
    return [1000 * (end - start) for start, end in zip(marks, marks[1:], strict=False)]


def _prompts(model: PreTrainedModel, scenario: Scenario) -> Tensor:
    """Random tokens [B, T] for all that is fed of every sequence."""
    shape = (scenario.batch_size, scenario.cached_tokens)
    return torch.randint(1, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(model.device)


class _Read(DynamicCache):
    """A cache that adds up what it gives to attention: of a full window that is one token more than it keeps between steps."""

    num_bytes = 0

    def update(self, *args, **kwargs) -> tuple[Tensor, Tensor]:
        keys, values = super().update(*args, **kwargs)
        self.num_bytes += keys.nbytes + values.nbytes
        return keys, values


class Eager:
    """Every step is a call of the model, with a cache as long as the text."""

    def __init__(self, opened: Opened, scenario: Scenario):
        self.opened, self.scenario = opened, scenario
        with opened() as model:
            self.device, self.ids_BT = model.device, _prompts(model, scenario)

    def _feed(self, model: PreTrainedModel, ids: Tensor) -> None:
        out = model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token, self.length = out.logits.argmax(-1), self.length + ids.shape[1]

    @torch.no_grad()
    def prefill(self) -> float:
        """Milliseconds until the first token."""
        with self.opened() as model:
            self.cache, self.length = DynamicCache(config=model.config), 0
            return _timed(lambda: self._feed(model, self.ids_BT[:, : self.scenario.prompt_len]), 1, self.device)[0]

    @torch.no_grad()
    def decode(self, context_len: int, num_steps: int) -> list[float]:
        """Milliseconds of each of `num_steps` tokens, the first of them with `context_len` tokens in the cache."""
        with self.opened() as model:
            if context_len > self.length:
                self._feed(model, self.ids_BT[:, self.length : context_len])
            return _timed(lambda: self._feed(model, self.token), num_steps, self.device)

    @torch.no_grad()
    def kv_bytes(self) -> int:
        """The keys and values that the last step reads from the cache."""
        with self.opened() as model:
            cache = _Read(config=model.config)
            for ids in (self.ids_BT[:1, :-1], self.ids_BT[:1, -1:]) if self.ids_BT.shape[1] > 1 else (self.ids_BT[:1],):
                cache.num_bytes = 0
                model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache.num_bytes * self.scenario.batch_size


class Static:
    """A cache of the whole request's size from the start; on a GPU prefill and decode step are captured once and replayed.

    With `compiled`, the decode step goes through torch.compile first; prefill never does, as in transformers' `generate`.
    """

    def __init__(self, opened: Opened, scenario: Scenario, compiled: bool):
        self.opened, self.scenario, self.compiled = opened, scenario, compiled
        self.graphs: dict[object, Callable[[], None]] = {}
        with opened() as model:
            if not getattr(model, "_can_compile_fullgraph", False):
                raise UserError(
                    f"{type(model).__name__} has no static KV cache in transformers, which hardware.serving cuda_graph and compile "
                    "need; set `serving: eager` in the preset of conf/hardware/"
                )
            self.device, self.ids_BT = model.device, _prompts(model, scenario)
            self.cache = StaticCache(config=model.config, max_cache_len=scenario.cached_tokens)
            self.token = self.ids_BT[:, :1].clone()
            self.step = model
            if compiled:
                torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000  # every model is new code
                self.step = torch.compile(model, fullgraph=True, dynamic=False)
        self.prefill()  # makes the cache

    @property
    def _windows(self) -> list[int]:
        return [slot.max_cache_len for slot in self.cache.layers if slot.is_sliding]

    def _seek(self, length: int) -> None:
        """From now on the cache holds `length` tokens, as far as anyone asks: what they are does not matter to the time."""
        for slot in self.cache.layers:
            slot.cumulative_length.fill_(length)
            if hasattr(slot, "cumulative_length_int"):
                slot.cumulative_length_int = length

    @contextlib.contextmanager
    def _known_to_be_empty(self) -> Iterator[None]:
        """Asking the device would break a graph, and not knowing would keep attention from its causal kernels."""
        slots = list(self.cache.layers)  # the first prefill puts others in their place where layers have windows of their own
        for slot in slots:
            slot.get_seq_length = lambda: 0
        try:
            yield
        finally:
            for slot in slots:
                del slot.get_seq_length

    def _feed(self, call: Callable, ids: Tensor) -> None:
        out = call(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token.copy_(out.logits.argmax(-1))

    def _prefill(self) -> None:
        with self.opened() as model, self._known_to_be_empty():
            self._seek(0)
            self._feed(model, self.ids_BT[:, : self.scenario.prompt_len])

    def _step(self) -> None:
        with self.opened():
            self._feed(self.step, self.token)

    def _ready(self, key: object, body: Callable[[], None], length: int) -> Callable[[], None]:
        """`body`, which starts with `length` tokens in the cache, ready to be timed; made once for each `key`."""
        if key not in self.graphs:
            token = self.token.clone()
            self.graphs[key] = self._captured(body, length) if self.device.type == "cuda" else body
            if self.device.type == "cpu" and self.compiled:
                self._seek(length)
                body()  # compiles
            self.token.copy_(token)
        return self.graphs[key]

    def _captured(self, body: Callable[[], None], length: int) -> Callable[[], None]:
        stream, graph = torch.cuda.Stream(self.device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_CALLS):
                self._seek(length)
                body()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self._seek(length)
        try:
            with torch.cuda.graph(graph):
                body()
        except RuntimeError as error:
            with self.opened() as model:
                name = type(model).__name__
            raise UserError(
                f"{name} cannot be captured as a CUDA graph ({error}); set `serving: compile` or `eager` in the preset of conf/hardware/"
            ) from error
        return graph.replay

    @torch.no_grad()
    def prefill(self) -> float:
        """Milliseconds until the first token."""
        return _timed(self._ready("prefill", self._prefill, 0), 1, self.device)[0]

    @torch.no_grad()
    def decode(self, context_len: int, num_steps: int) -> list[float]:
        """Milliseconds of each of `num_steps` tokens, the first of them with `context_len` tokens in the cache."""
        lengths = range(context_len, min(context_len + num_steps, self.scenario.cached_tokens))
        phases = [tuple(length >= window for window in self._windows) for length in lengths]  # a full window is another graph
        steps = {phase: self._ready(phase, self._step, length) for phase, length in reversed([*zip(phases, lengths, strict=True)])}
        self._seek(context_len)
        ahead = iter(phases)
        return _timed(lambda: steps[next(ahead)](), len(phases), self.device)

    def kv_bytes(self) -> int:
        """What the cache holds."""
        return sum(slot.keys.nbytes + slot.values.nbytes for slot in self.cache.layers)


def served(opened: Opened, scenario: Scenario, serving: str) -> Eager | Static:
    """The model that `opened` opens, ready for requests of one scenario. ValueError if it cannot be served that way."""
    return Eager(opened, scenario) if serving == EAGER else Static(opened, scenario, compiled=serving == COMPILE)


def request(session: Eager | Static) -> Request:
    """Answer one request whole."""
    prefill_ms = session.prefill()
    return Request(prefill_ms, session.decode(session.scenario.prompt_len, session.scenario.num_decode_steps), session.kv_bytes())


def side_by_side(models: dict[str, PreTrainedModel], scenario: Scenario, serving: str, repeats: int, warmup: int) -> dict[str, dict]:
    """Realised totals of a model, or of two timed in turn: the same names and units as search predicts them under.

    Times are those of the turn whose ratio is the median, so that drift of the machine cancels and `speedup`, over the first model, is
    the ratio of the two latencies that stand beside each other.
    """
    assert len(models) <= 2, "one turn can be the median of one ratio only"
    sessions = {name: served(partial(nullcontext, model), scenario, pick_serving(serving, model.device)) for name, model in models.items()}
    turns: list[dict[str, Request]] = []
    for turn in range(warmup + repeats):
        order = list(models) if turn % 2 else list(models)[::-1]  # there and back, so that drift hits both alike
        turns += [{name: request(sessions[name]) for name in order}][: turn >= warmup]
    first, last = list(models)[0], list(models)[-1]
    ranked = sorted(turns, key=lambda turn: (turn[first].latency_ms / turn[last].latency_ms, turn[first].latency_ms))
    middle = ranked[(len(ranked) - 1) // 2]
    speedups = {name: middle[first].latency_ms / middle[name].latency_ms for name in models}
    return {name: {"speedup": speedups[name], **_totals(models[name], scenario, middle[name])} for name in models}


def _totals(model: PreTrainedModel, scenario: Scenario, done: Request) -> dict[str, float]:
    params = list(model.parameters())
    return {
        "latency_ms": done.latency_ms,
        "prefill_ms": done.prefill_ms,
        "decode_ms": done.decode_ms,
        "throughput_tokens_per_s": scenario.batch_size * scenario.generation_len / done.latency_ms * 1000,
        "memory_mib": (sum(p.nbytes for p in params) + done.kv_bytes) / 2**20,
        "num_params": sum(p.numel() for p in params),
        "kv_mib": done.kv_bytes / 2**20,
    }
