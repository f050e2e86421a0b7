"""The three tables that stages exchange: the only reader and writer of parquet.

Anyone's numbers, written with the columns of schemas.py, can be searched. Every table is checked when it is written and when
it is read, but for one that still is what was checked when it was written.
"""
import hashlib
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as arrow

from puzzle_core.errors import UserError
from puzzle_core.files import atomic
from puzzle_core.spec import Joint, Variant

CHECKED = "checked"  # in a table's attrs, which parquet keeps


def __getattr__(name: str) -> dict:
    """`SCHEMAS`, imported when it is asked for."""
    if name == "SCHEMAS":
        from puzzle_core.schemas import SCHEMAS

        return SCHEMAS
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def check(name: str, table: pd.DataFrame) -> pd.DataFrame:
    """`table` as schema `name` orders it; ValueError with every offending row otherwise."""
    from puzzle_core import schemas

    return schemas.check(name, table)


def _digest(name: str, table: pd.DataFrame) -> str:
    """Of a table's content, and of the schemas and words that it is checked by."""
    digest = hashlib.sha256(f"{name} {list(table.columns)}".encode())
    for rules in ("schemas.py", "spec.py"):
        digest.update(Path(__file__).with_name(rules).read_bytes())
    digest.update(pd.util.hash_pandas_object(table, index=False).to_numpy().tobytes())
    return digest.hexdigest()


def read(name: str, path: str | Path) -> pd.DataFrame:
    """Read and check table `name`; ValueError or FileNotFoundError that say what to do."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run the stage that writes it, or `dvc pull {path}`")
    try:
        table = pd.read_parquet(path)
    except (arrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file ({error}). Delete it and run its stage again.") from error
    mark = table.attrs.pop(CHECKED, None)
    if mark is not None and mark == _digest(name, table):
        return table
    try:
        return check(name, table)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def write(name: str, table: pd.DataFrame, path: str | Path) -> None:
    """Check and write table `name`, whole or not at all."""
    table = check(name, table)
    table.attrs = {CHECKED: _digest(name, table)}
    with atomic(path) as part:
        table.to_parquet(part, index=False)


def variant_files(library: pd.DataFrame, blocks: Path) -> Callable[[int, str, Variant | Joint], tuple[Path, str]]:
    """Where the weights of (layer, subblock, variant) are, and their fingerprint.

    The lookup raises ValueError for a variant that is not in the library.
    """
    paths = {(row.layer, row.subblock, row.variant): (blocks / row.path, row.fingerprint) for row in library.itertuples()}

    def find(layer: int, subblock: str, variant: Variant | Joint) -> tuple[Path, str]:
        try:
            return paths[layer, subblock, str(variant)]
        except KeyError as error:
            there = sorted({v for (n, s, v) in paths if (n, s) == (layer, subblock)})
            raise UserError(
                f"variant {variant} of {subblock} in layer {layer} is not in the library; there are: {', '.join(there) or 'none'}. "
                "Add it to conf/search_space/ and run `dvc repro bld`, or search again."
            ) from error

    return find


def read_known(name: str, *paths: str | Path) -> pd.DataFrame:
    """The rows of those of `paths` that exist, each once: what an earlier or interrupted run has finished."""
    from puzzle_core.schemas import SCHEMAS

    found = [read(name, path) for path in paths if Path(path).exists()]
    return pd.concat([pd.DataFrame(columns=list(SCHEMAS[name].columns)), *found]).drop_duplicates(SCHEMAS[name].unique + ["fingerprint"])
