"""Running the parent in parts: what enters each layer, what each subblock sees and says, and starting half way up."""
import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from puzzle_core.parents import Parent
from puzzle_core.spec import SUBBLOCKS


def first(output: Tensor | tuple) -> Tensor:
    """Attention modules return (output, weights), FFN modules the output alone."""
    return output[0] if isinstance(output, tuple) else output


class _Stop(Exception):
    pass


@torch.no_grad()
def layer_inputs(parent: Parent, input_ids: Tensor, last_layer: int | None = None) -> tuple[list[Tensor], list[dict]]:
    """The hidden states [B, T, D] that enter each layer, and the other arguments each layer is called with.

    Stops before layer `last_layer` runs, if given. The other arguments (mask, rotary embedding) depend on the shape
    of `input_ids` only.
    """
    hiddens, others = [], []

    def record(index: int) -> Callable:
        def hook(module, args, kwargs):
            named = inspect.signature(module.forward).bind(*args, **kwargs).arguments
            named |= named.pop("kwargs", {})
            hiddens.append(named.pop("hidden_states"))
            others.append(named)
            if index == last_layer:
                raise _Stop

        return hook

    handles = [layer.register_forward_pre_hook(record(i), with_kwargs=True) for i, layer in enumerate(parent.layers)]
    try:
        parent.model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return hiddens, others


@contextlib.contextmanager
def start_at(parent: Parent, layer: int, hidden_BTD: Tensor) -> Iterator[None]:
    """While open, the model's own forward skips the layers below `layer` and enters it with `hidden_BTD`."""
    skipped = parent.layers[:layer]
    for module in skipped:
        module.forward = lambda hidden_states, *args, **kwargs: (hidden_BTD, None) if parent.family.returns_tuple else hidden_BTD
    try:
        yield
    finally:
        for module in skipped:
            del module.forward


@dataclass
class Call:
    """What one subblock was given and gave back in one batch of the parent's run."""

    args: tuple
    kwargs: dict
    output_BTD: Tensor

    def replay(self, module: nn.Module) -> Tensor:
        """What `module` says to the same input: [B, T, D], computed in the parent's dtype whatever the module's own."""
        out = self.output_BTD
        with torch.autocast(out.device.type, dtype=out.dtype, enabled=out.dtype != torch.float32):
            return first(module(*self.args, **self.kwargs)).view_as(out)  # opt's FFN sees all tokens in one row


@torch.no_grad()
def kv_bytes_per_token(module: nn.Module, layer: int, call: Call) -> int:
    """Bytes that `module`, as layer's attention, really leaves in a KV cache for one token of one sequence."""
    cache = DynamicCache(config=getattr(module, "config", None))
    name = next(name for name in ("past_key_values", "layer_past") if name in call.kwargs)
    module(*call.args, **{**call.kwargs, name: cache})
    slot = cache.layers[layer]
    return (slot.keys.nbytes + slot.values.nbytes) // call.output_BTD.shape[:2].numel()


class ParentRun:
    """The parent, one layer at a time, over fixed token batches whose hidden states stay in memory."""

    def __init__(self, parent: Parent, batches: dict[str, list]):
        """`batches` by use, each a list of [B, T] token arrays, all of one shape."""
        self.parent = parent
        tokens = {use: [torch.as_tensor(b, device=parent.device) for b in some] for use, some in batches.items()}
        _, self.others = layer_inputs(parent, next(b for some in tokens.values() for b in some))
        self.hidden = {
            use: [layer_inputs(parent, b, last_layer=0)[0][0] for b in some] for use, some in tokens.items()
        }

    @torch.no_grad()
    def advance(self, layer: int, use: str) -> Iterator[dict[str, Call]]:
        """Move each batch of `use` from the input of `layer` to its output; yield what each subblock saw and said."""
        seen: dict[str, tuple] = {}

        def record(subblock: str) -> Iterator[torch.utils.hooks.RemovableHandle]:
            """A subblock's first module sees its input, the last one says its output."""
            parts = [self.parent.layers[layer].get_submodule(name) for name in self.parent.family.subblock(subblock).modules]
            yield parts[0].register_forward_pre_hook(
                lambda module, args, kwargs: seen.__setitem__(subblock, (args, kwargs)), with_kwargs=True
            )
            yield parts[-1].register_forward_hook(
                lambda module, args, output: seen.__setitem__(subblock, (*seen[subblock], first(output)))
            )

        handles = [handle for s in SUBBLOCKS for handle in record(s)]
        try:
            for index, hidden_BTD in enumerate(self.hidden[use]):
                self.hidden[use][index] = first(self.parent.layers[layer](hidden_BTD, **self.others[layer]))
                yield {s: Call(args, kwargs, output.view_as(hidden_BTD)) for s, (args, kwargs, output) in seen.items()}
        finally:
            for handle in handles:
                handle.remove()

    def skip(self, layer: int) -> None:
        """Move every batch past a layer that has nothing left to learn."""
        for use in self.hidden:
            for _ in self.advance(layer, use):
                pass
