"""Parents in: load a causal LM from the hub, a folder, a GGUF file or from nothing, with what its family needs."""
import contextlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file

from puzzle_core import import_gguf, layouts
from puzzle_core.errors import UserError
from puzzle_core.families import Family, family_for, family_of
from puzzle_core.files import atomic, cache_folder, digest, fingerprint, lock, read_json, write_json
from puzzle_core.modeling_puzzle import MODEL_TYPE, get_subblock
from puzzle_core.shards import Shards, layers_that_fit, load_shards
from puzzle_core.tokens_gguf import split_as_in

DEQUANTISATION = 3  # raised when what is made of a GGUF file changes: the caches of before are not read

# Else transformers answers a hub checkpoint without safetensors by asking a service to open a pull request there,
# and loads from that instead of the revision that was asked for.
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
if "PYTORCH_ALLOC_CONF" not in os.environ:  # else what is free of a GPU's memory lies in pieces too small
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is the first GPU where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise UserError(f"device is '{name}' (conf/hardware/ or conf/parent/); expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but torch sees no GPU here; use conf/hardware/cpu.yaml or auto.yaml")
    return torch.device(name)


@dataclass(frozen=True)
class Origin:
    """Where a parent came from, for its children's model cards."""

    name: str
    text: str  # Markdown; neither has a path of this machine
    license: str | None = None  # an identifier as the hub has them, e.g. apache-2.0; None: not known
    hub_id: str | None = None


@dataclass(frozen=True)
class Parent:
    """A loaded parent: the model in eval mode, its tokenizer, where its family keeps things, and which weights it has."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    family: Family
    identity: str  # hash of the config that chose it and of its content
    origin: Origin
    shards: Shards | None = None  # where layers are read from that are not in memory; None: all are

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.get_submodule(self.family.layers)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def module(self, layer: int, subblock: str) -> nn.Module:
        """The bare module of a subblock, without its norms."""
        return get_subblock(self.layers[layer], self.family.subblock(subblock).modules)

    def norms(self, layer: int, subblock: str) -> list[nn.Module]:
        return [getattr(self.layers[layer], name) for name in self.family.subblock(subblock).norms]

    def present(self, *layers: int) -> contextlib.AbstractContextManager:
        """While open, the weights of these layers are in memory, of a parent that is read layer by layer too.

        A layer's forward sees to that itself: this is for reading weights outside of it, and for many forwards at one reading.
        """
        return self.shards.present(*layers) if self.shards is not None else contextlib.nullcontext()


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, for parents that have no tokenizer of their own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<eos>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


# Files beside a checkpoint that no output depends on: texts and pictures for people, weights in forms that are never read
# (pickles, other frameworks'), an optimizer's state. All others count, whatever their name: config, safetensors, tokenizer, code.
_TOLD = (".md", ".rst", ".pdf", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".lock")
_NEVER_READ = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".tflite", ".gguf")
_NAMED = ("LICENSE", "NOTICE", "trainer_state.json")
_BELOW = (".py", ".jinja")  # what is read from folders within: code, chat templates


def _shards_of(folder: Path) -> set[str]:
    """The files of weights that an index names, which may lie in folders within; of an index that cannot be read loading tells."""
    try:
        return set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def checkpoint_digest(folder: Path) -> str:
    """Sixteen hex digits of names and bytes of all files in `folder` that make a model and its tokenizer what they are.

    Where it lies does not count, so a copy has the same. Files are read in parallel, and only if `files.digest` has not seen them.
    """
    files, shards = {}, _shards_of(folder)
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        hidden = any(part.startswith((".", "__pycache__")) for part in name.parts)
        ignored = name.suffix.lower() in _TOLD + _NEVER_READ or name.name.startswith(_NAMED)
        if not hidden and not ignored and (len(name.parts) == 1 or name.suffix in _BELOW or name.as_posix() in shards) and file.is_file():
            files[name.as_posix()] = file
    with ThreadPoolExecutor() as threads:
        return fingerprint(dict(zip(files, threads.map(digest, files.values()), strict=True)))


def _dequantised(file: Path, sha256: str | None) -> Path:
    """A folder with the GGUF's weights in float32, made once per content and kept in the user's cache."""
    found = digest(file)
    if sha256 and found != sha256:
        raise UserError(f"{file}: sha256 is {found}, expected {sha256}. The file is damaged or another one: fetch it again.")
    name = fingerprint(found, DEQUANTISATION)
    cache = cache_folder() / "parents" / name
    with lock(cache.parent, name, wait=True):  # several stages may want it at once
        if not cache.is_dir():
            _dequantise(file, cache)
    return cache


def _dequantise(file: Path, cache: Path) -> None:
    model = import_gguf.model_of(file)
    with faults_named(file, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    with atomic(cache) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        content = read_json(part / "tokenizer.json")
        split_as_in(file, content)
        write_json(part / "tokenizer.json", content)


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
def faults_named(place: object, what: str) -> Iterator[None]:
    """What transformers, safetensors and tokenizers say of damaged files, as an error of the user's; only their calls stand inside."""
    try:
        yield
    except (UserError, OSError, ImportError, MemoryError, torch.OutOfMemoryError, AssertionError):
        raise  # the files are not to blame, or it has been said
    except Exception as error:  # tokenizers and huggingface_hub have nothing more special
        damaged = "a damaged safetensors file" if isinstance(error, SafetensorError) else f"no {what} that can be read"
        text = " ".join(str(error).split())[:300]
        raise UserError(f"{place} holds {damaged} ({type(error).__name__}: {text}): mend it, or fetch or make it again") from error


def load_whole(place: str | Path, base: type = AutoModelForCausalLM, **how: object) -> PreTrainedModel:
    """`base`.from_pretrained, of safetensors with all the tensors of the model and no others; else UserError.

    transformers would give a tensor that is missing new random values at every load.
    """
    with faults_named(place, "weights"):
        model, info = base.from_pretrained(
            place, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **how
        )
    misshapen = {name: f"{name} {tuple(found)}, not {tuple(expected)}" for name, found, expected in info["mismatched_keys"]}
    constants = "|".join(family_for(model.config).constants) or r"(?!)"
    heads = model.get_input_embeddings(), model.get_output_embeddings()
    untied = getattr(model.config, "tie_word_embeddings", False) and heads[1] is not None and heads[0].weight is not heads[1].weight
    faults = {
        "lacks": sorted(info["missing_keys"] - misshapen.keys()),
        "has, beside what its config describes,": sorted(name for name in info["unexpected_keys"] if not re.search(constants, name)),
        "has in another shape than its config says": sorted(misshapen.values()),
        "has output embeddings of their own, while its config says": ["tie_word_embeddings: true"] if untied else [],
    }
    import_gguf.refuse_tensors(place, faults, _MEND)
    return model


_MEND = "Each stage would work with another model. Fetch or make the checkpoint again, or mend its config.json."


def _no_safetensors(place: str | Path, revision: str | None) -> UserError:
    folder, where = f"models/{Path(place).name}-safetensors", f"{str(place)!r}" + (f", revision={revision!r}" if revision else "")
    code = "; ".join(
        ["from transformers import AutoModelForCausalLM as M, AutoTokenizer as T"]
        + [f"{auto}.from_pretrained({where}).save_pretrained({folder!r})" for auto in "MT"]
    )
    return UserError(
        f"the parent {place} has no safetensors; pickled weights can run any code when they are loaded, so they are not read. "
        f'If you trust it, convert it once: python -c "{code}" and use conf/parent/directory.yaml with `path: {folder}`'
    )


@contextlib.contextmanager
def _pickles_refused(place: str | Path, revision: str | None) -> Iterator[None]:
    if isinstance(place, Path) and not any(place.glob("*.safetensors")) and any(place.glob("*.bin")):
        raise _no_safetensors(place, None)
    try:
        yield
    except OSError as error:
        if "cannot be loaded with `safetensors`" in str(error):  # transformers' answer for the hub
            raise _no_safetensors(place, revision) from error
        raise


# Keys by which configs say that layers differ in kind or size; transformers' own classes of the families here ignore them.
_LAYERS_DIFFER = ("block_configs", "layers_block_type", "hybrid_override_pattern", "ffn_multipliers", "qkv_multipliers")


def _config(place: str | Path, revision: str | None) -> dict:
    """The checkpoint's config.json; UserError that names what is no parent, before any weight is loaded."""
    with faults_named(place, "config.json"):
        config, _ = PreTrainedConfig.get_config_dict(place, revision=revision)
        if not isinstance(config, dict):
            raise UserError(f"{place}: config.json is not an object. Fetch or make the checkpoint again.")
    if config.get("per_layer_config") or str(config.get("model_type", "")).startswith(MODEL_TYPE):
        raise UserError(f"{place} is a child already: its layers differ (per_layer_config). Use a parent whose layers are alike.")
    differ = [key for key in _LAYERS_DIFFER if config.get(key)]
    differ += [key for key, value in config.items() if isinstance(value, list) and _is_size(key) and key not in differ]
    if differ:
        raise UserError(f"{place}: its layers differ ({', '.join(differ)} in config.json). Use a parent whose layers are alike.")
    if quantised := config.get("quantization_config"):
        how = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise UserError(f"{place} is quantised ({how}), and a variant is cut from plain weights. Use the original or a dequantised copy.")
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    if cached_file(place, "adapter_config.json", revision=revision, **quiet):
        raise UserError(f"{place} is an adapter, whose base model lies elsewhere. Merge it: peft's merge_and_unload, then save_pretrained.")
    return config


def _is_size(key: str) -> bool:
    return any(word in key for word in ("num_", "n_head", "_heads", "_size", "_dim", "n_inner"))


def _family(place: str | Path, config: dict, trust_remote_code: bool) -> Family:
    """What config.json says, before any code of the checkpoint's own runs."""
    model_type = config.get("model_type", "")
    if "auto_map" in config and model_type not in CONFIG_MAPPING and not trust_remote_code:
        raise UserError(
            f"{place} brings its own code for model type '{model_type}', which transformers does not know. "
            "Read that code; if you trust it, set `trust_remote_code: true` in the parent's preset in conf/parent/."
        )
    elsewhere = [name for name in map(str, (config.get("auto_map") or {}).values()) if "--" in name and name.split("--")[0] != str(place)]
    if elsewhere and trust_remote_code:
        raise UserError(f"{place}: its code is that of another repository, {elsewhere[0]}, and can change. Put it beside the weights.")
    return family_of(model_type)


def _license(place: str | Path, revision: str | None) -> str | None:
    """What the checkpoint's own model card says, if it has one that can be read."""
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = cached_file(place, "README.md", revision=revision, **quiet)
    return ModelCard.load(found, ignore_metadata_errors=True).data.license if found else None


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
    license: str | None = None,
    memory_gib: float | None = None,
    in_parts: bool = False,
    skeleton: bool = False,
) -> Parent:
    """Load a parent as its preset in conf/parent/ says.

    `source` is hub (`id`, `revision`), directory (`path`), gguf (`path`, or `path` inside an installed `package`;
    dequantised) or random (`config` of a transformers model, `seed`; byte tokenizer). Only safetensors are read.
    Weights that need more than `memory_gib` stay on disk layer by layer, if the caller can work with that (`in_parts`).
    A `skeleton` has no weights, whatever the device, and nothing of them in its identity: it is for planning, and reads only the config.
    Raises UserError for an unknown family, for tensors that are not the model's and for a budget that is too small,
    FileNotFoundError where the weights are not.
    """
    device, torch_dtype, shards = torch.device(device), getattr(torch, dtype, None), None
    for key, value, needed_by in (("id", id, ("hub",)), ("path", path, ("directory", "gguf")), ("config", config, ("random",))):
        if source in needed_by and not value:
            raise UserError(f"parent.{key} is not set, and source {source} needs it: see the presets in conf/parent/")
    if torch_dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"parent.dtype is '{dtype}'; expected float32, bfloat16 or float16")
    if source == "random":
        if memory_gib is not None and not skeleton:
            raise UserError("parent.memory_gib needs a checkpoint to read layers from; a random parent has none")
        family = family_of(config.get("model_type"))
        content, origin = "", Origin("random weights", "random weights, for tests", license)
        with faults_named("parent.config", "model"):
            if skeleton:
                model, shards = _skeleton(AutoConfig.for_model(**config), torch_dtype, family, memory_gib)
            else:
                model = _random_model(config, seed, torch_dtype).to(device)
        tokenizer = _byte_tokenizer()
    else:
        place, content, name, text = _located(source, path, package, sha256, id, revision, skeleton)
        more = {"revision": revision if source == "hub" else None, "trust_remote_code": trust_remote_code}
        family = _family(place, _config(place, more["revision"]), trust_remote_code)
        with faults_named(place, "config.json"):
            its_config = AutoConfig.from_pretrained(place, **more)
        if skeleton:
            model, shards = _skeleton(its_config, torch_dtype, family, memory_gib, trust_remote_code)
        else:
            with _pickles_refused(place, more["revision"]):
                model, shards = _read_model(place, its_config, torch_dtype, device, family, memory_gib, in_parts, more)
        with faults_named(place, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(place, **more)
        origin = Origin(name, text, license or _license(place, more["revision"]), id if source == "hub" else None)
    family = family_for(model.config)
    layouts.check(model, family)
    identity = fingerprint(source, dtype, trust_remote_code, id, config, seed, content)  # where it lies is no part of it
    return Parent(model.eval().requires_grad_(False), tokenizer, family, identity, origin, shards)


def _located(
    source: str, path: str | None, package: str | None, sha256: str | None, id: str | None, revision: str | None, skeleton: bool
) -> tuple[str | Path, str, str, str]:
    """Where transformers finds the parent, what tells its content apart from another's, its name and where it came from."""
    if source == "hub":
        if Path(id).exists():
            raise UserError(f"parent.id is {id}, which is a path of this machine; use conf/parent/directory.yaml with `path: {id}`")
        commit = Path(cached_file(id, "config.json", revision=revision)).parent.name  # the one behind the revision
        return id, commit, id, f"[{id}](https://huggingface.co/{id}) at revision {commit}"
    if source not in ("directory", "gguf"):
        raise UserError(f"unknown parent source '{source}'; known: hub, directory, gguf, random")
    file = _gguf_file(path, package) if source == "gguf" else Path(path)
    if not file.exists():
        raise FileNotFoundError(f"no parent at {file}: check `path` in its preset under conf/parent/")
    if source == "directory" and not file.is_dir():
        raise UserError(f"parent.path is {file}, which is a file; name its folder, or use conf/parent/gguf.yaml for a GGUF")
    if source == "directory":
        return file, "" if skeleton else checkpoint_digest(file), file.resolve().name, f"the local checkpoint `{file.resolve().name}`"
    place, where = _dequantised(file, sha256), f" of the Python package `{package}`" if package else ""
    return place, place.name, file.name, f"`{file.name}`{where}, *dequantised from GGUF*: not the original checkpoint"


def _skeleton(
    config: PreTrainedConfig, dtype: torch.dtype, family: Family, memory_gib: float | None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Shards | None]:
    """The model without weights, and how many of its layers there is room for if not for all."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    layouts.check_layers(model, family)
    max_layers = None if memory_gib is None else layers_that_fit(model, family.layers, memory_gib, in_parts=True)
    layers = model.get_submodule(family.layers)
    return model, None if max_layers is None else Shards(layers, family.layers, {}, max_layers, torch.device("meta"))


def _read_model(
    place: str | Path,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    family: Family,
    memory_gib: float | None,
    in_parts: bool,
    more: dict,
) -> tuple[PreTrainedModel, Shards | None]:
    """The model on `device`, and where to read its layers if it is not whole."""
    load = partial(load_whole, place, dtype=dtype, **more)
    if memory_gib is None:
        return load().to(device), None
    with faults_named(place, "config.json"), torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=more["trust_remote_code"])
    layouts.check_layers(skeleton, family)
    max_layers = layers_that_fit(skeleton, family.layers, memory_gib, in_parts)
    if max_layers is None:
        return load().to(device), None
    model, shards = load_shards(load, skeleton, family.layers, max_layers, device)
    import_gguf.refuse_tensors(place, {"has in another shape than its config says": shards.misshapen()}, _MEND)
    return model, shards
