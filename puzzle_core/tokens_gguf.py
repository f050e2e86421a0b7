"""A tokenizer as GGUF fields, and how one from there splits text: byte-level BPE, whose splitting llama.cpp knows by name."""
import json
from pathlib import Path

import gguf
from transformers import AutoTokenizer

from puzzle_core.errors import UserError

_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + _WORD + r"|{}" + _REST

# How a tokenizer.json splits text before BPE: what llama.cpp calls it, and whether it then ignores merges for whole words.
PRE_TOKENIZERS = {
    (("ByteLevel", True),): ("gpt-2", False),
    (("Digits", True), ("ByteLevel", True)): ("smollm", False),
    (("Split", _SPLIT.replace("{}", r"\p{N}")), ("ByteLevel", False)): ("qwen2", False),
    (("Split", _SPLIT.replace("{}", r"\p{N}{1,3}")), ("ByteLevel", False)): ("llama-bpe", True),
}
_ARGUMENT = {"ByteLevel": lambda step: step["use_regex"], "Digits": lambda step: step["individual_digits"],
             "Split": lambda step: step["pattern"].get("Regex")}  # fmt: skip


def pre_tokenizer(content: dict) -> str:
    """llama.cpp's name for how a tokenizer.json's `content` splits text; ValueError if it has none."""
    model, pre = content["model"], content["pre_tokenizer"] or {"type": None}
    steps = pre.get("pretokenizers", [pre])
    key = tuple((step["type"], _ARGUMENT.get(step["type"], lambda _: None)(step)) for step in steps)
    name, ignores_merges = PRE_TOKENIZERS.get(key, (None, None))
    prefixed = any(step.get("add_prefix_space") for step in steps)
    normalised = content["normalizer"] is not None and content["normalizer"]["type"] != "NFC"
    if model["type"] != "BPE" or model.get("byte_fallback") or name is None or prefixed or normalised or not model["merges"]:
        raise UserError(
            f"the tokenizer cannot be written to GGUF: it is {model['type']} with {len(model.get('merges', []))} merges, pre-tokenizer "
            f"{list(key)}, normalizer {content['normalizer']}. What can: byte-level BPE with merges and one of the pre-tokenizers "
            f"{', '.join(known for known, _ in PRE_TOKENIZERS.values())}."
        )
    if bool(model.get("ignore_merges")) != ignores_merges:
        raise UserError(f"the tokenizer cannot be written to GGUF: llama.cpp's {name} has ignore_merges {ignores_merges}, this one not")
    return name


_STEP = {
    "ByteLevel": lambda use_regex: {"add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex},
    "Digits": lambda individual_digits: {"individual_digits": individual_digits},
    "Split": lambda regex: {"pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
}


def split_as_in(file: Path, content: dict) -> None:
    """Let `content`, the tokenizer.json that transformers made of a GGUF file, split text as that file says.

    transformers takes splitters that it does not know for gpt-2's, without a word; ValueError where we do not know them either.
    """
    fields = gguf.GGUFReader(file).fields
    model, name = (fields[key].contents() if key in fields else None for key in ("tokenizer.ggml.model", "tokenizer.ggml.pre"))
    by_name = {known: (steps, ignores_merges) for steps, (known, ignores_merges) in PRE_TOKENIZERS.items()}
    if name in by_name:
        steps, content["model"]["ignore_merges"] = by_name[name]
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": kind, **_STEP[kind](how)} for kind, how in steps]}
    elif model == "gpt2" and content["pre_tokenizer"]["type"] == "ByteLevel":  # others have been told apart, or split nothing
        raise UserError(
            f"{file}: its tokenizer splits text as llama.cpp's '{name}' does, which is not known here; known: {', '.join(by_name)}. "
            "Use the original checkpoint as the parent: conf/parent/hub.yaml or directory.yaml."
        )


def add_tokenizer(writer: gguf.GGUFWriter, checkpoint: Path, vocab_size: int) -> None:
    """Tokens, their kinds, merges, special ids and chat template; ids without a token are marked unused."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)  # else it asks whether to run a child's code
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    name = pre_tokenizer(content)
    token_of = {index: text for text, index in content["model"]["vocab"].items()}
    kind_of = dict.fromkeys(token_of, gguf.TokenType.NORMAL)
    for added in content["added_tokens"]:
        token_of[added["id"]] = added["content"]
        kind_of[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    if max(token_of) >= vocab_size:
        raise UserError(f"{checkpoint}: the tokenizer has token {max(token_of)}, the model only {vocab_size} embeddings")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list([token_of.get(index, f"[PAD{index}]") for index in range(vocab_size)])
    writer.add_token_types([kind_of.get(index, gguf.TokenType.UNUSED) for index in range(vocab_size)])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]])
    for special in ("bos", "eos", "unk", "pad"):
        if (index := getattr(tokenizer, f"{special}_token_id")) is not None:
            getattr(writer, f"add_{special}_token_id")(index)
    added_by_itself = tokenizer("").input_ids
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and added_by_itself[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and added_by_itself[-1:] == [tokenizer.eos_token_id])
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
