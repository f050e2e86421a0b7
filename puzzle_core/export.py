"""A saved checkpoint as the exporters read it: sizes, architecture and tensors, one tensor in memory at a time.

Nothing of the checkpoint is executed and no model is built: config.json says which subblocks there are, safetensors which
weights.
"""
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import safetensors
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig

from puzzle_core.errors import UserError
from puzzle_core.families import IN_CONFIG, Family, family_of
from puzzle_core.files import read_json
from puzzle_core.modeling_puzzle import MODEL_TYPE
from puzzle_core.spec import ATTENTION, FFN, LINEAR, NO_OP, PARENT, Architecture, Variant
from puzzle_core.targets import why_not

# what a child's config.json has beside its parent's
_OURS = ("per_layer_config", "linear_subblocks", "puzzle", "auto_map", "transformers_weights")
_SUBBLOCK_OF = {"kv": ATTENTION, "w": FFN}
_LISTS = {"skip": NO_OP, "linear_subblocks": LINEAR}
_SUBBLOCK_NAMED = {name: subblock for subblock, name in IN_CONFIG.items()}


@dataclass(frozen=True)
class SavedChild:
    """A checkpoint folder: the config of its parent, and what each layer has in place of the parent's subblocks."""

    path: Path
    config: PreTrainedConfig
    architecture: Architecture

    @classmethod
    def read(cls, path: Path) -> "SavedChild":
        """ValueError or FileNotFoundError if `path` is not a checkpoint of a known family."""
        content = read_json(path / "config.json")
        model_type = content["model_type"].removeprefix(MODEL_TYPE)
        family = family_of(model_type)
        plain = {key: value for key, value in content.items() if key not in _OURS} | {"model_type": model_type}
        config = CONFIG_MAPPING[model_type].from_dict(plain)
        overrides = {int(layer): entry for layer, entry in (content.get("per_layer_config") or {}).items()}  # written as "02"
        layers = [_pair(layer, overrides.get(layer, {}), family) for layer in range(config.num_hidden_layers)]
        return cls(path, config, Architecture(tuple(layers)))

    def kv_heads(self, layer: int) -> int:
        """0 where there is no attention."""
        return self._size(layer, ATTENTION, self.config.num_key_value_heads)

    def width(self, layer: int) -> int:
        """Channels of the FFN; 0 where there is none."""
        return self._size(layer, FFN, self.config.intermediate_size)

    def _size(self, layer: int, subblock: str, of_parent: int) -> int:
        variant = self.architecture[layer, subblock]
        return of_parent if variant == PARENT else variant.size or 0

    @property
    def num_layers(self) -> int:
        return len(self.architecture.layers)

    @property
    def is_uniform(self) -> bool:
        """Whether every layer has the same sizes, so that a stock architecture describes it."""
        sizes = {(self.kv_heads(layer), self.width(layer)) for layer in range(self.num_layers)}
        return len(sizes) == 1 and 0 not in sizes.pop()

    @cached_property
    def files(self) -> dict[str, Path]:
        """Which safetensors file has each tensor."""
        found = {}
        for file in sorted(self.path.glob("*.safetensors")):
            with safetensors.safe_open(file, "pt") as tensors:
                found |= dict.fromkeys(tensors.keys(), file)
        if not found:
            raise FileNotFoundError(f"{self.path} has no safetensors files: run the stage that writes it, or `dvc pull {self.path}`")
        return found

    def shape(self, name: str) -> list[int]:
        with safetensors.safe_open(self.files[name], "pt") as tensors:
            return tensors.get_slice(name).get_shape()

    def tensor(self, name: str) -> Tensor:
        with safetensors.safe_open(self.files[name], "pt") as tensors:
            return tensors.get_tensor(name)

    def refused_config(self, rope_types: Iterable[str]) -> list[str]:
        """What of the parent's config engines have no form for: they build silu layers that attend to everything."""
        config, reasons = self.config, []
        if config.hidden_act != "silu":
            reasons.append(f"hidden_act {config.hidden_act} (silu is what engines build)")
        window = getattr(config, "sliding_window", None)
        if window is not None and window < config.max_position_embeddings:
            reasons.append(f"sliding_window {window} (engines attend to everything)")
        if (rope := config.rope_parameters["rope_type"]) not in rope_types:
            reasons.append(f"rope_type {rope} (known: {', '.join(rope_types)})")
        return reasons

    def refuse_for(self, target: str, more: list[str]) -> None:
        """ValueError that names every layer, subblock and variant that `target` cannot express, and `more` reasons."""
        layers_of: dict[str, list[str]] = {}
        for layer, subblock, variant in self.architecture.items():
            if reason := why_not(target, layer, subblock, variant):
                layers_of.setdefault(f"{subblock} {variant} ({reason})", []).append(str(layer))
        reasons = [f"layer {', '.join(layers)} {what}" for what, layers in layers_of.items()]
        if reasons + more:
            raise UserError(
                f"{self.path} cannot be exported to {target}: {'; '.join(reasons + more)}. Nothing was written. "
                f"With search.export_target: {target} in params.yaml the search leaves out variants that have no form there."
            )


def _pair(layer: int, entry: dict, family: Family) -> tuple[Variant, Variant]:
    """The variants of one layer from its entry of per_layer_config: the inverse of `subblocks.changes`."""
    chosen = {ATTENTION: PARENT, FFN: PARENT}
    kinds = {key: kind for kind, key in family.size_keys.items() if kind in _SUBBLOCK_OF}
    for key, value in entry.items():
        if key in _LISTS:
            chosen |= {_SUBBLOCK_NAMED[name]: _LISTS[key] for name in value}
        elif key in kinds:
            chosen[_SUBBLOCK_OF[kinds[key]]] = Variant(kinds[key], value)
        else:
            raise UserError(f"layer {layer}: per_layer_config has {key}: {value}, which no export target can express")
    return chosen[ATTENTION], chosen[FFN]
