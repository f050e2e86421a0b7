"""Running the parent in parts: what enters each layer, what each subblock sees and says, and starting half way up."""
import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from puzzle_core.families import Family
from puzzle_core.parents import Parent
from puzzle_core.spec import BLOCK, SUBBLOCKS

IN_CACHE = 2**21  # of a 16-bit head's weights, the float32 copies that a CPU makes at a time: they stay in its cache


def first(output: Tensor | tuple) -> Tensor:
    """Attention modules return (output, weights), FFN modules the output alone."""
    return output[0] if isinstance(output, tuple) else output


class _Stop(Exception):
    """Raised by a hook that has seen enough."""


def _run_hooked(
    parent: Parent, input_ids_BT: Tensor, hooks: list[RemovableHandle], hidden_BTD: Tensor | None = None, start: int = 0
) -> None:
    """Run the model's own forward, without its head, from layer `start` on until a hook raises _Stop; then take the hooks off."""
    try:
        with start_at(parent, start, hidden_BTD):
            parent.model.base_model(input_ids=input_ids_BT, use_cache=False)
    except _Stop:
        pass
    finally:
        for hook in hooks:
            hook.remove()


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

    _run_hooked(parent, input_ids, [layer.register_forward_pre_hook(record(i), with_kwargs=True) for i, layer in enumerate(parent.layers)])
    return hiddens, others


@contextlib.contextmanager
def _standing_in(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """While open, each module's forward is another function."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


def _answering(modules: Iterable[nn.Module], output: object) -> contextlib.AbstractContextManager[None]:
    """While open, each of `modules` says `output` without looking at its input."""
    return _standing_in(dict.fromkeys(modules, lambda *args, **kwargs: output))


@contextlib.contextmanager
def start_at(parent: Parent, layer: int, hidden_BTD: Tensor | None) -> Iterator[None]:
    """While open, the model's own forward skips the layers below `layer` and enters it with `hidden_BTD`.

    Where `layer` is 0 nothing is skipped: the forward starts from the tokens. Where it is the number of layers, what is
    left is the final norm and the head.
    """
    with _answering(parent.layers[:layer], (hidden_BTD, None) if parent.family.returns_tuple else hidden_BTD):
        yield


@torch.no_grad()
def run_layers(parent: Parent, input_ids_BT: Tensor, hidden_BTD: Tensor | None, start: int, stop: int) -> Tensor | None:
    """What enters layer `stop` when `hidden_BTD` enters layer `start`: [B, T, D]; no layer from `stop` on is run."""
    if start == stop:
        return hidden_BTD
    outputs: list[Tensor] = []

    def leave(module, args, output):
        outputs.append(first(output))
        raise _Stop

    _run_hooked(parent, input_ids_BT, [parent.layers[stop - 1].register_forward_hook(leave)], hidden_BTD, start)
    return outputs[0]


@torch.no_grad()
def layer_call(parent: Parent, input_ids_BT: Tensor, hidden_BTD: Tensor | None, layer: int) -> tuple[tuple, dict]:
    """The arguments that the model's own forward calls `layer` with when `hidden_BTD` enters it; the layer is not run."""
    calls: list[tuple[tuple, dict]] = []

    def enter(module, args, kwargs):
        calls.append((args, kwargs))
        raise _Stop

    _run_hooked(parent, input_ids_BT, [parent.layers[layer].register_forward_pre_hook(enter, with_kwargs=True)], hidden_BTD, layer)
    return calls[0]


@torch.no_grad()
def last_hidden(parent: Parent, input_ids_BT: Tensor, hidden_BTD: Tensor | None = None, start: int = 0) -> Tensor:
    """What the LM head sees when `hidden_BTD` enters layer `start`: [B, T, D], after the final norm."""
    with start_at(parent, start, hidden_BTD):
        return parent.model.base_model(input_ids=input_ids_BT, use_cache=False).last_hidden_state


@torch.no_grad()
def head(parent: Parent, hidden_ND: Tensor) -> Tensor:
    """The logits [N, V] that the model's own forward makes of last hidden states, its scales and caps included, in float32."""
    return head_of(parent.model, parent.family, hidden_ND)


def head_of(model: PreTrainedModel, family: Family, hidden_ND: Tensor) -> Tensor:
    """The same of any model of the family, a child too: [N, V]. It is the class's forward, whatever stands in the model's own."""
    # Together these have every field that any causal LM asks of its body's output.
    body = MoeModelOutputWithPast(last_hidden_state=hidden_ND[None])
    body.cross_attentions = None
    # Some causal LMs (opt) ask not their base model but the module inside it that holds the layers.
    with float32_logits(model), _answering({model.base_model, model.get_submodule(family.layers.rpartition(".")[0])}, body):
        return type(model).forward(model, inputs_embeds=hidden_ND[None], use_cache=False).logits[0]


@contextlib.contextmanager
def float32_logits(model: PreTrainedModel) -> Iterator[None]:
    """While open, the model's forward gives logits in float32, whatever its dtype: those of its 16-bit hidden states and weights.

    Logits in bfloat16 have 8 bits. A KL of them is 2e-4 nats too large or more, and ties decide which token is the likeliest.
    Under autocast the operands are of autocast's dtype, the products and sums float32.
    """
    linear = model.get_output_embeddings()
    device = linear.weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else linear.weight.dtype
    if dtype.itemsize > 2:
        yield
        return
    assert isinstance(linear, nn.Linear), linear
    with _standing_in({linear: partial(_float32_linear, linear, dtype)}):
        yield


def _float32_linear(linear: nn.Linear, dtype: torch.dtype, hidden: Tensor) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        logits_NV = _Float32Product.apply(hidden.flatten(0, -2), linear.weight, dtype)
        logits_NV = logits_NV if linear.bias is None else logits_NV + linear.bias.float()
        return logits_NV.unflatten(0, hidden.shape[:-1])


class _Float32Product(torch.autograd.Function):
    """hidden · weightᵀ in float32, [N, V], of both rounded to a 16-bit dtype; so are their gradients.

    A GPU's tensor cores multiply 16-bit operands and add up in float32 anyway: all that costs is writing 4 bytes a logit.
    They need a gradient of 16 bits too: each entry is rounded, to 8 bits of its own size.
    """

    @staticmethod
    def forward(ctx, hidden_ND: Tensor, weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
        hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
        ctx.save_for_backward(hidden_ND, weight_VD)
        if hidden_ND.is_cuda:
            return torch.mm(hidden_ND, weight_VD.T, out_dtype=torch.float32)
        logits_NV, hidden_ND = hidden_ND.new_empty(len(hidden_ND), len(weight_VD), dtype=torch.float32), hidden_ND.float()
        rows = max(1, IN_CACHE // weight_VD.shape[1])  # else a copy of the whole weight, which takes a quarter longer
        for some_VD, into_NV in zip(weight_VD.split(rows), logits_NV.split(rows, dim=1), strict=True):
            torch.mm(hidden_ND, some_VD.float().T, out=into_NV)
        return logits_NV

    @staticmethod
    def backward(ctx, gradient_NV: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_ND, weight_VD = ctx.saved_tensors
        if gradient_NV.is_cuda and hidden_ND.dtype == torch.bfloat16:  # float16 would lose the small ones
            gradient_NV = gradient_NV.bfloat16()
            multiply = partial(torch.mm, out_dtype=torch.float32)
        else:
            hidden_ND, weight_VD, multiply = hidden_ND.float(), weight_VD.float(), torch.mm
        return multiply(gradient_NV, weight_VD), multiply(gradient_NV.T, hidden_ND), None


@dataclass
class Call:
    """What one subblock was given and gave back in one batch of the parent's run."""

    args: tuple
    kwargs: dict
    output_BTD: Tensor

    def autocast(self) -> torch.autocast:
        """Inside, modules compute in the parent's dtype, whatever their own."""
        out = self.output_BTD
        return torch.autocast(out.device.type, dtype=out.dtype, enabled=out.dtype != torch.float32)

    def replay(self, module: nn.Module) -> Tensor:
        """What `module` says to the same input: [B, T, D]."""
        with self.autocast():
            return first(module(*self.args, **self.kwargs)).view_as(self.output_BTD)  # opt's FFN sees all tokens in one row


@dataclass(frozen=True)
class KvCache:
    """What one layer's attention keeps of a sequence, whatever its length."""

    bytes_per_token: int  # keys and values of one token
    window: int  # tokens that are kept at most; 0: all


class _Watched(DynamicCache):
    """A cache that adds up the keys and values it is given."""

    num_bytes = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.num_bytes += key_states.nbytes + value_states.nbytes
        return super().update(key_states, value_states, *args, **kwargs)


@torch.no_grad()
def kv_cache(module: nn.Module, layer: int, call: Call) -> KvCache:
    """What `module`, as the attention of `layer`, really puts into a KV cache, and how much of it the cache keeps."""
    cache = _Watched(config=getattr(module, "config", None))
    name = next(name for name in ("past_key_values", "layer_past") if name in call.kwargs)
    module(*call.args, **{**call.kwargs, name: cache})
    of_token = cache.num_bytes // call.output_BTD.shape[:2].numel()
    return KvCache(of_token, getattr(cache.layers[layer], "sliding_window", 0) if of_token else 0)


class ParentRun:
    """The parent, a few layers at a time: over token batches whose hidden states stay in memory, or over any others."""

    def __init__(self, parent: Parent, batches: dict[str, list]):
        """`batches` by use, each a list of [B, T] token arrays, all of one shape."""
        self.parent = parent
        tokens = {use: [torch.as_tensor(b, device=parent.device) for b in some] for use, some in batches.items()}
        _, self.others = layer_inputs(parent, next(b for some in tokens.values() for b in some))
        with parent.present(0):
            self.hidden = {use: [self.enter(b, 0) for b in some] for use, some in tokens.items()}

    def enter(self, input_ids: Tensor, layer: int) -> Tensor:
        """The hidden states [B, T, D] with which these tokens reach `layer`."""
        return layer_inputs(self.parent, input_ids, last_layer=layer)[0][layer]

    @torch.no_grad()
    def through(self, layers: range, hidden_BTD: Tensor) -> Iterator[tuple[int, dict[str, Call]]]:
        """Run one batch from the first of `layers` on; yield each layer and what its subblocks and the block saw and said."""
        for layer in layers:
            seen: dict[str, tuple] = {}
            handles = [handle for s in SUBBLOCKS for handle in self._record(layer, s, seen)]
            try:
                out_BTD = first(self.parent.layers[layer](hidden_BTD, **self.others[layer]))
            finally:
                for handle in handles:
                    handle.remove()
            calls = {s: Call(args, kwargs, output.view_as(out_BTD)) for s, (args, kwargs, output) in seen.items()}
            yield layer, {**calls, BLOCK: Call((hidden_BTD,), self.others[layer], out_BTD)}
            hidden_BTD = out_BTD

    def _record(self, layer: int, subblock: str, seen: dict[str, tuple]) -> Iterator[RemovableHandle]:
        """A subblock's first module sees its input, the last one says its output."""
        parts = [self.parent.layers[layer].get_submodule(name) for name in self.parent.family.subblock(subblock).modules]
        yield parts[0].register_forward_pre_hook(
            lambda module, args, kwargs: seen.__setitem__(subblock, (args, kwargs)), with_kwargs=True
        )
        yield parts[-1].register_forward_hook(
            lambda module, args, output: seen.__setitem__(subblock, (*seen[subblock], first(output)))
        )

    def advance(self, layer: int, use: str) -> Iterator[dict[str, Call]]:
        """Move each batch of `use` from the input of `layer` to its output; yield what was seen and said there."""
        for index, hidden_BTD in enumerate(self.hidden[use]):
            for _, calls in self.through(range(layer, layer + 1), hidden_BTD):
                self.hidden[use][index] = calls[BLOCK].output_BTD
                yield calls

    def skip(self, layer: int, *uses: str) -> None:
        """Move the batches of `uses`, or all, past a layer that has nothing left to learn."""
        with self.parent.present(layer):
            for use in uses or self.hidden:
                for _ in self.advance(layer, use):
                    pass
