"""Parents in, children out: load a parent, build and swap its subblocks, save and load a child.

A child is a parent with rows applied: `per_layer_config` is the architecture in transformers' own form, and
`modeling_puzzle.py`, which travels with the checkpoint, is what turns it into modules, here as anywhere else.
"""
import contextlib
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights
from transformers.modeling_utils import local_torch_dtype
from transformers.utils import cached_file

from puzzle_core import modeling_puzzle
from puzzle_core.families import Family, family_of
from puzzle_core.files import atomic, fingerprint, lock
from puzzle_core.spec import ATTENTION, FFN, LINEAR, NO_OP, PARENT, SUBBLOCKS, Architecture, Variant

_IN_CONFIG = {ATTENTION: "attention", FFN: "mlp"}  # our subblocks as per_layer_config's `skip` names them


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is the first GPU where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"hardware.device is '{name}'; expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch sees no GPU here; use conf/hardware/cpu.yaml or auto.yaml")
    return torch.device(name)


@dataclass(frozen=True)
class Parent:
    """A loaded parent: the model in eval mode, its tokenizer, where its family keeps things, and which weights it has."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    family: Family
    identity: str  # hash of the config that chose it and of its content

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.get_submodule(self.family.layers)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def module(self, layer: int, subblock: str) -> nn.Module:
        """The bare module of a subblock, without its norms."""
        return getattr(self.layers[layer], self.family.subblock(subblock).module)

    def norms(self, layer: int, subblock: str) -> list[nn.Module]:
        return [getattr(self.layers[layer], name) for name in self.family.subblock(subblock).norms]


# ---------------------------------------------------------------------------------------------------------- parents


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, for parents that have no tokenizer of their own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<eos>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def _sampled_hash(directory: Path) -> str:
    """Hash of a checkpoint folder: names, sizes, and 64 KiB out of every 4 MiB of its files, which no retraining leaves alone."""
    digest = hashlib.sha256()
    for file in sorted(p for p in directory.iterdir() if p.suffix in (".json", ".safetensors", ".model")):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        with open(file, "rb") as handle:
            for start in range(0, file.stat().st_size, 4 << 20):
                handle.seek(start)
                digest.update(handle.read(64 << 10))
    return digest.hexdigest()[:16]


def _dequantised(file: Path, sha256: str | None) -> Path:
    """A folder with the GGUF's weights in float32, made once per content and kept in the user's cache."""
    with open(file, "rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if sha256 and digest != sha256:
        raise ValueError(f"{file}: sha256 is {digest}, expected {sha256}. The file is damaged or another one: fetch it again.")
    cache = Path(os.environ.get("PUZZLE_CACHE", Path.home() / ".cache" / "puzzle")) / "parents" / digest[:16]
    with lock(cache.parent, digest[:16], wait=True):  # several stages may want it at once
        if not cache.is_dir():
            _dequantise(file, cache)
    return cache


def _dequantise(file: Path, cache: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    with atomic(cache) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)


def _gguf_file(path: str, package: str | None) -> Path:
    if package is None:
        return Path(path)
    found = importlib.util.find_spec(package)
    if found is None:
        raise FileNotFoundError(f"the parent's weights are in the Python package '{package}', which is not installed: run `make install`")
    return Path(found.origin).parent / path


def _random_model(config: dict, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype)


def load_parent(
    source: str,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    path: str | None = None,
    package: str | None = None,
    sha256: str | None = None,
    id: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    config: dict | None = None,
    seed: int = 0,
) -> Parent:
    """Load a parent as its preset in conf/parent/ says.

    `source` is hub (`id`, `revision`), directory (`path`), gguf (`path`, or `path` inside an installed `package`;
    dequantised) or random (`config` of a transformers model, `seed`; byte tokenizer). Only safetensors are read.
    Raises ValueError for an unknown family, FileNotFoundError where the weights are not.
    """
    content, torch_dtype = "", getattr(torch, dtype, None)
    if torch_dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"parent.dtype is '{dtype}'; expected float32, bfloat16 or float16")
    if source == "random":
        family_of(config["model_type"])
        model, tokenizer = _random_model(config, seed, torch_dtype), _byte_tokenizer()
    elif source in ("hub", "directory", "gguf"):
        place, more = id, {"revision": revision, "trust_remote_code": trust_remote_code}
        if source != "hub":
            file = _gguf_file(path, package) if source == "gguf" else Path(path)
            if not file.exists():
                raise FileNotFoundError(f"no parent at {file}: check `path` in its preset under conf/parent/")
            place = _dequantised(file, sha256) if source == "gguf" else file
            content = _sampled_hash(place)
            more.pop("revision")
        family_of(AutoConfig.from_pretrained(place, **more).model_type)
        with _damage_named(place):
            model = AutoModelForCausalLM.from_pretrained(place, dtype=torch_dtype, use_safetensors=True, **more)
        if source == "hub":
            content = Path(cached_file(place, "config.json", revision=revision)).parent.name  # the commit behind the revision
        tokenizer = AutoTokenizer.from_pretrained(place, **more)
    else:
        raise ValueError(f"unknown parent source '{source}'; known: hub, directory, gguf, random")
    identity = fingerprint(source, dtype, path, package, id, revision, config, seed, content)
    model = model.eval().requires_grad_(False).to(device)
    return Parent(model, tokenizer, family_of(model.config.model_type), identity)


def resolve_space(space: dict[str, list[str]], config: PreTrainedConfig, family: Family) -> dict[str, list[Variant]]:
    """The variants of each subblock, `w50%` and the like turned into sizes of this parent, the parent itself first.

    A share of the FFN width is rounded to a multiple of 32; a share of the kv heads to the next divisor below. A share
    that comes to the parent's own size is the parent.
    ValueError for a variant this parent cannot have.
    """
    resolved = {}
    for subblock in SUBBLOCKS:
        resolved[subblock] = [PARENT]
        for text in space[subblock]:
            variant = _resolve(str(text), config, family)
            allowed = {ATTENTION: ("kv", "linear", "no_op", "parent"), FFN: ("w", "linear", "no_op", "parent")}[subblock]
            if variant.kind not in allowed:
                raise ValueError(f"search_space.{subblock}: '{text}' is not a variant of {subblock}; known kinds: {', '.join(allowed)}")
            if variant not in resolved[subblock]:
                resolved[subblock].append(variant)
    return resolved


def _resolve(text: str, config: PreTrainedConfig, family: Family) -> Variant:
    share = None
    if text.endswith("%"):
        kind = text.rstrip("%.0123456789")
        share = float(text[len(kind) : -1]) / 100
    else:
        variant = Variant.parse(text)
        kind = variant.kind
    if kind not in family.size_keys:
        return Variant.parse(text)
    whole = getattr(config, family.size_keys[kind])
    divisors = [n for n in range(1, whole) if whole % n == 0]
    if share is not None:
        if whole == 1 or (kind == "w" and max(32, round(share * whole / 32) * 32) >= whole):
            return PARENT
        size = max([n for n in divisors if n <= share * whole] or [1]) if kind == "kv" else max(32, round(share * whole / 32) * 32)
        variant = Variant(kind, size)
    if not variant.size or variant.size >= whole or (kind == "kv" and variant.size not in divisors):
        expected = f"one of {divisors}" if kind == "kv" else f"between 1 and {whole - 1}"
        raise ValueError(f"variant '{text}' does not fit this parent, whose {family.size_keys[kind]} is {whole}; expected {expected}")
    return variant


# -------------------------------------------------------------------------------------------------------- subblocks


def changes(family: Family, subblock: str, variant: Variant) -> dict:
    """What `variant` changes in its layer's config: an entry of per_layer_config."""
    if variant == PARENT:
        return {}
    if variant in (NO_OP, LINEAR):
        return {"skip" if variant == NO_OP else "linear_subblocks": [_IN_CONFIG[subblock]]}
    return {family.size_keys[variant.kind]: variant.size}


def _puzzle_section(parent: Parent) -> dict:
    """config.json's `puzzle`: what the modelling file must know of the family."""
    section = parent.family.to_json()
    for subblock in SUBBLOCKS:
        names, module = parent.family.subblock(subblock), parent.module(0, subblock)
        section[subblock]["bias"] = any(getattr(module, name).bias is not None for name in (names.first, names.last))
    return section


@contextlib.contextmanager
def _unset_weights(parent: Parent) -> Iterator[None]:
    """Modules made here have the parent's dtype and device; buffers such as rotary frequencies keep their own dtype."""
    with no_init_weights(), local_torch_dtype(parent.model.dtype), torch.device(parent.device):
        yield


def build_subblock(parent: Parent, layer: int, subblock: str, variant: Variant) -> nn.Module:
    """The bare module of `variant`, its weights not yet set, in the parent's dtype and on its device."""
    with _unset_weights(parent):
        built = modeling_puzzle.build_layer(
            parent.layers[layer], parent.model.config, changes(parent.family, subblock, variant), layer, _puzzle_section(parent)
        )
    return getattr(built, parent.family.subblock(subblock).module).eval()


@contextlib.contextmanager
def swapped(parent: Parent, layer: int, subblock: str, module: nn.Module) -> Iterator[None]:
    """Put `module` in the parent's place for a while; where it does nothing, the subblock's norms rest too."""
    block, names = parent.layers[layer], parent.family.subblock(subblock)
    kept = {name: getattr(block, name) for name in (names.module, *names.norms)}
    setattr(block, names.module, module)
    if isinstance(module, (modeling_puzzle.NoOpAttention, modeling_puzzle.NoOpFfn)):
        for name in names.norms:
            setattr(block, name, nn.Identity())
    try:
        yield
    finally:
        for name, original in kept.items():
            setattr(block, name, original)


def num_params(parent: Parent, layer: int, subblock: str, module: nn.Module) -> int:
    """Parameters of a subblock with `module` in it, its norms included."""
    with swapped(parent, layer, subblock, module):
        return sum(p.numel() for part in (module, *parent.norms(layer, subblock)) for p in part.parameters())


@contextlib.contextmanager
def _damage_named(place: object) -> Iterator[None]:
    try:
        yield
    except safetensors.SafetensorError as error:
        raise ValueError(f"{place} holds a damaged safetensors file ({error}): fetch or make it again") from error


def variant_row(path: Path) -> dict:
    """The library row that a variant's file carries; {} if there is no whole file there."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get("row", "{}"))
    except (OSError, safetensors.SafetensorError):
        return {}


def load_weights(module: nn.Module, path: Path, fingerprint: str) -> None:
    """Fill `module` from one variant's file.

    ValueError that names the file if it is damaged, does not fit, or has not the library row's `fingerprint` ("" is not
    checked: rows from elsewhere).
    """
    try:
        module.load_state_dict(load_file(path))
        if fingerprint and variant_row(path).get("fingerprint") != fingerprint:
            raise RuntimeError("it was trained under other settings than library.parquet says")
    except (safetensors.SafetensorError, RuntimeError, FileNotFoundError) as error:
        raise ValueError(f"{path}: not the weights of this variant ({error}). Delete it and run `dvc repro bld`.") from error


# ---------------------------------------------------------------------------------------------------------- children


def per_layer_config(family: Family, architecture: Architecture) -> dict[int, dict]:
    """The architecture as transformers writes it: layer to changes, layers that stay as they are left out."""
    overrides: dict[int, dict] = {}
    for layer, subblock, variant in architecture.items():
        for key, value in changes(family, subblock, variant).items():
            entry = overrides.setdefault(layer, {})
            entry[key] = entry.get(key, []) + value if isinstance(value, list) else value
    return overrides


@torch.no_grad()
def make_child(parent: Parent, architecture: Architecture, weights_of: Callable[[int, str, Variant], tuple[Path, str]]) -> PreTrainedModel:
    """The child: the parent's tensors, with the chosen variants' from the files (and fingerprints) that `weights_of` names."""
    overrides = per_layer_config(parent.family, architecture)
    config = type(parent.model.config).from_dict(parent.model.config.to_dict())
    base = type(parent.model)
    if overrides:
        config.puzzle, config.linear_subblocks = _puzzle_section(parent), []
        config.per_layer_config = overrides
        base = modeling_puzzle.child_class(base)
        base.register_for_auto_class("AutoModelForCausalLM")
    config._attn_implementation = parent.model.config._attn_implementation
    with _unset_weights(parent):
        child = base(config)
    child.tie_weights()
    family_layers = child.get_submodule(parent.family.layers)
    own = child.state_dict()
    child.load_state_dict({k: v for k, v in parent.model.state_dict().items() if k in own and v.shape == own[k].shape}, strict=False)
    for layer, subblock, variant in architecture.items():
        if variant not in (PARENT, NO_OP):
            load_weights(getattr(family_layers[layer], parent.family.subblock(subblock).module), *weights_of(layer, subblock, variant))
    child.generation_config = parent.model.generation_config
    return child.eval()


def save_child(child: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write a checkpoint that loads without this project, whole or not at all."""
    with atomic(path) as part:
        child.save_pretrained(part)
        tokenizer.save_pretrained(part)


def load_child(path: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is missing: run the stage that writes it, or `dvc pull {path}`")
    with _damage_named(path):
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=True).eval().to(device)


_RELOAD = """
import importlib.util, sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
assert importlib.util.find_spec("puzzle_core") is None, "this process can import the project"
checkpoint, batch, device, dtype = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, dtype=dtype).eval().to(device)
expected = load_file(batch, device=device)
with torch.no_grad():
    print((model(input_ids=expected["input_ids"]).logits - expected["logits"]).abs().max().item())
"""


@torch.no_grad()
def verify_reload(child: PreTrainedModel, path: Path, input_ids: Tensor) -> None:
    """Load the checkpoint in a process that cannot import this project; ValueError unless its logits are the child's."""
    with tempfile.TemporaryDirectory() as directory:
        batch = Path(directory) / "batch.safetensors"
        save_file({"input_ids": input_ids, "logits": child(input_ids=input_ids, use_cache=False).logits}, batch)
        command = [sys.executable, "-I", "-c", _RELOAD, path.resolve(), batch, child.device, str(child.dtype).removeprefix("torch.")]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=directory)
    if done.returncode or not float(done.stdout.split()[-1]) <= 1e-3:  # so that NaN fails too
        raise ValueError(f"{path} does not load as the child it was saved from: {done.stdout}{done.stderr[-2000:]}")
