"""examples/trl_*.py inside TRL's own trainer, three steps on tiny_vlm, and the losses of sapo.py and srpo.py
against TRL's own on the same tensors. Written for TRL 1.16.0; skipped where TRL is missing.
"""

import copy
import math
import re

import pytest
import torch
import transformers

import sapo
import srpo
import toy_env

trl = pytest.importorskip("trl", reason="TRL is missing: pip install trl==1.16.0")

from examples import trl_sapo_segments, trl_srpo  # noqa: E402: they import TRL

# Two batches in three steps, so the second step is off-policy; 4 prompts × 4 responses.
SMALL = dict(iterations=1, max_steps=3, steps_per_generation=2, per_device_train_batch_size=8,
             num_generations=4, max_completion_length=46, use_cpu=True, logging_steps=1, disable_tqdm=True)
RAGGED = torch.arange(9) < torch.tensor([[9], [1], [6], [4], [2], [8], [3], [5]])  # a mask, (B, T)


def train(trainer_class, **settings):
    """A trainer after three steps, its batches (before TRL shuffles them) with their rows, and its logs."""
    seen = []

    class Recorded(trainer_class):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            seen.append((inputs, dict(batch)))
            return batch

    trainer = trl_srpo.run(Recorded, **SMALL | settings)
    assert trainer.state.global_step == 3 and len(seen) >= 2
    return trainer, seen, trainer.state.log_history[:3]


@pytest.fixture(scope="module")
def srpo_run():
    return train(trl_srpo.SRPOTrainer, beta=0.01)


@pytest.fixture(scope="module")
def segments_run():
    return train(trl_sapo_segments.SegmentTrainer)


@pytest.fixture(scope="module")
def alone():
    """log_probs (T, V) of one response, of the model as shipped, without padding and without TRL."""
    processor = transformers.AutoProcessor.from_pretrained(trl_srpo.MODEL)
    model = transformers.AutoModelForImageTextToText.from_pretrained(trl_srpo.MODEL).eval()

    @torch.no_grad()
    def score(image, question, ids):
        inputs = processor(images=image, text="<image>" + question, return_tensors="pt")
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids[None]], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return model(**inputs).logits[0, -len(ids) - 1:-1].log_softmax(-1)

    return processor.tokenizer, score


def responses(rows, batch):
    """Row, tokens and place of each response of the first batch, which the shipped model sampled."""
    for i, (row, ids, mask) in enumerate(zip(rows, batch["completion_ids"], batch["completion_mask"])):
        yield row, ids[mask.bool()], (i, slice(int(mask.sum())))


# ------------------------------------------------------------------------------------------------------- SRPO
def test_srpo_weighs_tokens_as_a_plain_loop_does(srpo_run, alone):
    (_, [(rows, batch), *_], logs), (tokenizer, score) = srpo_run, alone
    advantages = batch["advantages"]
    assert advantages.shape == batch["completion_ids"].shape
    for i, (row, ids, place) in enumerate(responses(rows, batch)):
        words = [tokenizer.decode([token]).strip() for token in ids.tolist()]
        own = lambda image, ids_seen: score(image, row["question"], ids_seen).gather(1, ids[:, None])[:, 0]
        weights = [1.0] * len(ids)
        if toy_env.parse(tokenizer.decode(ids, skip_special_tokens=True)):
            open_, close, think, end = (words.index(tag) for tag in toy_env.TAGS[:4])
            looks, thinks = range(open_ + 1, close), range(think + 1, end)
            corrupted = srpo.corrupt_image(row["image"], patch=16, seed=i)
            lost = own(row["image"], ids) - own(corrupted, ids)
            drop = {t: sign * lost[t].clamp(-5, 5).item()
                    for role, sign in ((looks, 1), (thinks, -1)) for t in role}
            mean = sum(drop.values()) / len(drop)
            raw = {t: min(max(math.exp(s - mean), 0.5), 1.5) for t, s in drop.items()}
            for t in raw:
                weights[t] = raw[t] * len(raw) / sum(raw.values())
        assert advantages[place] == pytest.approx(advantages[place][-1] * torch.tensor(weights), abs=2e-4)
    assert (advantages.abs().amax(1) > 0).any()
    assert logs[0]["weight/perception"] > 1 > logs[0]["weight/reasoning"] > 0


def test_srpo_groups_are_trls_but_for_the_tiny_number(srpo_run):
    trainer, [(rows, batch), *_], _ = srpo_run
    texts = trainer._tokenizer.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    right = torch.tensor([float(toy_env.stated_answer(x) == row["answer"]) for x, row in zip(texts, rows)])
    groups = right.reshape(-1, 4)
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    found = batch["advantages"].gather(1, batch["completion_mask"].sum(1, keepdim=True) - 1)[:, 0]  # weight 1
    torch.testing.assert_close(found, expected.flatten(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found, srpo.group_advantages(right, 4), atol=4e-4, rtol=0)
    assert found.unique().numel() > 2


def test_srpo_with_weights_1_trains_as_trl_does_to_the_bit():
    """TRL's advantages (B,) and ours (B, T) of alpha 0, seeds and all: the same model after three steps."""

    class Flat(trl_srpo.SRPOTrainer):
        alpha = 0.0

    ours, theirs = (train(kind, beta=0.01)[0].model for kind in (Flat, trl.GRPOTrainer))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_srpo_corrupts_what_the_model_sees_anew_in_each_step(srpo_run, monkeypatch):
    trainer, [(rows, batch), *_], _ = srpo_run
    at_three = trainer.corrupted_pixels(rows)
    assert not torch.equal(at_three[0], at_three[1])                        # same problem, other patches
    monkeypatch.setattr(trainer.state, "global_step", 0)
    assert not torch.equal(at_three, trainer.corrupted_pixels(rows))
    monkeypatch.setattr(trainer, "corruption", dict(share=0.0))
    assert torch.equal(trainer.corrupted_pixels(rows), batch["pixel_values"])
    lists = [{"images": [row["image"]], "prompt": row["prompt"]} for row in rows]
    assert torch.equal(trainer.corrupted_pixels(lists), batch["pixel_values"])


def test_srpo_weighs_the_same_where_tags_are_special_tokens_or_trl_scores_no_responses(srpo_run, monkeypatch):
    """Some tokenizers have <think> as one. End of sequence and padding are left out nevertheless."""
    trainer, [(rows, batch), *_], _ = srpo_run
    aligned = {name: x for name, x in batch.items() if name != "old_per_token_logps"}
    scored = {"old_per_token_logps": trainer.log_probs(batch, batch["completion_ids"]).detach()}
    assert torch.equal(trainer.role_weights(rows, aligned), trainer.role_weights(rows, aligned | scored))
    tokenizer = copy.deepcopy(trainer._tokenizer)
    tags = [token for token in tokenizer.get_vocab() if token.strip() in toy_env.TAGS]
    tokenizer.add_special_tokens({"additional_special_tokens": tags})
    assert {*tokenizer.convert_tokens_to_ids(tags)} <= {*tokenizer.all_special_ids}
    expected = trainer.role_weights(rows, batch)
    monkeypatch.setattr(trainer, "_tokenizer", tokenizer)
    assert torch.equal(trainer.role_weights(rows, batch), expected) and expected.unique().numel() > 2


# --------------------------------------------------------------------------------------------------- segments
def test_segments_end_where_the_sampling_policy_is_uncertain(segments_run, alone):
    (_, [(rows, batch), *_], logs), (_, score) = segments_run, alone
    for row, ids, place in responses(rows, batch):
        log_probs = score(row["image"], row["question"], ids)
        own, entropy = log_probs.gather(1, ids[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(1)
        torch.testing.assert_close(batch["old_per_token_logps"][place], own, atol=1e-4, rtol=0)
        ends = batch["ends"][place]
        top = ends & (torch.arange(len(ids)) < len(ids) - 1)
        count = math.ceil(0.3 * len(ids))
        assert ends[-1] and count - 1 <= top.sum() <= count
        assert entropy[top].min() >= entropy[~ends].max() - 1e-4
    assert not (batch["ends"] & ~batch["completion_mask"].bool()).any()
    first, second, third = (log["segments/max_ratio_deviation"] for log in logs)
    assert max(first, third) < 1e-5 < 1e-3 < second                         # on-, off-, on-policy again


def test_segments_have_their_own_log_probs_where_trl_skips_them():
    _, seen, logs = train(trl_sapo_segments.SegmentTrainer, steps_per_generation=1)
    assert all("old_per_token_logps" in batch for _, batch in seen)
    assert all(log["segments/max_ratio_deviation"] < 1e-5 and log["grad_norm"] > 0 for log in logs)


@pytest.mark.parametrize("name, value, needed", [("beta", 0.1, "0.0"), ("loss_type", "dapo", "'grpo'"),
                                                 ("delta", 3.0, "None")])
def test_segments_refuse_what_their_loss_leaves_out(name, value, needed):
    with pytest.raises(ValueError, match=re.escape(f"{name} is {value!r}: expected {needed}")):
        train(trl_sapo_segments.SegmentTrainer, **{name: value})


def test_segments_refuse_a_tools_answer_between_two_turns(given):
    trainer, batch, _ = given
    hole = {"tool_mask": torch.arange(9).expand(RAGGED.shape) != 2, "ends": sapo.ends_every_token(RAGGED)}
    with pytest.raises(ValueError, match="expected 1s in one run"):
        trainer.compute_loss(None, batch | hole)


# --------------------------------------------------------------------------------------------- TRL's own loss
@pytest.fixture
def given(segments_run, monkeypatch):
    """A trainer whose model says `log_probs`, a batch on which it has already moved along the advantages, so
    that some clips bind, and `log_probs`. The batch is a third of an optimizer step."""
    trainer = segments_run[0]
    torch.manual_seed(0)
    zeros = torch.zeros(RAGGED.shape)
    log_probs = -torch.rand_like(zeros).mul(3).requires_grad_()
    said = lambda *_, **__: (log_probs, zeros, None)
    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", said)
    monkeypatch.setattr(trainer, "current_gradient_accumulation_steps", 3)
    monkeypatch.setattr(trainer, "epsilon_high", 0.28)
    ids = zeros.long()
    advantages = torch.randn(len(zeros))
    noise = torch.randn(2, *zeros.shape) - advantages.sign()[:, None] / 4
    old, ref = log_probs.detach() + noise
    batch = dict(prompt_ids=ids, prompt_mask=ids, completion_ids=ids, completion_mask=RAGGED.long(),
                 advantages=advantages, old_per_token_logps=old, ref_per_token_logps=ref)
    return trainer, batch, log_probs


def assert_same(ours, theirs, log_probs):
    """Loss and gradient, to 1e-6."""
    for a, b in ((ours, theirs), (torch.autograd.grad(loss, log_probs)[0] for loss in (ours, theirs))):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("ends, level", [(sapo.ends_every_token, "token"), (sapo.ends_once, "sequence")])
def test_segments_at_their_limits_are_trls_losses(given, monkeypatch, ends, level):
    trainer, batch, log_probs = given
    ours = trainer.compute_loss(None, batch | {"ends": ends(RAGGED)})
    monkeypatch.setattr(trainer, "importance_sampling_level", level)
    theirs = trl.GRPOTrainer.compute_loss(trainer, None, batch)
    assert_same(ours, theirs, log_probs)
    metrics = trainer._metrics["train"]
    assert 0 < metrics["segments/clip_fraction"][-1] < 1
    other = {"token": "sequence", "sequence": "token"}[level]
    monkeypatch.setattr(trainer, "importance_sampling_level", other)
    assert abs(trl.GRPOTrainer.compute_loss(trainer, None, batch) - ours) > 1e-3


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_grpo_loss_is_trls(given, monkeypatch, per_token, beta):
    """With loss_type "grpo" (TRL's default: "dapo") and use_bias_correction_kl=False (TRL's default: True,
    which multiplies the KL by the ratio, as srpo.py does not)."""
    trainer, batch, log_probs = given
    if per_token:
        batch["advantages"] = srpo.srpo_advantages(batch["advantages"], 0.5 + torch.rand(RAGGED.shape))
    monkeypatch.setattr(trainer, "beta", beta)
    assert trainer.loss_type == "grpo" and not trainer.args.use_bias_correction_kl
    ours, metrics = srpo.grpo_loss(log_probs, batch["old_per_token_logps"], batch["advantages"], RAGGED,
                                   0.2, 0.28, batch["ref_per_token_logps"], beta)
    theirs = 3 * trl.GRPOTrainer.compute_loss(trainer, None, batch)
    assert_same(ours, theirs, log_probs)
    assert metrics["clip_fraction"] > 0
    monkeypatch.setattr(trainer.args, "use_bias_correction_kl", True)
    moved = abs(3 * trl.GRPOTrainer.compute_loss(trainer, None, batch) - ours)
    assert moved > 1e-3 if beta else moved < 1e-6
