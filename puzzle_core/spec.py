"""The words of the project as frozen values: variants, architectures, scenarios, constraints, solutions.

Their canonical text forms are the only join keys between tables, file names and configs: `parse(str(v)) == v`.
"""
import re
from dataclasses import asdict, dataclass

ATTENTION, FFN = "attention", "ffn"
SUBBLOCKS = (ATTENTION, FFN)
BLOCK = "block"  # both subblocks of a layer with the residual stream around them
OUTSIDE = "outside"  # what is not in a block: embeddings, final norm, LM head. A row of costs, never a choice.


@dataclass(frozen=True, order=True)
class Variant:
    """One form of one subblock: `parent`, `no_op`, `linear`, or a kind with a size such as `kv1` or `w768`."""

    kind: str
    size: int | None = None

    def __str__(self) -> str:
        return self.kind if self.size is None else f"{self.kind}{self.size}"

    @classmethod
    def parse(cls, text: str) -> "Variant":
        match = re.fullmatch(r"([a-z_]+?)([1-9]\d*)?", text)
        if not match:
            raise ValueError(f"'{text}' is not a variant id; expected for example parent, kv1, w768, linear or no_op")
        return cls(match[1], int(match[2]) if match[2] else None)


PARENT, NO_OP, LINEAR = Variant("parent"), Variant("no_op"), Variant("linear")


@dataclass(frozen=True)
class Architecture:
    """The choice per layer: `layers[i]` maps each subblock to its variant."""

    layers: tuple[tuple[Variant, Variant], ...]  # (attention, ffn) of each layer, first layer first

    def __getitem__(self, key: tuple[int, str]) -> Variant:
        layer, subblock = key
        return self.layers[layer][SUBBLOCKS.index(subblock)]

    def items(self):
        """Every (layer, subblock, variant), layer by layer."""
        for layer, pair in enumerate(self.layers):
            for subblock, variant in zip(SUBBLOCKS, pair, strict=True):
                yield layer, subblock, variant

    def to_json(self) -> list[dict[str, str]]:
        return [dict(zip(SUBBLOCKS, map(str, pair), strict=True)) for pair in self.layers]

    @classmethod
    def from_json(cls, layers: list[dict[str, str]]) -> "Architecture":
        return cls(tuple(tuple(Variant.parse(layer[s]) for s in SUBBLOCKS) for layer in layers))

    @classmethod
    def uniform(cls, num_layers: int, attention: Variant = PARENT, ffn: Variant = PARENT) -> "Architecture":
        return cls(((attention, ffn),) * num_layers)


@dataclass(frozen=True)
class Scenario:
    """A workload: `batch_size` sequences, each a prompt of `prompt_len` tokens and `generation_len` generated ones."""

    batch_size: int
    prompt_len: int
    generation_len: int

    def __post_init__(self):
        if min(self.batch_size, self.prompt_len, self.generation_len) < 1:
            raise ValueError(f"workload {self}: batch size, prompt and generation length must be at least 1")

    def __str__(self) -> str:
        return f"b{self.batch_size}p{self.prompt_len}g{self.generation_len}"

    @classmethod
    def parse(cls, text: str) -> "Scenario":
        match = re.fullmatch(r"b(\d+)p(\d+)g(\d+)", text)
        if not match:
            raise ValueError(f"'{text}' is not a scenario id; expected for example b8p512g128")
        return cls(*map(int, match.groups()))

    @property
    def sequence_len(self) -> int:
        return self.prompt_len + self.generation_len


@dataclass(frozen=True)
class Constraint:
    """A limit on one total of an architecture, `total <= upper`, under the name and limit that the user wrote."""

    name: str  # as in params.yaml: speedup, latency_ms, ...
    limit: float  # as in params.yaml
    total: str  # what is bounded: latency_ms, memory_mib, num_params, ...
    upper: float  # the bound, in the unit of `total`


@dataclass(frozen=True)
class Solution:
    """An architecture plus its proof."""

    architecture: Architecture
    scenario: Scenario
    metric: str  # which score was minimised
    score: float  # sum of the chosen rows' scores, recomputed from the tables
    bound: float  # no feasible architecture scores below this
    status: str  # optimal, or feasible when the time limit struck first
    seconds: float
    totals: dict[str, float]  # predicted totals of the architecture
    parent_totals: dict[str, float]
    constraints: tuple[Constraint, ...]

    @property
    def gap(self) -> float:
        """(score - bound) / |score|, 0 when the optimum is proven."""
        return max(0.0, self.score - self.bound) / max(abs(self.score), 1e-12)

    @property
    def speedup(self) -> float:
        """Predicted latency of the parent over that of the child."""
        return self.parent_totals["latency_ms"] / self.totals["latency_ms"] if self.totals["latency_ms"] else float("inf")

    @property
    def title(self) -> str:
        limits = ", ".join(f"{c.name} {c.limit:g}" for c in self.constraints) or "no constraint"
        proof = "optimal" if self.status == "optimal" else f"gap {self.gap:.2%}"
        return f"{limits}: predicted {self.metric} {self.score:.3g} ({proof}), speed-up {self.speedup:.2f} on {self.scenario}"

    def predicted(self) -> dict[str, float]:
        """The row of metrics that the child should show when it is measured."""
        return {self.metric: self.score, "speedup": self.speedup, **self.totals}

    def to_json(self) -> dict:
        plain = asdict(self)
        del plain["seconds"]  # would make the file, and all that follows it, new at every solve
        return {
            **plain,
            "scenario": str(self.scenario),
            "gap": self.gap,
            "architecture": self.architecture.to_json(),
        }

    @classmethod
    def from_json(cls, content: dict) -> "Solution":
        fields = {key: value for key, value in content.items() if key != "gap"}
        fields["architecture"] = Architecture.from_json(content["architecture"])
        fields["scenario"] = Scenario.parse(content["scenario"])
        fields["constraints"] = tuple(Constraint(**c) for c in content["constraints"])
        return cls(seconds=0.0, **fields)
