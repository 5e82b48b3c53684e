"""examples/real_vlm.py on a tiny LLaVA: one base in three roles, bfloat16, the reward, the memory."""

import copy
import itertools
import json
from dataclasses import replace
from functools import partial

import datasets
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from test_models import FAMILIES, make_model, many_sizes
from test_train_small import SMALL, iteration, logged, needs_gpu, small, updated
from transformers.integrations.peft import MIN_PEFT_VERSION

import train_small
from examples import real_vlm
from support import curves, models
from support.inputs import encode

pytestmark = pytest.mark.usefixtures("cache")
OPTIONS = SMALL | dict(responses=8, max_tokens=10, micro_tokens=64)
# transformers can ask for a peft that is not released yet.
needs_peft = partial(pytest.importorskip, "peft", minversion=MIN_PEFT_VERSION)


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


def settings(folder, **changes):
    options = OPTIONS | dict(dataset=str(folder / "data")) | changes
    return small(folder / "model", real_vlm.RealConfig, **options)


# ------------------------------------------------------------------------------------------------ the command
@pytest.mark.parametrize("changes", [{}, dict(lora=4, dtype="bfloat16")], ids=["all weights", "lora"])
def test_trains_saves_and_goes_on(folder, tmp_path, monkeypatch, command, coin, capsys, changes):
    if changes:
        needs_peft()
    learn, done = train_small.learn, []

    def noted(run):
        done.append((run, *learn(run)))
        return done[-1][1:]

    monkeypatch.setattr(train_small, "learn", noted)
    command = partial(command, how=("-m examples.real_vlm", real_vlm.RealConfig, real_vlm.begin))
    options, out, parts = OPTIONS | changes, tmp_path / "whole", tmp_path / "parts"
    options |= dict(model=folder / "model", dataset=folder / "data", lr=1e-2, critic_lr=1e-2, head_lr=1e-2)
    assert command(**options, out=out, save=True) == 0
    whole, shown = logged(out), capsys.readouterr().out
    assert whole[1]["first_ratio_deviation"] < (0.05 if changes else 1e-5) and whole[2]["kl_to_start"] != 0
    assert "answers are judged by" in shown and "accuracy_greedy" in shown and "results.page" not in shown
    assert len(whole) == 3 and "faithful" not in whole[2] and Image.open(out / "curves.png").format == "PNG"
    name = "adapter_model.safetensors" if changes else "model.safetensors"
    assert list((out / "model").rglob(name))
    (config, task, policy, processor, critic, *_), _, texts = done[0]
    saved = torch.load(out / "critic.pt")
    assert saved and all(torch.equal(x, critic.state_dict()[k]) for k, x in saved.items())
    if not changes:  # of adapters below
        model = transformers.AutoModelForImageTextToText.from_pretrained(out / "model").eval()
        both = processor, transformers.AutoProcessor.from_pretrained(out / "model")
        two = [p.image for p in task.held_out[:2]], [p.question for p in task.held_out[:2]]
        inputs, same = (encode(x, real_vlm.INSTRUCTION, *two, "cpu") for x in both)
        assert torch.equal(model(**same).logits, policy(**inputs).logits)

    monkeypatch.setattr(curves, "plot", print)  # it takes a second
    run = real_vlm.begin(replace(config, out=str(parts)))
    learn(run, stop=(parts / "checkpoint-00001.pt").exists)
    assert logged(parts) == whole[:2] and texts[0] != texts[1]
    for _ in range(2):  # from the middle, then from the end
        assert command(resume=parts) == 0 and logged(parts) == whole and done[-1][2] == texts
    assert json.loads((parts / "run.json").read_text())["config"]["lora"] == options.get("lora", 0)


# ------------------------------------------------------------------------------------ one base in three roles
def test_adapters_learn_and_are_saved_and_the_base_and_the_reference_stay(folder, tmp_path):
    needs_peft()
    s = iteration(settings(folder, lora=4))
    policy, critic, reference, roll = s.policy, s.critic, s.reference, s.roll
    plain, _ = models.load_policy(s.config.model, "cpu")
    named = dict(policy.whole.named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    assert policy.whole is critic.backbone.whole is reference.whole
    for _ in range(2):
        found, *_ = updated(s, in_place=True)
        assert found["grad_norm"] > 0 and found["value_loss"] > 0
    moved = {name for name, p in named.items() if not torch.equal(p, before[name])}
    for role in ("policy", "critic"):
        assert {name for name in before if f".lora_B.{role}." in name} <= moved
    assert all(".lora_" in name for name in moved)
    names = {id(p): name for name, p in named.items()}
    own = [{names[id(p)] for p in module.parameters()} for module in (policy, critic.backbone, reference)]
    assert own[0] and own[1] and not own[2] and not own[0] & own[1]
    assert all(".policy." in name for name in own[0]) and all(".critic." in name for name in own[1])
    critic.backbone.put_on()
    policy.save_pretrained(tmp_path)
    saved = load_file(next(tmp_path.rglob("adapter_model.safetensors")))
    trained = {name.replace(".policy", ""): p for name, p in named.items() if ".policy" in name}
    assert saved and all(x.equal(trained[k.removeprefix("base_model.model.")]) for k, x in saved.items())
    inputs = train_small.see(plain, s.processor, s.task, s.problems)
    ours, theirs = (train_small.score(m, inputs, roll.ids, roll.mask)[0] for m in (reference, plain))
    assert torch.equal(ours, theirs)
    log_probs, _ = train_small.score(policy, inputs, roll.ids, roll.mask)
    assert not torch.equal(log_probs, theirs)
    train_small.value(critic, inputs, roll.ids, roll.mask)
    with pytest.raises(RuntimeError, match="adapter policy is off: expected backward before"):
        log_probs.sum().backward()


def test_the_vision_tower_is_frozen_and_shared_unless_asked(folder):
    policy, _, critic, reference = train_small.load(settings(folder))
    towers = [m.whole.get_encoder("image") for m in (policy, critic.backbone, reference)]
    shared = {p.data_ptr() for tower in towers for p in tower.parameters()}
    assert len(shared) == len([*towers[0].parameters()])
    trained = {id(p) for p in policy.parameters()}
    assert trained and not trained & {id(p) for p in towers[0].parameters()}
    assert not trained & {id(p) for p in [*critic.parameters(), *reference.whole.parameters()]}
    policy, *_ = train_small.load(settings(folder, train_vision=True))
    tower = policy.whole.get_encoder("image")
    assert {id(p) for p in tower.parameters()} < {id(p) for p in policy.parameters()}


@pytest.mark.parametrize("lora", [0, 4])
def test_checkpointing_changes_no_gradient_and_no_sample(folder, lora):
    if lora:
        needs_peft()
    found = []
    for checkpointing in (False, True):
        s, calls = iteration(settings(folder, lora=lora, checkpointing=checkpointing)), []
        for module in [*s.policy.whole.modules(), *s.critic.backbone.whole.modules()]:
            module.attention_dropout = 0.5  # in training mode
        for layer in s.policy.layers:
            layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        metrics, *changes = updated(s, in_place=True)
        assert metrics["first_ratio_deviation"] < 1e-5
        found.append((s.roll.ids, changes, len(calls)))
    (ids, ours, once), (same, theirs, twice) = found
    assert torch.equal(ids, same) and twice > 1.4 * once  # it is on: layers run again in the backward pass
    for a, b in zip(ours, theirs):
        assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)


def test_bfloat16_is_within_its_rounding(folder):
    s = iteration(settings(folder))
    half, roll, scored = replace(s.config, dtype="bfloat16"), s.roll, s.scored
    other, _, judge, _ = train_small.load(half)
    judge.head = copy.deepcopy(s.critic.head)
    inputs = train_small.see(other, s.processor, s.task, s.problems)
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


# ------------------------------------------------------------------------------------------------- the reward
@pytest.mark.parametrize("text, right, sixths", [
    ("<perception>a</perception> <think>b</think> <answer>5</answer>", 1, 6), ("5", 0, 0), ("", 0, 0),
    ("<answer>5</answer>", 1, 2), ("<perception>a</perception> <answer>5", 0, 3), ("<answer></answer>", 0, 2),
    ("</think> b <think> <answer>5</answer>", 1, 3), ("<answer>5</answer> <think> b </think>", 1, 2),
    ("<think> <think> b </think> <answer>5</answer>", 1, 3), ("<answer>4</answer>", 0, 2),
    (r"so \boxed{5}", 1, 0), (r"\boxed{6} no, \boxed{5}", 1, 0), (r"\boxed{\frac{10}{2}}", 1, 0),
    (r"\boxed{4} <answer> 5 </answer>", 1, 2), (r"\boxed{5} <answer> 8 </answer>", 0, 2),
    (r"<answer>\boxed{5}</answer>", 1, 2), ("<answer>$5.0$.</answer>", 1, 2), (r"\boxed{5", 0, 0),
    (r"<answer>\frac{</answer>", 0, 2), ("<answer>5 6</answer>", 0, 2), ("\0\ud800", 0, 0),
    ("<answer>9^{9^{9^{9}}}</answer>", 0, 2), ("<answer>" + "5" * 10**6 + "</answer>", 0, 2),
    (r"\boxed{" * 10**5, 0, 0), ("<answer>" * 10**5, 0, 0)])
def test_a_right_answer_is_rewarded_and_each_tag_that_stands_once_and_in_order(text, right, sixths):
    reward = real_vlm.reward(train_small.Problem(None, "?", "5"), text)
    assert reward == pytest.approx(0.9 * right + 0.1 * sixths / 6)


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


@needs_gpu
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
