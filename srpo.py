"""SRPO: Structured Role-Aware Policy Optimization (arXiv 2605.07274, 2026), in one file.

NOT Sample-Routed PO (2604.02288), reflection-aware SRPO (NeurIPS 2025) or two-Staged history-Resampling PO
(2504.14286), which share the acronym. BUILT FROM THE ABSTRACT ALONE: the formulas, their numbers (S1) to
(S6), the tags and every default are our reading of it, not checked against the paper.

The idea, from the abstract: GRPO with one weight per token. Perception tokens extract visual evidence,
reasoning tokens derive the answer from it. The policy scores its own tokens, with no teacher and no reward
model: perception by how much it depends on the image, reasoning by how consistent it is with the perception
generated before. One baseline per response joins both into a positive weight: a token counts more or less,
its sign stays. Read from top to bottom; of these lines all but the last run once per rollout:

    advantages = group_advantages(outcome, group_size)                                       (S1), GRPO's
    perception, reasoning = split_roles(pieces, mask)                                        P and R
    on_image = contrast(old_log_probs, log_probs_of_corrupted_image, mask)                   corrupt_image
    contrasts = torch.where(perception, on_image, -on_image)                                 (S2), P and R
    weights = role_weights(contrasts, perception, reasoning)                                 (S3), (S4)
    advantages = srpo_advantages(advantages, weights)                                        (S5)
    loss, metrics = grpo_loss(log_probs, old_log_probs, advantages, mask)                    (S6), GRPO's

    (S1)  A_i = (outcome_i - mean) / (std + tiny)                  over the group that shares a prompt
    (S2)  s_t = log p(y_t | x, image) - log p(y_t | x, corrupted image)   on P; its negative on R ("blind")
    (S3)  b_i = mean of s_t over P and R pooled: one baseline for both roles of a response
    (S4)  w_t = clamp(exp((s_t - b_i) / temperature), 1 - clip, 1 + clip) / its mean over P and R; 1 elsewhere
    (S5)  A_t = A_i [(1 - alpha) + alpha w_t]
    (S6)  loss = -mean_i mean_t min(ratio A_t, clamp(ratio, 1 - clip_low, 1 + clip_high) A_t) + kl_coef KL

What the abstract leaves open is a switch, measured in results/README.md. As above SRPO is level with GRPO,
and no better at making a model look that guesses. With `sign` it does that, and costs accuracy where nothing is
guessed. The contrast of reasoning with the perception blanked or masked, and the other FORMS, gave no more.

B responses, T tokens. Tensors are (B, T) over *response* tokens unless a docstring says other. `mask` is 1 on
response tokens, 0 on the padding to their right, without holes; a row of 0s counts nothing. `outcome` (B,) is
what the verifier says of a response. Means are over the tokens of a response, then over responses. Bad input
raises ValueError, a wrong dtype TypeError; both name the argument, its value and what was expected.
"""

import math
import random
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageStat
from torch import Tensor

TINY = 1e-6
FORMS = "exp", "role", "standard", "emphasis"
DTYPES = {"perception": torch.bool, "reasoning": torch.bool, "token_ids": torch.long}


# ---------------------------------------------------------------- one advantage per response: GRPO, unchanged
def group_advantages(outcome: Tensor, group_size: int) -> Tensor:
    """How much better than its group a response is. (S1); DeepSeekMath, arXiv 2402.03300.

    outcome (B,), finite; a group is `group_size` consecutive responses. -> (B,), fp32. The standard deviation
    is the sample's (n - 1), as torch's and TRL's.

    >>> group_advantages(torch.tensor([1, 0, 0, 1,   1, 1, 1, 1]), group_size=4)
    tensor([ 0.8660, -0.8660, -0.8660,  0.8660,  0.0000,  0.0000,  0.0000,  0.0000])
    """
    if outcome.dim() != 1 or not len(outcome):
        raise ValueError(f"outcome.shape is {[*outcome.shape]}: expected (B,)")
    if group_size < 2 or len(outcome) % group_size:
        raise ValueError(f"group_size is {group_size}: expected 2 or more, a divisor of B = {len(outcome)}")
    _refuse([("outcome", outcome, ~outcome.isfinite(), "a finite number")])
    groups = outcome.float().reshape(-1, group_size)                        # (B / G, G)
    centred = groups - groups.mean(1, keepdim=True)
    advantages = centred / (groups.std(1, keepdim=True) + TINY)             # (S1), (B / G, G)
    # Rounding must not teach: in fp32, eight equal outcomes of 0.9 would give advantages of 0.056.
    equal = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
    return advantages.masked_fill(equal, 0.0).flatten()                     # (B,)


# ----------------------------------------------------------------- roles: which tokens look, which ones think
TAGS = ["<perception>", "</perception>", "<think>", "</think>", "<answer>", "</answer>"]
FORMAT = re.compile(r"\s*<perception>(.*)</perception>\s*<think>(.*)</think>\s*<answer>.*</answer>\s*", re.S)


def split_roles(pieces: list[list[str]], mask: Tensor) -> tuple[Tensor, Tensor]:
    """Perception and reasoning tokens of each response. The tags are ours.

    pieces[i][t]: the decoded text of token t alone ("" for special tokens); padding is ignored. -> two bool
    (B, T). It works on characters, so with any tokenizer: a token is perception (reasoning) if all its text
    lies in the first (second) block. Tokens that touch a tag, the answer, and every token of a response that
    does not parse are neither: they get plain GRPO.

    >>> pieces = [["<perception>", "red", "</perception>", "<think>", "so ", "red", "</think>",
    ...            "<answer>", "red", "</answer>"]]
    >>> [role.nonzero()[:, 1].tolist() for role in split_roles(pieces, torch.ones(1, 10))]
    [[1], [4, 5]]
    """
    mask = _check(mask=mask)
    B, T = mask.shape
    if len(pieces) != B:
        raise ValueError(f"len(pieces) is {len(pieces)}: expected {B}, a list for each response")
    roles = torch.zeros(2, B, T, dtype=torch.bool)
    for i, (row, length) in enumerate(zip(pieces, mask.sum(1).tolist())):
        if not length <= len(row) <= T:
            raise ValueError(f"len(pieces[{i}]) is {len(row)}: expected {length} to {T}")
        text = "".join(row[:length])
        match = FORMAT.fullmatch(text) if all(text.count(tag) == 1 for tag in TAGS) else None
        start = 0
        for t, piece in enumerate(row[:length] if match else []):           # token t: characters start to end
            end = start + len(piece)
            for role in (0, 1):
                roles[role, i, t] = match.start(role + 1) <= start < end <= match.end(role + 1)
            start = end
    perception, reasoning = roles.to(mask.device)
    return perception, reasoning


# ----------------------------------------------- contexts to compare with: a corrupted image, a blanked block
def corrupt_image(image: Image.Image, kind: str = "patches", share: float = 0.5, patch: int = 14,
                  seed: int = 0) -> Image.Image:
    """A new image of the same size and mode (RGB, L, RGBA) that shows less; deterministic in `seed`.

    kind "patches": each patch x patch tile is blackened with probability `share` (as VPPO does, 2510.09285);
    "noise": uniform noise, blended in by `share`; "blur": Gaussian of radius share x shorter side / 4;
    "blank": one mean grey, whatever the share (the mean colour could still answer "which colour?").
    Alpha is corrupted as well, as a shape may be drawn in it.

    >>> corrupt_image(Image.new("L", (28, 28), 255), share=1.0).getextrema()
    (0, 0)
    """
    if image.mode not in ("RGB", "L", "RGBA"):
        raise ValueError(f"image.mode is {image.mode!r}: expected RGB, L or RGBA")
    if kind not in ("patches", "noise", "blur", "blank"):
        raise ValueError(f"kind is {kind!r}: expected 'patches', 'noise', 'blur' or 'blank'")
    _check_range(0, 1, share=share)
    _check_range(1, math.inf, patch=patch)
    rng, (width, height) = random.Random(seed), image.size

    def grey(level):                                                        # opaque, in the image's mode
        return {"L": level, "RGB": (level,) * 3, "RGBA": (level,) * 3 + (255,)}[image.mode]

    if kind == "noise":
        noise = rng.randbytes(width * height * len(image.getbands()))
        return Image.blend(image, Image.frombytes(image.mode, image.size, noise), share)
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(share * min(width, height) / 4))
    if kind == "blank":
        return Image.new(image.mode, image.size, grey(round(ImageStat.Stat(image.convert("L")).mean[0])))
    out = image.copy()
    for top in range(0, height, patch):
        for left in range(0, width, patch):
            if rng.random() < share:
                out.paste(grey(0), (left, top, min(left + patch, width), min(top + patch, height)))
    return out


def blank_perception(token_ids: Tensor, perception: Tensor, blank_id: int) -> Tensor:
    """The response with every perception token replaced by `blank_id`, in a new tensor.

    token_ids, long (B, T); perception, bool (B, T). -> (B, T). Tags and length stay: cutting the block out
    would move every later token and change the format too, and the contrast would measure that.

    >>> blank_perception(torch.tensor([[7, 8, 9]]), torch.tensor([[False, True, False]]), 0).tolist()
    [[7, 0, 9]]
    """
    return token_ids.masked_fill(_check(perception=perception, token_ids=token_ids), blank_id)


# ------------------------------------------------- contrasts: what does the policy lose without the evidence?
def contrast(log_probs: Tensor, other_log_probs: Tensor, mask: Tensor, clamp: float = 5.0) -> Tensor:
    """Log-ratio of the same tokens in two contexts, clamped to +-clamp. (S2).

    Both (B, T) of the policy that sampled the tokens, dropout off. -> (B, T), 0 on padding, no gradient.

    >>> contrast(torch.tensor([[-0.25, -1.0]]), torch.tensor([[-2.25, -9.0]]), torch.ones(1, 2)).tolist()
    [[2.0, 5.0]]
    """
    mask = _check(mask=mask, log_probs=log_probs, other_log_probs=other_log_probs)
    if not clamp > 0:
        raise ValueError(f"clamp is {clamp}: expected a number above 0")
    return _log_ratio(log_probs, other_log_probs, mask).clamp(-clamp, clamp).detach()  # (S2), (B, T)


# ------------------------------------------------------------------------------ weights: credit handed around
def role_weights(contrasts: Tensor, perception: Tensor, reasoning: Tensor, temperature: float = 1.0,
                 clip: float = 0.5, form: str = "exp", sign: Tensor | None = None) -> Tensor:
    """Weights > 0, with mean 1 over the role tokens of a response (but "emphasis"), 1 elsewhere. (S3), (S4).

    contrasts (B, T); perception, reasoning, bool (B, T), disjoint. Form "exp" is (S4); "role" divides by the
    mean of the token's own role; "standard" standardises the contrasts within each role first; "emphasis"
    never goes below 1 and divides by nothing. Sign-free weights punish the most image-dependent tokens of a
    wrong answer hardest; `sign` (B,), such as the advantages, turns s_t - b_i around where it is negative.
    temperature > 0; `clip` in (0, 1) bounds before the division. -> (B, T), fp32, no gradient.

    >>> P, R = torch.tensor([[True, True, False, False]]), torch.tensor([[False, False, True, False]])
    >>> role_weights(torch.tensor([[3.0, -3.0, 0.0, 9.0]]), P, R).tolist()
    [[1.5, 0.5, 1.0, 1.0]]
    """
    sign = contrasts.new_ones(len(contrasts)) if sign is None else sign.detach()  # (B,)
    sign = _to_tokens(sign=sign, contrasts=contrasts)                       # (B, T)
    _check(lambda on: [("reasoning", reasoning, on & reasoning, "False where perception is True"),
                       ("contrasts", contrasts, reasoning & ~contrasts.isfinite(), "a finite number"),
                       ("sign", sign, reasoning & ~sign.isfinite(), "a finite number")],
           perception=perception, reasoning=reasoning, contrasts=contrasts, sign=sign)
    for name, x, fine, expected in (("temperature", temperature, temperature > 0, "a number above 0"),
                                    ("clip", clip, 0 < clip < 1, "a number in (0, 1)"),
                                    ("form", form, form in FORMS, f"one of {', '.join(FORMS)}")):
        if not fine:
            raise ValueError(f"{name} is {x!r}: expected {expected}")
    role, contrasts = perception | reasoning, contrasts.detach().float()    # (B, T)
    total = lambda x, on: x.masked_fill(~on, 0.0).sum(1, keepdim=True)      # (B, 1)
    mean = lambda x, on=role: total(x, on) / on.sum(1, keepdim=True).clamp(min=1)  # of P and R pooled, (B, 1)
    own_mean = lambda x: torch.where(perception, mean(x, perception), mean(x, reasoning))  # of a role, (B, T)
    if form == "standard":
        contrasts = contrasts - own_mean(contrasts)
        contrasts = contrasts / (own_mean(contrasts**2).sqrt() + TINY)
    centred = (contrasts - mean(contrasts)) * sign.sign()                   # (S3), (B, T)
    lowest = 1 if form == "emphasis" else 1 - clip
    weights = (centred / temperature).exp().clamp(lowest, 1 + clip)         # (S4), (B, T)
    divisor = {"role": own_mean, "emphasis": torch.ones_like}.get(form, mean)(weights)
    weights = weights / divisor                  # (S4): credit is handed around, none is made, none is lost
    return weights.masked_fill(~role, 1.0)


# ---------------------------------------------------------------------------- advantages and loss: GRPO again
def srpo_advantages(advantages: Tensor, weights: Tensor, alpha: float = 1.0) -> Tensor:
    """Token advantages of a response's advantage and its tokens' weights. (S5).

    advantages (B,); weights (B, T); alpha in [0, 1]: 0 is GRPO. -> (B, T), fp32, no gradient.

    >>> srpo_advantages(torch.tensor([-2.0]), torch.tensor([[1.5, 0.5, 1.0]])).tolist()
    [[-3.0, -1.0, -2.0]]
    """
    _check_range(0, 1, alpha=alpha)
    advantages = _to_tokens(advantages=advantages.detach(), weights=weights)  # (B, T)
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
    >>> loss, metrics = grpo_loss(new, old, torch.ones(1), torch.ones(1, 2))
    >>> f"{loss:.2f} {metrics['clip_fraction']:.2f}"                                      # -(1 + 1.2) / 2
    '-1.10 0.50'
    """
    advantages = _to_tokens(advantages=advantages, mask=mask) if advantages.dim() == 1 else advantages
    refs = {} if ref_log_probs is None else {"ref_log_probs": ref_log_probs}
    mask = _check(mask=mask, log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages, **refs)
    _check_range(0, 1, clip_low=clip_low)
    _check_range(0, math.inf, clip_high=clip_high, kl_coef=kl_coef)
    if kl_coef > 0 and not refs:
        raise ValueError(f"ref_log_probs is None: expected log-probabilities, as kl_coef is {kl_coef}")
    advantages = advantages.detach().float().masked_fill(~mask, 0.0)        # (B, T)
    log_ratio = _log_ratio(log_probs, old_log_probs.detach(), mask)         # (B, T)
    ratio = log_ratio.clamp(-20, 20).exp()                                  # (B, T)
    free = ratio * advantages                                               # (B, T)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages         # (B, T)
    loss = -_mean(torch.minimum(free, clipped), mask)                       # (S6), ()
    moved, deviation = log_ratio.detach(), (ratio.detach() - 1).abs()       # 0 on padding, (B, T)
    metrics = {"clip_fraction": _mean(clipped < free, mask), "kl_step": _mean(-moved, mask),
               "kl_step_k3": _mean(_k3(moved), mask), "max_ratio_deviation": deviation.max(),
               "mean_ratio_deviation": _mean(deviation, mask)}
    if refs:
        kl = _mean(_k3(_log_ratio(ref_log_probs.detach(), log_probs, mask)), mask)
        loss, metrics["kl_to_start_k3"] = loss + kl_coef * kl, kl.detach()  # (S6), ()
    return loss, metrics


# --------------------------------------------------------- helpers and checks, word for word those of sapo.py
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
