"""tiny_vlm/: the tokenizer, the labels of its auxiliary head, and a miniature made from scratch."""

import itertools
import random
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_train_small import small

import toy_env
import train_small
from tiny_vlm import make
from tiny_vlm.teacher import demonstration


@pytest.mark.parametrize("kinds", [["none"], [*toy_env.OPENED]], ids=["plain", "wordy"])
def test_tokenizer_round_trips_all_there_is_to_say(kinds):
    tokenizer, rng = make.make_processor(wordy=len(kinds) > 1).tokenizer, random.Random(0)
    for operands, seed in itertools.product(range(2, 9), range(24)):
        level = dict(operands=operands, operators=("+-", "+-×")[seed % 2], high=(9, 99)[seed // 2 % 2],
                     openings=kinds[seed % len(kinds)])
        problem = toy_env.make_problem(seed, **level)
        for text in demonstration(problem, rng, **dict.fromkeys(make.TEACHER, 0.3)), problem.question:
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids) == text == "".join(map(tokenizer.decode, ids))
            assert tokenizer.unk_token_id not in ids


def test_labels_say_whether_all_statements_so_far_are_true():
    processor, faulty = make.make_processor(), 0
    model = make.make_model(processor.tokenizer, width=32, layers=1, vision_layers=1)
    problems, responses = make.draw(random.Random(0), 40, operands=3)
    ids, mask, true_so_far = make.tokenise(model, processor, problems, responses)
    lengths = mask.sum(1).tolist()
    for problem, n, tokens, labels in zip(problems, lengths, ids.tolist(), true_so_far.tolist()):
        pieces = [processor.tokenizer.decode([t], skip_special_tokens=True) for t in tokens[:n]]
        false = [s.end for s in toy_env.statements(problem, "".join(pieces)) if not s.true]
        ends = itertools.accumulate(map(len, pieces))
        assert labels[:n] == [all(end < f for f in false) for end in ends]
        assert tokens[n - 1] == processor.tokenizer.eos_token_id
        faulty += bool(false)
    assert len(problems) == 40 and 0 < faulty < 40


@pytest.fixture
def brief(monkeypatch):
    """Small batches, a tenth of the demonstrations to judge by, and a card of responses that are cut off."""
    sample = train_small.rollout
    monkeypatch.setattr(make, "pretrain", partial(make.pretrain, size=16))
    monkeypatch.setattr(make, "pretrain_vision", partial(make.pretrain_vision, size=8))
    monkeypatch.setattr(make, "truth_auroc", partial(make.truth_auroc, batches=1))
    monkeypatch.setattr(train_small, "rollout", lambda *args, **mode: sample(*args[:4], 4, *args[5:], **mode))
    return partial(make.make_model, width=32, layers=1, vision_layers=1)


def loaded(folder):
    """The policy and the processor of a model, and its card."""
    policy, processor, *_ = train_small.load(small(folder, algo="grpo"))
    return policy, processor, (folder / "README.md").read_text(encoding="utf-8")


def test_make_writes_a_model_that_loads_and_its_card(tmp_path, monkeypatch, brief):
    monkeypatch.setattr(make, "make_model", brief)
    options = "--steps 10 --lr 0.01 --vision-steps 2 --card-problems 2 --device cpu"
    make.main(f"--out {tmp_path} {options}".split())
    policy, processor, card = loaded(tmp_path)
    problems, responses = make.draw(random.Random(1), 32, operands=3)
    ids, mask, _ = make.tokenise(policy, processor, problems, responses)
    inputs = train_small.see(policy, processor, make.TASK, problems)
    with torch.no_grad():
        imitation = -train_small.score(policy, inputs, ids, mask.bool())[0][mask == 1].mean()
    assert imitation < 3.9  # 4.2 before; it predicts the token that comes next
    assert f"{policy.num_parameters():,} parameters" in card and "--steps 10" in card
    assert not re.search(r"{\w*}", card)
    assert len(re.findall(r"^\| [2-8] \| (?:greedy|T = 1) \|(?: [01]\.\d{3} \|){6}$", card, re.M)) == 14


def test_a_model_that_goes_on_learns_new_words(tmp_path, monkeypatch, brief):
    monkeypatch.setattr(make, "pretrain_vision", None)  # it sees already
    base = brief(make.make_processor().tokenizer)
    base.save_pretrained(tmp_path / "base")
    drawn, draw = [], make.draw
    keep = lambda *args, **teacher: drawn.append(teacher) or draw(*args, **teacher)
    monkeypatch.setattr(make, "draw", keep)
    options = "--steps 2 --lr 1e-9 --openings none many --guess 0.5 --card-problems 2 --device cpu"
    make.main(f"--base {tmp_path / 'base'} --out {tmp_path / 'more'} {options}".split())
    assert all(teacher == dict(openings=["none", "many"], guess=0.5) for teacher in drawn) and len(drawn) > 2
    policy, processor, card = loaded(tmp_path / "more")
    old, new = (m.get_input_embeddings().weight for m in (base, policy))
    more = len(processor.tokenizer) - len(old)
    assert more == 16 and len(new) == len(old) + more == len(policy.lm_head.weight)
    assert torch.allclose(new[: len(old)], old, atol=1e-6)  # an id means what it meant
    assert all(x in card for x in ("guess 0.5", "--openings none many", "words (openings): none, many"))
    assert len(re.findall(r"^\| [2-8], openings: (?:none|many) \| (?:greedy|T = 1) \|", card, re.M)) == 28


def test_shipped_model_has_as_many_parameters_as_the_texts_say():
    with safe_open(Path(make.__file__).parent / "model.safetensors", "pt") as file:
        n = sum(file.get_tensor(name).numel() for name in file.keys())
    assert f"of {n / 1e6:.1f} million parameters" in " ".join(make.__doc__.split())
    assert f"{n:,} parameters" in Path(make.__file__).with_name("README.md").read_text(encoding="utf-8")
