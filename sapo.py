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

    prompt | response        x_1   x_2 | y_1   y_2   y_3      tokens, mask: [:, -T:] of such rows, or [:, 1:]
    predicted at each              y_1   y_2   y_3            logits, values: [:, -T-1:-1], or [:, :-1]

A wrong response (outcome 0): the 7 is misread, V falls there, and its segment has the lowest advantage A.

    >>> _worked_response()                                              # python sapo.py
    token              red        3 |   blue        7 |      =       10
    entropy            0.1      0.9 |      0      0.8 |      0      0.1
    V, read here       0.5          |    0.6          |    0.2
    delta              0.1      0.1 |   -0.4     -0.4 |   -0.2     -0.2
    A, lambda = 1     -0.5     -0.5 |   -0.6     -0.6 |   -0.2     -0.2
    A, lambda = 0.9 -0.422   -0.422 |  -0.58    -0.58 |   -0.2     -0.2
    ratio              0.9      0.9 |    0.7      0.7 |    1.1      1.1

B responses, T tokens, M segments. Tensors are (B, T) over *response* tokens unless a docstring says other.
`mask` is 1 on a row's response tokens, which are contiguous, else 0: padding is ignored, even NaN; rows of 0s
are skipped. `ends` is True on a segment's last token; `outcome` (B,) is the verifier's verdict, `rewards` are
per token; `values[:, t]` is V *before* token t. Losses are means over the tokens (value loss: segments) of a
response, then over responses. Losses of micro-batches add up, each times its share of responses with tokens.

With `ends_every_token` this is PPO (lam=0.95) or VC-PPO (lam=0.99, lam_returns=1).
"""

import math
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DTYPES = {"ends": torch.bool, "value_mask": torch.bool, "token_ids": torch.long}  # others: floating point
ONE_RUN = ("1s in one run. No paper says what to do with a hole, such as a tool's answer between two turns: "
           "mask the row out, or train on the turns as separate rows")


# ----------------------------------------------------------------------------------------- where segments end
def token_entropy(logits: Tensor) -> Tensor:
    """Entropy of the next-token distribution over the full vocabulary, in nats. Eq. 11 (arXiv 2605.01327).

    logits (B, T, V) from which token t was drawn, divided by the temperature, of the policy that *sampled*:
    segments stay fixed for all updates on a batch. -> (B, T), fp32, no gradient.

    >>> token_entropy(torch.tensor([[[0.0, 0.0], [0.0, -torch.inf]]]))     # a fair coin; a banned token
    tensor([[0.6931, 0.0000]])
    """
    if logits.dim() != 3 or not logits.is_floating_point():
        raise ValueError(f"logits is {logits.dtype} {[*logits.shape]}: expected floating point (B, T, V)")
    return torch.cat([torch.special.entr(piece.float().softmax(-1)).sum(-1)  # Eq. 11: -sum_v p_v log p_v
                      for piece in logits.detach().chunk(32, dim=1)], dim=1)  # (B, T); pieces save memory


def ends_by_entropy(entropy: Tensor, mask: Tensor, top_percent: float = 30.0) -> Tensor:
    """End a segment at each of a response's most uncertain tokens. Section 4.2 (arXiv 2605.01327), k = 30.

    entropy (B, T); top_percent from 1 to 100. -> bool (B, T), True on the last token of each segment:
    ceil(top_percent * length / 100) tokens (the earlier of equals) and the last response token.

    >>> ends_by_entropy(torch.tensor([[0.1, 0.9, 0.0, 0.8, 0.0, 0.1]]), torch.ones(1, 6))
    tensor([[False,  True, False,  True, False,  True]])
    """
    mask = _check(mask=mask, entropy=entropy)
    if not 1 <= top_percent <= 100:
        raise ValueError(f"top_percent is {top_percent}: expected a percentage from 1 to 100 (30, not 0.3)")
    share = Fraction(top_percent).limit_denominator(10**6) / 100            # in floats, 1.1 % of 3,000 is 34
    count = -(-mask.sum(1, keepdim=True) * share.numerator // share.denominator)  # ceil(k T / 100), (B, 1)
    order = entropy.masked_fill(~mask, -torch.inf).argsort(stable=True, dim=1, descending=True)  # (B, T)
    top = torch.arange(mask.shape[1], device=mask.device) < count           # by rank, (B, T)
    return torch.zeros_like(mask).scatter(1, order, top) | _last(mask)      # by token, (B, T)


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
    _check_range(1, torch.inf, every=every)
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
    """Number the segments of each response 0, 1, 2 ..., padding -1. -> long (B, T). Eq. 5 (arXiv 2605.01327).

    >>> segment_ids(torch.tensor([[False, True, False, True, False]]), torch.tensor([[1, 1, 1, 1, 0]]))
    tensor([[ 0,  0,  1,  1, -1]])
    """
    mask = _check(mask=mask, ends=ends)
    return F.pad(ends[:, :-1], (1, 0)).cumsum(1).masked_fill(~mask, -1)     # ends before token t, (B, T)


def _segments(ends: Tensor, mask: Tensor, *per_token: Tensor) -> tuple[Tensor, ...]:
    """The number of each token's segment, of padding one more, (B, T); and sums over each number, (B, M)."""
    slots = torch.where(mask, F.pad(ends[:, :-1], (1, 0)).cumsum(1), ends.sum(1, keepdim=True))  # (B, T)
    M = int(slots.max()) + 1
    return slots, *(x.new_zeros(len(x), M).scatter_add(1, slots, x) for x in per_token)


# ------------------------------------------------------------------------------------------------- advantages
@torch.no_grad()
def kl_rewards(outcome: Tensor, old_log_probs: Tensor, ref_log_probs: Tensor | None, mask: Tensor,
               kl_coef: float) -> Tensor:
    """The outcome on the last response token, a k1 KL penalty on every token. Table 7 (arXiv 2605.01327).

    outcome (B,); old_log_probs, ref_log_probs (B, T) of the sampling and the reference policy; kl_coef >= 0
    (0.001 in Table 7; 0 if ref_log_probs is None). -> rewards (B, T), 0 on padding, no gradient.

    >>> kl_rewards(torch.ones(1), torch.zeros(1, 2), -torch.ones(1, 2), torch.ones(1, 2), kl_coef=0.25)
    tensor([[-0.2500,  0.7500]])
    """
    if kl_coef > 0 and ref_log_probs is None:
        raise ValueError(f"ref_log_probs is None: expected log-probabilities, as kl_coef is {kl_coef}")
    reference = old_log_probs if ref_log_probs is None else ref_log_probs
    if mask.dim() == 2 and outcome.shape != mask.shape[:1]:
        raise ValueError(f"outcome.shape is {[*outcome.shape]}: expected (B,), [{len(mask)}]")
    outcome = outcome.float()[:, None].expand(-1, mask.shape[-1])           # (B, T)
    mask = _check(mask=mask, outcome=outcome, old_log_probs=old_log_probs, ref_log_probs=reference)
    _check_range(0, torch.inf, kl_coef=kl_coef)
    k1 = (old_log_probs.float() - reference.float()).masked_fill(~mask, 0.0)  # log pi_old / pi_ref, (B, T)
    return torch.where(_last(mask), outcome, 0.0) - kl_coef * k1


@torch.no_grad()
def segment_gae(rewards: Tensor, values: Tensor, ends: Tensor, mask: Tensor, gamma: float = 1.0,
                lam: float = 0.99, value_at: str = "start",
                lam_returns: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Generalised advantage estimation with segments for time steps. Eq. 6-7 (arXiv 2605.01327).

    rewards, values (B, T); gamma, lam in [0, 1] (Table 7: 1 and 0.99); lam_returns: another lambda for the
    returns, as VC-PPO has. value_at: "start" reads V before the first token of a segment (the paper's s_m),
    "last" before its last (official code, Fig. 2), so that its other tokens are credited to the segment
    before: harmless only where segments end at uncertain tokens. -> advantages, returns (B, T): constant in a
    segment, 0 on padding, no gradient; value_mask, bool (B, T): the tokens whose V was read and is trained.

    >>> values, ends = torch.tensor([[0.5, 9, 0.6, 9, 0.2, 9]]), torch.tensor([[0, 1, 0, 1, 0, 1]]) > 0
    >>> segment_gae(torch.zeros(1, 6), values, ends, torch.ones(1, 6), lam=0.9)[0]
    tensor([[-0.4220, -0.4220, -0.5800, -0.5800, -0.2000, -0.2000]])
    """
    mask = _check(mask=mask, ends=ends, rewards=rewards, values=values)
    lam_returns = lam if lam_returns is None else lam_returns
    _check_range(0, 1, gamma=gamma, lam=lam, lam_returns=lam_returns)
    if value_at not in ("start", "last"):
        raise ValueError(f'value_at is {value_at!r}: expected "start" or "last"')
    starts = mask & ~F.pad((mask & ~ends)[:, :-1], (1, 0))                  # no segment goes on here, (B, T)
    value_mask = starts if value_at == "start" else ends
    slots, r, v = _segments(ends, mask, rewards.float().masked_fill(~mask, 0.0),  # r_m: sum over z_m
                            values.float().masked_fill(~value_mask, 0.0))   # V(s_m), (B, M)
    # The empty slot behind the last segment of a row *is* the V = 0 after the end. Eq. 6: delta_m, (B, M)
    delta = r + gamma * F.pad(v[:, 1:], (0, 1)) - v
    A, A_returns = delta.T.clone(), delta.T.clone()                         # (M, B): row m is segment m
    for m in reversed(range(len(A) - 1)):
        A[m] += gamma * lam * A[m + 1]                                      # Eq. 7: A_m, (B,)
        A_returns[m] += gamma * lam_returns * A_returns[m + 1]              # the same with lam_returns
    advantages, returns = A.T, A_returns.T + v                              # Eq. 7: A_m, R_m, (B, M)
    return advantages.gather(1, slots), returns.gather(1, slots), value_mask  # A_t = A_m, R_t = R_m, (B, T)


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

    >>> new, ends = torch.tensor([[1, 0.81, 1, 0.49, 1, 1.21]]).log(), torch.tensor([[0, 1, 0, 1, 0, 1]]) > 0
    >>> segment_ratio(new, torch.zeros(1, 6), ends, torch.ones(1, 6))
    tensor([[0.9000, 0.9000, 0.7000, 0.7000, 1.1000, 1.1000]])
    """
    mask = _check(mask=mask, ends=ends, log_probs=log_probs, old_log_probs=old_log_probs)
    return _ratios(log_probs, old_log_probs, ends, mask)[0]


def _ratios(log_probs: Tensor, old_log_probs: Tensor, ends: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """segment_ratio, and the log-ratio of each token, 0 on padding. Both (B, T)."""
    log_ratio = (log_probs.float() - old_log_probs.detach().float()).masked_fill(~mask, 0.0)  # (B, T)
    slots, total, length = _segments(ends, mask, log_ratio, mask.float())   # length: |z_m|, (B, M)
    ratio = (total / length.clamp(min=1)).clamp(-20, 20).exp()              # Eq. 8: s_m(theta), (B, M)
    return ratio.gather(1, slots), log_ratio


def policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, ends: Tensor, mask: Tensor,
                clip_low: float = 0.2, clip_high: float = 0.2) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped objective with the segment ratio, negated. Eq. 9 (arXiv 2605.01327).

    log_probs (B, T), differentiable; old_log_probs, advantages (B, T), constant. The gradient where no clip
    binds: Eq. 13. For the token-level ratio (Table 2), pass ends_every_token(mask) here, with advantages that
    came from segment ends. -> loss (); and metrics, detached, (), all 0 before the first update:
    clip_fraction (tokens whose clip binds), kl_step and kl_step_k3 (k1 and k3 estimates of KL(old || new),
    nats a token), max_ratio_deviation and mean_ratio_deviation (of |ratio - 1|).

    >>> mask, zeros = torch.ones(1, 2), torch.zeros(1, 2)
    >>> policy_loss(zeros, zeros, torch.tensor([[1.0, 3.0]]), ends_every_token(mask), mask)[0]
    tensor(-2.)
    """
    mask = _check(mask=mask, ends=ends, log_probs=log_probs, old_log_probs=old_log_probs,
                  advantages=advantages)
    _check_range(0, 1, clip_low=clip_low)
    _check_range(0, torch.inf, clip_high=clip_high)
    advantages = advantages.detach().float().masked_fill(~mask, 0.0)        # (B, T)
    ratio, log_ratio = _ratios(log_probs, old_log_probs, ends, mask)        # Eq. 8, (B, T)
    unclipped = ratio * advantages                                          # (B, T)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages         # (B, T)
    loss = -_mean(torch.minimum(unclipped, clipped), mask)                  # Eq. 9, ()
    with torch.no_grad():
        deviation, d = (ratio - 1).abs(), log_ratio.clamp(max=20)           # exp(d) must not overflow, (B, T)
        return loss, {"clip_fraction": _mean(clipped < unclipped, mask), "kl_step": _mean(-log_ratio, mask),
                      "kl_step_k3": _mean(torch.expm1(d) - d, mask),        # of exp(d) - 1 - d >= 0
                      "max_ratio_deviation": deviation.max(), "mean_ratio_deviation": _mean(deviation, mask)}


def value_loss(values: Tensor, returns: Tensor, value_mask: Tensor, old_values: Tensor | None = None,
               clip: float | None = None) -> Tensor:
    """Squared error of the critic, once per segment. Eq. 10 (arXiv 2605.01327).

    values (B, T), differentiable; returns (B, T) and value_mask, bool (B, T), from segment_gae. old_values
    (B, T) and clip, both or neither: PPO's value clipping, the larger of the two squared errors. -> ().

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
        _check_range(0, torch.inf, clip=clip)
        old_values = old_values.detach().float()
        near = old_values + (values - old_values).clamp(-clip, clip)        # (B, T)
        error = torch.maximum(error, (near - returns).masked_fill(~value_mask, 0.0).square())
    return _mean(error, value_mask)


# ---------------------------------------------------------------------------------------- critic and evidence
class SegmentCritic(nn.Module):
    """A value head on a backbone's last hidden states; at first V = 0. Section 4.1.2 (arXiv 2605.01327)."""
    def __init__(self, backbone: nn.Module, hidden_size: int):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, response_length: int, **inputs) -> Tensor:
        """inputs (B, L): prompt, left-padded; T = response_length tokens, right-padded. -> values (B, T)."""
        hidden = self.backbone(**inputs).last_hidden_state                  # (B, L, H)
        L, T = hidden.shape[1], response_length
        if not 1 <= T < L:
            raise ValueError(f"response_length is {T}: expected 1 to {L - 1}, as the inputs have length {L}")
        before = hidden[:, L - T - 1:L - 1]                                 # token t is unseen, (B, T, H)
        return self.head(before.to(self.head.weight.dtype)).squeeze(-1).float()  # (B, T)


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

    def at_or_above(x, q):                                                  # torch.quantile ends at 2**24
        ordered, at = x[keep].float().sort().values, q * (int(keep.sum()) - 1)
        return keep & (x >= ordered[math.floor(at)].lerp(ordered[math.ceil(at)], at % 1))  # (B, T)
    A, D = at_or_above(entropy, quantile), at_or_above(jump, jump_quantile)
    counts = torch.stack([keep, A, D, A & D], -1).sum(1)[mask.any(1)].cpu().double()  # per response, (B, 4)
    rows = torch.randint(len(counts), (resamples, len(counts)), generator=torch.Generator().manual_seed(seed))
    n, n_a, n_d, n_ad = torch.cat([counts.sum(0, keepdim=True), counts[rows].sum(1)]).T  # all, resampled
    lifts = (n_ad / n_a) / (n_d / n)                                        # Eq. 12, (1 + R,)
    return lifts[0].item(), *lifts[1:].nanquantile(torch.tensor([0.025, 0.975]).double()).tolist()


# --------------------------------------------------------- helpers and checks, word for word those of srpo.py
def _mean(x: Tensor, mask: Tensor) -> Tensor:
    """Over the tokens of a response, then over the responses that have any; x is 0 elsewhere. (B, T) -> ()"""
    tokens = mask.sum(1, dtype=torch.float32)                               # (B,)
    return (x.sum(1, dtype=torch.float32) / tokens.clamp(min=1)).sum() / (tokens > 0).sum().clamp(min=1)


def _check(**given: Tensor) -> Tensor:
    """Raise ValueError or TypeError if a tensor is wrong. -> the first, a mask, as bool (B, T)."""
    first, mask = next(iter(given.items()))
    on, wrong = mask.bool(), {}                                             # wrong: (name, expected) -> where
    for name, x in given.items():                                           # shapes, dtypes, finite numbers
        if mask.dim() != 2 or x.shape != mask.shape or not x.numel():
            raise ValueError(f"{name}.shape is {[*x.shape]}: expected (B, T), like {first} {[*mask.shape]}")
        expected = DTYPES.get(name, "floating point")
        if name != "mask" and expected != ("floating point" if x.is_floating_point() else x.dtype):
            raise TypeError(f"{name}.dtype is {x.dtype}: expected {expected}")
        if x.is_floating_point():
            wrong[name, "a finite number"] = on & ~x.isfinite()
    if first == "mask":                                                     # other masks may have holes
        wrong["mask", "0 or 1"] = mask != on
        wrong["mask", ONE_RUN] = on & ~on.roll(1, 1) & (on.cumsum(1) > 1)
    if "ends" in given:
        right = given["ends"] & on | _last(on)
        wrong["ends", "True on a response's last token, False where mask is 0"] = given["ends"] != right
    if wrong and torch.stack([marks.any() for marks in wrong.values()]).any():  # its one wait for the device
        for (name, expected), marks in wrong.items():
            for at in marks.nonzero().tolist():
                raise ValueError(f"{name} is {given[name][tuple(at)].item()} at {at}: expected {expected}")
    return on


def _check_range(low: float, high: float, **numbers: float) -> None:
    for name, number in numbers.items():
        if not low <= number <= high:
            raise ValueError(f"{name} is {number}: expected a number in [{low}, {high}]")


def _worked_response() -> None:
    """Print the table of the header. With lambda = 0 an advantage is delta: Eq. 7 then is Eq. 6."""
    zeros, mask = torch.zeros(1, 6), torch.ones(1, 6)                       # rewards, old log-probs: 0
    entropy, values = torch.tensor([[0.1, 0.9, 0, 0.8, 0, 0.1]]), torch.tensor([[0.5, 0, 0.6, 0, 0.2, 0]])
    ends, table = ends_by_entropy(entropy, mask), {"token": [["red", "3", "blue", "7", "=", "10"]]}
    table |= {"entropy": entropy, "V, read here": values.masked_fill(values == 0, torch.nan)}
    for name, lam in {"delta": 0.0, "A, lambda = 1": 1.0, "A, lambda = 0.9": 0.9}.items():
        table[name], *_ = segment_gae(zeros, values, ends, mask, lam=lam)
    table["ratio"] = segment_ratio(torch.tensor([[1, 0.81, 1, 0.49, 1, 1.21]]).log(), zeros, ends, mask)
    for name, (row,) in table.items():
        cells = [x if name == "token" else f"{x:.3g}".replace("nan", "") for x in row]
        bars = [" |" if end else "  " for end in ends[0, :-1]] + [""]
        print(f"{name:15}" + "".join(f"{x:>7}{bar}" for x, bar in zip(cells, bars)).rstrip())


if __name__ == "__main__":
    _worked_response()
