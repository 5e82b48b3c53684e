"""examples/real_vlm.py on a tiny LLaVA: one base in three roles, bfloat16, the reward, the memory."""

import copy
import itertools
import json
import sys
from dataclasses import replace

import datasets
import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_models import FAMILIES, make_model, many_sizes
from transformers.integrations.peft import MIN_PEFT_VERSION

import train_small
from examples import judge, real_vlm
from support import models
from support.inputs import encode

OPTIONS = dict(iterations=2, responses=8, mini_batches=2, critic_warmup=0, max_tokens=10, micro_tokens=64,
               eval_problems=4, eval_every=1, device="cpu")


def needs_peft():
    """Skip without a peft that transformers takes: it can ask for one that is not released yet."""
    pytest.importorskip("peft", minversion=MIN_PEFT_VERSION)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, and problems like Geometry3K's: a list of images, of any size and mode, the image's place
    in the question."""
    folder = tmp_path_factory.mktemp("real")
    make_model(FAMILIES["llava"], folder / "model")
    modes = itertools.cycle(("RGB", "RGBA", "L", "P", "LA", "1", "CMYK"))
    drawn = [replace(p, image=p.image.convert(mode)) for p, mode in zip(many_sizes(14), modes)]
    (folder / "data").mkdir()
    for name, part in {"train": drawn[:10], "test": drawn[10:]}.items():
        datasets.Dataset.from_dict(dict(
            images=[[p.image] for p in part], problem=["<image>" + p.question for p in part],
            answer=[p.answer for p in part])).to_parquet(folder / "data" / f"{name}.parquet")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def settings(folder, **changes):
    options = OPTIONS | dict(model=str(folder / "model"), dataset=str(folder / "data")) | changes
    return train_small.complete(real_vlm.RealConfig(**options))


def made(folder, **changes):
    """Config, policy, critic, reference, and one rollout with its scores and credit."""
    config = settings(folder, **changes)
    torch.manual_seed(0)
    policy, processor, critic, reference = train_small.load(config)
    torch.nn.init.normal_(critic.head.weight)  # at 0 it stops the gradient
    task = train_small.toy_task(replace(config, operands=2))
    problems = train_small.take_prompts(config, task)
    roll = train_small.rollout(policy, processor, task, problems, config.max_tokens)
    scored = train_small.score_all(config, policy, reference, critic, roll)
    outcome = torch.tensor([1.0, 0, 0, 1] * 2)
    credit = train_small.assign_credit(config, policy, processor, roll, scored, outcome)
    return config, policy, critic, reference, roll, scored, credit


def step(config, policy, critic, roll, scored, credit):
    optimizers = [(m, torch.optim.SGD(m.parameters(), lr=1.0)) for m in (policy, critic)]
    torch.manual_seed(1)
    plan = train_small.draw_plan(config, roll)
    return train_small.update(config, policy, critic, optimizers, roll, scored, credit, plan)


def pixels(config, roll):
    """The prompts' inputs as a model takes them that has seen nothing yet."""
    processor = models.load_policy(config.model, "cpu")[1]
    images, questions = zip(*((p.image, p.question) for p in roll.problems))
    inputs = encode(processor, roll.task.instruction, images, questions, "cpu", tiles=False)
    return train_small.take(inputs, torch.arange(len(images)), roll.image_ids)


def weights(module):
    return {name: x.detach().clone() for name, x in module.named_parameters()}


# ------------------------------------------------------------------------------------------------ the command
@pytest.mark.parametrize("how", ["all weights", "lora"])
def test_trains_saves_and_goes_on(folder, tmp_path, monkeypatch, capsys, how):
    changes = dict(lora=4, dtype="bfloat16") if how == "lora" else {}
    if changes:
        needs_peft()
    monkeypatch.setattr(real_vlm, "reward", lambda problem, text: float(len(text) % 2))

    def command(**options):
        flags = [f"--{name}={value}" for name, value in options.items()]
        monkeypatch.setattr(sys, "argv", ["real_vlm.py", *flags])
        train_small.main("-m examples.real_vlm", real_vlm.RealConfig, real_vlm.begin)
        rows = [json.loads(line) for line in open(out / "metrics.jsonl")]
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    options, out = OPTIONS | changes, tmp_path / "whole"
    options |= dict(model=folder / "model", dataset=folder / "data", lr=1e-2, critic_lr=1e-2, head_lr=1e-2)
    whole = command(**options, out=out, save=True)
    assert whole[1]["first_ratio_deviation"] < (0.05 if changes else 1e-5) and whole[2]["kl_to_start"] != 0
    assert "answers are judged by" in capsys.readouterr().out and (out / "critic.pt").exists()
    name = "adapter_model.safetensors" if changes else "model.safetensors"
    assert list((out / "model").rglob(name))
    out = tmp_path / "parts"
    command(**options | dict(iterations=1), out=out)
    assert command(resume=out, iterations=2)[:2] == whole[:2]  # the rate falls otherwise: the second differs
    assert json.loads((out / "run.json").read_text())["config"]["lora"] == options.get("lora", 0)


def test_settings_follow_the_paper(folder, capsys):
    for lora, rates in ((0, (1e-6, 2e-6, 2e-6)), (4, (1e-5, 1e-5, 1e-5))):
        config = settings(folder, lora=lora)
        assert (config.lr, config.critic_lr, config.head_lr, config.lam) == (*rates, 0.99)
    bad = {"lora is -1": dict(lora=-1), "train_vision is True": dict(lora=2, train_vision=True)}
    for said, changes in bad.items():
        with pytest.raises(ValueError, match=said):
            settings(folder, **changes)


# ------------------------------------------------------------------------------------ one base in three roles
def test_adapters_learn_and_are_saved_and_the_base_and_the_reference_stay(folder, tmp_path):
    needs_peft()
    config, policy, critic, reference, roll, scored, credit = made(folder, lora=4)
    plain = transformers.AutoModelForImageTextToText.from_pretrained(config.model, dtype=torch.float32).eval()
    before, whole = weights(policy.whole), [policy.whole, critic.backbone.whole, reference.whole]
    assert whole[0] is whole[1] is whole[2]
    for seed in range(2):
        found = step(config, policy, critic, roll, scored, credit)
        assert found["grad_norm"] > 0 and found["value_loss"] > 0
    moved = {name for name, x in weights(policy.whole).items() if not torch.equal(x, before[name])}
    for role in ("policy", "critic"):
        assert {name for name in before if f".lora_B.{role}." in name} <= moved
    assert all(".lora_" in name for name in moved)
    names = {id(p): name for name, p in policy.whole.named_parameters()}
    own = [{names[id(p)] for p in module.parameters()} for module in (policy, critic.backbone, reference)]
    assert own[0] and own[1] and not own[2] and not own[0] & own[1]
    assert all(".policy." in name for name in own[0]) and all(".critic." in name for name in own[1])
    critic.backbone.put_on()
    policy.save_pretrained(tmp_path)
    saved = load_file(next(tmp_path.rglob("adapter_model.safetensors")))
    trained = {k.replace(".policy", ""): x for k, x in weights(policy.whole).items() if ".policy" in k}
    assert saved and all(x.equal(trained[k.removeprefix("base_model.model.")]) for k, x in saved.items())
    inputs = pixels(config, roll)
    ours, theirs = (train_small.score(m, inputs, roll.ids, roll.mask)[0] for m in (reference, plain))
    assert torch.equal(ours, theirs)
    assert not torch.equal(train_small.score(policy, inputs, roll.ids, roll.mask)[0], theirs)


def test_a_backward_pass_after_the_switch_is_an_error(folder):
    needs_peft()
    config, policy, critic, _, roll, *_ = made(folder, lora=4)
    inputs = train_small.take(roll.inputs, roll.prompts, roll.image_ids)
    log_probs, _ = train_small.score(policy, inputs, roll.ids, roll.mask)
    train_small.value(critic, inputs, roll.ids, roll.mask)
    with pytest.raises(RuntimeError, match="adapter policy is off: expected backward before"):
        log_probs.sum().backward()


def test_the_vision_tower_is_frozen_and_shared_unless_asked(folder):
    config, policy, critic, reference, *_ = made(folder)
    towers = [m.whole.get_encoder("image") for m in (policy, critic.backbone, reference)]
    shared = {p.data_ptr() for tower in towers for p in tower.parameters()}
    assert len(shared) == len([*towers[0].parameters()])
    trained = {id(p) for p in policy.parameters()}
    assert trained and not trained & {id(p) for p in towers[0].parameters()}
    assert not trained & {id(p) for p in [*critic.parameters(), *reference.whole.parameters()]}
    config, policy, *_ = made(folder, train_vision=True)
    tower = policy.whole.get_encoder("image")
    assert {id(p) for p in tower.parameters()} < {id(p) for p in policy.parameters()}


@pytest.mark.parametrize("lora", [0, 4])
def test_checkpointing_changes_no_gradient_and_no_sample(folder, lora):
    if lora:
        needs_peft()
    found = []
    for checkpointing in (False, True):
        config, policy, critic, _, roll, scored, credit = made(folder, lora=lora, checkpointing=checkpointing)
        calls = []
        for module in [*policy.whole.modules(), *critic.backbone.whole.modules()]:
            module.attention_dropout = 0.5  # in training mode
        for layer in policy.layers:
            layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        assert step(config, policy, critic, roll, scored, credit)["first_ratio_deviation"] < 1e-5
        found.append((roll.ids, weights(policy), weights(critic), len(calls)))
    (ids, ours, values, once), (same, other, others, twice) = found
    assert torch.equal(ids, same) and twice > 1.4 * once  # it is on: layers run again in the backward pass
    for a, b in ((ours, other), (values, others)):
        assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)


def test_bfloat16_is_within_its_rounding(folder):
    config, policy, critic, *_, roll, scored, _ = made(folder)
    half = replace(config, dtype="bfloat16")
    model = transformers.AutoModelForImageTextToText.from_pretrained(config.model, dtype=torch.float32).eval()
    other, judge, _ = models.make_roles(half, model)
    judge.head = copy.deepcopy(critic.head)
    inputs = pixels(config, roll)
    log_probs, _ = train_small.score(other, inputs, roll.ids, roll.mask)
    values = train_small.value(judge, inputs, roll.ids, roll.mask)
    assert log_probs.dtype == values.dtype == torch.float32 == next(other.parameters()).dtype
    for ours, exact in ((log_probs, scored.log_probs), (values, scored.values)):
        error = (ours - exact)[roll.mask].abs() / exact[roll.mask].abs().clamp(min=1)
        assert 0 < error.mean() < 0.06 and error.max() < 0.5  # 8 bits, 1 in 256, through two wide layers
    assert models.base_dtype(half) == torch.float32  # AdamW would lose a step of 1e-6 in a trained one
    weight = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=1e-6, weight_decay=0.0).step()
    assert torch.equal(weight, torch.ones_like(weight))


# -------------------------------------------------------------------------------------------------- the judge
RIGHT = [  # answer, response
    ("48", "<answer>48.0</answer>"), ("48", r"so \boxed{48}"), (r"2\sqrt{221}", r"\boxed{2 \sqrt { 221 }}"),
    ("7", r"\boxed{6} no, \boxed{7}"), ("5", r"\boxed{4} <answer> 5 </answer>"), ("B", "<answer>B</answer>"),
    ("3", r"<answer>\boxed{3}</answer>"), ("12", "<answer>$12$.</answer>"), ("a", "<answer>A</answer>"),
    (r"\frac{1}{2}", r"\boxed{\frac{1}{2}}"), ("30", r"<answer>30^\circ</answer>")]
WRONG = [("48", "48"), ("48", "<answer>47</answer>"), ("48", r"\boxed{48"), ("48", ""), ("1", "\0\ud800"),
         ("7", r"\boxed{7} <answer> 8 </answer>"), ("48", "<answer>" + "4" * 10**6 + "</answer>"),
         ("48", "<answer></answer>"),
         ("48", r"\boxed{" * 10**5), ("48", "<answer>" * 10**5), ("5", r"<answer>\frac{</answer>"),
         ("5", "<answer>5 6</answer>"), ("48", "<answer>9^{9^{9^{9}}}</answer>")]


@pytest.mark.parametrize("library", [True, False])
def test_answers_are_judged(monkeypatch, library):
    if not library:
        monkeypatch.setattr(judge, "math_verify", None)
    elif judge.math_verify is None:
        pytest.skip("math-verify is not installed")
    for table, expected in ((RIGHT, 0.9), (WRONG, 0.0)):
        for answer, response in table:
            problem = train_small.Problem(None, "?", answer)
            found = real_vlm.reward(problem, response)  # a tag in place earns a sixth of 0.1
            assert expected <= found < expected + 0.04, (answer, response[:60])
    assert judge.same("x + 1", "1 + x") == library  # it knows algebra


@pytest.mark.parametrize("text, sixths", [
    ("<perception>a</perception> <think>b</think> <answer>5</answer>", 6), ("5", 0),
    ("<answer>5</answer>", 2), ("<perception>a</perception> <answer>5", 3),
    ("</think> b <think> <answer>5</answer>", 3),
    ("<answer>5</answer> <think> b </think>", 2), ("<think> <think> b </think> <answer>5</answer>", 3)])
def test_the_format_earns_a_share_for_each_tag_that_stands_once_and_in_order(text, sixths):
    reward = lambda answer: real_vlm.reward(train_small.Problem(None, "?", answer), text)
    assert reward("4") == pytest.approx(0.1 * sixths / 6)
    assert reward("5") == pytest.approx(0.1 * sixths / 6 + 0.9 * ("</answer>" in text))


# ---------------------------------------------------------------------------------------- the memory estimate
@pytest.mark.parametrize("changes", [
    dict(), dict(algo="grpo", kl_coef=0.0, responses=16), dict(lora=4, dtype="bfloat16"),
    dict(train_vision=True), dict(train_vision=True, checkpointing=False)])
def test_the_memory_estimate_counts_what_is_there(folder, changes, capsys):
    if changes.get("lora"):
        needs_peft()
    config = settings(folder, **changes)
    rows = real_vlm.estimate_memory(config)
    policy, _, critic, reference = train_small.load(config)
    optimizers = train_small.make_optimizers(config, policy, critic)
    for model, optimizer in optimizers:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    size = lambda tensors: sum({x.data_ptr(): x.nbytes for x in tensors}.values())
    roles = [policy, critic and critic.backbone, reference]
    everything = [p for role in roles if role for p in getattr(role, "whole", role).parameters()]
    everything += critic.head.parameters() if critic else []
    assert rows["weights"] + rows["reference"] + rows["critic's weights"] == size(everything)
    assert rows["gradients"] == size(p.grad for m, _ in optimizers for p in m.parameters())
    states = [x for _, o in optimizers for s in o.state.values() for k, x in s.items() if k != "step"]
    assert rows["AdamW"] == size(states)
    cache = transformers.DynamicCache(config=policy.config.get_text_config())
    L, text = config.prompt_tokens + config.max_tokens, policy.config.get_text_config()
    heads = torch.zeros(config.responses, text.num_key_value_heads, L, text.head_dim, dtype=torch.bfloat16
                        if config.dtype == "bfloat16" else torch.float32)
    for layer in range(text.num_hidden_layers):
        cache.update(heads, heads, layer)
    features = config.responses * config.prompt_tokens * text.hidden_size * heads.itemsize
    cached = sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
    assert rows["sampling: KV cache, inputs"] == cached + features
    least = real_vlm.estimate_memory(replace(config, micro_tokens=1, max_tokens=2, prompt_tokens=1))
    copied = max(sum(p.nbytes for p in m.parameters()) for m, _ in optimizers)  # in AdamW's step
    assert [*least.values()][-1] >= sum([*least.values()][:5]) + copied
    real_vlm.print_memory(config)
    assert "fits the" in capsys.readouterr().out


SMOLVLM = FAMILIES["smolvlm"]._replace(  # SmolVLM-256M's shape
    images=("SmolVLM", dict(size=dict(longest_edge=2048), max_image_size=dict(longest_edge=512))),
    config=dict(
        text_config=dict(model_type="llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                         num_attention_heads=9, num_key_value_heads=3, head_dim=64),
        vision_config=dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                           num_attention_heads=12, image_size=512, patch_size=16),
        scale_factor=4),
    settings=dict(image_seq_len=64))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_the_memory_estimate_is_what_a_gpu_needs(tmp_path, monkeypatch):
    """Steps of a model of true size with random weights, 1,300 + 1,024 tokens, two at a time."""
    for needed in ("torchvision", "num2words"):  # by its processor
        pytest.importorskip(needed)
    make_model(SMOLVLM, tmp_path / "model", vocab_size=49280)
    options = dict(model=str(tmp_path / "model"), out=str(tmp_path / "run"), device="cuda", responses=2,
                   mini_batches=1, critic_warmup=0, checkpointing=True)
    config = train_small.complete(real_vlm.RealConfig(**options))
    drawn = [replace(p, image=p.image.resize((512, 512))) for p in many_sizes(4)]
    task = train_small.Task(iter(drawn), [], real_vlm.INSTRUCTION, None)
    monkeypatch.setattr(train_small.Rollout, "outcome", lambda roll: torch.rand(2, device="cuda"))
    run = train_small.prepare(config, lambda _: task)
    run.policy.generation_config.eos_token_id = [1]
    for i in (1, 2):  # AdamW's state is there from the second on
        roll, _, _, found = train_small.step(run, i)
    assert found["first_ratio_deviation"] < 1e-4 and found["grad_norm"] > 0 and roll.ids.shape[1] == 1024
    rows = real_vlm.estimate_memory(replace(config, prompt_tokens=roll.inputs["input_ids"].shape[1]))
    assert 0.7 < torch.cuda.max_memory_allocated() / rows["total, at the worst moment"] < 1
