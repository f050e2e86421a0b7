"""The words of the project as frozen values: variants, architectures, scenarios, constraints, solutions.

Their canonical text forms are the only join keys between tables, file names and configs: `parse(str(v)) == v`.
"""
import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from puzzle_core.errors import UserError

ATTENTION, FFN = "attention", "ffn"
SUBBLOCKS = (ATTENTION, FFN)
BLOCK = "block"  # both subblocks of a layer: one row where they are trained, scored or measured together
ALL_LAYERS = -1  # in the layer column of costs: the same in every layer
KV_WINDOW = "kv_window"  # the metric whose rows a costs table may leave out: where there is none, the KV cache keeps every token
OUTSIDE = "outside"  # what is not in a block: embeddings, final norm, LM head. A row of costs, never a choice.


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """A hint for an error message, with a space before it: the known name nearest to `name`; "" where none is near."""
    return "".join(f" Did you mean '{close}'?" for close in difflib.get_close_matches(str(name), known, n=1))


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
            raise UserError(f"'{text}' is not a variant id; expected for example parent, kv1, w768, linear or no_op")
        return cls(match[1], int(match[2]) if match[2] else None)


PARENT, NO_OP, LINEAR = Variant("parent"), Variant("no_op"), Variant("linear")


def by_size(variants: set[Variant]) -> list[Variant]:
    """Largest first: the parent, what has a size, linear, and no_op last."""
    last = (LINEAR, NO_OP)
    return sorted(variants, key=lambda v: (v != PARENT, last.index(v) + 1 if v in last else 0, -(v.size or 0), v.kind))


@dataclass(frozen=True, order=True)
class Joint:
    """A variant of a whole block, one row of the tables: `kv4+w768`."""

    attention: Variant
    ffn: Variant

    def __str__(self) -> str:
        return f"{self.attention}+{self.ffn}"

    @classmethod
    def parse(cls, text: str) -> "Joint":
        halves = text.split("+")
        if len(halves) != len(SUBBLOCKS):
            raise UserError(f"'{text}' is not a variant id of a block; expected attention+ffn, for example kv4+w768 or parent+parent")
        return cls(*map(Variant.parse, halves))

    @property
    def kind(self) -> str:
        return f"{self.attention.kind}+{self.ffn.kind}"

    @property
    def halves(self) -> tuple[tuple[str, Variant], ...]:
        return (ATTENTION, self.attention), (FFN, self.ffn)


def parse_variant(subblock: str, text: str) -> Variant | Joint:
    """The variant that `text` names in a table's row of `subblock`."""
    return Joint.parse(text) if subblock == BLOCK else Variant.parse(text)


def halves(subblock: str, variant: Variant | Joint) -> tuple[tuple[str, Variant], ...]:
    """The subblocks that a row of a table speaks of: one, or both of a `block`."""
    return variant.halves if isinstance(variant, Joint) else ((subblock, variant),)


def is_parent(text: str) -> bool:
    """Whether a row's variant is the parent's own subblock or block."""
    return text in (str(PARENT), str(Joint(PARENT, PARENT)))


@dataclass(frozen=True)
class Architecture:
    """The choice per layer: `layers[i]` maps each subblock to its variant, wherever its row came from."""

    layers: tuple[tuple[Variant, Variant], ...]  # (attention, ffn) of each layer, first layer first
    joint: tuple[int, ...] = ()  # the layers that take one `block` row in place of two

    def __getitem__(self, key: tuple[int, str]) -> Variant:
        layer, subblock = key
        return self.layers[layer][SUBBLOCKS.index(subblock)]

    def items(self):
        """Every (layer, subblock, variant), layer by layer."""
        for layer, pair in enumerate(self.layers):
            for subblock, variant in zip(SUBBLOCKS, pair, strict=True):
                yield layer, subblock, variant

    def rows(self):
        """The (layer, subblock, variant) of each row of the tables that this is made of; a joint one has subblock `block`."""
        for layer in range(len(self.layers)):
            yield from ((layer, *row) for row in self.rows_of(layer))

    def rows_of(self, layer: int) -> tuple[tuple[str, Variant | Joint], ...]:
        """The (subblock, variant) of each row that one layer is made of."""
        if layer in self.joint:
            return ((BLOCK, Joint(*self.layers[layer])),)
        return tuple(zip(SUBBLOCKS, self.layers[layer], strict=True))

    @classmethod
    def of_rows(cls, rows) -> "Architecture":
        """The architecture made of `rows`, in any order."""
        by_layer = {}
        for layer, subblock, variant in rows:
            by_layer.setdefault(layer, {})[subblock] = variant
        layers, joint = [], tuple(layer for layer in sorted(by_layer) if BLOCK in by_layer[layer])
        for layer in range(len(by_layer)):
            there = by_layer[layer]
            layers.append((there[BLOCK].attention, there[BLOCK].ffn) if layer in joint else tuple(there[s] for s in SUBBLOCKS))
        return cls(tuple(layers), joint)

    def to_json(self) -> list[dict[str, str]]:
        layers = [{} for _ in self.layers]
        for layer, subblock, variant in self.rows():
            layers[layer][subblock] = str(variant)
        return layers

    @classmethod
    def from_json(cls, layers: list[dict[str, str]]) -> "Architecture":
        rows = [(number, *row) for number, layer in enumerate(layers) for row in layer.items()]
        return cls.of_rows((layer, subblock, parse_variant(subblock, text)) for layer, subblock, text in rows)

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
        sizes = self.batch_size, self.prompt_len, self.generation_len
        if min(sizes) < 1 or max(sizes) > 10**9:
            raise UserError(f"workload {self}: batch size, prompt and generation length must be at least 1 and at most 1,000,000,000")

    def __str__(self) -> str:
        return f"b{self.batch_size}p{self.prompt_len}g{self.generation_len}"

    @classmethod
    def parse(cls, text: str) -> "Scenario":
        match = re.fullmatch(r"b(\d{1,10})p(\d{1,10})g(\d{1,10})", text)
        if not match:
            raise UserError(f"'{text}' is not a scenario id; expected for example b8p512g128")
        return cls(*map(int, match.groups()))

    @property
    def num_decode_steps(self) -> int:
        """Prefill gives the first token, each decode step one more."""
        return self.generation_len - 1

    @property
    def cached_tokens(self) -> int:
        """Tokens of one sequence in the KV cache at the end: the last token is not fed back."""
        return self.prompt_len + self.generation_len - 1


@dataclass(frozen=True)
class Workload:
    """What is searched for, and `also` the ids of scenarios that are measured with it: one preset of conf/workload/."""

    batch_size: int
    prompt_len: int
    generation_len: int
    also: tuple[str, ...] | None = None

    @property
    def scenario(self) -> Scenario:
        return Scenario(self.batch_size, self.prompt_len, self.generation_len)

    @property
    def scenarios(self) -> list[Scenario]:
        """All that are measured, each once."""
        return list(dict.fromkeys([self.scenario, *map(Scenario.parse, self.also or ())]))


MORE_IS_BETTER = ("speedup", "throughput_tokens_per_s")  # of what can be limited; of all else less is


@dataclass(frozen=True)
class Constraint:
    """A limit on one total of an architecture, under the name that the user wrote: total <= upper, or total >= lower."""

    name: str  # as in params.yaml: speedup, latency_ms, ...
    limit: float  # as in params.yaml; a fraction where it is relative
    total: str  # what is bounded: latency_ms, memory_mib, num_params, score, ...
    upper: float | None = None  # the bound, in the unit of `total`; one of the two is None
    lower: float | None = None
    scenario: str = ""  # where it is not the workload searched for
    relative: bool = False  # the limit was written as a percentage of the parent's

    @property
    def bound(self) -> float:
        return self.lower if self.upper is None else self.upper

    def __str__(self) -> str:
        return self.worded(f"{100 * self.limit:.6g}%" if self.relative else str(self.limit))

    def worded(self, limit: str) -> str:
        """This constraint in words, with another limit."""
        sense = "" if self.lower is None else "at most " if self.name in MORE_IS_BETTER else "at least "
        return f"{self.name} {sense}{limit}" + (f" on {self.scenario}" if self.scenario else "")


CLOCKED = ("latency_ms", "prefill_ms", "decode_ms", "throughput_tokens_per_s")  # true of the minutes in which they were measured


def without_times(row: dict[str, float]) -> dict[str, float]:
    """A row of metrics as it may stand beside rows of other runs: a machine is not as fast in all of them, a speed-up is."""
    return {name: value for name, value in row.items() if name not in CLOCKED}


@dataclass(frozen=True)
class Solution:
    """An architecture plus its proof."""

    architecture: Architecture
    scenario: Scenario
    metric: str  # the score, or the weighted sum of scores
    score: float  # sum of the chosen rows' scores, recomputed from the tables
    bound: float  # no feasible architecture's objective is below this
    status: str  # optimal, or feasible when the time limit struck first
    seconds: float
    totals: dict[str, float]  # predicted totals of the architecture
    parent_totals: dict[str, float]
    constraints: tuple[Constraint, ...]
    objective: str = "score"  # what was minimised: the score, or a total
    source: str = ""  # of the costs: measured or analytic; empty where it is not known
    hardware: str = ""  # that they are true of

    @property
    def value(self) -> float:
        """Of the objective."""
        return self.score if self.objective == "score" else self.totals[self.objective]

    @property
    def gap(self) -> float:
        """(value - bound) / |value|, 0 when the optimum is proven."""
        return 0.0 if self.status == "optimal" else max(0.0, self.value - self.bound) / max(abs(self.value), 1e-300)

    @property
    def speedup(self) -> float:
        """Predicted latency of the parent over that of the child."""
        child, parent = (totals.get("latency_ms", math.nan) for totals in (self.totals, self.parent_totals))
        return parent / child if child else math.inf

    @property
    def priced(self) -> str:
        """Whose costs the search went by, in words."""
        return f"{self.source} costs of {self.hardware}" if self.hardware else "costs of unknown hardware"

    @property
    def title(self) -> str:
        limits = ", ".join(map(str, self.constraints)) or "no constraint"
        proof = "optimal" if self.status == "optimal" else f"gap {self.gap:.2%}"
        speed = "" if math.isnan(self.speedup) else f", speed-up {self.speedup:.2f}"
        return f"{limits}: predicted {self.metric} {self.score:.3g} ({proof}){speed} on {self.scenario}"

    def predicted(self) -> dict[str, float]:
        """The row of metrics that the child should show when it is measured."""
        speed = {} if math.isnan(self.speedup) else {"speedup": self.speedup}
        return {self.metric: self.score, **speed, **self.totals}

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
