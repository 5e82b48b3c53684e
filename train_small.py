"""Train a small vision-language model with SAPO, SRPO, GRPO, GSPO, PPO or VC-PPO: `python train_small.py`.

Read from top to bottom, in the order of a training step:

    Config → load → rollout → score_all → assign_credit → update → evaluate → prepare → learn → main

`learn` is the loop. All algorithms share every function; they differ in ALGORITHMS and, side by side, in
`assign_credit` and `policy_objective`. The maths is in sapo.py and srpo.py, the world in toy_env.py. The
default model, tiny_vlm/, is loaded, sampled and saved as any other would be.
"""

import copy
import itertools
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple

import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.hf_argparser import HfArg

import sapo
import srpo
import toy_env
from support import options, run_folder
from support.run_folder import NotFinite, Stopped, check_finite
from support.vlm_inputs import banned_ids, encode, full_inputs, load_policy, read_tokens, take
from toy_env import Problem

TINY_VLM = str(Path(__file__).resolve().parent / "tiny_vlm")
WORDY = str(Path(TINY_VLM) / "wordy")  # the same model, after it learned to talk
INSTRUCTION = (  # for models that do not know the format; tiny_vlm's chat template leaves it out
    "Read the numbers of all cells in reading order inside <perception></perception>, compute from left to "
    "right, one line per operation, inside <think></think>, and give the final number inside "
    "<answer></answer>.")
LOGITS = 2**25  # as many are turned to fp32 at a time: 128 MB
PATCH = 16  # pixels blackened at a time in SRPO's corrupted image: one cell of the toy world


# ----------------------------------------------------------------------------------------------------- config
# group: responses per prompt. kl_coef (Table 7): of k1 in the reward or, without a critic, of k3 in the loss.
ALGORITHMS = {
    "sapo": dict(critic=True, group=1, lam=0.99, kl_coef=0.001),
    "ppo": dict(critic=True, group=1, lam=0.95, kl_coef=0.001),
    "vc-ppo": dict(critic=True, group=1, lam=0.99, lam_returns=1.0, kl_coef=0.001),
    "grpo": dict(critic=False, group=8, kl_coef=0.01),
    "gspo": dict(critic=False, group=8, kl_coef=0.0, clip_low=3e-4, clip_high=4e-4),  # arXiv 2507.18071
    "srpo": dict(critic=False, group=8, kl_coef=0.01),
}
SEGMENTS = "entropy", "newline", "step", "probability"


@dataclass
class Config:
    """Every option of the command line. None: what ALGORITHMS or `complete` says. "paper": SAPO's Table 7."""

    algo: Literal[tuple(ALGORITHMS)] = HfArg(default="sapo", help="the algorithm")
    seed: int = HfArg(default=0, help="seed of sampling, problems and mini-batches")
    iterations: int = HfArg(default=30, help="each samples, scores and updates (the studies: 40; paper: 200)")
    responses: int = HfArg(default=128, help="responses per iteration (paper: 512)")
    mini_batches: int = HfArg(default=4, help="updates per epoch over an iteration's responses (paper: 4)")
    epochs: int = HfArg(default=1, help="passes over the responses of an iteration (paper: 1)")
    micro_batch: int | None = HfArg(default=None, help="responses per pass (2; tiny_vlm: 0, as many as go)")
    critic_warmup: int = HfArg(default=5, help="first iterations, for a critic alone (ours, after VC-PPO)")
    lr: float | None = HfArg(default=None, help="policy's rate, falls to 0 (paper: 1e-6; tiny_vlm: 1.6e-4)")
    critic_lr: float | None = HfArg(default=None, help="critic's pretrained part (paper: 2e-6; tiny: 5e-5)")
    head_lr: float | None = HfArg(default=None, help="critic's value head (paper: 2e-6; tiny_vlm: 2e-3)")
    temperature: float = HfArg(default=1.0, help="sampling temperature, also applied in scoring")
    gamma: float = HfArg(default=1.0, help="discount per segment (paper)")
    lam: float | None = HfArg(default=None, help="lambda of GAE (PPO: 0.95; SAPO: 0.99, tiny_vlm: 0.9)")
    lam_returns: float | None = HfArg(default=None, help="lambda of the returns, if another (VC-PPO: 1)")
    kl_coef: float | None = HfArg(default=None, help="KL penalty (paper: reward 0.001; GRPO: loss 0.01)")
    clip_low: float | None = HfArg(default=None, help="clip below 1 (0.2; paper: epsilon)")
    clip_high: float | None = HfArg(default=None, help="clip above 1 (0.2; official script: 0.28)")
    segments: Literal[SEGMENTS] = HfArg(default="entropy", help="where SAPO's segments end (Table 3)")
    top_percent: float = HfArg(default=30.0, help="share of tokens that end a segment, percent (paper: 30)")
    ratio: Literal["segment", "token"] = HfArg(default="segment", help="SAPO's importance ratio (Table 2)")
    value_at: Literal["start", "last"] = HfArg(default="start", help="V is read before it (official: last)")
    whiten: bool = HfArg(default=False, help="whiten the critic methods' advantages (official code)")
    contrast: Literal["blind", "blank", "masked"] = HfArg(default="blind", help="SRPO: of reasoning: the "
                                                          "image's, or readings blanked or masked")
    weights: Literal[srpo.FORMS] = HfArg(default="exp", help="SRPO: how contrasts become weights")
    weight_temperature: float = HfArg(default=1.0, help="SRPO: divides the contrasts (S4)")
    weight_clip: float = HfArg(default=0.5, help="SRPO: the furthest of a weight from 1 (S4)")
    corruption: Literal["patches", "noise", "blur", "blank"] = HfArg(default="patches", help="of images")
    sign_aware: bool = HfArg(default=False, help="SRPO: turn weights around where the advantage is negative")
    operands: int = HfArg(default=4, help="toy world: numbers in a question, 2 to 8 (the studies: 6)")
    distractors: int = HfArg(default=0, help="toy world: cells that the question does not use")
    operators: str = HfArg(default="+-", help="toy world: any of +-×")
    prior: float = HfArg(default=0.0, help="toy world: share of training questions that tell the answer")
    openings: Literal[tuple(toy_env.OPENED)] = HfArg(default="none", help="toy world: idle words")
    max_tokens: int | None = HfArg(default=None, help="longest response (paper: 2048; tiny_vlm: by operands)")
    model: str | None = HfArg(default=None, help="folder or hub name for from_pretrained (tiny_vlm)")
    dataset: str | None = HfArg(default=None, help="folder or name for load_dataset: image, question, answer")
    eval_every: int = HfArg(default=10, help="iterations between evaluations")
    eval_problems: int = HfArg(default=256, help="held-out problems per evaluation")
    device: str | None = HfArg(default=None, help="cuda, mps or cpu (default: the first there is)")
    out: str | None = HfArg(default=None, help="the run's folder, a new one (default: runs/ALGO-SEED)")
    resume: str | None = HfArg(default=None, help="a run's folder: go on from its last checkpoint")
    save: bool = HfArg(default=False, help="save the trained model in OUT/model, its critic in OUT/critic.pt")

    @property
    def critic(self) -> bool:
        return ALGORITHMS[self.algo]["critic"]

    @property
    def group(self) -> int:
        return ALGORITHMS[self.algo]["group"]


def complete(config: Config) -> Config:
    """The config with every None replaced (but for GAE's, where there is no critic), or ValueError before any
    work is done."""
    if config.algo not in ALGORITHMS:
        raise ValueError(f"algo is {config.algo!r}: expected one of {', '.join(ALGORITHMS)}")
    if config.model is None:
        config = replace(config, model=TINY_VLM if config.openings == "none" else WORDY)
    own = str(Path(config.model).resolve())
    if own == TINY_VLM and config.openings != "none":
        raise ValueError(f"model is {config.model!r}: expected {WORDY}, which knows the openings")
    defaults = dict(clip_low=0.2, clip_high=0.2, lr=1e-6, critic_lr=2e-6, head_lr=2e-6, max_tokens=2048,
                    micro_batch=2, device=options.best_device(), out=f"runs/{config.algo}-{config.seed}")
    defaults |= ALGORITHMS[config.algo]
    if own in (TINY_VLM, WORDY):  # tuned on them; lambda for a dozen segments
        defaults |= dict(lr=1.6e-4, critic_lr=5e-5, head_lr=2e-3, max_tokens=16 * config.operands + 40)
        defaults |= dict(micro_batch=0) | (dict(lam=0.9) if config.algo == "sapo" else {})
    names = [name for name in defaults if name not in ("critic", "group") and getattr(config, name) is None]
    config = replace(config, **{name: defaults[name] for name in names})
    options.check(config)
    for prior in (config.prior, 0.0, float(config.prior > 0)):  # raises for one that cannot be drawn
        toy_env.make_problem(0, prior=prior, **difficulty(config))
    return config


# --------------------------------------------------------------------------------------------- model and data
def load(config: Config) -> tuple:
    """Policy, processor, and, for the methods that need them, critic and frozen reference (else None)."""
    policy, processor = load_policy(config.model, config.device)
    reference = copy.deepcopy(policy).requires_grad_(False) if config.kl_coef > 0 else None
    critic = None
    if config.critic:  # its own copy of the pretrained backbone, and a value head that starts at 0
        hidden_size = policy.config.get_text_config().hidden_size
        critic = sapo.SegmentCritic(copy.deepcopy(policy.model), hidden_size).to(config.device)
    return policy, processor, critic, reference


def difficulty(config: Config) -> dict:
    return dict(operands=config.operands, distractors=config.distractors, operators=config.operators,
                openings=config.openings)


class Task(NamedTuple):
    """What is to be learned. For one's own data and reward see examples/real_vlm.py."""

    stream: Iterator[Problem]  # for training, endless
    held_out: list[Problem]  # for evaluation, the same for every run
    instruction: str
    reward: Callable[[Problem, str], float]  # of a problem and a response's text, from 0 to 1
    skipped: Collection = ()  # rows of a data set that could not be read


def toy_task(config: Config) -> Task:
    """The toy world. `prior` holds in training problems alone."""
    seeds = itertools.count(config.seed * 10**9)
    stream = (toy_env.make_problem(i, prior=config.prior, **difficulty(config)) for i in seeds)
    held_out = toy_env.make_problems(config.eval_problems, split="eval", **difficulty(config))
    return Task(stream, held_out, INSTRUCTION, toy_env.reward)


def dataset_task(config: Config, instruction: str = INSTRUCTION,
                 reward: Callable[[Problem, str], float] | None = None) -> Task:
    """A data set with image(s), question or problem, and answer."""
    from examples.own_data import problems_of

    prompts = config.responses // config.group
    stream, held_out, skipped = problems_of(config.dataset, config.eval_problems, prompts, config.seed)
    return Task(stream, held_out, instruction, reward or toy_env.reward, skipped)


# ---------------------------------------------------------------------------------------------------- rollout
class Rollout(NamedTuple):
    """Sampled responses: B of them, of up to T tokens."""

    task: Task
    problems: list[Problem]  # (B,), each problem `group` times in a row
    inputs: dict[str, Tensor]  # the prompts as the model takes them, padded on the left
    ids: Tensor  # (B, T) sampled tokens
    mask: Tensor  # (B, T), 1 up to and with the end-of-sequence token
    truncated: Tensor  # (B,) no end-of-sequence token within max_tokens
    pieces: list[list[str]]  # the text of each token, "" for special ones
    texts: list[str]  # (B,) responses

    def outcome(self) -> Tensor:
        """(B,) the task's reward; 0 for a truncated response, which has not answered."""
        reward = [self.task.reward(p, text) for p, text in zip(self.problems, self.texts)]
        return torch.tensor(reward, device=self.mask.device) * ~self.truncated

    def faithful(self) -> list[bool]:
        """(B,) right, and without a false statement on the way."""
        right = zip(self.outcome().tolist(), self.problems, self.texts)
        return [outcome == 1 and toy_env.faithful(p, text) for outcome, p, text in right]


@torch.no_grad()
def rollout(policy, processor, task: Task, problems: list[Problem], max_tokens: int, temperature: float = 1.0,
            top_p: float = 1.0, greedy: bool = False, micro_batch: int = 0) -> Rollout:
    """Sample one response for each problem. For training, top_p must be 1: scoring knows of no cut-off."""
    known, banned = policy.generation_config, banned_ids(policy)
    images, questions = [p.image for p in problems], [p.question for p in problems]
    inputs = encode(processor, task.instruction, images, questions, policy.device)
    settings = transformers.GenerationConfig(
        max_new_tokens=max_tokens, eos_token_id=known.eos_token_id, pad_token_id=known.pad_token_id,
        suppress_tokens=banned or None, do_sample=not greedy,
        **({} if greedy else dict(temperature=temperature, top_p=top_p, top_k=0)))
    sampled = [row[inputs["input_ids"].shape[1]:] for rows in parts(len(problems), micro_batch)
               for row in policy.generate(**take(inputs, rows, banned), generation_config=settings)]
    ids = pad_sequence(sampled, batch_first=True, padding_value=known.pad_token_id)  # (B, T)
    is_eos = torch.isin(ids, torch.tensor(known.eos_token_id, device=ids.device))
    mask = is_eos.cumsum(1) - is_eos.long() == 0  # by position, not by id: pad may be eos
    T = int(mask.sum(1).max())
    ids, mask, truncated = ids[:, :T], mask[:, :T], ~is_eos.any(1)
    pieces, texts = read_tokens(processor.tokenizer, ids, mask)
    return Rollout(task, problems, inputs, ids, mask, truncated, pieces, texts)


# ------------------------------------------------------------------------------------------------------ score
def score(model, inputs: dict[str, Tensor], ids: Tensor, mask: Tensor, temperature: float = 1.0,
          seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, T) of the sampled tokens as they were sampled, at the same temperature, with the
    same ids banned, in fp32; and the entropy (B, T) behind them. `seen` (B, T): tokens to show instead."""
    whole, banned = full_inputs(inputs, ids if seen is None else seen, mask), banned_ids(model)
    logits = model(**whole, logits_to_keep=ids.shape[1] + 1, use_cache=False).logits[:, :-1]  # (B, T, V)

    def read(logits, ids):
        logits = logits.float() / temperature
        logits[..., banned] = -torch.inf
        return logits.gather(2, ids[..., None])[..., 0] - logits.logsumexp(2), sapo.token_entropy(logits)

    size = max(1, LOGITS // (len(ids) * logits.shape[2]))  # tokens at a time, (B, T) a piece
    pieces = [checkpoint(read, *piece, use_reentrant=False, preserve_rng_state=False)  # one alive in fp32
              for piece in zip(logits.split(size, 1), ids.split(size, 1))]
    return tuple(torch.cat(column, 1) for column in zip(*pieces))


def value(critic: sapo.SegmentCritic, inputs: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
    """The critic's values (B, T)."""
    return critic(ids.shape[1], **full_inputs(inputs, ids, mask), use_cache=False)


class Scored(NamedTuple):
    """What policy, reference and critic say of a rollout. All (B, T), no gradient; None: not needed."""

    log_probs: Tensor
    entropy: Tensor
    ref_log_probs: Tensor | None = None
    values: Tensor | None = None


def parts(n: int, micro_batch: int) -> tuple[Tensor, ...]:
    """The rows 0 … n - 1, as many at a time as fit in memory."""
    return torch.arange(n).split(micro_batch or n)


@torch.no_grad()
def score_all(config: Config, policy, reference, critic, roll: Rollout) -> Scored:
    """The policy's log-probabilities and entropy, the reference's log-probabilities, the critic's values."""
    scored = []
    for rows in parts(len(roll.ids), config.micro_batch):
        these = take(roll.inputs, rows, banned_ids(policy)), roll.ids[rows], roll.mask[rows]
        log_probs, entropy = score(policy, *these, config.temperature)
        ref_log_probs = score(reference, *these, config.temperature)[0] if reference else None
        values = value(critic, *these) if critic else None
        scored.append((log_probs, entropy, ref_log_probs, values))
    return Scored(*(None if column[0] is None else torch.cat(column) for column in zip(*scored)))


# --------------------------------------------------------------------------- what differs between the methods
class Credit(NamedTuple):
    """Constants of an update, all (B, T): the segments of the ratio, and targets for policy and critic."""

    ends: Tensor  # last token of each segment
    advantages: Tensor
    returns: Tensor | None = None
    value_mask: Tensor | None = None


def segment_ends(config: Config, roll: Rollout, scored: Scored) -> Tensor:
    """Where segments end: SAPO's four strategies (Table 3); for PPO and VC-PPO at each token."""
    if config.algo in ("ppo", "vc-ppo"):
        return sapo.ends_every_token(roll.mask)
    if config.segments == "entropy":
        return sapo.ends_by_entropy(scored.entropy, roll.mask, config.top_percent)
    if config.segments == "probability":
        return sapo.ends_by_probability(scored.log_probs, roll.mask)
    marks = {"newline": ("\n",), "step": ("\n", ",", "</")}[config.segments]  # step: the format's separators
    end_ids = {i for ids, pieces in zip(roll.ids.tolist(), roll.pieces)
               for i, piece in zip(ids, pieces) if any(mark in piece for mark in marks)}
    return sapo.ends_by_token(roll.ids, roll.mask, sorted(end_ids))


def assign_credit(config: Config, policy, processor, roll: Rollout, scored: Scored,
                  outcome: Tensor) -> Credit:
    """Each algorithm's advantages; for those with a critic also its targets. outcome (B,) -> Credit."""
    mask = roll.mask
    if config.critic:  # SAPO, PPO, VC-PPO: GAE over segments
        ref_log_probs = scored.log_probs if scored.ref_log_probs is None else scored.ref_log_probs
        rewards = sapo.kl_rewards(outcome, scored.log_probs, ref_log_probs, mask, config.kl_coef)
        ends = segment_ends(config, roll, scored)
        advantages, returns, value_mask = sapo.segment_gae(
            rewards, scored.values, ends, mask, config.gamma, config.lam, config.value_at, config.lam_returns)
        advantages = sapo.whiten(advantages, mask) if config.whiten else advantages
        ratio_ends = sapo.ends_every_token(mask) if config.ratio == "token" else ends  # Table 2's ablation
        return Credit(ratio_ends, advantages, returns, value_mask)

    advantages = srpo.group_advantages(outcome, config.group)  # GRPO, GSPO, SRPO: (B,)
    weights = mask.float()
    if config.algo == "srpo":
        weights = weigh_roles(config, policy, processor, roll, scored, advantages)
    ends = sapo.ends_once(mask) if config.algo == "gspo" else sapo.ends_every_token(mask)
    return Credit(ends, srpo.srpo_advantages(advantages, weights))


@torch.no_grad()
def weigh_roles(config: Config, policy, processor, roll: Rollout, scored: Scored,
                advantages: Tensor) -> Tensor:
    """SRPO's weights (B, T): the policy scores its tokens again, without image or without perception."""
    ids, mask = roll.ids, roll.mask
    questions = [p.question for p in roll.problems]
    seed = int(torch.randint(2**31, ()))  # other patches in each iteration
    images = [srpo.corrupt_image(p.image, config.corruption, patch=PATCH, seed=seed + i)
              for i, p in enumerate(roll.problems)]
    corrupted = encode(processor, roll.task.instruction, images, questions, ids.device)
    perception, reasoning = srpo.split_roles(roll.pieces, mask)

    def without(inputs, seen, mask):
        other = [score(policy, take(inputs, rows, banned_ids(policy)), ids[rows], mask[rows],
                       config.temperature, seen[rows])[0] for rows in parts(len(ids), config.micro_batch)]
        return srpo.contrast(scored.log_probs, torch.cat(other), roll.mask)  # (B, T)

    on_image = without(corrupted, ids, mask)
    if config.contrast == "blind":
        on_perception = -on_image
    elif config.contrast == "blank":
        pad = policy.generation_config.pad_token_id
        on_perception = without(roll.inputs, srpo.blank_perception(ids, perception, pad), mask)
    else:
        on_perception = without(roll.inputs, ids, mask & ~perception)
    sign = advantages if config.sign_aware else None
    contrasts = torch.where(perception, on_image, on_perception)
    return srpo.role_weights(contrasts, perception, reasoning, config.weight_temperature, config.weight_clip,
                             form=config.weights, sign=sign)


def policy_objective(config: Config, log_probs: Tensor, scored: Scored, credit: Credit,
                     mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each algorithm, and its metrics."""
    clips = dict(clip_low=config.clip_low, clip_high=config.clip_high)
    if config.algo in ("grpo", "srpo"):
        return srpo.grpo_loss(log_probs, scored.log_probs, credit.advantages, mask, **clips,
                              ref_log_probs=scored.ref_log_probs, kl_coef=config.kl_coef)
    return sapo.policy_loss(log_probs, scored.log_probs, credit.advantages, credit.ends, mask, **clips)


# ----------------------------------------------------------------------------------------------------- update
def update(config: Config, policy, critic, optimizers: list[tuple], roll: Rollout, scored: Scored,
           credit: Credit, learn_policy: bool = True) -> dict[str, float]:
    """`epochs` passes over the rollout in mini-batches, a step of each optimizer on each. -> metrics: means;
    max_ratio_deviation the largest; first_ratio_deviation that of the first mini-batch, which must be 0.
    NotFinite is raised before the step that it would spoil."""
    B, steps, total = len(roll.ids), config.epochs * config.mini_batches, defaultdict(float)
    for _ in range(config.epochs):
        for mini in torch.randperm(B).to(roll.ids.device).split(B // config.mini_batches):
            for rows in mini.split(config.micro_batch or len(mini)):
                share = len(rows) / len(mini)  # every loss is a mean over responses, so shares add up exactly
                these = take(roll.inputs, rows, banned_ids(policy)), roll.ids[rows], roll.mask[rows]
                old, target = (type(x)(*(y if y is None else y[rows] for y in x)) for x in (scored, credit))
                metrics = {}
                if learn_policy:
                    log_probs, _ = score(policy, *these, config.temperature)
                    check_finite(log_probs=log_probs[these[2]])
                    loss, metrics = policy_objective(config, log_probs, old, target, roll.mask[rows])
                    check_finite(loss=loss)
                    (share * loss).backward()
                    largest = max(total["max_ratio_deviation"], float(metrics.pop("max_ratio_deviation")))
                    total["max_ratio_deviation"] = largest
                if critic:
                    values = value(critic, *these)
                    check_finite(values=values[these[2]])
                    loss = sapo.value_loss(values, target.returns, target.value_mask)
                    check_finite(value_loss=loss)
                    (share * loss).backward()
                    metrics["value_loss"] = loss.detach()
                for name, x in metrics.items():
                    total[name] += share * float(x) / steps
            if learn_policy:
                total.setdefault("first_ratio_deviation", total["max_ratio_deviation"])
            norms = [float(torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)) for m, _ in optimizers]
            check_finite(grad_norm=torch.tensor(norms))
            for (model, optimizer), norm in zip(optimizers, norms):
                if model is policy and learn_policy:
                    total["grad_norm"] += norm / steps
                if model is critic or learn_policy:
                    optimizer.step()
                optimizer.zero_grad()
    return dict(total)


# --------------------------------------------------------------------------------------------------- evaluate
def evaluate(config: Config, policy, processor, task: Task) -> tuple[dict[str, float], Rollout]:
    """Accuracy on held-out problems: greedy, sampled at T = 1, and sampled as in the paper; at T = 1 also
    faithfulness, perception and the rollout. With its own random stream, it changes nothing in training."""
    modes = {"greedy": dict(greedy=True), "paper": dict(temperature=0.6, top_p=0.95), "sampled": {}}
    result = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, mode in modes.items():
            roll = rollout(policy, processor, task, task.held_out, config.max_tokens, **mode,
                           micro_batch=config.micro_batch)
            right = roll.outcome() > 0.5  # less may be had for the format
            result[f"accuracy_{name}"] = float(right.float().mean())
    if task.held_out[0].cells:
        result["faithful_sampled"] = fmean(roll.faithful())
        result["perception_sampled"] = fmean(map(toy_env.perception, task.held_out, roll.texts))
    return result, roll


def describe(roll: Rollout, scored: Scored, credit: Credit, outcome: Tensor) -> dict[str, float]:
    """The metrics of an iteration that do not come from the update."""
    mask, marks = roll.mask, credit.ends if scored.values is None else credit.value_mask
    row = dict(
        reward=float(outcome.mean()),
        entropy=float(scored.entropy[mask].mean()),
        response_length=float(mask.sum(1).float().mean()),
        truncated=float(roll.truncated.float().mean()),
        unreadable=fmean(toy_env.parse(text) is None for text in roll.texts),
        segments_per_response=float(marks.sum(1).float().mean()),
    )
    if roll.problems[0].cells:
        row["faithful"] = fmean(roll.faithful())
        found = map(toy_env.blame, roll.problems, roll.texts, roll.pieces, credit.advantages.tolist())
        found = [blame.statements for blame in found if blame]  # wrong responses with one false statement
        row["blame_auroc"] = fmean(found) if found else math.nan
    if scored.ref_log_probs is not None:  # k1 estimate of KL(policy || reference), nats per token
        row["kl_to_start"] = float((scored.log_probs - scored.ref_log_probs)[mask].mean())
    if scored.values is not None:
        both = sapo.explained_variance(scored.values, outcome, credit.value_mask)
        row["explained_variance"], row["explained_variance_last"] = both
    return row


# ------------------------------------------------------------------------------------------------------ train
class Run(NamedTuple):
    """All that an iteration needs, and the checkpoint to go on from, if there is one."""

    config: Config
    task: Task
    policy: torch.nn.Module
    processor: transformers.ProcessorMixin
    critic: sapo.SegmentCritic | None
    reference: torch.nn.Module | None
    optimizers: list[tuple]
    state: dict | None

    def kept(self) -> tuple[dict, list]:
        """What a checkpoint keeps of models and optimizers."""
        models = dict(policy=self.policy) | (dict(critic=self.critic) if self.critic else {})
        return models, [optimizer for _, optimizer in self.optimizers]


def prepare(config: Config, make_task: Callable | None = None, load_models: Callable | None = None) -> Run:
    """Models, problems, and the run's folder with run.json, which says what made it. `make_task` and
    `load_models`, of config, are one's own if they are given. ValueError, OSError: the run cannot begin."""
    config, state = complete(config), None
    if config.resume:
        state = run_folder.read_checkpoint(config.out)
    else:
        run_folder.check_new(config.out)
    torch.manual_seed(config.seed)
    task = (make_task or (dataset_task if config.dataset else toy_task))(config)
    models = (load_models or load)(config)
    run = Run(config, task, *models, make_optimizers(config, models[0], models[2]), state)
    run_folder.begin(config.out, asdict(config), bool(state))
    return run


def learn(run: Run, on_iteration: Callable | None = None, stop: Callable = lambda: False) -> tuple:
    """The loop, until the last iteration or `stop()`. Writes OUT/metrics.jsonl, and a checkpoint at each
    evaluation. -> the metrics, a dict for each iteration, the first before any update; and the responses to
    the held-out problems at T = 1, before and after. What `on_iteration(i, policy, critic, roll, scored,
    credit)`, called after an update, returns is logged too."""
    config, task, policy, processor, critic, _, optimizers, state = run
    out, warmup = Path(config.out), config.critic_warmup if critic else 0
    said, start = set(), time.time() - (state["seconds"] if state else 0)

    def save():
        run_folder.save_checkpoint(out, *run.kept(), iteration=i, seconds=time.time() - start, before=before,
                               after=after)

    if state:
        i, before, after = state["iteration"], state["before"], state["after"]
        history = run_folder.metrics(out, rows=i + 1)
        for _ in range(i):
            take_prompts(config, task)
        run_folder.restore(state, *run.kept())
    else:
        evaluation, roll = evaluate(config, policy, processor, task)
        i, before, after = 0, roll.texts, roll.texts
        history = [run_folder.log(out, dict(iteration=0, responses=0, seconds=0.0, **evaluation))]
        save()
    with tqdm(total=config.iterations, initial=i) as bar:
        while i < config.iterations and not stop():
            i += 1
            left = 1 - max(0, i - warmup - 1) / (config.iterations - warmup)  # falls linearly towards 0
            optimizers[0][1].param_groups[0]["lr"] = config.lr * left
            evaluates = i % config.eval_every == 0 or i == config.iterations
            roll, scored, credit, found = iterate(run, i, learn_policy=i > warmup)
            if evaluates:
                evaluation, last = evaluate(config, policy, processor, task)
                after, found = last.texts, found | evaluation
            if on_iteration and credit:
                found |= on_iteration(i, policy, critic, roll, scored, credit) or {}
            passed = dict(iteration=i, responses=i * config.responses, seconds=round(time.time() - start, 2))
            history.append(run_folder.log(out, passed | found))
            for sentence in set(run_folder.complaints(history, warmup)) - said:
                tqdm.write(f"iteration {i}: {sentence}", file=sys.stderr)
                said.add(sentence)
            if evaluates or stop():
                save()
            if all("not_finite" in row for row in history[-3:]):
                raise Stopped(f"{found['not_finite']} was not finite three times in a row (the batches: "
                              f"{out}/not-finite-*.pt): try a lower --lr, --critic-lr or --head-lr")
            bar.update()
            bar.set_postfix(reward=f"{found.get('reward', math.nan):.2f}")
    run_folder.end(out, iteration=i, seconds=round(time.time() - start, 2))
    return history, (before, after)


def iterate(run: Run, i: int, learn_policy: bool) -> tuple[Rollout, Scored, Credit | None, dict[str, float]]:
    """A rollout, its scores, its credit, an update. Where a quantity is not finite, no step is taken with it,
    and the batch is kept."""
    config, task, policy, processor, critic, reference, optimizers, _ = run
    problems = take_prompts(config, task)
    roll = rollout(policy, processor, task, problems, config.max_tokens, config.temperature,
                   micro_batch=config.micro_batch)
    scored, outcome = score_all(config, policy, reference, critic, roll), roll.outcome()
    try:
        figures = {name: x[roll.mask] for name, x in scored._asdict().items() if x is not None}
        check_finite(reward=outcome, **figures)
        credit = assign_credit(config, policy, processor, roll, scored, outcome)
        found = update(config, policy, critic, optimizers, roll, scored, credit, learn_policy)
    except NotFinite as error:
        for _, optimizer in optimizers:
            optimizer.zero_grad()
        batch = dict(texts=roll.texts, ids=roll.ids, mask=roll.mask, outcome=outcome, **scored._asdict())
        torch.save(dict(quantity=str(error), **batch), Path(config.out) / f"not-finite-{i}.pt")
        return roll, scored, None, dict(not_finite=str(error))
    return roll, scored, credit, describe(roll, scored, credit, outcome) | found


def make_optimizers(config: Config, policy, critic) -> list[tuple]:
    """(model, AdamW) of the policy, and of the critic, whose pretrained part and new head differ in rate."""
    pairs = [(policy, torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=0.0))]
    if critic:
        groups = [dict(params=critic.backbone.parameters(), lr=config.critic_lr),
                  dict(params=critic.head.parameters(), lr=config.head_lr)]
        pairs.append((critic, torch.optim.AdamW(groups, weight_decay=0.0)))
    return pairs


def take_prompts(config: Config, task: Task) -> list[Problem]:
    """The next problems, each `group` times in a row."""
    problems = itertools.islice(task.stream, config.responses // config.group)
    return [problem for problem in problems for _ in range(config.group)]


# ------------------------------------------------------------------------------------------------------- main
def main(name: str = "train_small.py", kind: type = Config, begin: Callable = prepare) -> None:
    """The command. `begin` makes a Run of a config of this kind."""
    signals, start = run_folder.note_signals(), time.time()
    sys.stdout.reconfigure(errors="replace")  # a terminal may know ASCII alone
    transformers.utils.logging.disable_progress_bar()
    try:
        run = begin(options.parse_arguments(kind, __doc__.split("\n")[0]))
    except (ValueError, OSError) as error:
        run_folder.leave(name, error, 2)
    config, out = run.config, Path(run.config.out)
    try:
        history, texts = learn(run, stop=lambda: signals)
        if signals:
            raise Stopped(f"stopped after iteration {history[-1]['iteration']}")
        if config.save:
            run.policy.save_pretrained(out / "model")
            run.processor.save_pretrained(out / "model")
            if run.critic:
                torch.save(run.critic.state_dict(), out / "critic.pt")
    except (Stopped, OSError, torch.OutOfMemoryError) as error:
        run_folder.leave(name, error, 130 if signals else 1, config.out, config.micro_batch)
    from results.curves import show

    try:
        show(run, history, texts, time.time() - start)
    except OSError as error:  # a closed pipe, a full disk: the run itself is whole
        run_folder.leave(name, error, 1)


if __name__ == "__main__":
    main()
