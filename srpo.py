"""SRPO: Structured Role-Aware Policy Optimization (arXiv 2605.07274, 2026), in one file.

NOT Sample-Routed PO (2604.02288), reflection-aware SRPO (NeurIPS 2025) or two-Staged history-Resampling PO
(2504.14286), which share the acronym. BUILT FROM THE ABSTRACT ALONE: the formulas, their numbers (S1) to
(S6), the tags and every default are our reading of it, not checked against the paper.

The idea, from the abstract: GRPO with one weight per token. Perception tokens extract visual evidence,
reasoning tokens derive the answer from it. The policy scores its own tokens: perception by its dependence on
the image, reasoning by its consistency with the perception. One baseline per response joins both into a
positive weight. There is no teacher and no reward model. All but the last line run once per rollout:

    advantages = group_advantages(outcome, group_size)                                       (S1), GRPO's
    perception, reasoning = split_roles(pieces, mask)                                        P and R
    on_image = contrast(old_log_probs, log_probs_of_corrupted_image, mask)                   corrupt_image
    contrasts = torch.where(perception, on_image, -on_image)                                 (S2), P and R
    weights = role_weights(contrasts, perception, reasoning)                                 (S3), (S4)
    advantages = srpo_advantages(advantages, weights)                                        (S5)
    loss, metrics = grpo_loss(log_probs, old_log_probs, advantages, mask)                    (S6), GRPO's

    (S1)  A_i = (outcome_i - mean) / (std + 1e-6)                  over the group that shares a prompt
    (S2)  s_t = log p(y_t | x, image) - log p(y_t | x, corrupted image)   on P; its negative on R ("blind")
    (S3)  b_i = mean of s_t over P and R pooled: one baseline for both roles of a response
    (S4)  w_t = clamp(exp((s_t - b_i) / temperature), 1 - clip, 1 + clip) / its mean over P and R; 1 elsewhere
    (S5)  A_t = A_i [(1 - alpha) + alpha w_t]
    (S6)  loss = -mean_i mean_t min(ratio A_t, clamp(ratio, 1 - clip_low, 1 + clip_high) A_t) + kl_coef KL

Measured (results/README.md): as above SRPO is level with GRPO, and no better at making a guessing model look.
With `sign` it is better at that, and costs accuracy where nothing is guessed. Blanking P gave no more.

B responses, T tokens; tensors are (B, T) over *response* tokens unless a docstring says other. `mask` is 1 on
these, one run a row, else 0. Padding is ignored, even NaN; rows whose mask is all 0 are skipped.
"""

import random
import re
import warnings

import torch
from PIL import Image, ImageFilter, ImageStat
from torch import Tensor

DTYPES = {"perception": torch.bool, "reasoning": torch.bool, "role": torch.bool, "token_ids": torch.long}
ONE_RUN = ("1s in one run. No paper says what to do with a hole, such as a tool's answer between two turns: "
           "mask the row out, or train on the turns as separate rows")


def group_advantages(outcome: Tensor, group_size: int) -> Tensor:
    """How much better than its group a response is. (S1); DeepSeekMath, arXiv 2402.03300.

    outcome (B,); group_size responses in a row are a group, also any without tokens; std: n - 1. -> (B,).

    >>> group_advantages(torch.tensor([1, 0, 0, 1,   1, 1, 1, 1]), group_size=4)
    tensor([ 0.8660, -0.8660, -0.8660,  0.8660,  0.0000,  0.0000,  0.0000,  0.0000])
    """
    if outcome.dim() != 1 or not len(outcome):
        raise ValueError(f"outcome.shape is {[*outcome.shape]}: expected (B,)")
    if group_size < 2 or len(outcome) % group_size:
        raise ValueError(f"group_size is {group_size}: expected 2 or more, a divisor of B = {len(outcome)}")
    for i in (~outcome.isfinite()).nonzero():
        raise ValueError(f"outcome is {outcome[i].item()} at {i.tolist()}: expected a finite number")
    groups = outcome.float().reshape(-1, group_size)                        # (B / G, G)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)  # (S1)
    # Avoid spurious advantages from rounding: in fp32, eight equal outcomes of 0.9 would give 0.056.
    return advantages.masked_fill(groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True), 0.0).flatten()


# ----------------------------------------------------------------- roles: which tokens look, which ones think
TAGS = ["<perception>", "</perception>", "<think>", "</think>", "<answer>", "</answer>"]
FORMAT = re.compile(r"\s*<perception>(.*)</perception>\s*<think>(.*)</think>\s*<answer>.*</answer>\s*", re.S)


def split_roles(pieces: list[list[str]], mask: Tensor) -> tuple[Tensor, Tensor]:
    """Perception and reasoning tokens of each response. The tags are ours.

    pieces[i][t]: the text of token t alone ("" for special tokens), at least to the last response token.
    -> two bool (B, T): a token is perception (reasoning) if all its characters lie in the first (second)
    block. Tokens that touch a tag, the answer and responses that do not parse are neither: plain GRPO.

    >>> text = "<perception> red </perception> <think> so red </think> <answer> red </answer>"
    >>> [role.nonzero()[:, 1].tolist() for role in split_roles([text.split()], torch.ones(1, 10))]
    [[1], [4, 5]]
    """
    mask = _check(mask=mask)
    if len(pieces) != len(mask):
        raise ValueError(f"len(pieces) is {len(pieces)}: expected {len(mask)}, a list for each response")
    roles = torch.zeros(2, *mask.shape, dtype=torch.bool)
    for i, (row, on) in enumerate(zip(pieces, mask.tolist())):
        tokens = [t for t, is_response in enumerate(on) if is_response]
        length = tokens[-1] + 1 if tokens else 0
        if not length <= len(row) <= len(on):
            raise ValueError(f"len(pieces[{i}]) is {len(row)}: expected {length} to {len(on)}")
        text = "".join(row[t] for t in tokens)
        owner = [t for t in tokens for _ in row[t]]                         # the token of each character
        match = FORMAT.fullmatch(text) if all(text.count(tag) == 1 for tag in TAGS) else None
        for role, (a, b) in enumerate([match.span(1), match.span(2)] if match else []):
            roles[role, i, list({*owner[a:b]} - {*owner[:a]} - {*owner[b:]})] = True
    if 2 * roles.any(0).any(1).sum() < mask.any(1).sum():
        warnings.warn("fewer than half of the responses have perception or reasoning tokens, the others get "
                      "plain GRPO: is a tag missing, or a special token such as <|im_end|> left in the text?")
    return roles.to(mask.device).unbind()


# ------------------------------------------ contexts to compare with, contrasts, weights; GRPO's loss again
def corrupt_image(image: Image.Image, kind: str = "patches", share: float = 0.5, patch: int = 14,
                  seed: int = 0) -> Image.Image:
    """A new image of the same size and mode (RGB, L, RGBA) that shows less; deterministic in `seed`.

    kind "patches": each patch x patch tile is blackened with probability `share` (as VPPO does, 2510.09285);
    "noise": uniform noise, blended in by `share`; "blur": Gaussian of radius share x shorter side / 4;
    "blank": one mean grey, whatever the share (the mean colour may be the answer). Alpha is corrupted too.

    >>> corrupt_image(Image.new("L", (28, 28), 255), share=1.0).getextrema()
    (0, 0)
    """
    if image.mode not in ("RGB", "L", "RGBA"):
        raise ValueError(f"image.mode is {image.mode!r}: expected RGB, L or RGBA")
    if kind not in ("patches", "noise", "blur", "blank"):
        raise ValueError(f"kind is {kind!r}: expected 'patches', 'noise', 'blur' or 'blank'")
    _check_range(0, 1, share=share)
    _check_range(1, torch.inf, patch=patch)
    rng, (width, height) = random.Random(seed), image.size
    if kind == "noise":
        noise = rng.randbytes(width * height * len(image.getbands()))
        return Image.blend(image, Image.frombytes(image.mode, image.size, noise), share)
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(share * min(width, height) / 4))
    if kind == "blank":
        grey = round(ImageStat.Stat(image.convert("L")).mean[0])
        return Image.new("L", image.size, grey).convert(image.mode)         # opaque
    out, black = image.copy(), Image.new("L", (patch, patch)).convert(image.mode)
    for top in range(0, height, patch):
        for left in range(0, width, patch):
            if rng.random() < share:
                out.paste(black, (left, top))                               # cut off at the border
    return out


def blank_perception(token_ids: Tensor, perception: Tensor, blank_id: int) -> Tensor:
    """The response with every perception token replaced by `blank_id`, in a new tensor.

    token_ids, long (B, T); perception, bool (B, T). -> (B, T). Cutting the block out would move later tokens.

    >>> blank_perception(torch.tensor([[7, 8, 9]]), torch.tensor([[False, True, False]]), 0).tolist()
    [[7, 0, 9]]
    """
    return token_ids.masked_fill(_check(perception=perception, token_ids=token_ids), blank_id)


def contrast(log_probs: Tensor, other_log_probs: Tensor, mask: Tensor, clamp: float = 5.0) -> Tensor:
    """Log-ratio of the same tokens in two contexts, clamped to +-clamp. (S2).

    Both (B, T) of the policy that sampled the tokens, dropout off. -> (B, T), 0 on padding, no gradient.

    >>> contrast(torch.tensor([[-0.25, -1.0]]), torch.tensor([[-2.25, -9.0]]), torch.ones(1, 2)).tolist()
    [[2.0, 5.0]]
    """
    mask = _check(mask=mask, log_probs=log_probs, other_log_probs=other_log_probs)
    _check_range(0, torch.inf, clamp=clamp)
    return (log_probs.float() - other_log_probs.float()).masked_fill(~mask, 0.0).clamp(-clamp, clamp).detach()


def role_weights(contrasts: Tensor, perception: Tensor, reasoning: Tensor, temperature: float = 1.0,
                 clip: float = 0.5, sign: Tensor | None = None) -> Tensor:
    """Weights > 0, with mean 1 over the role tokens of a response, 1 elsewhere. (S3), (S4).

    contrasts (B, T); perception, reasoning, bool (B, T). temperature > 0; `clip` in (0, 1) bounds before the
    division. Sign-free weights punish the most image-dependent tokens of a wrong answer hardest; `sign` (B,),
    such as the advantages, turns s_t - b_i around where it is negative. -> (B, T), fp32, no gradient.

    >>> P, R = torch.tensor([[True, True, False, False]]), torch.tensor([[False, False, True, False]])
    >>> role_weights(torch.tensor([[3.0, -3.0, 0.0, 9.0]]), P, R).tolist()
    [[1.5, 0.5, 1.0, 1.0]]
    """
    role = _check(perception=perception, reasoning=reasoning) | reasoning   # P and R, (B, T)
    sign = _to_tokens("sign", contrasts.new_ones(len(contrasts)) if sign is None else sign, contrasts)
    _check(role=role, contrasts=contrasts, sign=sign)
    _check_range(1e-6, torch.inf, temperature=temperature)
    _check_range(1e-6, 1 - 1e-6, clip=clip)                                 # weights stay above 0
    contrasts, count = contrasts.detach().float(), role.sum(1, keepdim=True).clamp(min=1)  # (B, T), (B, 1)
    baseline = contrasts.masked_fill(~role, 0.0).sum(1, keepdim=True) / count  # (S3): b_i, (B, 1)
    centred = (contrasts - baseline) * sign.detach().sign()                 # (B, T)
    weights = (centred / temperature).exp().clamp(1 - clip, 1 + clip)       # (S4), (B, T)
    average = weights.masked_fill(~role, 0.0).sum(1, keepdim=True) / count  # (S4), (B, 1)
    return (weights / average).masked_fill(~role, 1.0)                      # credit is moved, none is made


def srpo_advantages(advantages: Tensor, weights: Tensor, alpha: float = 1.0) -> Tensor:
    """Token advantages of a response's advantage and its tokens' weights. (S5).

    advantages (B,); weights (B, T); alpha in [0, 1]: 0 is GRPO. -> (B, T), fp32, no gradient.

    >>> srpo_advantages(torch.tensor([-2.0]), torch.tensor([[1.5, 0.5, 1.0]])).tolist()
    [[-3.0, -1.0, -2.0]]
    """
    _check_range(0, 1, alpha=alpha)
    _check(weights=weights)
    advantages = _to_tokens("advantages", advantages.detach(), weights)     # (B, T)
    return advantages * ((1 - alpha) + alpha * weights.detach().float())    # (S5), (B, T)


def grpo_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor,
              clip_low: float = 0.2, clip_high: float = 0.2, ref_log_probs: Tensor | None = None,
              kl_coef: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO's clipped objective, negated, with a k3 KL penalty to a reference. (S6); arXiv 2402.03300.

    log_probs (B, T), differentiable; old_log_probs, ref_log_probs (B, T) and advantages, (B,) or (B, T),
    constant; kl_coef >= 0. -> loss (); and metrics, detached, (), all but the last 0 before the first update:
    clip_fraction (tokens whose clip binds), kl_step and kl_step_k3 (k1 and k3 estimates of KL(old || new),
    nats a token), max_ and mean_ratio_deviation (of |ratio - 1|), kl_to_start_k3 (of KL(new || ref)).

    >>> new, old = torch.tensor([[0.5, 0.9]]).log(), torch.tensor([[0.5, 0.5]]).log()     # ratios 1 and 1.8
    >>> f"{grpo_loss(new, old, torch.ones(1), torch.ones(1, 2))[0]:.2f}"                  # -(1 + 1.2) / 2
    '-1.10'
    """
    if kl_coef > 0 and ref_log_probs is None:
        raise ValueError(f"ref_log_probs is None: expected log-probabilities, as kl_coef is {kl_coef}")
    reference = log_probs if ref_log_probs is None else ref_log_probs
    advantages = _to_tokens("advantages", advantages, mask) if advantages.dim() == 1 else advantages
    mask = _check(mask=mask, log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages,
                  ref_log_probs=reference)
    _check_range(0, 1, clip_low=clip_low)
    _check_range(0, torch.inf, clip_high=clip_high, kl_coef=kl_coef)
    advantages = advantages.detach().float().masked_fill(~mask, 0.0)        # (B, T)
    log_ratio = (log_probs.float() - old_log_probs.detach().float()).masked_fill(~mask, 0.0)  # (B, T)
    ratio = log_ratio.clamp(-20, 20).exp()                                  # (B, T)
    unclipped = ratio * advantages                                          # (B, T)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages         # (B, T)
    loss = -_mean(torch.minimum(unclipped, clipped), mask)                  # (S6), ()
    with torch.no_grad():
        deviation, d = (ratio - 1).abs(), log_ratio.clamp(max=20)           # exp(d) must not overflow, (B, T)
        metrics = {"clip_fraction": _mean(clipped < unclipped, mask), "kl_step": _mean(-log_ratio, mask),
                   "kl_step_k3": _mean(torch.expm1(d) - d, mask), "max_ratio_deviation": deviation.max(),
                   "mean_ratio_deviation": _mean(deviation, mask)}
    if ref_log_probs is not None:
        d = (reference.detach().float() - log_probs.float()).masked_fill(~mask, 0.0).clamp(max=20)  # (B, T)
        kl = _mean(torch.expm1(d) - d, mask)                                # k3, ()
        loss, metrics["kl_to_start_k3"] = loss + kl_coef * kl, kl.detach()  # (S6), ()
    return loss, metrics


# --------------------------------------------------------- helpers and checks, word for word those of sapo.py
def _mean(x: Tensor, mask: Tensor) -> Tensor:
    """Over the tokens of a response, then over the responses that have any; x is 0 elsewhere. (B, T) -> ()"""
    tokens = mask.sum(1, dtype=torch.float32)                               # (B,)
    return (x.sum(1, dtype=torch.float32) / tokens.clamp(min=1)).sum() / (tokens > 0).sum().clamp(min=1)


def _to_tokens(name: str, x: Tensor, like: Tensor) -> Tensor:
    """A (B,) tensor in fp32, on each token of its response: (B, T) as `like`."""
    if x.shape != like.shape[:1]:
        raise ValueError(f"{name}.shape is {[*x.shape]}: expected (B,), [{len(like)}]")
    return x.float()[:, None].expand(-1, like.shape[-1])


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
    if wrong and torch.stack([marks.any() for marks in wrong.values()]).any():  # its one wait for the device
        for (name, expected), marks in wrong.items():
            for at in marks.nonzero().tolist():
                raise ValueError(f"{name} is {given[name][tuple(at)].item()} at {at}: expected {expected}")
    return on


def _check_range(low: float, high: float, **numbers: float) -> None:
    for name, number in numbers.items():
        if not low <= number <= high:
            raise ValueError(f"{name} is {number}: expected a number in [{low}, {high}]")


if __name__ == "__main__":                                                  # a response's roles and weights
    pieces = "<perception> red 3 </perception> <think> 3 + 5 </think> <answer> 8 </answer>".split()
    perception, reasoning = split_roles([pieces], torch.ones(1, len(pieces)))
    contrasts = torch.tensor([[0, 0.4, 2.0, 0, 0, 0, 0, -0.4, 0, 0, 0, 0]])
    columns = perception[0], reasoning[0], contrasts[0], role_weights(contrasts, perception, reasoning)[0]
    print(f"{'token':16}{'role':12}{'s_t':>5}{'w_t':>7}")
    for piece, p, r, s, w in zip(pieces, *columns):
        print(f"{piece:16}{'perception' * p or 'reasoning' * r:12}{s:5.1f}{w:7.2f}")
