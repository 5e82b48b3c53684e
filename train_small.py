"""Train a small vision-language model with SAPO, SRPO, GRPO, GSPO, PPO or VC-PPO: `python train_small.py`.

Read from top to bottom. `step` is one iteration of the paper's algorithm; what it calls stands before it, in
the order of the calls:

    Config → rollout → score_all → assign_credit → update → step → evaluate → prepare → learn → main

The algorithms differ in ALGORITHMS and, side by side, in `assign_credit` and `policy_objective`. The maths is
in sapo.py and srpo.py, the world in toy_env.py; support/ handles models, their inputs, the command line and a
run's folder. B responses, T tokens.
"""

import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple

import torch
import transformers
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.hf_argparser import HfArg

import sapo
import srpo
import toy_env
from support import curves, options, run_folder
from support.data import Task, take_prompts, toy_task
from support.inputs import banned_ids, full_inputs, in_order, read_tokens, see, take
from support.models import hidden_and_head, in_parts, load, make_optimizers, save
from support.run_folder import NothingToLearn, NotFinite, check_finite
from toy_env import Problem

LOGITS = 2**25  # as many are turned to fp32 at a time: 128 MB
PATCH = 16  # pixels blackened at a time in SRPO's corrupted image: one cell of the toy world

# ---------------------------------------------------------------------------------------------------- options
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
class Config(options.RunOptions):
    """What a step reads; None: what ALGORITHMS, else support/options.py says. "paper": SAPO's Table 7."""

    algo: Literal[tuple(ALGORITHMS)] = HfArg(default="sapo", help="the algorithm")
    responses: int = HfArg(default=128, help="responses per iteration (paper: 512)")
    max_tokens: int | None = HfArg(default=None, help="longest response (toy world: by operands)")
    temperature: float = HfArg(default=1.0, help="sampling temperature, also applied in scoring")
    segments: Literal[SEGMENTS] = HfArg(default="entropy", help="where SAPO's segments end (Table 3)")
    top_percent: float = HfArg(default=30.0, help="percentage of tokens that end a segment (paper: 30)")
    value_at: Literal["start", "last"] = HfArg(default="start", help="of a segment: V is read before it")
    gamma: float = HfArg(default=1.0, help="discount per segment (paper: 1)")
    lam: float | None = HfArg(default=None, help="lambda of GAE (SAPO: 0.99, toy world: 0.9; PPO: 0.95)")
    lam_returns: float | None = HfArg(default=None, help="lambda of the returns, if another (VC-PPO: 1)")
    whiten: bool = HfArg(default=False, help="whiten advantages that come from a critic (official code)")
    kl_coef: float | None = HfArg(default=None, help="KL penalty (paper: reward 0.001; GRPO: loss 0.01)")
    ratio: Literal["segment", "token"] = HfArg(default="segment", help="SAPO's importance ratio (Table 2)")
    clip_low: float | None = HfArg(default=None, help="the ratio's clip below 1 (paper: epsilon)")
    clip_high: float | None = HfArg(default=None, help="and above 1 (official script: 0.28)")
    contrast: Literal["blind", "blank"] = HfArg(default="blind", help="SRPO: how reasoning is scored (S2)")
    corruption: Literal["patches", "noise", "blur", "blank"] = HfArg(default="patches", help="SRPO's images")
    weight_temperature: float = HfArg(default=1.0, help="SRPO: divides the contrasts (S4)")
    weight_clip: float = HfArg(default=0.5, help="SRPO: weights are clipped to 1 ± this (S4)")
    sign_aware: bool = HfArg(default=False, help="SRPO: turn weights around where the advantage is negative")
    epochs: int = HfArg(default=1, help="passes over the responses of an iteration (paper: 1)")
    mini_batches: int = HfArg(default=4, help="optimizer steps per epoch (paper: 4)")
    micro_tokens: int | None = HfArg(default=None, help="tokens per forward pass; 0: all that there are")
    lr: float | None = HfArg(default=None, help="learning rate of the policy, falls linearly towards 0")
    critic_lr: float | None = HfArg(default=None, help="learning rate of the critic's pretrained part")
    head_lr: float | None = HfArg(default=None, help="learning rate of the critic's value head")
    critic_warmup: int = HfArg(default=5, help="first iterations, for a critic alone (ours, after VC-PPO)")

    @property
    def critic(self) -> bool:
        return ALGORITHMS[self.algo]["critic"]

    @property
    def group(self) -> int:
        return ALGORITHMS[self.algo]["group"]

    @property
    def warmup(self) -> int:
        """The first iterations, in which the policy does not learn."""
        return self.critic_warmup if self.critic else 0


def complete(config: Config) -> Config:
    """The config with every None replaced, or ValueError before any work is done."""
    return options.complete(config, ALGORITHMS)


# ---------------------------------------------------------------------------------------------------- rollout
class Rollout(NamedTuple):
    """Sampled responses: B of them, of up to T tokens."""

    task: Task
    problems: list[Problem]  # (B,), each problem `group` times in a row
    inputs: dict[str, Tensor]  # the distinct prompts as the model takes them, padded on the left
    prompts: Tensor  # (B,) which of them
    ids: Tensor  # (B, T) sampled tokens
    mask: Tensor  # (B, T), 1 up to and including the end-of-sequence token
    truncated: Tensor  # (B,) no end-of-sequence token within max_tokens
    pieces: list[list[str]]  # the text of each token, "" for end-of-sequence and padding
    texts: list[str]  # (B,) responses
    image_ids: Sequence[int] = ()  # ids of image placeholders: never sampled

    def outcome(self) -> Tensor:
        """(B,) the task's reward; 0 for a truncated response, which has not answered."""
        rewards = self.task.rewards(self.problems, self.texts, self.truncated.tolist())
        return torch.tensor(rewards, device=self.mask.device)

    def faithful(self) -> list[bool]:
        """(B,) right, and without a false statement on the way."""
        right = zip(self.outcome().tolist(), self.problems, self.texts)
        return [outcome == 1 and toy_env.faithful(p, text) for outcome, p, text in right]

    def parts(self, rows: Tensor, tokens: int) -> list[Tensor]:
        """These rows: all at once (0), or sorted by length, in parts of so many tokens with padding."""
        if not tokens:
            return [rows]
        lengths = self.inputs["attention_mask"].sum(1)[self.prompts] + self.mask.sum(1)  # (B,)
        parts = [[]]
        for row in rows[lengths[rows].argsort(stable=True)].tolist():
            if parts[-1] and (len(parts[-1]) + 1) * lengths[row] > tokens:
                parts.append([])
            parts[-1].append(row)
        return [rows.new_tensor(part) for part in parts]

    def part(self, rows: Tensor, trim: bool, inputs: dict | None = None) -> tuple[dict, Tensor, Tensor]:
        """Some rows as `score` and `value` take them: the prompts' inputs (or others, one a response), the
        responses' ids and mask. trim: without the columns that are padding in all of them."""
        T = int(self.mask[rows].sum(1).max()) if trim else self.ids.shape[1]
        its = (self.inputs, self.prompts[rows]) if inputs is None else (inputs, rows)
        return take(*its, self.image_ids, trim), self.ids[rows, :T], self.mask[rows, :T]


@torch.no_grad()
def rollout(policy, processor, task: Task, problems: list[Problem], max_tokens: int, temperature: float = 1.0,
            top_p: float = 1.0, greedy: bool = False, inputs: dict[str, Tensor] | None = None) -> Rollout:
    """Sample one response for each problem. For training, top_p must be 1: scoring knows of no cut-off.
    inputs: of the problems, if they were made before."""
    known, banned = policy.generation_config, banned_ids(policy)
    prompts = torch.arange(len(problems), device=policy.device)
    if inputs is None:  # each distinct problem is encoded, and its picture seen, once
        distinct = {id(p): p for p in problems}
        prompts = prompts.new_tensor([[*distinct].index(id(p)) for p in problems])
        inputs = see(policy, processor, task, [*distinct.values()])
    settings = transformers.GenerationConfig(
        max_new_tokens=max_tokens, eos_token_id=known.eos_token_id, pad_token_id=known.pad_token_id,
        suppress_tokens=banned or None, do_sample=not greedy,
        **({} if greedy else dict(temperature=temperature, top_p=top_p, top_k=0)))
    L = inputs["input_ids"].shape[1]
    sample = lambda rows: policy.generate(**take(inputs, rows, banned), generation_config=settings)[:, L:]
    sampled = [row for part in in_parts("sample", sample, prompts, len(prompts)) for row in part]
    ids = pad_sequence(sampled, batch_first=True, padding_value=known.pad_token_id)  # (B, T)
    is_eos = torch.isin(ids, eos := torch.tensor(known.eos_token_id, device=ids.device))
    mask = is_eos.cumsum(1) - is_eos.long() == 0  # by position, not by id: pad may be eos
    T = int(mask.sum(1).max())
    ids, mask, truncated = ids[:, :T], mask[:, :T], ~is_eos.any(1)
    pieces, texts = read_tokens(processor.tokenizer, ids, mask, {*eos.view(-1).tolist(), known.pad_token_id})
    return Rollout(task, problems, inputs, prompts, ids, mask, truncated, pieces, texts, banned)


# ------------------------------------------------------------------------------------------------------ score
def score(model, inputs: dict[str, Tensor], ids: Tensor, mask: Tensor, temperature: float = 1.0,
          seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, T) of the sampled tokens as they were sampled, at the same temperature, with the
    same ids banned, in fp32; and the entropy (B, T) behind them. `seen` (B, T): tokens to show instead."""
    whole, banned = full_inputs(inputs, ids if seen is None else seen, mask), banned_ids(model)
    hidden, head = hidden_and_head(model, **whole, logits_to_keep=ids.shape[1] + 1, use_cache=False)

    def read(hidden, ids):
        logits = head(hidden).float() / temperature  # (B, t, V)
        logits[..., banned] = -torch.inf
        return logits.gather(2, ids[..., None])[..., 0] - logits.logsumexp(2), sapo.token_entropy(logits)

    size = max(1, LOGITS // (len(ids) * model.config.get_text_config().vocab_size))  # tokens a response
    pieces = zip(hidden.split(size, 1), pad(ids, (0, 1)).split(size, 1))  # logits of one are in memory
    columns = [checkpoint(read, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    return tuple(torch.cat(column, 1)[:, :-1].contiguous() for column in zip(*columns))  # none after the last


def value(critic: sapo.SegmentCritic, inputs: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
    """The critic's values (B, T): before each token, the return that it predicts."""
    return critic(ids.shape[1], **full_inputs(inputs, ids, mask), use_cache=False)


class Scored(NamedTuple):
    """A rollout under policy, reference and critic. All (B, T), no gradient; None: not needed."""

    log_probs: Tensor  # of the policy that sampled: old_log_probs in sapo.py
    entropy: Tensor
    ref_log_probs: Tensor | None = None
    values: Tensor | None = None


class Plan(NamedTuple):
    """The random choices of an iteration, made before scoring: the update passes the same parts through the
    policy, so that the ratio is 1 before the first step in bfloat16 too, where rounding hangs on shapes."""

    seed: int  # of SRPO's corruption
    scored: list[Tensor]  # rows in parts that fit in memory, for passes without gradients
    mini_batches: list[list[Tensor]]  # of all epochs: each in parts


def draw_plan(config: Config, roll: Rollout) -> Plan:
    B, steps = len(roll.ids), config.mini_batches
    seed = int(torch.randint(2**31, ())) if config.algo == "srpo" else 0  # other patches in each iteration
    minis = [roll.parts(rows, config.micro_tokens) for _ in range(config.epochs)
             for rows in torch.randperm(B).to(roll.ids.device).split(B // steps)]
    first = [rows for mini in minis[:steps] for rows in mini]
    return Plan(seed, first if config.micro_tokens else [torch.arange(B, device=roll.ids.device)], minis)


@torch.no_grad()
def score_all(config: Config, policy, reference, critic, roll: Rollout, plan: Plan | None = None) -> Scored:
    """The policy's log-probabilities and entropy, the reference's log-probabilities, the critic's values."""
    (B, T), scored = roll.ids.shape, []
    parts = plan.scored if plan else roll.parts(torch.arange(B, device=roll.ids.device), config.micro_tokens)
    for rows in parts:
        these = roll.part(rows, config.micro_tokens > 0)
        log_probs, entropy = score(policy, *these, config.temperature)
        ref_log_probs = score(reference, *these, config.temperature)[0] if reference else None
        values = value(critic, *these) if critic else None
        scored.append((log_probs, entropy, ref_log_probs, values))
    return Scored(*(None if column[0] is None else in_order(column, parts, T) for column in zip(*scored)))


# ------------------------------------------------------------------- credit: where the algorithms differ most
class Credit(NamedTuple):
    """Constants of an update, all (B, T): the segments of the ratio, and targets for policy and critic."""

    ends: Tensor  # last token of each segment
    advantages: Tensor
    returns: Tensor | None = None
    value_mask: Tensor | None = None
    roles: Tensor | None = None  # SRPO: perception and reasoning tokens


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


@torch.no_grad()
def weigh_roles(config: Config, policy, processor, roll: Rollout, scored: Scored, advantages: Tensor,
                plan: Plan) -> tuple[Tensor, Tensor]:
    """SRPO's weights: the policy scores its tokens again, without image or without perception; and the tokens
    that have a role. Both (B, T)."""
    problems, ids, mask = roll.problems, roll.ids, roll.mask
    corrupt = lambda image, i: srpo.corrupt_image(image, config.corruption, patch=PATCH, seed=plan.seed + i)
    images = [tuple(corrupt(x, i) for x in p.image) if isinstance(p.image, tuple) else corrupt(p.image, i)
              for i, p in enumerate(problems)]  # one a response: those of a group differ
    corrupted = see(policy, processor, roll.task, problems, images)
    perception, reasoning = srpo.split_roles(roll.pieces, mask)

    def contrast(inputs, seen):
        parts = [roll.part(rows, config.micro_tokens > 0, inputs) for rows in plan.scored]
        shown = [seen[rows, :its.shape[1]] for rows, (_, its, _) in zip(plan.scored, parts)]
        other = [score(policy, *part, config.temperature, its)[0] for part, its in zip(parts, shown)]
        other = in_order(other, plan.scored, ids.shape[1])
        return srpo.contrast(scored.log_probs, other, mask)  # (S2), (B, T)

    on_image = contrast(corrupted, ids)
    on_perception = -on_image
    if config.contrast == "blank":
        pad_id = policy.generation_config.pad_token_id
        on_perception = contrast(None, srpo.blank_perception(ids, perception, pad_id))
    contrasts = torch.where(perception, on_image, on_perception)
    sign = advantages if config.sign_aware else None
    weights = srpo.role_weights(contrasts, perception, reasoning, config.weight_temperature,
                                config.weight_clip, sign=sign)  # (S3), (S4)
    return weights, perception | reasoning


def assign_credit(config: Config, policy, processor, roll: Rollout, scored: Scored, outcome: Tensor,
                  plan: Plan | None = None) -> Credit:
    """Each algorithm's advantages; for those with a critic also its targets. outcome (B,); plan: for SRPO."""
    mask = roll.mask
    check_finite(reward=outcome, **{k: x[mask] for k, x in scored._asdict().items() if x is not None})
    if config.critic:  # SAPO, PPO, VC-PPO: GAE over segments
        rewards = sapo.kl_rewards(outcome, scored.log_probs, scored.ref_log_probs, mask, config.kl_coef)
        ends = segment_ends(config, roll, scored)
        advantages, returns, value_mask = sapo.segment_gae(
            rewards, scored.values, ends, mask, config.gamma, config.lam, config.value_at, config.lam_returns)
        advantages = sapo.whiten(advantages, mask) if config.whiten else advantages
        ratio_ends = sapo.ends_every_token(mask) if config.ratio == "token" else ends  # Table 2's ablation
        return Credit(ratio_ends, advantages, returns, value_mask)

    advantages = srpo.group_advantages(outcome, config.group)  # GRPO, GSPO, SRPO: (B,)
    weights, roles = mask.float(), None
    if config.algo == "srpo":
        weights, roles = weigh_roles(config, policy, processor, roll, scored, advantages, plan)
    ends = sapo.ends_once(mask) if config.algo == "gspo" else sapo.ends_every_token(mask)
    return Credit(ends, srpo.srpo_advantages(advantages, weights), roles=roles)


# ----------------------------------------------------------------------------------------------------- update
def policy_objective(config: Config, log_probs: Tensor, scored: Scored, credit: Credit,
                     mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each algorithm, (): SAPO's is Eq. 9; and its metrics."""
    clips = dict(clip_low=config.clip_low, clip_high=config.clip_high)
    if config.algo in ("grpo", "srpo"):
        return srpo.grpo_loss(log_probs, scored.log_probs, credit.advantages, mask, **clips,
                              ref_log_probs=scored.ref_log_probs, kl_coef=config.kl_coef)  # (S6)
    return sapo.policy_loss(log_probs, scored.log_probs, credit.advantages, credit.ends, mask, **clips)


def some(table: NamedTuple, rows: Tensor, T: int) -> NamedTuple:
    """Some rows of a Scored or a Credit, and their first T tokens."""
    return table._replace(**{name: x[rows, :T] for name, x in table._asdict().items() if x is not None})


def backward(config: Config, policy, critic, share: float, these: tuple, scored: Scored,
             credit: Credit) -> dict[str, Tensor]:
    """Add a micro-batch's part of the gradients of Eq. 9 and Eq. 10; a model that is None gets none. these:
    its prompts, ids and mask. -> metrics of the micro-batch."""
    mask, metrics = these[2], {}
    if policy:
        log_probs, _ = score(policy, *these, config.temperature)  # log pi_theta, (B, T)
        check_finite(log_probs=log_probs[mask])
        loss, metrics = policy_objective(config, log_probs, scored, credit, mask)
        check_finite(loss=loss)
        (share * loss).backward()
    if critic:
        values = value(critic, *these)  # V_phi, (B, T)
        check_finite(values=values[mask])
        loss = sapo.value_loss(values, credit.returns, credit.value_mask)  # Eq. 10
        check_finite(value_loss=loss)
        (share * loss).backward()
        metrics["value_loss"] = loss.detach()
    return metrics


def update(config: Config, policy, critic, optimizers: list[tuple], roll: Rollout, scored: Scored,
           credit: Credit, plan: Plan, learn_policy: bool = True) -> dict[str, float]:
    """A step of each optimizer on each mini-batch, of `epochs` passes over the rollout. -> metrics: means;
    max_ratio_deviation the largest; first_ratio_deviation that of the first mini-batch, 0 up to rounding.
    NotFinite is raised before the step that it would spoil."""
    total = defaultdict(float)
    for mini in plan.mini_batches:
        for rows in mini:
            share = len(rows) / sum(map(len, mini))  # losses are means over responses, so shares add up
            these = roll.part(rows, config.micro_tokens > 0)
            T = these[1].shape[1]
            metrics = backward(config, policy if learn_policy else None, critic, share, these,
                               some(scored, rows, T), some(credit, rows, T))
            if learn_policy:
                largest = float(metrics.pop("max_ratio_deviation"))
                total["max_ratio_deviation"] = max(total["max_ratio_deviation"], largest)
            for name, x in metrics.items():
                total[name] += share * float(x) / len(plan.mini_batches)
        norms = [float(torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)) for m, _ in optimizers]
        check_finite(grad_norm=torch.tensor(norms))
        for model, optimizer in optimizers:
            if model is critic or learn_policy:
                optimizer.step()
            optimizer.zero_grad()
        if learn_policy:
            total.setdefault("first_ratio_deviation", total["max_ratio_deviation"])
            total["grad_norm"] += norms[0] / len(plan.mini_batches)
    return dict(total)


# ------------------------------------------------------------------------------------------------------- step
class Run(NamedTuple):
    """What an iteration needs: models (None: not needed), problems and optimizers. `state`: of the checkpoint
    that the run goes on from."""

    config: Config
    task: Task
    policy: torch.nn.Module
    processor: transformers.ProcessorMixin
    critic: sapo.SegmentCritic | None
    reference: torch.nn.Module | None
    optimizers: list[tuple]
    held_out: dict[str, Tensor]  # the inputs of task.held_out
    state: dict | None


def step(run: Run, i: int) -> tuple[Rollout, Scored, Credit, dict[str, float]]:
    """Iteration i of the algorithm, on B responses of up to T tokens. -> what it made of them, metrics."""
    config, task, policy, processor, critic, reference, optimizers, *_ = run
    problems = take_prompts(config, task)  # x, (B,)
    roll = rollout(policy, processor, task, problems, config.max_tokens,
                   config.temperature)  # y ~ pi_old(. | x): ids and mask, (B, T)
    outcome, plan = roll.outcome(), draw_plan(config, roll)  # r(x, y), (B,); mini-batches of rows
    scored = score_all(config, policy, reference, critic, roll, plan)  # log pi_old, H, log pi_ref, V: (B, T)
    credit = assign_credit(config, policy, processor, roll, scored, outcome, plan)  # ends, A, R: (B, T)
    metrics = update(config, policy, critic, optimizers, roll, scored, credit, plan, i > config.warmup)
    return roll, scored, credit, curves.describe(roll, scored, credit, outcome) | metrics


# --------------------------------------------------------------------------------------------------- evaluate
def evaluate(config: Config, policy, processor, task: Task,
             inputs: dict[str, Tensor] | None = None) -> tuple[dict[str, float], Rollout]:
    """Accuracy on held-out problems: greedy, sampled at T = 1, and sampled as in the paper; at T = 1 also
    faithfulness, perception and the rollout. With its own random stream, it changes nothing in training."""
    modes = {"greedy": dict(greedy=True), "paper": dict(temperature=0.6, top_p=0.95), "sampled": {}}
    result, outside = {}, run_folder.random_numbers()
    torch.manual_seed(0)
    for name, mode in modes.items():
        roll = rollout(policy, processor, task, task.held_out, config.max_tokens, **mode, inputs=inputs)
        right = roll.outcome() > 0.5  # less may be had for the format
        result[f"accuracy_{name}"] = float(right.float().mean())
    run_folder.random_numbers(outside)
    if task.held_out[0].cells:
        result["faithful_sampled"] = fmean(roll.faithful())
        result["perception_sampled"] = fmean(map(toy_env.perception, task.held_out, roll.texts))
    return result, roll


# --------------------------------------------------------------------------------------------------- the loop
def prepare(config: Config, make_task: Callable = toy_task, load_models: Callable = load) -> Run:
    """Models, problems, and the run's folder with run.json, which says what made it. `make_task` and
    `load_models`, of config, may be your own. ValueError, OSError: the run cannot begin."""
    config = complete(config)
    state = run_folder.read_checkpoint(config.out) if config.resume else run_folder.check_new(config.out)
    if state:
        run_folder.expect(state["algo"] == config.algo, "algo of the checkpoint", state["algo"],
                          f"{config.algo}, as in run.json; --resume {state['out']} goes on with that one")
        least = state["iteration"] + ("accuracy_greedy" not in state["history"][-1])  # the last evaluates
        run_folder.expect(config.iterations >= least, "iterations", config.iterations, f"{least} or more")
    torch.manual_seed(config.seed)
    task, models = make_task(config), load_models(config)
    held_out = see(*models[:2], task, task.held_out)
    run = Run(config, task, *models, make_optimizers(config, models[0], models[2]), held_out, state)
    for _ in range(state["iteration"] if state else 0):
        take_prompts(config, task)
    run_folder.begin(run)
    return run


def learn(run: Run, on_iteration: Callable | None = None, stop: Callable = lambda: False) -> tuple:
    """The loop, until the last iteration or `stop()`. Writes OUT/metrics.jsonl, and a checkpoint at each
    evaluation. -> the metrics, a dict for each iteration, the first before any update; and the responses to
    the held-out problems at T = 1, before and after. What `on_iteration(i, policy, critic, roll, scored,
    credit)`, called after an update, returns is logged too. KeyboardInterrupt: at the end of the iteration in
    which a SIGINT or SIGTERM came, which is saved; at once at the second."""
    config, out, said, state = run.config, Path(run.config.out), set(), run.state
    start = time.time() - (state["seconds"] if state else 0)

    def keep():
        run_folder.save_checkpoint(run, iteration=i, seconds=time.time() - start, before=before, after=after)

    if state:
        i, before, after, history = (state[name] for name in ("iteration", "before", "after", "history"))
    else:
        evaluation, roll = evaluate(config, run.policy, run.processor, run.task, run.held_out)
        i, before, after = 0, roll.texts, roll.texts
        history = [run_folder.log(out, dict(iteration=0, responses=0, seconds=0.0, **evaluation))]
        keep()
    with run_folder.signals(noted := []), tqdm(total=config.iterations, initial=i) as bar:
        while i < config.iterations and not (noted or stop()):
            i += 1
            left = 1 - max(0, i - config.warmup - 1) / (config.iterations - config.warmup)
            run.optimizers[0][1].param_groups[0]["lr"] = config.lr * left  # falls linearly towards 0
            *made, found = run_folder.guarded(step, run, i)
            if evaluates := i % config.eval_every == 0 or i == config.iterations:
                evaluation, roll = evaluate(config, run.policy, run.processor, run.task, run.held_out)
                after, found = roll.texts, found | evaluation
            if on_iteration and made:
                found |= on_iteration(i, run.policy, run.critic, *made) or {}
            passed = dict(iteration=i, responses=i * config.responses, seconds=round(time.time() - start, 2))
            history.append(run_folder.log(out, passed | found))
            if evaluates or noted or stop():
                keep()
            run_folder.warn(history, config, said)
            bar.update()
            bar.set_postfix(reward=f"{found.get('reward', math.nan):.2f}")
    run_folder.LOCKS.pop(config.out, None)  # another process may go on
    if noted:
        raise KeyboardInterrupt(f"stopped after iteration {i}")
    return history, (before, after)


# ------------------------------------------------------------------------------------------------------- main
def main(name: str = "train_small.py", kind: type = Config, begin: Callable = prepare) -> None:
    """The command. `begin` makes a Run of a config of this kind."""
    start, description = time.time(), sys.modules[kind.__module__].__doc__.split("\n")[0]
    transformers.utils.logging.disable_progress_bar()
    with run_folder.one_line(name, ValueError, OSError):
        run = begin(options.parse_arguments(kind, description))
    again = dict(go_on=run.config.out, micro_tokens=run.config.micro_tokens)
    with run_folder.one_line(name, NotFinite, NothingToLearn, OSError, status=1, **again):
        history, texts = learn(run)
        if run.config.save:
            save(run)
    with run_folder.one_line(name, OSError, status=1):  # a closed pipe, a full disk: the run itself is whole
        curves.show(run, history, texts, time.time() - start)


if __name__ == "__main__":
    main()
