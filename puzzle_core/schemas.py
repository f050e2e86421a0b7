"""What the rows of each of the three tables must be. A module of its own: pandera takes longer to import than a search to run."""
import pandas as pd
import pandera.pandas as pa

from puzzle_core.errors import UserError
from puzzle_core.spec import BLOCK, KV_WINDOW, OUTSIDE, SUBBLOCKS, Joint, Scenario, Variant, is_parent, parse_variant


def _parses(parse) -> pa.Check:
    def each(value: str) -> bool:
        try:
            return str(parse(value)) == value
        except ValueError:
            return False

    return pa.Check(each, element_wise=True, error=f"not a {parse.__qualname__.split('.')[0].strip('_').replace('any_', '').lower()} id")


def _any_variant(text: str) -> Variant | Joint:
    return parse_variant(BLOCK if "+" in text else "", text)


MOST_LAYERS = 10_000
BASE_METRICS = ("prefill_ms", "decode_ms", "param_bytes", "num_params", "kv_bytes_per_token", KV_WINDOW)  # what totals are made of
# Names of totals, of limits and of what stands beside them in a row of a result: a metric of that name would be taken for it.
RESERVED = (
    *("score", "latency_ms", "memory_mib", "kv_mib", "throughput_tokens_per_s"),
    *("speedup", "memory_fraction", "params_fraction", "kv_fraction"),
    *("limit", "gap", "method", "seconds", "architecture", "source", "hardware"),
)

MEASURED = ("kl", "kl_stderr", "perplexity", "top1_agreement")  # of a child: of costs no metric may have these names

_FEW_LAYERS = pa.Check.lt(MOST_LAYERS, error=f"{MOST_LAYERS} or more: the layers before it have no rows")
_LAYER = pa.Column(int, [pa.Check.ge(0), _FEW_LAYERS])
_SUBBLOCK = pa.Column(str, pa.Check.isin((*SUBBLOCKS, BLOCK)))
_VARIANT = pa.Column(str, _parses(_any_variant))
_OF_ITS_SUBBLOCK = pa.Check(
    lambda table: table["variant"].str.contains("+", regex=False) == (table["subblock"] == BLOCK),
    error="a row of subblock block has a variant such as kv4+w768, and no other row has",
)
_FINITE = pa.Check(lambda column: column.abs() < float("inf"), error="not a finite number")
_LOSS = pa.Column(float, [pa.Check.ge(0), _FINITE])
_FINGERPRINT = pa.Column(str, description="hash of everything that determined this row; empty for foreign rows")

SCHEMAS = {
    "library": pa.DataFrameSchema(
        {
            "layer": _LAYER,
            "subblock": _SUBBLOCK,
            "variant": _VARIANT,
            "init": pa.Column(str, description="how the weights were initialised, e.g. prune+ridge"),
            "loss_before": _LOSS,  # normalised MSE on development tokens after initialisation, before training
            "loss_after": _LOSS,  # the same after training
            "num_tokens": pa.Column(int, pa.Check.ge(0), description="tokens of gradient training"),
            "outcome": pa.Column(str, pa.Check.isin(("untrained", "trained", "settled", "rolled back"))),  # what became of training
            "num_params": pa.Column(int, pa.Check.ge(0), description="of the subblock, its norms included"),
            "kv_bytes_per_token": pa.Column(int, pa.Check.ge(0), description="keys and values of one token of one sequence"),
            KV_WINDOW: pa.Column(int, pa.Check.ge(0), default=0, description="tokens that the KV cache keeps at most; 0: all"),
            "path": pa.Column(str, description="weights, relative to blocks/; empty where there are none"),
            "fingerprint": _FINGERPRINT,
        },
        checks=_OF_ITS_SUBBLOCK,
        unique=["layer", "subblock", "variant"],
        strict=True,
        add_missing_columns=True,
        name="library",
    ),
    "scores": pa.DataFrameSchema(
        {
            "layer": _LAYER,
            "subblock": _SUBBLOCK,
            "variant": _VARIANT,
            "metric": pa.Column(
                str, pa.Check.notin((*RESERVED, *BASE_METRICS)), description="kl, lm_loss, ...: a cost in quality, lower is better"
            ),
            "value": pa.Column(float, _FINITE),
            "num_tokens": pa.Column(int, pa.Check.ge(1)),
            "fingerprint": _FINGERPRINT,
        },
        checks=[
            _OF_ITS_SUBBLOCK,
            pa.Check(
                lambda table: ~table["variant"].map(is_parent).astype(bool) | (table["value"] == 0.0),
                error="the parent's score is 0 exactly: scores are quality lost against it",
            ),
        ],
        unique=["layer", "subblock", "variant", "metric"],
        strict=True,
        name="scores",
    ),
    "costs": pa.DataFrameSchema(
        {
            "layer": pa.Column(
                int, [pa.Check.ge(-1), _FEW_LAYERS], default=-1, description="-1, or the column left out: the same in every layer"
            ),
            "subblock": pa.Column(str, pa.Check.isin((*SUBBLOCKS, BLOCK, OUTSIDE))),
            "variant": _VARIANT,
            "scenario": pa.Column(str, _parses(Scenario.parse)),
            "metric": pa.Column(
                str,
                [pa.Check.str_matches(r"^[a-z][a-z0-9_]*$"), pa.Check.notin((*RESERVED, *MEASURED))],
                description="those of problem.TOTALS, or one's own",
            ),
            "value": pa.Column(float, [pa.Check.ge(0), _FINITE]),
            "unit": pa.Column(str),
            "source": pa.Column(str, pa.Check.isin(("measured", "computed", "analytic"))),
            "hardware": pa.Column(str, description="what it is true of, in words"),
            "spread": pa.Column(float, [pa.Check.ge(0), _FINITE], default=0.0, description="half the interquartile range, in `unit`"),
            "fingerprint": pa.Column(str, default="", description="hash of everything that determined this row; empty for foreign rows"),
        },
        checks=_OF_ITS_SUBBLOCK,
        unique=["layer", "subblock", "variant", "scenario", "metric"],
        strict=True,
        add_missing_columns=True,
        name="costs",
    ),
}


def check(name: str, table: pd.DataFrame) -> pd.DataFrame:
    """`table` as schema `name` orders it; ValueError with every offending row otherwise."""
    try:
        return SCHEMAS[name].validate(table, lazy=True)[list(SCHEMAS[name].columns)]
    except pa.errors.SchemaErrors as error:
        cases = error.failure_cases[["column", "check", "failure_case", "index"]].drop_duplicates()
        lines = cases.head(10).to_string(index=False)
        more = f"\n... and {len(cases) - 10} more" if len(cases) > 10 else ""
        raise UserError(f"{name} table does not fit its schema (puzzle_core/schemas.py):\n{lines}{more}") from error
