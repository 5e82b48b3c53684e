"""train_small.py, on untrained miniatures and on the shipped model, against plain loops, and against prefixes
without padding that are fed to the model one by one. First a table: each option, and what it must reach.
"""

import copy
import inspect
import itertools
import json
import math
import pkgutil
import random
import re
import runpy
import shutil
import sys
import zlib
from collections import defaultdict
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev, variance
from types import SimpleNamespace

import pytest
import torch
import transformers

import srpo
import toy_env
import train_small
from examples import real_vlm
from support import curves, options, run_folder
from support.data import INSTRUCTION
from support.inputs import encode
from tiny_vlm import make
from tiny_vlm.teacher import demonstration
from train_small import Config

SMALL = dict(iterations=2, responses=16, mini_batches=2, critic_warmup=0, operands=2, max_tokens=20,
             eval_problems=4, eval_every=1, device="cpu")  # a run of a second
TASK = train_small.Task(None, [], INSTRUCTION, toy_env.reward)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


# ---------------------------------------------------------------------------------------- for other files too
def small(model, kind=Config, **changes):
    return train_small.complete(kind(model=str(model), **SMALL | changes))


def logged(folder):
    """The rows of metrics.jsonl, in which no number is nan, without the seconds, which never repeat."""
    lines = open(folder / "metrics.jsonl", encoding="utf-8")
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    return [{name: x for name, x in row.items() if name != "seconds"} for row in rows]


def iteration(config, outcome=torch.tensor([1.0, 0, 0, 1] * 4)):
    """All of one iteration up to the update. The critic's head is random: at 0 it stops the gradient."""
    torch.manual_seed(0)
    policy, processor, critic, reference = train_small.load(config)
    if critic:
        torch.nn.init.normal_(critic.head.weight)
    task = train_small.toy_task(config)
    problems = train_small.take_prompts(config, task)
    roll = train_small.rollout(policy, processor, task, problems, config.max_tokens, config.temperature)
    scored = train_small.score_all(config, policy, reference, critic, roll)
    plan, outcome = train_small.draw_plan(config, roll), outcome[: config.responses]
    credit = train_small.assign_credit(config, policy, processor, roll, scored, outcome, plan)
    return SimpleNamespace(**locals())


def updated(s, optimizer=torch.optim.SGD, lr=1.0, credit=None, learn_policy=True, in_place=False, **changes):
    """Update copies of the models. -> metrics, and what was added to each weight of policy and critic."""
    models = s.policy, s.critic
    policy, critic = models if in_place else copy.deepcopy(models)  # which may share a base
    models = [m for m in (policy, critic) if m]
    before = [{name: p.detach().clone() for name, p in m.named_parameters()} for m in models]
    optimizers = [(m, optimizer(m.parameters(), lr=lr)) for m in models]
    torch.manual_seed(0)
    plan = train_small.draw_plan(config := replace(s.config, **changes), s.roll)
    metrics = train_small.update(config, policy, critic, optimizers, s.roll, s.scored, credit or s.credit,
                                 plan, learn_policy)
    return metrics, *({name: p.detach() - was[name] for name, p in m.named_parameters()}
                      for m, was in zip(models, before))


def prefix(roll, i, n):
    """Inputs of row i alone, without padding: its prompt and the first n tokens of its response."""
    prompt = roll.inputs["input_ids"][k := roll.prompts[i]][roll.inputs["attention_mask"][k] == 1]
    ids = torch.cat([prompt, roll.ids[i, :n]])[None]
    pixels = roll.inputs["pixel_values"][k][None]
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)


def next_log_probs(policy, inputs, temperature):
    """Of the next token, in float64, over all tokens but the image's."""
    logits = policy(**inputs).logits[0, -1].double() / temperature
    logits[policy.config.image_token_id] = -math.inf
    return logits - logits.exp().sum().log()


def spoken(problems, texts, pad="<pad>", width=200):
    """The rollout of a policy that says `texts`, cut or padded to `width` tokens."""
    processor = make.make_processor()
    ids = [processor.tokenizer(text)["input_ids"][:width] for text in texts]
    pad, eos = processor.tokenizer.convert_tokens_to_ids([pad, "<eos>"])

    def generate(input_ids, generation_config, **inputs):
        assert (generation_config.pad_token_id, generation_config.eos_token_id) == (pad, [eos])
        return torch.cat([input_ids, torch.tensor([row + [pad] * (width - len(row)) for row in ids])], 1)

    known = SimpleNamespace(eos_token_id=[eos], pad_token_id=pad)
    policy = SimpleNamespace(generate=generate, generation_config=known, device="cpu", config=None)
    return train_small.rollout(policy, processor, TASK, problems, width)


def demonstrations(n=16, **teacher):
    rng, problems = random.Random(0), [toy_env.make_problem(i // 8, operands=3) for i in range(n)]
    return problems, [demonstration(p, rng, **teacher or make.TEACHER) + "<eos>" for p in problems]


def case(mini, **changes):
    """Demonstrations as if sampled, with random scores that are nan on padding."""
    config, roll, g = small(mini, **changes), spoken(*demonstrations()), torch.Generator().manual_seed(0)
    noise = [x * torch.rand(roll.mask.shape, generator=g).where(roll.mask, math.nan) for x in (-2, 1, -2, 1)]
    outcome = torch.tensor([1.0, 0, 0, 1] * 4)
    return config, roll, train_small.Scored(*noise), outcome, roll.mask.sum(1).tolist()


# ---------------------------------------------------------------- every option reaches the function it is for
def sizes(calls):  # of parts: 3 iterations, 3 epochs, each in another order, 2 mini-batches of 8
    sizes = [len(x["values"]) for x in calls]
    rows = ["".join(map(str, row)).rstrip("0") for x in calls for row in x["value_mask"].int().tolist()]
    one, two = rows[:16], rows[16:32]
    whole = set(range(8, 8 * 18 + 1, 8)) <= {*itertools.accumulate(sizes)} and max(sizes) < 8
    return whole and len(rows) == 8 * 18 and sorted(one) == sorted(two) != one != two


def corrupted(calls):  # a cell at a time, other cells for each image in each iteration
    told, seeds = {(x["kind"], x["patch"]) for x in calls}, {x["seed"] for x in calls}
    return told == {("noise", 16)} and len(seeds) == len(calls) == 2 * 16


def sampled(calls):  # two iterations between three evaluations, which have settings of their own
    told = [x["generation_config"] for x in calls if x["generation_config"].do_sample]
    told, held_out = [(x.temperature, x.top_p, x.top_k) for x in told], [(0.6, 0.95, 0), (1.0, 1.0, 0)]
    return told == 2 * [*held_out, (0.9, 1.0, 0)] + held_out and len(calls) == len(told) + 3  # and greedy


LLAVA, GENERATE = (f"transformers.LlavaForConditionalGeneration{name}" for name in ("", ".generate"))
GAE, LOSS, VALUE, GRPO, DRAW = (
    "sapo.segment_gae", "sapo.policy_loss", "sapo.value_loss", "srpo.grpo_loss", "toy_env.make_problem")
OPTIONS = [dict(  # option: value, function that has it as an argument in all calls, or what is true of them
    gamma=(0.7, GAE), lam=(0.8, GAE), lam_returns=(0.6, GAE), value_at=("last", GAE),
    kl_coef=(0.05, "sapo.kl_rewards"), clip_low=(0.1, LOSS), clip_high=(0.3, LOSS),
    top_percent=(45.0, "sapo.ends_by_entropy"), temperature=(0.9, "train_small.score"),
    operands=(3, DRAW), distractors=(2, DRAW), operators=("-×", DRAW), openings=("few", DRAW),
    iterations=(3, VALUE, sizes), epochs=(3, VALUE, sizes), responses=(16, VALUE, sizes),
    mini_batches=(2, VALUE, sizes), micro_tokens=(110, VALUE, sizes),
    seed=(3, "torch.manual_seed", lambda calls: calls[0]["seed"] == 3),
    critic_warmup=(2, "train_small.update", lambda calls: [x["learn_policy"] for x in calls] == [0, 0, 1]),
    lr=(0.01, "torch.optim.AdamW", lambda calls: calls[0]["lr"] == 0.01),
    critic_lr=(0.02, "torch.optim.AdamW", lambda calls: calls[1]["params"][0]["lr"] == 0.02),
    head_lr=(0.03, "torch.optim.AdamW", lambda calls: calls[1]["params"][1]["lr"] == 0.03),
    ratio=("token", LOSS, lambda calls: all(x["ends"].equal(x["mask"]) for x in calls)),
    whiten=(True, "sapo.whiten", len),
    prior=(0.5, DRAW, lambda calls: [sum(x["prior"] == 0.5 and x["split"] == split for x in calls) > 30
                                     for split in ("train", "eval")] == [True, False]),
    max_tokens=(7, GENERATE, lambda calls: {x["generation_config"].max_new_tokens for x in calls} == {7}),
    model=("copy", "transformers.AutoProcessor.from_pretrained", lambda calls: "copy" in calls[0].values()),
    patience=(4, "support.run_folder.warn", lambda calls: calls[0]["config"].patience == 4),
    eval_every=(2, "train_small.evaluate", lambda calls: len(calls) == 3),  # before, after 2 and after 3
    eval_problems=(5, DRAW, lambda calls: sum(x["split"] == "eval" for x in calls) == 5),
    device=("cpu:0", "torch.nn.Module.to", lambda calls: [
        str(*x["args"]) for x in calls] == ["cpu:0", "cpu"]),
    out=("here", "torch.save", lambda calls: Path("here/critic.pt") in [x["f"] for x in calls]),
    save=(True, LLAVA + ".save_pretrained", lambda calls: calls[0]["save_directory"] == Path("here/model")),
), dict(
    algo=("srpo", "srpo.role_weights", len),
    kl_coef=(0.05, GRPO), clip_low=(0.1, GRPO), clip_high=(0.3, GRPO), temperature=(0.9, GENERATE, sampled),
    contrast=("blank", "srpo.contrast", lambda calls: len(calls) == 4),  # two in each iteration, not one
    weight_temperature=(2.0, "srpo.role_weights", lambda calls: all(x["temperature"] == 2 for x in calls)),
    weight_clip=(0.2, "srpo.role_weights", lambda calls: all(x["clip"] == 0.2 for x in calls)),
    corruption=("noise", "srpo.corrupt_image", corrupted),
    sign_aware=(True, "srpo.role_weights", lambda calls: all(x["sign"].numel() for x in calls)),
), dict(
    algo=("gspo", "sapo.ends_once", len), checkpointing=(True, LLAVA + ".gradient_checkpointing_enable", len),
    dtype=("bfloat16", "support.models.Role", lambda calls: calls[0]["config"].dtype == "bfloat16"),
    train_vision=(False, "support.models.Eyes", len),
), dict(
    segments=("newline", "sapo.ends_by_token", len),
)]


@pytest.mark.parametrize("table", OPTIONS, ids=lambda table: table.get("algo", ["sapo"])[0])
def test_every_option_reaches_the_function_it_is_for(table, mini, tmp_path, monkeypatch, command):
    defaults = {field.name: field.default for field in fields(Config)}
    others = {"resume", "lora"}  # which have tests of their own
    assert set().union(*OPTIONS) | others == set(defaults), "an option of Config has no row in the table"
    shutil.copytree(mini, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(curves, "plot", lambda *_: None)
    calls = defaultdict(list)

    def record(name, function):
        def recorded(*args, **kwargs):
            bound = inspect.signature(function).bind(*args, **kwargs)
            bound.apply_defaults()
            calls[name].append(bound.arguments)
            return function(*args, **kwargs)

        monkeypatch.setattr(name, recorded)

    for name in {name for _, name, *_ in table.values()}:
        record(name, pkgutil.resolve_name(name))
    assert command(**SMALL | dict(model="copy", out="there") | {k: x[0] for k, x in table.items()}) == 0
    for option, (value, name, *look) in table.items():
        found = look[0](calls[name]) if look else {x[option] for x in calls[name]} == {value}
        assert found and (value != defaults[option] or option == "responses"), (option, name)


# ------------------------------------------------------------------------------------------ rollout and score
@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
@pytest.mark.parametrize("start", ["", "<eos>"])
def test_eos_is_trained_on_and_truncation_is_flagged(pad, start):  # pitfalls 6, 7, 15
    problems, (right, *_) = demonstrations(8, misread=0.0)
    asked = [replace(p, question=start + p.question) for p in problems]
    n, cut = len(make.make_processor().tokenizer(right)["input_ids"]), right.replace("<eos>", "\n")
    roll = spoken(asked[:3], [right, cut, "<think> <eos>"], pad, width=n)
    assert roll.mask.tolist() == [[True] * n, [True] * n, [True] * 2 + [False] * (n - 2)]
    assert roll.ids[0, n - 1] == roll.ids[2, 1] == make.make_processor().tokenizer.eos_token_id
    assert toy_env.reward(problems[1], cut) == toy_env.faithful(problems[1], cut) == 1  # but truncated:
    assert roll.truncated.tolist() == [False, True, False] and roll.outcome().tolist() == [1, 0, 0]
    assert roll._replace(problems=problems).faithful() == [True, False, False]
    assert roll.texts[:2] == [right.removesuffix("<eos>"), cut] and roll.pieces[0][-1] == ""
    assert ["".join(p) for p in roll.pieces] == roll.texts
    longer = spoken(asked[:1], [right], pad, width=n + 9)
    assert longer.mask.tolist() == [[True] * n] and not longer.truncated  # padding for all is cut off


@torch.no_grad()
@pytest.mark.parametrize("model", ["mini", "tiny"])
def test_scores_are_those_of_prefixes_without_padding(mini, model):  # pitfalls 2, 6, 7, 8, 9
    folder, n, tokens = (mini, 8, 130) if model == "mini" else (options.TINY_VLM, 2, 60)
    config = small(folder, temperature=0.7, micro_tokens=tokens)
    policy, processor, critic, reference = train_small.load(config)
    torch.manual_seed(0)
    for head in (critic.head, reference.lm_head):  # by now the policy has moved away from it
        torch.nn.init.normal_(head.weight)
    eos = processor.tokenizer.eos_token_id
    processor.tokenizer.pad_token, policy.generation_config.pad_token_id = "<eos>", eos
    problems = [toy_env.make_problem(i, operands=2 + 3 * (i % 2)) for i in range(n)]
    problems[0] = replace(problems[0], question="<eos>" + problems[0].question)
    roll = train_small.rollout(policy, processor, TASK, problems, 40, temperature=0.7)
    lengths, caches = roll.mask.sum(1).tolist(), []
    for part in (policy.model, reference.model, critic.backbone):
        part.register_forward_hook(lambda module, args, output: caches.append(output.past_key_values))
    scored = train_small.score_all(config, policy, reference, critic, roll)
    parts = roll.parts(torch.arange(n), tokens)
    assert caches == [None] * 3 * len(parts) and len(parts) > 1  # none is built that nobody reads
    for i, n in enumerate(lengths):
        assert eos not in roll.ids[i, : n - 1] and (roll.ids[i, n - 1] != eos) == roll.truncated[i]
        for t in {0, 1, n // 3, n // 2, n - 1}:
            seen, token = prefix(roll, i, t), roll.ids[i, t]
            expected = next_log_probs(policy, seen, 0.7)
            value = critic.head(critic.backbone(**seen).last_hidden_state[0, -1])
            assert abs(scored.log_probs[i, t] - expected[token]) < 5e-5
            assert abs(scored.ref_log_probs[i, t] - next_log_probs(reference, seen, 0.7)[token]) < 5e-4
            assert abs(scored.entropy[i, t] - torch.special.entr(expected.exp()).sum()) < 5e-5
            assert abs(scored.values[i, t] - value) < 5e-4 and abs(value) > 0
    left_padded = roll.inputs["attention_mask"][0, 0] == 0
    assert left_padded and (model == "tiny" or len(set(lengths)) > 2)  # and ragged


@torch.no_grad()
def test_samples_what_it_scores_whatever_the_model_says(mini):  # pitfall 9: saved settings are not inherited
    policy, processor, *_ = train_small.load(small(mini))
    torch.manual_seed(0)
    roll = train_small.rollout(policy, processor, TASK, [toy_env.make_problem(0)] * 1500, 1, temperature=0.7)
    expected = 1500 * next_log_probs(policy, prefix(roll, 0, 0), 0.7).exp()
    counts, often = torch.bincount(roll.ids[:, 0], minlength=len(expected)), expected >= 5
    observed, expected = (torch.cat([x[often], x[~often].sum()[None]]) for x in (counts, expected))
    freedom, chi2 = int(often.sum()), ((observed - expected) ** 2 / expected).sum()
    assert freedom > 20 and chi2 < freedom + 5 * math.sqrt(2 * freedom)


def test_image_placeholders_are_neither_sampled_nor_asked_for(mini):  # pitfalls 19, 20; nor scored: above
    policy, processor, *_ = train_small.load(small(mini, algo="grpo"))
    image, problem = policy.config.image_token_id, toy_env.make_problem(0)
    policy.lm_head.register_forward_hook(lambda _, args, out: out + 50 * torch.eye(out.shape[-1])[image])
    for greedy in (False, True):
        assert image not in train_small.rollout(policy, processor, TASK, [problem] * 16, 6, greedy=greedy).ids
    with pytest.raises(ValueError, match="question is '<image>.*: expected one without <image>"):
        encode(processor, INSTRUCTION, [problem.image], ["<image>" + problem.question], "cpu")
    inputs = encode(processor, INSTRUCTION, [problem.image], [problem.question], "cpu")
    one_more = inputs["input_ids"][:, :1]
    with pytest.raises(ValueError, match="(?i)image features and image tokens do not match"):
        train_small.score(policy, inputs, one_more, torch.ones_like(one_more))


def test_take_and_full_inputs_on_packed_images():  # Qwen-VL: 4, 8 and 16 patches for 1, 2 and 4 tokens
    grid, pixels = torch.tensor([[1, 2, 2], [1, 4, 2], [2, 2, 4]]), torch.arange(28)[:, None] * torch.ones(5)
    prompts = torch.tensor([[0, 1, 2, 99, 4], [5, 99, 99, 8, 9], [99, 99, 99, 99, 14]])
    inputs = dict(input_ids=prompts, attention_mask=torch.ones(3, 5), image_grid_thw=grid,
                  token_type_ids=torch.ones(3, 5, dtype=torch.long), pixel_values=pixels)
    taken = train_small.take(inputs, torch.tensor([2, 0]), [99])
    assert taken["pixel_values"][:, 0].tolist() == [*range(12, 28), *range(4)]
    assert torch.equal(taken["input_ids"], prompts[[2, 0]])
    assert torch.equal(taken["image_grid_thw"], grid[[2, 0]])
    tiles = dict(input_ids=prompts, pixel_values=pixels[:5])  # which rows are whose?
    with pytest.raises(ValueError, match="pixel_values is 5 rows for 3 prompts: expected .* 7 image tokens"):
        train_small.take(tiles, torch.tensor([2, 0]), [99])
    ids, mask = torch.tensor([[7, 8], [7, 9], [7, 9]]), torch.tensor([[1, 1], [1, 0], [1, 1]]).bool()
    whole = train_small.full_inputs(inputs, ids, mask)
    assert whole["input_ids"][1].tolist() == [5, 99, 99, 8, 9, 7, 9]
    assert whole["attention_mask"][1].tolist() == [1] * 6 + [0]
    assert whole["token_type_ids"][0].tolist() == [1] * 5 + [0] * 2  # a response is text
    assert whole["pixel_values"] is pixels and whole["image_grid_thw"] is grid  # not per token


@pytest.mark.parametrize("saved, tokens, eos, pad", [
    (None, {}, [1], 0), (0, dict(pad_token="<unk>"), [0], 2), ([2, 0], dict(pad_token=None), [2, 0], 2),
    (None, dict(eos_token="<pad>", pad_token=None), [0], 0)])
def test_special_tokens_are_the_models_or_tokenizers(mini, monkeypatch, tmp_path, saved, tokens, eos, pad):
    """0 is an id. Where there is no token to pad and to blank with, an end-of-sequence token will do."""
    processor, folder = make.make_processor(), shutil.copytree(mini, tmp_path / "model")
    for name, token in tokens.items():
        setattr(processor.tokenizer, name, token)
    processor.save_pretrained(folder)
    transformers.GenerationConfig(eos_token_id=saved).save_pretrained(folder)
    blanks, blank = [], srpo.blank_perception
    monkeypatch.setattr(srpo, "blank_perception", lambda ids, at, by: blanks.append(by) or blank(ids, at, by))
    s = iteration(small(folder, algo="srpo", contrast="blank", responses=64, max_tokens=30),
                  torch.arange(64) % 2.0)
    known = s.policy.generation_config
    assert (known.eos_token_id, known.pad_token_id, blanks) == (eos, pad, [pad])
    for ids, mask, truncated in zip(s.roll.ids, s.roll.mask, s.roll.truncated):
        at = [t for t, i in enumerate(ids.tolist()) if i in eos]
        assert mask.sum() == (at[0] + 1 if at else len(ids)) and truncated == (not at)
    assert 1 < s.roll.truncated.sum() < 63


# ----------------------------------------------------------------------------------------------------- credit
@pytest.mark.parametrize("algo, lam, lam_returns, changes", [
    ("ppo", 0.95, 0.95, {}), ("vc-ppo", 0.99, 1.0, {}), ("sapo", 0.9, 0.9, {}),
    ("sapo", 0.5, 0.5, dict(lam=0.5, gamma=0.8, value_at="last", top_percent=10.0)),
    ("sapo", 0.5, 0.5, dict(lam=0.5, ratio="token", kl_coef=0.5))])
def test_credit_with_a_critic_is_a_loop_over_segments(mini, algo, lam, lam_returns, changes):
    config, roll, scored, outcome, lengths = case(mini, algo=algo, **changes)
    assert config.kl_coef == changes.get("kl_coef", 0.001)  # Table 7
    credit, gamma = train_small.assign_credit(config, None, None, roll, scored, outcome), config.gamma
    for i, n in enumerate(lengths):
        most = math.ceil(config.top_percent / 100 * n)
        uncertain = sorted(range(n), key=lambda t: -scored.entropy[i, t])[:most]
        ends = sorted({n - 1, *(uncertain if algo == "sapo" else range(n))})
        reward = (-config.kl_coef * (scored.log_probs - scored.ref_log_probs)[i, :n]).tolist()
        reward[-1] += float(outcome[i])
        advantage = to_go = v_next = 0.0
        for z in [range(a, b + 1) for a, b in zip([0, *(t + 1 for t in ends)], ends)][::-1]:
            state = z[-1] if config.value_at == "last" else z[0]
            v = float(scored.values[i, state])
            delta = sum(reward[t] for t in z) + gamma * v_next - v
            advantage, to_go = delta + gamma * lam * advantage, delta + gamma * lam_returns * to_go
            v_next = v
            assert torch.allclose(credit.advantages[i, z], torch.tensor(advantage), atol=1e-5)
            assert torch.allclose(credit.returns[i, z], torch.tensor(to_go + v), atol=1e-5)
            assert credit.value_mask[i, z].tolist() == [t == state for t in z]
        expected = list(range(n)) if config.ratio == "token" else ends
        assert credit.ends[i].nonzero()[:, 0].tolist() == expected
    white = train_small.assign_credit(replace(config, whiten=True), None, None, roll, scored, outcome)
    assert torch.equal(white.returns, credit.returns)
    inside = credit.advantages[roll.mask]
    expected = (inside - inside.mean()) / inside.std(correction=0)
    assert torch.allclose(white.advantages[roll.mask], expected, atol=1e-4)


@pytest.mark.parametrize("algo", ["grpo", "gspo"])
def test_credit_of_groups_is_constant_in_a_response(mini, algo):
    config, roll, scored, outcome, lengths = case(mini, algo=algo)
    outcome[:2] = 0  # so that the groups differ
    credit = train_small.assign_credit(config, None, None, roll, scored, outcome)
    for i, n in enumerate(lengths):
        group = outcome[i // 8 * 8 :][:8].tolist()
        expected = (float(outcome[i]) - fmean(group)) / (stdev(group) + 1e-6)
        assert torch.allclose(credit.advantages[i], expected * roll.mask[i], atol=1e-4)
        assert credit.ends[i].nonzero()[:, 0].tolist() == ([n - 1] if algo == "gspo" else list(range(n)))
    new = scored.log_probs + 1e-3  # beyond GSPO's clip, and within GRPO's
    _, metrics = train_small.policy_objective(config, new, scored, credit, roll.mask)
    clipped = float((outcome > 0).float().mean()) if algo == "gspo" else 0
    assert float(metrics["clip_fraction"]) == pytest.approx(clipped)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, dict(contrast="blank"), dict(sign_aware=True, micro_tokens=250)])
def test_srpo_weighs_tokens_by_what_the_policy_loses(mini, changes):
    changes |= dict(algo="srpo", temperature=0.7, corruption="blank")
    config, roll, _, outcome, lengths = case(mini, **changes)
    policy, processor, *_ = train_small.load(config)
    scored = train_small.score_all(config, policy, None, None, roll)
    plan = train_small.draw_plan(config, roll)
    credit = train_small.assign_credit(config, policy, processor, roll, scored, outcome, plan)
    assert curves.describe(roll, scored, credit, outcome)["with_roles"] == 1
    blind = config.contrast == "blind"
    for i in (0, 1, 9):
        A, n, text = float(srpo.group_advantages(outcome, 8)[i]), lengths[i], roll.texts[i]
        grey = srpo.corrupt_image(roll.problems[i].image, "blank")
        pixels = processor.image_processor([grey], return_tensors="pt")["pixel_values"]
        start, role, contrasts = list(itertools.accumulate(map(len, roll.pieces[i]), initial=0)), {}, {}
        for block in ("perception", "think"):  # the tokens between its tags
            a, b = text.index(f"<{block}> ") + len(block) + 3, text.index(f" </{block}>")
            role |= {t: block for t in range(n) if a <= start[t] < b}
        for t in role:
            seen, other = prefix(roll, i, t), prefix(roll, i, t)
            if role[t] == "perception" or blind:
                other["pixel_values"] = pixels
            else:
                L = other["input_ids"].shape[1] - t
                hidden = [L + u for u in range(t) if role.get(u) == "perception"]
                other["input_ids"][0, hidden] = processor.tokenizer.pad_token_id
            lost = next_log_probs(policy, seen, 0.7) - next_log_probs(policy, other, 0.7)
            contrasts[t] = float(lost[roll.ids[i, t]]) * (-1 if role[t] == "think" and blind else 1)
        assert credit.roles[i].nonzero()[:, 0].tolist() == sorted(role)
        baseline, sign = fmean(contrasts.values()), math.copysign(1, A) if config.sign_aware else 1
        weight = {t: min(1.5, max(0.5, math.exp(sign * (x - baseline)))) for t, x in contrasts.items()}
        mean = fmean(weight.values())
        expected = torch.tensor([A * weight.get(t, mean) / mean for t in range(n)])
        assert torch.allclose(credit.advantages[i, :n], expected, atol=1e-3) and stdev(weight.values()) > 1e-3


def test_segments_end_where_the_text_says(mini):
    config, roll, scored, _, lengths = case(mini)

    def texts(strategy):
        ends = train_small.segment_ends(replace(config, segments=strategy), roll, scored)
        for row, pieces in zip(ends.tolist(), roll.pieces):
            cuts = [t + 1 for t, end in enumerate(row) if end]
            yield ["".join(pieces[a:b]) for a, b in zip([0, *cuts], cuts)]

    assert list(texts("newline")) == [text.splitlines(keepends=True) for text in roll.texts]
    after = re.compile(r"(?<=\n)|(?<=, )|(?<=</perception> )|(?<=</think> )|(?<=</answer>)")
    assert list(texts("step")) == [after.split(text) for text in roll.texts]  # the last "" is <eos>
    for pieces, log_probs, n, found in zip(roll.pieces, scored.log_probs, lengths, texts("probability")):
        cuts = sorted({n, *(t + 1 for t in [t for t in range(n) if math.exp(log_probs[t]) < 0.9][4::5])})
        assert found == ["".join(pieces[a:b]) for a, b in zip([0, *cuts], cuts)]


# ----------------------------------------------------------------------------------------------------- update
@pytest.fixture(scope="module", params=["sapo", "ppo", "grpo", "gspo", "srpo"])
def s(request, mini):
    """An iteration of each algorithm up to its update, which tests make of copies."""
    torch.backends.cudnn.allow_tf32 = True  # torch's default: on a GPU, features hang on the batch's shape
    return iteration(small(mini, algo=request.param, temperature=0.7))


def test_ratio_is_one_before_the_first_step(s):  # pitfall 1; the miniature is saved with dropout
    assert not torch.backends.cudnn.allow_tf32
    metrics, *changes = updated(s, torch.optim.Adam, lr=0.0, epochs=2, micro_tokens=110)
    assert metrics["max_ratio_deviation"] < 1e-5 and metrics["clip_fraction"] == 0 < metrics["grad_norm"]
    assert abs(metrics["kl_step"]) < 1e-6 and abs(metrics["kl_step_k3"]) < 1e-6
    assert ("kl_to_start_k3" in metrics) == (s.config.algo in ("grpo", "srpo"))  # theirs is in the loss
    assert metrics.get("kl_to_start_k3", 0) < 1e-6
    assert not any(change.any() for model in changes for change in model.values())
    assert len(set(s.roll.mask.sum(1).tolist())) > 2  # ragged
    if s.critic:  # its error is that of the states whose V was read, a mean over each response's
        rows = zip(s.scored.values.tolist(), s.credit.returns.tolist(), s.credit.value_mask.tolist())
        loss = fmean(fmean((v - r) ** 2 for v, r, on in zip(*row) if on) for row in rows)
        assert metrics["value_loss"] == pytest.approx(loss, rel=1e-4)


def test_mini_batches_shuffle_and_begin_without_gradient_and_the_first_has_a_ratio_of_one(mini):
    s = iteration(small(mini, algo="ppo", mini_batches=1))
    once, thrice = (updated(s, lr=0.0, epochs=n)[0]["grad_norm"] for n in (1, 3))
    assert once == pytest.approx(thrice, rel=1e-3)  # nothing is left over from the step before
    tried = (1, 0), (4, 0), (4, 80)
    first, later, parts = (updated(s, mini_batches=n, micro_tokens=m)[0] for n, m in tried)
    assert [x["first_ratio_deviation"] for x in (first, later)] == [first["max_ratio_deviation"], 0] == [0, 0]
    assert 1e-3 < later["max_ratio_deviation"] == pytest.approx(parts["max_ratio_deviation"], rel=1e-3)
    s.scored.log_probs[3] += 0.1  # what was scored wrongly is seen at once, whichever micro-batch it is in
    assert updated(s, micro_tokens=150)[0]["first_ratio_deviation"] > 0.09


def test_micro_batches_change_no_gradient_and_no_metric(s):  # pitfall 11, on ragged responses
    (metrics, *whole), (same, *parts) = updated(s), updated(s, micro_tokens=110)
    for one, other in zip(whole, parts):
        assert max(float((one[name] - other[name]).abs().max()) for name in one) < 5e-6
        assert max(float(change.abs().max()) for change in one.values()) > 1e-3
    assert same == pytest.approx(metrics, rel=1e-3, abs=1e-6) and metrics["mean_ratio_deviation"] > 1e-5
    for scale in (1e-2, 1e4):  # the latter's gradient is clipped
        loud = s.credit._replace(advantages=scale * s.credit.advantages)
        metrics, change, *_ = updated(s, credit=loud, mini_batches=1)
        norm = math.sqrt(sum(float(x.square().sum()) for x in change.values()))
        assert norm == pytest.approx(min(metrics["grad_norm"], 1), rel=1e-3) and (norm > 0.9) == (scale > 1)


@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_equal_outcomes_teach_nothing(mini, outcome):  # pitfall 13
    for algo in ("grpo", "gspo", "srpo", "sapo"):  # the last learns from them, by its critic
        s = iteration(small(mini, algo=algo, kl_coef=0.0), torch.full((16,), outcome))
        metrics, change, *_ = updated(s, torch.optim.Adam, lr=1e-3)
        assert all(map(math.isfinite, metrics.values())) and s.reference is None
        assert algo == "sapo" or metrics["grad_norm"] == 0 and not any(x.any() for x in change.values())


def test_one_update_moves_every_weight_but_the_reference(s):  # pitfall 18
    _, *changes = updated(s)
    still = {".".join(name.split(".")[-2:]) for x in changes for name in x if not x[name].any()}
    # SigLIP's last norm comes after the features that LLaVA takes; a bias of keys cancels in the softmax
    assert still <= {"post_layernorm.weight", "post_layernorm.bias", "k_proj.bias"}
    assert s.reference is None or not any(p.requires_grad for p in s.reference.parameters())
    places = [p.data_ptr() for m in (s.policy, s.critic, s.reference) if m for p in m.parameters()]
    assert len(places) == len({*places})  # they share no storage
    metrics, *changes = updated(s, learn_policy=False)  # critic warm-up
    assert [any(x.any() for x in change.values()) for change in changes] == [False, True][: len(changes)]
    assert metrics.keys() == ({"value_loss"} if s.critic else set())


# ---------------------------------------------------------------------------------------------------- metrics
def test_metrics_of_an_iteration_match_loops(mini, monkeypatch, capsys):
    config, roll, scored, outcome, lengths = case(mini, ratio="token")  # where segments are others, of GAE
    credit = train_small.assign_credit(config, None, None, roll, scored, outcome)
    roll, both = roll._replace(truncated=torch.arange(16) < 4), list(zip(roll.problems, roll.texts))
    over_tokens = lambda x: fmean(float(x[i, t]) for i, n in enumerate(lengths) for t in range(n))
    right = [(i > 3) * toy_env.reward(*x) for i, x in enumerate(both)]  # the first four did not finish
    faithful = fmean(r * toy_env.faithful(*x) for r, x in zip(right, both))
    blames = map(toy_env.blame, roll.problems, roll.texts, roll.pieces, credit.advantages.tolist())
    read = [[(float(outcome[i]), float(scored.values[i, t])) for t in range(n) if credit.value_mask[i, t]]
            for i, n in enumerate(lengths)]
    explained = [1 - variance(r - v for r, v in its) / variance(r for r, _ in its)
                 for its in (sum(read, []), [row[-1] for row in read])]
    assert curves.describe(roll, scored, credit, outcome) == pytest.approx(dict(
        entropy=over_tokens(scored.entropy), kl_to_start=over_tokens(scored.log_probs - scored.ref_log_probs),
        segments_per_response=fmean(map(len, read)), response_length=fmean(lengths), reward=0.5,
        truncated=0.25, unreadable=fmean(toy_env.parse(text) is None for _, text in both), faithful=faithful,
        blame_auroc=fmean(x.statements for x in blames if x),
        explained_variance=explained[0], explained_variance_last=explained[1]), abs=1e-5)

    monkeypatch.setattr(train_small, "rollout", lambda *args, **mode: roll)
    result, _ = train_small.evaluate(config, None, None, TASK._replace(held_out=roll.problems))
    accuracies = dict.fromkeys(["accuracy_greedy", "accuracy_sampled", "accuracy_paper"], fmean(right))
    read = fmean(toy_env.perception(*x) for x in both)
    assert result == pytest.approx(accuracies | dict(faithful_sampled=faithful, perception_sampled=read))
    assert 0 < faithful < fmean(right) < read < 1
    problem, wrong = next((p, t) for p, t in both if toy_env.first_error(p, t))
    error = toy_env.first_error(problem, wrong)
    shown = f"{wrong[: error.start]}»{wrong[error.start : error.end]}«{wrong[error.end :]}"
    assert curves.marked(problem, wrong) == shown
    curves.report([problem], [dict(x=1.25), dict(blame_auroc=0), dict(x=1.5, blame_auroc=1)], [wrong], ["so"])
    assert re.search(r"x +1.250 +1.500\nb.* 0.500\n.*before .*».*after  »so«", capsys.readouterr().out, re.S)


# -------------------------------------------------------------------------------------------------- the whole
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("algo", list(train_small.ALGORITHMS))
def test_every_algorithm_runs(mini, tmp_path, coin, algo, device):
    more, asked = dict(algo=algo, device=device, out=str(tmp_path)), []
    config = small(mini, mini_batches=1, critic_warmup=1, **more)
    hook = lambda i, *its: asked.extend(its[2].problems) or dict(mine=i + fmean(its[2].outcome()))
    run = train_small.prepare(config)
    history, texts = train_small.learn(run, hook)
    rows, critic = run_folder.metrics(tmp_path)[0], algo in ("sapo", "ppo", "vc-ppo")
    numbers = [(r["iteration"], r["responses"], r.get("mine", 0) - r.get("reward", 0)) for r in rows]
    assert rows == history and numbers == [(0, 0, 0), (1, 16, 1), (2, 32, 2)]
    assert all(v is None or math.isfinite(v) for row in rows for v in row.values())
    assert ["kl_to_start" in rows[2], "value_loss" in rows[2]] == [algo != "gspo", critic]
    assert max(row.get("first_ratio_deviation", 0) for row in rows) < 1e-4
    assert (rows[2].get("with_roles") == 0) == (algo == "srpo")  # the miniature knows no tags
    assert ["grad_norm" in row for row in rows] == [False, not critic, True] and rows[2]["grad_norm"] > 0
    group = 1 if critic else 8
    held_out = toy_env.make_problems(4, split="eval", **options.difficulty(config))
    assert train_small.toy_task(config).held_out == held_out
    assert [p.question for p in asked] == [p.question for p in asked[::group] for _ in range(group)]
    assert len({id(p) for p in asked}) == 32 // group and [*map(len, texts)] == [4, 4]
    said = [repr((tuple(map(tuple, p.cells)), p.question)).encode() for p in held_out + asked]
    assert [zlib.crc32(x) % 8 == 0 for x in said] == [True] * 4 + [False] * 32  # one in eight is held out


def test_same_seed_same_metrics_and_evaluating_changes_nothing(mini, tmp_path, coin, monkeypatch):
    rates, runs, held_out, update = [], [], [], train_small.update
    note = lambda optimizers: rates.append([group["lr"] for _, o in optimizers for group in o.param_groups])
    monkeypatch.setattr(train_small, "update", lambda *args, **more: note(args[3]) or update(*args, **more))
    for i, changes in enumerate([dict(), dict(eval_every=3), dict(seed=1)]):
        changes |= dict(out=str(tmp_path / str(i)), iterations=4, critic_warmup=1, lr=3e-3, critic_lr=1e-3)
        held_out.append(train_small.learn(train_small.prepare(small(mini, **changes)))[1][0])
        runs.append(logged(tmp_path / str(i)))
    assert ["accuracy_paper" in row for row in runs[1]] == [True, False, False, True, True]
    assert [{k: v for k, v in row.items() if k in short} for row, short in zip(*runs[:2])] == runs[1]
    assert runs[2][1]["entropy"] != runs[0][1]["entropy"] and held_out[2] == held_out[0]
    problems = [next(train_small.toy_task(small(mini, seed=seed)).stream) for seed in (0, 0, 1)]
    assert problems[0] == problems[1] != problems[2]
    # Policy, critic and its head: only the first falls, once it learns.
    assert rates[:4] == [pytest.approx([3e-3 * x, 1e-3, 2e-3]) for x in (1, 1, 2 / 3, 1 / 3)]


def test_command_line(monkeypatch, capsys):
    for arguments, words in (("--algo nonsense", "invalid choice: 'nonsense'"), ("--help-all", "--critic-w"),
                             ("--help", "--top-percent"), ("--lamda 0.9", "train_small.py: .*--lamda")):
        monkeypatch.setattr(sys, "argv", ["train_small.py", *arguments.split()])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(train_small.__file__, run_name="__main__")
        assert re.search(words, "".join(capsys.readouterr()) + str(stop.value.code))
        assert (stop.value.code == 0) == arguments.startswith("--help")
    parse = partial(options.parse_arguments, Config, "")
    assert parse([]) == Config()
    some = parse("--algo srpo --lr 1e-3 --whiten --kl-coef 0 --max-tokens 9".split())
    assert some == Config(algo="srpo", lr=1e-3, whiten=True, kl_coef=0.0, max_tokens=9)
    assert train_small.complete(some).kl_coef == 0  # 0 is not None
    for openings, model in (("none", options.TINY_VLM), ("few", options.WORDY)):
        config = train_small.complete(Config(openings=openings))
        assert (config.model, config.lr, config.lam, config.max_tokens) == (model, 1.6e-4, 0.9, 104)
    for lora, rates in ((0, (1e-6, 2e-6, 2e-6)), (4, (1e-5, 1e-5, 1e-5))):  # the first are the paper's
        config = train_small.complete(real_vlm.RealConfig(lora=lora))
        assert (config.lr, config.critic_lr, config.head_lr, config.lam) == (*rates, 0.99)


def test_the_shipped_model_learns(tmp_path, command, capsys):
    assert command(iterations=9, critic_warmup=2, lr=3e-4, critic_lr=3e-4, operands=2, responses=64,
                   mini_batches=2, eval_every=9, eval_problems=64, device="cpu", out=tmp_path) == 0
    rows = logged(tmp_path)
    rewards, explained = ([row[name] for row in rows[1:]] for name in ("reward", "explained_variance"))
    assert fmean(rewards[-2:]) > fmean(rewards[:3]) + 0.15, rewards  # three by the base model
    assert rows[-1]["accuracy_greedy"] > rows[0]["accuracy_greedy"] + 0.05
    assert abs(explained[0]) < 1e-6 and fmean(explained[1:4]) > 0.05, explained  # the head starts at 0
    assert max(row.get("first_ratio_deviation", 0) for row in rows) < 1e-5
    assert (tmp_path / "curves.png").stat().st_size > 10_000 and "before   after" in capsys.readouterr().out
