"""How large a parent's subblocks and their variants are: parameters, bytes, KV cache; and which of its layers are alike."""
import torch
from torch import nn

from puzzle_core.parents import Parent
from puzzle_core.spec import ATTENTION, OUTSIDE, PARENT, SUBBLOCKS
from puzzle_core.subblocks import build_subblock, num_params
from puzzle_core.trace import KvCache, ParentRun, kv_cache
from puzzle_core.turns import Costs, Layers, Option

_OWN_NUMBER = ("layer_idx", "layer_id", "layer_number")  # attributes that differ from layer to layer and change nothing


def alike(parent: Parent) -> list[Layers]:
    """The parent's layers in groups of the same modules, shapes and settings, as of sliding and full attention; first layers first."""
    groups: dict[tuple, list[int]] = {}
    for index, layer in enumerate(parent.layers):
        shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
        settings = tuple(
            (name, type(module).__name__, key, value)
            for name, module in layer.named_modules()
            for key, value in sorted(vars(module).items())
            if key not in _OWN_NUMBER and isinstance(value, bool | int | str | None)
        )
        groups.setdefault((shapes, settings), []).append(index)
    return [tuple(layers) for layers in groups.values()]


class Footprint:
    """Sizes of the options of one parent, as `itemsize` bytes a weight and `kv_itemsize` bytes a number of the KV cache make them."""

    def __init__(self, parent: Parent, groups: list[Layers], itemsize: int, kv_itemsize: int):
        self.parent, self.groups, self.itemsize, self.kv_itemsize = parent, groups, itemsize, kv_itemsize
        token = torch.zeros(1, 1, dtype=torch.long)
        run = ParentRun(parent, {"one token": [token]})
        (hidden_BTD,) = run.hidden["one token"]
        self.calls = {layer: calls[ATTENTION] for layer, calls in run.through(range(len(parent.layers)), hidden_BTD)}

    def module(self, option: Option) -> nn.Module:
        """The option's module in the first of its layers, its weights not set."""
        layers, subblock, variant = option
        return self.parent.module(layers[0], subblock) if variant == PARENT else build_subblock(self.parent, layers[0], subblock, variant)

    def kv_cache(self, option: Option, module: nn.Module) -> KvCache:
        layers, subblock, _ = option
        if subblock != ATTENTION:
            return KvCache(0, 0)
        held = kv_cache(module, layers[0], self.calls[layers[0]])
        return KvCache(held.bytes_per_token * self.kv_itemsize // self.parent.model.dtype.itemsize, held.window)

    def sizes(self, option: Option, module: nn.Module | None = None) -> Costs:
        """Rows num_params, param_bytes, kv_bytes_per_token and kv_window of an option; `module`, if it is there already, is not built."""
        layers, subblock, _ = option
        if subblock == OUTSIDE:
            count, held = self._outside(), KvCache(0, 0)
        else:
            module = self.module(option) if module is None else module
            count, held = num_params(self.parent, layers[0], subblock, module), self.kv_cache(option, module)
        values = {
            "num_params": count, "param_bytes": count * self.itemsize, "kv_bytes_per_token": held.bytes_per_token, "kv_window": held.window,
        }  # fmt: skip
        return {metric: (float(value), 0.0) for metric, value in values.items()}

    def _outside(self) -> int:
        """Parameters of embeddings, final norm and LM head."""
        parts = ((layer, s) for layer in range(len(self.parent.layers)) for s in SUBBLOCKS)
        blocks = sum(num_params(self.parent, layer, s, self.parent.module(layer, s)) for layer, s in parts)
        return sum(p.numel() for p in self.parent.model.parameters()) - blocks
