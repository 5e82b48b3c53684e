"""README.md names functions, tests and numbers: each must be there."""

import csv
import inspect
import json
import re
import statistics
from pathlib import Path

import pytest

import sapo
import srpo
import train_small
from results import study

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_equation_table_names_functions_that_cite_their_equation_and_tests_that_exist():
    rows = re.findall(r"^\| ([^|]+), [^|]+ \| `(\w+)\.(\w+)` \| `(\w+)` \|$", README, re.M)
    tests = re.findall(r"^def (test_\w+)", (ROOT / "test_sapo.py").read_text(encoding="utf-8"), re.M)
    assert len(rows) == 19
    for numbers, module, name, test in rows:
        source = inspect.getsource(getattr({"sapo": sapo, "srpo": srpo}[module], name))
        assert test in tests, test
        for number in re.findall(r"\b\d+(?:\.\d+)*", numbers):
            cited = rf"\b(Eq\.|Section|Table|\(S)[^.;]*(?<![\d.]){re.escape(number)}(?!\d)"
            assert re.search(cited, source), (name, number)


def test_every_public_function_of_the_paper_is_in_the_table():
    named = set(re.findall(r"`(?:sapo|srpo)\.(\w+)`", README))
    public = {name for module in (sapo, srpo) for name, x in vars(module).items()
              if inspect.isfunction(x) and x.__module__ == module.__name__ and not name.startswith("_")}
    assert public - named <= {"ends_every_token", "ends_once", "whiten", "explained_variance",  # not the paper's
                              "split_roles", "corrupt_image", "blank_perception"}              # no equation


def test_results_are_those_of_the_csvs():
    """Each `mean (low–high)` of a row is an interval of the study that the row names."""
    figure = re.compile(r"(\d\.\d{3}) \((?:min–max )?(\d\.\d{3})–(\d\.\d{3})\)")
    checked = differences = 0
    for row in re.findall(r"^\| .+ \| (.+) \| `([\w-]+)` \|$", section("What came out"), re.M):
        by_label = {}
        with open(ROOT / "results" / f"{row[1]}.csv") as file:
            for run in csv.DictReader(file):
                by_label.setdefault(run["label"], []).append(float(run["accuracy_sampled"]))
        found = {tuple(f"{x:.3f}" for x in study.interval(values)) for values in by_label.values()}
        for numbers in figure.findall(row[0]):
            assert numbers in found, (row[1], numbers)
            checked += 1
        tables = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
        table = tables.split(f"<!-- table {row[1]} -->")[1].split("<!-- end -->")[0]
        for numbers in re.findall(r"[+-]\d\.\d{3} \([+-]\d\.\d{3} to [+-]\d\.\d{3}\)", row[0]):
            assert numbers in table, (row[1], numbers)
            differences += 1
        assert ("min–max" in row[0]) == (max(map(len, by_label.values())) == 3)
    assert checked == len(figure.findall(section("What came out"))) > 15 and differences > 10


def test_first_table_is_that_of_the_committed_runs():
    histories = [[json.loads(line) for line in open(ROOT / "results" / f"sapo-{seed}.jsonl")] for seed in range(3)]
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
    assert set(re.findall(r"--[a-z][\w-]+", section("Options"))) <= fields | {"--help"}
    logged = set().union(*(json.loads(line) for line in open(ROOT / "results" / "sapo-0.jsonl")))
    for row in re.findall(r"^\| (`.+?) \| ", section("Metrics"), re.M):
        stem, *endings = re.findall(r"`(\w+)`", row)
        names = [stem] + [stem.rsplit("_", 1)[0] + ending for ending in endings]
        assert set(names) <= logged, names


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!http)[^)]+)\)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()
