"""One source of truth: params.yaml, conf/ and dvc.yaml agree, and a stage sees only what it declares."""
import grimp
import pytest
import yaml
from conftest import PICO, ROOT
from dvc.utils.serialize import load_yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from puzzle_core import bld, config, costs, gkd, scoring
from puzzle_core.config import declared, declared_keys, plain
from puzzle_core.spec import Workload

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
FILES = [ROOT / "params.yaml", *(f for f in (ROOT / "conf").glob("*/*.yaml") if f.parent.name != "sweep")]
# Plumbing that determines no result: how configs, tables and files are read and written, and how processes share work.
PLUMBING_MODULES = ("config", "files", "launcher", "tables", "schemas", "ranks", "spec", "errors")
PLUMBING = {f"puzzle_core.{name}" for name in PLUMBING_MODULES} | {"puzzle_core", "stages"}


def composed(*overrides):
    return config.composed("out=x", *overrides)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_dvc_and_hydra_read_the_same_plain_values(file):
    values = load_yaml(file)
    assert "${" not in str(values) and "defaults" not in values
    assert values == OmegaConf.to_container(OmegaConf.load(file))


def test_a_key_is_set_in_one_place():
    groups = {f.parent.name for f in FILES[1:]}
    params = load_yaml(ROOT / "params.yaml")
    assert not groups & set(params) and set(params["use"]) == groups


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_sees_only_what_it_declares(name):
    cfg = composed()
    view = declared(cfg, name)
    assert declared_keys(name) <= set(cfg)
    assert set(view) == declared_keys(name) | {"out", "data"}
    for hidden in set(cfg) - set(view):
        with pytest.raises(OmegaConfBaseException):
            view[hidden]
    with pytest.raises(OmegaConfBaseException):
        view.out = "elsewhere"


def test_a_command_sees_only_the_keys_it_names():
    view = declared(composed(), "export", own=("seed",))
    assert set(view) == {"seed", "out", "data"}
    with pytest.raises(OmegaConfBaseException):
        _ = view.search


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_the_modules_it_imports(name):
    graph = grimp.build_graph("puzzle_core", "stages")
    module = f"stages.{name.replace('-', '_')}"
    imported = {module} | graph.find_upstream_modules(module)
    expected = {m.replace(".", "/") + ".py" for m in imported - PLUMBING}
    assert {d for d in STAGES[name]["deps"] if d.endswith(".py")} == expected


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_runs_as_a_module_of_its_name_into_data(name):
    assert STAGES[name]["cmd"] == f"python -m stages.{name.replace('-', '_')} out=data"


SETTINGS = {
    "bld": bld.Settings, "score": scoring.Settings, "gkd": gkd.Settings, "workload": Workload, "hardware": lambda **p: costs.backend(p),
}  # fmt: skip


@pytest.mark.parametrize(("group", "settings"), SETTINGS.items())
def test_every_preset_fits_its_settings(group, settings):
    for file in (ROOT / "conf" / group).glob("*.yaml"):
        settings(**plain(composed(f"{group}={file.stem}")[group]))


def test_a_group_override_replaces_the_preset_of_params_yaml():
    assert composed(*PICO).parent.source == "random"
