"""Is a parent laid out as its family's descriptor says? Asked of its modules before anything runs.

A wrong descriptor need not fail: where both subblocks read one norm, a layer without attention would lose the FFN's norm too.
So names and sizes are looked up in every layer. Then a small model of one layer, of the parent's class and config, runs with hooks: they
read what its modules return and what each subblock adds to the residual stream. It runs again with a no_op in place.
"""
import copy
from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_utils import local_torch_dtype
from transformers.pytorch_utils import Conv1D

from puzzle_core.errors import UserError
from puzzle_core.families import IN_CONFIG, Family
from puzzle_core.modeling_puzzle import build_layer, get_subblock
from puzzle_core.spec import ATTENTION, FFN, SUBBLOCKS

_IDS_BT = torch.arange(10).view(2, 5)


def check(model: PreTrainedModel, family: Family) -> None:
    """UserError that says which field of `family` does not fit the parent `model`, whose weights may be absent."""
    if getattr(transformers, type(model).__name__, None) is not type(model):
        raise UserError(f"{type(model).__name__} is code that came with the checkpoint; a child could not be built from it elsewhere")
    if model.get_output_embeddings() is None:
        raise UserError(f"{type(model).__name__} has no LM head, which scores and distillation need")
    check_layers(model, family)
    for index, layer in enumerate(model.get_submodule(family.layers)):
        for subblock in SUBBLOCKS:
            _check_names(layer, family, subblock, index)
        for kind, size in _sizes(layer, family).items():
            if size != (expected := _whole_size(layer, family, kind, model.config)):
                key = family.size_keys[kind]
                raise _misfit(layer, f"size_keys['{kind}'] is '{key}', by which a layer has {expected}; layer {index} has {size}")
    _Trial(model, family).run()


def check_layers(model: PreTrainedModel, family: Family) -> None:
    """The first name of all, without which nothing else can be looked up."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if family.layers not in lists:
        raise UserError(f"{_WHERE}: layers is '{family.layers}', but {type(model).__name__} has its layers in {' or '.join(lists[:3])}")


_WHERE = "the parent's entry of FAMILIES in puzzle_core/families.py does not fit it"


def _misfit(layer: nn.Module, problem: str) -> UserError:
    shown = [name for name, _ in layer.named_modules() if name and not any(part.isdigit() and part != "0" for part in name.split("."))]
    shown += [name for name, parameter in layer.named_parameters() if parameter.ndim > 2]
    return UserError(f"{_WHERE}: {problem}. Modules of a {type(layer).__name__}: {', '.join(shown)}")


def _check_names(layer: nn.Module, family: Family, subblock: str, index: int) -> None:
    names, modules = family.subblock(subblock), dict(layer.named_modules())

    def expect(field: str, name: str, known: object, what: str, where: str) -> None:
        if name not in known:
            raise _misfit(layer, f"{subblock}.{field} is '{name}', but {where} of layer {index} has no such {what}")

    for field, listed in (("module", names.modules[:1]), ("more", names.modules[1:]), ("norms", names.norms)):
        for name in listed:
            expect(field, name, modules, "module", f"{type(layer).__name__}")
    own = get_subblock(layer, names.modules)
    modules, parameters = dict(own.named_modules()), dict(own.named_parameters())
    if subblock == FFN and names.router:
        expect("router", names.router, modules, "module", f"the {subblock}")
    for field in ("q", "k", "v", "last") if subblock == ATTENTION else ("inner", "last"):
        listed = getattr(names, field)
        for name in [listed] if isinstance(listed, str) else listed:
            if subblock == FFN and names.router:
                expect(field, name, parameters, "parameter", f"the {subblock}")
            else:
                expect(field, name, modules, "module", f"the {subblock}")
                if f"{name}.weight" not in parameters:
                    raise _misfit(layer, f"{subblock}.{field} is '{name}', which is no projection: it has no weight")
    if subblock == ATTENTION and not hasattr(own, "head_dim"):
        raise _misfit(layer, f"attention.module is '{names.module}', a {type(own).__name__} without head_dim, which sizes heads")


def _shape(projection: nn.Module) -> tuple[int, int]:
    """Outputs and inputs."""
    return tuple(projection.weight.shape[::-1] if isinstance(projection, Conv1D) else projection.weight.shape)


def _sizes(layer: nn.Module, family: Family) -> dict[str, int]:
    """How large the layer's modules are, by kind of variant, for those that the family has a key for."""
    attention, ffn = (get_subblock(layer, family.subblock(s).modules) for s in SUBBLOCKS)
    num_values = _shape(attention.get_submodule(family.attention.v))[0]
    num_inputs = _shape(attention.get_submodule(family.attention.last))[1]
    if family.attention.q == family.attention.v:  # queries, keys and values in one
        num_values = (num_values - num_inputs) // 2
    sizes = {"kv": num_values // attention.head_dim}
    if family.ffn.router:
        sizes["e"] = len(ffn.get_parameter(family.ffn.last))
    else:
        sizes["w"] = _shape(ffn.get_submodule(family.ffn.last))[1]
        for name in family.ffn.inner:
            if _shape(ffn.get_submodule(name))[0] != sizes["w"] * family.ffn.inner.count(name):
                times = family.ffn.inner.count(name)
                raise _misfit(layer, f"ffn.inner has '{name}' {times} times, but its outputs are not {times} times the inputs of ffn.last")
    return {kind: size for kind, size in sizes.items() if kind in family.size_keys}


def _whole_size(layer: nn.Module, family: Family, kind: str, config) -> int:
    if kind == "e" and not hasattr(config, family.size_keys[kind]):
        raise _misfit(layer, f"size_keys['e'] is '{family.size_keys[kind]}', which a {type(config).__name__} does not have")
    return family.whole_size(kind, config)


class _Trial:
    """One layer of the parent's class and config, its heads as large as the parent's but fewer, all else small, its weights noise."""

    def __init__(self, model: PreTrainedModel, family: Family):
        self.family, config = family, copy.deepcopy(model.config)
        num_heads, kv = config.num_attention_heads, family.size_keys.get("kv")
        config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, 16, None
        config.num_attention_heads = min(num_heads, 4)
        config.hidden_size = config.hidden_size // num_heads * config.num_attention_heads
        if getattr(config, kv or "", None):
            setattr(config, kv, min(getattr(config, kv), 2 if getattr(config, kv) < num_heads else config.num_attention_heads))
        for key, value in vars(config).items():
            if isinstance(value, int) and ("intermediate_size" in key or key == family.size_keys.get("w")):
                setattr(config, key, 16)
        config._attn_implementation = "eager"
        with no_init_weights(), local_torch_dtype(torch.float32), torch.device("cpu"):
            self.model = type(model)(config).eval()
        noise = torch.randn(65_537, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for number, (name, parameter) in enumerate(self.model.named_parameters()):
                values = noise.roll(number).repeat(-(-parameter.numel() // len(noise)))[: parameter.numel()].view(parameter.shape)
                small = values * (0.2 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
                parameter.copy_(small + (parameter.ndim == 1 and name.endswith("weight")))
        self.layers = self.model.get_submodule(family.layers)
        self.layer = self.layers[0]

    @torch.no_grad()
    def run(self) -> None:
        seen = self._watch()
        self._check_calls(seen)
        for subblock in SUBBLOCKS:
            self._check_no_op(subblock, self._end(subblock, seen))
        for kind, size in _sizes(self.layer, self.family).items():
            if size > 1:
                self._check_size(kind, {"kv": 1, "w": 8, "e": size - 1}[kind])

    def _check_size(self, kind: str, smaller: int) -> None:
        """A layer made with the size key at `smaller` is as small as that, and only tensors that get weights then change shape."""
        key, ffn = self.family.size_keys[kind], self.family.ffn
        try:
            with no_init_weights():
                built = build_layer(self.layer, self.model.config, {key: smaller}, 0, self.family.to_json())
        except (AttributeError, TypeError, ValueError) as error:
            raise _misfit(self.layer, f"size_keys['{kind}'] is '{key}', but no layer can be made with {key}={smaller} ({error})") from error
        if (made := _sizes(built, self.family)[kind]) != smaller:
            raise _misfit(self.layer, f"size_keys['{kind}'] is '{key}', but a layer made with {key}={smaller} has {made}")
        written = {"kv": (self.family.attention.module,), "e": (ffn.module,), "w": tuple(dict.fromkeys((*ffn.inner, ffn.last)))}[kind]
        if kind == "w" and not ffn.more:
            written = tuple(f"{ffn.module}.{name}" for name in written)
        of_parent = {name: parameter.shape for name, parameter in self.layer.named_parameters()}
        for name, parameter in built.named_parameters():
            if parameter.shape != of_parent[name] and not any(name.startswith(f"{place}.") for place in written):
                raise _misfit(self.layer, f"size_keys['{kind}'] is '{key}', which changes {name} too, and no variant fills that")

    def _output(self, hook_on: str | None = None, hook: Callable | None = None) -> Tensor | tuple:
        """What the layer in place returns, with a forward hook on one of its modules."""
        seen, layer = [], self.layers[0]
        handles = [layer.register_forward_hook(lambda module, args, output: seen.append(output))]
        if hook_on is not None:
            handles.append(layer.get_submodule(hook_on).register_forward_hook(hook))
        try:
            self.model(input_ids=_IDS_BT, use_cache=True)
        finally:
            for handle in handles:
                handle.remove()
        return seen[0]

    def _watch(self) -> list[tuple[str, tuple, dict, object]]:
        """The calls of the layer's modules in the order in which they end: name, arguments, output."""
        seen = []
        handles = [
            module.register_forward_hook(
                lambda module, args, kwargs, output, name=name: seen.append((name, args, kwargs, output)), with_kwargs=True
            )
            for name, module in self.layer.named_modules()
        ]
        try:
            self._output()
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def _check_calls(self, seen: list[tuple]) -> None:
        """What modules are called with and return."""
        calls, family = {name: (args, kwargs, output) for name, args, kwargs, output in seen}, self.family
        if isinstance(calls[""][2], tuple) != family.returns_tuple:
            raise _misfit(self.layer, f"returns_tuple is {family.returns_tuple}, but a layer returns {_what(calls[''][2])}")
        for subblock in SUBBLOCKS:
            for name in family.subblock(subblock).modules:
                if name not in calls:
                    raise _misfit(self.layer, f"{subblock}.module has '{name}', which the layer does not call")
        (module, last), router = (family.attention.module, family.ffn.modules[-1]), family.ffn.router
        _, kwargs, output = calls[module]
        if not (isinstance(output, tuple) and len(output) == 2 and isinstance(output[0], Tensor)):
            raise _misfit(self.layer, f"attention.module is '{module}', which returns {_what(output)}; expected (output, weights)")
        if not {"past_key_values", "layer_past"} & kwargs.keys():
            raise _misfit(self.layer, f"attention.module is '{module}', which is not given the cache, only {', '.join(kwargs)}")
        output = calls[last][2]
        if not isinstance(output, Tensor):
            raise _misfit(self.layer, f"ffn.module is '{last}', which returns {_what(output)}; expected one tensor, as variants return")
        if router:
            output = calls[f"{family.ffn.module}.{router}"][2]
            num_experts = len(self.layer.get_parameter(f"{family.ffn.module}.{family.ffn.last}"))
            if not (isinstance(output, tuple) and isinstance(output[0], Tensor) and output[0].shape[-1] == num_experts):
                expected = f"the logits of {num_experts} experts first"
                raise _misfit(self.layer, f"ffn.router is '{router}', which returns {_what(output)}; expected {expected}")

    def _end(self, subblock: str, seen: list[tuple]) -> str:
        """The last module that what the subblock gives passes through before it is added to the residual stream."""
        inside = [name for s in SUBBLOCKS for name in self.family.subblock(s).modules]
        end = self.family.subblock(subblock).modules[-1]
        number = next(number for number, call in enumerate(seen) if call[0] == end)
        given = _hidden(seen[number][3])
        for name, args, kwargs, output in seen[number + 1 :]:
            is_inside = any(name == own or name.startswith(f"{own}.") for own in inside)
            if name and not is_inside and any(value is given for value in (*args, *kwargs.values())) and isinstance(output, Tensor):
                end, given = name, output
        return end

    def _check_no_op(self, subblock: str, end: str) -> None:
        """A layer with a no_op in place is the untouched layer to whose residual stream the subblock adds nothing."""

        def nothing(module, args, output):
            return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

        norms, expected = self.family.subblock(subblock).norms, _hidden(self._output(end, nothing))
        if self._without(subblock, norms, expected):
            return
        for norm in norms:
            if self._without(subblock, tuple(other for other in norms if other != norm), expected):
                raise _misfit(
                    self.layer,
                    f"{subblock}.norms has '{norm}', which {subblock} does not have alone: a layer without {subblock} and its norms "
                    f"differs from the parent's layer in which {subblock} adds nothing",
                )
        raise _misfit(
            self.layer,
            f"{subblock} is '{', '.join(self.family.subblock(subblock).modules)}' with the norms {', '.join(norms)}, but a layer without "
            f"them differs from the parent's layer in which '{end}' adds nothing",
        )

    def _without(self, subblock: str, norms: tuple[str, ...], expected: Tensor) -> bool:
        """Whether a layer without the subblock and `norms` returns what is `expected`."""
        puzzle = self.family.to_json()
        puzzle[subblock]["norms"] = list(norms)
        with no_init_weights(), local_torch_dtype(torch.float32), torch.device("cpu"):
            built = build_layer(self.layer, self.model.config, {"skip": [IN_CONFIG[subblock]]}, 0, puzzle).eval()
        built.load_state_dict(self.layer.state_dict(), strict=False)
        self.layers[0] = built
        try:
            output = _hidden(self._output())
        except (TypeError, ValueError) as error:
            modules = ", ".join(self.family.subblock(subblock).modules)
            raise _misfit(self.layer, f"{subblock} is '{modules}', and a layer cannot call a no_op in its place ({error})") from error
        finally:
            self.layers[0] = self.layer
        same = torch.isclose(output, expected, atol=1e-5, rtol=1e-4, equal_nan=True)  # NaN is no matter of layout
        return bool(output.shape == expected.shape and same.all())


def _hidden(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _what(output: object) -> str:
    """In words, what a module returned."""
    if isinstance(output, tuple):
        return f"a tuple ({', '.join(type(part).__name__ for part in output)})"
    return f"a {type(output).__name__}" + (f" of shape {tuple(output.shape)}" if isinstance(output, Tensor) else "")
