"""How params.yaml, conf/ and dvc.yaml become the config that one stage sees.

The only module that knows Hydra and DVC. params.yaml is registered as a Hydra config whose defaults list is its own
`use:` block, so Hydra and DVC read the same two files and each key lives in exactly one of them.
"""
import functools
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from puzzle_core.errors import UserError
from puzzle_core.launcher import Launcher, is_launched
from puzzle_core.spec import did_you_mean

ROOT = Path(__file__).resolve().parents[1]


def register_params(root: Path = ROOT) -> None:
    """Register params.yaml in Hydra's ConfigStore; SystemExit that names the known presets if `use:` names another."""
    params = OmegaConf.to_container(OmegaConf.load(root / "params.yaml"))
    for group, name in params["use"].items():
        known = sorted(file.stem for file in (root / "conf" / group).glob("*.yaml"))
        if name not in known:
            hint = did_you_mean(name, known)
            raise SystemExit(f"params.yaml: no preset '{name}' in conf/{group}/.{hint} Known: {', '.join(known)}.")
    presets = [{group: name} for group, name in params["use"].items()]
    ConfigStore.instance().store(name="params", node={"defaults": [*presets, "_self_"], **params})


def composed(*overrides: str) -> DictConfig:
    """The whole config, as a stage's command has it with these `overrides`: for scripts. `out` must be among them."""
    register_params()
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return hydra.compose("config", overrides=list(overrides))


def declared_keys(stage: str, root: Path = ROOT) -> set[str]:
    """Top-level config keys that dvc.yaml lists under `params:` of `stage`; none of a command that is no stage."""
    keys = set()
    for entry in yaml.safe_load((root / "dvc.yaml").read_text())["stages"].get(stage, {}).get("params", []):
        preset = next(iter(entry)) if isinstance(entry, dict) else None
        keys.add(Path(preset).parts[1] if preset else entry.split(".")[0])
    return keys


def declared(cfg: DictConfig, stage: str, own: tuple[str, ...] = ()) -> DictConfig:
    """`cfg` cut down to what DVC tracks for `stage`: reading anything else raises instead of going stale.

    A command that is no stage names the keys of its `own`; of a stage, it reads what that reads.
    """
    view = OmegaConf.masked_copy(cfg, ["data", "out", *declared_keys(stage), *(key for key in own if key in cfg)])
    OmegaConf.set_struct(view, True)
    OmegaConf.set_readonly(view, True)
    return view


def plain(node: DictConfig) -> dict:
    """A config node as plain Python values, which is all that puzzle_core takes."""
    return OmegaConf.to_container(node, resolve=True)


def fill(target: Callable, node: DictConfig, **more: object) -> object:
    """Call `target` with the preset's keys, or with `more` where it has the same; ValueError that names what is unknown or lacking."""
    values = plain(node)
    known = inspect.signature(target).parameters
    for key in values.keys() - known.keys():
        hint = did_you_mean(key, known)
        raise UserError(f"unknown key '{key}' in {node._get_full_key(None)}.{hint} Known: {', '.join(known)}.")
    lacking = [key for key, p in known.items() if p.default is p.empty and key not in values and key not in more]
    if lacking:
        raise UserError(f"{node._get_full_key(None)} lacks {', '.join(lacking)}: see its preset under conf/")
    return target(**{**values, **more})


def refuse_in_dvc(key: str) -> None:
    """ValueError if DVC runs this stage: its outputs stay as they are, and DVC would take them for what `key` was set for."""
    if "DVC_STAGE" in os.environ:
        raise UserError(f"{key} is for the command line; in a preset `dvc repro` would take what is there for what was asked for")


def this_command() -> list[str]:
    """The overrides with which another process composes the config of this Hydra job, down to its output folder."""
    job = HydraConfig.get()
    folder = str(job.runtime.output_dir).replace("'", "\\'")
    return [*job.overrides.task, "hydra.mode=RUN", f"hydra.run.dir='{folder}'"]


def stage(
    name: str, reads: str | None = None, command: tuple[str, ...] = (), launches: bool | Callable[[DictConfig], bool] = False
) -> Callable:
    """Make `run(cfg)` the Hydra entry point of stage `name`: declared keys only, user errors in one line, exit code 1.

    For a command that is no stage of dvc.yaml: `reads` is the stage whose keys it sees beside its section of
    conf/config.yaml; a `command` has its own keys, which it names here, in conf/NAME.yaml. A stage that `launches`,
    always or where its config says so, shares its work among the processes of `launcher` in params.yaml: `run` is called in
    each, and learns from `ranks` which it is.
    """

    def decorate(run: Callable[[DictConfig], object]) -> Callable[[], None]:
        @functools.wraps(run)
        def job(cfg: DictConfig) -> object:
            try:
                if (launches(cfg) if callable(launches) else launches) and not is_launched():
                    launcher = fill(Launcher, cfg.launcher)
                    if launcher.wanted:
                        return launcher.run(name, this_command())
                return run(declared(cfg, reads or name, (*command, name) if reads or command else ()))
            except (UserError, OSError, OmegaConfBaseException) as error:  # any other is a fault of ours: with its traceback
                if cfg.get("debug"):
                    raise
                print(f"{name}: error: {error}", file=sys.stderr)
                raise SystemExit(1) from error

        register_params()
        return hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name=name if command else "config")(job)

    return decorate
