"""What a child is, measured: quality against the parent on held-out text, speed and memory beside the parent in one run."""
import math

import pandas as pd
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from puzzle_core.costs import side_by_side
from puzzle_core.quality import Reference
from puzzle_core.spec import Scenario


@torch.no_grad()
def compare(parent: PreTrainedModel, child: PreTrainedModel, batches: list) -> dict[str, dict[str, float]]:
    """Per token of [B, T] token batches: KL(parent ‖ child) in nats, perplexity, share of equal top-1 predictions."""
    kl = agreed = loss = parent_loss = num_tokens = num_predicted = 0
    for batch in tqdm(batches, desc="compare with the parent", unit="batch"):
        ids = torch.as_tensor(batch, device=parent.device)
        of_parent, of_child = (model(input_ids=ids, use_cache=False).logits for model in (parent, child))
        reference = Reference(ids, of_parent)
        batch_kl, batch_loss = reference.compare(of_child)
        kl, loss, parent_loss = kl + batch_kl, loss + batch_loss, parent_loss + reference.lm_loss
        agreed += (of_parent.argmax(-1) == of_child.argmax(-1)).sum().item()
        num_tokens, num_predicted = num_tokens + ids.numel(), num_predicted + ids[:, 1:].numel()
    return {
        "parent": {"kl": 0.0, "perplexity": math.exp(parent_loss / num_predicted), "top1_agreement": 1.0},
        "child": {"kl": kl / num_tokens, "perplexity": math.exp(loss / num_predicted), "top1_agreement": agreed / num_tokens},
    }


def measure(
    parent: PreTrainedModel, child: PreTrainedModel, batches: list, scenario: Scenario, repeats: int
) -> dict[str, dict[str, float]]:
    """One row of metrics for the parent and one for the child, the same names as search's prediction has."""
    quality = compare(parent, child, batches)
    totals = side_by_side({"parent": parent, "child": child}, scenario, repeats, warmup=1)
    return {
        name: {**quality[name], "speedup": totals["parent"]["latency_ms"] / totals[name]["latency_ms"], **totals[name]}
        for name in quality
    }


def table(rows: dict[str, dict[str, float]]) -> str:
    """The rows as text, a column each; what a row does not know stays empty."""
    return pd.DataFrame(rows).to_string(float_format=lambda value: f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}", na_rep="")
