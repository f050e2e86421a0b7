"""A model larger than its memory budget: its layers stay in the checkpoint's safetensors shards until they are needed."""
import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import set_module_tensor_to_device
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from puzzle_core.errors import UserError

GIB = 2**30


def num_bytes(module: nn.Module) -> int:
    """Of the module's parameters, wherever they are."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _gib(size: int) -> str:
    return f"{size / GIB:,.3g} GiB"


def layers_that_fit(skeleton: PreTrainedModel, layers: str, memory_gib: float, in_parts: bool) -> int | None:
    """How many layers' weights fit in the budget beside what is outside the layers; None: all of them.

    ValueError if not one does, or if the caller needs all of them (not `in_parts`) and they do not fit.
    """
    sizes, whole, budget = [num_bytes(layer) for layer in skeleton.get_submodule(layers)], num_bytes(skeleton), memory_gib * GIB
    if whole <= budget:
        return None
    if not in_parts:
        raise UserError(
            f"this stage needs the whole parent in memory, {_gib(whole)}, and parent.memory_gib allows {_gib(budget)}: "
            "run it where there is more memory, with `memory_gib: null` in the preset in conf/parent/"
        )
    outside, largest = whole - sum(sizes), max(sizes)
    if outside + largest > budget:
        raise UserError(
            f"parent.memory_gib is {memory_gib:.3g}; this parent needs {_gib(outside + largest)} at least: its largest layer and "
            "what is outside the layers. Raise it, or use a 16-bit dtype in conf/parent/."
        )
    return int((budget - outside) // largest)


@dataclass(frozen=True)
class Shards:
    """Where the layers' tensors are read from, and how many layers there is room for."""

    layers: nn.ModuleList
    name: str  # of `layers` in the model
    tensors: Mapping[str, Tensor]  # by full name, read when asked for
    max_layers: int
    device: torch.device
    converted: tempfile.TemporaryDirectory | None = None  # what transformers had to convert first; it is there as long as this is

    def misshapen(self) -> list[str]:
        """Tensors of the layers whose shape on disk is not the model's; transformers compares those that it loads itself."""
        index, faults = self.tensors.index, []
        for layer, module in enumerate(self.layers):
            for name, parameter in module.named_parameters():
                full_name = f"{self.name}.{layer}.{name}"
                if (found := _shape(index[full_name])) != list(parameter.shape):
                    faults.append(f"{full_name} {tuple(found)}, not {tuple(parameter.shape)}")
        return faults

    @contextlib.contextmanager
    def present(self, *layers: int) -> Iterator[None]:
        """While open, the weights of these layers are in memory."""
        absent = [
            (self.layers[layer], name, f"{self.name}.{layer}.{name}")
            for layer in layers
            for name, parameter in self.layers[layer].named_parameters()
            if parameter.is_meta
        ]
        try:
            for module, name, full_name in absent:
                set_module_tensor_to_device(module, name, self.device, value=self.tensors[full_name], clear_cache=False)
            yield
        finally:
            for module, name, _ in absent:
                set_module_tensor_to_device(module, name, "meta", clear_cache=False)


def load_shards(
    load: Callable[..., PreTrainedModel], skeleton: PreTrainedModel, layers: str, max_layers: int, device: torch.device
) -> tuple[PreTrainedModel, Shards]:
    """The model that `load` loads, its layers on the meta device; each layer's forward reads its weights and frees them.

    transformers finds each tensor in the shards, under whatever name it has there; those that it must convert first
    (fused experts) are written to a folder under TMPDIR. accelerate's hooks, which read weights for each forward of
    each single projection, make room for those of whole layers.
    """
    converted = tempfile.TemporaryDirectory(prefix="puzzle-")
    model = load(device_map=_device_map(skeleton, layers, device), offload_folder=converted.name)
    hooks = [getattr(module, "_hf_hook", None) for module in model.get_submodule(layers).modules()]
    tensors = next(hook.weights_map.dataset for hook in hooks if getattr(hook, "weights_map", None) is not None)
    remove_hook_from_module(model, recurse=True)
    for module in model.modules():
        vars(module).pop("forward", None)  # the class's own, which accelerate leaves on the instance
    shards = Shards(model.get_submodule(layers), layers, tensors, max_layers, device, converted)
    for index, layer in enumerate(shards.layers):
        stack = contextlib.ExitStack()
        layer.register_forward_pre_hook(partial(_fetch, shards, index, stack))
        layer.register_forward_hook(lambda *_, stack=stack: stack.close(), always_call=True)
    return model, shards


def _shape(entry: dict) -> list[int]:
    """Of a tensor on disk, by accelerate's note of where it lies: in the checkpoint, or in a file of what had to be converted."""
    if "safetensors_file" not in entry:
        return list(entry["shape"])
    with safe_open(entry["safetensors_file"], "pt") as file:
        return file.get_slice(entry["weight_name"]).get_shape()


def _fetch(shards: Shards, index: int, stack: contextlib.ExitStack, layer: nn.Module, *_: object) -> None:
    if "forward" not in vars(layer):  # else something stands in for it (see `trace`), which needs no weights
        stack.enter_context(shards.present(index))


def _device_map(model: PreTrainedModel, layers: str, device: torch.device) -> dict[str, str]:
    """Layers on disk, all else on `device`, by the names of the largest modules that are either."""
    parts = layers.split(".")
    around = [".".join(parts[:depth]) for depth in range(len(parts) + 1)]  # "", "model", "model.layers"
    children = [f"{holder}.{name}".lstrip(".") for holder in around[:-1] for name, _ in model.get_submodule(holder).named_children()]
    return {
        **{name: str(device) for name in children if name not in around},
        **{f"{layers}.{index}": "disk" for index in range(len(model.get_submodule(layers)))},
    }
