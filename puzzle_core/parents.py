"""Parents in: load a causal LM from the hub, a folder, a GGUF file or from nothing, with what its family needs."""
import contextlib
import hashlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file

from puzzle_core.families import Family, family_for, family_of
from puzzle_core.files import atomic, fingerprint, lock
from puzzle_core.modeling_puzzle import get_subblock


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
        return get_subblock(self.layers[layer], self.family.subblock(subblock).modules)

    def norms(self, layer: int, subblock: str) -> list[nn.Module]:
        return [getattr(self.layers[layer], name) for name in self.family.subblock(subblock).norms]


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


@contextlib.contextmanager
def damage_named(place: object) -> Iterator[None]:
    try:
        yield
    except safetensors.SafetensorError as error:
        raise ValueError(f"{place} holds a damaged safetensors file ({error}): fetch or make it again") from error


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
        with damage_named(place):
            model = AutoModelForCausalLM.from_pretrained(place, dtype=torch_dtype, use_safetensors=True, **more)
        if source == "hub":
            content = Path(cached_file(place, "config.json", revision=revision)).parent.name  # the commit behind the revision
        tokenizer = AutoTokenizer.from_pretrained(place, **more)
    else:
        raise ValueError(f"unknown parent source '{source}'; known: hub, directory, gguf, random")
    identity = fingerprint(source, dtype, path, package, id, revision, config, seed, content)
    model = model.eval().requires_grad_(False).to(device)
    return Parent(model, tokenizer, family_for(model.config), identity)
