"""The learning rate over a run, of BLD and GKD alike."""
import math


def lr_factor(step: int, num_steps: int, warmup_fraction: float) -> float:
    """Factor in 0..1 of the peak learning rate: linear warm-up, then half a cosine down to 0."""
    warmup = max(1, round(warmup_fraction * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))
