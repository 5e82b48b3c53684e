"""SAPO: Segment-Aligned Policy Optimization (arXiv 2605.01327, ICML 2026), in one file.

NOT the "SAPO" of TRL (loss_type="sapo"), verl, ms-swift, AReaL and slime: that is *Soft Adaptive Policy
Optimization* (arXiv 2511.20347), an unrelated method that replaces the PPO clip by a sigmoid gate.

The idea: a response is cut after its most uncertain tokens, and each segment is then one action of PPO: one
value, one advantage and one importance ratio, shared by all its tokens. Read from top to bottom:

    ends        where the segments end        token_entropy, ends_by_*      Eq. 11, section 4.2
    advantages  how good each segment was     kl_rewards, segment_gae       Eq. 6-7
    ratio       how much more likely now      segment_ratio                 Eq. 8
    loss        what is minimised             policy_loss, value_loss       Eq. 9-10

B responses, T tokens, M segments. Every tensor is (B, T) over *response* tokens unless its docstring says
otherwise; `mask` is 1 on response tokens, 0 on the padding to their right; `values[:, t]` is V of the prefix
before token t. What the padding holds, NaN included, changes no output and no gradient. A wrong dtype raises
TypeError, any other bad input ValueError; both name the argument and what was expected.

PPO, VC-PPO and GSPO are the same functions with other `ends`:

    PPO      ends = ends_every_token(mask)                                   # one token is one segment
             advantages, returns, value_mask = segment_gae(rewards, values, ends, mask, lam=0.95)
    VC-PPO   ... = segment_gae(rewards, values, ends, mask, lam=0.99, lam_returns=1.0)
    GSPO     ratio = segment_ratio(log_probs, old_log_probs, ends_once(mask), mask)

Where the paper, its official code and this file differ (the default is the paper's form):

    V of a segment   paper: before its first token; official code: before its last. `value_at` has both.
    averaging        paper: over the tokens of a response, then over responses (here). Official code: over all
                     tokens of the mini-batch.
    advantages       official code whitens them, then clamps to +-5. Here `whiten` is apart; no clamp.
    clip             paper: 1 +- epsilon (here, low and high apart). Official code: 0.2 and 0.28, and a second
                     clip at 3.0 where the advantage is negative, which is left out.
    ratio            mean log-ratio clamped to +-20 (ours, official code's number): a guard against overflow.
    value loss       official code: always clipped, times 1/2. Here clipping is optional and there is no 1/2.
    KL penalty       Table 7: in the reward of each token. segment_gae sums it inside a segment, so r_m != 0.
    top k %          rounded up exactly, at least one token, ties to the earlier (ours; paper: silent).
"""

import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# ----------------------------------------------------------------------------------------- where segments end

@torch.no_grad()
def token_entropy(logits: Tensor) -> Tensor:
    """Entropy of the next-token distribution over the full vocabulary, in nats. Eq. 11 (arXiv 2605.01327).

    logits (B, T, V), divided by the sampling temperature, of the policy that *sampled*. -> (B, T), fp32, no
    gradient. Keep it for all updates on a batch, so that the segments stay fixed.

    >>> token_entropy(torch.tensor([[[0.0, 0.0], [0.0, -torch.inf]]]))     # a fair coin; a banned token
    tensor([[0.6931, 0.0000]])
    """
    if logits.dim() != 3:
        raise ValueError(f"logits has shape {tuple(logits.shape)}: expected (B, T, V)")
    if not logits.is_floating_point():
        raise TypeError(f"logits has dtype {logits.dtype}: expected floating point")
    return torch.cat([torch.special.entr(piece.float().softmax(-1)).sum(-1)  # Eq. 11: -sum_v p_v log p_v
                      for piece in logits.chunk(32, dim=1)], dim=1)         # (B, T); pieces save memory


def ends_by_entropy(entropy: Tensor, mask: Tensor, top_percent: float = 30.0) -> Tensor:
    """End a segment at each of a response's most uncertain tokens. Section 4.2 (arXiv 2605.01327), k = 30.

    entropy (B, T); top_percent in (0, 100], so 0.5 is half a percent. -> bool (B, T), True on the last token
    of each segment: ceil(top_percent * length / 100) tokens, at least 1, and the last response token.

    >>> ends_by_entropy(torch.tensor([[0.1, 2.0, 0.3, 1.0, 0.2]]), torch.ones(1, 5), top_percent=40)
    tensor([[False,  True, False,  True,  True]])
    """
    mask = _check(mask, entropy=entropy)
    if not 0 < top_percent <= 100:
        raise ValueError(f"top_percent is {top_percent}: expected a percentage in (0, 100]")
    # ceil(k T / 100) in whole millionths of a percent: in floats, 1.1 % of 3000 would round up to 34. (B, 1)
    count = (mask.sum(1, keepdim=True) * round(top_percent * 10**6) + 10**8 - 1) // 10**8
    # rank -> token, (B, T); a stable sort keeps the earlier of two equals first
    order = entropy.masked_fill(~mask, -torch.inf).argsort(stable=True, dim=1, descending=True)
    top = torch.arange(mask.shape[1], device=mask.device) < count.clamp(min=1)  # by rank, (B, T)
    return torch.zeros_like(mask).scatter(1, order, top) | _last(mask)      # by token, (B, T)


def _last(mask: Tensor) -> Tensor:
    """True on the last response token of each response, (B, T)."""
    return mask & ~F.pad(mask[:, 1:], (0, 1))


def ends_by_token(token_ids: Tensor, mask: Tensor, boundary_ids) -> Tensor:
    """End a segment at given tokens. Newline and step splitting of Table 3 (arXiv 2605.01327).

    token_ids, long (B, T); boundary_ids: a list or tensor of token ids, such as those of all tokens with a
    newline, or of a step marker; a segment ends with such a token. -> bool (B, T), as ends_by_entropy.

    >>> ends_by_token(torch.tensor([[5, 9, 5, 5]]), torch.ones(1, 4), boundary_ids=[9])
    tensor([[False,  True, False,  True]])
    """
    mask = _check(mask, token_ids=token_ids)
    boundary = torch.as_tensor(boundary_ids, dtype=torch.long, device=mask.device)
    return torch.isin(token_ids, boundary) & mask | _last(mask)


def ends_by_probability(log_probs: Tensor, mask: Tensor, below: float = 0.9, every: int = 5) -> Tensor:
    """End a segment at every `every`-th token whose probability is under `below`. Table 3 (arXiv 2605.01327).

    The cut of SPO (arXiv 2505.23564). log_probs (B, T) of the policy that sampled -> bool (B, T).

    >>> ends_by_probability(torch.tensor([[0.5, 0.99, 0.5, 0.5, 0.99]]).log(), torch.ones(1, 5), every=2)
    tensor([[False, False,  True, False,  True]])
    """
    mask = _check(mask, log_probs=log_probs)
    _check_range(0, 1, below=below)
    _check_range(1, math.inf, every=every)
    low = (log_probs.float().exp() < below) & mask                          # (B, T)
    return low & (low.cumsum(1) % every == 0) | _last(mask)


def ends_every_token(mask: Tensor) -> Tensor:
    """One segment per token: token-level PPO. -> bool (B, T).

    >>> ends_every_token(torch.tensor([[1, 1, 0]]))
    tensor([[ True,  True, False]])
    """
    return _check(mask).clone()


def ends_once(mask: Tensor) -> Tensor:
    """One segment per response: its ratio is that of GSPO (arXiv 2507.18071). -> bool (B, T).

    >>> ends_once(torch.tensor([[1, 1, 0]]))
    tensor([[False,  True, False]])
    """
    return _last(_check(mask))


# ------------------------------------------------------------------------- between tokens (B, T) and segments

def segment_ids(ends: Tensor, mask: Tensor) -> Tensor:
    """Number the segments of each response. Eq. 5 (arXiv 2605.01327).

    ends, bool (B, T) -> long (B, T): 0, 1, 2 ... in each response, -1 on padding.

    >>> segment_ids(torch.tensor([[False, True, False, True, False]]), torch.tensor([[1, 1, 1, 1, 0]]))
    tensor([[ 0,  0,  1,  1, -1]])
    """
    mask = _check(mask, ends=ends)
    return _slots(ends).masked_fill(~mask, -1)


def _slots(ends: Tensor) -> Tensor:
    """segment_ids, but with padding in a slot of its own after the last segment: V(s_{M+1}) = r = 0."""
    return F.pad(ends[:, :-1], (1, 0)).cumsum(1)                            # ends before token t, (B, T)


def _sum(x: Tensor, slots: Tensor) -> Tensor:
    """Sum over the tokens of each segment, (B, T) -> (B, M)."""
    return x.new_zeros(len(x), int(slots.max()) + 1).scatter_add(1, slots, x)


# ------------------------------------------------------------------------------------------------- advantages

@torch.no_grad()
def kl_rewards(scores: Tensor, log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor,
               kl_coef: float) -> Tensor:
    """Outcome score on the last response token, k1 KL penalty on every token. Table 7 (arXiv 2605.01327).

    scores (B,), finite; log_probs, ref_log_probs (B, T) of the sampling and reference policies; kl_coef >= 0
    (0.001 in Table 7). -> rewards (B, T), 0 on padding, no gradient.

    >>> ones = torch.ones(1, 2)
    >>> kl_rewards(torch.tensor([1.0]), -1 * ones, -2 * ones, ones, kl_coef=0.25)
    tensor([[-0.2500,  0.7500]])
    """
    mask = _check(mask, log_probs=log_probs, ref_log_probs=ref_log_probs)
    _check_range(0, math.inf, kl_coef=kl_coef)
    if scores.shape != mask.shape[:1] or not torch.isfinite(scores).all():
        raise ValueError(f"scores is {scores.tolist()}: expected {len(mask)} finite numbers, (B,)")
    k1 = (log_probs.float() - ref_log_probs.float()).masked_fill(~mask, 0.0)  # log pi / pi_ref, (B, T)
    return torch.where(_last(mask), scores.float()[:, None], 0.0) - kl_coef * k1


@torch.no_grad()
def segment_gae(rewards: Tensor, values: Tensor, ends: Tensor, mask: Tensor, gamma: float = 1.0,
                lam: float = 0.99, value_at: str = "start",
                lam_returns: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Generalised advantage estimation with segments for time steps. Eq. 6-7 (arXiv 2605.01327).

    rewards, values (B, T); gamma, lam in [0, 1] (Table 7: 1 and 0.99). value_at: "start" reads V before the
    first token of a segment (the paper's s_m), "last" before its last token (official code, Fig. 2). "last" is a
    baseline that knows all but the last token: for ends at the uncertain token only, not for ends of lines.
    lam_returns: another lambda for the returns, as VC-PPO has; None means lam.
    -> advantages, returns (B, T): constant over a segment, 0 on padding, no gradient; value_mask, bool
    (B, T): the one token of each segment whose value was read, and is to be trained.

    >>> rewards, values = torch.tensor([[0.0, 0, 1]]), torch.tensor([[0.5, 0.1, 0.75]])
    >>> segment_gae(rewards, values, torch.tensor([[False, True, True]]), torch.ones(1, 3), lam=1.0)
    (tensor([[0.5000, 0.5000, 0.2500]]), tensor([[1., 1., 1.]]), tensor([[ True, False,  True]]))
    """
    mask = _check(mask, ends=ends, rewards=rewards, values=values)
    _check_range(0, 1, gamma=gamma, lam=lam, lam_returns=lam if lam_returns is None else lam_returns)
    if value_at not in ("start", "last"):
        raise ValueError(f'value_at is {value_at!r}: expected "start" or "last"')
    slots = _slots(ends)                                                    # (B, T)
    starts = F.pad(ends[:, :-1], (1, 0), value=True) & mask                 # (B, T)
    value_mask = starts if value_at == "start" else ends
    r = _sum(rewards.float().masked_fill(~mask, 0.0), slots)                # r_m, (B, M)
    v = _sum(values.float().masked_fill(~value_mask, 0.0), slots)           # V(s_m), (B, M)
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


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Zero mean and unit (population) standard deviation over all response tokens, as the official code does.

    x (B, T), such as advantages; once only. -> (B, T), 0 on padding. A constant x gives 0.

    >>> whiten(torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[1, 1, 0]]))
    tensor([[-1.,  1.,  0.]])
    """
    mask = _check(mask, x=x)
    mean = x.float().masked_fill(~mask, 0.0).sum() / mask.sum()
    centred = (x.float() - mean).masked_fill(~mask, 0.0)                    # (B, T)
    return centred * (centred.square().sum() / mask.sum() + 1e-8).rsqrt()   # 1e-8 as in the official code


# --------------------------------------------------------------------------------------------- ratio and loss

def segment_ratio(log_probs: Tensor, old_log_probs: Tensor, ends: Tensor, mask: Tensor) -> Tensor:
    """Importance ratio of a segment: the geometric mean of its token ratios. Eq. 8 (arXiv 2605.01327).

    log_probs (B, T), differentiable; old_log_probs (B, T), constant. -> (B, T), constant over a segment, 1 on
    padding. The mean log-ratio is clamped to +-20. Its distance to the product of the ratios: Eq. 21, 26.

    >>> log_probs = torch.tensor([[1.0, 4.0, 2.0]]).log()
    >>> segment_ratio(log_probs, torch.zeros(1, 3), torch.tensor([[False, True, True]]), torch.ones(1, 3))
    tensor([[2., 2., 2.]])
    """
    mask = _check(mask, ends=ends, log_probs=log_probs, old_log_probs=old_log_probs)
    slots = _slots(ends)                                                    # (B, T)
    log_ratio = (log_probs.float() - old_log_probs.detach().float()).masked_fill(~mask, 0.0)  # (B, T)
    mean = _sum(log_ratio, slots) / _sum(mask.float(), slots).clamp(min=1)  # over |z_m| tokens, (B, M)
    return mean.clamp(-20, 20).exp().gather(1, slots)                       # Eq. 8: s_m on each token, (B, T)


def policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, ends: Tensor, mask: Tensor,
                clip_low: float = 0.2, clip_high: float = 0.2) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped objective with the segment ratio, negated. Eq. 9 (arXiv 2605.01327).

    log_probs (B, T), differentiable; old_log_probs, advantages (B, T), constant; the ratio is kept in
    [1 - clip_low, 1 + clip_high]. The gradient where no clip binds: Eq. 13. For the token-level ratio (the
    ablation of Table 2), pass ends_every_token(mask) here, with advantages that came from segment ends.
    -> loss (): mean over the tokens of a response, then over responses; and metrics, detached, shape (),
    means taken likewise: clip_fraction (tokens without gradient), kl_k1 and kl_k3 (KL(old || new) in nats a
    token), max_ratio_deviation and mean_ratio_deviation (|ratio - 1|). All are 0 before the first update.

    >>> mask, zeros = torch.ones(1, 2), torch.zeros(1, 2)
    >>> loss, metrics = policy_loss(zeros, zeros, torch.tensor([[1.0, 3.0]]), ends_every_token(mask), mask)
    >>> loss, metrics["clip_fraction"]
    (tensor(-2.), tensor(0.))
    """
    mask = _check(mask, ends=ends, log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
    _check_range(0, 1, clip_low=clip_low)
    _check_range(0, math.inf, clip_high=clip_high)
    advantages = advantages.detach().float().masked_fill(~mask, 0.0)        # (B, T)
    ratio = segment_ratio(log_probs, old_log_probs, ends, mask)             # Eq. 8, (B, T)
    metrics = _drift(ratio, log_probs, old_log_probs, mask)
    free = ratio * advantages                                               # (B, T)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages         # (B, T)
    capped = clipped < free                                                 # no gradient here, (B, T)
    loss = -_mean(torch.where(capped, clipped, free), mask)                 # Eq. 9: mean of the smaller, ()
    return loss, metrics | {"clip_fraction": _mean(capped, mask)}


@torch.no_grad()
def _drift(ratio: Tensor, log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """How far the policy has moved from the one that sampled, by segment ratio and by token KL."""
    k1 = (old_log_probs.float() - log_probs.float()).masked_fill(~mask, 0.0)  # mean: KL(old || new), (B, T)
    k3 = torch.expm1(-k1.clamp(min=-20)) + k1                               # the same mean, >= 0, (B, T)
    deviation = (ratio - 1).abs()                                           # 0 on padding, (B, T)
    return {"kl_k1": _mean(k1, mask), "kl_k3": _mean(k3, mask),
            "max_ratio_deviation": deviation.max(), "mean_ratio_deviation": _mean(deviation, mask)}


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    """Over the marked tokens of a response, then over responses; x is 0 on the others. (B, T) -> ()."""
    return (x.sum(1, dtype=torch.float32) / mask.sum(1, dtype=torch.float32)).mean()


def value_loss(values: Tensor, returns: Tensor, value_mask: Tensor, old_values: Tensor | None = None,
               clip: float | None = None) -> Tensor:
    """Squared error of the critic at the segment boundaries. Eq. 10 (arXiv 2605.01327).

    values (B, T), differentiable; returns (B, T) and value_mask, bool (B, T), from segment_gae. old_values
    (B, T) and clip, both or neither: PPO's value clipping, the larger of the two squared errors.
    -> (): mean over the boundaries of a response, then over responses.

    >>> value_loss(torch.tensor([[0.0, 9.0, 2.0]]), torch.ones(1, 3), torch.tensor([[True, False, True]]))
    tensor(1.)
    """
    if (old_values is None) != (clip is None):
        raise ValueError(f"old_values is {'None' if old_values is None else 'given'} and clip is {clip}: "
                         "expected both or neither")
    _check_tensors(value_mask=value_mask, values=values, returns=returns,
                   **({} if old_values is None else {"old_values": old_values}))
    _check_rows("value_mask", value_mask.any(1), "marks no token: expected at least one True")
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
    mask = _check(mask, entropy=entropy, values=values)
    _check_range(0, 1, quantile=quantile, jump_quantile=jump_quantile)
    keep = mask & ~_last(mask)                                              # (B, T)
    if not keep.any():
        raise ValueError("mask has no response of two tokens or more: expected one, as a jump needs V_{t+1}")
    jump = (values - F.pad(values[:, 1:], (0, 1))).float().abs()            # |V_t - V_{t+1}|, (B, T)
    A = keep & (entropy >= entropy[keep].float().quantile(quantile))        # (B, T)
    D = keep & (jump >= jump[keep].quantile(jump_quantile))                 # (B, T)
    counts = torch.stack([keep, A, D, A & D], -1).sum(1).double().cpu()     # per response, (B, 4)
    draws = torch.randint(len(mask), (resamples, len(mask)), generator=torch.Generator().manual_seed(seed))
    both = torch.cat([counts.sum(0, keepdim=True), counts[draws].sum(1)])   # all, then resamples: (1 + R, 4)
    n, n_a, n_d, n_ad = both.unbind(1)
    lifts = (n_ad / n_a) / (n_d / n)                                        # Eq. 12, (1 + R,)
    interval = lifts[1:].nanquantile(torch.tensor([0.025, 0.975]).double())
    return lifts[0].item(), *interval.tolist()


# ----------------------------------------------------------------------------------------------------- checks

def _check(mask: Tensor, **tensors: Tensor) -> Tensor:
    """Raise on input that means nothing; return the mask as bool, (B, T)."""
    _check_tensors(mask=mask, **tensors)
    if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise ValueError("mask holds a value other than 0 and 1: expected 1 on response tokens, 0 on padding")
    mask = mask.bool()
    _check_rows("mask", mask.any(1), "has no response token: expected at least one 1")
    _check_rows("mask", (mask[:, 1:] <= mask[:, :-1]).all(1), "has a 1 after a 0: expected 1s, then only 0s")
    if "ends" in tensors:
        ends = tensors["ends"]
        _check_rows("ends", (ends <= mask).all(1), "marks padding: expected response tokens only")
        _check_rows("ends", (_last(mask) <= ends).all(1), "misses the last response token: expected True")
    return mask


def _check_tensors(**tensors: Tensor) -> None:
    (first, reference), *_ = tensors.items()
    dtypes = {"mask": reference.dtype, "ends": torch.bool, "value_mask": torch.bool, "token_ids": torch.long}
    for name, x in tensors.items():
        if x.dim() != 2 or x.shape != reference.shape or not len(x):
            raise ValueError(f"{name} has shape {tuple(x.shape)}, {first} {tuple(reference.shape)}: "
                             "expected the same (B, T) with B >= 1")
        if not (x.dtype == dtypes[name] if name in dtypes else x.is_floating_point()):
            raise TypeError(f"{name} has dtype {x.dtype}: expected {dtypes.get(name, 'floating point')}")


def _check_rows(name: str, good: Tensor, problem: str) -> None:
    if not good.all():
        raise ValueError(f"{name} row {int(good.int().argmin())} {problem}")


def _check_range(low: float, high: float, **numbers: float) -> None:
    for name, number in numbers.items():
        if not low <= number <= high:
            raise ValueError(f"{name} is {number}: expected a number in [{low}, {high}]")


# ------------------------------------------------------------------------------------------------------- demo

def demo() -> None:
    """Print what each function makes of one small response, with a slip: 7 - 3 is not 5."""
    tokens = "red 3 , blue 7 . so 7 - 3 = 5 . answer 5".split()
    entropy = [[.20, .10, .90, .40, .10, .30, 1.60, .50, 1.20, .20, .10, 1.90, .30, .80, .10]]
    values = [[.60, .60, .61, .62, .63, .64, .64, .66, .68, .72, .72, .72, .12, .10, .06]]
    old = [[-.2, -.1, -.9, -.4, -.1, -.3, -1.4, -.5, -1.1, -.2, -.1, -1.6, -.3, -.8, -.1]]
    new = [[-.2, -.1, -.8, -.4, -.1, -.2, -1.2, -.4, -.8, -.2, -.1, -2.6, -.3, -.8, -.2]]
    entropy, values, old, new = (torch.tensor(x) for x in (entropy, values, old, new))
    mask = torch.ones_like(entropy)
    rewards = kl_rewards(torch.tensor([0.0]), old, old, mask, kl_coef=0.001)  # wrong answer: 0

    ends = ends_by_entropy(entropy, mask, top_percent=30)
    ids = segment_ids(ends, mask)
    delta, _, _ = segment_gae(rewards, values, ends, mask, lam=0.0)         # Eq. 7 with lambda = 0 is delta
    advantages, returns, value_mask = segment_gae(rewards, values, ends, mask, lam=0.99)
    ratio = segment_ratio(new, old, ends, mask)
    loss, metrics = policy_loss(new, old, advantages, ends, mask)

    print("Red 3, blue 7: how many more blue?  Segments end (*) at the 30 % most uncertain tokens, "
          "and at the last.\n")
    print("token     entropy  segment       V       δ       Â       R̂   ratio")
    for t, token in enumerate(tokens):
        m = int(ids[0, t])
        row = f"{token:8} {entropy[0, t]:7.2f} {'*' if ends[0, t] else ' '} {m + 1:6} {values[0, t]:8.2f}"
        if value_mask[0, t]:                                                # once for each segment
            row += "".join(f"{x[0, t]:8.2f}" for x in (delta, advantages, returns, ratio))
        colour = f"\033[{31 + m % 6}m{row}\033[0m"
        print(colour if sys.stdout.isatty() else row)
    print("\nδ finds the slip, in segment 4; Â = Σ (γλ)^l δ passes it back to all that led there.")
    print(f"policy loss {loss:.4f}, value loss {value_loss(values, returns, value_mask):.4f}, "
          f"clipped {metrics['clip_fraction']:.0%}, KL (k3) {metrics['kl_k3']:.4f}")


if __name__ == "__main__":
    demo()
