"""examples/warm_start.py, tiny_vlm/imitation.py on tiny families: the loss, what is trained and saved."""

import itertools
import math
import random
import signal
from dataclasses import replace

import pytest
import torch
import transformers
from test_models import make_family, small

import toy_env
import train_small
from examples import warm_start
from support import inputs, models
from tiny_vlm import imitation, teacher


def begin(at, options, name="idefics3"):
    make_family(name, at / "base")
    transformers.GenerationConfig(eos_token_id=[1], pad_token_id=0).save_pretrained(at / "base")
    warm_start.main(f"--model {at}/base --out {at}/new/warm --steps 3 --batch 4 --micro-batch 3 --lr 3e-3 "
                    f"--operands 2 --max-tokens 150 --eval-problems 3 --device cpu {options}".split())


@pytest.mark.parametrize("name, more", [
    ("idefics3", ""), ("qwen2_vl", "--train-vision"), ("gemma3", "--truth 1")])
def test_it_lowers_the_loss_and_saves_what_train_small_trains(name, more, tmp_path, capsys, monkeypatch):
    out, evaluate = tmp_path / "new" / "warm", train_small.evaluate
    monkeypatch.setattr(train_small, "evaluate", lambda c, *rest: evaluate(replace(c, max_tokens=3), *rest))
    begin(tmp_path, more, name)
    before, after = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[:2])
    assert f"loss {before:.3f} before, {after:.3f}" in (out / "README.md").read_text() and after < before - 1
    towers = [models.load_policy(str(x), "cpu")[0].get_encoder("image") for x in (tmp_path / "base", out)]
    assert any((p != q).any() for p, q in zip(*(x.parameters() for x in towers))) == ("vision" in more)
    config = small(out, algo="grpo", eval_problems=2, max_tokens=5, out=str(tmp_path / "run"))
    history, _ = train_small.learn(train_small.prepare(config))
    assert [row["reward"] for row in history[1:]] == [0, 0] and history[1]["first_ratio_deviation"] < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "idefics3", "gemma3"])  # three ways to write a space
def test_losses_are_those_of_a_loop_over_responses_and_tokens(name, tmp_path):
    make_family(name, tmp_path)
    (model, processor), head, rows = models.load_policy(str(tmp_path), "cpu"), torch.nn.Linear(64, 1), []
    model.generation_config.eos_token_id, rng = [1, 0], random.Random(0)
    task = train_small.toy_task(small(tmp_path, eval_problems=8))
    texts = [teacher.demonstration(p, rng, **imitation.TEACHER) for p in task.held_out]
    parts = [part for part, _ in imitation.losses(model, head, processor, task, task.held_out, texts, 5)]
    for problem, text in zip(task.held_out, texts):
        ids = torch.tensor([[*processor.tokenizer(text, add_special_tokens=False)["input_ids"], 1]])
        [pieces], _ = train_small.read_tokens(processor.tokenizer, ids, ids > -1)
        ends = [*itertools.accumulate(map(len, pieces[:-1])), len(text) + 1]
        false = min((s.end for s in toy_env.statements(problem, text) if not s.true), default=math.inf)
        prompt = inputs.take(inputs.see(model, processor, task, [problem]), torch.arange(1))
        hidden = model.model(**inputs.full_inputs(prompt, ids, ids > -1)).last_hidden_state[0, ~len(ends):]
        for before, after, i, end in zip(hidden, hidden[1:], ids[0], ends):
            true = torch.sigmoid(head(after)[0] if end < false else -head(after)[0])
            rows.append([-model.lm_head(before).log_softmax(0)[i], -true.log(), end < false])
    *expected, share = torch.tensor(rows).mean(0)
    assert len(parts) == 2 and 0.3 < share < 0.9 and pieces[-1] == "" and "".join(pieces) == text
    assert torch.allclose(sum(parts), torch.tensor(expected), rtol=1e-4)


@pytest.mark.parametrize("steps, minutes", [(30, math.inf), (1000, 1)])  # a step takes two seconds
def test_rates_fall_over_the_last_third_of_steps_or_minutes(steps, minutes, mini, monkeypatch):
    model, head, rates = models.load_policy(str(mini), "cpu")[0], torch.nn.Linear(32, 1), []
    monkeypatch.setattr(imitation.time, "time", lambda: 2.0 * len(rates))
    monkeypatch.setattr(imitation, "losses", lambda *_: [(head(torch.ones(32)).expand(2) / 1000, None)])
    keep = lambda optimizer: rates.append([x["lr"] for x in optimizer.param_groups] + [float(head.bias.grad)])
    monkeypatch.setattr(torch.optim.AdamW, "step", keep)
    assert imitation.imitate(model, head, None, None, lambda _: (), steps, 1.0, 10.0, 2.0, 8, minutes) == 30
    expected = [0.01, *(i / 6 for i in range(1, 6)), *[1.0] * 14, *(1 - i / 10 for i in range(10))]
    assert torch.allclose(torch.tensor(rates), torch.tensor([[x, 10 * x, 0.003] for x in expected]))


@pytest.mark.parametrize("options, said", {
    "--minutes nan": "minutes is nan: expected a number", "--out support": "out is 'support': expected a new",
    "--operands 9": "operands is 9: expected 2 to 8", "--max-tokens 20": "or more, to say '<perception>",
    "--projector-lr 1e-3": "projector_lr is 0.001: expected none", "--seed 1": "of step 1 is not finite: try",
    "--seed 2": "stopped", "--colour": "--colour", "--model nowhere": "model is 'nowhere': expected"}.items())
def test_what_is_wrong_is_one_line_and_saves_nothing(options, said, tmp_path, capsys, monkeypatch):
    norm = lambda *_: torch.tensor(math.nan) if options == "--seed 1" else signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", norm)
    with pytest.raises(SystemExit):
        begin(tmp_path, options, "qwen2_vl" if "projector" in options else "idefics3")
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("-m examples.warm_start: ") and said in error and not [*tmp_path.glob("new/*")]
