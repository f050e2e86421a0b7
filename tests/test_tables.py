"""The tables are the API: checked on read and on write, whole or not there."""
import pandas as pd
import pytest

from puzzle_core import schemas, tables
from puzzle_core.spec import Architecture, Constraint, Scenario, Solution, Variant


def scores(**changes) -> pd.DataFrame:
    row = {"layer": 0, "subblock": "ffn", "variant": "w8", "metric": "kl", "value": 0.5, "num_tokens": 10, "fingerprint": ""}
    return pd.DataFrame([{**row, **changes}])


@pytest.mark.parametrize("text", ["parent", "no_op", "linear", "kv1", "w768", "window1024", "e64"])
def test_variant_ids_are_canonical(text):
    assert str(Variant.parse(text)) == text


@pytest.mark.parametrize("text", ["", "8w", "w-1", "kv0", "w7.5", "W8", "no op"])
def test_what_is_not_a_variant_id_is_refused(text):
    with pytest.raises(ValueError, match="not a variant id"):
        Variant.parse(text)


def test_scenario_ids_are_canonical():
    assert Scenario.parse("b8p512g128") == Scenario(8, 512, 128) and str(Scenario(8, 512, 128)) == "b8p512g128"


def test_a_solution_survives_json():
    solution = Solution(
        Architecture(((Variant("kv", 1), Variant("no_op")),)), Scenario(1, 2, 3), "kl", 0.5, 0.5, "optimal", 0.0,
        {"latency_ms": 1.0}, {"latency_ms": 2.0}, (Constraint("speedup", 1.5, "latency_ms", 1.3),),
    )  # fmt: skip
    assert Solution.from_json(solution.to_json()) == solution


def test_a_table_survives_a_file(tmp_path):
    tables.write("scores", scores(), tmp_path / "scores.parquet")
    pd.testing.assert_frame_equal(tables.read("scores", tmp_path / "scores.parquet"), scores())


@pytest.mark.parametrize("change", [{}, {"value": -0.5}, {"variant": "W8"}, {"value": 1}])
def test_a_table_is_checked_again_unless_it_is_what_was_checked_when_it_was_written(tmp_path, monkeypatch, change):
    path, checked = tmp_path / "scores.parquet", []
    tables.write("scores", scores(), path)
    monkeypatch.setattr(schemas, "check", lambda name, table: checked.append(name) or table)
    pd.read_parquet(path).assign(**change).to_parquet(path)  # what pandas keeps of the mark does not help a changed table
    tables.read("scores", path)
    assert checked == (["scores"] if change else [])


def test_columns_that_changed_their_names_are_checked_again(tmp_path):
    tables.write("scores", scores(), tmp_path / "scores.parquet")
    swapped = {"subblock": "variant", "variant": "subblock"}
    pd.read_parquet(tmp_path / "scores.parquet").rename(columns=swapped).to_parquet(tmp_path / "scores.parquet")
    with pytest.raises(ValueError, match="scores table does not fit"):
        tables.read("scores", tmp_path / "scores.parquet")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"variant": "w08"}, "not a variant id"),
        ({"subblock": "mlp"}, "mlp"),
        ({"value": float("nan")}, "value"),
        ({"value": float("inf")}, "finite"),
        ({"layer": -1}, "layer"),
        ({"surprise": 1}, "surprise"),
        ({"variant": "parent"}, "the parent's score is 0"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_and_not_written(changes, complaint, tmp_path):
    with pytest.raises(ValueError, match=complaint):
        tables.write("scores", scores(**changes), tmp_path / "scores.parquet")
    assert not list(tmp_path.iterdir())


def test_a_row_twice_is_refused():
    with pytest.raises(ValueError, match="scores table does not fit"):
        tables.check("scores", pd.concat([scores(), scores()], ignore_index=True))


def test_a_damaged_file_is_named_with_the_way_out(tmp_path):
    tables.write("scores", scores(), tmp_path / "scores.parquet")
    (tmp_path / "scores.parquet").write_bytes((tmp_path / "scores.parquet").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"scores.parquet is not a readable parquet file .* Delete it and run its stage again"):
        tables.read("scores", tmp_path / "scores.parquet")


def test_a_missing_file_says_which_stage_or_pull():
    with pytest.raises(FileNotFoundError, match="dvc pull"):
        tables.read("costs", "nowhere/costs.parquet")
