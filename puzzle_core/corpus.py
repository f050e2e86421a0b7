"""Text to deterministic packed token sequences, split by document three ways.

Variants and children learn from `train`. Whatever chooses looks at `development`: scores, BLD's losses, GKD's choice of
a state, a pool's joint KL. What is reported of a child is measured on `test`, which nothing was chosen by.
"""
import hashlib
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pyarrow import ArrowInvalid
from tqdm import tqdm

from puzzle_core.errors import UserError
from puzzle_core.files import fingerprint

_READERS = {".txt": None, ".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # None: the file is the document


class Document(NamedTuple):
    """A text and what the corpus says it is of: code, encyclopedia, a source; None where it says nothing."""

    text: str
    domain: str | None


def _local_files(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"no corpus at {path}: check `path` in its preset under conf/corpus/")
    if path.is_file() and path.suffix not in _READERS:
        raise UserError(f"{path} is no file of text that is read here; expected one ending in {', '.join(_READERS)}")
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in _READERS)
    if not files:
        raise FileNotFoundError(f"no text under {path}: expected files ending in {', '.join(_READERS)}")
    return files


def documents(
    source: str,
    text_column: str = "text",
    domain_column: str | None = None,
    path: str | None = None,
    id: str | None = None,
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    max_documents: int | None = None,
    **_shares: object,
) -> Iterator[Document]:
    """Every document of a corpus preset: `source` is files (`path`: a file or folder) or hub (`id`, `name`, `split`)."""
    from datasets import load_dataset  # slow to import, and not every user of this module loads text

    if source == "hub":
        try:
            stream = load_dataset(id, name, split=split, revision=revision, streaming=True)
        except ValueError as error:  # of a name or a split that the data set has not
            raise UserError(f"corpus {id}, name {name}, split {split}: {error}. Set them in conf/corpus/.") from error
        yield from _documents(stream.take(max_documents) if max_documents else stream, text_column, domain_column, id)
    elif source == "files":
        for file in _local_files(Path(path)):
            reader = _READERS[file.suffix]
            if not file.stat().st_size:
                raise UserError(f"{file} is empty: delete it, or put text into it")
            try:
                if reader is None:
                    yield from _documents([{text_column: file.read_text()}], text_column, domain_column, file)
                else:
                    rows = load_dataset(reader, data_files=str(file), split="train", streaming=True)
                    yield from _documents(rows, text_column, domain_column, file)
            except (OSError, RuntimeError, UnicodeDecodeError, ArrowInvalid) as error:
                raise UserError(f"{file} cannot be read as {reader or 'text'} ({error})") from error
    else:
        raise UserError(f"unknown corpus source '{source}'; known: files, hub")


def _documents(rows: Iterable[dict], text_column: str, domain_column: str | None, where: object) -> Iterator[Document]:
    for row in rows:
        for key, column in (("text_column", text_column), ("domain_column", domain_column)):
            if column is not None and column not in row:
                raise UserError(f"{where} has no column '{column}', only {', '.join(row)}: set `{key}` in conf/corpus/")
        if row[text_column] and not isinstance(row[text_column], str):
            kind = type(row[text_column]).__name__
            raise UserError(f"{where}: column '{text_column}' holds {kind}, not text: set `text_column` in conf/corpus/")
        if row[text_column]:
            yield Document(row[text_column], None if domain_column is None else str(row[domain_column]))


def _fractions(preset: dict) -> tuple[float, float]:
    """Shares of the documents that are held out: for development and for the test."""
    if "validation_fraction" in preset:
        raise UserError(
            "conf/corpus/: validation_fraction is no key any more, for text that chooses must not be text that is reported: "
            "set development_fraction and test_fraction"
        )
    shares = tuple(preset.get(f"{split}_fraction") for split in ("development", "test"))
    if not all(isinstance(share, int | float) and share > 0 for share in shares) or sum(shares) >= 1:
        raise UserError(
            f"conf/corpus/: development_fraction is {shares[0]} and test_fraction {shares[1]}; expected two shares of the documents, "
            "each more than 0, together less than 1"
        )
    return shares


def _split_of(text: str, development: float, test: float) -> str:
    """By content, so that a document stays on its side whatever else the corpus holds."""
    place = int.from_bytes(hashlib.sha256(b"split?" + text.encode()).digest()[:4]) / 2**32
    return "test" if place < test else "development" if place < test + development else "train"


def start_ids(tokenizer) -> list[int]:
    """What the tokenizer itself puts before every text: a BOS token, or nothing."""
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    starts = [at for at in range(len(whole) - len(bare) + 1) if whole[at : at + len(bare)] == bare]
    assert starts, f"the tokenizer makes {whole} of 'a' with special tokens and {bare} without"
    return whole[: starts[0]]


class Corpus:
    """The documents of one preset, held in memory once, cut into token sequences on demand."""

    def __init__(self, tokenizer, preset: dict):
        if tokenizer.eos_token_id is None:
            raise UserError("the parent's tokenizer has no EOS token, which ends every document: name one in tokenizer_config.json")
        self.tokenizer, self.start = tokenizer, start_ids(tokenizer)
        self.where = preset.get("path") or preset.get("id")
        self.name = preset.get("id") or Path(self.where).name  # no path of this machine
        self.splits: dict[str, list[Document]] = {"train": [], "development": [], "test": []}
        shares = _fractions(preset)
        digest = hashlib.sha256(fingerprint(*shares, self.start, tokenizer.eos_token_id).encode())
        for document in tqdm(documents(**preset), desc=f"read {self.where}", unit=" docs", leave=False):
            self.splits[_split_of(document.text, *shares)].append(document)
            digest.update(f"{len(document.text)}:{document.text}".encode())
        self.fingerprint = digest.hexdigest()[:16]

    @property
    def domains(self) -> list[str]:
        """What the preset's `domain_column` tells apart, by name; [] without one."""
        return sorted({d.domain for split in self.splits.values() for d in split if d.domain is not None})

    def sequences(self, split: str, num_tokens: int, seq_len: int, seed: str, domain: str | None = None) -> np.ndarray:
        """At least `num_tokens` tokens of `split` as [N, seq_len] int64, documents shuffled by `seed`, EOS after each.

        Of one `domain` alone, if named. Every row is full: no padding, a long document goes on in the next row. Every document and
        every row begins with what the tokenizer puts before a text. ValueError if the corpus is too small.
        """
        num_rows = -(-num_tokens // seq_len)
        texts = [document.text for document in self.splits[split] if domain in (None, document.domain)]
        random.Random(seed).shuffle(texts)
        pieces, have, need = [], 0, num_rows * seq_len
        for first in tqdm(range(0, len(texts), 64), desc=f"tokenize {split}", unit="×64 docs", leave=False):
            for ids in self.tokenizer(texts[first : first + 64], add_special_tokens=False)["input_ids"]:
                pieces.append(np.array([*self.start, *ids, self.tokenizer.eos_token_id], dtype=np.int64))
                have += len(pieces[-1])
            if have >= need:
                break
        if have < need:
            raise UserError(
                f"corpus {self.where} is too small: its {split} split has {have:,} tokens"
                f"{f' of {domain}' if domain else ''}, {need:,} are needed. "
                f"Lower the token budget in the presets of conf/, {'' if split == 'train' else f'raise {split}_fraction, '}or add text."
            )
        return _rows(pieces, num_rows, seq_len, self.start)

    def batches(self, split: str, num_tokens: int, seq_len: int, batch_size: int, seed: str, domain: str | None = None) -> list[np.ndarray]:
        """The same as a list of [batch_size, seq_len] arrays, rounded up to whole batches; [] for no tokens."""
        if not num_tokens:
            return []
        whole = -(-num_tokens // (seq_len * batch_size)) * seq_len * batch_size
        return list(self.sequences(split, whole, seq_len, seed, domain).reshape(-1, batch_size, seq_len))


def _rows(pieces: list[np.ndarray], num_rows: int, seq_len: int, start: list[int]) -> np.ndarray:
    """The documents `pieces`, each from `start` to EOS, one after the other in rows [N, seq_len].

    A row that goes on in a document begins with `start` too: a parent that was trained with a BOS token has not seen text without.
    """
    stream = np.concatenate(pieces)
    if not start:
        return stream[: num_rows * seq_len].reshape(num_rows, seq_len)
    begins = {0, *np.cumsum([len(piece) for piece in pieces]).tolist()}
    rows, at = np.empty((num_rows, seq_len), dtype=np.int64), 0
    for row in rows:
        own = 0 if at in begins else len(start)
        row[:own], row[own:] = start[:own], stream[at : at + seq_len - own]
        at += seq_len - own
    return rows
