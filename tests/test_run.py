"""A run that is killed, interrupted, starved or fed with nonsense is neither lost nor believed."""

import json
import math
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO, StringIO, TextIOWrapper
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import test_train_small
import torch
import transformers
from conftest import flags
from safetensors.torch import load_file, save_file
from test_train_small import logged

import sapo
import srpo
import toy_env
import train_small
from examples import real_vlm
from results import study
from support import curves, options, run_folder
from tiny_vlm.teacher import demonstration

ROOT = Path(__file__).parent.parent
SMALL = test_train_small.SMALL | dict(
    iterations=4, responses=8, critic_warmup=1, max_tokens=8, eval_every=2, patience=0, lr=1e-3,
    critic_lr=1e-3, head_lr=1e-2)
REAL = "-m examples.real_vlm", real_vlm.RealConfig, real_vlm.begin


@pytest.fixture(autouse=True)
def quick(cache, monkeypatch):
    monkeypatch.setattr(curves, "plot", lambda out: (out / "curves.png").touch())  # it takes a second


def small(model, out, **changes):
    return test_train_small.small(model, out=str(out), **SMALL | changes)


def same_weights(one, other):
    files = "model/model.safetensors", "critic.pt"
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in files)


# ------------------------------------------------------------------------------------ checkpoints and folders
class Code(SimpleNamespace):
    """Whoever unpickles it writes a file."""

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.fixture(scope="module")
def finished(mini, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    train_small.learn(train_small.prepare(small(mini, out)))
    return out


@pytest.mark.parametrize("kind", ["torn", "empty", "foreign", "older", "code"])
def test_a_bad_checkpoint_is_named_and_the_one_before_is_used(finished, tmp_path, capsys, kind):
    out = shutil.copytree(finished, tmp_path / "run")
    last = out / "checkpoint-00004.pt"
    if kind == "torn":
        last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    elif kind == "empty":
        last.write_bytes(b"")
    else:
        torch.save(dict(foreign=[1, 2], older=dict(form=0), code=Code(file=tmp_path / "was run"))[kind], last)
    assert run_folder.read_checkpoint(out)["iteration"] == 2
    said = capsys.readouterr().err
    assert str(last) in said and said.count("\n") == 1 and not (tmp_path / "was run").exists()
    with pytest.raises(ValueError, match="resume is .*: expected a folder with a checkpoint"):
        (out / "checkpoint-00002.pt").unlink()
        run_folder.read_checkpoint(out)


def test_two_checkpoints_are_kept_and_other_names_are_somebodys_own(finished, tmp_path, command, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    assert sorted(x.name for x in out.glob("checkpoint*")) == ["checkpoint-00002.pt", "checkpoint-00004.pt"]
    own = {f"checkpoint-{name}" for name in ("best.pt", "2.pt", "00004.pt.old", "00004-best.pt", "00009.pt")}
    for name in own:
        shutil.copy(out / "checkpoint-00002.pt", out / name)
    assert command(resume=out, iterations=7) == 0
    assert re.search("checkpoint-00009.pt cannot be read .*expected 2, of 9", capsys.readouterr().err)
    kept = own | {"checkpoint-00006.pt", "checkpoint-00007.pt"}
    assert {x.name for x in out.glob("checkpoint*")} == kept and len(logged(out)) == 8
    for i in (99999, 100000):
        (out / f"checkpoint-{i}.pt").touch()
    assert [i for i, _ in run_folder.checkpoints(out)] == [6, 7, 9, 99999, 100000]


def test_files_are_whole_or_not_there_and_rows_come_before_their_checkpoint(mini, tmp_path, monkeypatch):
    done, fsync, replace, out = [], os.fsync, os.replace, tmp_path / "run"
    out.mkdir()
    [(out / name).touch() for name in ("lock", "run.tmp")]  # left by one that was killed as it began
    note = lambda path, of: done.append((Path(path).name, os.stat(of).st_size))
    monkeypatch.setattr(os, "fsync", lambda n: note(os.readlink(f"/proc/self/fd/{n}"), n) or fsync(n))
    monkeypatch.setattr(os, "replace", lambda old, new: note(new, old) or replace(old, new))
    train_small.learn(train_small.prepare(small(mini, out, iterations=1, critic_warmup=0)))
    each = "metrics.jsonl", "checkpoint.tmp", "checkpoint-0000{}.pt"
    assert [x for x, _ in done] == ["run.tmp", "run.json", *(x.format(i) for i in (0, 1) for x in each)]
    assert all(size == done[i + 1][1] > 0 for i, (name, size) in enumerate(done) if name.endswith(".tmp"))


swap = lambda old, new: lambda path: path.write_text(re.sub(old, new, path.read_text(), flags=re.S))
of_algo = lambda name: lambda path: torch.save(torch.load(path) | dict(algo=name, out="its own"), path)
DAMAGE = {  # to a finished run: the file, what becomes of it, and what is said
    "no rows": ("metrics.jsonl", Path.unlink, "No such file.*metrics.jsonl"),
    "too few": ("metrics.jsonl", swap('{"iteration": 3.*', ""), "line 4 of .* is b'': expected .* 3"),
    "in disorder": ("metrics.jsonl", swap('"iteration": 2', '"iteration": 1'), "line 3 of .*: expected .* 2"),
    "torn": ("metrics.jsonl", swap(".{9}$", ""), "line 5 of .*: expected that of iteration 4"),
    "empty": ("run.json", swap(r"\A.*", "{}"), "resume is .*a run': expected a run's folder"),
    "a list": ("run.json", swap(r"\A.*", "[1]"), "resume is .*a run': expected a run's folder"),
    "half": ("run.json", swap(r"}\s*\Z", ""), "resume is .*a run': expected a run's folder"),
    "real_vlm's": ("run.json", swap('"algo"', '"dora": 1, "algo"'), "dora is not .* --resume '.*a run'"),
    "a list for a number": ("run.json", swap('"lr": 0.001', '"lr": [1]'), "--lr: invalid float"),
    "grpo": ("checkpoint-00004.pt", of_algo("grpo"), "is 'grpo': expected sapo.* its own"),
    "ppo": ("checkpoint-00004.pt", of_algo("ppo"), "is 'ppo': expected sapo.* its own"),
    "no checkpoints": (".", lambda out: [*map(Path.unlink, out.glob("*.pt"))], "a checkpoint that can be"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_run_is_one_line_before_any_work(finished, tmp_path, command, capsys, what):
    out, (file, change, words) = shutil.copytree(finished, tmp_path / "a run"), DAMAGE[what]
    change(out / file)
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert command(resume=out) == 2
    said = capsys.readouterr().err
    assert re.search(words, said) and said.count("\n") == 1
    assert before == {path: path.read_bytes() for path in out.iterdir()}


def test_a_checkout_may_move(mini, tmp_path, monkeypatch, command):
    here, there, names = tmp_path / "here", tmp_path / "there", ("tiny_vlm", "tiny_vlm/wordy")
    monkeypatch.setattr(run_folder, "ROOT", here)
    for i, name in enumerate(names):
        shutil.copytree(mini, here / name)
        train_small.prepare(small(here / name, tmp_path / f"{i}", iterations=1, critic_warmup=0))
    here.rename(there)
    monkeypatch.setattr(run_folder, "ROOT", there)
    for i, name in enumerate(names):
        out = tmp_path / f"{i}"
        assert f'"model": "{name}"' in (out / "run.json").read_text()
        assert command(resume=out) == 0
        for model, now in ((here / name, there / name), (f"me/{name}", f"me/{name}"), (mini, mini)):
            swap('"model": "[^"]*"', f'"model": "{model}"')(out / "run.json")  # the first: as of older runs
            assert run_folder.settings(out)["config"]["model"] == str(now)


def test_nothing_is_written_where_something_is(finished, mini, tmp_path, command, capsys):
    for folder in (shutil.copytree(finished, tmp_path / "run"), shutil.copytree(mini, tmp_path / "model")):
        before = {path: path.read_bytes() for path in folder.rglob("*")}
        assert command(model=folder, out=folder) == 2
        said = capsys.readouterr().err
        assert "out is" in said and f"--resume {folder}" in said and said.count("\n") == 1
        assert before == {path: path.read_bytes() for path in folder.rglob("*")}


def test_of_two_runs_that_begin_in_a_folder_one_does(mini, tmp_path):
    def meanwhile(config):
        train_small.prepare(config)
        return train_small.load(config)

    with pytest.raises(ValueError, match="expected a folder without run.json"):
        train_small.prepare(small(mini, tmp_path / "run"), load_models=meanwhile)


def test_settings_of_a_run_that_goes_on(mini, tmp_path, command, capsys):
    out = tmp_path / "run"
    train_small.learn(train_small.prepare(small(mini, out)), stop=lambda: len(logged(out)) > 3)
    for name, value, said in (("lr", 0.01, "0.001"), ("seed", 1, "0"), ("responses", 16, "8"),
                              ("iterations", 3, "4 or more"), ("out", "other", "none, as --resume goes on")):
        assert command(resume=out, **{name: value}) == 2
        assert f"{name} is {value!r}: expected {said}" in capsys.readouterr().err
    with open(out / "metrics.jsonl", "a") as file:  # behind the checkpoint, and longer than what comes there
        file.write(json.dumps(dict(iteration=4, text="a" * 5000)) + "\n")
    odd = (out / "metrics.jsonl").read_bytes().replace(b'"entropy"', b'"\xc3\xa9": 1, "entropy"')
    (out / "metrics.jsonl").write_bytes(odd.replace(b"\n", b"\r\n"))  # as an editor on Windows may leave it
    assert command(resume=out, iterations=5, out=out) == 0
    assert [(row["iteration"], "\xe9" in row) for row in logged(out)] == [(i, 0 < i < 4) for i in range(6)]
    assert command(resume=tmp_path) == 2 and "resume is" in capsys.readouterr().err


def test_a_full_disk_keeps_the_last_checkpoint(mini, tmp_path, command, capsys):
    out = tmp_path / "run"
    out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", out]  # for about three checkpoints
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs rights")
    try:
        code = command(model=mini, out=out, **SMALL)
        said = capsys.readouterr().err.splitlines()[-1]
        assert code == 1 and f"--resume {out}" in said, (code, said)
        assert "could not be written" in said or "No space left" in said, said
        assert run_folder.read_checkpoint(out)["iteration"] < 4
    finally:
        run_folder.LOCKS.clear()
        subprocess.run(["umount", out], check=True)


# ------------------------------------------------------------------------------------------------ bad numbers
def spoil(module, name, change):
    """A function, and what it becomes: its result is changed."""
    function = getattr(module, name)
    return module, name, lambda *args, **kwargs: change(function(*args, **kwargs))


NAN = {
    "loss": spoil(sapo, "policy_loss", lambda x: (x[0] * math.nan, x[1])),
    "value_loss": spoil(sapo, "value_loss", lambda x: x * math.inf),
    "log_probs": spoil(train_small, "score", lambda x: (x[0] * math.nan, x[1])),
    "values": spoil(train_small, "value", lambda x: x * math.nan),
    "reward": (train_small.Task, "reward", lambda *_: math.nan),
    "grad_norm": spoil(torch.nn.utils, "clip_grad_norm_", lambda x: x * math.nan),
}


def test_no_step_is_taken_with_what_is_not_finite(mini, tmp_path, monkeypatch, coin):
    names = [name for each in NAN for name in (None, each)] + [None]  # of what is spoiled, in each iteration
    weights, guarded = [], run_folder.guarded
    changes = dict(iterations=len(names), critic_warmup=0, mini_batches=1, eval_every=99, kl_coef=0.0)

    def spoiled(step, run, i):
        name = names[i - 1]
        with pytest.MonkeyPatch.context() as patch:
            if name:
                patch.setattr(*NAN[name])
            result = guarded(step, run, i)
        parameters = [p for model in (run.policy, run.critic) for p in model.parameters()]
        assert not any(p.grad is not None for p in parameters)
        weights.append([p.detach().clone() for p in parameters])
        return result

    monkeypatch.setattr(run_folder, "guarded", spoiled)
    history, _ = train_small.learn(train_small.prepare(small(mini, tmp_path / "run", **changes)))
    assert [row.get("not_finite") for row in history[1:]] == names
    for i, name in enumerate(names[1:], 1):  # the others move them
        assert all(map(torch.equal, weights[i], weights[i - 1])) == (name is not None)
        if name:
            kept = torch.load(tmp_path / "run" / f"not-finite-{i + 1}.pt", weights_only=True)
            assert kept["quantity"] == name and len(kept["texts"]) == 8
            assert kept["ids"].shape == kept["log_probs"].shape


def test_three_times_in_a_row_end_the_run(mini, tmp_path, monkeypatch, command, capsys):
    out, bad, good = tmp_path / "a run", dict(iteration=1, not_finite="loss"), dict(iteration=2)
    monkeypatch.setattr(*NAN["value_loss"])
    assert command(model=mini, out=out, **SMALL) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "value_loss was not finite three times in a row" in said and "--critic-lr" in said
    assert len(logged(out)) == 4 and f"{out}/not-finite-*.pt" in said and f"--resume '{out}'" in said
    run_folder.warn([bad, bad, good, bad, bad], small(mini, out), set())


@pytest.mark.parametrize("phase", ["rollout", "score_all", "assign_credit", "update", "evaluate"])
def test_out_of_memory_names_the_phase_and_the_flag(mini, tmp_path, monkeypatch, command, capsys, phase):
    full = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"))
    inner = dict(rollout="see", score_all="value", assign_credit="segment_ends", update="policy_objective",
                 evaluate="rollout")
    function = getattr(train_small, inner[phase])
    ready = []  # the first evaluation passes, but where it is the one that fails
    monkeypatch.setattr(run_folder, "save_checkpoint", lambda *_, **__: ready.append(1))
    monkeypatch.setattr(train_small, inner[phase], lambda *args, **kwargs: (
        full() if ready or phase == "evaluate" else function(*args, **kwargs)))
    assert command(model=mini, out=tmp_path / "run", **SMALL) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"out of memory in {phase}: halve --micro-tokens" in said and "--resume" in said


# --------------------------------------------------------------------------------------------- bad settings
BAD = [
    *([f"--{name}={value}"] for name, values in {
        "iterations": "0 -1 x", "responses": "0 3 100000", "mini-batches": "0", "epochs": "0",
        "eval-every": "0", "eval-problems": "0 99999", "micro-tokens": "-1", "critic-warmup": "-1 30",
        "lr": "0 -1 nan 1000", "critic-lr": "-1 nan", "head-lr": "1000 inf", "temperature": "0 nan -1",
        "gamma": "2 nan", "lam": "7 -0.1", "lam-returns": "7", "kl-coef": "-1 nan", "clip-low": "2 nan",
        "clip-high": "-1", "top-percent": "0 0.3 200 nan", "max-tokens": "0 1 1000000000", "operands": "1 9",
        "distractors": "-1 9", "prior": "2 nan", "operators": "/", "algo": "nonsense", "segments": "word",
        "device": "cuda:99 nonsense", "corruption": "fog", "openings": "all", "contrast": "masked",
        "out": "README.md", "resume": "nowhere", "seed": "-1", "lora": "-1",
        "model": "./nowhere README.md", "dataset": "./nowhere", "nonsense": "1",
    }.items() for value in values.split()),
    ["--algo=gspo", "--kl-coef=5"], ["--algo=grpo", "--lam=7"], ["--algo=grpo", "--responses=40"],
    ["--iterations=5", "--critic-warmup=5"], ["--lora=2", "--train-vision=True"],
    ["--operands=6", "--operators=×", "--prior=0.03"], ["--openings=few", f"--model={options.TINY_VLM}"],
]


@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
@pytest.mark.usefixtures("few_tries")
def test_a_bad_setting_is_one_line_before_any_work(arguments, tmp_path, monkeypatch, command, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("no folder")
    assert command(*arguments, how=REAL * ("--dataset=./nowhere" in arguments)) == 2
    said, name = capsys.readouterr(), arguments[-1].split("=")[0][2:]
    named = {"nonsense": "nonsense", "prior": "operators"}.get(name, name) if len(arguments) == 3 else name
    assert said.err.count("\n") == 1 and "Traceback" not in said.err and not said.out
    assert re.search(named.replace("-", "[-_]"), said.err), said.err
    assert {x.name for x in tmp_path.iterdir()} <= {"README.md", "cache"}


@pytest.mark.parametrize("what", [
    "truncated", "without weights", "another shape", "a text model", "no processor"])
def test_a_bad_model_is_one_line(mini, tmp_path, command, capfd, what):
    folder = shutil.copytree(mini, tmp_path / "model")
    weights = folder / "model.safetensors"
    if what == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif what == "no processor":
        for path in folder.glob("*processor*"):
            path.unlink()
        (folder / "tokenizer.json").unlink()
    elif what == "a text model":
        shutil.rmtree(folder)
        config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=99)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    else:
        table = load_file(weights)
        name, value = table.popitem()
        table |= {name: value[:-1]} if what == "another shape" else {}
        save_file(table, weights, metadata=dict(format="pt"))
    assert command(model=folder, out=tmp_path / "run", **SMALL) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert f"model is '{folder}': expected" in last and not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------- data sets
@pytest.mark.parametrize("change, said", [
    (lambda rows: rows.select([]), ""),
    (lambda rows: rows.select(range(11)), "with 11 rows: expected at least 8"),
    (lambda rows: rows.remove_columns("answer"), "expected a column 'answer'"),
    (lambda rows: rows.map(lambda row, i: dict(answer=row["answer"] if i - 7 else None), with_indices=True),
     "an answer that is None")], ids=["empty", "too small", "no answers", "an answer of None"])
def test_a_bad_data_set_is_one_line(mini, tmp_path, command, capsys, change, said):
    (tmp_path / "data").mkdir()
    change(toy_env.make_dataset(30, operands=2)).to_parquet(tmp_path / "data" / "train.parquet")
    capsys.readouterr()
    assert command(how=REAL, model=mini, dataset=tmp_path / "data", out=tmp_path / "run", **SMALL) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert said in last and "dataset is" in last and not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------ hostile responses
def second_parser(response):
    """The blocks' texts, or None. No regular expression: what is before, inside and behind each tag."""
    blocks, rest = [], response
    for name in ("perception", "think", "answer"):
        if response.count(f"<{name}>") != 1 or response.count(f"</{name}>") != 1:
            return None
        before, tag, rest = rest.partition(f"<{name}>")
        inside, end, rest = rest.partition(f"</{name}>")
        if before.strip() or not tag or not end:
            return None
        blocks.append(inside)
    return None if rest.strip() else blocks


def test_thousands_of_hostile_responses():
    rng, right, parsed, faithful = random.Random(0), 0, 0, 0
    junk = [*toy_env.TAGS, "<answer", "answer>", "< answer >", "<ANSWER>", "</think><think>",
            "<think><answer>", *"٣３²−×=,+\n\0\ud800\u2028\u200b", "-0", "9" * 5000, "red 4", "i see ", "so ",
            ""]
    kinds = [*toy_env.OPENED]
    problems = [toy_env.make_problem(i, 2, operators="+-×", openings=kinds[i % 3]) for i in range(200)]
    texts = [re.split("([<>\n])", demonstration(p, rng, 0.1, 0.1, 0.1)) for p in problems]
    for i in range(20_000):
        problem, parts = problems[i % 200], list(texts[i % 200])
        for _ in range(rng.choice((0, 1, 1, 2, 9))):
            j, k = sorted(rng.choices(range(len(parts) + 1), k=2))
            parts[j:k] = rng.choice([[], [rng.choice(junk)], [rng.choice(junk), *parts[j:k]], parts[j:k] * 2,
                                     [*parts[k:], *parts[j:k]], list(problem.answer)])
        parts = (parts if i % 50 else rng.choices(junk, k=30)) or [""]
        response = "".join(parts)
        blocks = second_parser(response)
        is_right = blocks is not None and blocks[2].strip() == problem.answer
        assert toy_env.reward(problem, response) == is_right >= toy_env.faithful(problem, response)
        right, parsed = right + is_right, parsed + (blocks is not None)
        if i % 11 == 0:
            roles = srpo.split_roles([parts], torch.ones(1, len(parts)))
            for role, block in zip(roles, blocks or ["", ""]):
                inside = "".join(part for part, on in zip(parts, role[0]) if on)
                assert inside in block and len(inside) >= len(block) - 2 * max(map(len, parts))
            judged = toy_env.statements(problem, response)
            starts = [s.start for s in judged]
            assert starts == sorted(starts) and all(0 <= s.start <= s.end <= len(response) for s in judged)
            assert all(s.true for s in judged) == toy_env.faithful(problem, response)
            assert 0 <= toy_env.perception(problem, response) <= 1
            toy_env.blame(problem, response, parts, [0.0] * len(parts))
            faithful += toy_env.faithful(problem, response)
    assert 2_000 < right < parsed < 18_000 and 200 < faithful < 1_500


@pytest.mark.parametrize("unit", [
    "a", " ", "9", "-", ",", "\n", " \n", "red 3,", "red ", "1 + ", "1 - red 1 = 1\n", "<", "<think>",
    "<answer>", "٣", "\\boxed{"])
def test_reading_takes_linear_time(unit):
    line, problem, start = unit * (2**17 // len(unit)), toy_env.make_problem(0), time.process_time()
    block = "<perception>{}</perception> <think>{}</think> <answer>{}</answer>"
    blocks = [block.format(*parts) for parts in ((line, "", ""), ("", line, ""), ("", "", line))]
    for response in (line, "<perception>" + line, *blocks):
        assert toy_env.reward(problem, response) == 0 and toy_env.first_error(problem, response)
        srpo.split_roles([[response]], torch.ones(1, 1))
    assert time.process_time() - start < 2  # one quadratic match takes longer


# ----------------------------------------------------------------------------------------- what a person sees
HEALTHY = dict(reward=0.5, truncated=0.1, unreadable=0.2, first_ratio_deviation=0.0, entropy=0.5,
               explained_variance=0.2)


@pytest.mark.parametrize("word, change", [
    (None, {}), (None, dict(explained_variance=-0.1, warmup=6)), (None, dict(entropy=0.0051)),
    ("cut off", dict(truncated=1.0)), ("format", dict(unreadable=0.6)),
    ("ratio", dict(first_ratio_deviation=0.01)),
    ("critic", dict(explained_variance=-0.1)), ("entropy", dict(entropy=0.0049)),
    ("no roles", dict(with_roles=0.4))])
def test_what_cannot_learn_says_so(word, change):
    history = [dict(iteration=0, accuracy_greedy=0.1), *(dict(HEALTHY, iteration=i) for i in range(1, 5))]
    for i in range(5, 12):
        history.append(dict(HEALTHY, iteration=i) | change)
        said = [*run_folder.complaints(history, warmup=change.get("warmup", 5))]
    assert [word in sentence for sentence in said] == [True] * (word is not None)
    assert not [*run_folder.complaints([dict(iteration=0), dict(iteration=1, not_finite="loss")], 0)]


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_a_run_that_can_learn_nothing_says_what_to_do(mini, tmp_path, monkeypatch, command, capsys, reward):
    monkeypatch.setattr(train_small.Task, "rewards", lambda self, problems, *_: [reward] * len(problems))
    assert command(**SMALL | dict(model=mini, out=tmp_path, patience=2, iterations=5)) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"all rewards of 2 iterations were {reward:g}: warm-start the model (python -m" in said
    assert len(logged(tmp_path)) == 3 and command(resume=tmp_path, patience=0) == 0
    assert len(logged(tmp_path)) == 6


@pytest.mark.parametrize("seed", range(3))
def test_the_committed_runs_have_nothing_to_complain_of(seed):
    history = [json.loads(line) for line in open(ROOT / "results" / f"sapo-{seed}.jsonl")]
    assert not [x for i in range(len(history)) for x in run_folder.complaints(history[: i + 1], warmup=5)]


@pytest.mark.parametrize("trouble", ["ascii", "closed", "a notebook"])
def test_the_model_is_saved_before_anything_is_shown(mini, tmp_path, monkeypatch, command, trouble):
    class Closed(BytesIO):
        def write(self, _):
            raise BrokenPipeError(32, "Broken pipe")

    out = tmp_path / "run"
    shown = TextIOWrapper(BytesIO() if trouble == "ascii" else Closed(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", StringIO() if "notebook" in trouble else shown)
    with ThreadPoolExecutor() as threads:
        its = SMALL | dict(model=mini, out=out, save=True, iterations=1, critic_warmup=0)
        code = threads.submit(command, **its).result()
    assert code == (trouble == "closed")
    assert (out / "model" / "model.safetensors").exists() and (out / "critic.pt").exists()
    assert (out / "curves.png").exists() == (trouble != "closed")
    if trouble == "ascii":
        assert f"python -m results.page {out}" in shown.buffer.getvalue().decode("ascii").splitlines()[-1]


@pytest.mark.parametrize("arguments", [
    "support.curves", "support.curves /nowhere", "results.page /nowhere", "results.page README.md",
    "results.credit show /nowhere", "results.credit --seeds=0", "results.credit --workers=x",
    "results.bench --lr=7", "results.bench --model=/nowhere", "results.study nonsense"])
def test_a_wrong_folder_or_number_is_one_line(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", arguments.split())
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(arguments.split()[0], run_name="__main__")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and re.search(": expected|argument", said)


def test_tables_are_shown_where_only_ascii_is_known(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["study", "table1", "--workers=0"])
    monkeypatch.setattr(study, "study", lambda *_: "0.5 \u2212 0.6")
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(BytesIO(), encoding="ascii", write_through=True))
    study.main()
    assert sys.stdout.buffer.getvalue() == b"0.5 ? 0.6\n\n"


def test_torchvision_for_another_torch_is_named(tmp_path, monkeypatch):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(SystemExit, match="torchvision does not fit torch .*: pip uninstall torchvision"):
        runpy.run_path(run_folder.__file__)
    before = Path(train_small.__file__).read_text(encoding="utf-8").split("\nfrom support import")[0]
    assert not re.search("^from transformers import", before, re.M)  # which would look for torchvision first


def test_random_numbers_of_a_mac_are_kept_too(monkeypatch):
    mac = SimpleNamespace(get_rng_state=lambda: mac.state, set_rng_state=lambda x: vars(mac).update(state=x))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "mps", mac)
    mac.state = 7
    before, first, mac.state = run_folder.random_numbers(), torch.rand(3), 0
    run_folder.random_numbers(before)
    assert mac.state == 7 and torch.equal(torch.rand(3), first)


# -------------------------------------------------------------------------------------- killed, and continued
def alone(log, arguments):
    """The command in a process of its own. What it says is in `log`."""
    number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(number, 1), os.dup2(number, 2)
    curves.plot = print
    toy_env.reward = lambda problem, text: float(len(text) % 2)  # an untrained model gets some
    os.fsync = lambda n: time.sleep(0.05 * os.readlink(f"/proc/self/fd/{n}").endswith("point.tmp"))
    sys.argv = ["train_small.py", *arguments]
    train_small.main()


@pytest.fixture(scope="module", autouse=True)  # it imports while other tests run
def server(tmp_path_factory):
    """What forks such processes when all is imported. -> start(...) and the log of the last one"""
    context, log = multiprocessing.get_context("forkserver"), tmp_path_factory.mktemp("server") / "log"
    places = os.pathsep.join(map(str, (ROOT, ROOT / "tests", os.environ.get("PYTHONPATH", ""))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", places)
        patch.setenv("TQDM_DISABLE", "1")
        context.set_forkserver_preload(["conftest", "test_run"])
        forkserver.ensure_running()

    def start(*arguments):
        process = context.Process(target=alone, args=(log, arguments), daemon=True)
        process.start()
        return process

    return start, log


LONGER = SMALL | dict(iterations=8, eval_every=3, save=True)


@pytest.fixture(scope="module")
def uninterrupted(server, mini, tmp_path_factory):
    (start, _), out, began = server, tmp_path_factory.mktemp("whole") / "run", time.time()
    process = start(*flags(model=mini, out=out, **LONGER))
    process.join()
    assert process.exitcode == 0
    rows = logged(out)
    assert [row["iteration"] for row in rows] == [*range(9)] and rows[-1]["kl_to_start"] != 0
    return out, time.time() - began


def test_killed_at_eight_moments_it_ends_as_if_it_never_was(server, uninterrupted, mini, tmp_path):
    (start, log), (whole, seconds), rng, out = server, uninterrupted, random.Random(0), tmp_path / "run"
    begin, torn, checkpoints = flags(model=mini, out=out, **LONGER), 0, lambda: {*out.glob("checkpoint-*.pt")}
    for i in range(9):  # the ninth time it ends
        old, process = checkpoints(), start(*([f"--resume={out}"] if (out / "run.json").exists() else begin))
        if i < 8:
            writes = i % 2  # each second time, while the second checkpoint from here is being written
            until = time.time() + (2 * seconds if writes else rng.uniform(0.0, seconds / 2))
            while time.time() < until and not (writes and (out / "critic.pt").exists()):
                if writes and (out / "checkpoint.tmp").exists() and checkpoints() - old:
                    break
                time.sleep(0.0005)
            process.kill()
        process.join()
        torn += (out / "checkpoint.tmp").exists()
        if process.exitcode != -signal.SIGKILL:
            assert process.exitcode == 0, log.read_text()
            assert logged(out) == logged(whole) and same_weights(out, whole)
            if i < 8:  # it was faster: once more
                shutil.rmtree(out)
    assert process.exitcode == 0 and torn > 0  # some while a checkpoint was being written


def test_a_signal_ends_the_iteration_and_saves(server, uninterrupted, mini, tmp_path, command):
    (start, log), (whole, _), out = server, uninterrupted, tmp_path / "run"
    arguments, rows, table = flags(model=mini, out=out, **LONGER), 1, out / "metrics.jsonl"
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start(*arguments)
        while not table.exists() or table.read_bytes().count(b"\n") <= rows:
            time.sleep(0.02)
        assert command(resume=out) == 2  # another process works there
        os.kill(process.pid, number)
        process.join()
        rows, arguments, said = len(logged(out)), [f"--resume={out}"], log.read_text()
        assert process.exitcode == 130 and "Traceback" not in said and rows < 9
        assert f"stopped after iteration {rows - 1}. Go on from the last checkpoint" in said
        assert f"--resume {out}" in said and (out / f"checkpoint-{rows - 1:05}.pt").exists()
    process = start(*arguments)
    process.join()
    assert process.exitcode == 0, log.read_text()
    assert logged(out) == logged(whole) and same_weights(out, whole)
    seconds = [json.loads(line)["seconds"] for line in open(out / "metrics.jsonl")]
    assert seconds == sorted(seconds)  # they go on as well
    made = json.loads((out / "run.json").read_text())
    assert len(made["parts"]) == 3 and made["config"]["lam"] == 0.9
    assert {"command", "commit", "torch", "transformers", "device"} <= made["parts"][0].keys()


@pytest.mark.parametrize("where, number", [
    ("make_optimizers", signal.SIGTERM), ("rollout", signal.SIGINT), ("step", signal.SIGTERM)])
def test_a_signal_before_the_first_iteration_or_a_second_one_is_obeyed_at_once(
        finished, mini, tmp_path, command, capsys, where, number):
    out, went_on, kill = tmp_path / "run", [], lambda: os.kill(os.getpid(), number)
    handlers, begin = lambda: [*map(signal.getsignal, (2, 15))], SMALL | dict(model=mini, out=out)
    before = handlers()
    with pytest.MonkeyPatch.context() as patch:
        killed = lambda *_, **__: (where == "step" and kill(), kill(), went_on.append(1))
        patch.setattr(train_small, where, killed)
        assert command(**begin) == 130
    assert "train_small.py: stopped" in capsys.readouterr().err.splitlines()[-1] and not went_on
    assert command(**begin if where == "make_optimizers" else dict(resume=out)) == 0
    assert logged(out) == logged(finished) and handlers() == before and str(out) not in run_folder.LOCKS
