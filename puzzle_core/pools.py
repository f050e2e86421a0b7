"""Which solution of a pool is kept: the one whose child is nearest to the parent, as assembled or after brief GKD.

What GKD mends differs from kind to kind of variant: a score, and the joint KL of an assembled child too, can rank children otherwise
than they are ranked after GKD. The KL at the first look during GKD ranks them nearly as the KL after it (docs/results/study.md).
"""
import hashlib
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from puzzle_core import evaluation, gkd, realised
from puzzle_core.children import make_child
from puzzle_core.corpus import Corpus
from puzzle_core.errors import NotFiniteError
from puzzle_core.files import fingerprint, read_json, write_json
from puzzle_core.parents import Parent
from puzzle_core.spec import NO_OP, Architecture, Solution, is_parent


def best_of(
    parent: Parent,
    pool: Sequence[Solution],
    weights_of: Callable,
    corpus: Corpus,
    settings: realised.Settings,
    healing: gkd.Settings | None = None,
    seed: int = 0,
    work: Path | None = None,
) -> tuple[Solution, list[dict[str, float | int | None]]]:
    """The solution whose child has the least KL, after `healing` if there is any, and a row for each: predicted, and what came of it.

    KL is measured on development text. Where there is no choice nothing is: `realised` of the row is None. The folder `work`,
    which healing needs, keeps what came of it, for a run that goes on. FloatingPointError where no child can be healed.
    """
    kls, healed, chosen = [None], [None] * len(pool), 0
    if len(pool) > 1:
        architectures, batches = [solution.architecture for solution in pool], settings.batches(corpus)
        kls = realised.joint_kl(parent, architectures, weights_of, batches, settings)
        if healing is not None:
            healed = healed_kls(parent, architectures, weights_of, corpus, batches, healing, seed, work)
        decisive = {n: kl for n, kl in enumerate(kls if healing is None else healed) if kl is not None}
        if not decisive:
            raise NotFiniteError("brief GKD of every child of the pool diverges: lower lr in realised.heal")
        chosen = min(decisive, key=decisive.get)
    rows = [
        {"solution": n + 1, "predicted": solution.score, "realised": kls[n], "healed": healed[n], "chosen": int(n == chosen)}
        for n, solution in enumerate(pool)
    ]
    return pool[chosen], rows


def healed_kls(
    parent: Parent,
    architectures: Sequence[Architecture],
    weights_of: Callable,
    corpus: Corpus,
    batches: list,
    healing: gkd.Settings,
    seed: int,
    work: Path,
) -> list[float | None]:
    """KL(parent ‖ child) over [B, T] `batches` of each architecture's child after `healing`; None where that diverges.

    One small file of `work` for each says what came of it: what is there is not done again, and other files are removed.
    """
    text = [hashlib.sha256(np.ascontiguousarray(batch).tobytes()).hexdigest() for batch in batches]
    common = (gkd.VERSION, healing.determining, seed, parent.identity, corpus.fingerprint, text)
    files = [work / f"{fingerprint(*common, one.to_json(), _weights(one, weights_of))}.json" for one in architectures]
    for stale in set(work.glob("*.json")) - set(files):
        stale.unlink()
    for architecture, file in zip(tqdm(architectures, desc="heal the pool", unit="child"), files, strict=True):
        if not file.exists():
            write_json(file, {"kl": healed_kl(parent, architecture, weights_of, corpus, batches, healing, seed)})
    return [read_json(file)["kl"] for file in files]


def healed_kl(
    parent: Parent, architecture: Architecture, weights_of: Callable, corpus: Corpus, batches: list, healing: gkd.Settings, seed: int
) -> float | None:
    """KL(parent ‖ child) over [B, T] `batches` after `healing`; None where that diverges."""
    child = make_child(parent, architecture, weights_of).float().requires_grad_(True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            gkd.heal(parent, child, corpus, healing, seed, Path(folder))
        kl = evaluation.compare(parent.model, child, batches)["child"]["kl"]
        return kl if math.isfinite(kl) else None
    except (FloatingPointError, OverflowError):  # the latter of a perplexity
        return None
    finally:
        torch.compiler.reset()  # the graphs of this child's layers: torch has room for a few hundred


def _weights(architecture: Architecture, weights_of: Callable) -> list[str]:
    """The fingerprints of the weights that the architecture's child is made of."""
    return [weights_of(*row)[1] for row in architecture.rows() if row[-1] != NO_OP and not is_parent(str(row[-1]))]


def choice(rows: list[dict]) -> str:
    """In words, which of `best_of`'s rows was chosen."""
    chosen = next(row for row in rows if row["chosen"])
    words = f"solution {chosen['solution']} of {len(rows)}"
    if len(rows) > 1:
        words += f", joint KL {chosen['realised']:.4g} (of the first {rows[0]['realised']:.4g})"
    if chosen["healed"] is not None:
        first = rows[0]["healed"]
        words += f", {chosen['healed']:.4g} after brief GKD (of the first {'none, it diverged' if first is None else f'{first:.4g}'})"
    return words
