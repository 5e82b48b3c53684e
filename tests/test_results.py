"""results/: what is committed is what the committed runs give, and what the measurements mean, by hand."""

import csv
import itertools
import json
import math
import re
import statistics
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import sapo
import toy_env
import train_small
from results import bench, credit, study

ROOT = study.HERE.parent
README = (study.HERE / "README.md").read_text(encoding="utf-8")
FROZEN = ("srpo-forms", "guessing-forms")
SMALL = dict(operands=2, responses=16, mini_batches=2, eval_problems=8, max_tokens=12, seed=0)


def test_imports_run_one_way():
    above, alone = {"results", "examples", "tiny_vlm"}, {"sapo", "srpo", "toy_env"}
    for room, files in (({"train_small"}, ["train_small.py", "results/study.py"]),
                        (alone | {"support"}, ["support/*.py"]), (set(), [f"{name}.py" for name in alone])):
        for path in (path for pattern in files for path in ROOT.glob(pattern)):
            found = re.findall(r"^ *(?:from|import) (\w+)", path.read_text(encoding="utf-8"), re.M)
            assert found and not above & {*found}, path
        above |= room


# ------------------------------------------------------------------------------------------ what is committed
@pytest.fixture
def no_training(monkeypatch):
    """A missing run would ask for a pool of processes."""
    monkeypatch.setattr(study, "multiprocessing", None)


def removed(name):
    """The rows of a study's runs that can no longer be trained, as srpo.py has lost their options."""
    with open(study.HERE / f"{name}-removed.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_runs_are_named_by_their_options_and_a_row_is_what_its_history_gives():
    paths = sorted((study.HERE / "runs").iterdir())
    asked = {study.path_of(options) for name in study.STUDIES for _, options in study.jobs_of(name)}
    frozen = {row["command"] for name in FROZEN for row in removed(name)}
    assert len(paths) >= 200 and all(len(path.name) <= 60 for path in paths)
    for path in paths:
        run = json.loads(path.read_text())
        kind = "credit" if "points" in run else ""
        assert kind or (path in asked) != (run["row"]["command"] in frozen), path.name
        assert path == study.path_of(run["options"], kind), path.name
        if not kind:
            assert run["row"]["command"] == study.command(run["options"])
            assert run["row"].items() >= study.summarise(run["history"]).items(), path.name


@pytest.mark.parametrize("name", study.STUDIES)
def test_csvs_and_tables_are_what_the_committed_runs_give(name, no_training):
    rows = study.rows_of(name, study.runs_of(name, workers=0))
    committed = (study.HERE / f"{name}.csv").read_bytes().decode()
    assert study.as_csv(rows) == committed
    assert study.with_tables(README, {name: study.table(name, rows)}) == README
    assert f"]({name}.png)" in README and (study.HERE / f"{name}.png").exists()


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_csvs_and_tables_are_what_the_runs_of_removed_options_gave(name):
    runs = map(json.loads, map(Path.read_text, (study.HERE / "runs").glob("srpo-*")))
    runs = {run["row"]["command"]: run for run in runs}
    rows = [dict(label=row["label"]) | {k: study.value_of(runs[row["command"]], k) for k in [*row][1:]}
            for row in removed(name)]
    assert study.as_csv(rows) == (study.HERE / f"{name}-removed.csv").read_bytes().decode()
    assert not {row["label"] for row in rows} & {*study.STUDIES[name].runs}
    assert all(re.search(f"[ -]{x}( |$)", row["command"]) for row in rows for x in row["label"].split(", "))
    cells = study.markdown("", rows, study.STUDIES[name].columns).split("\n\n")[1]
    assert f"<!-- removed {name} -->\n{cells}\n<!-- end -->" in README


def test_credit_csvs_and_tables_are_what_the_committed_runs_give(no_training):
    for world in credit.WORLDS:
        rows = credit.rows_of(world)
        assert study.as_csv(rows) == (study.HERE / f"{world}credit.csv").read_bytes().decode()
        tables = {world + part: credit.table(part, rows) for part in credit.TABLES}
        assert study.with_tables(README, tables) == README
    named = {world + part for world in credit.WORLDS for part in credit.TABLES}
    assert set(re.findall("<!-- table (.*) -->", README)) == {*study.STUDIES, *named}


def test_methods_are_tuned_on_seeds_of_their_own_and_no_best_is_at_an_edge(no_training):
    for name, option, own in (("rates", "lr", study.RATE), ("lambda", "lam", study.OWN_LAMBDA),
                              ("wordy-lambda", "lam", study.OWN_LAMBDA)):
        found = {}
        for run in itertools.chain.from_iterable(study.runs_of(name, workers=0).values()):
            algo, seed = run["options"]["algo"], run["options"]["seed"]
            assert seed in study.TUNING
            x = run["options"].get(option, own[algo])
            found.setdefault(algo, {}).setdefault(x, []).append(run["row"]["accuracy_sampled"])
        assert list(found) == list(own)
        for algo, tried in found.items():
            best = max(tried, key=lambda x: statistics.fmean(tried[x]))
            assert {len(accuracies) for accuracies in tried.values()} == {2}, (name, algo)
            assert min(tried) < best < max(tried), (name, algo)
            if name != "wordy-lambda":  # reported there: several that are level
                assert best == study.BEST.get(algo, {}).get(option, own[algo]), (name, algo)


# ------------------------------------------------------------------------------------------------------ study
def test_study_keeps_a_run_and_never_repeats_it(tmp_path, monkeypatch, mini, no_training):
    monkeypatch.setattr(study, "HERE", tmp_path)
    (tmp_path / "runs").mkdir()
    options = dict(SMALL, algo="sapo", model=str(mini), iterations=2, critic_warmup=1, lr=1e-4)
    study.keep(study.train_once, options, study.path_of(options))
    run, = study.kept([options], study.train_once)
    assert run["options"] == options and len(run["history"]) == 3
    assert run["row"]["device"] == (torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    assert {f"lift_{q}" for q in study.QUANTILES} <= set(run["history"][-1])
    assert run["row"]["accuracy_sampled"] == run["history"][-1]["accuracy_sampled"]
    assert study.path_of(dict(options, lr=2e-4)) != study.path_of(options)
    assert study.path_of(dict(reversed(options.items()))) == study.path_of(options)
    more = [options, dict(options, seed=1)]
    with pytest.raises(AttributeError):  # another run: it would be trained
        study.kept(more, study.train_once)
    assert study.kept(more, study.train_once, workers=0) == [run]


def test_settings_share_a_run_where_an_option_is_at_its_default():
    assert study.setting("sapo", segments="entropy", top_percent=30.0) == study.setting("sapo")
    assert study.setting("gspo", lr=1.6e-4)["lr"] == 1.6e-4 != study.setting("gspo")["lr"]
    assert study.setting("sapo", value_at="last")["value_at"] == "last"
    assert study.setting("grpo", prior=0.6)["prior"] == 0.6


def test_cells_intervals_and_tables():
    assert study.cell([0.5, None, 0.7]) == "2 of 3 runs" and study.cell([None]) == "–" == study.cell([])
    assert study.cell([19, 71]) == "45 (19–71)" and study.cell([71, 71]) == "71"
    assert study.interval([1.0, 2.0, 6.0]) == (3.0, 1.0, 6.0)  # of up to three: min–max
    mean, low, high = study.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    draws = sorted(map(statistics.fmean, itertools.product([1.0, 2.0, 3.0, 4.0, 5.0], repeat=5)))
    assert mean == 3.0 and low == pytest.approx(draws[int(0.025 * 5**5)], abs=0.21)
    assert high == pytest.approx(draws[int(0.975 * 5**5)], abs=0.21)
    spreads = {1: "1 seed", 3: "3 seeds: mean (min–max)", 5: "5 seeds: mean (95 % interval)"}
    for seeds, spread in spreads.items():
        table = study.markdown("x", [dict(label="l", seed=i, a_b=0.1) for i in range(seeds)], ["a_b", "c"])
        assert table == f"`python -m x`, {spread}.\n\n| | a b | c |\n|---|---|---|\n| l | 0.100 | – |"
    rows = [dict(label=label, seed=i) for label, seeds in (("k", range(3)), ("l", (0, 2))) for i in seeds]
    assert study.markdown("x", rows, ["a"]).endswith("| k | – |\n| l (2 of 3 seeds) | – |")
    text = "a\n<!-- table x -->\nold\n<!-- end -->\nb <!-- table y -->\n<!-- end -->"
    assert study.with_tables(text, {"x": "new"}) == text.replace("old", "new")


def test_differences_are_paired_by_seed(monkeypatch):
    ours, theirs = [0.9, 0.8, 0.85, 0.95, 0.7], [0.8, 0.75, 0.9, 0.9, 0.6]
    differences = [0.1, 0.05, -0.05, 0.05, 0.1]
    half = 2.776445 * statistics.stdev(differences) / 5**0.5  # t of four degrees of freedom
    runs = lambda its: [dict(seed=i, a=x) for i, x in enumerate(its)]
    assert study.paired(runs(ours), runs(theirs)[::-1], "a") == pytest.approx(differences)
    assert study.paired(runs([0.5, None]), runs([0.1, 0.2]), "a") == [] == study.paired(runs([0.5]), [], "a")
    assert study.difference(differences) == f"+0.050 ({0.05 - half:+.3f} to {0.05 + half:+.3f})"
    assert study.difference(differences[:3]) == "+0.033 (-0.050 to +0.100)"  # of three: min–max
    assert study.difference([500, -500]) == "+0 (-500 to +500)" and study.difference([]) == "–"
    its = study.Study("?", {}, columns=("a",), pairs=(("x", "y"),))
    monkeypatch.setitem(study.STUDIES, "s", its)
    base = {f"{column}_base": 0.0 for column in study.ACCURACY}
    rows = [dict(base, label=label, seed=i, a=a) for label, i, a in (
        ("x", 0, 0.5), ("x", 1, 0.7), ("y", 1, 0.4), ("y", 0, 0.1), ("y", 2, 0.9))]
    assert study.table("s", rows).splitlines()[-1] == "| x − y | +0.350 (+0.300 to +0.400) |"


def test_gains_are_drawn_over_the_share_that_decides_nothing(monkeypatch):
    its, shares = study.STUDIES["openings"], dict(none=0.1, few=0.3, many=0.5)
    base = {kind: [dict(row=dict(idle=x + y)) for y in (-0.02, 0.02)] for kind, x in shares.items()}
    monkeypatch.setattr(study, "runs_of", lambda name, workers: {"wording": base}[name])
    runs = {label: [dict(row=dict.fromkeys(its.curves, i + (0.5 * seed if "sapo" in label else 0))
                         | dict(seed=seed)) for seed in range(2)]
            for i, label in enumerate(its.runs)}
    del runs["sapo, on-policy, few"]
    panels = study.lines("openings", runs)
    assert list(panels) == list(its.curves)
    for panel in panels.values():
        assert {policy: {round(x, 4): y for x, y in line.items()} for policy, line in panel.items()} == {
            "on-policy": dict.fromkeys((0.1, 0.5), [1, 1.5]),
            "off-policy": dict.fromkeys((0.1, 0.3, 0.5), [1, 1.5]),
            "off-policy at half the rate": dict.fromkeys((0.1, 0.3, 0.5), [1, 1.5])}


def test_t_is_students():
    for n, t in study.STUDENT.items():  # the density's integral, by Simpson's rule
        density = lambda x: (1 + x * x / (n - 1)) ** (-n / 2)
        norm = math.gamma(n / 2) / math.gamma((n - 1) / 2) / (math.pi * (n - 1)) ** 0.5
        steps = [(1 if i in (0, 1000) else 4 if i % 2 else 2) * density(t * i / 1000) for i in range(1001)]
        assert norm * sum(steps) * t / 3000 == pytest.approx(0.475, abs=1e-4), n


def test_a_critic_is_summed_up_while_there_is_something_to_explain():
    rewards = [0.1, 0.2, 0.3, 0.5, 0.9, 0.4]
    start = dict(responses=0, accuracy_sampled=0.2, faithful_sampled=0.1)
    rows = [dict(start, responses=i, reward=r, value_loss=1.0, blame_auroc=float(i), max_ratio_deviation=i)
            for i, r in enumerate(rewards, 1)]
    row = study.summarise([start, *rows])
    assert row["blame_auroc"] == statistics.fmean([2, 3, 4])  # from 6 / 3 until the reward is 0.9
    assert row["explained_variance_last"] is None and row["max_ratio_deviation"] == 6
    assert row["lucky"] == pytest.approx(0.1) and row["responses_to_80"] is None


def test_pictures_leave_out_what_is_missing(tmp_path, monkeypatch):
    its = study.STUDIES["figure5"]
    runs = {label: [dict(options=options, row=dict.fromkeys(its.curves, x + i)) for x in (0.25, 0.75)]
            for i, (label, options) in enumerate(its.runs.items())}
    for run in (runs["5 %"][0], *runs["20 %"]):
        run["row"]["blame_auroc"] = None
    panels = study.lines("figure5", runs)
    whole = {k: [0.25 + i, 0.75 + i] for i, k in enumerate((5, 10, 20, 30, 50, 100))}
    assert panels["accuracy_paper"]["sapo"] == whole
    del whole[20]
    assert panels["blame_auroc"]["sapo"] == whole | {5: [0.75]}
    monkeypatch.setattr(study, "HERE", tmp_path)
    study.draw("figure5", dict(panels, nothing={"sapo": {}}))
    assert (tmp_path / "figure5.png").stat().st_size > 1000


# ----------------------------------------------------------------------------------------------------- credit
@pytest.fixture
def slipped():
    """A rollout of one wrong response with one false statement, 3 + 7 = 11; and where its digits are."""
    numbers = {"red": 3, "blue": 7, "green": 5}
    cells = tuple(toy_env.Cell(0, i, colour, n) for i, (colour, n) in enumerate(numbers.items()))
    steps = toy_env.Step(3, "+", "blue", 7, 10), toy_env.Step(10, "-", "green", 5, 5)
    problem = toy_env.Problem(None, "red + blue - green = ?", "5", cells, steps)
    text = ("<perception> red 3, blue 7, green 5 </perception> <think> red 3 + blue 7 = 11\n"
            "11 - green 5 = 6 </think> <answer> 6 </answer>")
    pieces = re.findall(r"\d|[^\d]+", text)
    assert "".join(pieces) == text
    mask = torch.ones(1, len(pieces), dtype=torch.bool)
    task = train_small.Task(None, [], "", toy_env.reward)
    roll = train_small.Rollout(task, [problem], {}, mask.long(), mask, ~mask[:, 0], [pieces], [text])
    names = ["red", "blue", "green", "a", "b", "tens", "ones", "c", "d", "e", "result", "answer"]
    return roll, dict(zip(names, (i for i, p in enumerate(pieces) if p.isdigit())))


def test_blame_points_at_the_false_statement(slipped):
    roll, at = slipped
    advantages = torch.zeros(roll.mask.shape)
    n, found = credit.blame(roll, advantages)
    assert n == 1 and found["auroc_tokens"] == found["auroc_statements"] == 0.5
    advantages[0, [at["tens"], at["ones"]]] = -1.0
    perfect = dict(auroc_tokens=1.0, auroc_statements=1.0, top1_statements=1.0)
    assert credit.blame(roll, advantages) == (1, perfect)
    advantages[0, at["answer"]] = -2.0  # now the answer is blamed most
    _, found = credit.blame(roll, advantages)
    assert found["auroc_tokens"] == pytest.approx(1 - 1 / (len(roll.pieces[0]) - 2))
    assert found["top1_statements"] == 0
    right = roll._replace(texts=[roll.texts[0].replace("= 6", "= 5").replace("> 6 <", "> 5 <")])
    assert credit.blame(right, advantages) == (0, {})  # a right response


def test_what_decides_nothing_and_what_goes_wrong(slipped):
    roll, at = slipped
    decide = {at[k] for k in ("red", "blue", "green", "tens", "ones", "result")}
    assert study.decisions(roll) == {(0, t) for t in decide}
    n, entropy = len(roll.pieces[0]), torch.full(roll.mask.shape, 0.1)  # no more than UNCERTAIN
    entropy[0, [at["red"], at["ones"], at["c"], at["answer"], 0]] = 0.11
    found = study.look(1, None, None, roll, train_small.Scored(None, entropy), None)
    ends = sapo.ends_by_entropy(entropy, roll.mask)[0].nonzero()[:, 0].tolist()[:-1]  # the last one is given
    hits = len(decide & set(ends))
    assert found == dict(idle=3 / 5, precision=hits / len(ends), recall=hits / 6, chance=6 / n) and hits >= 2
    shorter = roll._replace(mask=roll.mask.clone())
    shorter.mask[0, at["answer"]:] = False
    found = study.look(1, None, None, shorter, train_small.Scored(None, entropy), None)
    assert (found["idle"], found["chance"]) == (2 / 4, 6 / at["answer"])
    right = roll.texts[0].replace("= 11\n11", "= 10\n10").replace("= 6", "= 5").replace("> 6", "> 5")
    texts = [roll.texts[0], right, right.replace("> 5", "> 4"), "so", right.replace("red 3,", "red 8,")]
    task = train_small.Task(None, roll.problems * 5, "", toy_env.reward)
    assert study.errors(task, texts) == dict(answer=0.2, format=0.2, result=0.2)  # the last one is right


def test_ends_and_roles_by_hand(slipped):
    roll, at = slipped
    ends = torch.zeros_like(roll.mask)
    ends[0, [at["red"], at["tens"], at["c"], -1]] = True  # the last end is given: 2 of 3 are right
    decisions = {at[k] for k in ("red", "blue", "green", "tens", "ones", "result")}
    assert credit.quality_of_ends(roll, ends) == dict(precision=2 / 3, recall=2 / len(decisions))
    weights = torch.arange(float(roll.mask.shape[1]))[None]
    assert credit.weights_by_kind(roll, weights) == {
        "true reading": statistics.fmean(at[k] for k in ("red", "blue", "green")), "computed": at["result"],
        "copied": statistics.fmean(at[k] for k in ("a", "b", "c", "d", "e")),
        "false result": (at["tens"] + at["ones"]) / 2}


def test_random_ends_are_as_many_elsewhere_and_uniform_on_the_device_of_the_mask(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    mask = torch.arange(13) < torch.randint(1, 14, (50, 1), generator=rng)
    ends, last = sapo.ends_by_entropy(torch.rand(50, 13, generator=rng), mask), sapo.ends_once(mask)
    drawn = torch.stack([credit.random_ends(ends, mask, rng) for _ in range(200)])
    assert (drawn.sum(2) == ends.sum(1)).all() and not (drawn & ~mask).any() and (drawn & last).any(2).all()
    inner = mask & ~last
    expected = ((ends.sum(1) - 1) / inner.sum(1).clamp(min=1))[:, None].expand_as(mask)
    assert ((drawn.float().mean(0) - expected)[inner].abs() < 0.17).all()  # 5 standard errors
    monkeypatch.setattr(sapo, "ends_once", lambda mask: mask & False)  # its checks look at the data
    mask = torch.ones(3, 5, dtype=torch.bool, device="meta")
    assert credit.random_ends(mask, mask, torch.Generator()).device == mask.device


def test_value_error_is_freed_of_sampling_noise():
    g = torch.Generator().manual_seed(0)
    truth = torch.rand(4000, generator=g, dtype=torch.float64)
    mc = torch.bernoulli(truth.expand(credit.CONTINUATIONS, -1), generator=g).mean(0)
    v = truth + 0.1 + 0.2 * torch.randn(4000, generator=g, dtype=torch.float64)
    found = credit.value_errors([(m, {"critic": x}) for m, x in zip(mc.tolist(), v.tolist())], "critic")
    assert found["value_error"] == pytest.approx(0.1**2 + 0.2**2, abs=0.003)
    assert found["value_bias"] == pytest.approx(0.1, abs=0.02)
    assert found["value_ev"] == pytest.approx(1 - 0.2**2 * 12, abs=0.04)  # a uniform's variance is 1 / 12


def test_monte_carlo_of_a_finished_answer_is_its_outcome():
    config = train_small.complete(train_small.Config(operands=2, device="cpu"))
    policy, processor, *_ = train_small.load(config)
    torch.manual_seed(0)
    task, problems = train_small.toy_task(config), toy_env.make_problems(12, operands=2)
    roll = train_small.rollout(policy, processor, task, problems, config.max_tokens)
    outcomes, lengths = roll.outcome().tolist(), roll.mask.sum(1).tolist()
    for outcome in (0.0, 1.0):
        row = outcomes.index(outcome)
        first, last = (credit.monte_carlo(policy, processor, roll, row, t, config.max_tokens)
                       for t in (0, lengths[row] - 2))
        assert last == pytest.approx(outcome, abs=0.05) and abs(first - outcome) > 0.02


def test_the_credit_study_runs_on_the_miniature(mini, monkeypatch):
    for name, value in dict(CHECKPOINTS=(1,), PROMPTS=2, PREFIXES=4, CONTINUATIONS=2).items():
        monkeypatch.setattr(credit, name, value)
    options = dict(SMALL, algo="sapo", model=str(mini), iterations=1, critic_warmup=0, lr=1e-4, device="cpu")
    found = credit.measure(options)
    assert {row["part"] for row in found["rows"]} >= {"values", "ends", "policy"}
    assert {row["who"] for row in found["rows"] if row["part"] == "values"} == set(credit.CRITICS)
    assert set(found["points"][1]) == {"start", "last"} and len(found["points"][1]["last"]) == 4


def test_a_slip_is_drawn_with_a_line_for_each_method(slipped):
    roll, at = slipped
    rows = {name: torch.linspace(-1, 1, len(roll.pieces[0])) for name in ("grpo", "sapo")}
    figure = credit.draw_slip(roll.pieces[0], [at["tens"], at["ones"]], rows, roll.mask[0].tolist())
    assert [axis.get_ylabel() for axis in figure.axes] == ["GRPO", "SAPO"]
    assert "".join(text.get_text() for text in figure.axes[1].texts) == "".join(
        piece.strip(" ").replace("\n", "↵") for piece in roll.pieces[0])


def test_a_trained_model_is_judged_with_each_methods_own_lambda(mini):
    saved = train_small.complete(train_small.Config(model=str(mini), device="cpu"))
    assert saved.lam == 0.99  # your own model: the paper's
    found = {name: credit.settings_of(name, asdict(saved)) for name in credit.CRITICS}
    assert {name: (x.lam, x.lam_returns) for name, x in found.items()} == {
        "sapo": (0.9, None), "sapo, V at last": (0.9, None), "ppo": (0.95, None), "vc-ppo": (0.99, 1.0)}


@pytest.mark.parametrize("algo", ["sapo", "grpo"])
def test_bench_times_the_phases_of_the_miniature(algo, mini, capsys):
    seconds = bench.bench(train_small.Config(**SMALL, algo=algo, model=str(mini), device="cpu"), repeats=1)
    expected = {"sampling", "outcome", "scoring", "algorithm", "update", "bare generate", "bare forward",
                "bare forward + backward"}
    assert set(seconds) == expected | ({"critic"} if algo == "sapo" else set())
    assert min(seconds.values()) > 0 and "responses/s" in capsys.readouterr().out


def test_bench_compares_the_maths_with_slow_loops(capsys):
    assert f": {bench.maths(repeats=1):.0f} times as fast" in capsys.readouterr().out
