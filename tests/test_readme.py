"""README.md names functions, tests and numbers: each must be there."""

import csv
import inspect
import json
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch

import sapo
import srpo
import train_small
from results import forest, study

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_equation_table_names_functions_that_cite_their_equation_and_have_a_test():
    rows = re.findall(r"\| ([^|]+?), [^|]+? \| `(\w+)\.(\w+)` ", README)
    tests = re.findall(r"^def (test_\w+)", (ROOT / "test_sapo.py").read_text(encoding="utf-8"), re.M)
    assert len(rows) == 19
    for numbers, module, name in rows:
        source = inspect.getsource(getattr({"sapo": sapo, "srpo": srpo}[module], name))
        kind = re.match(r"Eq|section|Table|\(S", numbers)[0].lower()
        for number in re.findall(r"\b\d+(?:\.\d+)*|(?<=\(S)\d", numbers):
            cited = rf"(\b(Eq\.|Section|Table)|\(S)[^.;]*(?<![\d.]){re.escape(number)}(?!\d)"
            assert re.search(cited, source), (name, number)
            own = rf"_{dict(eq='eq', section='sec', table='table').get(kind)}{number.replace('.', '')}_"
            own = name.split("_")[-1] if kind == "(s" else "critic" if number == "4.1.2" else own
            assert any(own in test for test in tests), (name, own)


def test_every_public_function_of_the_paper_is_in_the_table():
    named = set(re.findall(r"`(?:sapo|srpo)\.(\w+)`", README))
    public = {name for module in (sapo, srpo) for name, x in vars(module).items()
              if inspect.isfunction(x) and x.__module__ == module.__name__ and not name.startswith("_")}
    assert public - named <= {"ends_every_token", "ends_once", "whiten", "explained_variance",
                              "split_roles", "corrupt_image", "blank_perception"}  # no equation of a paper


def test_results_are_those_of_the_csvs():
    """Each signed figure of a sentence is a difference of two labels of the study that is named next."""
    text, figure = section("What came out"), r"[+-][\d.]+ \([+-][\d.]+ to [+-][\d.]+\)"
    for said, name in (found := re.findall(rf"({figure}).*?`([a-z][\w-]+)`", text)):
        with open(ROOT / "results" / f"{name}.csv") as file:
            rows = [row | dict(accuracy=float(row["accuracy_sampled"])) for row in csv.DictReader(file)]
        of = lambda label: [row for row in rows if row["label"] == label]
        pairs = [study.paired(*map(of, pair), "accuracy") for pair in study.STUDIES[name].pairs]
        assert said in map(study.difference, pairs), (name, said)
    assert len(found) == len(re.findall(figure, text)) == 8


def test_the_forest_says_better_only_where_the_interval_is_above_0():
    verdicts = {claim.says: forest.verdict(*forest.measured(claim)[1:]) for claim in forest.CLAIMS}
    assert len(verdicts) == len(forest.CLAIMS) and {*verdicts.values()} == {*forest.STYLE}
    for claim in forest.CLAIMS:  # as the study's own table has it
        with open(ROOT / "results" / f"{claim.study}.csv") as file:
            rows = [row | dict(accuracy=float(row["accuracy_sampled"])) for row in csv.DictReader(file)]
        both = ([row for row in rows if row["label"] == label] for label in (claim.ours, claim.theirs))
        said = "{:+.3f} ({:+.3f} to {:+.3f})".format(*forest.measured(claim))
        assert said == study.difference(study.paired(*both, "accuracy")), claim.says


def test_first_table_is_that_of_the_committed_runs():
    files = [ROOT / "results" / f"sapo-{seed}.jsonl" for seed in range(3)]
    histories = [[json.loads(line) for line in open(file)] for file in files]
    rows = re.findall(r"^\| (accuracy|faithful|blame)(.*?) \| (.*) \|$", section("Run it"), re.M)
    names = ["accuracy_greedy", "accuracy_paper", "accuracy_sampled", "faithful_sampled", "blame_auroc"]
    assert len(rows) == len(names)
    for name, (*_, cells) in zip(names, rows):
        last = [h[-1].get(name) for h in histories]
        if name == "blame_auroc":
            last = [statistics.fmean(r[name] for r in h if r.get(name) is not None) for h in histories]
        before = [] if name == "blame_auroc" else [histories[0][0][name]]
        assert re.findall(r"[\d.]+", cells) == [f"{x:.3f}" for x in before + last]


def test_options_and_metrics_exist():
    fields = {f"--{name.replace('_', '-')}" for name in train_small.Config.__dataclass_fields__}
    assert set(re.findall(r"--[a-z][\w-]+", section("Options"))) <= fields | {"--help", "--help-all"}
    logged = set().union(*(json.loads(line) for line in open(ROOT / "results" / "sapo-0.jsonl")))
    method = (ROOT / "results" / "METHOD.md").read_text(encoding="utf-8")
    table = method.split("\n## Metrics\n")[1].split("\nOnly in the studies")[0]
    for row in re.findall(r"^\| (`(?:reward|acc|first|expl|blame|entropy).+?) \| ", table, re.M):
        stem, *endings = re.findall(r"`(\w+)`", row)
        names = [stem] + [stem.rsplit("_", 1)[0] + ending for ending in endings]
        assert set(names) <= logged, names


def test_the_worked_response_is_what_sapo_prints(capsys):
    sapo._worked_response()
    assert f"```\n{capsys.readouterr().out}```" in README


def test_both_layouts_to_copy_give_the_same_ends():
    code = re.search("```python\n(.*?)```", section("Copy it"), re.S)[1]
    g = torch.Generator().manual_seed(0)
    ids, logits = torch.randint(5, (3, 9), generator=g), torch.randn(3, 9, 5, generator=g)
    given = dict(vars(sapo), ids=ids, logits=logits, critic_output=torch.randn(3, 9, generator=g), T=4,
                 mask=(torch.arange(9) > 4) & (torch.arange(9) < torch.tensor([[9], [7], [6]])))
    first, second = code.split("# the response alone")
    exec(first, whole := dict(given))
    exec("#" + second, alone := dict(given))
    names = "ends", "log_probs", "entropy", "values"
    for name, x, y in ((name, whole[name], alone[name]) for name in names):
        assert torch.equal(x[:, 4:], y) and (name != "ends" or not x[:, :4].any()), name
    for b, t in ((0, 5), (1, 6), (2, 5)):  # a response token's log-probability is said one position before
        assert alone["log_probs"][b, t - 5] == logits[b, t - 1].log_softmax(0)[ids[b, t]]
    assert torch.equal(whole["mask_of_row"][:, 4:], alone["mask_of_response"])


def test_your_own_problems_and_reward_train(mini, tmp_path, monkeypatch, capsys):
    code = re.search("```python\n(.*?)```", section("Your own model and data"), re.S)[1]
    drawn = [train_small.toy_env.make_problem(i) for i in range(72)]
    monkeypatch.setattr(sys, "argv", f"mine.py --model {mini} --max-tokens 9 --responses 8 --iterations 1 "
                        f"--critic-warmup 0 --device cpu --out {tmp_path}/run".split())
    exec(code, dict(my_rows=[(p.image, p.question, p.answer) for p in drawn]))
    assert "accuracy_greedy" in capsys.readouterr().out and (tmp_path / "run" / "curves.png").exists()


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!http)[^)]+)\)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link.split("#")[0]).exists()
