"""sapo.py and srpo.py against slow loops written from their equations: `python -m pytest -q test_sapo.py`.

An oracle is a loop in plain Python, an enumeration or a derivative by hand; never the code's own output.
Three parts: SAPO, SRPO, and what holds for every function of both. Pitfalls: 23 ways to get such code wrong.
"""

import copy
import doctest
import inspect
import itertools
import math
import random
import re
import runpy
import statistics
import warnings
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageFilter
from torch.utils._python_dispatch import TorchDispatchMode

import sapo
import srpo

NAN, INF = math.nan, math.inf
pytestmark = pytest.mark.filterwarnings("ignore:fewer than half of the responses")  # batch has short ones


# ---------------------------------------------------------------------------------------- data and slow loops
def batch(B=7, T=13, seed=0, shortest=1):
    """Ragged input, named as arguments are: lengths `shortest`, T and between; entropies have ties."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.cat([torch.tensor([shortest, T]), torch.randint(shortest, T + 1, (B - 2,), generator=g)])
    mask = torch.arange(T) < lengths[:, None]
    rand = lambda: torch.rand(B, T, generator=g) * mask
    d = SimpleNamespace(mask=mask, entropy=(rand() * 9).round() / 9, values=rand(), old_values=rand(),
                        rewards=rand(), returns=rand(), advantages=(rand() - 0.5) * mask,
                        outcome=rand().sum(1), token_ids=(rand() * 5).long(), old_log_probs=-rand(),
                        ref_log_probs=-rand(), other_log_probs=-3 * rand(), contrasts=4 * rand() - 2,
                        weights=rand() + 0.5)
    d.log_probs = (d.old_log_probs + 0.8 * (rand() - 0.5)) * mask
    d.ends = (rand() > 0.6) | (torch.arange(T) == lengths[:, None] - 1)
    d.value_mask = d.ends.roll(1, 1) & mask | (torch.arange(T) == 0)      # the first token of each segment
    role = rand()
    role[0], role[1] = 0.0, 1.0                                           # no roles; only reasoning
    d.perception, d.reasoning = (0 < role) & (role < 0.4), role > 0.7
    d.logits = torch.randn(B, T, 5, generator=g)
    d.sign = torch.linspace(-1.5, 1.5, B)                                 # one of them is 0
    P, end_P, T1, end_T, A, end_A = srpo.TAGS
    d.pieces = [[P, "red", end_P, T1, "so ", "red", end_T, A, "red", end_A, *[""] * (T - 10)]] * B
    vars(d).update(gamma=0.9, lam=0.8, lam_returns=0.5, kl_coef=0.1, clip=0.1, end_ids=[2], below=0.5546,
                   every=2, quantile=0.7, jump_quantile=0.7, resamples=50, group_size=B, blank_id=3,
                   alpha=0.3, image=Image.new("L", (4, 4)))
    return d


@pytest.fixture
def d():
    return batch()


@pytest.fixture(params=["random", "every token", "once", "entropy"])
def ends(request, d):                                                     # pitfall 17: token PPO, GSPO
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


def slow_metrics(ratio, new, old, advantages, low, high):
    """What a response has to say of each of its tokens: (clipped, k1, k3, |ratio - 1|)."""
    return [(r > 1 + high if a > 0 else r < 1 - low, q - p, math.exp(p - q) - 1 - (p - q), abs(r - 1))
            for r, p, q, a in zip(ratio, new, old, advantages)]


def summed_up(metrics):
    """slow_metrics of all responses -> the metrics of a loss: means over tokens, then over responses."""
    names = "clip_fraction", "kl_step", "kl_step_k3", "mean_ratio_deviation"
    total = {name: mean([mean([t[k] for t in row]) for row in metrics]) for k, name in enumerate(names)}
    return total | {"max_ratio_deviation": max(t[3] for row in metrics for t in row)}


def grad(f, x):
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


def same(a, b, tol=2e-5):
    torch.testing.assert_close(a, b.to(a.dtype), rtol=tol, atol=tol)


# ----------------------------------------------------------------------------------- SAPO: where segments end
@pytest.mark.parametrize("shape", [(2, 5, 7), (2, 70, 3), (1, 1, 1)])     # 70 tokens: more than 32 pieces
def test_eq11_token_entropy_matches_sum(shape):
    logits = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    logits[0, 0, 0] = 50.0                                                # nearly certain: p log p -> 0
    weights = [[[math.exp(x - 50) for x in token] for token in row] for row in logits.tolist()]
    want = [[-sum(w / sum(ws) * math.log(w / sum(ws)) for w in ws) for ws in row] for row in weights]
    same(sapo.token_entropy(logits), torch.tensor(want), 2e-6)
    banned = torch.cat([logits, torch.full((*shape[:2], 4), -INF)], 2)    # pitfall 19
    padded = torch.cat([banned, torch.full((shape[0], 1, shape[2] + 4), NAN)], 1)
    same(sapo.token_entropy(padded)[:, :-1], torch.tensor(want), 2e-6)


@pytest.mark.parametrize("percent", [1, 1.1, 1.5, 7, 28, 29, 30, 33.3, 55, 57, 99, 100])
def test_sec42_ends_by_entropy_matches_loop(percent):                     # pitfall 21; with ties
    for d in (*(batch(T=25, seed=seed) for seed in range(4)), batch(B=30, T=3000)):
        got = sapo.ends_by_entropy(d.entropy, d.mask, percent)            # 1.1 % of 3000 is 33
        assert torch.equal(got, pad([slow_ends(row, percent) for row in rows(d.mask, d.entropy)], False))


def test_table3_ends_by_token_matches_loop(d):
    want = [[x in (2, 4) for x in row[:-1]] + [True] for row in rows(d.mask, d.token_ids)]
    assert torch.equal(sapo.ends_by_token(d.token_ids, d.mask, [2, 4]), pad(want, False))
    assert torch.equal(sapo.ends_by_token(d.token_ids, d.mask, torch.tensor([])), sapo.ends_once(d.mask))
    padded = d.token_ids.masked_fill(~d.mask, 4)                          # pitfall 6: padded with an end's id
    assert torch.equal(sapo.ends_by_token(padded, d.mask, [2, 4]), pad(want, False))


@pytest.mark.parametrize("below, every", [(0.9, 5), (0.6, 1), (0.5, 2)])
def test_table3_ends_by_probability_matches_loop(d, below, every):
    want = []
    for row in rows(d.mask, d.log_probs):
        low = [t for t, x in enumerate(row) if math.exp(x) < below]
        want.append([t in low[every - 1::every] or t == len(row) - 1 for t in range(len(row))])
    assert torch.equal(sapo.ends_by_probability(d.log_probs, d.mask, below, every), pad(want, False))
    half = torch.tensor([[0.5, 0.5, 1.0]]).log()                          # 0.5 is not under 0.5
    assert sapo.ends_by_probability(half, torch.ones(1, 3), 0.5, 1).tolist() == [[False, False, True]]


def test_eq5_segment_ids_match_loop(d, ends):
    want = pad([spread(range(sum(row)), row) for row in rows(d.mask, ends)], -1)
    assert torch.equal(sapo.segment_ids(ends, d.mask), want)


# ------------------------------------------------------------------------------------------- SAPO: advantages
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


def test_table7_kl_rewards_match_loop(d):                                 # pitfall 16: on the last token
    got = sapo.kl_rewards(d.outcome, d.log_probs, d.ref_log_probs, d.mask, kl_coef=0.3)
    want = [[-0.3 * (p - q) for p, q in zip(*row)] for row in rows(d.mask, d.log_probs, d.ref_log_probs)]
    for row, outcome in zip(want, d.outcome.tolist()):
        row[-1] += outcome
    same(got, pad(want))
    alone = sapo.kl_rewards(d.outcome, d.log_probs, None, d.mask, kl_coef=0.0)  # no reference
    assert torch.equal(alone, torch.where(sapo.ends_once(d.mask), d.outcome[:, None], 0.0))


def test_whiten_matches_loop_and_once_is_enough(d):                       # pitfall 14
    flat = sum(rows(d.mask, 5 + 3 * d.advantages), [])
    std = mean([(x - mean(flat)) ** 2 for x in flat]) ** 0.5
    white = sapo.whiten(5 + 3 * d.advantages, d.mask)
    assert sum(rows(d.mask, white), []) == pytest.approx([(x - mean(flat)) / std for x in flat], abs=1e-5)
    assert not white[~d.mask].any()
    same(sapo.whiten(white, d.mask), white)
    assert sapo.whiten(torch.full((2, 9), 0.1), torch.ones(2, 9)).abs().max() < 1e-2  # no noise blown up


# --------------------------------------------------------------------------------------- SAPO: ratio and loss
def test_eq8_segment_ratio_matches_loop(d, ends):
    want = pad([slow_ratio(*row) for row in rows(d.mask, d.log_probs, d.old_log_probs, ends)], 1.0)
    same(sapo.segment_ratio(d.log_probs, d.old_log_probs, ends, d.mask), want)


@pytest.mark.parametrize("tokens, want", [([50, 50], 20), ([-50, -50], -20), ([30, -10], 10)])
def test_eq8_mean_log_ratio_is_clamped(tokens, want):                     # the mean is, a token is not
    log_probs, zeros = torch.tensor([tokens]).float(), torch.zeros(1, 2)
    ratio = sapo.segment_ratio(log_probs, zeros, torch.tensor([[False, True]]), zeros + 1)
    same(ratio.log(), zeros + want, 1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_eq21_eq26_bias_of_the_ratio_is_bounded(seed):
    d = batch(seed=seed)
    ratio = sapo.segment_ratio(d.log_probs, d.old_log_probs, d.ends, d.mask)
    for r, new, old, e in rows(d.mask, ratio, d.log_probs, d.old_log_probs, d.ends):
        for b, last in cut(e):
            L, total = last - b + 1, sum(new[b:last + 1]) - sum(old[b:last + 1])
            bound = math.exp(abs(total)) * (L - 1) * abs(total / L)
            assert abs(math.exp(total) - r[b]) <= bound + 1e-5            # R_m = e^{L mu} against e^{mu}


@pytest.mark.parametrize("low, high", [(0.1, 0.05), (0.05, 0.02), (1.0, INF)])
def test_eq9_policy_loss_and_its_gradient_match_loop(d, ends, low, high):
    rest = d.old_log_probs, d.advantages, ends, d.mask
    loss, metrics = sapo.policy_loss(d.log_probs, *rest, low, high)
    want = summed_up([slow_metrics(slow_ratio(new, old, e), new, old, a, low, high) for new, old, a, e in
                      rows(d.mask, d.log_probs, d.old_log_probs, d.advantages, ends)])
    assert metrics == pytest.approx(want, abs=1e-6) and (low == 1 or 0 < want["clip_fraction"] < 1)
    same(loss, slow_loss(d.log_probs, *rest, low, high), 1e-6)
    same(grad(lambda x: sapo.policy_loss(x, *rest, low, high)[0], d.log_probs),
         grad(lambda x: slow_loss(x, *rest, low, high), d.log_probs), 1e-6)


def test_eq13_gradient_without_clip(d, ends):
    A, _, _ = sapo.segment_gae(d.rewards, d.values, ends, d.mask, 0.9, 0.8)
    got = grad(lambda x: sapo.policy_loss(x, d.old_log_probs, A, ends, d.mask, 1.0, INF)[0], d.log_probs)
    want = [[-s * a / len(e) / len(A) for s, a in zip(slow_ratio(new, old, e), advantage)]
            for new, old, advantage, e in rows(d.mask, d.log_probs, d.old_log_probs, A, ends)]
    same(got, pad(want), 1e-6)


def test_first_update_has_ratio_one_and_zero_metrics(d):                  # pitfall 1
    x = d.log_probs.clone().requires_grad_()                              # its own old_log_probs: a constant
    for loss, metrics in (sapo.policy_loss(x, x, d.advantages, d.ends, d.mask),
                          srpo.grpo_loss(x, x, d.advantages, d.mask)):
        assert len(metrics) == 5 and all(m.item() == 0 and not m.requires_grad for m in metrics.values())
        assert loss.item() == pytest.approx(-mean([*map(mean, rows(d.mask, d.advantages))]), abs=1e-6)
        assert torch.autograd.grad(loss, x)[0].abs().sum() > 0            # pitfall 18


@pytest.mark.parametrize("clip", [None, 0.0, 0.1, 0.3])
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


# ---------------------------------------------------------------------------------- SAPO: critic and evidence
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
    assert critic.to(torch.bfloat16)(response_length=5, input_ids=ids).dtype == torch.float32
    for length in (0, 6):
        with pytest.raises(ValueError, match=f"response_length is {length}: expected 1 to 5"):
            critic(response_length=length, input_ids=ids)
    critic(response_length=3, input_ids=ids).sum().backward()
    assert critic.head.weight.grad.norm() > 0                             # pitfall 18


def test_eq12_lift_and_bootstrap_match_loop():
    d = batch(B=60, T=30)
    d.values = (d.entropy.roll(1, 1) > 0.6) * 0.4 + 0.1 * d.values        # uncertain tokens tend to move V
    H, V = rows(d.mask, d.entropy), rows(d.mask, d.values)
    jumps = [[abs(x - y) for x, y in zip(v, v[1:])] for v in V]
    tenths = lambda lists: statistics.quantiles(sum(lists, []), n=10, method="inclusive")  # 10 %, 20 % ...
    a, j = tenths([h[:-1] for h in H])[6] - 1e-6, tenths(jumps)[7] - 1e-6
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
    peak = torch.tensor([[0.0, 9, 0, 0, 0]]), torch.tensor([[0.0, 0, 1, 1, 1]]), torch.ones(1, 5)
    assert sapo.lift(*peak, quantile=1, jump_quantile=1)[0] == 4          # at a quantile is above it
    assert (low, high) != sapo.lift(d.entropy, d.values, d.mask, 0.7, 0.8, seed=1)[1:]


# -------------------------------------------------------------------------------------- SRPO: group and roles
def test_srpo_group_advantages_match_a_loop_and_equal_outcomes_give_zero():
    outcome = torch.randn(12, generator=torch.Generator().manual_seed(0))
    for G in (2, 3, 4, 6, 12):
        groups = [outcome[k:k + G].tolist() for k in range(0, 12, G)]
        want = [(r - mean(group)) / (statistics.stdev(group) + 1e-6) for group in groups for r in group]
        assert srpo.group_advantages(outcome, G).tolist() == pytest.approx(want, abs=1e-5)
    tiny = srpo.group_advantages(torch.tensor([0.0, 1e-6]), 2)            # the 1e-6 of (S1)
    assert tiny.tolist() == pytest.approx([-0.5 / (0.5 ** 0.5 + 1), 0.5 / (0.5 ** 0.5 + 1)], rel=1e-5)
    A = srpo.group_advantages(torch.tensor([0.9] * 8 + [1.0] + [0.0] * 7 + [1e6 / 3] * 8 + [0.0] * 8), 8)
    assert A[:8].tolist() + A[16:].tolist() == [0.0] * 24                 # pitfall 13
    for verdicts in (torch.tensor([True, False]), torch.tensor([1, 0])):  # a verifier's bools or ints
        assert srpo.group_advantages(verdicts, 2).tolist() == pytest.approx([0.5 ** 0.5, -0.5 ** 0.5], 1e-5)


SHORT = dict(zip("P /P T /T A /A".split(), srpo.TAGS))


@pytest.mark.parametrize("pieces, roles", [
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
def test_srpo_split_roles_table(pieces, roles):
    pieces = [SHORT.get(x, x) for x in (pieces.split() if isinstance(pieces, str) else pieces)]
    mask = torch.arange(len(pieces) + 2) < len(pieces)
    for padding in ([], ["a"], ["a", "<think>"]):                         # whatever it holds, it is not read
        p, r = srpo.split_roles([pieces + padding], mask[None])
        got = "".join("P" if a else "R" if b else "-" for a, b in zip(p[0], r[0]))
        assert got == roles + "--" and not (p & r).any() and p.dtype == r.dtype == torch.bool


@pytest.mark.parametrize("slip", [("</answer>", "</answer><|im_end|>"), ("<think>", ""), ("</answer>", "")])
@pytest.mark.parametrize("slips, rest, warns", [(0, 4, False), (2, 2, False), (3, 2, True), (4, 0, True)])
def test_srpo_split_roles_warns_where_most_responses_become_grpo(slip, slips, rest, warns):
    good = "<perception> red </perception> <think> so </think> <answer> red </answer>".split()
    rows = [[piece.replace(*slip) for piece in good]] * slips + [good] * rest + [[]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        srpo.split_roles(rows, torch.tensor([[len(row)] * 9 for row in rows]) > 0)  # the last is masked out
    assert [str(w.message)[:32] for w in caught] == ["fewer than half of the responses"] * warns


# ---------------------------------------------------------------------------- SRPO: contexts to compare with
def picture(mode="RGB", seed=1):                                          # no black; no side a multiple of 14
    pixels = random.Random(seed).choices(range(50, 200), k=6100 * len(mode))
    return Image.frombytes(mode, (100, 61), bytes(pixels))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("kind", ["patches", "noise", "blur", "blank"])
def test_srpo_corrupt_image_keeps_size_and_mode_and_the_original(kind, mode):
    image, before = picture(mode), picture(mode).tobytes()
    one, two, other = [srpo.corrupt_image(image, kind, seed=seed) for seed in (3, 3, 4)]
    assert (one.mode, one.size) == (mode, image.size) and one is not image and image.tobytes() == before
    assert one.tobytes() == two.tobytes() != before
    assert (one.tobytes() != other.tobytes()) == (kind in ("patches", "noise"))
    nothing = srpo.corrupt_image(image, kind, share=0)
    assert nothing is not image and (nothing.tobytes() == before) == (kind != "blank")


@pytest.mark.parametrize("size", [14, 9])
def test_srpo_corrupt_image_patches_blacken_whole_tiles(size):
    for mode, black in (("RGB", (0, 0, 0)), ("L", 0), ("RGBA", (0, 0, 0, 255))):
        assert srpo.corrupt_image(picture(mode), share=1, patch=size).getcolors() == [(6100, black)]
    image, dark = picture(), []
    for out in [srpo.corrupt_image(image, share=0.3, patch=size, seed=seed) for seed in range(40)]:
        for x, y in itertools.product(range(0, 100, size), range(0, 61, size)):
            box = (x, y, min(x + size, 100), min(y + size, 61))
            dark.append(out.crop(box).getextrema() == ((0, 0),) * 3)
            assert dark[-1] or out.crop(box).tobytes() == image.crop(box).tobytes()
    assert abs(mean(dark) - 0.3) < 4 * math.sqrt(0.3 * 0.7 / len(dark))


def test_srpo_corrupt_image_noise_blur_blank():
    image, noise = picture(), srpo.corrupt_image(picture(), "noise", share=1.0)
    assert noise.tobytes() == srpo.corrupt_image(picture(seed=2), "noise", share=1.0).tobytes()
    part = srpo.corrupt_image(image, "noise", share=0.25).tobytes()
    assert all(abs(x - (0.75 * i + 0.25 * n)) <= 1 for x, i, n in zip(part, image.tobytes(), noise.tobytes()))
    blurred = srpo.corrupt_image(image, "blur", share=0.4)
    assert blurred.tobytes() == image.filter(ImageFilter.GaussianBlur(6.1)).tobytes()  # 0.4 x 61 / 4
    red = Image.new("RGBA", (4, 2), (200, 0, 0, 9))
    red.paste((100, 0, 0, 9), (0, 0, 2, 2))
    ((_, (r, g, b, a)),) = srpo.corrupt_image(red, "blank", share=0).getcolors()
    assert r == g == b and abs(r - 0.299 * 150) <= 1 and a == 255         # the mean luma, opaque


# --------------------------------------------------------------------- SRPO: contrasts, weights, advantages
@pytest.mark.parametrize("clamp", [5.0, 1.0])
def test_srpo_contrast_and_blank_perception_match_a_loop(d, clamp):
    want = [[max(-clamp, min(clamp, x - y)) for x, y in zip(*row)]
            for row in rows(d.mask, 9 * d.log_probs, 3 * d.other_log_probs)]
    same(srpo.contrast(9 * d.log_probs, 3 * d.other_log_probs, d.mask, clamp), pad(want), 1e-6)
    assert min(map(min, want)) == -clamp and max(map(max, want)) == clamp
    want = [[7 if x else i for i, x in zip(*row)] for row in zip(d.token_ids.tolist(), d.perception.tolist())]
    assert srpo.blank_perception(d.token_ids, d.perception, 7).tolist() == want and d.perception.any()


@pytest.mark.parametrize("tau, clip, signed", [(1.0, 0.5, False), (0.5, 0.2, True), (3.0, 0.9, False)])
def test_srpo_role_weights_match_a_loop(d, tau, clip, signed):
    want = []
    for all_s, p, r, a in zip(*(x.tolist() for x in (d.contrasts, d.perception, d.reasoning, d.sign))):
        role = [x or y for x, y in zip(p, r)]
        s = [x for x, u in zip(all_s, role) if u]                         # of P and R pooled
        direction = (a > 0) - (a < 0) if signed else 1
        e = [max(1 - clip, min(1 + clip, math.exp(direction * (x - mean(s)) / tau))) for x in s]
        w = iter([x / mean(e) for x in e])
        want.append([next(w) if u else 1.0 for u in role])
    sign = d.sign if signed else None
    same(srpo.role_weights(d.contrasts, d.perception, d.reasoning, tau, clip, sign), torch.tensor(want))


def test_srpo_weights_of_equal_and_of_extreme_contrasts(d):
    weigh = lambda x, **options: srpo.role_weights(x, d.perception, d.reasoning, **options)
    for constant in (0.0, 2.5):                                           # without a contrast this is GRPO
        same(weigh(torch.full_like(d.contrasts, constant)), torch.ones_like(d.contrasts), 1e-6)
    w = weigh(1e4 * d.contrasts, temperature=1e-3)                        # exp overflows, exp underflows
    assert ((0 < w) & (w < INF)).all()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_srpo_advantages_match_a_loop_and_keep_the_sign(d, alpha):
    w = srpo.role_weights(d.contrasts, d.perception, d.reasoning)
    got = srpo.srpo_advantages(d.sign, w, alpha)
    want = [[a * (1 - alpha + alpha * x) for x in row] for a, row in zip(d.sign.tolist(), w.tolist())]
    same(got, torch.tensor(want), 1e-6)
    assert torch.equal(got.sign(), d.sign.sign()[:, None].expand_as(got))


# ------------------------------------------------------------------------------------------------- SRPO: loss
def slow_grpo(d, advantages, low, high, kl_coef):
    """(S6) with Python floats: the loss, its derivative in log_probs by hand, the metrics."""
    losses, gradient, metrics, kl = [], [], [], []
    for new, old, ref, A in rows(d.mask, d.log_probs, d.old_log_probs, d.ref_log_probs, advantages):
        ratio = [math.exp(p - q) for p, q in zip(new, old)]
        metrics.append(slow_metrics(ratio, new, old, A, low, high))
        k3 = [math.exp(f - p) - 1 - (f - p) for p, f in zip(new, ref)]
        kl.append(mean(k3))
        policy = [-min(r * a, min(max(r, 1 - low), 1 + high) * a) for r, a in zip(ratio, A)]
        losses.append(mean(policy) + kl_coef * mean(k3))
        gradient.append([((0 if clipped else -r * a) + kl_coef * (1 - math.exp(f - p))) / len(A) / len(d.mask)
                         for r, a, p, f, (clipped, *_) in zip(ratio, A, new, ref, metrics[-1])])
    return mean(losses), pad(gradient), summed_up(metrics) | {"kl_to_start_k3": mean(kl)}


@pytest.mark.parametrize("low, high, kl_coef", [(0.2, 0.2, 0.0), (0.1, 0.4, 0.3), (0.0, 0.0, 0.05)])
@pytest.mark.parametrize("by_token", [True, False])
def test_srpo_loss_gradient_and_metrics_match_the_hand_derivative(d, low, high, kl_coef, by_token):
    A = d.advantages if by_token else d.sign + 0.1
    full = A if by_token else A[:, None].expand_as(d.mask)
    want, gradient, want_metrics = slow_grpo(d, full, low, high, kl_coef)
    f = lambda x: srpo.grpo_loss(x, d.old_log_probs, A, d.mask, low, high, d.ref_log_probs, kl_coef)
    loss, metrics = f(d.log_probs)
    assert metrics == pytest.approx(want_metrics, abs=1e-6) and loss == pytest.approx(want, abs=1e-6)
    same(grad(lambda x: f(x)[0], d.log_probs), gradient, 1e-6)
    assert 0.1 < want_metrics["clip_fraction"]


# ---------------------------------------------------------------------------- both: every function, every way
def public(module):
    return [f for name, f in vars(module).items() if inspect.isfunction(f) and not name.startswith("_")]


# name -> a function of either file, and changes to what `batch` gives it
CASES = {f.__name__: (f, lambda d: {}) for f in public(sapo) + public(srpo)} | {
    "segment_gae last": (sapo.segment_gae, lambda d: dict(value_at="last")),
    "value_loss unclipped": (sapo.value_loss, lambda d: dict(clip=None, old_values=None)),
    "kl_rewards alone": (sapo.kl_rewards, lambda d: dict(ref_log_probs=None, kl_coef=0.0)),
    "role_weights without sign": (srpo.role_weights, lambda d: dict(sign=None)),
    "srpo_advantages": (srpo.srpo_advantages, lambda d: dict(advantages=d.sign)),
    "grpo_loss (B,)": (srpo.grpo_loss, lambda d: dict(advantages=d.sign)),
}
NO_MASK = "token_entropy", "group_advantages", "srpo_advantages", "corrupt_image"
LEARNS = {"segment_ratio": ["log_probs"], "policy_loss": ["log_probs"], "grpo_loss": ["log_probs"],
          "value_loss": ["values"], "whiten": ["advantages"], "group_advantages": ["outcome"]}
every_case = pytest.mark.parametrize("case", [case for case in CASES if case != "corrupt_image"])
every_masked_case = pytest.mark.parametrize("case", [case for case in CASES if case not in NO_MASK])


def arguments(case, d):
    f, changes = CASES[case]
    given = {**vars(d), **changes(d)}
    return {name: given[name] for name in inspect.signature(f).parameters if name in given}


def tensors(case, d):
    return {name: x for name, x in arguments(case, d).items() if torch.is_tensor(x)}


def floats(case, d):
    return {name: x for name, x in tensors(case, d).items() if x.is_floating_point()}


def read(case, d):
    """Where a function reads its tensors, (B, T): the first of these masks that it takes."""
    masks = dict(mask=d.mask, value_mask=d.value_mask, contrasts=d.perception | d.reasoning)
    return next((x for name, x in masks.items() if name in arguments(case, d)), d.mask)


def outputs(case, d):
    """All that a function gives, by name: its results, flat, and the gradients of its arguments."""
    given = copy.deepcopy(arguments(case, d))
    leaves = {name: x.requires_grad_() for name, x in given.items() if name in floats(case, d)}
    got = CASES[case][0](**given)
    for name, x in tensors(case, d).items():                              # no input is written to
        assert torch.equal(x.nan_to_num(1), given[name].nan_to_num(1))
    got = [x.values() if isinstance(x, dict) else [x] for x in (got if isinstance(got, tuple) else [got])]
    got = {f"result {k}": torch.as_tensor(x) for k, x in enumerate(sum(map(list, got), []))}
    learnt = [(x + x ** 3).sum() for x in got.values() if x.requires_grad]
    assert len(learnt) <= 1                                               # a loss; metrics are detached
    grads = torch.autograd.grad(sum(learnt), [*leaves.values()], allow_unused=True) if learnt else []
    return {k: x.detach() for k, x in got.items()} | {k: x for k, x in zip(leaves, grads) if x is not None}


def change(d, f):
    """d with f applied to each of its tensors, (B, ...)."""
    return SimpleNamespace(**{name: f(x) if torch.is_tensor(x) else x for name, x in vars(d).items()})


def hollow(x):
    """What there may be in rows that hold no token."""
    return torch.full_like(x, NAN) if x.is_floating_point() else torch.zeros_like(x)


@every_case
def test_targets_are_constants_and_a_mask_of_any_dtype_will_do(case, d):
    want = outputs(case, d)
    grads = {name: x.any() for name, x in want.items() if not name.startswith("result")}
    assert grads == dict.fromkeys(LEARNS.get(case.split()[0], []), True)  # pitfall 18
    for dtype in (torch.long, torch.bfloat16):
        got = outputs(case, SimpleNamespace(**{**vars(d), "mask": d.mask.to(dtype)}))
        assert all(torch.equal(x, want[name]) for name, x in got.items())
    assert sapo.ends_every_token(d.mask).data_ptr() != d.mask.data_ptr()  # a copy, free to be changed


def shifted(d, by, width=5):
    """d with `width` more columns, by[i] of them in front of response i, as where a prompt stands there."""
    move = lambda x: torch.stack([torch.nn.functional.pad(row, (k, width - k)) for row, k in zip(x, by)])
    shifted = change(d, lambda x: move(x) if x.shape == d.mask.shape else x)
    shifted.pieces = [["<think>"] * k + row for row, k in zip(d.pieces, by)]
    return shifted


def expect_the_same(case, d, by, filler):
    """Outputs do not depend on where a response stands, or on what is in its row beside it."""
    there = shifted(d, by)
    on, want = read(case, there), outputs(case, shifted(d, [0] * len(by)))
    there = change(there, lambda x: x if x.shape != on.shape or x.dtype == torch.bool else
                   x.masked_fill(~on, filler if x.is_floating_point() else 2))  # 2 would end a segment
    for name, x in outputs(case, there).items():
        y = want[name] if x.dim() < 2 else torch.stack([row.roll(k) for row, k in zip(want[name], by)])
        keep = on if case == "blank_perception" else torch.ones_like(x) == 1
        torch.testing.assert_close(x[keep], y[keep], rtol=1e-6 * any(by), atol=1e-7 * any(by))


@pytest.mark.parametrize("by", [[0] * 7, [3, 0, 5, 1, 2, 5, 4]], ids=["right-padded", "behind a prompt"])
@pytest.mark.parametrize("filler", [1e6, -1e6, NAN, INF, -INF])
@every_masked_case
def test_padding_is_ignored_even_nan(case, d, filler, by):                # pitfalls 3, 5, 6 and 22
    expect_the_same(case, d, by, filler)


def test_200_batches_do_not_depend_on_where_the_responses_stand():
    for seed in range(200):
        rng, d = random.Random(seed), batch(B=4, T=11, seed=seed)
        cases = ("ends_by_entropy", "kl_rewards", "segment_gae", "segment_gae last", "segment_ratio",
                 "policy_loss", "value_loss", "role_weights", "grpo_loss")
        for case in rng.sample(cases, 4):
            expect_the_same(case, d, rng.choices(range(6), k=4), rng.choice([1e6, NAN, INF]))


@pytest.mark.parametrize("at", [0, 3, 7])
@every_masked_case
def test_rows_without_response_tokens_are_skipped(case, d, at):           # pitfall 22
    more = change(d, lambda x: torch.cat([x[:at], hollow(x[:1]), x[at:]]))
    more.pieces = d.pieces[:at] + [[]] + d.pieces[at:]
    want = outputs(case, d)
    for name, x in outputs(case, more).items():
        others = torch.cat([x[:at], x[at + 1:]]) if x.dim() else x
        assert not x.dim() or (~x[at] if x.dtype == torch.bool else x[at].isfinite()).all()
        torch.testing.assert_close(others, want[name], rtol=1e-5, atol=1e-7)
    for x in [] if case == "lift" else outputs(case, change(d, hollow)).values():
        assert x.isfinite().all() and (x.dim() or x == 0)                 # a batch of nothing else


@every_masked_case
def test_nan_and_infinity_on_a_response_token_are_named(case, d):         # pitfall 13
    places = read(case, d).nonzero().tolist()[::5]
    for (name, x), bad, place in itertools.product(floats(case, d).items(), (NAN, INF, -INF), places):
        x = x.clone()
        x[tuple(place[:x.dim()])] = bad
        where = str(place) if x.dim() == 2 else f"[{place[0]}"            # one for all tokens: [i] or [i, 0]
        with pytest.raises(ValueError, match=rf"^{name} is {bad} at {re.escape(where)}.*: expected a finite"):
            CASES[case][0](**{**arguments(case, d), name: x})


@every_masked_case
def test_wrong_masks_shapes_and_dtypes_are_named(case, d):                # pitfall 22
    f, given, found = CASES[case][0], arguments(case, d), tensors(case, d)

    def refused(error, message, **changes):
        with pytest.raises(error, match=message):
            f(**given | changes)

    first = next(name for name in ("mask", "value_mask", "perception") if name in given)
    refused(ValueError, r"^\w+\.shape is \[7\]: expected \(B, T\)",
            **{name: x.flatten()[:7] for name, x in found.items()})
    if first == "mask":
        for hole in ([4], [2, 3, 4]):
            refused(ValueError, r"^mask is True at \[1, 5\]: expected 1s in one run. No paper says what",
                    mask=d.mask.index_fill(1, torch.tensor(hole), False))
    for name in found.keys() - {first}:
        x = found[name]
        narrow = x[:, :-1] if x.dim() == 2 else x[:-1]
        refused(ValueError, rf"^{name}\.shape is {re.escape(str([*narrow.shape]))}", **{name: narrow})
        if x.dim() == 2:                                                  # a verdict may be of any dtype
            wrong = x.float() if x.dtype in (torch.bool, torch.long) else x.long()
            refused(TypeError, rf"^{name}\.dtype is {wrong.dtype}: expected \w+", **{name: wrong})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_case
def test_half_precision_is_computed_in_fp32(case, dtype):                 # pitfall 10
    half = change(batch(40, 30), lambda x: x.to(dtype) if x.is_floating_point() else x)
    wide = change(half, lambda x: x.float() if x.is_floating_point() else x)
    want = outputs(case, wide)
    for name, x in outputs(case, half).items():
        if name.startswith("result"):
            assert x.dtype == want[name].dtype and torch.equal(x, want[name])
        else:                                                             # a gradient has its leaf's dtype
            assert (x - want[name]).abs().max() <= 0.01 * want[name].abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_srpo_in_half_precision_sees_small_steps_and_survives_large_ones(dtype):
    zero, A, one = torch.zeros(1, 1, dtype=dtype), torch.tensor([-0.01]), torch.ones(1, 1)
    _, metrics = srpo.grpo_loss(zero - 0.001, zero - 0.004, A, one)
    assert metrics["max_ratio_deviation"] == pytest.approx(0.003, rel=0.01)  # in bf16, a ratio of 1.003 is 1
    for new, ref in ((15, 15), (0, 15)):                                  # exp(15) is inf in fp16: ratio, k3
        f = lambda x: srpo.grpo_loss(x, zero, A, one, ref_log_probs=zero + ref, kl_coef=0.01)[0]
        want = 0.01 * math.exp(new) + 0.01 * (1 - math.exp(ref - new))
        assert grad(f, zero + new).item() == pytest.approx(want, rel=0.01)


def test_kl_estimates_are_exact_on_a_three_token_vocabulary():            # pitfall 12
    old, new, ref, one = [0.2, 0.5, 0.3], [0.6, 0.1, 0.3], [0.3, 0.6, 0.1], torch.ones(1, 1)
    kl = lambda a, b: sum(p * math.log(p / q) for p, q in zip(a, b))
    step, start = torch.zeros(5), 0.0
    for q, p, f in zip(old, new, ref):
        log_p, log_q, log_f = (math.log(x) * one for x in (p, q, f))
        _, a = sapo.policy_loss(log_p, log_q, one, one.bool(), one)
        _, b = srpo.grpo_loss(log_p, log_q, one, one, ref_log_probs=log_f)
        penalty = -sapo.kl_rewards(torch.zeros(1), log_q, log_p, one, kl_coef=1.0).sum()
        step += q * torch.stack([a["kl_step"], a["kl_step_k3"], penalty, b["kl_step"], b["kl_step_k3"]])
        start += p * b["kl_to_start_k3"].item()                           # these tokens are drawn from new
    same(step, torch.full((5,), kl(old, new)), 1e-6)
    assert start == pytest.approx(kl(new, ref), abs=1e-6)


@pytest.mark.parametrize("scale", [1, 100, 1000])                         # log-ratios to 0.4, 40, 400
def test_segments_of_one_token_give_both_files_the_same_loss_and_metrics(d, scale):  # pitfalls 12 and 17
    x, old, ref = (scale * y for y in (d.log_probs, d.old_log_probs, d.ref_log_probs))
    ppo = lambda x: sapo.policy_loss(x, old, d.advantages, d.mask, d.mask, 0.1, 0.3)
    grpo = lambda x: srpo.grpo_loss(x, old, d.advantages, d.mask, 0.1, 0.3, ref, kl_coef=0.0)
    (loss, metrics), (other_loss, others) = ppo(x), grpo(x)
    far = others.pop("kl_to_start_k3")
    assert metrics == others and torch.equal(loss, other_loss)
    slow = mean([mean([q - p for p, q in zip(*row)]) for row in rows(d.mask, x, old)])
    assert metrics["kl_step"].item() == pytest.approx(slow, rel=1e-4)     # no clamp hides a large KL
    assert scale == 1 or far > 1e6 and metrics["kl_step_k3"] > 1e6
    for y in (loss, far, *metrics.values(), *(grad(lambda x: f(x)[0], x) for f in (ppo, grpo))):
        assert y.isfinite().all()


def test_gradient_is_the_same_for_one_and_many_micro_batches(d):          # pitfall 11
    policy = lambda d: sapo.policy_loss(d.log_probs, d.old_log_probs, d.advantages, d.ends, d.mask)[0]
    grpo = lambda d: srpo.grpo_loss(d.log_probs, d.old_log_probs, d.advantages, d.mask,
                                    ref_log_probs=d.ref_log_probs, kl_coef=0.1)[0]
    critic = lambda d: sapo.value_loss(d.values, d.returns, d.ends)
    d.mask[3] = d.ends[3] = False                                         # one response is masked out
    for loss, name in ((policy, "log_probs"), (grpo, "log_probs"), (critic, "values")):
        def whole(x, cuts):
            parts, total = SimpleNamespace(**{**vars(d), name: x}), 0.0
            for a, b in itertools.pairwise(cuts):                         # each cut to its longest response
                width = int(d.mask[a:b].sum(1).max().clamp(min=1))
                part = change(parts, lambda y: y[a:b, :width] if y.dim() > 1 else y[a:b])
                total = total + loss(part) * part.mask.any(1).sum() / 6
            return total

        want, *got = (grad(lambda x: whole(x, cuts), getattr(d, name))
                      for cuts in ([0, 7], [0, 1, 4, 7], range(8)))
        for x in got:
            same(x, want, 1e-6)


# -------------------------------------------------------------------------------------------- both: bad input
ZERO = torch.zeros(7, 13)                                                 # as batch; its row 0 has one token
NUMBERS = [                                                               # bad values of these arguments
    ("a percentage from 1 to 100 (30, not 0.3)", (0, 0.3, 0.999, 101, NAN), "ends_by_entropy.top_percent"),
    ("a number in [0, 1]", (1.1, -0.1, NAN), "ends_by_probability.below segment_gae.gamma segment_gae.lam "
     "segment_gae.lam_returns lift.quantile lift.jump_quantile corrupt_image.share policy_loss.clip_low "
     "grpo_loss.clip_low srpo_advantages.alpha"),
    ("a number in [0, inf]", (-0.1, NAN), "kl_rewards.kl_coef grpo_loss.kl_coef policy_loss.clip_high "
     "grpo_loss.clip_high value_loss.clip contrast.clamp"),
    ("a number in [1, inf]", (0, NAN), "ends_by_probability.every corrupt_image.patch"),
    ("a number in [1e-06, 0.999999]", (0, 1, NAN), "role_weights.clip"),
    ("a number in [1e-06, inf]", (0, NAN), "role_weights.temperature"),
    ("2 or more, a divisor of B = 7", (1, 3, 14), "group_advantages.group_size"),
]
ERRORS = [(name, {argument: bad}, f"{argument} is {bad}: expected {what}") for what, values, places in NUMBERS
          for name, argument in (place.split(".") for place in places.split()) for bad in values] + [
    ("ends_once", dict(mask=torch.tensor([[1, 0.5]])), "mask is 0.5 at [0, 1]: expected 0 or 1"),
    ("ends_once", dict(mask=torch.tensor([[1, NAN]])), "mask is nan at [0, 1]: expected a finite number"),
    ("ends_once", dict(mask=torch.ones(0, 3)), "mask.shape is [0, 3]: expected (B, T)"),
    ("lift", dict(mask=(ZERO == 0) & (torch.arange(13) == 0)), "mask.sum(1) is at most 1: exp"),
    ("token_entropy", dict(logits=ZERO), "logits is torch.float32 [7, 13]: expected floating point (B, T"),
    ("token_entropy", dict(logits=ZERO[None].long()), "logits is torch.int64 [1, 7, 13]: expected floating"),
    *[(name, dict(ends=ends), f"ends is {at}: expected True on a response's last token, False where")
      for name in ("segment_ids", "segment_gae", "segment_ratio", "policy_loss")
      for ends, at in ((ZERO == 0, "True at [0, 1]"), (ZERO > 0, "False at [0, 0]"))],
    ("segment_gae", dict(value_at="end"), "value_at is 'end': expected \"start\" or \"last\""),
    ("value_loss", dict(old_values=None), "clip is 0.1: expected a number with old_values, None without"),
    ("value_loss", dict(clip=None), "clip is None: expected a number with old_values"),
    *[("group_advantages", dict(outcome=torch.tensor([1, bad] + [0] * 5)), f"outcome is {bad} at [1]: exp")
      for bad in (NAN, INF, -INF)],                                       # pitfall 13
    ("group_advantages", dict(outcome=ZERO), "outcome.shape is [7, 13]: expected (B,)"),
    ("split_roles", dict(pieces=[["a"] * 12] * 7, mask=torch.arange(13).expand(7, 13) > 9),  # behind a prompt
     "len(pieces[0]) is 12: expected 13 to 13"),
    ("split_roles", dict(pieces=[["a"] * 14] * 7), "len(pieces[0]) is 14: expected 1 to 13"),
    ("split_roles", dict(pieces=[]), "len(pieces) is 0: expected 7, a list for each response"),
    ("corrupt_image", dict(kind="fog"), "kind is 'fog': expected 'patches', 'noise', 'blur' or 'blank'"),
    ("corrupt_image", dict(image=Image.new("P", (4, 4))), "image.mode is 'P': expected RGB, L or RGBA"),
    ("srpo_advantages", dict(advantages=ZERO), "advantages.shape is [7, 13]: expected (B,), [7]"),
    ("srpo_advantages", dict(weights=ZERO[:, 0]), "weights.shape is [7]: expected (B, T)"),
    *[(name, dict(ref_log_probs=None, kl_coef=0.1), "ref_log_probs is None: expected log-probabilities, as")
      for name in ("kl_rewards", "grpo_loss")],
]
GRAMMAR = re.compile(r"([a-z_]+(\.[a-z]+(\(1\))?)?|len\(\w+(\[\d+\])?\)) is [^:]+: expected .+")


@pytest.mark.parametrize("name, changes, message", ERRORS, ids=[f"{e[0]}-{e[2][:30]}" for e in ERRORS])
def test_bad_input_is_named(d, name, changes, message):                   # NAME is VALUE: expected WHAT
    with pytest.raises(TypeError if ".dtype is" in message else ValueError) as error:
        CASES[name][0](**arguments(name, d) | changes)                    # the rest of the input is good
    assert str(error.value).startswith(message) and GRAMMAR.fullmatch(str(error.value))


# -------------------------------------------------------------------------------------------- both: the files
def test_helpers_that_stand_in_both_files_are_the_same_word_for_word():
    one, two = [{f.__name__: inspect.getsource(f) for f in vars(module).values() if inspect.isfunction(f)}
                for module in (sapo, srpo)]
    assert one.keys() & two.keys() == {"_mean", "_check", "_check_range"}
    one["_check"] = re.sub(r'    if "ends" in .*\n(        .*\n)+', "", one["_check"])  # srpo.py has no ends
    assert all(one[name] == two[name] for name in one.keys() & two.keys()) and sapo.ONE_RUN == srpo.ONE_RUN


def test_worked_responses_match_loops(capsys):
    [runpy.run_path(x.__file__, run_name="__main__") for x in (sapo, srpo)]  # python sapo.py, its header's
    lines = capsys.readouterr().out.splitlines()
    table = {line[:15].strip(): [*map(float, re.findall(r"-?[0-9.]+", line[15:]))] for line in lines[:7]}
    ends, V = slow_ends(table["entropy"], 30), [x for v in table["V, read here"] for x in (v, NAN)]
    assert [len(part.split()) for part in lines[0][15:].split("|")] == [e - b + 1 for b, e in cut(ends)]
    for lam in (1, 0.9):
        A, delta, _ = slow_gae([0.0] * 6, V, ends, 1, lam)
        assert table[f"A, lambda = {lam}"] == pytest.approx(spread(A, ends))
        assert table["delta"] == pytest.approx(spread(delta, ends))
    new = [math.log(x) for x in (1, 0.81, 1, 0.49, 1, 1.21)]
    assert table["ratio"] == pytest.approx(slow_ratio(new, [0] * 6, ends))
    found = [re.fullmatch(r"(\S+) +(\w*) +(-?[\d.]+) +([\d.]+)", line).groups() for line in lines[8:]]
    assert "".join(role[:1] or "-" for _, role, *_ in found) == "-pp--rrr----"
    s = [float(x) for _, role, x, _ in found if role]
    e = [min(1.5, max(0.5, math.exp(x - mean(s)))) for x in s]
    assert [float(w) for _, role, _, w in found if role] == pytest.approx([x / mean(e) for x in e], abs=0.005)
    assert {float(w) for _, role, _, w in found if not role} == {1.0}


@pytest.mark.parametrize("module, needs", [(sapo, "math fractions torch"),
                                           (srpo, "random re warnings torch PIL")])
def test_each_file_stands_alone_and_its_examples_run(module, needs):
    imports = re.findall(r"^(?:import|from) ([^.\s]+)", inspect.getsource(module).split('"""')[2], re.M)
    assert {*imports} == {*needs.split()}
    assert all(">>>" in f.__doc__ for f in public(module))
    results = doctest.testmod(module)
    assert results.failed == 0 and results.attempted >= len(public(module))


class Looks(TorchDispatchMode):
    """Counts what makes a host wait for its device: bool(x), int(x), x.item(), x.nonzero(), y[x]."""
    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op._schema.name.removeprefix("aten::")
        self.count += name in ("_local_scalar_dense", "nonzero", "masked_select") or name == "index" and any(
            x is not None and x.dtype == torch.bool for x in args[1])
        return op(*args, **(kwargs or {}))


# One look for all checks together. Where there are segments one more, for their number, M.
LOOKS = {case: 2 if case in ("segment_gae", "segment_gae last", "segment_ratio", "policy_loss") else 1
         for case in CASES if case not in ("split_roles", "lift", "corrupt_image")}


@pytest.mark.parametrize("case, most", LOOKS.items())
def test_all_checks_together_cost_one_look_at_the_device(d, case, most, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "tolist", None)                     # a look that the mode does not see
    with Looks() as looks:
        CASES[case][0](**arguments(case, d))
    assert looks.count <= most


def fast_chain(d, x):
    ends = sapo.ends_by_entropy(d.entropy, d.mask)
    A, returns, value_mask = sapo.segment_gae(d.rewards, d.values, ends, d.mask)
    loss, _ = sapo.policy_loss(x, d.old_log_probs, A, ends, d.mask)
    return A, *torch.autograd.grad(loss, x), returns, value_mask


def slow_chain(d, x):
    ends = [slow_ends(row, 30) for row in rows(d.mask, d.entropy)]
    A = pad([spread(slow_gae(*row, e, 1.0, 0.99)[0], e)
             for row, e in zip(rows(d.mask, d.rewards, d.values), ends)])
    loss = slow_loss(x, d.old_log_probs, A, pad(ends, False), d.mask, 0.2, 0.2)
    return A, *torch.autograd.grad(loss, x)


def test_chain_equals_the_slow_loop():
    d = batch(48, 512, shortest=256)
    got, want = (chain(d, d.log_probs.clone().requires_grad_()) for chain in (fast_chain, slow_chain))
    for x, y in zip(got, want):
        same(x, y)


def test_memory_is_at_most_fifteen_tensors_and_a_fifth_of_the_logits():
    d, logits = batch(64, 1024, shortest=512), torch.zeros(2, 128, 3000)
    x = d.log_probs.clone().requires_grad_()
    for f, most in ((lambda: fast_chain(d, x), 15 * 64 * 1024 * 4),       # results and gradient included
                    (lambda: sapo.token_entropy(logits), 0.2 * 4 * logits.numel())):
        with torch.profiler.profile(profile_memory=True) as p:
            f()
        sizes = [event.nbytes() for event in p.profiler.kineto_results.events() if event.name() == "[memory]"]
        assert max(itertools.accumulate(sizes)) <= most                   # the allocator's peak, in bytes
