"""Two claims of SAPO's appendix C, on the toy world: `python -m results.appendix` writes appendix.csv.

Eq. 14, E[ΔV | H ≥ q] > E[ΔV]: the mean jump of V after a token of high entropy, over the mean of all.
Eq. 17, tokens of low entropy carry little of the gradient: the norm of the gradient from those below the
quantile q of entropy, over the norm of the whole. Iterations 5 (the base model) and 10, one seed.
"""

import sys
import tempfile

import torch

import sapo
import train_small
from results import study
from results.studies import QUANTILES, setting

SEEDS, EVERY = range(1), 5


def jumps(entropy: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, quantile: float) -> float:
    """E[ΔV_t | H_t ≥ q] / E[ΔV_t] with ΔV_t = |V_t − V_t+1| (Eq. 12), over the tokens before each last."""
    inner = mask & ~sapo.ends_once(mask)
    change = (values - values.roll(-1, 1)).abs()[inner]
    return float(change[is_high(entropy, inner, quantile)[inner]].mean() / change.mean())


def is_high(entropy: torch.Tensor, mask: torch.Tensor, quantile: float) -> torch.Tensor:
    """The tokens whose entropy is in the upper 1 - quantile, bool (B, T)."""
    order = entropy[mask].argsort().argsort()
    return torch.zeros_like(mask).masked_scatter(mask, order >= quantile * len(order))


def gradient_share(policy, roll: train_small.Rollout, scored: train_small.Scored, credit: train_small.Credit,
                   quantile: float) -> float:
    """‖gradient from the tokens of low entropy‖ / ‖gradient from all‖ of Eq. 9. Where the ratio is 1 a
    token's score has the coefficient A_t / T, in a segment too (Eq. 13)."""
    high, norms = is_high(scored.entropy, roll.mask, quantile), []
    inputs = train_small.take(roll.inputs, roll.prompts)
    log_probs, _ = train_small.score(policy, inputs, roll.ids, roll.mask, 1.0)
    for advantages in (credit.advantages.masked_fill(high, 0.0), credit.advantages):
        ends = sapo.ends_every_token(roll.mask)
        loss, _ = sapo.policy_loss(log_probs, log_probs.detach(), advantages, ends, roll.mask)
        found = torch.autograd.grad(loss, [*policy.parameters()], retain_graph=True, allow_unused=True)
        norms.append(torch.stack([x.norm() for x in found if x is not None]).norm())
    return float(norms[0] / norms[1])


def measure(algo: str, seed: int) -> list[dict]:
    """Rows of a training: of each quantile, the jumps of its own critic and the share of its gradient."""
    options, rows = setting(algo, seed=seed, iterations=10, eval_every=10, eval_problems=8), []

    def watch(i, policy, critic, roll, scored, credit):
        if i % EVERY == 0:
            rows.extend(dict(algo=algo, seed=seed, iteration=i, quantile=q,
                             jump=round(jumps(scored.entropy, scored.values, roll.mask, q), 4),
                             gradient=round(gradient_share(policy, roll, scored, credit, q), 4))
                        for q in QUANTILES)

    with tempfile.TemporaryDirectory() as out:
        train_small.learn(train_small.prepare(train_small.Config(**options, out=out, patience=0)), watch)
    return rows


if __name__ == "__main__":
    found = [row for algo in ("ppo", "sapo") for seed in SEEDS for row in measure(algo, seed)]
    (study.HERE / "appendix.csv").write_text(study.as_csv(found), encoding="utf-8", newline="")
    print(f"{len(found)} rows", file=sys.stderr)
