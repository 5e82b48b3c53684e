"""Turn the knobs: who is blamed for a slip, in one page that any browser opens from disk.

    python -m results.page RUN      writes RUN/credit.html (RUN: a folder that train_small.py has written with
                                    --save, by a method with a critic)
    python -m results.page PAGE     writes such a page anew: its own data, in the template as it is now

The page holds about a dozen responses and what credit is made of: entropy, values, log-probs, contrasts and
outcomes. Its script, in page.html, works out the credit: sapo.py's and srpo.py's equations once more, in
JavaScript; tests/test_page.py holds them to the originals, in a browser.
"""

import base64
import copy
import hashlib
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import torch

import sapo
import srpo
import toy_env
import train_small
from results import credit, study
from support import run_folder
from support.options import difficulty

KINDS = "right", "right by luck", "one slip, early", "one slip, late", "a misread cell"
EACH = 2  # responses of a kind
SAME = "one problem"  # at all stages of training
LARGEST = 900_000  # bytes of the page


def stages(config: train_small.Config, folder: Path) -> tuple:
    """The policies {iteration: policy}, before training, at the first checkpoint if any was kept, and after;
    the processor; and the trained critic, for the responses of all: before training it predicts 0."""
    before, processor, critic, _ = train_small.load(config)
    critic.load_state_dict(torch.load(folder / "critic.pt", weights_only=True, map_location=config.device))
    policies = {0: before}
    for iteration, path in run_folder.checkpoints(folder)[:1]:
        if iteration < config.iterations:
            kept = torch.load(path, weights_only=True, map_location=config.device)
            policies[iteration] = copy.deepcopy(before)
            policies[iteration].load_state_dict(kept["policy"])
    after, *_ = train_small.load(replace(config, model=str(folder / "model")))
    return policies | {config.iterations: after}, processor, critic


@torch.no_grad()
def sample(config, policy, processor, critic, later, problems: list) -> tuple[train_small.Rollout, dict]:
    """A group of responses to each problem; and what goes into their credit, all (B, T). later: the policy
    that the ratio compares with the one that sampled."""
    task = train_small.toy_task(replace(config, eval_problems=1))
    problems = [p for p in problems for _ in range(credit.GROUP)]
    roll = train_small.rollout(policy, processor, task, problems, config.max_tokens, config.temperature)
    scored = train_small.score_all(config, policy, None, critic, roll)
    perception, reasoning = srpo.split_roles(roll.pieces, roll.mask)
    blanked = srpo.blank_perception(roll.ids, perception, policy.generation_config.pad_token_id)
    images = [srpo.corrupt_image(p.image, config.corruption, patch=train_small.PATCH, seed=i)
              for i, p in enumerate(problems)]
    corrupted = train_small.see(policy, processor, task, problems, images)

    def score(model, inputs=None, seen=roll.ids):
        its, ids, mask = roll.part(torch.arange(len(problems)), False, inputs)
        return train_small.score(model, its, ids, mask, config.temperature, seen)[0]

    return roll, dict(
        entropy=scored.entropy, values=scored.values, old_log_probs=scored.log_probs,
        log_probs=score(later, train_small.see(later, processor, task, problems)),
        perception=perception, reasoning=reasoning,
        on_image=srpo.contrast(scored.log_probs, score(policy, corrupted), roll.mask),
        on_perception=srpo.contrast(scored.log_probs, score(policy, seen=blanked), roll.mask))


def kind_of(problem: toy_env.Problem, text: str, outcome: float) -> str | None:
    """Which of KINDS a response is: none with several false statements, or one that has no text."""
    judged = toy_env.statements(problem, text)
    false, results = [s for s in judged if not s.true], [s for s in judged if s.kind == "result"]
    if outcome == 1:
        return "right by luck" if false else "right"
    if len(false) != 1 or false[0].start == false[0].end or false[0] in results[1:-1]:
        return None
    early = false[0] in results[:1]
    return {"reading": "a misread cell", "result": KINDS[2 if early else 3]}.get(false[0].kind)


def choose(rolls: dict[int, train_small.Rollout]) -> list[tuple[str, int, int]]:
    """(kind, stage, row). EACH of a kind, the middle of training first, each of another problem, from groups
    with both outcomes, as GRPO's Â is 0 in others; then a problem learned in training, at all stages."""
    outcomes = {stage: roll.outcome() for stage, roll in rolls.items()}
    mixed = {stage: srpo.group_advantages(x, credit.GROUP) != 0 for stage, x in outcomes.items()}
    kinds = {stage: [kind_of(*each) for each in zip(roll.problems, roll.texts, outcomes[stage].tolist())]
             for stage, roll in rolls.items()}
    first, last = min(rolls), max(rolls)
    learned = [i for i, (old, new) in enumerate(zip(kinds[first], kinds[last]))
               if old in KINDS[2:] and new == "right" and mixed[first][i]][:1]
    chosen, used = [], {i // credit.GROUP for i in learned}
    middle_first = sorted(rolls, key=lambda stage: (stage in (first, last), stage))
    places = [(kind, stage, i) for kind in KINDS for stage in middle_first
              for i, found in enumerate(kinds[stage]) if found == kind and mixed[stage][i]]
    for kind, stage, i in places:
        if i // credit.GROUP not in used and sum(kind == other for other, *_ in chosen) < EACH:
            chosen.append((kind, stage, i))
            used.add(i // credit.GROUP)
    return chosen + [(SAME, stage, i) for i in learned for stage in rolls]


def response(roll: train_small.Rollout, figures: dict, i: int) -> dict:
    """What the page knows of a response, as plain numbers and text."""
    problem, text, pieces, png = roll.problems[i], roll.texts[i], roll.pieces[i], io.BytesIO()
    problem.image.save(png, "png")
    T, first = int(roll.mask[i].sum()), i // credit.GROUP * credit.GROUP
    false = [dict(kind=s.kind, text=text[s.start : s.end], tokens=toy_env.tokens_of(s, pieces))
             for s in toy_env.false_statements(problem, text)]
    return dict(
        image="data:image/png;base64," + base64.b64encode(png.getvalue()).decode(),
        cells=", ".join(f"{cell.colour} {cell.number}" for cell in problem.cells), question=problem.question,
        answer=problem.answer, stated=toy_env.stated_answer(text), false=false, pieces=pieces[:T],
        ids=roll.ids[i, :T].tolist(), seat=i - first,
        group=roll.outcome()[first : first + credit.GROUP].tolist(),
        **{name: [float(f"{x:.6g}") for x in figure[i, :T].tolist()] for name, figure in figures.items()})


def render(data: dict) -> str:
    """The page. Texts are data: none can end its element, and no script may run but the page's own. Where
    the responses are too large, the largest are left out."""
    template = (study.HERE / "page.html").read_text(encoding="utf-8")
    script = re.search("<script>(.*?)</script>", template, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

    def dump(x):
        return json.dumps(x, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")

    texts = [dump(r) for r in data["responses"]]
    while sum(map(len, texts)) > LARGEST:
        texts.remove(max(texts, key=len))
    if not texts:
        raise ValueError("responses is []: expected at least one that fits into the page")
    whole = dump({k: x for k, x in data.items() if k != "responses"})[:-1]
    whole += ',"responses":[\n' + ",\n".join(texts) + "\n]}"
    return template.replace("{{digest}}", digest).replace("{{data}}", whole)


def data_of(page: Path) -> dict:
    """What a page was made from."""
    found = re.search('type="application/json">(.*?)</script>', page.read_text(encoding="utf-8"), re.S)
    run_folder.expect(found is not None, "RUN", str(page), "a folder, or a page that was made of one")
    return json.loads(found[1])


def gather(folder: Path) -> dict:
    """The page's data, from a run's folder."""
    saved = run_folder.settings(folder, train_small.Config, "RUN")["config"]
    if saved.get("dataset") or not (folder / "critic.pt").exists():
        raise ValueError(f"RUN is {folder}: expected one on the toy world, with a critic, made with --save")
    if Path(saved["model"]).is_absolute() and not Path(saved["model"]).exists():
        saved["model"] = None  # the run was made on another machine: the shipped one
    config = train_small.complete(train_small.Config(**saved | dict(device=None, kl_coef=0.0)))
    policies, processor, critic = stages(config, folder)
    problems = toy_env.make_problems(credit.PROMPTS, split="eval", **difficulty(config))
    torch.manual_seed(0)
    samples = {stage: sample(config, policy, processor, critic, policies[config.iterations], problems)
               for stage, policy in policies.items()}
    rolls = {stage: roll for stage, (roll, _) in samples.items()}
    end_ids = {}
    for kind in ("newline", "step"):
        ends = [train_small.segment_ends(replace(config, algo="sapo", segments=kind), roll, None)
                & ~sapo.ends_once(roll.mask) for roll in rolls.values()]
        end_ids[kind] = torch.cat([roll.ids[e] for roll, e in zip(rolls.values(), ends)]).unique().tolist()
    return dict(
        run=f"{config.algo}, seed {config.seed}, {config.operands} operands", iterations=config.iterations,
        end_ids=end_ids, responses=[dict(kind=kind, stage=stage, **response(*samples[stage], i))
                                    for kind, stage, i in choose(rolls)])


def main() -> None:
    parser = study.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="a folder written by train_small.py --save, or a page")
    with run_folder.one_line("results.page", ValueError, OSError):
        run = parser.parse_args().run
        run_folder.expect(run.is_file() or (run / "critic.pt").exists(), "RUN", str(run),
                          "a folder with a critic, by --save, or a page")
        data, page = (data_of(run), run) if run.is_file() else (gather(run), run / "credit.html")
        page.write_text(render(data), encoding="utf-8")
        print(f"{len(data['responses'])} responses: {page}")


if __name__ == "__main__":
    main()
