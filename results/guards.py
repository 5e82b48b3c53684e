"""What keeps an update near the policy that sampled: clips other than Eq. 9's, for the study `clip`.

A segment's ratio is the geometric mean of its tokens' (Eq. 8). In a segment of L tokens, one of which decides
while the others are nearly certain, that token's ratio may reach (1 + ε)^L before Eq. 9's clip binds: the
same ε is a wider trust region than a token's. In order: the guards, the objective, its place in a run.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import sapo
import train_small
from support.run_folder import expect

GUARDS = {
    "length": "the clip of a segment of L tokens is 1 ± ε / L",
    "dual": "where A < 0 the objective is at least 3 A (dual clip, arXiv 1912.09729; the official code)",
    "within 5": "advantages are whitened, then clamped to ±5 (the official code)",
}


def objective(guard: str, config: train_small.Config, log_probs: Tensor, scored: train_small.Scored,
              credit: train_small.Credit, mask: Tensor) -> tuple[Tensor, dict, float]:
    """Eq. 9 with a guard ("": none), (); its metrics; and the largest |log ratio| of a token whose segment's
    clip does not bind: how far one token has moved unseen."""
    mask, advantages = mask > 0, credit.advantages
    _, metrics = sapo.policy_loss(log_probs.detach(), scored.log_probs, advantages, credit.ends, mask,
                                  config.clip_low, config.clip_high)
    if guard == "within 5":
        advantages = advantages.clamp(-5, 5)
    ratio, log_ratio = sapo._ratios(log_probs, scored.log_probs, credit.ends, mask)  # Eq. 8, (B, T)
    slots, length = sapo._segments(credit.ends, mask, mask.float())  # (B, T), (B, M)
    length = length.clamp(min=1).gather(1, slots) if guard == "length" else torch.ones_like(ratio)  # (B, T)
    clipped = ratio.clamp(1 - config.clip_low / length, 1 + config.clip_high / length) * advantages
    kept = torch.minimum(ratio * advantages, clipped)  # (B, T)
    binds = clipped < ratio * advantages
    if guard == "dual":
        floor = 3 * advantages
        binds |= (advantages < 0) & (kept < floor)
        kept = torch.where(advantages < 0, torch.maximum(kept, floor), kept)
    metrics["clip_fraction"] = sapo._mean(binds, mask)
    free = log_ratio.detach().abs().masked_fill(binds | ~mask, 0.0)  # (B, T)
    return -sapo._mean(kept, mask), metrics, float(free.max())


@contextmanager
def guarded(guard: str) -> Iterator[list[float]]:
    """Within it train_small.py's runs with a critic have this guard. -> the largest |log ratio| of a token of
    each micro-batch so far, as in `objective`."""
    expect(not guard or guard in GUARDS, "guard", guard, f"one of {', '.join(GUARDS)}")
    found, before = [], train_small.policy_objective

    def its(config, *given):
        if not config.critic:
            return before(config, *given)
        loss, metrics, largest = objective(guard, config, *given)
        found.append(largest)
        return (loss, metrics) if guard else before(config, *given)  # a run is train_small.py's own

    train_small.policy_objective = its
    try:
        yield found
    finally:
        train_small.policy_objective = before
