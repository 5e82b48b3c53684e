"""Train a small vision-language model with SAPO, SRPO, GRPO, GSPO, PPO or VC-PPO: `python train_small.py`.

Read from top to bottom, in the order of a training step:

    Config → load → rollout → score_all → assign_credit → update → evaluate → train → report → main

`train` is the loop. All algorithms share every function; they differ in ALGORITHMS and, side by side, in
`assign_credit` and `policy_objective`. The maths is in sapo.py and srpo.py, the world in toy_env.py. The
default model, tiny_vlm/, is loaded, sampled and saved as any other would be.
"""

import copy
import itertools
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple

import datasets
import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.hf_argparser import HfArg, HfArgumentParser

import sapo
import srpo
import toy_env
from toy_env import Problem

HERE = Path(__file__).resolve().parent
TINY_VLM = str(HERE / "tiny_vlm")
INSTRUCTION = (
    "Read the numbers of all cells in reading order inside <perception></perception>, compute from left to "
    "right, one line per operation, inside <think></think>, and give the final number inside "
    "<answer></answer>."
)  # for models that do not know the format; tiny_vlm's chat template leaves it out
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
    micro_batch: int = HfArg(default=0, help="responses per forward pass, to save memory; 0: a mini-batch")
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
    contrast: Literal["blank", "blind"] = HfArg(default="blank", help="SRPO: blank the text, hide the image")
    corruption: Literal["patches", "noise", "blur", "blank"] = HfArg(default="patches", help="of images")
    sign_aware: bool = HfArg(default=False, help="SRPO: turn weights around where the advantage is negative")
    operands: int = HfArg(default=4, help="toy world: numbers in a question, 2 to 8 (the studies: 6)")
    distractors: int = HfArg(default=0, help="toy world: cells that the question does not use")
    operators: str = HfArg(default="+-", help="toy world: any of +-×")
    prior: float = HfArg(default=0.0, help="toy world: share of training questions that tell the answer")
    max_tokens: int | None = HfArg(default=None, help="longest response (paper: 2048; tiny_vlm: by operands)")
    model: str = HfArg(default=TINY_VLM, help="folder or hub name for from_pretrained")
    dataset: str | None = HfArg(default=None, help="folder or name for load_dataset: image, question, answer")
    eval_every: int = HfArg(default=10, help="iterations between evaluations")
    eval_problems: int = HfArg(default=256, help="held-out problems per evaluation")
    device: str | None = HfArg(default=None, help="cuda, mps or cpu (default: the first there is)")
    out: str | None = HfArg(default=None, help="folder of metrics and curves (default: runs/ALGO-SEED)")
    save: bool = HfArg(default=False, help="save the trained model in OUT/model, its critic in OUT/critic.pt")

    @property
    def critic(self) -> bool:
        return ALGORITHMS[self.algo]["critic"]

    @property
    def group(self) -> int:
        return ALGORITHMS[self.algo]["group"]


def complete(config: Config) -> Config:
    """The config with every None replaced, or ValueError before any work is done."""
    if config.algo not in ALGORITHMS:
        raise ValueError(f"algo is {config.algo!r}: expected one of {', '.join(ALGORITHMS)}")
    defaults = dict(lam=1.0, clip_low=0.2, clip_high=0.2)
    defaults |= dict(device=best_device(), out=f"runs/{config.algo}-{config.seed}")
    defaults |= dict(lr=1e-6, critic_lr=2e-6, head_lr=2e-6, max_tokens=2048)  # Table 7
    defaults |= ALGORITHMS[config.algo]
    if Path(config.model).resolve() == Path(TINY_VLM):  # tuned on it; lambda for about a dozen segments
        defaults |= dict(lr=1.6e-4, critic_lr=5e-5, head_lr=2e-3, max_tokens=16 * config.operands + 40)
        defaults |= dict(lam=0.9) if config.algo == "sapo" else {}
    defaults = {k: v for k, v in defaults.items() if k not in ("critic", "group")}
    config = replace(config, **{k: v for k, v in defaults.items() if getattr(config, k) is None})
    counts = "iterations", "responses", "mini_batches", "epochs", "eval_every", "eval_problems"
    for name in (*counts, "temperature"):
        if getattr(config, name) <= 0:
            raise ValueError(f"{name} is {getattr(config, name)}: expected a number above 0")
    if config.critic and not 0 <= config.critic_warmup < config.iterations:
        raise ValueError(f"critic_warmup is {config.critic_warmup}: expected 0 or more, and less than the "
                         f"{config.iterations} iterations, or the policy never learns")
    if config.responses % (config.group * config.mini_batches):
        raise ValueError(f"responses is {config.responses}: expected a multiple of {config.mini_batches} "
                         f"mini-batches × {config.group} responses per prompt")
    toy_env.make_problem(0, prior=config.prior, **difficulty(config))  # raises for one that cannot be drawn
    return config


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


# --------------------------------------------------------------------------------------------- model and data
def load(config: Config) -> tuple:
    """Policy, processor, and, for the methods that need them, critic and frozen reference (else None)."""
    processor = transformers.AutoProcessor.from_pretrained(config.model)
    policy = transformers.AutoModelForImageTextToText.from_pretrained(config.model, dtype=torch.float32)
    policy = policy.to(config.device).eval()  # eval: no dropout, or the first ratio is not 1
    processor.tokenizer.padding_side = "left"
    own, tokenizer = policy.generation_config.eos_token_id, processor.tokenizer
    eos = tokenizer.eos_token_id if own is None else own  # 0 is an id like any other
    eos = eos if isinstance(eos, list) else [eos]
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = eos[0]
    # Nothing else of its settings: a cut-off in sampling that scoring lacks would bias the ratio.
    ids = dict(eos_token_id=eos, pad_token_id=tokenizer.pad_token_id)
    policy.generation_config = transformers.GenerationConfig(**ids)
    reference = copy.deepcopy(policy).requires_grad_(False) if config.kl_coef > 0 else None
    critic = None
    if config.critic:  # its own copy of the pretrained backbone, and a value head that starts at 0
        hidden_size = policy.config.get_text_config().hidden_size
        critic = sapo.SegmentCritic(copy.deepcopy(policy.model), hidden_size).to(config.device)
    return policy, processor, critic, reference


def banned_ids(policy) -> list[int]:
    """Ids of image and video placeholders: who samples one cannot be scored, as its features are missing."""
    names = ("image_token_id", "image_token_index", "video_token_id")
    return sorted({i for name in names if isinstance(i := getattr(policy.config, name, None), int)})


def difficulty(config: Config) -> dict:
    return dict(operands=config.operands, distractors=config.distractors, operators=config.operators)


class Task(NamedTuple):
    """What is to be learned. For one's own data and reward see examples/real_vlm.py."""

    stream: Iterator[Problem]  # for training, endless
    held_out: list[Problem]  # for evaluation, the same for every run
    instruction: str
    reward: Callable[[Problem, str], float]  # of a problem and a response's text, from 0 to 1


def toy_task(config: Config) -> Task:
    """The toy world. `prior` holds in training problems alone."""
    seeds = itertools.count(config.seed * 10**9)
    stream = (toy_env.make_problem(i, prior=config.prior, **difficulty(config)) for i in seeds)
    held_out = toy_env.make_problems(config.eval_problems, split="eval", **difficulty(config))
    return Task(stream, held_out, INSTRUCTION, toy_env.reward)


def dataset_task(config: Config, instruction: str = INSTRUCTION,
                 reward: Callable[[Problem, str], float] | None = None) -> Task:
    """A data set with image(s), question or problem, and answer. Its test or validation split is held out or,
    where there is none, a share of the training split."""
    splits = datasets.load_dataset(config.dataset)
    columns = splits["train"].column_names
    for names in (("image", "images"), ("question", "problem"), ("answer",)):
        if not {*names} & {*columns}:
            raise ValueError(f"dataset is {config.dataset!r}, with columns {columns}: "
                             f"expected a column {' or '.join(map(repr, names))}")
    if len(splits) == 1:
        splits = splits["train"].train_test_split(test_size=config.eval_problems, seed=0)
    rows = splits["train"].shuffle(seed=config.seed)
    held_out = splits.get("test", splits.get("validation")).shuffle(seed=0)
    held_out = held_out.select(range(min(config.eval_problems, len(held_out))))
    stream = (from_row(row) for _ in itertools.count() for row in rows)
    return Task(stream, list(map(from_row, held_out)), instruction, reward or toy_env.reward)


def from_row(row: dict) -> Problem:
    image = row["image"] if "image" in row else row["images"][0]
    question = row["question"] if "question" in row else row["problem"]
    return Problem(image.convert("RGB"), question.replace("<image>", "").strip(), str(row["answer"]))


def encode(processor, instruction: str, images: list, questions: list[str], device: str) -> dict[str, Tensor]:
    """The model's inputs for prompts of an image and a question, padded on the left."""
    system = {"role": "system", "content": [{"type": "text", "text": instruction}]}
    users = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q}]} for q in questions]
    if processor.chat_template is None:
        texts = [f"{processor.image_token}{instruction}\n{question}" for question in questions]
    else:
        texts = [processor.apply_chat_template([system, user], add_generation_prompt=True) for user in users]
    images = [[image] for image in images]  # a list per prompt: a flat one is one prompt's to some processors
    bos = processor.tokenizer.bos_token  # some templates write it, so the tokenizer must not
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt",
                       add_special_tokens=not (bos and texts[0].startswith(bos)))
    return {k: x.to(device) for k, x in inputs.items() if k != "labels"}  # PaliGemma's, of the prompt


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
    tokenizer, known, banned = processor.tokenizer, policy.generation_config, banned_ids(policy)
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
    responses = [row[keep].tolist() for row, keep in zip(ids, mask)]
    piece = {i: tokenizer.decode([i], skip_special_tokens=True) for i in ids.unique().tolist()}
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    pieces = [[piece[i] for i in row] for row in responses]
    pieces = [row if "".join(row) == text else cut(tokenizer, tokens, text)
              for row, tokens, text in zip(pieces, responses, texts)]
    return Rollout(task, problems, inputs, ids, mask, truncated, pieces, texts)


def cut(tokenizer, ids: list[int], text: str) -> list[str]:
    """The text of each token where one alone reads otherwise: a leading space is lost, bytes are no
    character yet. Each is read after those before it; bytes belong to the token that completes them."""
    pieces, start, read, done = [], 0, 0, 0  # done: characters of the first `read` tokens
    for end in range(1, len(ids) + 1):
        before, now = (tokenizer.decode(ids[start:i], skip_special_tokens=True) for i in (read, end))
        new = now[len(before):]
        pieces.append(new if text.startswith(new, done) and not new.endswith("\ufffd") else "")
        if pieces[-1]:
            start, read, done = read, end, done + len(new)
    return [*pieces[:-1], pieces[-1] + text[done:]]


# ------------------------------------------------------------------------------------------------------ score
def full_inputs(inputs: dict[str, Tensor], ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Inputs for prompt and response together. Type ids of a response are 0 where those of the prompt mark
    something (its image); else 1, as in PaliGemma, where tokens of type 0 see the future."""
    per_token = {k: x for k, x in inputs.items() if x.shape == inputs["input_ids"].shape}
    tails = {k: torch.full_like(ids, not x.any()) for k, x in per_token.items()}
    tails |= dict(input_ids=ids, attention_mask=mask)
    return inputs | {k: torch.cat([x, tails[k].to(x)], 1) for k, x in per_token.items()}


def take(inputs: dict[str, Tensor], rows: Tensor, image_ids: list[int] = ()) -> dict[str, Tensor]:
    """The inputs of some rows. Where all images are packed (Qwen-VL's patches, InternVL's tiles), a prompt's
    are as many as its share of the image tokens, whose ids are `image_ids`."""
    taken, B, ids = {}, len(inputs["input_ids"]), inputs["input_ids"]
    tokens = torch.isin(ids, ids.new_tensor(image_ids)).sum(1)  # (B,)
    for name, x in inputs.items():
        sizes = tokens * len(x) // tokens.sum().clamp(min=1)
        if len(x) == B:
            taken[name] = x[rows]
        elif sizes.sum() == len(x):
            packed = x.split(sizes.tolist())
            taken[name] = torch.cat([packed[i] for i in rows.tolist()])
        else:
            raise ValueError(f"{name} is {len(x)} rows for {B} prompts: expected one each, or as many for "
                             f"each of the {int(tokens.sum())} image tokens")
    return taken


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
    """SRPO's weights (B, T): the policy scores its tokens again, without image and without perception."""
    ids, mask = roll.ids, roll.mask
    seed = int(torch.randint(2**31, ()))  # other patches in each iteration
    images = [srpo.corrupt_image(p.image, config.corruption, patch=PATCH, seed=seed + i)
              for i, p in enumerate(roll.problems)]
    questions = [p.question for p in roll.problems]
    corrupted = encode(processor, roll.task.instruction, images, questions, ids.device)
    perception, reasoning = srpo.split_roles(roll.pieces, mask)
    blanked = srpo.blank_perception(ids, perception, policy.generation_config.pad_token_id)

    def without(inputs, seen):
        other = [score(policy, take(inputs, rows, banned_ids(policy)), ids[rows], mask[rows],
                       config.temperature, seen[rows])[0] for rows in parts(len(ids), config.micro_batch)]
        return srpo.contrast(scored.log_probs, torch.cat(other), mask)  # (B, T)

    on_image = without(corrupted, ids)
    on_perception = without(roll.inputs, blanked) if config.contrast == "blank" else -on_image
    sign = advantages if config.sign_aware else None
    contrasts = torch.where(perception, on_image, on_perception)
    return srpo.role_weights(contrasts, perception, reasoning, sign=sign)


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
    max_ratio_deviation the largest; first_ratio_deviation that of the first mini-batch, which must be 0."""
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
                    loss, metrics = policy_objective(config, log_probs, old, target, roll.mask[rows])
                    (share * loss).backward()
                    largest = max(total["max_ratio_deviation"], float(metrics.pop("max_ratio_deviation")))
                    total["max_ratio_deviation"] = largest
                if critic:
                    loss = sapo.value_loss(value(critic, *these), target.returns, target.value_mask)
                    (share * loss).backward()
                    metrics["value_loss"] = loss.detach()
                for name, x in metrics.items():
                    total[name] += share * float(x) / steps
            if learn_policy:
                total.setdefault("first_ratio_deviation", total["max_ratio_deviation"])
            for model, optimizer in optimizers:
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                if model is policy and learn_policy:
                    total["grad_norm"] += float(norm) / steps
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
def train(config: Config, on_iteration: Callable | None = None, task: Task | None = None,
          models: tuple | None = None) -> tuple:
    """Train and write OUT/metrics.jsonl. -> policy, processor, critic, the metrics (a list of dicts, one per
    iteration, the first before any update) and the T = 1 evaluation rollouts before and after. What
    `on_iteration(i, policy, critic, roll, scored, credit)`, called after an update, returns is logged too.
    `task` and `models` (as from `load`) are one's own, if they are not what config says."""
    config = complete(config)
    torch.manual_seed(config.seed)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(asdict(config), indent=1))
    policy, processor, critic, reference = models or load(config)
    task = task or (dataset_task if config.dataset else toy_task)(config)
    optimizers = make_optimizers(config, policy, critic)
    evaluation, before = evaluate(config, policy, processor, task)
    history, after = [dict(iteration=0, responses=0, seconds=0.0, **evaluation)], before
    warmup, start = config.critic_warmup if critic else 0, time.time()
    with open(out / "metrics.jsonl", "w") as file, tqdm(total=config.iterations, unit="it") as bar:
        file.write(json.dumps(history[0]) + "\n")
        for i in range(1, config.iterations + 1):
            left = 1 - max(0, i - warmup - 1) / (config.iterations - warmup)  # falls linearly towards 0
            optimizers[0][1].param_groups[0]["lr"] = config.lr * left
            problems = take_prompts(config, task)
            roll = rollout(policy, processor, task, problems, config.max_tokens, config.temperature,
                           micro_batch=config.micro_batch)
            scored, outcome = score_all(config, policy, reference, critic, roll), roll.outcome()
            credit = assign_credit(config, policy, processor, roll, scored, outcome)
            found = update(config, policy, critic, optimizers, roll, scored, credit, learn_policy=i > warmup)
            row = dict(iteration=i, responses=i * config.responses, seconds=round(time.time() - start, 2))
            row |= describe(roll, scored, credit, outcome) | found
            if i % config.eval_every == 0 or i == config.iterations:
                evaluation, after = evaluate(config, policy, processor, task)
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


# ----------------------------------------------------------------------------------------------------- report
PANELS = [("reward", "accuracy_greedy", "accuracy_sampled", "accuracy_paper"), ("faithful",), ("entropy",),
          ("explained_variance", "explained_variance_last"), ("blame_auroc",), ("value_loss",)]


def plot(history: list[dict], path: Path, title: str) -> None:
    """The curves of a run, against the number of responses."""
    import matplotlib
    import pandas

    matplotlib.use("Agg")
    table = pandas.DataFrame(history).set_index("responses").interpolate(limit_area="inside")
    panels = [tuple(name for name in panel if name in table) for panel in PANELS]
    panels = [panel for panel in panels if panel]  # without a critic there are fewer
    axes = table[[name for panel in panels for name in panel]].plot(
        subplots=panels, layout=(2, 3), figsize=(12, 6), title=title, grid=True, sharex=False)
    axes.flat[0].figure.tight_layout()
    axes.flat[0].figure.savefig(path, dpi=110)


def report(history: list[dict], before: Rollout, after: Rollout) -> None:
    """Print what became of the held-out problems and of the critic, and three responses before and after."""
    print(f"\n{'':44}{'before':>8}{'after':>8}")
    for name in (name for name in history[0] if name not in ("iteration", "responses", "seconds")):
        print(f"{name:44}{history[0][name]:8.3f}{history[-1][name]:8.3f}")
    for name in ("explained_variance_last", "explained_variance", "blame_auroc"):
        if values := [row[name] for row in history if row.get(name) is not None]:
            print(f"{name + ', mean over the run':52}{fmean(values):8.3f}")
    for i, problem in enumerate(before.problems[:3]):
        print(f"\n{problem.question}   answer {problem.answer}")
        for name, roll in (("before", before), ("after", after)):
            print(f"{name:>7}  " + marked(problem, roll.texts[i]).replace("\n", "\n" + 9 * " "))


def marked(problem: Problem, response: str) -> str:
    """The response with its first error between » and «."""
    error = toy_env.first_error(problem, response) if problem.cells else None
    if error is None:
        return response
    return f"{response[:error.start]}»{response[error.start:error.end]}«{response[error.end:]}"


# ------------------------------------------------------------------------------------------------------- main
def parse_arguments(arguments: list[str] | None = None) -> Config:
    """The command line: one flag for each field of Config."""
    parser = HfArgumentParser(Config, description=__doc__.split("\n")[0])
    return parser.parse_args_into_dataclasses(arguments)[0]


def main() -> None:
    try:
        config = complete(parse_arguments())
    except ValueError as error:
        sys.exit(f"train_small.py: {error}")
    transformers.utils.logging.disable_progress_bar()
    start, out = time.time(), Path(config.out)
    policy, processor, critic, history, (before, after) = train(config)
    plot(history, out / "curves.png", f"{config.algo}, seed {config.seed}, {config.operands} operands")
    report(history, before, after)
    if config.save:
        policy.save_pretrained(out / "model")
        processor.save_pretrained(out / "model")
        if critic:
            torch.save(critic.state_dict(), out / "critic.pt")
    print(f"\n{time.time() - start:.0f} s on {config.device}. Metrics, curves and config: {out}/")


if __name__ == "__main__":
    main()
