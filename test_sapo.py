"""Every function against a slow oracle, and the 23 ways such code goes wrong: `python -m pytest -q test_sapo.py`.

In four parts: sapo.py, srpo.py, toy_env.py, train_small.py with tiny_vlm/. An oracle is a loop written from the equation,
an enumeration, or a derivative taken by hand; never the code's own output.
"""

import copy
import dataclasses
import doctest
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import runpy
import statistics
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import transformers
from PIL import Image

import sapo
import srpo
import toy_env
import train_small
from results import credit, study
from tiny_vlm import make

# ==========================================================================================================
# sapo.py against slow loops, in plain Python, written from the equations of the paper.

NAN, INF = math.nan, math.inf


# ---------------------------------------------------------------------------------------- data and slow loops

def batch(B=7, T=13, seed=0, shortest=1):
    """Random ragged input, always with lengths `shortest` and T; entropies have ties, padding holds zeros."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.cat([torch.tensor([shortest, T]), torch.randint(shortest, T + 1, (B - 2,), generator=g)])
    mask = torch.arange(T) < lengths[:, None]
    rand = lambda: torch.rand(B, T, generator=g) * mask
    d = SimpleNamespace(mask=mask, entropy=(rand() * 9).round() / 9, values=rand(), old_values=rand(),
                        rewards=rand(), returns=rand(), advantages=(rand() - 0.5) * mask,
                        scores=rand().sum(1), token_ids=(rand() * 5).long(),
                        old_log_probs=-rand(), ref_log_probs=-rand())
    d.log_probs = (d.old_log_probs + 0.8 * (rand() - 0.5)) * mask
    d.ends = (rand() > 0.6) | (torch.arange(T) == lengths[:, None] - 1)
    return d


@pytest.fixture
def d():
    return batch()


@pytest.fixture(params=["random", "every token", "once", "entropy"])
def ends(request, d):
    return {"random": d.ends, "every token": sapo.ends_every_token(d.mask), "once": sapo.ends_once(d.mask),
            "entropy": sapo.ends_by_entropy(d.entropy, d.mask)}[request.param]


def rows(mask, *tensors):
    """For each response: its tokens in each tensor, as lists of plain Python numbers."""
    lists = [[row[:n].tolist() for row, n in zip(x.detach(), mask.sum(1).tolist())] for x in tensors]
    return list(zip(*lists)) if len(lists) > 1 else lists[0]


def pad(lists, fill=0.0):
    return torch.tensor([[*x, *[fill] * (max(map(len, lists)) - len(x))] for x in lists])


def mean(xs):
    return sum(xs) / len(xs)


def cut(ends):
    """Eq. 5: first and last token (b, e) of every segment of one response."""
    last = [t for t, end in enumerate(ends) if end]
    return list(zip([0] + [e + 1 for e in last[:-1]], last))


def spread(per_segment, ends):
    return [x for x, (b, e) in zip(per_segment, cut(ends)) for _ in range(b, e + 1)]


def slow_ends(entropy, percent):
    """Section 4.2: the ceil(k T / 100) most uncertain tokens, earlier first among equals, and the last."""
    n = len(entropy)
    k = max(1, math.ceil(Fraction(str(percent)) * n / 100))
    top = set(sorted(range(n), key=lambda t: (-entropy[t], t))[:k])
    return [t in top or t == n - 1 for t in range(n)]


def slow_gae(rewards, values, ends, gamma, lam, at="start"):
    """Eq. 6-7 for one response: advantage, delta and V of each segment."""
    V = [values[b if at == "start" else e] for b, e in cut(ends)] + [0.0]
    delta = [sum(rewards[b:e + 1]) + gamma * V[m + 1] - V[m] for m, (b, e) in enumerate(cut(ends))]
    A = delta + [0.0]
    for m in reversed(range(len(delta))):
        A[m] = delta[m] + gamma * lam * A[m + 1]
    return A[:-1], delta, V[:-1]


def slow_ratio(new, old, ends):
    """Eq. 8 for one response, on each of its tokens."""
    return spread([math.exp(mean([new[t] - old[t] for t in range(b, e + 1)])) for b, e in cut(ends)], ends)


def slow_loss(log_probs, old, advantages, ends, mask, low, high):
    """Eq. 8-9 in fp64: a loop over responses and segments that autograd can follow."""
    loss = 0.0
    for response, row in zip(zip(log_probs, old, advantages), rows(mask, ends), strict=True):
        sizes = [e - b + 1 for b, e in cut(row)]
        for new, q, A in zip(*(x[:len(row)].double().split(sizes) for x in response)):
            s = (new - q).mean().exp()
            objective = torch.minimum(s * A, s.clamp(1 - low, 1 + high) * A).sum()
            loss = loss - objective / len(row) / len(ends)
    return loss


def grad(f, x):
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


def same(a, b, tol=2e-5):
    torch.testing.assert_close(a, b.to(a.dtype), rtol=tol, atol=tol)


# ----------------------------------------------------------------------------------------- where segments end

@pytest.mark.parametrize("shape", [(2, 5, 7), (2, 70, 3), (1, 1, 1)])     # 70 tokens: more than 32 pieces
def test_eq11_token_entropy_matches_sum(shape):
    logits = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    logits[0, 0, 0] = 50.0                                                # nearly certain: p log p -> 0
    weights = [[[math.exp(x - 50) for x in token] for token in row] for row in logits.tolist()]
    want = [[-sum(w / sum(ws) * math.log(w / sum(ws)) for w in ws) for ws in row] for row in weights]
    same(sapo.token_entropy(logits), torch.tensor(want), 2e-6)


def test_eq11_token_entropy_in_fp32_with_banned_tokens_and_padding():
    logits = torch.randn(2, 3, 5).bfloat16()
    want = sapo.token_entropy(logits.float())
    assert torch.equal(sapo.token_entropy(logits), want)                  # bf16 is computed in fp32
    same(sapo.token_entropy(torch.cat([logits, torch.full((2, 3, 4), -INF)], 2)), want)  # pitfall 19
    assert torch.equal(sapo.token_entropy(torch.cat([logits, torch.full((2, 1, 5), NAN)], 1))[:, :3], want)


@pytest.mark.parametrize("percent", [1e-7, 0.5, 7, 30, 33.3, 99, 100])
def test_sec42_ends_by_entropy_matches_loop(percent):                     # with ties
    for d in (batch(T=25, seed=seed) for seed in range(4)):
        got = sapo.ends_by_entropy(d.entropy, d.mask, percent)
        assert torch.equal(got, pad([slow_ends(row, percent) for row in rows(d.mask, d.entropy)], False))


@pytest.mark.parametrize("percent", [0.1, 0.5, 1.1, 7, 28, 29, 30, 55, 57, 100])
def test_sec42_top_percent_is_rounded_up_exactly(percent):                # pitfall 21
    mask = torch.arange(2000) < torch.arange(100, 2001, 100)[:, None]
    entropy = torch.arange(2000.0).expand(20, -1)                         # rising: the last is in the top
    want = [max(1, math.ceil(Fraction(str(percent)) * n / 100)) for n in range(100, 2001, 100)]
    assert sapo.ends_by_entropy(entropy, mask, percent).sum(1).tolist() == want


def test_table3_ends_by_token_matches_loop(d):
    want = [[x in (2, 4) for x in row[:-1]] + [True] for row in rows(d.mask, d.token_ids)]
    assert torch.equal(sapo.ends_by_token(d.token_ids, d.mask, [2, 4]), pad(want, False))
    assert torch.equal(sapo.ends_by_token(d.token_ids, d.mask, torch.tensor([])), sapo.ends_once(d.mask))


@pytest.mark.parametrize("below, every", [(0.9, 5), (0.6, 1), (0.5, 2)])
def test_table3_ends_by_probability_matches_loop(d, below, every):
    want = []
    for row in rows(d.mask, d.log_probs):
        low = [t for t, x in enumerate(row) if math.exp(x) < below]
        want.append([t in low[every - 1::every] or t == len(row) - 1 for t in range(len(row))])
    assert torch.equal(sapo.ends_by_probability(d.log_probs, d.mask, below, every), pad(want, False))


def test_eq5_segment_ids_match_loop(d, ends):
    want = pad([spread(range(sum(row)), row) for row in rows(d.mask, ends)], -1)
    assert torch.equal(sapo.segment_ids(ends, d.mask), want)
    assert torch.equal(sapo.segment_ids(ends, d.mask.float()), want)      # a mask of any dtype


# ------------------------------------------------------------------------------------------------- advantages

@pytest.mark.parametrize("at", ["start", "last"])
@pytest.mark.parametrize("gamma, lam, lam_returns", [(.9, .8, None), (1, .99, 1), (.7, 0, .6), (1, 1, 0)])
def test_eq6_eq7_segment_gae_matches_loop(d, ends, at, gamma, lam, lam_returns):  # pitfall 4: gamma, lam < 1
    A, R, value_mask = [], [], []
    for r, v, e in rows(d.mask, d.rewards, d.values, ends):
        advantage, delta, V = slow_gae(r, v, e, gamma, lam, at)
        eq7 = sum((gamma * lam) ** l * x for l, x in enumerate(delta))    # the sum, as the paper has it
        assert advantage[0] == pytest.approx(eq7)
        target, _, _ = slow_gae(r, v, e, gamma, lam if lam_returns is None else lam_returns, at)
        A.append(spread(advantage, e))
        R.append(spread([a + x for a, x in zip(target, V)], e))
        value_mask.append([t in [z[at == "last"] for z in cut(e)] for t in range(len(e))])
    got = sapo.segment_gae(d.rewards, d.values, ends, d.mask, gamma, lam, at, lam_returns)
    for x, want in zip(got, (pad(A), pad(R), pad(value_mask, False)), strict=True):
        same(x, want)


def test_table7_kl_rewards_match_loop(d):  # pitfall 16: the last response token
    got = sapo.kl_rewards(d.scores, d.log_probs, d.ref_log_probs, d.mask, kl_coef=0.3)
    want = [[-0.3 * (p - q) for p, q in zip(*row)] for row in rows(d.mask, d.log_probs, d.ref_log_probs)]
    for row, score in zip(want, d.scores.tolist()):
        row[-1] += score
    same(got, pad(want))


def test_whiten_matches_loop_and_once_is_enough(d):                       # pitfall 14
    flat = sum(rows(d.mask, 5 + 3 * d.advantages), [])
    std = mean([(x - mean(flat)) ** 2 for x in flat]) ** 0.5
    white = sapo.whiten(5 + 3 * d.advantages, d.mask)
    assert sum(rows(d.mask, white), []) == pytest.approx([(x - mean(flat)) / std for x in flat], abs=1e-5)
    assert not white[~d.mask].any()
    same(sapo.whiten(white, d.mask), white)
    assert sapo.whiten(torch.full((2, 9), 0.1), torch.ones(2, 9)).abs().max() < 1e-2  # no noise blown up


# --------------------------------------------------------------------------------------------- ratio and loss

def test_eq8_segment_ratio_matches_loop(d, ends):
    want = pad([slow_ratio(*row) for row in rows(d.mask, d.log_probs, d.old_log_probs, ends)], 1.0)
    same(sapo.segment_ratio(d.log_probs, d.old_log_probs, ends, d.mask), want)


def test_eq8_log_ratio_is_clamped_and_stays_finite():
    ones, once = torch.ones(1, 2), torch.tensor([[False, True]])
    for x in (50.0, -50.0):
        same(sapo.segment_ratio(x * ones, 0 * ones, once, ones), math.exp(math.copysign(20, x)) * ones)
    loss, metrics = sapo.policy_loss(200 * ones, 0 * ones, ones, once, ones)  # exp(200) overflows: pitfall 12
    assert loss == pytest.approx(-1.2) and all(math.isfinite(x) for x in metrics.values())
    assert metrics["kl_k1"] == -200                                       # no clamp hides a large KL


def test_eq8_one_segment_is_the_gspo_ratio(d):                            # pitfall 17
    ratio = sapo.segment_ratio(d.log_probs, d.old_log_probs, sapo.ends_once(d.mask), d.mask)
    for got, new, old in rows(d.mask, ratio, d.log_probs, d.old_log_probs):
        gspo = (math.exp(sum(new)) / math.exp(sum(old))) ** (1 / len(new))  # sequence ratio ^ (1 / length)
        assert got == pytest.approx([gspo] * len(new), rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_eq21_eq26_bias_of_the_ratio_is_bounded(seed):
    d = batch(seed=seed)
    ratio = sapo.segment_ratio(d.log_probs, d.old_log_probs, d.ends, d.mask)
    for r, new, old, e in rows(d.mask, ratio, d.log_probs, d.old_log_probs, d.ends):
        for b, last in cut(e):
            L, total = last - b + 1, sum(new[b:last + 1]) - sum(old[b:last + 1])
            bound = math.exp(abs(total)) * (L - 1) * abs(total / L)
            assert abs(math.exp(total) - r[b]) <= bound + 1e-5            # R_m = e^{L mu} against e^{mu}


@pytest.mark.parametrize("low, high", [(0.2, 0.28), (0.05, 0.02), (1.0, INF)])
def test_eq9_policy_loss_and_its_gradient_match_loop(d, ends, low, high):
    rest = d.old_log_probs, d.advantages, ends, d.mask
    same(sapo.policy_loss(d.log_probs, *rest, low, high)[0], slow_loss(d.log_probs, *rest, low, high), 1e-6)
    same(grad(lambda x: sapo.policy_loss(x, *rest, low, high)[0], d.log_probs),
         grad(lambda x: slow_loss(x, *rest, low, high), d.log_probs), 1e-6)


def test_eq13_gradient_without_clip(d, ends):
    A, _, _ = sapo.segment_gae(d.rewards, d.values, ends, d.mask, 0.9, 0.8)
    got = grad(lambda x: sapo.policy_loss(x, d.old_log_probs, A, ends, d.mask, 1.0, INF)[0], d.log_probs)
    want = [[-s * a / len(e) / len(A) for s, a in zip(slow_ratio(new, old, e), advantage)]
            for new, old, advantage, e in rows(d.mask, d.log_probs, d.old_log_probs, A, ends)]
    same(got, pad(want), 1e-6)


def test_eq9_one_token_segments_are_token_ppo(d):                         # pitfall 17
    ends, want = sapo.ends_every_token(d.mask), []
    assert ends.data_ptr() != d.mask.data_ptr()                           # a copy, free to be changed
    A, _, _ = sapo.segment_gae(d.rewards, d.values, ends, d.mask, 0.95, 0.9)
    for new, old, r, v in rows(d.mask, d.log_probs, d.old_log_probs, d.rewards, d.values):
        gae, v, objective = 0.0, [*v, 0.0], []
        for t in reversed(range(len(r))):                                 # the usual token GAE and PPO loss
            gae = r[t] + 0.95 * v[t + 1] - v[t] + 0.95 * 0.9 * gae
            ratio = math.exp(new[t] - old[t])
            objective.append(min(ratio * gae, min(max(ratio, 0.8), 1.2) * gae))
        want.append(-mean(objective))
    loss, _ = sapo.policy_loss(d.log_probs, d.old_log_probs, A, ends, d.mask)
    assert loss == pytest.approx(mean(want), rel=1e-5)


def test_eq9_metrics_match_loop(d):
    _, got = sapo.policy_loss(d.log_probs, d.old_log_probs, d.advantages, d.ends, d.mask, 0.1, 0.05)
    clip, k1, k3, deviation = [], [], [], []
    for new, old, a, e in rows(d.mask, d.log_probs, d.old_log_probs, d.advantages, d.ends):
        s = slow_ratio(new, old, e)
        clip.append(mean([r > 1.05 if x > 0 else r < 0.9 for r, x in zip(s, a)]))
        k1.append(mean([q - p for p, q in zip(new, old)]))
        k3.append(mean([math.exp(p - q) - 1 - (p - q) for p, q in zip(new, old)]))
        deviation.append([abs(r - 1) for r in s])
    want = {"clip_fraction": mean(clip), "kl_k1": mean(k1), "kl_k3": mean(k3),
            "max_ratio_deviation": max(map(max, deviation)),
            "mean_ratio_deviation": mean([mean(x) for x in deviation])}
    assert 0 < mean(clip) < 1 and {k: x.item() for k, x in got.items()} == pytest.approx(want, abs=1e-6)


def test_eq9_first_update_has_ratio_one_and_zero_metrics(d):              # pitfall 1
    x = d.log_probs.clone().requires_grad_()
    loss, metrics = sapo.policy_loss(x, x, d.advantages, d.ends, d.mask)  # its own old_log_probs: a constant
    assert len(metrics) == 5 and all(m.item() == 0 and not m.requires_grad for m in metrics.values())
    assert torch.autograd.grad(loss, x)[0].abs().sum() > 0                # pitfall 18


def test_kl_estimates_are_exact_on_a_three_token_vocabulary():            # pitfall 12
    old, new, expected, one = [0.2, 0.5, 0.3], [0.6, 0.1, 0.3], torch.zeros(3), torch.ones(1, 1)
    kl = sum(p * math.log(p / q) for p, q in zip(old, new))
    for p, q in zip(old, new):                                            # tokens are drawn from old
        log_p, log_q = math.log(p) * one, math.log(q) * one
        _, metrics = sapo.policy_loss(log_q, log_p, one, one.bool(), one)
        penalty = -sapo.kl_rewards(torch.zeros(1), log_p, log_q, one, kl_coef=1.0).sum()
        expected += p * torch.stack([metrics["kl_k1"], metrics["kl_k3"], penalty])
    same(expected, torch.full((3,), kl), 1e-6)


def test_eq9_eq10_gradient_is_the_same_for_one_and_many_micro_batches(d):  # pitfall 11
    def policy(x, z):
        return sapo.policy_loss(x[z], d.old_log_probs[z], d.advantages[z], d.ends[z], d.mask[z])[0]

    def value(x, z):
        return sapo.value_loss(x[z], d.returns[z], d.ends[z])

    parts = [slice(0, 1), slice(1, 4), slice(4, 7)]
    for loss, x in ((policy, d.log_probs), (value, d.values)):
        pieces = grad(lambda x: sum(loss(x, z) * (z.stop - z.start) / 7 for z in parts), x)
        same(grad(lambda x: loss(x, slice(0, 7)), x), pieces, 1e-6)


@pytest.mark.parametrize("clip", [None, 0.1, 0.3])
def test_eq10_value_loss_matches_loop(d, clip):
    value_mask = sapo.segment_gae(d.rewards, d.values, d.ends, d.mask)[2]
    old, want = None if clip is None else d.old_values, []
    for v, R, o, e in rows(d.mask, d.values, d.returns, d.old_values, d.ends):
        errors = [(v[b] - R[b]) ** 2 for b, _ in cut(e)]
        if clip is not None:
            near = [min(max(v[b], o[b] - clip), o[b] + clip) for b, _ in cut(e)]
            errors = [max(x, (n - R[b]) ** 2) for x, n, (b, _) in zip(errors, near, cut(e))]
        want.append(mean(errors))
    assert sapo.value_loss(d.values, d.returns, value_mask, old, clip) == pytest.approx(mean(want), rel=1e-5)
    moved = grad(lambda x: sapo.value_loss(x, d.returns, value_mask, old, clip), d.values) != 0
    assert moved.any() and not (moved & ~value_mask).any()                # only what was read is trained


def test_bf16_log_probs_are_computed_in_fp32(d):                          # pitfall 10
    new, old = d.log_probs.bfloat16(), d.old_log_probs.bfloat16()
    for f in (lambda p, q: sapo.segment_ratio(p, q, d.ends, d.mask),
              lambda p, q: sapo.policy_loss(p, q, d.advantages, d.ends, d.mask)[0],
              lambda p, q: sapo.kl_rewards(d.scores, p, q, d.mask, 0.1)):
        assert torch.equal(f(new, old), f(new.float(), old.float()))


def test_targets_are_constants(d):
    old, A, R, old_values, new, v = (getattr(d, name).requires_grad_() for name in (
        "old_log_probs", "advantages", "returns", "old_values", "log_probs", "values"))
    assert not any(x.requires_grad for x in sapo.segment_gae(d.rewards, v, d.ends, d.mask))
    assert not sapo.kl_rewards(d.scores, new, d.ref_log_probs, d.mask, 0.1).requires_grad
    assert not sapo.token_entropy(new[..., None]).requires_grad
    sapo.policy_loss(new, old, A, d.ends, d.mask)[0].backward()
    sapo.value_loss(v, R, d.ends, old_values, 0.2).backward()
    assert [x.grad is None for x in (old, A, R, old_values, new, v)] == [True] * 4 + [False] * 2


# ---------------------------------------------------------------------------------------- critic and evidence

class PositionBackbone(torch.nn.Module):
    """Hidden state: (position, sum of the ids seen so far), as a causal model would have it."""
    def forward(self, input_ids):
        position = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        return SimpleNamespace(last_hidden_state=torch.stack([position, input_ids.cumsum(1)], -1).bfloat16())


def test_critic_reads_the_state_before_each_token():                      # pitfall 2
    critic = sapo.SegmentCritic(PositionBackbone(), hidden_size=2)
    ids = torch.tensor([[0, 0, 1, 2, 4, 8], [0, 1, 2, 4, 8, 0]])          # 3 of prompt, 3 of response
    values = critic(response_length=3, input_ids=ids)
    assert values.dtype == torch.float32 and values.tolist() == [[0.0] * 3] * 2  # starts at zero
    critic.head.weight.data = torch.tensor([[1.0, 0.0]])
    assert critic(response_length=3, input_ids=ids).tolist() == [[2, 3, 4]] * 2
    critic.head.weight.data = torch.tensor([[0.0, 1.0]])
    assert critic(response_length=3, input_ids=ids).tolist() == [[1, 3, 7], [3, 7, 15]]
    critic.head.bias.data += 0.5
    assert critic.to(torch.bfloat16)(response_length=5, input_ids=ids).dtype == torch.float32
    with pytest.raises(ValueError, match="response_length is 6: expected 1 to 5"):
        critic(response_length=6, input_ids=ids)
    critic(response_length=3, input_ids=ids).sum().backward()
    assert critic.head.weight.grad.norm() > 0                             # pitfall 18


def test_eq12_lift_and_bootstrap_match_loop():
    d = batch(B=60, T=30)
    d.values = (d.entropy.roll(1, 1) > 0.6) * 0.4 + 0.1 * d.values        # uncertain tokens tend to move V
    H, V = rows(d.mask, d.entropy), rows(d.mask, d.values)
    jumps = [[abs(x - y) for x, y in zip(v, v[1:])] for v in V]

    def quantile(xs, q):                                                  # linear between two values
        i, part = divmod(q * (len(xs) - 1), 1)
        low, high = sorted(xs)[int(i):][:2]
        return low + part * (high - low) - 1e-6

    a, j = quantile(sum([h[:-1] for h in H], []), 0.7), quantile(sum(jumps, []), 0.8)
    pairs = [[(y >= a, z >= j) for y, z in zip(h, x)] for h, x in zip(H, jumps)]

    def lift(responses):                                                  # P(D | A) / P(D)
        tokens = sum(responses, [])
        return mean([D for A, D in tokens if A]) / mean([D for _, D in tokens])

    draws = random.Random(1)
    slow = sorted(lift(draws.choices(pairs, k=len(pairs))) for _ in range(500))
    got, low, high = sapo.lift(d.entropy, d.values, d.mask, 0.7, 0.8)
    assert got == pytest.approx(lift(pairs), rel=1e-6) and got > 1.2 and low < got < high
    assert (low, high) == pytest.approx((slow[12], slow[-13]), abs=0.25 * (high - low))
    assert (got, low, high) == sapo.lift(d.entropy, d.values, d.mask, 0.7, 0.8, seed=0)
    assert (low, high) != sapo.lift(d.entropy, d.values, d.mask, 0.7, 0.8, seed=1)[1:]


def test_eq12_lift_is_one_when_entropy_says_nothing():
    d = batch(B=300, T=30, seed=3)
    lift, low, high = sapo.lift(d.entropy, d.values, d.mask)
    assert low < 1 < high and high - low < 0.3


# ---------------------------------------------------------------------------------- padding, errors, the rest

def with_grad(f, x):
    return f(x).detach(), grad(f, x)


PADDING_CASES = {
    "ends_by_entropy": lambda d: [sapo.ends_by_entropy(d.entropy, d.mask)],
    "ends_by_token": lambda d: [sapo.ends_by_token(d.token_ids, d.mask, [2, 10**6])],
    "ends_by_probability": lambda d: [sapo.ends_by_probability(d.log_probs, d.mask, 0.6, 2)],
    "segment_gae": lambda d: sapo.segment_gae(d.rewards, d.values, d.ends, d.mask, 0.9, 0.8, lam_returns=0.5),
    "segment_gae last": lambda d: sapo.segment_gae(d.rewards, d.values, d.ends, d.mask, 0.9, 0.8, "last"),
    "kl_rewards": lambda d: [sapo.kl_rewards(d.scores, d.log_probs, d.ref_log_probs, d.mask, 0.1)],
    "whiten": lambda d: [sapo.whiten(d.advantages, d.mask)],
    "segment_ratio": lambda d: with_grad(
        lambda x: sapo.segment_ratio(x, d.old_log_probs, d.ends, d.mask).square().sum(), d.log_probs),
    "policy_loss": lambda d: [*with_grad(
        lambda x: sapo.policy_loss(x, d.old_log_probs, d.advantages, d.ends, d.mask)[0], d.log_probs),
        *sapo.policy_loss(d.log_probs, d.old_log_probs, d.advantages, d.ends, d.mask)[1].values()],
    "value_loss": lambda d: with_grad(
        lambda x: sapo.value_loss(x, d.returns, d.ends, d.old_values, 0.1), d.values),
    "lift": lambda d: [torch.tensor(sapo.lift(d.entropy, d.values, d.mask, 0.7, 0.7))],
}


@pytest.mark.parametrize("filler", [1e6, -1e6, NAN, INF])
@pytest.mark.parametrize("f", PADDING_CASES.values(), ids=PADDING_CASES)
def test_padding_changes_nothing(d, f, filler):                           # pitfalls 3 and 5
    dirty = {k: x.masked_fill(~d.mask, filler) for k, x in vars(d).items() if x.shape == d.mask.shape
             and x.is_floating_point()} | {"token_ids": d.token_ids.masked_fill(~d.mask, 10**6)}
    for clean, got in zip(f(d), f(SimpleNamespace(**{**vars(d), **dirty})), strict=True):
        assert clean.isfinite().all() and torch.equal(clean, got)


def call(name, **changes):
    """Call a function of sapo on good 2 x 3 input, with some arguments replaced."""
    x, mask = torch.zeros(2, 3), torch.tensor([[1, 1, 0], [1, 1, 1]])
    ends = torch.tensor([[False, True, False], [False, False, True]])
    good = dict(mask=mask, ends=ends, value_mask=ends, token_ids=x.long(), boundary_ids=[1], scores=x[:, 0],
                kl_coef=0.1, logits=x[..., None], entropy=x, log_probs=x, old_log_probs=x, ref_log_probs=x,
                advantages=x, rewards=x, values=x, returns=x, x=x)
    f = getattr(sapo, name)
    return f(**{k: v for k, v in good.items() if k in inspect.signature(f).parameters} | changes)


ZERO, WIDE = torch.zeros(2, 3), torch.zeros(2, 4)
ERRORS = [
    ("ends_once", dict(mask=torch.tensor([[1, 1], [0, 0]])), "mask row 1 has no response token"),
    ("ends_once", dict(mask=torch.tensor([[1, 1, 0], [1, 0, 1]])), "mask row 1 has a 1 after a 0"),
    ("ends_every_token", dict(mask=torch.tensor([[0, 1, 1]])), "mask row 0 has a 1 after a 0"),
    ("ends_every_token", dict(mask=torch.tensor([[1.0, 0.5]])), "mask holds a value other than 0 and 1"),
    ("ends_once", dict(mask=torch.ones(3)), r"mask has shape \(3,\)"),
    ("ends_once", dict(mask=torch.ones(0, 3)), r"mask has shape \(0, 3\)"),
    ("ends_by_entropy", dict(entropy=WIDE), r"entropy has shape \(2, 4\), mask \(2, 3\): expected the same"),
    ("ends_by_token", dict(token_ids=ZERO), "token_ids has dtype torch.float32: expected torch.int64"),
    ("ends_by_probability", dict(below=1.5), r"below is 1.5: expected a number in \[0, 1\]"),
    ("ends_by_probability", dict(every=0), "every is 0: expected"),
    ("segment_ids", dict(ends=torch.ones(2, 3)), "ends has dtype torch.float32: expected torch.bool"),
    ("segment_ids", dict(ends=torch.ones(2, 3).bool()), "ends row 0 marks padding"),
    ("segment_ratio", dict(ends=ZERO.bool()), "ends row 0 misses the last response token"),
    ("segment_ratio", dict(log_probs=ZERO.long()), "log_probs has dtype torch.int64: expected float"),
    ("segment_gae", dict(value_at="end"), "value_at is 'end': expected \"start\" or \"last\""),
    ("segment_gae", dict(gamma=1.1), r"gamma is 1.1: expected a number in \[0, 1\]"),
    ("segment_gae", dict(lam=-0.1), "lam is -0.1"),
    ("segment_gae", dict(lam_returns=NAN), "lam_returns is nan"),
    ("segment_gae", dict(values=WIDE), r"values has shape \(2, 4\), mask \(2, 3\)"),
    ("kl_rewards", dict(scores=torch.tensor([0.5, NAN])), r"scores is \[0.5, nan\]: expected 2 finite"),
    ("kl_rewards", dict(scores=torch.zeros(2, 3)), "scores is .*: expected 2 finite numbers"),
    ("kl_rewards", dict(kl_coef=-1.0), "kl_coef is -1.0"),
    ("policy_loss", dict(advantages=WIDE), r"advantages has shape \(2, 4\), mask \(2, 3\)"),
    ("policy_loss", dict(clip_low=2), "clip_low is 2"),
    ("policy_loss", dict(clip_high=-1), "clip_high is -1"),
    ("value_loss", dict(clip=0.1), "old_values is None and clip is 0.1: expected both or neither"),
    ("value_loss", dict(old_values=ZERO), "old_values is given and clip is None"),
    ("value_loss", dict(old_values=ZERO, clip=-1), "clip is -1"),
    ("value_loss", dict(value_mask=ZERO), "value_mask has dtype torch.float32: expected torch.bool"),
    ("value_loss", dict(value_mask=ZERO.bool()), "value_mask row 0 marks no token"),
    ("value_loss", dict(returns=WIDE), r"returns has shape \(2, 4\), value_mask \(2, 3\)"),
    ("whiten", dict(x=WIDE), "x has shape"), ("lift", dict(quantile=2), "quantile is 2"),
    ("lift", {k: torch.ones(2, 1) for k in ("entropy", "values", "mask")}, "mask has no response of two"),
    ("token_entropy", dict(logits=ZERO), r"logits has shape \(2, 3\): expected \(B, T, V\)"),
    ("token_entropy", dict(logits=ZERO[None].long()), "logits has dtype torch.int64: expected float"),
    *[("ends_by_entropy", dict(top_percent=k), f"top_percent is {k}: expected a") for k in (0, 101, NAN)],
]


@pytest.mark.parametrize("name, changes, message", ERRORS, ids=[f"{e[0]}-{e[2][:30]}" for e in ERRORS])
def test_bad_input_is_named(name, changes, message):                      # pitfalls 13, 21, 22
    call(name)                                                            # the rest of the input is good
    with pytest.raises(TypeError if "dtype" in message else ValueError, match=message):
        call(name, **changes)


def fast_chain(d, log_probs):
    ends = sapo.ends_by_entropy(d.entropy, d.mask)
    sapo.segment_ids(ends, d.mask)
    A, returns, value_mask = sapo.segment_gae(d.rewards, d.values, ends, d.mask)
    loss, _ = sapo.policy_loss(log_probs, d.old_log_probs, A, ends, d.mask)
    loss.backward()
    return loss.item(), A, returns, value_mask


def slow_chain(d, log_probs):
    ends = [slow_ends(row, 30) for row in rows(d.mask, d.entropy)]
    A = pad([spread(slow_gae(*row, e, 1.0, 0.99)[0], e)
             for row, e in zip(rows(d.mask, d.rewards, d.values), ends)])
    loss = slow_loss(log_probs, d.old_log_probs, A, pad(ends, False), d.mask, 0.2, 0.2)
    loss.backward()
    return loss.item(), A


def test_chain_equals_the_slow_loop_and_is_50_times_faster():
    def timed(chain):
        x, start = d.log_probs.clone().requires_grad_(), time.perf_counter()
        loss, A, *_ = chain(d, x)
        return time.perf_counter() - start, torch.tensor(loss), A, x.grad

    d = batch(48, 512, shortest=256)
    slow, fast = timed(slow_chain), min((timed(fast_chain) for _ in range(4)), key=lambda run: run[0])
    for got, want in zip(fast[1:], slow[1:]):
        same(got, want)
    assert slow[0] / fast[0] > 50


def peak_memory(f):
    """Peak of the CPU allocator while f runs, in bytes, over what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        f()
    sizes = [event.nbytes() for event in p.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(sizes))


def test_memory_is_at_most_twelve_tensors_and_a_fifth_of_the_logits():
    d, logits = batch(64, 1024, shortest=512), torch.zeros(2, 128, 3000)
    x = d.log_probs.clone().requires_grad_()
    assert peak_memory(lambda: torch.zeros(64, 1024)) == 64 * 1024 * 4    # the ruler measures
    assert peak_memory(lambda: fast_chain(d, x)) <= 12 * 64 * 1024 * 4    # results and gradient included
    assert peak_memory(lambda: sapo.token_entropy(logits)) < 0.2 * 4 * logits.numel()


def test_doctests_pass_and_every_public_function_has_one():
    results = doctest.testmod(sapo)
    assert results.failed == 0 and results.attempted >= 15
    public = [f for name, f in vars(sapo).items() if inspect.isfunction(f) and not name.startswith("_")]
    assert len(public) == 15 and [f.__name__ for f in public if ">>>" not in f.__doc__] == ["demo"]


def test_demo_prints_plain_text_and_colours_only_a_terminal(monkeypatch):
    run = subprocess.run([sys.executable, sapo.__file__], capture_output=True, encoding="utf-8", check=True,
                         env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert "\033" not in run.stdout and not run.stderr and max(map(len, run.stdout.splitlines())) <= 110
    slip = "3 0.20 4 0.72 -0.60 -0.72 0.00 0.72".split()                  # delta = 0.12 - 0.72
    assert slip in [line.split() for line in run.stdout.splitlines()]
    monkeypatch.setattr(sys, "stdout", terminal := io.StringIO())
    terminal.isatty = lambda: True
    sapo.demo()
    assert len({line[:5] for line in terminal.getvalue().splitlines() if line.startswith("\033")}) == 6


# ==========================================================================================================
# Tests of srpo.py. The oracles are loops over Python floats, enumeration, and derivatives taken by hand.

SRPO_JUNK = [0.0, 1e6, -1e6, float("nan")]                      # what may stand in slots nobody should read
SRPO_TAGS = dict(zip("P /P T /T A /A".split(), srpo.TAGS))


def srpo_normal(g, *shape):
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def srpo_case(seed, B=6, T=9):
    """Generator, prefix mask (B, T) with rows of 1, T and other lengths, disjoint roles, none in row 0."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([1, T] + torch.randint(1, T + 1, (B - 2,), generator=g).tolist())
    mask = (torch.arange(T) < lengths[:, None]).float()
    pick = torch.randint(0, 3, (B, T), generator=g) * mask * (torch.arange(B) > 0)[:, None]
    return g, mask, pick == 1, pick == 2


def srpo_loss_case(seed):
    g, mask, *_ = srpo_case(seed)
    return *(-1 + 0.4 * srpo_normal(g, *mask.shape) for _ in range(3)), srpo_normal(g, *mask.shape), mask


def test_srpo_group_advantages_match_a_loop_and_equal_rewards_give_zero():
    rewards = srpo_normal(torch.Generator().manual_seed(0), 12)
    for G in (2, 3, 4, 6, 12):
        want = []
        for group in (rewards[k:k + G].tolist() for k in range(0, 12, G)):
            mean = sum(group) / G
            std = math.sqrt(sum((r - mean) ** 2 for r in group) / (G - 1))
            want += [(r - mean) / (std + 1e-6) for r in group]
        assert srpo.group_advantages(rewards, G).tolist() == pytest.approx(want, abs=1e-12)
    A = srpo.group_advantages(torch.tensor([0.9] * 8 + [1.0] + [0.0] * 7 + [1e6 / 3] * 8 + [0.0] * 8), 8)
    assert A[:8].tolist() + A[16:].tolist() == [0.0] * 24 and A[8] > 1 and (A[9:16] < -0.3).all()
    A = srpo.group_advantages(torch.tensor([True, False]), 2)
    assert A.tolist() == pytest.approx([0.5 ** 0.5, -0.5 ** 0.5], 1e-5)


@pytest.mark.parametrize("texts, roles", [
    ("P a<b <x> /P T c /T A d /A", "-PP--R----"), ("P /P T /T A /A", "------"),
    (["\n", "P", "a", "/P", "\n\n", "T", "c", "/T", " ", "A", "d", "/A", "", "\n"], "--P---R-------"),
    (["<per", "ception>", "a", "</", "perception>\n<", "think>", "c", "</think><answer>", "/A"], "--P---R--"),
    (["<perception>a", "b", "c</perception>", "<think", ">d", "e", "f<", "/think>", "A", "/A"], "-P---R----"),
    (["P", "", "a", "", "/P", "T", "", "c", "/T", "A", "/A", ""], "--P----R----"),     # "": special tokens
    (["P", "<Think>", "\u00e9\ufffd", "/P", "T", "\n", "/T", "A", "/A"], "-PP--R---"),
    *[(bad, "-" * len(bad.split())) for bad in (    # missing, repeated, nested, out of order, text outside
        "P a /P T c /T A d", "P a /P T c /T", "a /P T c /T A d /A", "P a /P A d /A", "T c /T A d /A", "a b",
        "P a /P P a /P T c /T A d /A", "P a /P T c /T A d /A A d /A", "P a /P T c /T T c /T A d /A",
        "P P a /P T /T A /A", "P a /P T c /T A d /A P a /P", "P a /P T /T A d /A /A", "P a /P T /T A A d /A",
        "P a T c /T /P A d /A", "P a /P T c A d /A /T", "P a P b /P /P T c /T A d /A",
        "P a T /P c /T A d /A", "T c /T P a /P A d /A", "P a /P A d /A T c /T", "/P a P T c /T A d /A",
        "So P a /P T /T A d /A", "P a /P x T c /T A d /A", "P a /P T /T . A d /A", "P a /P T /T A d /A !")]])
def test_srpo_split_roles_table(texts, roles):
    texts = [SRPO_TAGS.get(x, x) for x in (texts.split() if isinstance(texts, str) else texts)]
    p, r = srpo.split_roles([texts], torch.ones(1, len(texts)))
    assert "".join("P" if a else "R" if b else "-" for a, b in zip(p[0], r[0])) == roles and not (p & r).any()


def test_srpo_split_roles_for_any_cut_and_ignores_padding():
    pieces = [("<perception>", "-"), ("a red\ncircle", "P"), ("</perception>\n<think>", "-"),
              ("so > red", "R"), ("</think><answer>red</answer>", "-")]
    text, labels = "".join(s for s, _ in pieces), "".join(c * len(s) for s, c in pieces)
    rng, rows, want = random.Random(0), [], []
    for _ in range(30):
        cuts = [0] + sorted(rng.sample(range(1, len(text)), rng.randint(5, 60))) + [len(text)]
        rows.append([text[a:b] for a, b in zip(cuts, cuts[1:])])
        want.append([labels[a] if len(set(labels[a:b])) == 1 else "-" for a, b in zip(cuts, cuts[1:])])
    width = max(map(len, rows)) + 2
    mask = torch.tensor([[float(t < len(row)) for t in range(width)] for row in rows])
    for texts in (rows, [row + ["<think>"] * (width - len(row)) for row in rows]):     # padding is not read
        for role, got in zip("PR", srpo.split_roles(texts, mask)):
            assert got.dtype == torch.bool
            assert got.tolist() == [[c == role for c in w] + [False] * (width - len(w)) for w in want]


def srpo_picture(mode="RGB", seed=1):                           # no black pixel, sides no multiple of 14
    pixels = random.Random(seed).choices(range(50, 200), k=6100 * len(mode))
    return Image.frombytes(mode, (100, 61), bytes(pixels))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("kind", ["patches", "noise", "blur", "blank"])
def test_srpo_corrupt_image_keeps_size_and_mode_and_the_original(kind, mode):
    image, before = srpo_picture(mode), srpo_picture(mode).tobytes()
    one, two, other = [srpo.corrupt_image(image, kind, seed=seed) for seed in (3, 3, 4)]
    assert (one.mode, one.size) == (mode, image.size) and one is not image and image.tobytes() == before
    assert one.tobytes() == two.tobytes() != before
    assert (one.tobytes() != other.tobytes()) == (kind in ("patches", "noise"))
    nothing = srpo.corrupt_image(image, kind, ratio=0)
    assert nothing is not image and (nothing.tobytes() == before) == (kind != "blank")


def test_srpo_corrupt_image_patches_blacken_whole_tiles():
    for mode, black in (("RGB", (0, 0, 0)), ("L", 0), ("RGBA", (0, 0, 0, 255))):
        assert srpo.corrupt_image(srpo_picture(mode), ratio=1).getcolors() == [(6100, black)]
    image, shares = srpo_picture(), []
    for seed in range(40):
        out, dark = srpo.corrupt_image(image, ratio=0.3, patch=14, seed=seed), []
        for x, y in ((x, y) for y in range(0, 61, 14) for x in range(0, 100, 14)):
            box = (x, y, min(x + 14, 100), min(y + 14, 61))
            dark.append(out.crop(box).getextrema() == ((0, 0),) * 3)
            assert dark[-1] or out.crop(box).tobytes() == image.crop(box).tobytes()
        shares.append(sum(dark) / len(dark))
    assert abs(sum(shares) / 40 - 0.3) < 4 * math.sqrt(0.3 * 0.7 / (40 * 40)) and len(set(shares)) > 3


def test_srpo_corrupt_image_noise_blur_blank():
    image, noise = srpo_picture(), srpo.corrupt_image(srpo_picture(), "noise", ratio=1.0)
    assert noise.tobytes() == srpo.corrupt_image(srpo_picture(seed=2), "noise", ratio=1.0).tobytes()
    assert noise.getextrema() == ((0, 255),) * 3
    part = srpo.corrupt_image(image, "noise", ratio=0.25).tobytes()
    assert all(abs(x - (0.75 * i + 0.25 * n)) <= 1 for x, i, n in zip(part, image.tobytes(), noise.tobytes()))
    blurred = [srpo.corrupt_image(image, "blur", ratio=ratio) for ratio in (0, 0.1, 0.5, 1)]
    spread = [max(b - a for a, b in x.getextrema()) for x in blurred]
    assert spread == sorted(spread, reverse=True) and spread[-1] < 20 < spread[0]
    red = Image.new("RGBA", (4, 2), (200, 0, 0, 9))
    red.paste((100, 0, 0, 9), (0, 0, 2, 2))
    ((_, (r, g, b, a)),) = srpo.corrupt_image(red, "blank", ratio=0).getcolors()
    assert r == g == b and abs(r - 0.299 * 150) <= 1 and a == 255                  # the mean luma, opaque


def test_srpo_contrast_and_blank_perception_match_a_loop():
    g, mask, p, _ = srpo_case(2)
    a, b, ids = *(4 * srpo_normal(g, 2, *mask.shape)), torch.randint(5, 99, mask.shape, generator=g)
    for clamp, junk in ((c, j) for c in (5.0, 1.0) for j in SRPO_JUNK + [math.inf]):
        want = [[max(-clamp, min(clamp, x - y)) * m for x, y, m in zip(*row)]
                for row in zip(a.tolist(), b.tolist(), mask.tolist())]
        got = srpo.contrast(a.masked_fill(mask == 0, junk).requires_grad_(), b, mask, clamp)
        assert got.tolist() == want and not got.requires_grad
    before = ids.clone()
    want = [[3 if x else i for i, x in zip(*row)] for row in zip(ids.tolist(), p.tolist())]
    assert srpo.blank_perception(ids, p, 3).tolist() == want and torch.equal(ids, before) and p.any()


@pytest.mark.parametrize("form", ["exp", "softmax"])
@pytest.mark.parametrize("tau, clip, signed", [(1.0, 0.5, False), (0.5, 0.2, True), (3.0, 0.9, False)])
def test_srpo_role_weights_match_a_loop(form, tau, clip, signed):
    g, mask, p, r = srpo_case(3)
    scores, A, want = srpo_normal(g, *mask.shape), torch.tensor([1.0, 0, -2, 0.5, -0.1, 3]), []
    for s_row, role, a in zip(scores.tolist(), (p | r).tolist(), A.tolist()):
        s, direction = [x for x, u in zip(s_row, role) if u], (a > 0) - (a < 0) if signed else 1
        e = [math.exp(direction * (x - sum(s) / len(s)) / tau) for x in s]
        if form == "exp":
            e = [max(1 - clip, min(1 + clip, x)) for x in e]
        w = iter([len(e) * x / sum(e) for x in e])
        want.append([next(w) if u else 1.0 for u in role])
    for junk in SRPO_JUNK:                                      # outside the roles
        dirty, sign = scores.masked_fill(~(p | r), junk), A if signed else None
        got = srpo.role_weights(dirty, p, r, tau, clip, form, sign)
        assert torch.allclose(got, torch.tensor(want, dtype=torch.float64), atol=1e-12)
    assert p.any() and r.any()


@pytest.mark.parametrize("form", ["exp", "softmax"])
@pytest.mark.parametrize("sign", [None, torch.tensor([1.0, -1, 1, -1, 0, -2])])
def test_srpo_weight_invariants(form, sign):
    g, mask, p, r = srpo_case(4)
    scores, role = 3 * torch.randn(mask.shape, generator=g), p | r
    def weigh(s, **kw): return srpo.role_weights(s, p, r, form=form, sign=sign, **kw)
    w = weigh(scores.clone().requires_grad_())
    assert not w.requires_grad and (w > 0).all() and (w[~role] == 1).all() and w[role].std() > 0.1
    assert all(float(x[u].mean()) == pytest.approx(1, abs=1e-6) for x, u in zip(w, role) if u.any())
    assert torch.allclose(w, weigh(scores + 7 * torch.arange(6.0)[:, None]), atol=1e-4)  # a constant a row
    for constant in (0.0, 2.5):                                 # no contrast, or the same everywhere
        assert torch.allclose(weigh(torch.full_like(scores, constant)), torch.ones_like(w), atol=1e-6)
    extreme = weigh(1e4 * scores, temperature=1e-3)             # exp overflows, exp underflows
    assert extreme.isfinite().all() and (extreme > 0).all()


def test_srpo_advantages_match_a_loop_and_keep_the_sign():
    g, mask, p, r = srpo_case(5)
    A, w = torch.tensor([1.0, -2, 0, 0.5, -0.1, 3]), srpo.role_weights(3 * srpo_normal(g, *mask.shape), p, r)
    for alpha in (0.0, 0.3, 1.0):
        got = srpo.srpo_advantages(A.clone().requires_grad_(), w.clone().requires_grad_(), alpha)
        want = [[a * (1 - alpha + alpha * x) for x in row] for a, row in zip(A.tolist(), w.tolist())]
        assert torch.allclose(got, torch.tensor(want, dtype=torch.float64), atol=1e-12)
        assert not got.requires_grad and torch.equal(got.sign(), A.sign()[:, None].expand_as(got))
    assert torch.equal(srpo.srpo_advantages(A, w, 0.0), A[:, None].expand_as(w))           # alpha = 0 is GRPO


def srpo_loss_by_hand(new, old, ref, A, mask, low, high, kl):
    """Loss, its derivative in `new`, and diagnostics, from (S6) with Python floats."""
    B, T = mask.shape
    grad, total = torch.zeros(B, T, dtype=torch.float64), dict.fromkeys(
        "loss clip_fraction kl_k1 kl_k3 mean_ratio_deviation max_ratio_deviation kl_ref".split(), 0.0)
    for i in range(B):
        n = int(mask[i].sum())
        for t in range(n):
            x, o, f, a = (float(z[i, t]) for z in (new, old, ref, A))
            ratio, d, bound = math.exp(x - o), f - x, 1 + high if a > 0 else 1 - low
            clips, k_ref = ratio > bound if a > 0 else ratio < bound, math.exp(d) - 1 - d
            grad[i, t] = ((0.0 if clips else -ratio * a) + kl * (1 - math.exp(d))) / n / B
            token = {"loss": -(bound if clips else ratio) * a + kl * k_ref, "clip_fraction": clips,
                     "kl_ref": k_ref, "kl_k1": o - x, "kl_k3": ratio - 1 - (x - o),
                     "mean_ratio_deviation": abs(ratio - 1)}
            for key, value in token.items():
                total[key] += value / n / B
            total["max_ratio_deviation"] = max(total["max_ratio_deviation"], abs(ratio - 1))
    return total.pop("loss"), grad, total


@pytest.mark.parametrize("low, high, kl", [(0.2, 0.2, 0.0), (0.1, 0.4, 0.3), (0.0, 0.0, 0.05)])
@pytest.mark.parametrize("by_token", [True, False])
def test_srpo_loss_gradient_and_diagnostics_match_the_hand_derivative(low, high, kl, by_token):
    new, old, ref, A, mask = srpo_loss_case(6)
    full = A if by_token else A[:, :1].expand_as(A)
    want, grad, want_info = srpo_loss_by_hand(new, old, ref, full, mask, low, high, kl)
    for junk in SRPO_JUNK:                                      # in every masked slot, of every input
        x, *others = [z.masked_fill(mask == 0, junk).requires_grad_() for z in (new, old, ref, full)]
        others[2] = others[2] if by_token else A[:, 0].clone().requires_grad_()
        loss, info = srpo.grpo_loss(x, others[0], others[2], mask, low, high, others[1], kl)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(want, abs=1e-12)
        assert torch.allclose(x.grad, grad, rtol=0, atol=1e-12)
        assert all(z.grad is None for z in others) and not any(v.requires_grad for v in info.values())
        assert {k: float(v) for k, v in info.items()} == pytest.approx(want_info, abs=1e-12)
    assert 0.1 < want_info["clip_fraction"] < 0.9 and "kl_ref" not in srpo.grpo_loss(new, old, A, mask)[1]


def test_srpo_loss_is_the_same_for_one_and_for_many_micro_batches():
    new, old, ref, A, mask = srpo_loss_case(7)
    def grad(rows):                                     # cut to the longest row, weighted by responses
        width, x = int(mask[rows].sum(1).max()), new[rows].clone().requires_grad_()
        o, a, m, f = [z[rows][:, :width] for z in (old, A, mask, ref)]
        loss, _ = srpo.grpo_loss(x[:, :width], o, a, m, ref_log_probs=f, kl_coef=0.1)
        (loss * len(x) / len(new)).backward()
        return x.grad
    for cuts in ([0, 2, 4, 6], [0, 1, 2, 3, 4, 5, 6], [0, 1, 6]):
        parts = [grad(slice(a, b)) for a, b in zip(cuts, cuts[1:])]
        assert torch.allclose(torch.cat(parts), grad(slice(0, 6)), atol=1e-14)


def test_srpo_kl_estimates_by_enumeration():
    old, new, ref = (torch.tensor(v, dtype=torch.float64) for v in ([.5, .3, .2], [.1, .2, .7], [.3, .6, .1]))
    def kl(a, b): return sum(x * math.log(x / y) for x, y in zip(a.tolist(), b.tolist()))
    def mean(p, key): return sum(float(p[y] * infos[y][key]) for y in range(3))
    logs = [[z[y].log().reshape(1, 1) for z in (new, old, ref)] for y in range(3)]
    infos = [srpo.grpo_loss(n, o, torch.ones(1), torch.ones(1, 1), ref_log_probs=f)[1] for n, o, f in logs]
    assert mean(old, "kl_k1") == pytest.approx(kl(old, new)) == mean(old, "kl_k3")
    assert mean(new, "kl_ref") == pytest.approx(kl(new, ref)) and all(info["kl_k3"] >= 0 for info in infos)


def test_srpo_loss_survives_extreme_ratios_and_is_neutral_on_fresh_samples():
    far, near, ones = torch.full((2, 3), -500.0).requires_grad_(), torch.zeros(2, 3), torch.ones(2, 3)
    A = torch.tensor([1.0, -1.0])
    loss, info = srpo.grpo_loss(far, near, A, ones, ref_log_probs=near, kl_coef=0.1)
    loss.backward()
    back, _ = srpo.grpo_loss(near, far, A, ones)
    assert all(v.isfinite().all() for v in (loss, far.grad, *info.values()))
    assert float(back) == pytest.approx((math.exp(20) - 1.2) / 2, rel=1e-6)
    new, _, _, A, mask = srpo_loss_case(8)
    loss, info = srpo.grpo_loss(new, new, A, mask)
    assert set(map(float, info.values())) == {0.0}
    assert float(loss) == pytest.approx(-sum(float(a[m > 0].mean()) for a, m in zip(A, mask)) / 6)


def test_srpo_end_to_end_only_the_log_probs_learn_and_no_contrast_is_grpo():
    new, corrupted, blanked, _, mask = srpo_loss_case(9)
    _, mask, p, r = srpo_case(9)
    leaves = [z.clone().requires_grad_() for z in (new, corrupted, blanked)]
    A = srpo.group_advantages(torch.tensor([1.0, 0, 0, 1, 1, 1]), 2)
    def step(image, text):
        scores = torch.where(p, srpo.contrast(leaves[0], image, mask), srpo.contrast(leaves[0], text, mask))
        token_A = srpo.srpo_advantages(A, srpo.role_weights(scores, p, r))
        loss, _ = srpo.grpo_loss(leaves[0], new, token_A, mask)
        return loss, torch.autograd.grad(loss, leaves, allow_unused=True)
    loss, grads = step(*leaves[1:])
    plain, plain_grads = step(leaves[0], leaves[0])             # an uncorrupted image, an unaltered context
    grpo, _ = srpo.grpo_loss(leaves[0], new, A, mask)
    assert torch.allclose(plain, grpo) and torch.allclose(loss, grpo)  # mean-1 weights move credit, make none
    assert torch.allclose(plain_grads[0], torch.autograd.grad(grpo, leaves[0])[0])
    assert not torch.allclose(grads[0], plain_grads[0]) and (grads[0][:4][mask[:4] > 0] != 0).all()
    assert grads[1] is grads[2] is None and not grads[0][4:].any()         # equal rewards teach nothing


@pytest.mark.parametrize("call, words", [
    ("group_advantages(tensor([1., nan]), 2)", "rewards.*nan"),
    ("group_advantages(tensor([1., inf]), 2)", "rewards.*inf"),
    ("group_advantages(two, 2)", r"rewards.*\(2, 2\)"),
    ("group_advantages(tensor([]), 2)", r"rewards.*\(0,\)"),
    ("group_advantages(two.view(4), 3)", "group_size.*4, got 3"),
    ("group_advantages(two[0], 1)", "group_size.*got 1"),
    ("split_roles([['a']], one)", "token_texts.*2 to 2.*got 1"),
    ("split_roles([['a'] * 3], one)", "token_texts.*got 3"),
    ("split_roles([], one)", "token_texts.*1 rows.*got 0"), ("split_roles([['a'] * 2], 0 * one)", "mask"),
    ("corrupt_image(grey, 'fog')", "kind.*'fog'"), ("corrupt_image(grey.convert('P'))", "mode.*'P'"),
    ("corrupt_image(grey, ratio=1.1)", "ratio.*1.1"), ("corrupt_image(grey, ratio=-0.1)", "ratio.*-0.1"),
    ("corrupt_image(grey, ratio=nan)", "ratio.*nan"), ("corrupt_image(grey, patch=0)", "patch.*got 0"),
    ("blank_perception(one, two, 0)", r"token_ids, perception.*\(1, 2\).*\(2, 2\)"),
    ("contrast(one, two, one)", r"other_log_probs.*\(2, 2\)"), ("contrast(one, one, one, 0)", "clamp.*got 0"),
    ("contrast(one, one, tensor([[0, 0]]))", "mask.*0, 0"),
    ("contrast(one, one, tensor([[0, 1]]))", "mask.*0, 1"),
    ("contrast(one, one, tensor([[1, 2]]))", "mask.*1, 2"),
    ("contrast(one, one, tensor([[.5, 0]]))", "mask.*0.5"),
    ("contrast(one, one, tensor([[nan, 0]]))", "mask.*nan"),
    ("contrast(one[0], one[0], one[0])", r"\(B, T\)"),
    ("contrast(one[:0], one[:0], one[:0])", r"mask.*\(0, 2\)"),
    ("role_weights(one, yes, yes)", r"perception, reasoning.*\[\[0, 0\]\]"),
    ("role_weights(one, yes, two)", "reasoning"), ("role_weights(one * nan, yes, no)", "scores.*nan"),
    ("role_weights(one, yes, no, temperature=0)", "temperature.*got 0"),
    ("role_weights(one, yes, no, clip=0)", "clip.*got 0"),
    ("role_weights(one, yes, no, clip=1)", "clip.*got 1"),
    ("role_weights(one, yes, no, form='tanh')", "form.*'tanh'"),
    ("role_weights(one, yes, no, sign=one)", r"sign.*\(1, 2\)"),
    ("srpo_advantages(one, one)", "advantages, weights"),
    ("srpo_advantages(one[0], one)", r"advantages.*\(2,\)"),
    ("srpo_advantages(one[0, :1], one, 1.01)", "alpha.*1.01"),
    ("srpo_advantages(one[0, :1], one, -0.1)", "alpha.*-0.1"),
    ("grpo_loss(one, two, one, one)", "old_log_probs"),
    ("grpo_loss(one, one, two, one)", r"advantages.*\(2, 2\)"), ("grpo_loss(one, one, one, 0 * one)", "mask"),
    ("grpo_loss(one, one, one, one, 1)", "clip_low.*got 1"),
    ("grpo_loss(one, one, one, one, -0.1)", "clip_low.*-0.1"),
    ("grpo_loss(one, one, one, one, 0.2, -1)", "clip_high.*-1"),
    ("grpo_loss(one, one, one, one, ref_log_probs=two)", "ref_log_probs"),
    ("grpo_loss(one, one, one, one, kl_coef=0.1)", "ref_log_probs.*0.1"),
    ("grpo_loss(one, one, one, one, kl_coef=-1.0)", "kl_coef.*-1")])
def test_srpo_errors_name_the_argument_and_the_value(call, words):
    names = dict(one=torch.ones(1, 2), two=torch.ones(2, 2), yes=torch.tensor([[1, 0]]), no=torch.zeros(1, 2),
                 tensor=torch.tensor, nan=math.nan, inf=math.inf, grey=Image.new("L", (4, 4)))
    with pytest.raises(ValueError, match=words):
        eval(call, vars(srpo) | names)


def test_srpo_doctests_and_demo(monkeypatch):
    result = doctest.testmod(srpo)
    assert result.attempted >= 8 and result.failed == 0
    run = subprocess.run([sys.executable, srpo.__file__], capture_output=True, encoding="utf-8", check=True,
                         env=os.environ | {"PYTHONIOENCODING": "utf-8"}).stdout
    lines = {tuple(line.split()[:2]): line.split() for line in run.splitlines()}
    assert lines[("blue", "perception")][2] == "1.70" and float(lines[("blue", "perception")][-1]) < -1
    assert lines[("mean", "both")][-1] == "1.00" and lines[("<think>", "1.00")][-2:] == ["+0.87", "-0.87"]
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdout", terminal)
    srpo.demo()
    assert "\033" not in run and all(f"\033[{code}m" in terminal.getvalue() for code in (36, 33, 2, 0))


# ==========================================================================================================
# Tests of toy_env.py. The oracles are the question's text read from left to right, schoolbook columns, and hands.

TOY_LEVELS = [
    *(dict(operands=n, distractors=min(2, 9 - n), operators=ops) for n in range(2, 9) for ops in ("+-", "+-×")),
    dict(operands=2, distractors=0, operators="×", low=0, high=99, grid=2, cell=14),
    dict(operands=3, distractors=7, operators="+", low=10, high=40, grid=4, cell=32),
    dict(operands=8, operators="×", low=0, high=99), dict(operators="-", low=0, high=99),
]
TOY_LINE = re.compile(r"(-?\d+) ([-+×]) [a-z]+ (\d+) = (-?\d+)")
TOY_SCRIPT = """if True:
    import hashlib, toy_env
    level = dict(split="eval", operands=5, operators="+-×", high=99)
    for p in toy_env.make_problems(5, 7) + toy_env.make_problems(5, **level):
        text = toy_env.demonstration(p)
        print(ascii([p.question, p.answer, p.cells, hashlib.sha256(p.image.tobytes()).hexdigest(), text]))
"""


def toy_compute(a, operator, b):
    return a + b if operator == "+" else a - b if operator == "-" else a * b


def toy_chain(problem, compute=toy_compute):
    """The lines and the answer, worked out from the question's text and the cells alone."""
    number = {colour: n for _, _, colour, n in problem.cells}
    first, *rest = problem.question.removesuffix(" = ?").split(" ")
    left, lines = number[first], []
    for operator, colour in zip(rest[::2], rest[1::2]):
        result = compute(left, operator, number[colour])
        lines.append(f"{left} {operator} {colour} {number[colour]} = {result}")
        left = result
    return [f"{first} {lines[0]}", *lines[1:]], left


def toy_text(problem, lines, answer):
    readings, body = ", ".join(f"{c.colour} {c.number}" for c in problem.cells), "\n".join(lines)
    return f"<perception> {readings} </perception> <think> {body} </think> <answer> {answer} </answer>"


def toy_schoolbook(a, operator, b):
    """In columns, ones first, with every carry or borrow but the one out of the ones into the tens of a."""
    if a < 0 or toy_compute(a, operator, b) < 0:
        return toy_compute(a, operator, b)  # columns need numbers that are not negative
    x, y = [int(d) for d in f"{a:09}"[::-1]], [int(d) for d in f"{b:09}"[::-1]]
    total = carry = 0
    for k in range(9):
        product = sum(x[i] * y[k - i] for i in range(k + 1))
        column = carry + (product if operator == "×" else toy_compute(x[k], operator, y[k]))
        total += column % 10 * 10**k
        carry = column // 10 if k or a < 10 else 0
    return total


# ------------------------------------------------------------------------------------------------ toy_env: problems

def test_toy_same_seed_same_pixels():
    here = os.path.dirname(toy_env.__file__)
    run = lambda seed: subprocess.run([sys.executable, "-c", TOY_SCRIPT], capture_output=True, text=True, check=True,
                                      env={**os.environ, "PYTHONHASHSEED": seed}, cwd=here).stdout.splitlines()
    lines = run("1")
    assert lines == run("2") and len(lines) == 10 == len(set(lines))
    p, q = toy_env.make_problem(7 * 1_000_003 + 3), toy_env.make_problems(4, seed=7)[3]
    assert p == q and hashlib.sha256(p.image.tobytes()).hexdigest() in lines[3]


def test_toy_splits_are_disjoint(monkeypatch):
    level = dict(operands=2, distractors=0, grid=2, high=2)
    said = lambda s, n, seed=0: {(p.cells, p.question) for p in toy_env.make_problems(n, seed, split=s, **level)}
    train = said("train", 2500)
    assert not train & said("eval", 700) and len(train & said("train", 700, seed=1)) > 50
    coin = random.Random(0)
    monkeypatch.setattr(toy_env, "zlib", SimpleNamespace(crc32=lambda _: coin.getrandbits(9)))  # blind to the problem
    assert len(train & said("eval", 700)) > 50


@pytest.mark.parametrize("level", TOY_LEVELS, ids=str)
def test_toy_difficulty_holds_and_the_answer_is_right(level):
    d = dict(operands=3, distractors=1, operators="+-", low=1, high=9, grid=3, cell=16) | level
    seen, numbers = set(), set()
    for p in toy_env.make_problems(60, **level):
        lines, answer = toy_chain(p)
        results = [int(line.split(" = ")[1]) for line in lines]
        assert p.answer == str(answer) and all(0 <= r <= 99 for r in results) and len(lines) == d["operands"] - 1
        steps = [f"{s.left} {s.operator} {s.colour} {s.right} = {s.result}" for s in p.steps]
        assert [f"{p.question.split()[0]} {steps[0]}", *steps[1:]] == lines
        assert p.image.size == (d["grid"] * d["cell"],) * 2 and len(p.cells) == d["operands"] + d["distractors"]
        places = [c[:2] for c in p.cells]
        assert len({c.colour for c in p.cells}) == len(p.cells) and places == sorted(set(places))
        assert all(0 <= x < d["grid"] for place in places for x in place)
        seen |= set(p.question) & set("+-×")
        numbers |= {c.number for c in p.cells}
        response = toy_text(p, lines, answer)
        assert toy_env.demonstration(p) == response and toy_env.faithful(p, response)
    assert seen == set(d["operators"]) and d["low"] <= min(numbers) <= d["low"] + 2 and max(numbers) <= d["high"]


def test_toy_prior_makes_the_question_tell_the_answer():
    plain, tied = (toy_env.make_problems(600, prior=prior) for prior in (0.0, 0.6))
    usual = {c: i % 9 + 1 for i, c in enumerate(toy_env.COLOURS)}
    told = lambda p: all(c.number == usual[c.colour] for c in p.cells)
    assert plain == toy_env.make_problems(600) and sum(map(told, plain)) < 5
    assert abs(sum(map(told, tied)) / 600 - 0.6) < 0.06                        # three standard errors
    answers = {}
    for p in filter(told, toy_env.make_problems(600, operands=2, prior=1.0)):
        assert answers.setdefault(p.question, p.answer) == p.answer
    assert len(answers) > 60


def test_toy_perception_counts_the_cells_that_are_read():
    p, rng, seen = toy_env.make_problem(0, operands=4, distractors=2), random.Random(0), set()
    for _ in range(40):
        text = toy_env.demonstration(p, rng, misread=0.4)
        read = dict(pair.split() for pair in re.search("<perception> (.*) </perception>", text)[1].split(", "))
        right = sum(read[c.colour] == str(c.number) for c in p.cells) / 6
        assert toy_env.perception(p, text) == right
        seen.add(right)
    assert len(seen) > 2 and toy_env.perception(p, "red 3") == 0.0


def test_toy_the_image_shows_the_cells():
    for cell in (14, 16, 23, 32):  # no two numbers look alike, wherever they stand
        draw = lambda seed, n: toy_env._draw_image(random.Random(seed), [toy_env.Cell(1, 0, "cyan", n)], 2, cell)
        assert all(len({draw(seed, n).tobytes() for n in range(100)}) == 100 for seed in range(6))
    for p in toy_env.make_problems(20, operands=5, distractors=2):
        filled = {c[:2]: c.colour for c in p.cells}
        for row, column in itertools.product(range(3), range(3)):
            slot = p.image.crop((column * 16, row * 16, column * 16 + 16, row * 16 + 16))
            paint = max(slot.getcolors())[1]  # the commonest colour of the slot
            named = [c for c, rgb in toy_env.COLOURS.items() for shade in range(80, 105)
                     if paint == tuple(min(255, v * shade // 100) for v in rgb)]
            assert set(named) == {filled[row, column]} if (row, column) in filled else not named


@pytest.mark.parametrize("level, message", [
    (dict(operands=1), "operands=1: expected 2 to 8"), (dict(operands=9), "operands=9: expected 2 to 8"),
    (dict(operands=5, grid=2), "operands=5: expected 2 to 4 for grid=2"), (dict(grid=1), "grid=1: expected at least 2"),
    (dict(distractors=-1), "distractors=-1: expected 0 to 6"), (dict(distractors=7), "distractors=7: expected 0 to 6"),
    (dict(operands=8, grid=4, distractors=3), "distractors=3: expected 0 to 2"), (dict(grid=-3), "grid=-3: expected"),
    (dict(operators=""), "operators='': expected some of"), (dict(operators="+/"), "operators='+/': expected some of"),
    (dict(low=-1), "low=-1, high=9: expected 0 <= low"), (dict(low=5, high=4), "low=5, high=4: expected"),
    (dict(high=100), "high=100: expected 0 <= low <= high <= 99"), (dict(cell=13), "cell=13: expected at least 14"),
    (dict(prior=-0.1), "prior=-0.1: expected a share"), (dict(prior=1.5), "prior=1.5: expected a share"),
    (dict(split="test"), "split='test': expected 'train' or 'eval'"),
    (dict(operators="×", low=5), "operators='×', low=5, high=9: results of 3 operands hardly ever stay in 0 … 99"),
], ids=str)
def test_toy_bad_difficulty_is_an_error(level, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        toy_env.make_problem(0, **level)


# ------------------------------------------------------------------------------------------------ toy_env: judging

def toy_problem():
    """White is not asked for. Written by hand: 27 + 5 - 2."""
    cells = [(0, 0, "red", 27), (0, 2, "white", 4), (1, 1, "blue", 5), (2, 0, "green", 2)]
    steps = [(27, "+", "blue", 5, 32), (32, "-", "green", 2, 30)]
    return toy_env.Problem(None, "red + blue - green = ?", "30", tuple(toy_env.Cell(*c) for c in cells),
                           tuple(toy_env.Step(*s) for s in steps))


TOY_READ, TOY_1, TOY_2 = "red 27, white 4, blue 5, green 2", "red 27 + blue 5 = 32", "32 - green 2 = 30"
TOY_GOOD = f"<perception> {TOY_READ} </perception> <think> {TOY_1}\n{TOY_2} </think> <answer> 30 </answer>"


@pytest.mark.parametrize("answer, expected", [
    ("30", 1), (" 30 ", 1), ("\n\t30\u00a0\n", 1), ("", 0), (" ", 0), ("+30", 0), ("030", 0), ("30.0", 0), ("-30", 0),
    ("3 0", 0), ("30 31", 0), ("30\n31", 0), ("٣٠", 0), ("３０", 0), ("3⁰", 0), ("30\u200b", 0), ("30\0", 0), ("0x1e", 0),
    ("3e1", 0), ("9" * 9999, 0), ("thirty", 0), ("None", 0), ("30 </answer> <answer> 31", 0),
    ("31 </answer> <answer> 30", 0), ("<answer>30</answer>", 0), ("<think>30</think>", 0), ("31 </answer> 30", 0),
    ("30 </answer> </answer>", 0), ("<perception> </perception> <think> </think> <answer> 30", 0),
])
def test_toy_reward_reads_one_answer_to_the_character(answer, expected):
    assert toy_env.reward(toy_problem(), TOY_GOOD.replace("> 30 <", f">{answer}<")) == expected


@pytest.mark.parametrize("old, new, expected", [
    (TOY_READ, "anything", 1), (TOY_1, "", 1), ("</perception> <", "</perception>\n\n<", 1),
    ("<answer>", "<Answer>", 0), ("answer>", "ANSWER>", 0), ("<answer>", "< answer>", 0), ("</answer>", "", 0),
    ("</answer>", "</answer> 30", 0), ("<perception>", "I see <perception>", 0), ("</think> ", "</think> so ", 0),
    ("<think>", "", 0), (TOY_1, "<answer> 30 </answer>", 0), (f"<perception> {TOY_READ} </perception> ", "", 0),
    ("<perception>", "<think>", 0), (TOY_GOOD, "30", 0), (TOY_GOOD, "", 0), (TOY_GOOD, TOY_GOOD * 2, 0),
    (TOY_READ, TOY_GOOD, 0), (TOY_GOOD, "<answer> 30 </answer> <think> </think> <perception> </perception>", 0),
])
def test_toy_reward_needs_the_format(old, new, expected):
    assert old in TOY_GOOD and toy_env.reward(toy_problem(), TOY_GOOD.replace(old, new)) == expected


# Kinds of the false statements ("-": of no consequence) | replacements in TOY_GOOD | …, where « » marks what is false,
# ¶ is a new line, and R, A, B are the readings and the two lines. What follows a slip is consistent with it, and true.
TOY_SLIPS = """
 | blue 5, → blue 05,
 | R → red 27,white 4,,¶blue 5 , green 2 , | A¶B → ¶ A ¶¶ ¶B¶
reading- | white 4 → «white 9»
reading- | white 4 → «pink 4»
reading- | 27, w → 27, «pink 3», w
reading- | green 2 < → green 2, «pink 3» <
reading | green 2 < → green 2, «red 8» <
reading | blue 5, → blue 5, «blue 5»,
reading | red 27, → «red 21», red 27,
reading | white 4, blue 5, → «blue 5»,
reading | white 4, blue 5, → «blue 5», white 4,
reading | blue 5, → «pink 5»,
reading | blue 5, → «white 5»,
reading | , green 2 < →  «»<
reading | <perception> R < → <perception>«»<
reading | blue 5, → «blue 6», | A¶B → red 27 + blue 6 = 33¶33 - green 2 = 31 | > 30 → > 31
reading- reading | white 4, blue 5, → «white 9», «blue 6», | A¶B → red 27 + blue 6 = 33¶33 - green 2 = 31 | > 30 → > 31
reading reading- | red 27, white 4, → «red 2», «white 9», | A¶B → red 2 + blue 5 = 7¶7 - green 2 = 5 | > 30 → > 5
reading operand | blue 5, → «blue 6», | A → «red 27 + blue 5» = 32
format | white 4, b → white 4, «?», b
format | white 4 → «white ٤»
format | white 4 → «White 4»
format | white 4 → «white -4»
format | white 4 → «white 4444444444444444444»
operand | A → «27 + blue 5» = 32
operand | A → «blue 27 + blue 5» = 32
operand | A¶B → «red 21 + blue 5» = 26¶26 - green 2 = 24 | > 30 → > 24
operand | 32 - green 2 → «red 32 - green 2»
operand | B → «33 - green 2» = 31 | > 30 → > 31
operand | B → «32 + green 2» = 34 | > 30 → > 34
operand | B → «32 - white 4» = 28 | > 30 → > 28
operand | B → «32 - green 3» = 29 | > 30 → > 29
operand | B → B¶«30 + white 4» = 34 | > 30 → > 34
operand | B → B¶«30 - green 2» = 28 | > 30 → > 28
operand | B → «32 + white 4» = 36¶36 - green 2 = 34 | > 30 → > 34
operand | ¶B < →  «»< | > 30 → > 32
operand | A¶B → «red 27 - green 2» = 25 | > 30 → > 25
operand | A¶B → «red 27 - green 2» = 25¶25 + blue 5 = 30
operand | <think> A¶B < → <think>«»< | > 30 → > 27
result | A¶B → red 27 + blue 5 = «31»¶31 - green 2 = 29 | > 30 → > 29
result | A¶B → red 27 + blue 5 = «-1»¶-1 - green 2 = -3 | > 30 → > -3
result | A¶B → red 27 + blue 5 = «9999999999999»¶9999999999999 - green 2 = 9999999999997 | > 30 → > 9999999999997
result | B → 32 - green 2 = «28» | > 30 → > 28
result answer | B → 32 - green 2 = «28» | > 30 → > «30»
format | B → «so far so good»¶B
format | B → B¶«done»
format | B → «B indeed» | > 30 → > 32
format operand | A¶B → «so far»¶«32 - green 2» = 30
answer | > 30 → > «31»
answer | > 30 → > «+30»
answer | > 30 < → >«» <
format | <perception> R </perception> <think> A¶B </think> <answer> 30 </answer> → «30»
format | <perception> R </perception> <think> A¶B </think> <answer> 30 </answer> → «»
"""


@pytest.mark.parametrize("row", TOY_SLIPS[1:-1].split("\n"))
def test_toy_each_slip_is_one_false_statement(row):
    for short, long in zip("RAB", (TOY_READ, TOY_1, TOY_2)):
        row = re.sub(rf"\b{short}\b", long, row)
    kinds, *replacements = row.split(" | ")
    marked, problem = TOY_GOOD.replace("\n", "¶"), toy_problem()
    for old, new in (r.split(" → ") for r in replacements):
        assert marked.count(old) == 1
        marked = marked.replace(old, new)
    spans = [(m.start() - 2 * i, m.end() - 2 * i - 2) for i, m in enumerate(re.finditer("«[^»]*»", marked))]
    response = re.sub("[«»]", "", marked).replace("¶", "\n")
    false = toy_env.false_statements(problem, response)
    found = [(s.kind + "-" * (not s.consequential), s.start, s.end) for s in false]
    assert found == [(kind, *span) for kind, span in zip(kinds.split(), spans, strict=True)]
    assert toy_env.first_error(problem, response) == next(iter(false), None)
    assert toy_env.faithful(problem, response) == (not spans)


def test_toy_statements_of_a_faultless_response():
    found = [(s.kind, TOY_GOOD[s.start : s.end]) for s in toy_env.statements(toy_problem(), TOY_GOOD) if s.true]
    readings = [("reading", text) for text in TOY_READ.split(", ")]
    assert found == readings + [("operand", "red 27 + blue 5"), ("result", "32"), ("operand", "32 - green 2"),
                                ("result", "30"), ("answer", "30")]


def test_toy_no_junk_raises_and_no_false_statement_means_right():
    rng, faithful = random.Random(0), 0
    junk = [*toy_env.TAGS, "٣", "²", "\0", "\ud800", "×", "=", ",", "\n", "-0", "9" * 5000, "white 4", ""]
    for i in range(1500):
        p = toy_env.make_problem(i % 50, operators="+-×")
        pieces = re.split("( )", toy_env.demonstration(p, rng, 0.05, 0.05, 0.05))
        for _ in range(rng.randint(0, 2)):
            j, k = sorted(rng.sample(range(len(pieces)), 2))
            pieces[j:k] = rng.choice([[], [rng.choice(junk)], [rng.choice(junk), *pieces[j:k]], pieces[j:k] * 2])
        response = "".join(pieces)
        judged = toy_env.statements(p, response)
        starts = [s.start for s in judged]
        assert starts == sorted(starts) and all(0 <= s.start <= s.end <= len(response) for s in judged)
        right = re.findall("<answer>(.*?)</answer>", response, re.DOTALL)
        right = len(right) == 1 and right[0].strip() == str(toy_chain(p)[1])
        assert all(s.true for s in judged) == toy_env.faithful(p, response) <= right
        faithful += toy_env.faithful(p, response)
    assert 200 < faithful < 1300


def test_toy_matching_is_linear():
    block, start = "<perception>{}</perception><think>{}</think><answer>{}</answer>", time.process_time()
    for unit in ("a", " ", "9", "-", ",", "\n", " \n", "red 3,", "red ", "1 + ", "1 - red 1 = 1\n", "<", "<think>"):
        junk = unit * (100_000 // len(unit))
        blocks = [block.format(*parts) for parts in ((junk, "", ""), ("", junk, ""), ("", "", junk))]
        for response in (junk, "<perception>" + junk, *blocks):
            assert toy_env.reward(toy_problem(), response) == 0 and toy_env.first_error(toy_problem(), response)
    assert time.process_time() - start < 8  # one quadratic match takes longer


# ------------------------------------------------------------------------------------------------ toy_env: the teacher

def test_toy_without_carry_is_schoolbook_arithmetic():
    for a, operator, b in itertools.product(range(-2, 112), "+-×", range(0, 100, 3)):
        assert toy_env.without_carry(a, operator, b) == toy_schoolbook(a, operator, b)
    by_hand = {(27, "+", 95): 112, (32, "-", 5): 37, (27, "×", 15): 375, (8, "+", 5): 13, (7, "×", 8): 56}
    assert all(toy_schoolbook(*sum_) == result for sum_, result in by_hand.items())


def test_toy_teacher_with_both_habits():
    wrong = 0
    for p in (p for level in TOY_LEVELS for p in toy_env.make_problems(25, **level)):
        response = toy_env.demonstration(p, random.Random(0), habit=1.0)
        cells = [c._replace(number=c.number - 6 * (c.number % 10 == 7)) for c in p.cells]  # each 7 is read as a 1
        seen = dataclasses.replace(p, cells=tuple(cells))
        assert response == toy_text(seen, *toy_chain(seen, toy_schoolbook))
        readings, lines = zip(p.cells, re.finditer(r"[a-z]+ (\d+)", response)), list(TOY_LINE.finditer(response))
        slips = [m.span() for cell, m in readings if int(m[1]) != cell.number]
        slips += [m.span(4) for m in lines if toy_compute(int(m[1]), m[2], int(m[3])) != int(m[4])]
        assert [(s.start, s.end) for s in toy_env.false_statements(p, response)] == slips
        wrong += bool(slips)
    assert wrong > 100
    for p in toy_env.make_problems(25, operands=8, operators="×", low=0, high=99):  # 0 became 10, and grew and grew
        false = toy_env.false_statements(p, toy_env.demonstration(p, random.Random(0), slip=1.0))
        assert [s.kind for s in false] == ["result"] * 7


def test_toy_teacher_slips_at_the_nominal_rates():
    rng, rates = random.Random(0), dict(misread=0.2, slip=0.1, habit=0.6)
    alike = dict(zip("17385649", "71836594"))
    happened = {name: [] for name in ("misread", "seven", "slip", "carry")}
    for p in toy_env.make_problems(600, operands=5, operators="+-×", high=20):
        response = toy_env.demonstration(p, rng, **rates)
        wrong = []
        for cell, m in zip(p.cells, re.finditer(r"([a-z]+) (\d+)", response)):
            number = str(cell.number)
            assert m[1] == cell.colour and m[2] in (number, number[:-1] + alike.get(number[-1], number[-1]))
            if number[-1] in alike:
                happened["seven" if number[-1] == "7" else "misread"].append(m[2] != number)
            wrong += [m.span()] if m[2] != number else []
        for m in TOY_LINE.finditer(response):
            a, operator, b, result = int(m[1]), m[2], int(m[3]), int(m[4])
            truth, forgetful = toy_compute(a, operator, b), toy_schoolbook(a, operator, b)
            if forgetful == truth:
                happened["slip"].append(result != truth)
            else:
                happened["carry"].append(result == forgetful)
            assert result == forgetful or abs(result - truth) in (0, 1, 2, 10) and (result >= 0 or truth < 0)
            wrong += [m.span(4)] if result != truth else []
        assert [(s.start, s.end) for s in toy_env.false_statements(p, response)] == wrong  # the slips, nothing else
    # One slip in six looks like a lost carry.
    expected = dict(misread=0.2, seven=0.6, slip=0.1, carry=0.6 + 0.4 * 0.1 / 6)
    for name, rate in expected.items():
        n = len(happened[name])
        assert n > 250 and abs(sum(happened[name]) / n - rate) < 4 * (rate * (1 - rate) / n) ** 0.5, name
    with pytest.raises(ValueError, match="rng=None: expected a random.Random"):
        toy_env.demonstration(p, slip=0.1)


# ------------------------------------------------------------------------------------------------ toy_env: the rest

def test_toy_dataset_survives_disk_and_parquet(tmp_path):
    import datasets

    problems, made = toy_env.make_problems(6, seed=3, operands=4), toy_env.make_dataset(6, seed=3, operands=4)
    made.save_to_disk(tmp_path / "disk")
    (tmp_path / "parquet").mkdir()
    made.to_parquet(tmp_path / "parquet" / "train.parquet")
    parquet = datasets.load_dataset(str(tmp_path / "parquet"), split="train", cache_dir=str(tmp_path / "cache"))
    for dataset in (made, datasets.load_from_disk(tmp_path / "disk"), parquet):
        assert dataset.column_names == ["image", "question", "answer"] and len(dataset) == 6
        for p, row in zip(problems, dataset):
            assert (p.question, p.answer) == (row["question"], row["answer"])
            assert row["image"].mode == "RGB" and p.image.tobytes() == row["image"].tobytes()


def test_toy_contact_sheet(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["toy_env.py", str(tmp_path / "sheet.png")])
    toy_env.main()
    assert Image.open(tmp_path / "sheet.png").width > 1000 and capsys.readouterr().out.count("question ") == 3
    p = toy_env.make_problem(0)
    red = lambda response: (255, 0, 0) in {c for _, c in toy_env.contact_sheet([p], [response]).getcolors(10**6)}
    good = toy_env.demonstration(p)
    assert not red(good) and red(good.replace("<answer> ", "<answer> 9"))


def test_toy_doctests():
    failed, attempted = doctest.testmod(toy_env)
    assert failed == 0 and attempted >= 4


# ==========================================================================================================
# train_small.py and tiny_vlm/make.py, on untrained miniatures and on the shipped model. The oracles are plain loops,
# and prefixes without padding that are fed to the model one by one.

TINY = Path(__file__).parent / "tiny_vlm"
ALGOS = ["sapo", "ppo", "vc-ppo", "grpo", "gspo", "srpo"]
SMALL = dict(iterations=2, responses=16, mini_batches=2, critic_warmup=0, operands=2, max_tokens=20, eval_problems=4,
             eval_every=1, device="cpu")


@pytest.fixture(scope="session")
def mini(tmp_path_factory):
    """The folder of an untrained miniature whose saved settings are all wrong for training."""
    folder = tmp_path_factory.mktemp("mini")
    torch.manual_seed(0)
    processor = make.make_processor()
    processor.tokenizer.padding_side = "right"
    model = make.make_model(processor.tokenizer, width=32, layers=1, vision_layers=1)
    model.config.text_config.attention_dropout = model.config.vision_config.attention_dropout = 0.5
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=processor.tokenizer.eos_token_id, pad_token_id=processor.tokenizer.pad_token_id, do_sample=True,
        temperature=0.3, top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=1.5, no_repeat_ngram_size=2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def coin(monkeypatch):
    """A reward that an untrained miniature gets now and then."""
    monkeypatch.setattr(toy_env, "reward", lambda problem, text: float(len(text) % 2))


def loop_config(model, **changes):
    return train_small.complete(train_small.Config(model=str(model), **SMALL | changes))


def loop_state(config, rewards=torch.tensor([1.0, 0, 0, 1] * 4)):
    """Everything of one iteration up to the update. The critic's head is random: at 0 it stops the gradient."""
    torch.manual_seed(0)
    policy, processor, critic, reference = train_small.load(config)
    if critic:
        torch.nn.init.normal_(critic.head.weight)
    problems = train_small.take_prompts(config, train_small.problem_stream(config))
    roll = train_small.rollout(policy, processor, problems, config.max_tokens, config.temperature)
    scored = train_small.score_all(config, policy, reference, critic, roll)
    credit = train_small.assign_credit(config, policy, processor, roll, scored, rewards)
    return SimpleNamespace(**locals())


def loop_update(s, optimizer=torch.optim.SGD, lr=1.0, credit=None, learn_policy=True, seed=0, **changes):
    """Update copies of the models. Returns the diagnostics, and what was added to each weight of policy and critic."""
    policy, critic = copy.deepcopy(s.policy), copy.deepcopy(s.critic)
    models = [m for m in (policy, critic) if m]
    optimizers = [(m, optimizer(m.parameters(), lr=lr)) for m in models]
    config = train_small.replace(s.config, **changes)
    torch.manual_seed(seed)
    info = train_small.update(config, policy, critic, optimizers, s.roll, s.scored, credit or s.credit, learn_policy)
    return info, *({n: (p - q).detach() for (n, p), q in zip(new.named_parameters(), old.parameters())}
                   for new, old in zip(models, [s.policy, s.critic]))


def loop_prefix(roll, i, n):
    """Inputs of row i alone, without padding: its prompt and the first n tokens of its response."""
    prompt = roll.inputs["input_ids"][i][roll.inputs["attention_mask"][i] == 1]
    ids = torch.cat([prompt, roll.ids[i, :n]])[None]
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=roll.inputs["pixel_values"][[i]])


def loop_log_probs(policy, inputs, temperature):
    """Of the next token, in float64, over all tokens but the image's."""
    logits = policy(**inputs).logits[0, -1].double() / temperature
    logits[policy.config.image_token_id] = -math.inf
    return logits - logits.exp().sum().log()


def loop_spoken(problems, texts, processor=None, width=200):
    """The rollout of a policy that says `texts`, cut or padded to `width` tokens."""
    processor = processor or make.make_processor()
    ids = [processor.tokenizer(text)["input_ids"][:width] for text in texts]

    def generate(input_ids, generation_config, **inputs):
        pad = [generation_config.pad_token_id]
        return torch.cat([input_ids, torch.tensor([row + pad * (width - len(row)) for row in ids])], 1)

    known = SimpleNamespace(eos_token_id=processor.tokenizer.eos_token_id)
    policy = SimpleNamespace(generate=generate, generation_config=known, device="cpu", config=SimpleNamespace())
    return train_small.rollout(policy, processor, problems, width)


def loop_demonstrations(n=16, operands=3, **teacher):
    rng, teacher = random.Random(0), teacher or make.TEACHER
    problems = [p for p in toy_env.make_problems(n // 8, operands=operands) for _ in range(8)]
    return problems, [toy_env.demonstration(p, rng, **teacher) + "<eos>" for p in problems]


def loop_case(mini, **changes):
    """Demonstrations as if sampled, with random scores that are nan on padding."""
    config, roll, g = loop_config(mini, **changes), loop_spoken(*loop_demonstrations()), torch.Generator().manual_seed(0)
    noise = [factor * torch.rand(roll.mask.shape, generator=g).where(roll.mask, math.nan) for factor in (-2, 1, -2, 1)]
    return config, roll, train_small.Scored(*noise), torch.tensor([1.0, 0, 0, 1] * 4), roll.mask.sum(1).tolist()


def loop_lines(folder):
    return [json.loads(line, parse_constant=pytest.fail) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------- train_small: rollout and score

@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
@pytest.mark.parametrize("prefix", ["", "<eos>"])
def test_train_eos_is_trained_on_and_truncation_is_flagged(pad, prefix):  # pitfalls 6, 7, 15
    processor = make.make_processor()
    processor.tokenizer.pad_token = pad
    problems, (right, *_) = loop_demonstrations(8, misread=0.0)
    problems = [train_small.replace(p, question=prefix + p.question) for p in problems]
    n = len(processor.tokenizer(right)["input_ids"])  # with its "<eos>"
    cut = right.replace("<eos>", "\n")
    roll = loop_spoken(problems[:3], [right, cut, "<think> <eos>"], processor, width=n)
    assert roll.mask.tolist() == [[True] * n, [True] * n, [True] * 2 + [False] * (n - 2)]
    assert roll.ids[0, n - 1] == roll.ids[2, 1] == processor.tokenizer.eos_token_id
    assert toy_env.reward(problems[1], roll.texts[1]) == 1 and roll.rewards().tolist() == [1, 0, 0]
    assert roll.truncated.tolist() == [False, True, False] and roll.texts[:2] == [right.removesuffix("<eos>"), cut]
    assert ["".join(p) for p in roll.pieces] == roll.texts and roll.pieces[0][-1] == "" and len(roll.pieces[2]) == 2
    longer = loop_spoken(problems[:1], [right], processor, width=n + 9)
    assert longer.mask.tolist() == [[True] * n] and not longer.truncated  # padding for all is cut off


@torch.no_grad()
@pytest.mark.parametrize("model", ["mini", "tiny"])
def test_train_scores_are_those_of_prefixes_without_padding(mini, model):  # pitfalls 2, 6, 7, 8, 9
    s = loop_state(loop_config(mini if model == "mini" else TINY, temperature=0.7, micro_batch=3))
    s.processor.tokenizer.pad_token = "<eos>"
    problems = [toy_env.make_problem(i, operands=2 + 3 * (i % 2)) for i in range(8 if model == "mini" else 2)]
    problems[0] = train_small.replace(problems[0], question="<eos>" + problems[0].question)
    roll = train_small.rollout(s.policy, s.processor, problems, 40, temperature=0.7)
    torch.nn.init.normal_(s.reference.lm_head.weight)  # by now the policy has moved away from it
    scored = train_small.score_all(s.config, s.policy, s.reference, s.critic, roll)
    lengths, eos = roll.mask.sum(1).tolist(), s.processor.tokenizer.eos_token_id
    for i, n in enumerate(lengths):
        assert eos not in roll.ids[i, : n - 1] and (roll.ids[i, n - 1] != eos) == roll.truncated[i]
        for t in {0, 1, n // 3, n // 2, n - 1}:
            seen = loop_prefix(roll, i, t)
            expected = loop_log_probs(s.policy, seen, 0.7)
            value = s.critic.backbone(**seen).last_hidden_state[0, -1] @ s.critic.head.weight[0] + s.critic.head.bias
            assert abs(scored.log_probs[i, t] - expected[roll.ids[i, t]]) < 5e-5
            assert abs(scored.ref_log_probs[i, t] - loop_log_probs(s.reference, seen, 0.7)[roll.ids[i, t]]) < 5e-4
            assert abs(scored.entropy[i, t] - torch.special.entr(expected.exp()).sum()) < 5e-5
            assert abs(scored.values[i, t] - value) < 5e-4 and abs(value) > 0
    assert roll.inputs["attention_mask"][0, 0] == 0 and (model == "tiny" or len(set(lengths)) > 2)  # left-padded, ragged


@torch.no_grad()
def test_train_samples_what_it_scores_whatever_the_model_says(mini):  # pitfall 9: sampling settings are not inherited
    policy, processor, *_ = train_small.load(loop_config(mini))
    n = 1500
    torch.manual_seed(0)
    roll = train_small.rollout(policy, processor, [toy_env.make_problem(0)] * n, 1, temperature=0.7)
    expected = n * loop_log_probs(policy, loop_prefix(roll, 0, 0), 0.7).exp()
    counts, often = torch.bincount(roll.ids[:, 0], minlength=len(expected)), expected >= 5
    observed, expected = (torch.cat([x[often], x[~often].sum()[None]]) for x in (counts, expected))
    freedom, chi2 = int(often.sum()), ((observed - expected) ** 2 / expected).sum()
    assert freedom > 20 and chi2 < freedom + 5 * math.sqrt(2 * freedom)
    settings, generate = [], policy.generate
    policy.generate = lambda **x: settings.append(x["generation_config"]) or generate(**x)
    for mode in dict(temperature=0.7), dict(temperature=0.6, top_p=0.95), dict(greedy=True):
        train_small.rollout(policy, processor, [toy_env.make_problem(0)], 1, **mode)
    as_told = [(x.do_sample, x.temperature, x.top_p, x.top_k) for x in settings[:2]]
    assert as_told == [(True, 0.7, 1.0, 0), (True, 0.6, 0.95, 0)]
    assert not settings[2].do_sample  # 0, as a top_k that is not given is 50


@torch.no_grad()
def test_train_image_placeholders_are_neither_sampled_nor_scored(mini):  # pitfall 19
    s = loop_state(loop_config(mini, algo="grpo"))
    image = s.processor.tokenizer.convert_tokens_to_ids("<image>")
    s.policy.lm_head.register_forward_hook(lambda module, args, out: out + 50 * torch.eye(out.shape[-1])[image])
    for greedy in (False, True):
        roll = train_small.rollout(s.policy, s.processor, s.problems, 6, greedy=greedy)
        log_probs, logits = train_small.score(s.policy, roll.inputs, roll.ids, roll.mask)
        probabilities = logits.softmax(-1)
        assert image not in roll.ids and not probabilities[..., image].any() and sapo.token_entropy(logits).isfinite().all()
        assert torch.allclose(log_probs.exp(), probabilities.gather(2, roll.ids[..., None])[..., 0], atol=1e-6)


def test_train_wrong_number_of_image_tokens_is_an_error(mini):  # pitfall 20
    policy, processor, *_ = train_small.load(loop_config(mini))
    problem = toy_env.make_problem(0)
    with pytest.raises(ValueError, match="(?i)total number of <image> tokens.* 2 <image> tokens and 1 images"):
        train_small.encode(processor, [problem.image], ["<image>" + problem.question], "cpu")
    inputs = train_small.encode(processor, [problem.image], [problem.question], "cpu")
    one_more = inputs["input_ids"][:, :1]
    with pytest.raises(ValueError, match="(?i)image features and image tokens do not match"):
        train_small.score(policy, inputs, one_more, torch.ones_like(one_more))


def test_train_take_and_full_inputs_on_packed_images():  # Qwen-VL: 4, 8 and 16 patches one after another
    grid, pixels = torch.tensor([[1, 2, 2], [1, 4, 2], [2, 2, 4]]), torch.arange(28)[:, None] * torch.ones(5)
    inputs = dict(input_ids=torch.arange(15).view(3, 5), attention_mask=torch.ones(3, 5), image_grid_thw=grid,
                  token_type_ids=torch.ones(3, 5, dtype=torch.long), pixel_values=pixels)
    taken = train_small.take(inputs, torch.tensor([2, 0]))
    assert taken["pixel_values"][:, 0].tolist() == [*range(12, 28), *range(4)]
    assert taken["input_ids"][:, 0].tolist() == [10, 0] and torch.equal(taken["image_grid_thw"], grid[[2, 0]])
    assert train_small.take(dict(pixel_values=pixels), torch.tensor([2, 0]))["pixel_values"][:, 0].tolist() == [2, 0]
    ids, mask = torch.tensor([[7, 8], [7, 9], [7, 9]]), torch.tensor([[1, 1], [1, 0], [1, 1]]).bool()
    whole = train_small.full_inputs(inputs, ids, mask)
    assert whole["input_ids"][1].tolist() == [5, 6, 7, 8, 9, 7, 9] and whole["attention_mask"][1].tolist() == [1] * 6 + [0]
    assert whole["token_type_ids"][0].tolist() == [1] * 5 + [0] * 2  # a response is text
    assert whole["pixel_values"] is pixels and whole["image_grid_thw"] is grid  # not per token, though as wide as a prompt


# ---------------------------------------------------------------------------------------------- train_small: credit

@pytest.mark.parametrize("algo, lam, lam_returns, changes", [
    ("ppo", 0.95, 0.95, {}), ("vc-ppo", 0.99, 1.0, {}), ("sapo", 0.99, 0.99, dict(lam=0.99)),
    ("sapo", 0.5, 0.5, dict(lam=0.5, value_at="last")), ("sapo", 0.5, 0.5, dict(lam=0.5, ratio="token", kl_coef=0.5))])
def test_train_credit_with_a_critic_is_a_loop_over_segments(mini, algo, lam, lam_returns, changes):
    config, roll, scored, rewards, lengths = loop_case(mini, algo=algo, **changes)
    credit = train_small.assign_credit(config, None, None, roll, scored, rewards)
    for i, n in enumerate(lengths):
        uncertain = sorted(range(n), key=lambda t: -scored.entropy[i, t])[: math.ceil(0.3 * n)]
        ends = sorted({n - 1, *(uncertain if algo == "sapo" else range(n))})
        segments = [range(a, b + 1) for a, b in zip([0, *(t + 1 for t in ends)], ends)]
        reward = (-config.kl_coef * (scored.log_probs - scored.ref_log_probs)[i, :n]).tolist()
        reward[-1] += float(rewards[i])
        advantage = to_go = v_next = 0.0
        for z in reversed(segments):  # gamma = 1
            v = float(scored.values[i, z[-1] if config.value_at == "last" else z[0]])
            delta = sum(reward[t] for t in z) + v_next - v
            advantage, to_go, v_next = delta + lam * advantage, delta + lam_returns * to_go, v
            assert torch.allclose(credit.advantages[i, z], torch.tensor(advantage), atol=1e-5)
            assert torch.allclose(credit.returns[i, z], torch.tensor(to_go + v), atol=1e-5)
            assert credit.value_mask[i, z].tolist() == [t == (z[-1] if config.value_at == "last" else z[0]) for t in z]
        assert credit.ends[i].nonzero()[:, 0].tolist() == (list(range(n)) if config.ratio == "token" else ends)
    assert config.kl_coef == changes.get("kl_coef", 0.001)  # Table 7
    white = train_small.assign_credit(train_small.replace(config, whiten=True), None, None, roll, scored, rewards)
    inside = credit.advantages[roll.mask]
    assert torch.allclose(white.advantages[roll.mask], (inside - inside.mean()) / inside.std(correction=0), atol=1e-4)


@pytest.mark.parametrize("algo", ["grpo", "gspo"])
def test_train_credit_of_groups_is_constant_in_a_response(mini, algo):
    config, roll, scored, rewards, lengths = loop_case(mini, algo=algo)
    rewards[:2] = 0  # so that the groups differ
    credit = train_small.assign_credit(config, None, None, roll, scored, rewards)
    for i, n in enumerate(lengths):
        group = rewards[i // 8 * 8 :][:8].tolist()
        expected = (float(rewards[i]) - statistics.mean(group)) / (statistics.stdev(group) + 1e-6)
        assert torch.allclose(credit.advantages[i], expected * roll.mask[i], atol=1e-4)
        assert credit.ends[i].nonzero()[:, 0].tolist() == ([n - 1] if algo == "gspo" else list(range(n)))
    new = scored.log_probs + 1e-3  # beyond GSPO's clip, and within GRPO's
    _, info = train_small.policy_objective(config, new, scored, credit, roll.mask)
    assert float(info["clip_fraction"]) == (pytest.approx(float((rewards > 0).float().mean())) if algo == "gspo" else 0)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, dict(contrast="blind"), dict(sign_aware=True, micro_batch=3)])
def test_train_srpo_weighs_tokens_by_what_the_policy_loses(mini, changes):
    config, roll, _, rewards, lengths = loop_case(mini, algo="srpo", temperature=0.7, corruption="blank", **changes)
    policy, processor, *_ = train_small.load(config)
    scored = train_small.score_all(config, policy, None, None, roll)
    credit = train_small.assign_credit(config, policy, processor, roll, scored, rewards)
    pad = processor.tokenizer.pad_token_id
    for i in (0, 1, 9):
        A, n, text = float(srpo.group_advantages(rewards, 8)[i]), lengths[i], roll.texts[i]
        grey = srpo.corrupt_image(roll.problems[i].image, "blank")
        pixels = processor.image_processor([grey], return_tensors="pt")["pixel_values"]
        start, role = list(itertools.accumulate(map(len, roll.pieces[i]), initial=0)), {}
        for block in ("perception", "think"):  # the tokens between its tags
            a, b = text.index(f"<{block}> ") + len(block) + 3, text.index(f" </{block}>")
            role |= {t: block for t in range(n) if a <= start[t] < b}
        scores = {}
        for t in role:
            seen, other = loop_prefix(roll, i, t), loop_prefix(roll, i, t)
            if role[t] == "perception" or config.contrast == "blind":
                other["pixel_values"] = pixels
            else:
                L = other["input_ids"].shape[1] - t
                other["input_ids"][0, [L + u for u in range(t) if role.get(u) == "perception"]] = pad
            gain = loop_log_probs(policy, seen, 0.7) - loop_log_probs(policy, other, 0.7)
            scores[t] = float(gain[roll.ids[i, t]]) * (-1 if role[t] == "think" and config.contrast == "blind" else 1)
        centre, sign = statistics.mean(scores.values()), math.copysign(1, A) if config.sign_aware else 1
        weight = {t: min(1.5, max(0.5, math.exp(sign * (x - centre)))) for t, x in scores.items()}
        expected = [A * weight.get(t, scale := statistics.mean(weight.values())) / scale for t in range(n)]
        assert torch.allclose(credit.advantages[i, :n], torch.tensor(expected), atol=1e-3)
        assert abs(credit.advantages[i, list(role)].mean() - A) < 1e-4 and statistics.stdev(weight.values()) > 1e-3
    assert (credit.advantages.sign() == (rewards - 0.5).sign()[:, None])[roll.mask].all()  # of a token: its response's


def test_train_segments_end_where_the_text_says(mini):
    config, roll, scored, _, lengths = loop_case(mini)

    def texts(strategy):
        ends = train_small.segment_ends(train_small.replace(config, segments=strategy), roll, scored)
        for row, pieces in zip(ends.tolist(), roll.pieces):
            cuts = [t + 1 for t, end in enumerate(row) if end]
            yield ["".join(pieces[a:b]) for a, b in zip([0, *cuts], cuts)]

    assert list(texts("newline")) == [text.splitlines(keepends=True) for text in roll.texts]
    after = re.compile(r"(?<=\n)|(?<=, )|(?<=</perception> )|(?<=</think> )|(?<=</answer>)")
    assert list(texts("step")) == [after.split(text) for text in roll.texts]  # the last is "", the end of sequence
    for pieces, log_probs, n, found in zip(roll.pieces, scored.log_probs, lengths, texts("probability")):
        cuts = sorted({n, *(t + 1 for t in [t for t in range(n) if math.exp(log_probs[t]) < 0.9][4::5])})
        assert found == ["".join(pieces[a:b]) for a, b in zip([0, *cuts], cuts)]


# ---------------------------------------------------------------------------------------------- train_small: update

@pytest.mark.parametrize("algo", ["sapo", "ppo", "grpo", "gspo", "srpo"])
def test_train_ratio_is_one_before_the_first_step(mini, algo):  # pitfall 1; the miniature is saved with dropout
    s = loop_state(loop_config(mini, algo=algo, temperature=0.7))
    info, *changes = loop_update(s, torch.optim.Adam, lr=0.0, epochs=2, micro_batch=3)
    assert info["max_ratio_deviation"] < 1e-5 and info["clip_fraction"] == 0 and info["grad_norm"] > 0
    assert abs(info["kl_k1"]) < 1e-6 and abs(info["kl_k3"]) < 1e-6
    assert info["kl_ref"] < 1e-6 if algo in ("grpo", "srpo") else "kl_ref" not in info  # theirs is in the loss
    assert not any(change.any() for model in changes for change in model.values())
    assert len(set(s.roll.mask.sum(1).tolist())) > 2  # ragged


@pytest.mark.parametrize("algo", ["sapo", "srpo", "gspo"])
def test_train_micro_batches_change_no_gradient(mini, algo):  # pitfall 11, on ragged responses
    s = loop_state(loop_config(mini, algo=algo))
    (_, *whole), (_, *pieces) = loop_update(s), loop_update(s, micro_batch=3)
    for one, other in zip(whole, pieces):
        assert max(float((one[name] - other[name]).abs().max()) for name in one) < 5e-6
        assert max(float(change.abs().max()) for change in one.values()) > 1e-3
    loud = s.credit._replace(advantages=1e4 * s.credit.advantages)
    info, change, *_ = loop_update(s, credit=loud, mini_batches=1)
    assert info["grad_norm"] > 1 and abs(sum(float(x.square().sum()) for x in change.values()) - 1) < 1e-3  # clipped


def test_train_epochs_shuffle_and_begin_without_gradient(mini):
    s = loop_state(loop_config(mini, algo="ppo", mini_batches=1))
    once, thrice = (loop_update(s, lr=0.0, epochs=n)[0]["grad_norm"] for n in (1, 3))
    assert once == pytest.approx(thrice, rel=1e-3)  # nothing is left over from the step before
    first, second, pieces = (loop_update(s, epochs=n, micro_batch=m)[0]["max_ratio_deviation"]
                             for n, m in ((1, 0), (2, 0), (2, 5)))
    assert first < 1e-5 and 1e-3 < second == pytest.approx(pieces, rel=1e-3)
    one, other = (loop_update(s, mini_batches=2, seed=seed)[1] for seed in (0, 1))
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_train_equal_rewards_teach_nothing(mini, tmp_path, reward):  # pitfall 13
    for algo in ("grpo", "gspo", "srpo"):
        s = loop_state(loop_config(mini, algo=algo, kl_coef=0.0), torch.full((16,), reward))
        info, change = loop_update(s, torch.optim.Adam, lr=1e-3)
        assert info["grad_norm"] == 0 and not any(x.any() for x in change.values())
        assert all(map(math.isfinite, info.values()))
    s = loop_state(loop_config(mini), torch.full((16,), reward))
    assert all(map(math.isfinite, loop_update(s)[0].values()))
    config = loop_config(mini, algo="grpo", kl_coef=0.0, out=str(tmp_path), lr=1.0)  # the miniature is never right
    trained, start = train_small.train(config)[0], train_small.load(config)[0]
    assert all(torch.equal(p, q) for p, q in zip(trained.parameters(), start.parameters()))


@pytest.mark.parametrize("algo", ["sapo", "grpo"])
def test_train_one_update_moves_every_weight_but_the_reference(mini, algo):  # pitfall 18
    s = loop_state(loop_config(mini, algo=algo))
    before = copy.deepcopy(s.reference.state_dict())
    info, *changes = loop_update(s)
    still = {re.sub(r".*?(\w+\.\w+)$", r"\1", name) for change in changes for name, x in change.items() if not x.any()}
    # SigLIP's last norm comes after the features that LLaVA takes; a bias of keys cancels in the softmax
    assert still <= {"post_layernorm.weight", "post_layernorm.bias", "k_proj.bias"}
    assert info["grad_norm"] > 0 and all(torch.equal(x, before[name]) for name, x in s.reference.state_dict().items())
    assert not any(p.requires_grad for p in s.reference.parameters())
    for other in [s.reference] + [s.critic] * (s.critic is not None):  # copies, which share no storage
        assert not {p.data_ptr() for p in s.policy.parameters()} & {p.data_ptr() for p in other.parameters()}
    _, *changes = loop_update(s, learn_policy=False)  # critic warm-up
    assert [any(x.any() for x in change.values()) for change in changes] == [False, True][: len(changes)]


# ----------------------------------------------------------------------------------------- train_small: diagnostics

def test_train_explained_variance_matches_loop():
    g = torch.Generator().manual_seed(0)
    values, marks = torch.rand(9, 7, generator=g), torch.rand(9, 7, generator=g) > 0.4
    rewards = torch.tensor([1.0, 0, 0] * 3)
    marks[:, 2] = True
    rows = [[(float(r), float(v)) for v, m in zip(*x) if m] for r, *x in zip(rewards, values, marks)]
    variance = statistics.pvariance
    expected = [1 - variance([r - v for r, v in pairs]) / variance([r for r, _ in pairs])
                for pairs in ([pair for row in rows for pair in row], [row[-1] for row in rows])]
    assert list(train_small.explained_variance(values, rewards, marks)) == pytest.approx(expected, abs=1e-5)
    for flat in (values, torch.zeros(9, 7)):  # nothing to explain
        assert all(map(math.isnan, train_small.explained_variance(flat, torch.ones(9), marks)))


def test_train_blame_is_the_auroc_of_the_slip():
    roll = loop_spoken(*loop_demonstrations(64, operands=4))
    noise, found = torch.rand(roll.mask.shape, generator=torch.Generator().manual_seed(0)), []
    for p, text, pieces, a in zip(roll.problems, roll.texts, roll.pieces, noise.tolist()):
        judged = toy_env.statements(p, text)
        owner = [t for t, piece in enumerate(pieces) for _ in piece]  # character → token
        tokens = [set(owner[s.start : s.end]) for s in judged]
        false = [k for k, s in enumerate(judged) if not s.true]
        blame = lambda advantages: train_small.blame(p, text, pieces, advantages)
        if len(false) != 1 or toy_env.reward(p, text) == 1:
            assert blame(a) is None
            continue
        low = [-float(t in tokens[false[0]]) for t in range(len(pieces))]
        assert (blame(low), blame([0.3] * len(low)), blame([-x for x in low])) == (1.0, 0.5, 0.0)
        averages = [statistics.fmean(a[t] for t in z) for z in tokens]
        guilty = averages.pop(false[0])
        found.append(statistics.fmean(x > guilty for x in averages))
        assert blame(a) == pytest.approx(found[-1])
    assert len(found) > 10 and train_small.blame_auroc(roll, noise) == pytest.approx(statistics.fmean(found))
    assert math.isnan(train_small.blame_auroc(loop_spoken(*loop_demonstrations(8, misread=0.0)), noise[:8]))


def test_train_metrics_of_an_iteration_match_loops(mini, monkeypatch):
    config, roll, scored, rewards, lengths = loop_case(mini)
    credit = train_small.assign_credit(config, None, None, roll, scored, rewards)
    row = train_small.describe(roll._replace(truncated=torch.arange(16) < 4), scored, credit, rewards)
    over_tokens = lambda x: statistics.fmean(float(x[i, t]) for i, n in enumerate(lengths) for t in range(n))
    borders = [{n - 1, *sorted(range(n), key=lambda t: -x[t])[: math.ceil(0.3 * n)]}
               for n, x in zip(lengths, scored.entropy)]
    faithful, right, read = (statistics.fmean(map(f, roll.problems, roll.texts))
                             for f in (toy_env.faithful, toy_env.reward, toy_env.perception))
    expected = dict(
        entropy=over_tokens(scored.entropy), kl=over_tokens(scored.log_probs - scored.ref_log_probs), reward=0.5,
        segments_per_response=statistics.fmean(map(len, borders)), response_length=statistics.fmean(lengths),
        truncated=0.25, faithful=faithful)
    assert {k: row[k] for k in expected} == pytest.approx(expected, abs=1e-5)

    modes = []
    monkeypatch.setattr(train_small, "rollout", lambda *args, **mode: modes.append(mode) or roll)
    result, _ = train_small.evaluate(config, None, None, roll.problems)
    accuracies = dict.fromkeys(["accuracy_greedy", "accuracy_sampled", "accuracy_paper"], right)
    assert result == pytest.approx(accuracies | dict(faithful_sampled=faithful, perception_sampled=read))
    assert 0 < right < 1 and 0 < read < 1
    assert sorted(modes, key=len) == [{}, dict(greedy=True), dict(temperature=0.6, top_p=0.95)]

    problem, wrong = next((p, t) for p, t in zip(roll.problems, roll.texts) if toy_env.first_error(p, t))
    error, shown = toy_env.first_error(problem, wrong), train_small.marked(problem, wrong, colour=False)
    assert shown == f"{wrong[: error.start]}»{wrong[error.start : error.end]}«{wrong[error.end :]}"


# -------------------------------------------------------------------------------------------- train_small: the whole

@pytest.mark.parametrize("algo", ALGOS)
def test_train_every_algorithm_runs(mini, tmp_path, coin, algo):
    config, asked = loop_config(mini, algo=algo, out=str(tmp_path), mini_batches=1, critic_warmup=1), []
    hook = lambda i, policy, critic, roll, scored, credit: asked.extend(roll.problems) or dict(mine=i)
    policy, _, _, history, (before, after) = train_small.train(config, hook)
    rows = loop_lines(tmp_path)
    numbers = [(r["iteration"], r["responses"], r.get("mine")) for r in rows]
    assert rows == history and numbers == [(0, 0, None), (1, 16, 1), (2, 32, 2)]
    assert all(v is None or math.isfinite(v) for row in rows for v in row.values()) and rows[2]["grad_norm"] > 0
    assert {"reward", "entropy", "clip_fraction", "max_ratio_deviation", "accuracy_greedy"} <= rows[2].keys()
    critic = algo in ("sapo", "ppo", "vc-ppo")
    assert ("kl" in rows[2], "value_loss" in rows[2], "grad_norm" not in rows[1]) == (algo != "gspo", critic, critic)
    group = 1 if critic else 8
    assert [p.question for p in asked] == [p.question for p in asked[::group] for _ in range(group)]
    assert len({id(p) for p in asked}) == 32 // group
    assert before.problems == after.problems == toy_env.make_problems(4, split="eval", **train_small.difficulty(config))
    assert not torch.equal(policy.lm_head.weight, train_small.load(config)[0].lm_head.weight)


def test_train_same_seed_same_metrics_and_evaluating_changes_nothing(mini, tmp_path, coin, monkeypatch):
    rates, runs, held_out, update = [], [], [], train_small.update
    note = lambda optimizers: rates.append([group["lr"] for _, o in optimizers for group in o.param_groups])
    monkeypatch.setattr(train_small, "update", lambda *args, **more: note(args[3]) or update(*args, **more))
    for i, changes in enumerate([dict(), dict(), dict(eval_every=3), dict(seed=1)]):
        changes |= dict(out=str(tmp_path / str(i)), iterations=4, critic_warmup=1, lr=3e-3, critic_lr=1e-3)
        config = loop_config(mini, **changes)
        held_out.append(train_small.train(config)[-1][0].texts)
        runs.append([{k: v for k, v in row.items() if k != "seconds"} for row in loop_lines(tmp_path / str(i))])
    assert runs[0] == runs[1] and "accuracy_paper" in runs[0][1] and "accuracy_paper" not in runs[2][1]
    rarely = [{k: v for k, v in row.items() if k in short} for row, short in zip(runs[0], runs[2])]
    assert rarely == runs[2] and runs[3][1]["entropy"] != runs[0][1]["entropy"] and held_out[3] == held_out[0]
    assert not {"grad_norm", "clip_fraction"} & runs[0][1].keys() and runs[0][2]["grad_norm"] > 0  # critic_warmup=1
    problems = [next(train_small.problem_stream(loop_config(mini, seed=seed))) for seed in (0, 0, 1)]
    assert problems[0] == problems[1] != problems[2]
    assert rates[:4] == [pytest.approx([3e-3 * x, 1e-3, 2e-3]) for x in (1, 1, 2 / 3, 1 / 3)]  # policy, critic, its head


def test_train_on_a_dataset_and_save(mini, tmp_path, monkeypatch, capsys, coin):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = toy_env.make_dataset(24, operands=2)
    for name, table in (("data", rows), ("bad", rows.rename_column("answer", "solution"))):
        (tmp_path / name).mkdir()
        table.to_parquet(tmp_path / name / "train.parquet")
    runs, train = [], train_small.train
    monkeypatch.setattr(train_small, "train", lambda config: runs.append(train(config)) or runs[0])
    options = SMALL | dict(model=mini, dataset=tmp_path / "data", out=tmp_path / "run", eval_problems=2)
    monkeypatch.setattr(sys, "argv", ["", "--save", *(f"--{k.replace('_', '-')}={v}" for k, v in options.items())])
    train_small.main()
    metrics = loop_lines(tmp_path / "run")
    assert len(metrics) == 3 and metrics[2]["grad_norm"] > 0 and "faithful" not in metrics[2]
    with Image.open(tmp_path / "run" / "curves.png") as curves:
        assert curves.format == "PNG" and "accuracy_greedy" in capsys.readouterr().out

    (policy, processor, critic, *_), saved = runs[0], tmp_path / "run" / "model"
    model = transformers.AutoModelForImageTextToText.from_pretrained(saved)
    both = processor, transformers.AutoProcessor.from_pretrained(saved)
    inputs, same = (train_small.encode(x, rows["image"][:2], rows["question"][:2], "cpu") for x in both)
    assert inputs.keys() == same.keys() and all(torch.equal(x, inputs[k]) for k, x in same.items())
    assert torch.equal(model.eval()(**same).logits, policy(**inputs).logits)
    assert all(torch.equal(x, critic.state_dict()[k]) for k, x in torch.load(tmp_path / "run" / "critic.pt").items())

    key = lambda p: (p.question, p.answer, p.image.tobytes())
    config = loop_config(mini, dataset=str(tmp_path / "data"), eval_problems=6)
    held_out, again = ({key(p) for p in train_small.eval_problems(train_small.replace(config, seed=i))} for i in (0, 1))
    drawn = {key(p) for p in itertools.islice(train_small.problem_stream(config), 36)}  # two passes
    assert held_out == again and len(held_out) == 6 and not held_out & drawn
    assert held_out | drawn == {key(p) for p in toy_env.make_problems(24, operands=2)}
    with pytest.raises(ValueError, match="expected a column 'answer'"):
        train_small.train(loop_config(mini, dataset=str(tmp_path / "bad"), out=str(tmp_path / "none")))


@pytest.mark.parametrize("changes, message", [
    (dict(algo="nonsense"), "nonsense"), (dict(algo="grpo", responses=20), "responses=20"),
    (dict(responses=15), "responses=15"), (dict(operands=1), "operands=1"), (dict(operands=9), "operands=9"),
    (dict(distractors=8), "distractors=8"), (dict(operators="/"), "operators='/'"),
    (dict(critic_warmup=-1), "critic_warmup=-1"), (dict(iterations=5), "critic_warmup=5: .*5 iterations"),
    *(({name: 0}, f"{name}=0") for name in (
        "iterations", "responses", "mini_batches", "epochs", "eval_every", "eval_problems", "temperature"))])
def test_train_bad_settings_stop_before_any_work(tmp_path, monkeypatch, capsys, changes, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        train_small.train(train_small.Config(model="no such model", **changes))
    monkeypatch.setattr(sys, "argv", ["", *(f"--{k.replace('_', '-')}={v}" for k, v in changes.items())])
    with pytest.raises(SystemExit) as stop:
        train_small.main()
    assert stop.value.code != 0 and re.search(message, str(stop.value.code) + capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_train_command_line(monkeypatch, capsys):
    for arguments, code, words in ("--algo nonsense", 2, "invalid choice: 'nonsense'"), ("--help", 0, "--critic-warmup"):
        monkeypatch.setattr(sys, "argv", ["train_small.py", *arguments.split()])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(train_small.__file__, run_name="__main__")
        assert stop.value.code == code and words in "".join(capsys.readouterr())
    assert train_small.parse_arguments([]) == train_small.Config()
    some = train_small.parse_arguments("--algo srpo --lr 1e-3 --whiten --kl-coef 0 --max-tokens 9".split())
    assert some == train_small.Config(algo="srpo", lr=1e-3, whiten=True, kl_coef=0.0, max_tokens=9)
    assert train_small.complete(some).kl_coef == 0  # 0 is not None


def test_train_bench_times_every_phase(mini, capsys):
    seconds = train_small.bench(loop_config(mini, max_tokens=8), repeats=1)
    assert {"sampling", "rewards", "update"} <= seconds.keys() and min(seconds.values()) > 0
    assert "responses/s" in capsys.readouterr().out


def test_train_the_shipped_model_learns(tmp_path, monkeypatch, capsys):
    command = f"""--iterations 9 --critic-warmup 2 --lr 3e-4 --critic-lr 3e-4 --operands 2 --distractors 1 --eval-every 9
                  --eval-problems 64 --device cpu --out {tmp_path}"""
    monkeypatch.setattr(sys, "argv", ["", *command.split()])
    train_small.main()
    rows = loop_lines(tmp_path)
    assert set("""iteration responses seconds reward faithful entropy response_length truncated value_loss explained_variance
                  blame_auroc clip_fraction kl max_ratio_deviation segments_per_response grad_norm accuracy_greedy
                  accuracy_sampled accuracy_paper""".split()) <= rows[-1].keys()
    rewards, explained = ([row[name] for row in rows[1:]] for name in ("reward", "explained_variance"))
    assert statistics.fmean(rewards[-2:]) > statistics.fmean(rewards[:3]) + 0.15, rewards  # three by the base model
    assert rows[-1]["accuracy_greedy"] > rows[0]["accuracy_greedy"] + 0.05
    assert abs(explained[0]) < 1e-6 and statistics.fmean(explained[1:4]) > 0.05, explained  # the critic's head starts at 0
    assert (tmp_path / "curves.png").stat().st_size > 10_000 and "before   after" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------- tiny_vlm/make.py

def test_make_tokenizer_round_trips_all_there_is_to_say():
    tokenizer, rng = make.make_processor().tokenizer, random.Random(0)
    for operands, seed in itertools.product(range(2, 9), range(40)):
        level = dict(operands=operands, operators=("+-", "+-×")[seed % 2], high=(9, 99)[seed // 2 % 2])
        problem = toy_env.make_problem(seed, **level)
        for text in (toy_env.demonstration(problem, rng, **dict.fromkeys(make.TEACHER, 0.3)), problem.question):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids) == text == "".join(map(tokenizer.decode, ids)) and tokenizer.unk_token_id not in ids


def test_make_labels_say_whether_all_statements_so_far_are_true(monkeypatch):
    problems, faulty, draw = [], 0, toy_env.make_problem
    monkeypatch.setattr(toy_env, "make_problem", lambda *a, **k: problems.append(draw(*a, **k)) or problems[-1])
    processor = make.make_processor()
    inputs, ids, mask, true_so_far = make.batch(processor, random.Random(0), 40, operands=3)
    for problem, n, tokens, labels in zip(problems, mask.sum(1).tolist(), ids.tolist(), true_so_far.tolist()):
        pieces = [processor.tokenizer.decode([t], skip_special_tokens=True) for t in tokens[:n]]
        false = [s.end for s in toy_env.statements(problem, "".join(pieces)) if not s.true]
        assert labels[:n] == [all(end < f for f in false) for end in itertools.accumulate(map(len, pieces))]
        assert tokens[n - 1] == processor.tokenizer.eos_token_id
        faulty += bool(false)
    assert len(problems) == 40 and 0 < faulty < 40 and inputs["pixel_values"].shape == (40, 3, 48, 48)


def test_make_writes_a_model_that_loads_and_its_card(tmp_path, monkeypatch):
    full = make.make_model
    monkeypatch.setattr(make, "make_model", lambda tokenizer: full(tokenizer, width=32, layers=1, vision_layers=1))
    make.main(f"--out {tmp_path} --steps 30 --vision-steps 3 --card-problems 2 --device cpu".split())
    policy, processor, *_ = train_small.load(loop_config(tmp_path))
    inputs, ids, mask, _ = make.batch(processor, random.Random(1), 32, operands=3)
    with torch.no_grad():
        imitation = -train_small.score(policy, inputs, ids, mask.bool())[0][mask == 1].mean()
    assert imitation < 3.95  # 4.2 before; it predicts the token that comes next
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"{policy.num_parameters():,} parameters" in card and "--steps 30" in card and not re.search(r"{\w*}", card)
    assert len(re.findall(r"^\| [2-8] \| (?:greedy|T = 1) \|(?: [01]\.\d{3} \|){6}$", card, re.M)) == 14


# ------------------------------------------------------------------------------------------------ results/, README

@pytest.fixture
def slipped():
    """A rollout of one wrong response with one false statement, 3 + 7 = 11, and its problem."""
    cells = tuple(toy_env.Cell(0, i, c, n) for i, (c, n) in enumerate([("red", 3), ("blue", 7), ("green", 5)]))
    steps = toy_env.Step(3, "+", "blue", 7, 10), toy_env.Step(10, "-", "green", 5, 5)
    problem = toy_env.Problem(None, "red + blue - green = ?", "5", cells, steps)
    text = ("<perception> red 3, blue 7, green 5 </perception> <think> red 3 + blue 7 = 11\n11 - green 5 = 6 </think> "
            "<answer> 6 </answer>")
    pieces = re.findall(r"\d|[^\d]+", text)
    assert "".join(pieces) == text
    mask = torch.ones(1, len(pieces), dtype=torch.bool)
    roll = train_small.Rollout([problem], {}, mask.long(), mask, ~mask[:, 0], [pieces], [text])
    return roll, {name: [i for i, p in enumerate(pieces) if p.isdigit()][k] for k, name in
                  enumerate(["red", "blue", "green", "a", "b", "tens", "ones", "c", "d", "e", "result", "answer"])}


def test_credit_finds_the_tokens_of_statements_and_blame_by_enumeration(slipped):
    roll, at = slipped
    (row, stated, false), = credit.slips(roll, torch.zeros(1))
    assert credit.tokens_of(false, roll.pieces[0]) == [at["tens"], at["ones"]]
    assert not list(credit.slips(roll, torch.ones(1)))                         # a lucky response is not wrong
    advantages = torch.zeros(roll.mask.shape)
    assert credit.blame(roll, torch.zeros(1), advantages) == dict(
        auroc_tokens=[0.5], auroc_statements=[0.5], top1_statements=[1 / len(stated)])
    advantages[0, at["tens"]] = advantages[0, at["ones"]] = -1.0
    assert credit.blame(roll, torch.zeros(1), advantages) == dict(
        auroc_tokens=[1.0], auroc_statements=[1.0], top1_statements=[1.0])
    advantages[0, at["answer"]] = -2.0                                         # now the answer is blamed most
    found = credit.blame(roll, torch.zeros(1), advantages)
    n, others = len(roll.pieces[0]), len(stated) - 1
    assert found["auroc_tokens"] == [pytest.approx(1 - 1 / (n - 2))] and found["top1_statements"] == [0.0]
    assert found["auroc_statements"] == [pytest.approx(1 - 1 / others)]


def test_credit_borders_and_roles_by_hand(slipped):
    roll, at = slipped
    ends = torch.zeros_like(roll.mask)
    ends[0, [at["red"], at["tens"], at["c"], -1]] = True                       # the last end is given: 2 of 3 are right
    decisions = {at[k] for k in ("red", "blue", "green", "tens", "ones", "result")}
    assert credit.border_quality(roll, ends) == dict(precision=2 / 3, recall=2 / len(decisions))
    rng = torch.Generator().manual_seed(0)
    mask = batch(B=50, T=13).mask
    ends = sapo.ends_by_entropy(torch.rand(50, 13), mask)
    drawn = torch.stack([credit.random_ends(ends, mask, rng) for _ in range(200)])
    assert (drawn.sum(2) == ends.sum(1)).all() and not (drawn & ~mask).any() and (drawn & sapo.ends_once(mask)).any(2).all()
    inner = mask & ~sapo.ends_once(mask)
    expected = ((ends.sum(1) - 1) / inner.sum(1).clamp(min=1))[:, None].expand_as(mask)
    assert ((drawn.float().mean(0) - expected)[inner].abs() < 0.17).all()      # uniform: 5 standard errors
    weights = torch.arange(float(roll.mask.shape[1]))[None]
    copied = [at[k] for k in ("a", "b", "c", "d", "e")]
    assert credit.weights_by_kind(roll, None, weights) == {
        "true reading": statistics.fmean(at[k] for k in ("red", "blue", "green")), "computed": at["result"],
        "copied": statistics.fmean(copied), "false result": (at["tens"] + at["ones"]) / 2}


def test_credit_value_error_is_freed_of_sampling_noise():
    g = torch.Generator().manual_seed(0)
    truth = torch.rand(4000, generator=g, dtype=torch.float64)
    mc = torch.bernoulli(truth.expand(credit.CONTINUATIONS, -1), generator=g).mean(0)
    v = truth + 0.1 + 0.2 * torch.randn(4000, generator=g, dtype=torch.float64)
    found = credit.value_errors([(m, {"critic": x}) for m, x in zip(mc.tolist(), v.tolist())], "critic")
    assert found["value_error"] == pytest.approx(0.1**2 + 0.2**2, abs=0.003)
    assert found["value_bias"] == pytest.approx(0.1, abs=0.02)
    assert found["value_ev"] == pytest.approx(1 - 0.2**2 * 12, abs=0.04)       # a uniform's variance is 1 / 12


def test_credit_monte_carlo_of_a_finished_answer_is_its_outcome():
    config = train_small.complete(train_small.Config(operands=2, device="cpu"))
    policy, processor, *_ = train_small.load(config)
    torch.manual_seed(0)
    problems = toy_env.make_problems(12, operands=2)
    roll = train_small.rollout(policy, processor, problems, config.max_tokens)
    rewards, lengths = roll.rewards().tolist(), roll.mask.sum(1).tolist()
    for outcome in (0.0, 1.0):
        row = rewards.index(outcome)
        values = [credit.monte_carlo(policy, processor, roll, row, t, config.max_tokens) for t in (0, lengths[row] - 2)]
        assert values[1] == pytest.approx(outcome, abs=0.05) and abs(values[0] - outcome) > 0.02


def test_study_stores_a_run_and_never_repeats_it(tmp_path, monkeypatch, mini):
    monkeypatch.setattr(study, "HERE", tmp_path)
    options = dict(SMALL, algo="sapo", model=str(mini), seed=0, iterations=2, critic_warmup=1)
    options.pop("out", None)
    monkeypatch.setattr(study, "command", lambda options: "python train_small.py --tiny")
    first = study.run(options)
    monkeypatch.setattr(train_small, "train", None)                            # would fail if called
    assert study.run(options) == first and len(first["history"]) == 3
    assert {f"lift_{q}" for q in study.QUANTILES} <= set(first["history"][-1])
    assert first["row"]["accuracy_sampled"] == first["history"][-1]["accuracy_sampled"]


def test_study_cells_and_intervals():
    assert study.cell(["0.5", "", "0.7"]) == "2 of 3 runs" and study.cell(["", ""]) == "–" and study.cell([0.0]) == "0.000"
    assert study.cell(["19", "71"]) == "45 (19–71)" and study.cell(["71", "71"]) == "71"
    assert study.means([{}, {"lift_0.5": None}, {"lift_0.5": 1.0}, {"lift_0.5": 2.0}], ("lift_0.5", "kl")) == {"lift_0.5": 1.5}
    mean, low, high = study.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    draws = sorted(statistics.fmean(x) for x in itertools.product([1.0, 2.0, 3.0, 4.0, 5.0], repeat=5))
    assert mean == 3.0 and low == pytest.approx(draws[int(0.025 * 5**5)], abs=0.21)
    assert high == pytest.approx(draws[int(0.975 * 5**5)], abs=0.21)


def test_study_draws_the_end_of_training_and_leaves_out_what_is_missing(monkeypatch):
    figures, (_, methods, _, _, metrics, _) = [], study.STUDIES["figure5"]
    monkeypatch.setattr(study, "finish", lambda figure, name: figures.append(figure))
    groups = {label: [dict.fromkeys(metrics, x + i) for x in (0.25, 0.75)] for i, label in enumerate(methods)}
    groups["5 %"][0]["blame_auroc"] = groups["20 %"][0]["blame_auroc"] = groups["20 %"][1]["blame_auroc"] = None
    study.outcomes("figure5", groups)
    first, *_, blamed = (axis.lines[0] for axis in figures[0].axes)
    assert list(first.get_xdata()) == [5, 10, 20, 30, 50, 100] and list(first.get_ydata()) == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]
    assert list(blamed.get_xdata()) == [5, 10, 30, 50, 100] and list(blamed.get_ydata()) == [0.75, 1.5, 3.5, 4.5, 5.5]


def test_study_counts_right_answers_with_a_false_statement_by_kind(slipped):
    roll, _ = slipped
    said = "<perception> {} </perception> <think> {}\n10 - green 5 = 5 </think> <answer> 5 </answer>".format
    texts = [said("red 3, blue 7, green 5", "red 3 + blue 7 = 10"), said("red 8, blue 7, green 5", "red 3 + blue 7 = 10"),
             said("red 8, blue 7, green 5", "red 8 + blue 7 = 10"), said("red 3, blue 7, green 5", "red 3 + blue 8 = 10"),
             *roll.texts]
    roll = roll._replace(problems=roll.problems * 5, texts=texts, mask=roll.mask.expand(5, -1), truncated=torch.zeros(5) > 0)
    assert study.lucky_by_kind(roll) == dict(lucky_reading=0.4, lucky_operand=0.2, lucky_result=0.0)


def test_study_reports_each_method_at_its_best_rate():
    rows = [r["row"] for r in map(json.loads, (p.read_text() for p in (study.HERE / "runs").glob("*.json"))) if "row" in r]
    for algo, best in study.BEST.items():
        jobs = {lr: study.command(dict(study.setting(algo, lr=lr), seed=0)) for lr in study.RATES}
        found = {lr: r["accuracy_paper"] for lr, job in jobs.items() for r in rows if r["command"] == job}
        assert len(found) == len(study.RATES) and found[best] == max(found.values()), (algo, found)


README = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")


def test_readme_table_names_functions_that_cite_their_equation_and_tests_that_exist():
    rows = re.findall(r"^\| ([^|]+), [^|]+ \| `(\w+)\.(\w+)` \| `(\w+)` \|$", README, re.M)
    assert len(rows) >= 19
    for numbers, module, name, test in rows:
        function = getattr({"sapo": sapo, "srpo": srpo}[module], name)
        assert test in globals(), test
        cited = inspect.getdoc(function) + " " * 2 + inspect.getsource(function)
        for number in re.findall(r"\b\d+(?:\.\d+)*", numbers):
            assert re.search(rf"\b(Eq\.|Section|Table|\(S)[^.;]*(?<![\d.]){re.escape(number)}(?!\d)", cited), (name, number)
        for number in re.findall(r"\(S\d\)", numbers):
            assert number in cited


def test_readme_results_agree_with_the_csvs():
    assert study.with_results(README) == README
