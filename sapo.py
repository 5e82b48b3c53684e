"""SAPO: Segment-Aligned Policy Optimization (arXiv 2605.01327, ICML 2026), in one file.

NOT the "SAPO" of TRL (loss_type="sapo"), verl, ms-swift, AReaL and slime: that is *Soft Adaptive Policy
Optimization* (arXiv 2511.20347), an unrelated method that replaces the PPO clip by a sigmoid gate.

The idea: a response is cut after its most uncertain tokens, and each segment is then one action of PPO: one
value, one advantage and one importance ratio, shared by all its tokens. Read from top to bottom; of these
lines the first four run once per rollout, the last two at each update:

    entropy = token_entropy(logits)                                                     Eq. 11
    ends = ends_by_entropy(entropy, mask)                                               section 4.2
    rewards = kl_rewards(outcome, old_log_probs, ref_log_probs, mask, kl_coef=0.001)    Table 7
    advantages, returns, value_mask = segment_gae(rewards, old_values, ends, mask)      Eq. 6-7
    loss, metrics = policy_loss(log_probs, old_log_probs, advantages, ends, mask)       Eq. 8-9
    critic_loss = value_loss(values, returns, value_mask)                               Eq. 10

B responses, T tokens, M segments. Tensors are (B, T) over *response* tokens unless a docstring says other.
`mask` is 1 on response tokens, 0 on the padding to their right; `ends` is True on a segment's last token;
`outcome` (B,) is what the verifier says of a response, `rewards` are per token; `values[:, t]` is V of the
prefix *before* token t. Means are over the tokens (in value_loss: the segments) of a response, then over the
responses that have any; micro-batches, weighted by the number of these, add up to the batch.

What padding holds, NaN included, changes no output and no gradient. A row without response tokens, one that a
trainer has masked out, counts nothing. A hole in a row (a tool's answer between two turns) is refused, as the
paper does not say what a segment across it would be. Bad input, NaN on a response token for one, raises
ValueError, a wrong dtype TypeError; both name the argument, its value and what was expected.

With `ends_every_token` this is PPO (lam=0.95) and VC-PPO (lam=0.99, lam_returns=1); with `ends_once`,
segment_ratio is GSPO's. The default is the paper's form. Where the official code differs: see README.md.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DTYPES = {"ends": torch.bool, "value_mask": torch.bool, "token_ids": torch.long}  # others: floating point


# ----------------------------------------------------------------------------------------- where segments end
@torch.no_grad()
def token_entropy(logits: Tensor) -> Tensor:
    """Entropy of the next-token distribution over the full vocabulary, in nats. Eq. 11 (arXiv 2605.01327).

    logits (B, T, V) from which token t was drawn, divided by the temperature, of the policy that *sampled*:
    segments stay fixed for all updates on a batch. -> (B, T), fp32, no gradient.

    >>> token_entropy(torch.tensor([[[0.0, 0.0], [0.0, -torch.inf]]]))     # a fair coin; a banned token
    tensor([[0.6931, 0.0000]])
    """
    if logits.dim() != 3:
        raise ValueError(f"logits.shape is {[*logits.shape]}: expected (B, T, V)")
    if not logits.is_floating_point():
        raise TypeError(f"logits.dtype is {logits.dtype}: expected floating point")
    return torch.cat([torch.special.entr(piece.float().softmax(-1)).sum(-1)  # Eq. 11: -sum_v p_v log p_v
                      for piece in logits.chunk(32, dim=1)], dim=1)         # (B, T); pieces save memory


def ends_by_entropy(entropy: Tensor, mask: Tensor, top_percent: float = 30.0) -> Tensor:
    """End a segment at each of a response's most uncertain tokens. Section 4.2 (arXiv 2605.01327), k = 30.

    entropy (B, T); top_percent in (0, 100], so 0.5 is half a percent. -> bool (B, T), True on the last token
    of each segment: ceil(top_percent * length / 100) tokens, at least 1, and the last response token.

    >>> ends_by_entropy(torch.tensor([[0.1, 2.0, 0.3, 1.0, 0.2]]), torch.ones(1, 5), top_percent=40)
    tensor([[False,  True, False,  True,  True]])
    """
    mask = _check(mask=mask, entropy=entropy)
    if not 0 < top_percent <= 100:
        raise ValueError(f"top_percent is {top_percent}: expected a percentage in (0, 100]")
    # ceil(k T / 100) in whole millionths of a percent: in floats, 1.1 % of 3000 would round up to 34. (B, 1)
    count = (mask.sum(1, keepdim=True) * round(top_percent * 10**6) + 10**8 - 1) // 10**8
    # rank -> token, (B, T); a stable sort keeps the earlier of two equals first
    order = entropy.masked_fill(~mask, -torch.inf).argsort(stable=True, dim=1, descending=True)
    top = torch.arange(mask.shape[1], device=mask.device) < count.clamp(min=1)  # by rank, (B, T)
    return torch.zeros_like(mask).scatter(1, order, top) & mask | _last(mask)  # by token, (B, T)


def _last(mask: Tensor) -> Tensor:
    """True on the last response token of each response, (B, T)."""
    return mask & ~F.pad(mask[:, 1:], (0, 1))


def ends_by_token(token_ids: Tensor, mask: Tensor, end_ids: Tensor | list[int]) -> Tensor:
    """End a segment at given tokens. Newline and step splitting of Table 3 (arXiv 2605.01327).

    token_ids, long (B, T); end_ids: the ids after which a segment ends, such as those of all tokens with a
    newline. For a marker that *begins* a step ("Step 2") give the tokens before it instead. -> bool (B, T).

    >>> ends_by_token(torch.tensor([[5, 9, 5, 5]]), torch.ones(1, 4), end_ids=[9])
    tensor([[False,  True, False,  True]])
    """
    mask = _check(mask=mask, token_ids=token_ids)
    end_ids = torch.as_tensor(end_ids, dtype=torch.long, device=mask.device)
    return torch.isin(token_ids, end_ids) & mask | _last(mask)


def ends_by_probability(log_probs: Tensor, mask: Tensor, below: float = 0.9, every: int = 5) -> Tensor:
    """End a segment at every `every`-th token whose probability is under `below`. Table 3 (arXiv 2605.01327).

    The cut of SPO (arXiv 2505.23564). log_probs (B, T) of the policy that sampled -> bool (B, T).

    >>> ends_by_probability(torch.tensor([[0.5, 0.99, 0.5, 0.5, 0.99]]).log(), torch.ones(1, 5), every=2)
    tensor([[False, False,  True, False,  True]])
    """
    mask = _check(mask=mask, log_probs=log_probs)
    _check_range(0, 1, below=below)
    _check_range(1, math.inf, every=every)
    low = (log_probs.float().exp() < below) & mask                          # (B, T)
    return low & (low.cumsum(1) % every == 0) | _last(mask)


def ends_every_token(mask: Tensor) -> Tensor:
    """One segment per token: token-level PPO. -> bool (B, T).

    >>> ends_every_token(torch.tensor([[1, 1, 0]]))
    tensor([[ True,  True, False]])
    """
    return _check(mask=mask).clone()


def ends_once(mask: Tensor) -> Tensor:
    """One segment per response: its ratio is that of GSPO (arXiv 2507.18071). -> bool (B, T).

    >>> ends_once(torch.tensor([[1, 1, 0]]))
    tensor([[False,  True, False]])
    """
    return _last(_check(mask=mask))


def segment_ids(ends: Tensor, mask: Tensor) -> Tensor:
    """Number the segments of each response. Eq. 5 (arXiv 2605.01327).

    ends, bool (B, T) -> long (B, T): 0, 1, 2 ... in each response, -1 on padding.

    >>> segment_ids(torch.tensor([[False, True, False, True, False]]), torch.tensor([[1, 1, 1, 1, 0]]))
    tensor([[ 0,  0,  1,  1, -1]])
    """
    mask = _check_ends(ends, mask)
    return F.pad(ends[:, :-1], (1, 0)).cumsum(1).masked_fill(~mask, -1)     # ends before token t, (B, T)


def _segments(ends: Tensor, *tokens: Tensor) -> tuple[Tensor, ...]:
    """segment_ids, with padding in a slot after the last segment, (B, T); and sums over segments, (B, M)."""
    slots = F.pad(ends[:, :-1], (1, 0)).cumsum(1)                           # ends before token t, (B, T)
    M = int(slots.max()) + 1
    return slots, *(x.new_zeros(len(x), M).scatter_add(1, slots, x) for x in tokens)


# ------------------------------------------------------------------------------------------------- advantages
@torch.no_grad()
def kl_rewards(outcome: Tensor, log_probs: Tensor, ref_log_probs: Tensor | None, mask: Tensor,
               kl_coef: float) -> Tensor:
    """The outcome on the last response token, a k1 KL penalty on every token. Table 7 (arXiv 2605.01327).

    outcome (B,), finite; log_probs, ref_log_probs (B, T) of the sampling and reference policies; kl_coef >= 0
    (0.001 in Table 7). -> rewards (B, T), 0 on padding, no gradient.

    >>> kl_rewards(torch.ones(1), torch.zeros(1, 2), -torch.ones(1, 2), torch.ones(1, 2), kl_coef=0.25)
    tensor([[-0.2500,  0.7500]])
    """
    ref_log_probs = log_probs if ref_log_probs is None else ref_log_probs   # no reference, no penalty
    outcome = _to_tokens(outcome=outcome, mask=mask)                        # (B, T)
    mask = _check(mask=mask, outcome=outcome, log_probs=log_probs, ref_log_probs=ref_log_probs)
    _check_range(0, math.inf, kl_coef=kl_coef)
    k1 = _log_ratio(log_probs, ref_log_probs, mask)                         # log pi / pi_ref, (B, T)
    return torch.where(_last(mask), outcome, 0.0) - kl_coef * k1


@torch.no_grad()
def segment_gae(rewards: Tensor, values: Tensor, ends: Tensor, mask: Tensor, gamma: float = 1.0,
                lam: float = 0.99, value_at: str = "start",
                lam_returns: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Generalised advantage estimation with segments for time steps. Eq. 6-7 (arXiv 2605.01327).

    rewards, values (B, T); gamma, lam in [0, 1] (Table 7: 1 and 0.99). value_at: "start" reads V before the
    first token of a segment (the paper's s_m), "last" before its last (official code, Fig. 2), whose other
    tokens' credit goes to the segment before: harmless only where segments end at uncertain tokens.
    lam_returns: another lambda for the returns, as VC-PPO has; None means lam.
    -> advantages, returns (B, T): constant over a segment, 0 on padding, no gradient; value_mask, bool
    (B, T): the one token of each segment whose value was read, and is to be trained.

    >>> rewards, values = torch.tensor([[0.0, 0, 1]]), torch.tensor([[0.5, 0.1, 0.75]])
    >>> segment_gae(rewards, values, torch.tensor([[False, True, True]]), torch.ones(1, 3), lam=1.0)
    (tensor([[0.5000, 0.5000, 0.2500]]), tensor([[1., 1., 1.]]), tensor([[ True, False,  True]]))
    """
    mask = _check_ends(ends, mask, rewards=rewards, values=values)
    _check_range(0, 1, gamma=gamma, lam=lam, lam_returns=lam if lam_returns is None else lam_returns)
    if value_at not in ("start", "last"):
        raise ValueError(f'value_at is {value_at!r}: expected "start" or "last"')
    starts = F.pad(ends[:, :-1], (1, 0), value=True) & mask                 # (B, T)
    value_mask = starts if value_at == "start" else ends
    slots, r, v = _segments(ends, rewards.float().masked_fill(~mask, 0.0),  # r_m, (B, M)
                            values.float().masked_fill(~value_mask, 0.0))   # V(s_m), (B, M)
    delta = r + gamma * F.pad(v[:, 1:], (0, 1)) - v                         # Eq. 6: delta_m, (B, M)
    advantages = _discount(delta, gamma * lam)                              # Eq. 7: A_m, (B, M)
    lambda_sum = advantages if lam_returns is None else _discount(delta, gamma * lam_returns)
    returns = lambda_sum + v                                                # Eq. 7: R_m, (B, M)
    return advantages.gather(1, slots), returns.gather(1, slots), value_mask  # A_t = A_m, R_t = R_m, (B, T)


def _discount(delta: Tensor, decay: float) -> Tensor:
    """sum_l decay^l delta_{m+l}, (B, M) -> (B, M)."""
    sums = delta.T.clone()                                                  # (M, B): a row is one segment
    for m in reversed(range(len(sums) - 1)):
        sums[m] += decay * sums[m + 1]                                      # A_m = delta_m + decay A_{m+1}
    return sums.T


def whiten(advantages: Tensor, mask: Tensor) -> Tensor:
    """Zero mean and unit (population) standard deviation over all response tokens. In the official code only.

    advantages (B, T); once per rollout. -> (B, T), 0 on padding. A constant gives 0.

    >>> whiten(torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[1, 1, 0]]))
    tensor([[-1.,  1.,  0.]])
    """
    mask = _check(mask=mask, advantages=advantages)
    count = mask.sum().clamp(min=1)
    mean = advantages.float().masked_fill(~mask, 0.0).sum() / count
    centred = (advantages.float() - mean).masked_fill(~mask, 0.0)           # (B, T)
    return centred * (centred.square().sum() / count + 1e-8).rsqrt()        # 1e-8 as in the official code


# --------------------------------------------------------------------------------------------- ratio and loss
def segment_ratio(log_probs: Tensor, old_log_probs: Tensor, ends: Tensor, mask: Tensor) -> Tensor:
    """Importance ratio of a segment: the geometric mean of its token ratios. Eq. 8 (arXiv 2605.01327).

    log_probs (B, T), differentiable; old_log_probs (B, T), constant. -> (B, T), constant over a segment, 1 on
    padding. The mean log-ratio is clamped to +-20. Its distance to the product of the ratios: Eq. 21, 26.

    >>> log_probs = torch.tensor([[1.0, 4.0, 2.0]]).log()
    >>> segment_ratio(log_probs, torch.zeros(1, 3), torch.tensor([[False, True, True]]), torch.ones(1, 3))
    tensor([[2., 2., 2.]])
    """
    mask = _check_ends(ends, mask, log_probs=log_probs, old_log_probs=old_log_probs)
    return _segment_ratio(_log_ratio(log_probs, old_log_probs.detach(), mask), ends, mask)


def _segment_ratio(log_ratio: Tensor, ends: Tensor, mask: Tensor) -> Tensor:
    slots, total, length = _segments(ends, log_ratio, mask.float())         # length: |z_m|, (B, M)
    return (total / length.clamp(min=1)).clamp(-20, 20).exp().gather(1, slots)  # Eq. 8: s_m(theta), (B, T)


def policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, ends: Tensor, mask: Tensor,
                clip_low: float = 0.2, clip_high: float = 0.2) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped objective with the segment ratio, negated. Eq. 9 (arXiv 2605.01327).

    log_probs (B, T), differentiable; old_log_probs, advantages (B, T), constant; the ratio is kept in
    [1 - clip_low, 1 + clip_high]. The gradient where no clip binds: Eq. 13. For the token-level ratio (the
    ablation of Table 2), pass ends_every_token(mask) here, with advantages that came from segment ends.
    -> loss (); and metrics, detached, (), all 0 before the first update: clip_fraction (tokens whose
    clip binds), kl_step and kl_step_k3 (k1 and k3 estimates of KL(old || new), nats a token),
    max_ratio_deviation and mean_ratio_deviation (of |ratio - 1|).

    >>> mask, zeros = torch.ones(1, 2), torch.zeros(1, 2)
    >>> loss, metrics = policy_loss(zeros, zeros, torch.tensor([[1.0, 3.0]]), ends_every_token(mask), mask)
    >>> loss, metrics["clip_fraction"]
    (tensor(-2.), tensor(0.))
    """
    mask = _check_ends(ends, mask, log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
    _check_range(0, 1, clip_low=clip_low)
    _check_range(0, math.inf, clip_high=clip_high)
    advantages = advantages.detach().float().masked_fill(~mask, 0.0)        # (B, T)
    log_ratio = _log_ratio(log_probs, old_log_probs.detach(), mask)         # (B, T)
    ratio = _segment_ratio(log_ratio, ends, mask)                           # Eq. 8, (B, T)
    free = ratio * advantages                                               # (B, T)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages         # (B, T)
    loss = -_mean(torch.minimum(free, clipped), mask)                       # Eq. 9, ()
    moved, deviation = log_ratio.detach(), (ratio.detach() - 1).abs()       # 0 on padding, (B, T)
    return loss, {"clip_fraction": _mean(clipped < free, mask), "kl_step": _mean(-moved, mask),
                  "kl_step_k3": _mean(_k3(moved), mask), "max_ratio_deviation": deviation.max(),
                  "mean_ratio_deviation": _mean(deviation, mask)}


def value_loss(values: Tensor, returns: Tensor, value_mask: Tensor, old_values: Tensor | None = None,
               clip: float | None = None) -> Tensor:
    """Squared error of the critic, once per segment. Eq. 10 (arXiv 2605.01327).

    values (B, T), differentiable; returns (B, T) and value_mask, bool (B, T), from segment_gae. old_values
    (B, T) and clip, both or neither: PPO's value clipping, the larger of the two squared errors.
    -> (): mean over the segments of a response, then over responses.

    >>> value_loss(torch.tensor([[0.0, 9.0, 2.0]]), torch.ones(1, 3), torch.tensor([[True, False, True]]))
    tensor(1.)
    """
    if (old_values is None) != (clip is None):
        raise ValueError(f"clip is {clip}: expected a number with old_values, None without")
    _check(value_mask=value_mask, values=values, returns=returns,
           old_values=values if old_values is None else old_values)
    values, returns = values.float(), returns.detach().float()
    error = (values - returns).masked_fill(~value_mask, 0.0).square()       # Eq. 10: at s_m, (B, T)
    if clip is not None:
        _check_range(0, math.inf, clip=clip)
        old_values = old_values.detach().float()
        near = old_values + (values - old_values).clamp(-clip, clip)        # (B, T)
        error = torch.maximum(error, (near - returns).masked_fill(~value_mask, 0.0).square())
    return _mean(error, value_mask)


# ---------------------------------------------------------------------------------------- critic and evidence
class SegmentCritic(nn.Module):
    """A value head on a model's last hidden states. Section 4.1.2 (arXiv 2605.01327).

    backbone: a module whose output has last_hidden_state (B, L, hidden_size). The head starts at zero: V = 0.
    """

    def __init__(self, backbone: nn.Module, hidden_size: int):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, response_length: int, **inputs) -> Tensor:
        """inputs of length L: prompt, left-padded, then T = response_length tokens, right-padded.

        -> values (B, T), fp32: values[:, t] is read at the token *before* response token t, so t is unseen.
        """
        hidden = self.backbone(**inputs).last_hidden_state                  # (B, L, H)
        L, T = hidden.shape[1], response_length
        if not 1 <= T < L:
            raise ValueError(f"response_length is {T}: expected 1 to {L - 1}, as the inputs have length {L}")
        before = hidden[:, L - T - 1:L - 1]                                 # (B, T, H)
        return self.head(before.to(self.head.weight.dtype)).squeeze(-1).float()  # (B, T)


@torch.no_grad()
def explained_variance(values: Tensor, outcome: Tensor, value_mask: Tensor) -> tuple[float, float]:
    """Share of the outcome's variance that the critic explains: 1 - Var(R - V) / Var(R). Not in the paper.

    values (B, T); outcome R (B,); value_mask, bool (B, T), from segment_gae. -> over all states whose V was
    read, and over the last of each response, where nearly all is decided. 1 is perfect, 0 as good as a
    constant; nan where all outcomes are the same.

    >>> values, outcome = torch.tensor([[0.5, 1.0], [0.5, 0.0]]), torch.tensor([1.0, 0.0])
    >>> explained_variance(values, outcome, torch.ones(2, 2).bool())
    (0.5, 1.0)
    """
    target = _to_tokens(outcome=outcome, values=values)                     # R, (B, T)
    _check(value_mask=value_mask, values=values, outcome=target)
    if target[value_mask].unique().numel() < 2:
        return math.nan, math.nan
    last = value_mask & (value_mask.flip(1).cumsum(1).flip(1) == 1)         # (B, T)
    return tuple(float(1 - (target - values)[at].var() / target[at].var()) for at in (value_mask, last))


@torch.no_grad()
def lift(entropy: Tensor, values: Tensor, mask: Tensor, quantile: float = 0.7, jump_quantile: float = 0.9,
         resamples: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """How much likelier a value jump is at an uncertain token: P(D | A) / P(D). Eq. 12 (arXiv 2605.01327).

    A: entropy at or above its `quantile` (0.7: the top 30 %); D: jump |V_t - V_{t+1}|, caused by token t,
    at or above its `jump_quantile` (0.9 is ours); both in [0, 1], over all tokens but the last of a response.
    -> lift and its 95 % interval, bootstrapped over responses; nan where A and D leave it undefined.

    >>> entropy, values = torch.tensor([[0.0, 9, 0, 0, 0]]), torch.tensor([[0.0, 0, 1, 1, 1]])
    >>> lift(entropy, values, torch.ones(1, 5), quantile=0.75, jump_quantile=0.75)
    (4.0, 4.0, 4.0)
    """
    mask = _check(mask=mask, entropy=entropy, values=values)
    _check_range(0, 1, quantile=quantile, jump_quantile=jump_quantile)
    keep = mask & ~_last(mask)                                              # (B, T)
    if not keep.any():
        raise ValueError("mask.sum(1) is at most 1: expected a response of two tokens, with V_t and V_{t+1}")
    jump = (values - F.pad(values[:, 1:], (0, 1))).float().abs()            # |V_t - V_{t+1}|, (B, T)
    A = keep & (entropy >= entropy[keep].float().quantile(quantile))        # (B, T)
    D = keep & (jump >= jump[keep].quantile(jump_quantile))                 # (B, T)
    counts = torch.stack([keep, A, D, A & D], -1).sum(1)[mask.any(1)].cpu().double()  # per response, (B, 4)
    size = resamples, len(counts)
    draws = torch.randint(len(counts), size, generator=torch.Generator().manual_seed(seed))
    n, n_a, n_d, n_ad = torch.cat([counts.sum(0, keepdim=True), counts[draws].sum(1)]).T  # all, resampled
    lifts = (n_ad / n_a) / (n_d / n)                                        # Eq. 12, (1 + R,)
    return lifts[0].item(), *lifts[1:].nanquantile(torch.tensor([0.025, 0.975]).double()).tolist()


# --------------------------------------------------------- helpers and checks, word for word those of srpo.py
def _log_ratio(log_probs: Tensor, other_log_probs: Tensor, mask: Tensor) -> Tensor:
    """log p / p_other of each token in fp32, 0 on padding. (B, T)"""
    return (log_probs.float() - other_log_probs.float()).masked_fill(~mask, 0.0)


def _k3(log_ratio: Tensor) -> Tensor:
    """exp(d) - 1 - d >= 0: on tokens drawn from p, with d = log q / p, its mean is KL(p || q). (B, T)"""
    d = log_ratio.clamp(max=20)                                             # a guard against overflow
    return torch.expm1(d) - d


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    """Over the tokens of a response, then over the responses that have any; x is 0 elsewhere. (B, T) -> ()"""
    tokens = mask.sum(1)                                                    # (B,)
    return (x.sum(1, dtype=torch.float32) / tokens.clamp(min=1)).sum() / (tokens > 0).sum().clamp(min=1)


def _to_tokens(**pair: Tensor) -> Tensor:
    """A (B,) tensor in fp32, on each token of its response: (B, T) as the tensor named second."""
    (name, x), (other, like) = pair.items()
    if like.dim() != 2:
        raise ValueError(f"{other}.shape is {[*like.shape]}: expected (B, T)")
    if x.shape != like.shape[:1]:
        raise ValueError(f"{name}.shape is {[*x.shape]}: expected (B,), [{len(like)}]")
    return x.float()[:, None].expand(like.shape)


def _check(more: Callable = lambda on: [], **tensors: Tensor) -> Tensor:
    """The first tensor, a mask, as bool (B, T), if it and the others mean something. more(on): as _refuse."""
    (first, mask), *_ = tensors.items()
    for name, x in tensors.items():
        if mask.dim() != 2 or x.shape != mask.shape or not x.numel():
            raise ValueError(f"{name}.shape is {[*x.shape]}: expected (B, T), like {first} {[*mask.shape]}")
        if name != "mask" and not (x.dtype == DTYPES[name] if name in DTYPES else x.is_floating_point()):
            raise TypeError(f"{name}.dtype is {x.dtype}: expected {DTYPES.get(name, 'floating point')}")
    on = mask.bool()                                                        # (B, T)
    wrong = [(first, mask, (mask != 0) & (mask != 1), "0 or 1")]
    if first == "mask":                                                     # others may have holes
        wrong.append(("mask", mask, on & ~F.pad(on[:, :-1], (1, 0), value=True), "0 after a 0"))
    wrong += [(name, x, on & ~x.isfinite(), "a finite number") for name, x in tensors.items()]
    _refuse(wrong + more(on))
    return on


def _refuse(wrong: list[tuple[str, Tensor, Tensor, str]]) -> None:
    """ValueError at the first mark of a (name, x, marks, expected). One look at the device, more to raise."""
    if torch.stack([marks.any() for _, _, marks, _ in wrong]).any():
        name, x, marks, expected = next(each for each in wrong if each[2].any())
        place = marks.nonzero()[0].tolist()
        raise ValueError(f"{name} is {x[tuple(place)].item()} at {place}: expected {expected}")


def _check_range(low: float, high: float, **numbers: float) -> None:
    for name, number in numbers.items():
        if not low <= number <= high:
            raise ValueError(f"{name} is {number}: expected a number in [{low}, {high}]")


def _check_ends(ends: Tensor, mask: Tensor, **tensors: Tensor) -> Tensor:
    return _check(lambda on: [("ends", ends, ends & ~on, "False on padding"),
                              ("ends", ends, _last(on) & ~ends, "True on the last token of a response")],
                  mask=mask, ends=ends, **tensors)
