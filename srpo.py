"""SRPO, Structured Role-aware Policy Optimization: GRPO with one weight per token.

Jiang & Zou, "Structured Role-Aware Policy Optimization for Multimodal Reasoning", arXiv 2605.07274, 2026.
Not Sample-Routed PO (2604.02288), not reflection-aware SRPO (NeurIPS 2025), not two-Staged
history-Resampling PO (2504.14286), which share the acronym.

Built from the abstract alone. The formulas below, the tags and every default are our reading of it, not
checked against the paper. The numbers (S1) to (S6) are ours too, and stand on the lines that compute them.

The abstract says: perception tokens extract visual evidence, reasoning tokens derive the answer from it. The
reward is GRPO's, unchanged. The policy scores its own tokens, with no teacher and no reward model: perception
by how much it depends on the image, reasoning by how consistent it is with the perception generated before.
One baseline per trajectory joins both into a positive weight: a token counts more or less, its sign stays.

    (S1)  A_i = (r_i - mean) / (std + tiny)                        over the group that shares a prompt
    (S2)  s_t = log p(y_t | x, image)      - log p(y_t | x, corrupted image)      t a perception token, P
          s_t = log p(y_t | x, perception) - log p(y_t | x, blanked perception)   t a reasoning token, R
    (S3)  b_i = mean of s_t over P and R pooled: one baseline for both roles of a trajectory
    (S4)  w_t = clip(exp((s_t - b_i) / temperature), 1 - clip, 1 + clip) / its mean over P and R; 1 elsewhere
    (S5)  A_t = A_i [(1 - alpha) + alpha w_t]
    (S6)  loss = -mean_i mean_t min(ratio A_t, clip(ratio, 1 - clip_low, 1 + clip_high) A_t) + kl_coef KL_ref

Read from top to bottom, in the order of a training step. Tensors are (B, T): B responses, T *response*
tokens; `mask` is 1 on tokens, 0 on padding, which is on the right. `python srpo.py` shows an example.
"""

import random
import re
import sys

import torch
from PIL import Image, ImageFilter, ImageStat

TINY = 1e-6


# ---- 1. One advantage per response: GRPO, unchanged -------------------------------------------------------

def group_advantages(rewards, group_size):
    """(S1), DeepSeekMath 2402.03300: how much better than its group. rewards (B,) -> advantages (B,).

    A group is `group_size` consecutive responses. The std is the sample one (divides by n - 1): torch's
    default and TRL's, so the advantages are on TRL's scale. It needs two responses.
    Raises ValueError for a reward that is not finite and for a group size that does not divide B.

    >>> group_advantages(torch.tensor([1, 0, 0, 1,   1, 1, 1, 1]), group_size=4)
    tensor([ 0.8660, -0.8660, -0.8660,  0.8660,  0.0000,  0.0000,  0.0000,  0.0000])
    """
    rewards = rewards * 1.0                                          # whole numbers and booleans are welcome
    _check(rewards.ndim == 1 and len(rewards) > 0, f"rewards: expected (B,), got {tuple(rewards.shape)}")
    _check(group_size >= 2 and len(rewards) % group_size == 0,
           f"group_size: expected at least 2 and a divisor of B = {len(rewards)}, got {group_size}")
    _check(rewards.isfinite().all(), f"rewards: expected finite numbers, got {rewards.tolist()}")
    groups = rewards.reshape(-1, group_size)                                               # (B / G, G)
    centred = groups - groups.mean(1, keepdim=True)
    advantages = centred / (groups.std(1, keepdim=True) + TINY)                            # (S1), (B / G, G)
    # Rounding must not teach: in float32, eight equal rewards of 0.9 would give advantages of 0.056.
    equal = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
    return advantages.masked_fill(equal, 0.0).flatten()                                    # (B,)


# ---- 2. Roles: which tokens look, which tokens think ------------------------------------------------------

TAGS = ["<perception>", "</perception>", "<think>", "</think>", "<answer>", "</answer>"]
FORMAT = re.compile(r"\s*<perception>(.*)</perception>\s*<think>(.*)</think>\s*<answer>.*</answer>\s*", re.S)


def split_roles(token_texts, mask):
    """Perception and reasoning tokens of each response: two bool tensors (B, T). The tags are ours.

    `token_texts[i][t]` is the decoded text of token t alone ("" for special tokens); padding is ignored.
    It works on characters, so with any tokenizer: a token is perception (reasoning) if all its text lies in
    the first (second) block. Tokens that touch a tag and the answer are neither, and so is every token of a
    response that does not parse: such a response gets plain GRPO.
    Raises ValueError if a row of texts is shorter than its response or longer than T.

    >>> texts = [["<perception>", "red", "</perception>", "<think>", "so ", "red", "</think>",
    ...           "<answer>", "red", "</answer>"]]
    >>> [role.nonzero()[:, 1].tolist() for role in split_roles(texts, torch.ones(1, 10))]
    [[1], [4, 5]]
    """
    mask = _check_mask(mask)
    B, T = mask.shape
    _check(len(token_texts) == B, f"token_texts: expected {B} rows like mask, got {len(token_texts)}")
    perception, reasoning = [[[False] * T for _ in range(B)] for _ in range(2)]
    for i, (texts, length) in enumerate(zip(token_texts, mask.sum(1).tolist())):
        _check(length <= len(texts) <= T,
               f"token_texts: expected {length} to {T} texts in row {i}, got {len(texts)}")
        text = "".join(texts := texts[:length])
        match = all(text.count(tag) == 1 for tag in TAGS) and FORMAT.fullmatch(text)
        if not match:
            continue
        start = 0
        for t, piece in enumerate(texts):                            # characters start to end are token t
            end = start + len(piece)
            perception[i][t] = match.start(1) <= start < end <= match.end(1)
            reasoning[i][t] = match.start(2) <= start < end <= match.end(2)
            start = end
    return torch.tensor(perception, device=mask.device), torch.tensor(reasoning, device=mask.device)


# ---- 3. Two contexts to compare with: a corrupted image, a blanked perception -----------------------------

def corrupt_image(image, kind="patches", ratio=0.5, patch=14, seed=0):
    """A new PIL image of the same size and mode (RGB, L, RGBA) that shows less; deterministic in `seed`.

    kind "patches": each patch x patch tile is blackened with probability `ratio` (as VPPO does, 2510.09285);
    "noise": uniform noise, blended in by `ratio`; "blur": Gaussian of radius ratio x shorter side / 4;
    "blank": one mean grey, whatever the ratio (the mean colour could still answer "which colour?").
    Alpha is corrupted as well, as a shape may be drawn in it. Raises ValueError for any other kind or mode,
    a ratio outside [0, 1] and a patch below 1.

    >>> corrupt_image(Image.new("L", (28, 28), 255), ratio=1.0).getextrema()
    (0, 0)
    """
    _check(image.mode in ("RGB", "L", "RGBA"), f"image: expected mode RGB, L or RGBA, got {image.mode!r}")
    _check(0 <= ratio <= 1, f"ratio: expected a number in [0, 1], got {ratio}")
    _check(patch >= 1, f"patch: expected at least 1 pixel, got {patch}")
    rng, (width, height) = random.Random(seed), image.size

    def grey(level):                                                 # an opaque grey in the image's mode
        return {"L": level, "RGB": (level,) * 3, "RGBA": (level,) * 3 + (255,)}[image.mode]

    if kind == "patches":
        out = image.copy()
        for top in range(0, height, patch):
            for left in range(0, width, patch):
                if rng.random() < ratio:
                    out.paste(grey(0), (left, top, min(left + patch, width), min(top + patch, height)))
        return out
    if kind == "noise":
        noise = rng.randbytes(width * height * len(image.getbands()))
        return Image.blend(image, Image.frombytes(image.mode, image.size, noise), ratio)
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(ratio * min(width, height) / 4))
    if kind == "blank":
        return Image.new(image.mode, image.size, grey(round(ImageStat.Stat(image.convert("L")).mean[0])))
    raise ValueError(f"kind: expected 'patches', 'noise', 'blur' or 'blank', got {kind!r}")


def blank_perception(token_ids, perception, blank_id):
    """`token_ids` (B, T) with every perception token replaced by `blank_id`; a new tensor (B, T).

    Tags and length stay: cutting the block out would move every later token and change the format too,
    and the contrast would measure that. Raises ValueError if the shapes differ.

    >>> blank_perception(torch.tensor([[7, 8, 9]]), torch.tensor([[False, True, False]]), 0).tolist()
    [[7, 0, 9]]
    """
    _check_shapes(token_ids=token_ids, perception=perception)
    return token_ids.masked_fill(perception.bool(), blank_id)


# ---- 4. Scores: what does the policy lose without the evidence? -------------------------------------------

def contrast(log_probs, other_log_probs, mask, clamp=5.0):
    """(S2): (B, T) log-ratio of the same tokens in two contexts, clamped to +-clamp, 0 on padding.

    Both come from the policy that sampled the tokens, dropout off. A token that does not need the evidence
    scores 0. No gradient. (A "blind" reasoning score, one forward pass fewer: image corrupted - original.)
    Raises ValueError for shapes that differ, a mask that is not a prefix, a clamp that is not positive.

    >>> contrast(torch.tensor([[-0.25, -1.0]]), torch.tensor([[-2.25, -9.0]]), torch.ones(1, 2)).tolist()
    [[2.0, 5.0]]
    """
    _check_shapes(log_probs=log_probs, other_log_probs=other_log_probs, mask=mask)
    _check(clamp > 0, f"clamp: expected a positive number, got {clamp}")
    scores = (log_probs - other_log_probs).clamp(-clamp, clamp)                            # (S2), (B, T)
    return scores.masked_fill(~_check_mask(mask), 0.0).detach()


# ---- 5. Weights: from scores to a redistribution of credit ------------------------------------------------

def role_weights(scores, perception, reasoning, temperature=1.0, clip=0.5, form="exp", sign=None):
    """(S3), (S4): (B, T) weights > 0, with mean 1 over a response's role tokens, 1 elsewhere; no gradient.

    The abstract does not give the map from scores to weights, so it is a switch. form "exp" is (S4), where
    `clip` bounds the weights before they are divided by their mean; form "softmax" is the softmax over the
    role tokens times their number, without a clip. Sign-free weights punish the most image-dependent tokens
    of a wrong answer hardest; `sign` (B,), the advantages, turns s_t - b_i around where they are negative.
    Raises ValueError for shapes that differ, overlapping roles, a score on a role token that is not finite,
    temperature <= 0, clip outside (0, 1), an unknown form.

    >>> P, R = torch.tensor([[True, True, False, False]]), torch.tensor([[False, False, True, False]])
    >>> role_weights(torch.tensor([[3.0, -3.0, 0.0, 9.0]]), P, R).tolist()
    [[1.5, 0.5, 1.0, 1.0]]
    """
    _check_shapes(scores=scores, perception=perception, reasoning=reasoning)
    perception, reasoning = perception.bool(), reasoning.bool()
    role, scores = perception | reasoning, scores.detach()
    shared, broken = (perception & reasoning).nonzero().tolist(), scores[role & ~scores.isfinite()].tolist()
    _check(not shared, f"perception, reasoning: expected no common token, got (row, token) {shared}")
    _check(not broken, f"scores: expected finite numbers on role tokens, got {broken}")
    _check(temperature > 0, f"temperature: expected a positive number, got {temperature}")
    _check(0 < clip < 1, f"clip: expected a number in (0, 1), got {clip}")
    _check(form in ("exp", "softmax"), f"form: expected 'exp' or 'softmax', got {form!r}")
    _check(sign is None or sign.shape == scores.shape[:1],
           f"sign: expected ({len(scores)},), got {tuple(getattr(sign, 'shape', ()))}")

    def role_mean(x):                                                # over P and R pooled, (B, 1)
        return x.masked_fill(~role, 0.0).sum(1, keepdim=True) / role.sum(1, keepdim=True).clamp(min=1)

    centred = scores - role_mean(scores)                                                   # (S3), (B, T)
    if sign is not None:
        centred = centred * sign.sign().unsqueeze(1)
    if form == "exp":
        weights = (centred / temperature).exp().clamp(1 - clip, 1 + clip)                  # (S4), (B, T)
    else:
        weights = (centred / temperature).masked_fill(~role, -torch.inf).softmax(1)
        weights = weights.clamp(min=torch.finfo(weights.dtype).eps)  # stays > 0 where exp underflows
    # Divided by their mean, the weights hand credit around within the response: none is made, none is lost.
    weights = weights / role_mean(weights)                                                 # (S4), (B, T)
    return weights.masked_fill(~role, 1.0)


# ---- 6. Advantages and loss: GRPO again -------------------------------------------------------------------

def srpo_advantages(advantages, weights, alpha=1.0):
    """(S5): token advantages (B, T) from advantages (B,) and weights (B, T); alpha = 0 is GRPO.

    Raises ValueError for other shapes and for alpha outside [0, 1], where the sign could turn.

    >>> srpo_advantages(torch.tensor([-2.0]), torch.tensor([[1.5, 0.5, 1.0]])).tolist()
    [[-3.0, -1.0, -2.0]]
    """
    shapes = [tuple(advantages.shape), tuple(weights.shape)]
    _check(weights.ndim == 2 and shapes[0] == shapes[1][:1],
           f"advantages, weights: expected (B,) and (B, T), got {shapes}")
    _check(0 <= alpha <= 1, f"alpha: expected a number in [0, 1], got {alpha}")
    return advantages.detach().unsqueeze(1) * ((1 - alpha) + alpha * weights.detach())     # (S5), (B, T)


def grpo_loss(log_probs, old_log_probs, advantages, mask, clip_low=0.2, clip_high=0.2, ref_log_probs=None,
              kl_coef=0.0):
    """(S6): the clipped loss, a scalar, and a dict of detached scalars. Gradient reaches `log_probs` only.

    log_probs, old_log_probs, ref_log_probs, mask (B, T); advantages (B,) or (B, T). Every mean is over the
    tokens of a response, then over responses. On fresh samples all diagnostics but kl_ref are 0:
    clip_fraction, the share of tokens whose clip binds; kl_k1 and kl_k3, two unbiased estimates of
    KL(old || new); mean_ratio_deviation and max_ratio_deviation, of |ratio - 1|; kl_ref, the k3 estimate
    of KL(new || ref), present with ref_log_probs. k1, k3: Schulman, "Approximating KL divergence", 2020.
    Raises ValueError for shapes that differ, a mask that is not a prefix, a clip or kl_coef out of range.

    >>> new, old = torch.tensor([[0.5, 0.9]]).log(), torch.tensor([[0.5, 0.5]]).log()     # ratios 1 and 1.8
    >>> loss, info = grpo_loss(new, old, torch.ones(1), torch.ones(1, 2))
    >>> f"{loss:.2f} {info['clip_fraction']:.2f}"                                         # -(1 + 1.2) / 2
    '-1.10 0.50'
    """
    refs = {} if ref_log_probs is None else {"ref_log_probs": ref_log_probs}
    _check_shapes(log_probs=log_probs, old_log_probs=old_log_probs, mask=mask, **refs)
    mask = _check_mask(mask)
    _check(advantages.shape in (mask.shape, mask.shape[:1]),
           f"advantages: expected (B,) or (B, T) of {tuple(mask.shape)}, got {tuple(advantages.shape)}")
    _check(0 <= clip_low < 1, f"clip_low: expected a number in [0, 1), got {clip_low}")
    _check(clip_high >= 0, f"clip_high: expected a number >= 0, got {clip_high}")
    _check(kl_coef >= 0, f"kl_coef: expected a number >= 0, got {kl_coef}")
    _check(kl_coef == 0 or refs, f"ref_log_probs: expected log-probs for kl_coef = {kl_coef}, got None")

    def log_ratio(a, b):                                             # 0 on padding; exp cannot overflow
        return (a - b).masked_fill(~mask, 0.0).clamp(-20, 20)                              # (B, T)

    def response_mean(x):                                            # long and short responses count the same
        return (x.masked_fill(~mask, 0.0).sum(1) / mask.sum(1)).mean()

    def k3(d):                                                       # expm1(d) - d >= 0, zero at d = 0
        return torch.expm1(d) - d

    advantages = advantages.detach()
    advantages = advantages.unsqueeze(1) if advantages.ndim == 1 else advantages           # (B, 1) or (B, T)
    log_r = log_ratio(log_probs, old_log_probs.detach())                                   # (B, T)
    ratio = log_r.exp()
    free, clipped = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss = -response_mean(torch.minimum(free, clipped))                                    # (S6), scalar
    deviation = (ratio - 1).abs()
    info = {"clip_fraction": response_mean((clipped < free).to(ratio.dtype)),
            "kl_k1": response_mean(-log_r), "kl_k3": response_mean(k3(log_r)),
            "mean_ratio_deviation": response_mean(deviation), "max_ratio_deviation": deviation.max()}
    if refs:
        info["kl_ref"] = response_mean(k3(log_ratio(ref_log_probs.detach(), log_probs)))
        loss = loss + kl_coef * info["kl_ref"]                                             # (S6), scalar
    return loss, {name: value.detach() for name, value in info.items()}


# ---- Checks: wrong input stops here, by name --------------------------------------------------------------

def _check(ok, message):
    if not ok:
        raise ValueError(message)


def _check_shapes(**tensors):
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    _check(len(set(shapes.values())) == 1 and all(len(shape) == 2 for shape in shapes.values()),
           f"{', '.join(shapes)}: expected one shape (B, T), got {shapes}")


def _check_mask(mask):
    """`mask` (B, T) as bool: ones, then zeros, with at least one 1 in a row."""
    _check(mask.ndim == 2 and mask.numel() > 0, f"mask: expected (B, T), got {tuple(mask.shape)}")
    ones = mask == 1
    prefix = ones.sum(1, keepdim=True) > torch.arange(mask.shape[1], device=mask.device)   # (B, T)
    bad = ((mask != prefix) | ~prefix[:, :1]).any(1)                                       # (B,)
    _check(not bad.any(), f"mask: expected rows of ones (at least one), then zeros, got {mask[bad].tolist()}")
    return ones


# ---- Example ----------------------------------------------------------------------------------------------

def demo():
    """Weigh one hand-made response to "What colour is the shape left of the square?"."""
    tag = (-.01, -.01, -.01)
    tokens = [  # text; log-prob as sampled, with the image corrupted, with the perception blanked
        ("<per", *tag), ("ception>", *tag), ("A", -.2, -.3, -.2), (" red", -.2, -1.7, -.2),
        (" circle", -.3, -1.5, -.3), (" left", -.4, -1.1, -.4), (" of", -.1, -.1, -.1), (" a", -.1, -.2, -.1),
        (" blue", -.3, -2., -.3), (" square", -.2, -.5, -.2), ("</", *tag), ("perception>", *tag),
        ("<think>", *tag), ("Left", -.3, -.3, -.4), (" is", -.1, -.1, -.1), (" the", -.2, -.2, -.3),
        (" circle", -.3, -.5, -1.4), (", so", -.5, -.5, -.4), (" red", -.2, -.6, -1.6),
        ("</think>", *tag), ("<answer>", *tag), ("red", -.1, -.1, -.2), ("</answer>", *tag)]
    texts, *columns = zip(*tokens)
    log_probs, corrupted, blanked = torch.tensor(columns).unsqueeze(1)                     # (1, T) each
    mask = torch.ones_like(log_probs)
    perception, reasoning = split_roles([texts], mask)
    scores = torch.where(perception, contrast(log_probs, corrupted, mask), contrast(log_probs, blanked, mask))
    weights = role_weights(scores, perception, reasoning)
    right, wrong, *_ = group_advantages(torch.tensor([1, 0, 0, 1]), 4)
    if_right, if_wrong = [srpo_advantages(a[None], weights)[0] for a in (right, wrong)]

    colours = {"perception": "36", "reasoning": "33", "": "2"} if sys.stdout.isatty() else {}
    print(demo.__doc__, f"Rewards 1 0 0 1 give A = {right:+.3f} if right, {wrong:+.3f} if wrong.\n", sep="\n")
    print(f"{'token':14}{'role':12}{'score':>6}{'weight':>8}  {'':14}{'A if right':>11}{'A if wrong':>12}")
    for t, text in enumerate(texts):
        role = "perception" if perception[0, t] else "reasoning" if reasoning[0, t] else ""
        score, bar = f"{scores[0, t]:.2f}" if role else "", "▇" * round(8 * weights[0, t].item())
        line = f"{text.strip():14}{role:12}{score:>6}{weights[0, t]:8.2f}  {bar:14}"
        line += f"{if_right[t]:+11.2f}{if_wrong[t]:+12.2f}"
        print(f"\033[{colours[role]}m{line}\033[0m" if colours else line)
    for name, role in ("perception", perception), ("reasoning", reasoning), ("both", perception | reasoning):
        print(f"{'mean':14}{name:12}{scores[role].mean():6.2f}{weights[role].mean():8.2f}")
    srpo, grpo = [grpo_loss(log_probs, log_probs, a, mask)[0] for a in (if_right[None], right[None])]
    print(f"\nLoss if right: SRPO {srpo:.3f}, GRPO {grpo:.3f}. Credit moved between tokens; none was made.")


if __name__ == "__main__":
    demo()
