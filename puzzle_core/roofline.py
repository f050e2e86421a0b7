"""Costs of hardware that is not here: how long its arithmetic and its memory would take at their peak rates.

Each product of matrices takes the longer of its operations at the peak rate of their type and its bytes at the memory's bandwidth;
what is between the products is read and written once. Nothing overlaps and nothing else takes time, so these are floors: use them to
compare variants and workloads, not as promises.
"""
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from puzzle_core.errors import UserError
from puzzle_core.footprint import Footprint
from puzzle_core.parents import Parent
from puzzle_core.spec import ATTENTION, LINEAR, NO_OP, OUTSIDE, Scenario, Variant, did_you_mean
from puzzle_core.trace import KvCache
from puzzle_core.turns import Costs, Layers, Option

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}


@dataclass(frozen=True)
class Roofline:
    """Computed from peak rates: one preset of conf/hardware/."""

    name: str
    peak_tflops: Mapping[str, float]  # by dtype, dense
    memory_gb_per_s: float
    link_gb_per_s: float | None = None  # of one device to the others of its host, each way
    num_devices: int = 1  # that share every layer's matrices (tensor parallel)
    dtype: str = "bfloat16"  # of weights and products
    kv_dtype: str = "bfloat16"
    device: str = "auto"  # where assemble and gkd time the child, and how: not the hardware that this describes
    serving: str = "auto"
    source = "analytic"

    def __post_init__(self):
        for key, known in (("dtype", self.peak_tflops), ("kv_dtype", BYTES)):
            if (value := getattr(self, key)) not in known or value not in BYTES:
                raise UserError(f"hardware.{key} is '{value}'.{did_you_mean(value, known)} Known of {self.name}: {', '.join(known)}.")
        if self.num_devices > 1 and not self.link_gb_per_s:
            raise UserError(f"hardware.num_devices is {self.num_devices}, but link_gb_per_s of {self.name} is not known")

    def place(self, parent: Parent) -> str:
        """What the costs are true of, in words."""
        return f"{self.num_devices} × {self.name}, roofline, {self.dtype}, KV cache in {self.kv_dtype}"

    def conditions(self, parent: Parent) -> list:
        """All besides place, parent, variant and workload that determines a cost."""
        return [self.peak_tflops[self.dtype], self.memory_gb_per_s, self.link_gb_per_s]

    def refused(self, subblock: str, variant: Variant) -> str | None:
        """Why this option has no costs; None if it has."""
        return None

    def measure(
        self, parent: Parent, scenario: Scenario, groups: list[Layers], options: list[Option], base: object
    ) -> Iterator[tuple[Option, Costs]]:
        """The costs of each of `options`; those of the base, which the measured backends need, are computed like the rest."""
        footprint = Footprint(parent, groups, BYTES[self.dtype], BYTES[self.kv_dtype])
        prompt, steps = scenario.prompt_len, scenario.num_decode_steps
        at = range(1, prompt + 1), range(prompt + 1, prompt + steps + 1)  # the tokens that each one of prefill and of decode attends to
        for option in options:
            _, subblock, variant = option
            if subblock == OUTSIDE:
                head = parent.model.get_output_embeddings()
                times = [self._products_s(head, scenario.batch_size, parent.model.config) for _ in at]
                sizes = footprint.sizes(option)
            else:
                module = footprint.module(option)
                held, sizes = footprint.kv_cache(option, module), footprint.sizes(option, module)
                of_both = [(prompt, at[0]), (1, at[1])]
                times = [self._subblock_s(parent, subblock, variant, module, held, scenario.batch_size, *each) for each in of_both]
            metrics = {"prefill_ms": 1000 * times[0], "decode_ms": 1000 * times[1] if steps else 0.0}
            yield option, {metric: (value, 0.0) for metric, value in metrics.items()} | sizes

    @property
    def _between_bytes(self) -> int:
        """Of a number between two products: 16 bits at least, whatever the weights have."""
        return max(2, BYTES[self.dtype])

    def _seconds(self, flops: float, num_bytes: float) -> float:
        """The longer of arithmetic and memory traffic, shared by the devices."""
        return max(flops / (1e12 * self.peak_tflops[self.dtype]), num_bytes / (1e9 * self.memory_gb_per_s)) / self.num_devices

    def _products_s(self, module: nn.Module, num_tokens: float, config) -> float:
        """Of `num_tokens` through every matrix of `module`; of experts, those that the tokens are sent to."""
        seconds = 0.0
        for weight in (p for p in module.parameters() if p.ndim > 1):
            copies, (rows, columns) = (1, weight.shape) if weight.ndim == 2 else (weight.shape[0], weight.shape[1:])
            each = min(getattr(config, "num_experts_per_tok", None) or 1, copies) if copies > 1 else 1
            read = copies * (1 - (1 - each / copies) ** num_tokens)  # expected, where the tokens are spread evenly
            traffic = read * rows * columns * BYTES[self.dtype] + num_tokens * each * (rows + columns) * self._between_bytes
            seconds += self._seconds(2 * num_tokens * each * rows * columns, traffic)
        return seconds

    def _subblock_s(
        self,
        parent: Parent,
        subblock: str,
        variant: Variant,
        module: nn.Module,
        kv: KvCache,
        batch_size: int,
        tokens: int,
        contexts: range,
    ) -> float:
        """One subblock, its norm and the sum into the residual stream: `tokens` of each sequence go through it at once.

        They attend to so many tokens as `contexts` says, to each number equally often.
        """
        if variant == NO_OP:
            return 0.0
        config, num_tokens = parent.model.config, batch_size * tokens
        hidden_bytes = num_tokens * config.hidden_size * self._between_bytes
        seconds = self._products_s(module, num_tokens, config) + self._seconds(0, 4 * hidden_bytes) * self.num_devices
        if self.num_devices > 1:  # an all-reduce of what the devices have of the output
            seconds += 2 * (1 - 1 / self.num_devices) * hidden_bytes / (1e9 * self.link_gb_per_s)
        if subblock == ATTENTION and variant != LINEAR:
            seen = _mean(contexts, kv.window)
            flops = 4 * num_tokens * seen * config.num_attention_heads * _head_dim(config)
            seconds += self._seconds(flops, batch_size * (tokens if tokens > 1 else seen) * kv.bytes_per_token)
        return seconds


def _mean(contexts: range, window: int) -> float:
    """The mean of `contexts`, none longer than `window` unless that is 0; 0 of no contexts."""
    return statistics.fmean(min(context, window or context) for context in contexts) if contexts else 0.0


def _head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
