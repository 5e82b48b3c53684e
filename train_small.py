"""Train a small vision-language model with SAPO, SRPO, GRPO, GSPO, PPO or VC-PPO: `python train_small.py`.

Read from top to bottom, in the order of a training step:

    Config → load → rollout → score → assign_credit → update → evaluate → train → report → main

All algorithms share every one of these functions; what differs between them is in ALGORITHMS and in
`assign_credit` and `policy_objective`, side by side. The maths is in sapo.py and srpo.py, the world in toy_env.py.
The default model, tiny_vlm/, is loaded, sampled and saved exactly as a real one would be.
"""

import argparse
import copy
import itertools
import json
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

import datasets
import torch
import transformers
from tqdm import tqdm

import sapo
import srpo
import toy_env

HERE = Path(__file__).parent
INSTRUCTION = (
    "Read the numbers of all cells in reading order inside <perception></perception>, compute from left to right, one "
    "line per operation, inside <think></think>, and give the final number inside <answer></answer>."
)  # for models that do not know the format; tiny_vlm's chat template leaves it out

PATCH = 16  # pixels blackened at a time in SRPO's corrupted image: one cell of the toy world

# ---------------------------------------------------------------------------------------------------- config

# group: responses per prompt. kl_coef (Table 7): of k1 in the reward, or, without a critic, of k3 in the loss.
ALGORITHMS = {
    "sapo": dict(critic=True, group=1, lam=0.9, kl_coef=0.001),
    "ppo": dict(critic=True, group=1, lam=0.95, kl_coef=0.001),
    "vc-ppo": dict(critic=True, group=1, lam=0.99, lam_returns=1.0, kl_coef=0.001),
    "grpo": dict(critic=False, group=8, kl_coef=0.01),
    "gspo": dict(critic=False, group=8, kl_coef=0.0, clip_low=3e-4, clip_high=4e-4),  # clips: GSPO, arXiv 2507.18071
    "srpo": dict(critic=False, group=8, kl_coef=0.01),
}


SEGMENTS = ["entropy", "newline", "step", "probability"]


def option(default, text, **more):
    return field(default=default, metadata=dict(help=text, **more))


@dataclass
class Config:
    """Every option of the command line. None means: what ALGORITHMS says. "paper" is SAPO's Table 7."""

    algo: str = option("sapo", "the algorithm", choices=list(ALGORITHMS))
    seed: int = option(0, "seed of sampling, problems and mini-batches")
    iterations: int = option(30, "iterations; each samples, scores and updates (the studies: 40; paper: 200)")
    responses: int = option(128, "responses per iteration (paper: 512)")
    mini_batches: int = option(4, "updates per epoch over the responses of an iteration (paper: 4)")
    epochs: int = option(1, "passes over the responses of an iteration (paper: 1)")
    micro_batch: int = option(0, "responses per forward pass, to save memory; 0: a whole mini-batch")
    critic_warmup: int = option(5, "first iterations, in which only a critic learns (ours, after VC-PPO)")
    lr: float = option(1.6e-4, "policy's learning rate, decaying to 0 (ours; paper: 1e-6 for 3B and 7B)")
    critic_lr: float = option(5e-5, "learning rate of the critic's pretrained part (ours; paper: 2e-6)")
    head_lr: float = option(2e-3, "learning rate of the critic's value head, which starts at 0 (ours; paper: as above)")
    temperature: float = option(1.0, "sampling temperature, also applied in scoring")
    gamma: float = option(1.0, "discount per segment (paper)")
    lam: float = option(None, "lambda of GAE (paper: SAPO 0.99, PPO 0.95; ours for SAPO: 0.9, see the README)")
    lam_returns: float = option(None, "lambda of the critic's returns, if another (VC-PPO: 1)")
    kl_coef: float = option(None, "KL penalty to the start (paper: 0.001 in the reward, GRPO 0.01 in the loss)")
    clip_low: float = option(None, "clip below 1 (0.2; paper: epsilon)")
    clip_high: float = option(None, "clip above 1 (0.2; official script: 0.28)")
    segments: str = option("entropy", "where SAPO's segments end (Table 3)", choices=SEGMENTS)
    top_percent: float = option(30.0, "share of tokens that end a segment, in percent (paper: 30)")
    ratio: str = option("segment", "SAPO's importance ratio", choices=["segment", "token"])
    value_at: str = option("start", "token of a segment before which SAPO reads V (official code: last)", choices=["start", "last"])
    whiten: bool = option(False, "whiten the critic methods' advantages (official code)")
    contrast: str = option("blank", "SRPO's reasoning: perception blanked, or image hidden", choices=["blank", "blind"])
    corruption: str = option("patches", "SRPO's corrupted image", choices=["patches", "noise", "blur", "blank"])
    sign_aware: bool = option(False, "SRPO: turn the weights around where the advantage is negative")
    operands: int = option(4, "toy world: numbers in a question, 2 to 8 (the studies: 6, where methods come apart)")
    distractors: int = option(0, "toy world: cells that the question does not use")
    operators: str = option("+-", "toy world: any of +-×")
    prior: float = option(0.0, "toy world: share of training problems whose question alone tells the answer")
    max_tokens: int = option(None, "longest response (default: by the number of operands)")
    model: str = option(str(HERE / "tiny_vlm"), "a folder or hub name for from_pretrained")
    dataset: str = option(None, "a folder or hub name for load_dataset, with image, question and answer columns")
    eval_every: int = option(10, "iterations between evaluations")
    eval_problems: int = option(256, "held-out problems per evaluation")
    device: str = option(None, "cuda, mps or cpu (default: the first there is)")
    out: str = option(None, "folder of metrics and curves (default: runs/ALGO-SEED)")
    save: bool = option(False, "save the trained model in OUT/model, and its critic in OUT/critic.pt")
    bench: bool = option(False, "time the phases of an iteration, and train nothing")

    @property
    def critic(self):
        return ALGORITHMS[self.algo]["critic"]

    @property
    def group(self):
        return ALGORITHMS[self.algo]["group"]


def complete(config):
    """The config with every None replaced, or ValueError before any work is done."""
    if config.algo not in ALGORITHMS:
        raise ValueError(f"algo={config.algo!r}: expected one of {', '.join(ALGORITHMS)}")
    defaults = dict(lam=1.0, clip_low=0.2, clip_high=0.2, max_tokens=16 * config.operands + 40)
    defaults |= dict(device=best_device(), out=f"runs/{config.algo}-{config.seed}")
    defaults |= {k: v for k, v in ALGORITHMS[config.algo].items() if k not in ("critic", "group")}
    config = replace(config, **{k: v for k, v in defaults.items() if getattr(config, k) is None})
    for name in ("iterations", "responses", "mini_batches", "epochs", "eval_every", "eval_problems", "temperature"):
        if getattr(config, name) <= 0:
            raise ValueError(f"{name}={getattr(config, name)}: expected a number above 0")
    if config.critic and not 0 <= config.critic_warmup < config.iterations:
        raise ValueError(f"critic_warmup={config.critic_warmup}: expected at least 0, and less than the "
                         f"{config.iterations} iterations, or the policy never learns")
    if config.responses % (config.group * config.mini_batches):
        raise ValueError(f"responses={config.responses}: expected a multiple of {config.mini_batches} mini-batches × "
                         f"{config.group} responses per prompt")
    toy_env.make_problem(0, prior=config.prior, **difficulty(config))  # raises for a difficulty that cannot be drawn
    return config


def best_device():
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


# ----------------------------------------------------------------------------------------------- model and data


def load(config):
    """Policy, processor, and, for the methods that need them, critic and frozen reference (else None)."""
    processor = transformers.AutoProcessor.from_pretrained(config.model)
    policy = transformers.AutoModelForImageTextToText.from_pretrained(config.model, dtype=torch.float32)
    policy = policy.to(config.device).eval()  # eval: no dropout, or the first ratio is not 1
    processor.tokenizer.padding_side = "left"
    own = policy.generation_config  # only its ids: a cut-off or penalty in sampling that scoring lacks biases the ratio
    ids = dict(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
    policy.generation_config = transformers.GenerationConfig(**ids)
    reference = copy.deepcopy(policy).requires_grad_(False) if config.kl_coef > 0 else None
    critic = None
    if config.critic:  # its own copy of the pretrained backbone, and a value head that starts at 0
        hidden_size = policy.config.get_text_config().hidden_size
        critic = sapo.SegmentCritic(copy.deepcopy(policy.model), hidden_size).to(config.device)
    return policy, processor, critic, reference


def banned_ids(policy):
    """Ids of image and video placeholders. A policy that samples one cannot be scored: features and tokens differ."""
    names = ("image_token_id", "image_token_index", "video_token_id")
    return sorted({i for name in names if isinstance(i := getattr(policy.config, name, None), int)})


def problem_stream(config):
    """An endless iterator over training problems."""
    if config.dataset is None:
        seeds = itertools.count(config.seed * 10**9)
        yield from (toy_env.make_problem(i, prior=config.prior, **difficulty(config)) for i in seeds)
    rows = split_dataset(config)["train"].shuffle(seed=config.seed)
    while True:
        yield from map(from_row, rows)


def eval_problems(config):
    """Held-out problems, the same for every run of a difficulty or data set. No prior holds in them."""
    if config.dataset is None:
        return toy_env.make_problems(config.eval_problems, split="eval", **difficulty(config))
    return list(map(from_row, split_dataset(config)["test"]))


def difficulty(config):
    return dict(operands=config.operands, distractors=config.distractors, operators=config.operators)


def split_dataset(config):
    rows = datasets.load_dataset(config.dataset, split="train")
    if missing := {"image", "question", "answer"} - set(rows.column_names):
        raise ValueError(f"dataset={config.dataset!r}: expected a column {min(missing)!r}, got {rows.column_names}")
    return rows.train_test_split(test_size=config.eval_problems, seed=0)


def from_row(row):
    return toy_env.Problem(row["image"].convert("RGB"), row["question"], str(row["answer"]))


def encode(processor, images, questions, device):
    """The model's inputs for prompts of an image and a question, padded on the left."""
    texts = [
        processor.apply_chat_template(
            [{"role": "system", "content": [{"type": "text", "text": INSTRUCTION}]},
             {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
        )
        for question in questions
    ]
    return dict(processor(text=texts, images=images, padding=True, return_tensors="pt").to(device))


# ------------------------------------------------------------------------------------------------------ rollout


class Rollout(NamedTuple):
    """Sampled responses: B of them, of up to T tokens."""

    problems: list  # (B,), each problem `group` times in a row
    inputs: dict  # the prompts as the model takes them, padded on the left
    ids: torch.Tensor  # (B, T) sampled tokens
    mask: torch.Tensor  # (B, T), 1 up to and with the end-of-sequence token
    truncated: torch.Tensor  # (B,) no end-of-sequence token within max_tokens
    pieces: list  # B lists: the text of each token, "" for special ones
    texts: list  # B responses

    def rewards(self):
        """(B,) 1 for a right answer in the right format; a truncated response has not answered."""
        correct = [toy_env.reward(p, text) for p, text in zip(self.problems, self.texts)]
        return torch.tensor(correct, device=self.mask.device) * ~self.truncated


@torch.no_grad()
def rollout(policy, processor, problems, max_tokens, temperature=1.0, top_p=1.0, greedy=False):
    """Sample one response for each problem. For training, top_p must be 1: scoring knows of no cut-off tail."""
    tokenizer, known = processor.tokenizer, policy.generation_config
    inputs = encode(processor, [p.image for p in problems], [p.question for p in problems], policy.device)
    eos = torch.tensor(known.eos_token_id or tokenizer.eos_token_id, device=policy.device).flatten()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else int(eos[0])
    sampling = {} if greedy else dict(temperature=temperature, top_p=top_p, top_k=0)
    settings = transformers.GenerationConfig(
        do_sample=not greedy, max_new_tokens=max_tokens, eos_token_id=eos.tolist(), pad_token_id=pad,
        suppress_tokens=banned_ids(policy) or None, **sampling,
    )
    ids = policy.generate(**inputs, generation_config=settings)[:, inputs["input_ids"].shape[1]:]  # (B, T)
    is_eos = torch.isin(ids, eos)
    mask = is_eos.cumsum(1) - is_eos.long() == 0  # by position, not by id: pad may be eos
    T = int(mask.sum(1).max())
    ids, mask, truncated = ids[:, :T], mask[:, :T], ~is_eos.any(1)
    responses = [row[keep].tolist() for row, keep in zip(ids, mask)]
    piece = {i: tokenizer.decode([i], skip_special_tokens=True) for i in ids.unique().tolist()}
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    return Rollout(problems, inputs, ids, mask, truncated, [[piece[i] for i in row] for row in responses], texts)


# -------------------------------------------------------------------------------------------------------- score


def full_inputs(inputs, ids, mask):
    """Inputs for prompt and response together; what else is per token (type ids) is 0 on the response."""
    tails = defaultdict(lambda: torch.zeros_like(ids), input_ids=ids, attention_mask=mask.long())
    per_token = {k for k, x in inputs.items() if x.shape == inputs["input_ids"].shape}
    return {k: torch.cat([x, tails[k].to(x)], 1) if k in per_token else x for k, x in inputs.items()}


def take(inputs, rows):
    """The inputs of some rows. Qwen-VL packs the patches of all images one after another; others have a row each."""
    taken = {k: x[rows] for k, x in inputs.items() if k != "pixel_values" or "image_grid_thw" not in inputs}
    if "image_grid_thw" in inputs:
        images = inputs["pixel_values"].split(inputs["image_grid_thw"].prod(1).tolist())
        taken["pixel_values"] = torch.cat([images[i] for i in rows.tolist()])
    return taken


def score(model, inputs, ids, mask, temperature=1.0, seen=None):
    """Log-probabilities (B, T) of the sampled tokens, as they were sampled: same temperature, same banned ids, in fp32;
    and the logits (B, T, V) behind them. `seen` (B, T): other tokens to show the model as the response so far."""
    whole = full_inputs(inputs, ids if seen is None else seen, mask)
    logits = model(**whole, logits_to_keep=ids.shape[1] + 1).logits[:, :-1].float() / temperature
    logits[..., banned_ids(model)] = -torch.inf
    return logits.gather(2, ids[..., None])[..., 0] - logits.logsumexp(2), logits


class Scored(NamedTuple):
    """What sampling policy, reference and critic say of a rollout. All (B, T), no gradient; None where not needed."""

    log_probs: torch.Tensor
    entropy: torch.Tensor
    ref_log_probs: torch.Tensor = None
    values: torch.Tensor = None


def parts(config, roll):
    """Rows of a rollout, as many at a time as fit in memory."""
    return torch.arange(len(roll.ids), device=roll.ids.device).split(config.micro_batch or len(roll.ids))


@torch.no_grad()
def score_all(config, policy, reference, critic, roll):
    """The sampling policy's log-probabilities and entropies, the reference's log-probabilities, the critic's values."""
    scored = []
    for rows in parts(config, roll):
        inputs, ids, mask = take(roll.inputs, rows), roll.ids[rows], roll.mask[rows]
        log_probs, logits = score(policy, inputs, ids, mask, config.temperature)
        ref_log_probs = score(reference, inputs, ids, mask, config.temperature)[0] if reference else None
        values = critic(ids.shape[1], **full_inputs(inputs, ids, mask)) if critic else None
        scored.append((log_probs, sapo.token_entropy(logits), ref_log_probs, values))
    return Scored(*(None if column[0] is None else torch.cat(column) for column in zip(*scored)))


# ------------------------------------------------------------------------------------- what differs between methods


class Credit(NamedTuple):
    """Constants of an update, all (B, T): the segments of the ratio, and targets for policy and critic."""

    ends: torch.Tensor  # last token of each segment
    advantages: torch.Tensor
    returns: torch.Tensor = None
    value_mask: torch.Tensor = None


def segment_ends(config, roll, scored):
    """Where segments end: SAPO's four strategies (Table 3); for PPO and VC-PPO each token is one."""
    if config.algo in ("ppo", "vc-ppo"):
        return sapo.ends_every_token(roll.mask)
    if config.segments == "entropy":
        return sapo.ends_by_entropy(scored.entropy, roll.mask, config.top_percent)
    if config.segments == "probability":
        return sapo.ends_by_probability(scored.log_probs, roll.mask)
    marks = {"newline": ("\n",), "step": ("\n", ",", "</")}[config.segments]  # step: the format's own separators
    boundary = {i for ids, pieces in zip(roll.ids.tolist(), roll.pieces)
                for i, piece in zip(ids, pieces) if any(mark in piece for mark in marks)}
    return sapo.ends_by_token(roll.ids, roll.mask, sorted(boundary))


def assign_credit(config, policy, processor, roll, scored, rewards):
    """Each algorithm's advantages; for those with a critic also its targets. rewards (B,) -> Credit."""
    mask = roll.mask
    if config.critic:  # SAPO, PPO, VC-PPO: GAE over segments
        ref_log_probs = scored.log_probs if scored.ref_log_probs is None else scored.ref_log_probs
        token_rewards = sapo.kl_rewards(rewards, scored.log_probs, ref_log_probs, mask, config.kl_coef)
        ends = segment_ends(config, roll, scored)
        advantages, returns, value_mask = sapo.segment_gae(
            token_rewards, scored.values, ends, mask, config.gamma, config.lam, config.value_at, config.lam_returns
        )
        advantages = sapo.whiten(advantages, mask) if config.whiten else advantages
        ratio_ends = sapo.ends_every_token(mask) if config.ratio == "token" else ends  # Table 2's ablation
        return Credit(ratio_ends, advantages, returns, value_mask)

    advantages = srpo.group_advantages(rewards, config.group)  # GRPO, GSPO, SRPO: (B,)
    weights = mask.float()
    if config.algo == "srpo":
        weights = role_weights(config, policy, processor, roll, scored, advantages)
    ends = sapo.ends_once(mask) if config.algo == "gspo" else sapo.ends_every_token(mask)
    return Credit(ends, srpo.srpo_advantages(advantages, weights))


@torch.no_grad()
def role_weights(config, policy, processor, roll, scored, advantages):
    """SRPO's weights (B, T): the policy scores its tokens again, without the image and without the perception."""
    ids, mask = roll.ids, roll.mask
    seed = int(torch.randint(2**31, ()))  # other patches in each iteration
    images = [srpo.corrupt_image(p.image, config.corruption, patch=PATCH, seed=seed + i)
              for i, p in enumerate(roll.problems)]
    corrupted = encode(processor, images, [p.question for p in roll.problems], ids.device)
    perception, reasoning = srpo.split_roles(roll.pieces, mask)
    blanked = srpo.blank_perception(ids, perception, processor.tokenizer.pad_token_id)

    def contrast(inputs, seen):
        other = [score(policy, take(inputs, rows), ids[rows], mask[rows], config.temperature, seen[rows])[0]
                 for rows in parts(config, roll)]
        return srpo.contrast(scored.log_probs, torch.cat(other), mask)  # (B, T)

    on_image = contrast(corrupted, ids)
    on_perception = contrast(roll.inputs, blanked) if config.contrast == "blank" else -on_image
    sign = advantages if config.sign_aware else None
    return srpo.role_weights(torch.where(perception, on_image, on_perception), perception, reasoning, sign=sign)


def policy_objective(config, log_probs, scored, credit, mask):
    """The loss of each algorithm, and its diagnostics."""
    clips = dict(clip_low=config.clip_low, clip_high=config.clip_high)
    if config.algo in ("grpo", "srpo"):
        return srpo.grpo_loss(log_probs, scored.log_probs, credit.advantages, mask, **clips,
                              ref_log_probs=scored.ref_log_probs, kl_coef=config.kl_coef)
    return sapo.policy_loss(log_probs, scored.log_probs, credit.advantages, credit.ends, mask, **clips)


# ------------------------------------------------------------------------------------------------------- update


def update(config, policy, critic, optimizers, roll, scored, credit, learn_policy=True):
    """`epochs` passes over the rollout in mini-batches, one optimizer step each. Returns means of the diagnostics."""
    log, B = defaultdict(list), len(roll.ids)
    for _ in range(config.epochs):
        for mini in torch.randperm(B).to(roll.ids.device).split(B // config.mini_batches):
            for rows in mini.split(config.micro_batch or len(mini)):
                share = len(rows) / len(mini)  # every loss is a mean over responses, so shares add up exactly
                inputs, ids, mask = take(roll.inputs, rows), roll.ids[rows], roll.mask[rows]
                mine, aims = (type(x)(*(None if y is None else y[rows] for y in x)) for x in (scored, credit))
                if learn_policy:
                    log_probs, _ = score(policy, inputs, ids, mask, config.temperature)
                    loss, info = policy_objective(config, log_probs, mine, aims, mask)
                    (share * loss).backward()
                    for name, value in info.items():
                        log[name].append(float(value))
                if critic:
                    values = critic(ids.shape[1], **full_inputs(inputs, ids, mask))
                    loss = sapo.value_loss(values, aims.returns, aims.value_mask)
                    (share * loss).backward()
                    log["value_loss"].append(float(loss.detach()))
            for model, optimizer in optimizers:
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                if model is policy and learn_policy:
                    log["grad_norm"].append(float(norm))
                if model is critic or learn_policy:
                    optimizer.step()
                optimizer.zero_grad()
    worst = {"max_ratio_deviation"}
    return {name: max(x) if name in worst else sum(x) / len(x) for name, x in log.items()}


# --------------------------------------------------------------------------------------------------- diagnostics


def explained_variance(values, rewards, value_mask):
    """1 - Var(R - V) / Var(R) of the critic against the outcome R: over all boundaries, and over last boundaries only.
    1 is perfect, 0 no better than a constant; nan when all outcomes are the same."""
    if rewards.min() == rewards.max():
        return float("nan"), float("nan")
    outcome = rewards[:, None].expand_as(values)
    last = value_mask & (value_mask.flip(1).cumsum(1).flip(1) == 1)
    return tuple(float(1 - (outcome - values)[m].var() / outcome[m].var()) for m in (value_mask, last))


def blame(problem, response, pieces, advantages):
    """Does -A point at the slip? For a wrong response with exactly one false statement: the share of its other
    statements with a higher mean advantage (ties count half); else None. 0.5 is chance, 1 perfect."""
    statements = toy_env.statements(problem, response) if problem.cells else []
    false = [s for s in statements if not s.true]
    if len(false) != 1 or false[0].start == false[0].end or toy_env.reward(problem, response) == 1:
        return None
    ends = list(itertools.accumulate(map(len, pieces)))

    def mean_advantage(statement):
        inside = [a for a, piece, end in zip(advantages, pieces, ends)
                  if end - len(piece) < statement.end and end > statement.start and piece]
        return sum(inside) / len(inside)

    guilty = mean_advantage(false[0])
    others = [mean_advantage(s) for s in statements if s.true and s.start < s.end]
    return fmean((a > guilty) + (a == guilty) / 2 for a in others) if others else None


def blame_auroc(roll, advantages):
    """Mean of `blame` over a rollout: the AUROC of -A for the false statement, within responses. nan without any."""
    per_response = [
        blame(p, text, pieces, a[: len(pieces)])
        for p, text, pieces, a in zip(roll.problems, roll.texts, roll.pieces, advantages.tolist())
    ]
    per_response = [x for x in per_response if x is not None]
    return fmean(per_response) if per_response else float("nan")


def evaluate(config, policy, processor, problems):
    """Accuracy on held-out problems: greedy, sampled at T = 1, and sampled as in the paper; T = 1 faithfulness, and
    the T = 1 rollout. Its own random stream, so that evaluating changes nothing in training."""
    modes = {"greedy": dict(greedy=True), "paper": dict(temperature=0.6, top_p=0.95), "sampled": dict()}
    result = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, mode in modes.items():
            roll = rollout(policy, processor, problems, config.max_tokens, **mode)
            result[f"accuracy_{name}"] = float(roll.rewards().mean())
    if problems[0].cells:
        for name, measure in (("faithful_sampled", toy_env.faithful), ("perception_sampled", toy_env.perception)):
            result[name] = fmean(measure(p, t) for p, t in zip(problems, roll.texts))
    return result, roll


# --------------------------------------------------------------------------------------------------------- train


def train(config, on_iteration=None):
    """Train and write OUT/metrics.jsonl. Returns policy, processor, critic, the metrics (a list of dicts, one per
    iteration, the first before any update) and the T = 1 evaluation rollouts before and after. `on_iteration(i, policy,
    critic, roll, scored, credit)`, called after each update, may return more metrics."""
    config = complete(config)
    torch.manual_seed(config.seed)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(asdict(config), indent=1))
    policy, processor, critic, reference = load(config)
    optimizers = [(policy, torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=0.0))]
    if critic:
        groups = [dict(params=critic.backbone.parameters(), lr=config.critic_lr),
                  dict(params=critic.head.parameters(), lr=config.head_lr)]
        optimizers.append((critic, torch.optim.AdamW(groups, weight_decay=0.0)))
    stream, held_out = problem_stream(config), eval_problems(config)
    evaluation, before = evaluate(config, policy, processor, held_out)
    history, after = [dict(iteration=0, responses=0, seconds=0.0, **evaluation)], before
    warmup, start = config.critic_warmup if critic else 0, time.time()
    with open(out / "metrics.jsonl", "w") as file, tqdm(total=config.iterations, unit="it") as bar:
        file.write(json.dumps(history[0]) + "\n")
        for i in range(1, config.iterations + 1):
            optimizers[0][1].param_groups[0]["lr"] = config.lr * decay(i - warmup - 1, config.iterations - warmup)
            roll = rollout(policy, processor, take_prompts(config, stream), config.max_tokens, config.temperature)
            scored = score_all(config, policy, reference, critic, roll)
            rewards = roll.rewards()
            credit = assign_credit(config, policy, processor, roll, scored, rewards)
            info = update(config, policy, critic, optimizers, roll, scored, credit, learn_policy=i > warmup)
            row = dict(iteration=i, responses=i * config.responses, seconds=round(time.time() - start, 2))
            row |= describe(roll, scored, credit, rewards) | info
            if i % config.eval_every == 0 or i == config.iterations:
                evaluation, after = evaluate(config, policy, processor, held_out)
                row |= evaluation
            if on_iteration:
                row |= on_iteration(i, policy, critic, roll, scored, credit) or {}
            row = {k: None if v != v else v for k, v in row.items()}  # nan is no JSON
            history.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            bar.update()
            bar.set_postfix(reward=f"{row['reward']:.2f}")
    return policy, processor, critic, history, (before, after)


def take_prompts(config, stream):
    """The next problems, each `group` times in a row."""
    return [p for p in itertools.islice(stream, config.responses // config.group) for _ in range(config.group)]


def decay(step, steps):
    """The learning rate's factor: 1 at first, falling linearly towards 0."""
    return 1 - max(0, step) / max(1, steps)


def describe(roll, scored, credit, rewards):
    """The metrics of an iteration that do not come from the update."""
    mask, borders = roll.mask, credit.ends if scored.values is None else credit.value_mask
    row = dict(
        reward=float(rewards.mean()),
        entropy=float(scored.entropy[mask].mean()),
        response_length=float(mask.sum(1).float().mean()),
        truncated=float(roll.truncated.float().mean()),
        segments_per_response=float(borders.sum(1).float().mean()),
    )
    if roll.problems[0].cells:
        row["faithful"] = fmean(toy_env.faithful(p, t) for p, t in zip(roll.problems, roll.texts))
        row["blame_auroc"] = blame_auroc(roll, credit.advantages)
    if scored.ref_log_probs is not None:  # k1 estimate of KL(policy || reference), nats per token
        row["kl"] = float((scored.log_probs - scored.ref_log_probs)[mask].mean())
    if scored.values is not None:
        both = explained_variance(scored.values, rewards, credit.value_mask)
        row["explained_variance"], row["explained_variance_last"] = both
    return row


# -------------------------------------------------------------------------------------------------------- report


PANELS = {  # title → metrics
    "reward and held-out accuracy": ["reward", "accuracy_greedy", "accuracy_sampled", "accuracy_paper"],
    "faithful (right, and no false statement)": ["faithful"],
    "explained variance of the critic": ["explained_variance", "explained_variance_last"],
    "blame: AUROC of −advantage for the slip": ["blame_auroc"],
    "entropy (nats per token)": ["entropy"],
    "value loss": ["value_loss"],
}


def plot(history, path, title):
    """The curves of a run, against the number of responses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for axis, (name, metrics) in zip(axes.flat, PANELS.items()):
        for metric in metrics:
            points = [(row["responses"], row[metric]) for row in history if row.get(metric) is not None]
            if points:
                axis.plot(*zip(*points), label=metric, marker="o" if metric.startswith("accuracy") else None, ms=3)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("responses")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def summary(config, history):
    """What the closing table shows: name → (before, after)."""
    first, last = history[0], history[-1]
    rows = {name: (first[name], last[name]) for name in first if name not in ("iteration", "responses", "seconds")}
    if config.critic:  # the critic while there is something to explain: from a third of the run to 85 % reward
        third, rewards = config.iterations / 3, [row.get("reward", 0.0) for row in history]
        passed = next((i for i, r in enumerate(rewards) if r > 0.85), len(rewards))
        window = history[min(round(third), passed - 1) : passed]
        when = f"iterations {window[0]['iteration']} to {window[-1]['iteration']}"
        for name in ("explained_variance_last", "explained_variance", "blame_auroc"):
            values = [row[name] for row in window if row.get(name) is not None]
            rows[f"{name}, {when}"] = (None, fmean(values or [float("nan")]))
    return rows


def marked(problem, response, colour):
    """The response with its first error marked: red on a terminal, else between » and «."""
    error = toy_env.first_error(problem, response) if problem.cells else None
    if error is None:
        return response
    left, right = ("\033[1;31m", "\033[0m") if colour else ("»", "«")
    return response[: error.start] + left + response[error.start : error.end] + right + response[error.end :]


def report(config, history, before, after):
    """Print the closing table and three responses to the same problems, before and after."""
    print(f"\n{'':55}{'before':>8}{'after':>8}")
    for name, pair in summary(config, history).items():
        print(f"{name:55}" + "".join(f"{'' if x is None else format(x, '.3f'):>8}" for x in pair))
    for i in range(min(3, len(before.problems))):
        print(f"\n{before.problems[i].question}   answer {before.problems[i].answer}")
        for name, roll in (("before", before), ("after", after)):
            lines = marked(roll.problems[i], roll.texts[i], sys.stdout.isatty()).replace("\n", "\n" + 9 * " ")
            print(f"{name:>7}  {lines}")


# --------------------------------------------------------------------------------------------------------- bench


def bench(config, repeats=5):
    """Time the phases of an iteration, and the bare generate, forward and backward of the model on as many tokens.
    Prints medians over `repeats`, throughput and peak memory; returns the seconds by phase."""
    config = complete(config)
    torch.manual_seed(config.seed)
    policy, processor, critic, reference = load(config)
    optimizers = [(m, torch.optim.AdamW(m.parameters(), lr=1e-6)) for m in (policy, critic) if m]
    stream, times, tokens = problem_stream(config), defaultdict(list), 0

    def timed(name, function, *args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        if config.device == "cuda":
            torch.cuda.synchronize()
        times[name].append(time.perf_counter() - start)
        return result

    def algorithm(roll, scored, rewards):
        """All that the algorithm adds to model and optimizer: credit, losses, and their gradients."""
        credit = assign_credit(config, policy, processor, roll, scored, rewards)
        log_probs = scored.log_probs.clone().requires_grad_()
        policy_objective(config, log_probs, scored, credit, roll.mask)[0].backward()
        if critic:
            values = scored.values.clone().requires_grad_()
            sapo.value_loss(values, credit.returns, credit.value_mask).backward()
        return credit

    for _ in range(repeats + 1):
        roll = timed("sampling", rollout, policy, processor, take_prompts(config, stream), config.max_tokens)
        rewards = timed("rewards", roll.rewards)
        timed("scoring", score_all, config, policy, reference, None, roll)
        whole, T = full_inputs(roll.inputs, roll.ids, roll.mask), roll.ids.shape[1]
        with torch.no_grad():
            timed("critic", critic, T, **whole) if critic else None
        scored = score_all(config, policy, reference, critic, roll)
        credit = timed("algorithm", algorithm, roll, scored, rewards)
        timed("update", update, config, policy, critic, optimizers, roll, scored, credit)
        settings = dict(do_sample=True, top_k=0, min_new_tokens=T, max_new_tokens=T, suppress_tokens=banned_ids(policy))
        timed("bare generate", policy.generate, **roll.inputs, **settings)
        with torch.no_grad():
            timed("bare forward", policy, **whole, logits_to_keep=T + 1)
        timed("bare forward + backward", lambda: policy(**whole, logits_to_keep=T + 1).logits.sum().backward())
        policy.zero_grad()
        tokens += int(roll.mask.sum()) / (repeats + 1)

    seconds = {name: median(x[1:]) for name, x in times.items()}  # the first one warms up
    compare = {"sampling": ("bare generate", 1), "scoring": ("bare forward", 1 + bool(reference)),
               "critic": ("bare forward", 1), "update": ("bare forward + backward", 1 + bool(critic))}
    iteration = sum(s for name, s in seconds.items() if not name.startswith("bare"))
    print(f"{config.algo}, {config.responses} responses, {config.device}, {torch.get_num_threads()} threads")
    for name, s in seconds.items():
        line = f"{name:24}{1000 * s:9.1f} ms" + ("" if name.startswith("bare") else f"{100 * s / iteration:7.1f} %")
        if name in compare:
            bare, models = compare[name]
            line += f"{s / models / seconds[bare]:7.2f} × {bare}" + (f", for each of {models} models" * (models > 1))
        print(line)
    memory = f", peak memory {peak_memory(config.device):.2f} GiB"
    print(f"{config.responses / iteration:.0f} responses/s, {tokens / iteration:.0f} tokens/s{memory}")
    return seconds


def peak_memory(device):
    """GiB: of the GPU, else of the process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


# ---------------------------------------------------------------------------------------------------------- main


def parse_arguments(arguments=None):
    """The command line: one flag for each field of Config."""
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=style)
    for f in fields(Config):
        more = dict(f.metadata, default=f.default)
        more |= dict(action="store_true") if f.type is bool else dict(type=f.type)
        parser.add_argument("--" + f.name.replace("_", "-"), **more)
    return Config(**vars(parser.parse_args(arguments)))


def main():
    try:
        config = complete(parse_arguments())
    except ValueError as error:
        sys.exit(f"train_small.py: {error}")
    transformers.utils.logging.disable_progress_bar()
    if config.bench:
        bench(config)
        return
    start, out = time.time(), Path(config.out)
    policy, processor, critic, history, (before, after) = train(config)
    plot(history, out / "curves.png", f"{config.algo}, seed {config.seed}, {config.operands} operands")
    report(config, history, before, after)
    if config.save:
        policy.save_pretrained(out / "model")
        processor.save_pretrained(out / "model")
        if critic:
            torch.save(critic.state_dict(), out / "critic.pt")
    print(f"\n{time.time() - start:.0f} s on {config.device}. Metrics, curves and config: {out}/")


if __name__ == "__main__":
    main()
