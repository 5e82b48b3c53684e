"""Where the credit goes: what the papers argue, measured where the truth about each statement is known.

    python -m results.credit --workers 2     makes credit.csv, wordy-credit.csv and their tables in README.md
    python -m results.credit show RUN        one response, coloured by who blames what: credit.png
                                             (RUN: a folder that train_small.py has written with --save)

SAPO trains the policy. Beside it the other CRITICS learn from the same rollouts, with as many updates. At
CHECKPOINTS, on fresh rollouts of the same policy, each method assigns credit, and we measure

1. blame: does -A point at the one false statement of a wrong response?
2. values: V against the mean outcome of CONTINUATIONS samples from the same prefix (Monte Carlo)
3. ends: are the ends of segments at decision points, the digits of readings and results?
4. roles: SRPO's weights, by kind of statement
"""

import itertools
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import sapo
import srpo
import toy_env
import train_small
from results import study
from support import run_folder
from support.options import difficulty

SEEDS = 5
CHECKPOINTS = (5, 10, 20, 40)  # iterations
PROMPTS, GROUP = 64, 8  # rollouts of a checkpoint
PREFIXES, CONTINUATIONS = 64, 64  # of each kind of state
WORLDS = {"": {}, "wordy-": study.FILLER}  # what begins the names of a world's tables and CSV → its options
CRITICS = {"sapo": {}, "sapo, V at last": dict(value_at="last"), "ppo": {}, "vc-ppo": {}}
KINDS = {"true reading": ("reading", True), "false reading": ("reading", False), "copied": ("operand", True),
         "computed": ("result", True), "false result": ("result", False)}  # → statement's kind, and truth
TABLES = {  # part → caption, and its columns: measure → iterations
    "blame": ("How often −Â points at the one false statement", {
        "auroc_tokens": [10], "auroc_statements": [10], "top1_statements": [10]}),
    "values": ("V before a segment's first token, against Monte Carlo: squared error, explained variance", {
        "value_error_start": [10, 40], "value_ev_start": [10]}),
    "ends": ("Ends of segments at decisions, the digits of readings and results", {
        "precision": [5, 40], "recall": [5, 40]}),
    "roles": ("SRPO's weights on digits, 1 on average", {kind: [10] for kind in KINDS}),
}


# ------------------------------------------------------------------------------------------ four measurements
def blame(roll: train_small.Rollout, advantages: torch.Tensor) -> tuple[int, dict]:
    """-A as a pointer to the slip, within responses: how many could be judged, and means of toy_env.blame."""
    judged = map(toy_env.blame, roll.problems, roll.texts, roll.pieces, advantages.tolist())
    judged = [found for found in judged if found]
    names = ("auroc_tokens", "auroc_statements", "top1_statements")
    return len(judged), {name: fmean(values) for name, values in zip(names, zip(*judged))}


@torch.no_grad()
def monte_carlo(policy, processor, roll: train_small.Rollout, row: int, t: int, max_tokens: int) -> float:
    """The mean outcome of CONTINUATIONS samples after the first t tokens of a response."""
    prompt = train_small.take(roll.inputs, roll.prompts[[row]])
    prefix = roll.ids[row : row + 1, :t]
    inputs = train_small.full_inputs(prompt, prefix, torch.ones_like(prefix))
    inputs = {k: x.repeat(CONTINUATIONS, *[1] * (x.dim() - 1)) for k, x in inputs.items()}
    settings = dict(do_sample=True, top_k=0, suppress_tokens=train_small.banned_ids(policy) or None)
    ids = policy.generate(**inputs, **settings, max_new_tokens=max_tokens - t)
    responses = ids[:, prompt["input_ids"].shape[1] :]
    _, texts = train_small.read_tokens(processor.tokenizer, responses, torch.ones_like(responses).bool())
    return fmean(toy_env.reward(roll.problems[row], text) for text in texts)


def value_points(policy, processor, roll, values: dict, states: torch.Tensor, max_tokens: int, rng) -> list:
    """PREFIXES of the states (B, T), each of another response: [[Monte-Carlo value, {critic: V}], …]."""
    points = []
    for row in torch.randperm(len(roll.ids), generator=rng)[:PREFIXES].tolist():
        candidates = states[row].nonzero().flatten().tolist()
        t = candidates[int(torch.randint(len(candidates), (), generator=rng))]
        truth = monte_carlo(policy, processor, roll, row, t, max_tokens)
        points.append([round(truth, 4), {name: round(float(v[row, t]), 4) for name, v in values.items()}])
    return points


def value_errors(points: list, name: str) -> dict:
    """Mean squared error and explained variance of V against the Monte-Carlo value, both freed of sampling
    noise, which is p (1 - p) / (n - 1) in expectation; and the bias, mean of V - MC."""
    truth, v = (torch.tensor(x, dtype=torch.float64) for x in zip(*((p, vs[name]) for p, vs in points)))
    noise = (truth * (1 - truth) / (CONTINUATIONS - 1)).mean()
    residual, spread = (v - truth).var() - noise, truth.var() - noise
    return dict(value_error=float(((v - truth) ** 2).mean() - noise), value_bias=float((v - truth).mean()),
                value_ev=float(1 - residual / spread))


def quality_of_ends(roll: train_small.Rollout, ends: torch.Tensor) -> dict:
    """Precision and recall of the ends at digits of readings and results; a response's last end is given."""
    decisions = study.decisions(roll)
    chosen = set(map(tuple, (ends & ~sapo.ends_once(roll.mask)).nonzero().tolist()))
    hits = len(chosen & decisions)
    return dict(precision=hits / max(1, len(chosen)), recall=hits / max(1, len(decisions)))


def random_ends(ends: torch.Tensor, mask: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """As many ends per response, elsewhere. rng: of the CPU, so that every device draws the same."""
    last = sapo.ends_once(mask)
    order = torch.rand(mask.shape, generator=rng).to(mask.device).masked_fill(~mask | last, -1)
    rank = order.argsort(1, descending=True).argsort(1)
    return (rank < (ends & ~last).sum(1, keepdim=True)) & mask | last


def weights_by_kind(roll: train_small.Rollout, weights: torch.Tensor) -> dict:
    """SRPO's mean weight on the digits of readings, of operands (copied) and of results (computed)."""
    weights = weights.tolist()
    found = study.gather((kind, weights[row][t]) for row, t, kind in study.digits(roll))
    return {name: fmean(found[kind]) for name, kind in KINDS.items() if kind in found}


# -------------------------------------------------------------------------------------------------- the study
def settings_of(name: str, options: dict) -> train_small.Config:
    """The full config of a critic's name, with its own λ, wherever the model lies."""
    algo = name.split(",")[0]
    own = dict(algo=algo, lam=study.OWN_LAMBDA[algo], lam_returns=None) | CRITICS[name]
    return train_small.complete(train_small.Config(**options | own))


def measure(options: dict) -> dict:
    """Train with SAPO and measure at the checkpoints: rows (iteration, part, who, measure, value, n), and the
    points (Monte-Carlo value, {critic: V}) of each checkpoint."""
    config, seed = settings_of("sapo", options), options["seed"]
    torch.manual_seed(seed)
    others = {}
    for name in list(CRITICS)[1:]:
        other = settings_of(name, options)
        policy, processor, critic, _ = train_small.load(other)
        others[name] = other, critic, train_small.make_optimizers(other, policy, critic)[1:]
    held_out = toy_env.make_problems(PROMPTS * len(CHECKPOINTS), seed=1 + seed, split="eval",
                                     **difficulty(config))
    rows, points = [], {}

    def watch(i, policy, critic, roll, scored, credit):
        with torch.random.fork_rng():  # measuring changes nothing in training
            torch.manual_seed(1000 * seed + i)
            for other, its_critic, optimizers in others.values():
                inputs = train_small.take(roll.inputs, roll.prompts)
                with torch.no_grad():
                    values = train_small.value(its_critic, inputs, roll.ids, roll.mask)
                its = scored._replace(values=values)
                aims = train_small.assign_credit(other, policy, processor, roll, its, roll.outcome())
                train_small.update(other, policy, its_critic, optimizers, roll, its, aims,
                                   train_small.draw_plan(other, roll), learn_policy=False)
            if i in CHECKPOINTS:
                critics = {"sapo": critic} | {name: its_critic for name, (_, its_critic, _) in others.items()}
                problems = held_out[CHECKPOINTS.index(i) * PROMPTS :][:PROMPTS]
                found, points[i] = checkpoint(config, policy, processor, critics, problems, i)
                rows.extend(dict(seed=seed, iteration=i, **row) for row in found)

    with tempfile.TemporaryDirectory() as out:
        train_small.learn(train_small.prepare(replace(config, out=out)), watch)
    return dict(rows=rows, points=points)


def checkpoint(config, policy, processor, critics: dict, problems: list, seed: int) -> tuple[list, dict]:
    """All four measurements on fresh rollouts of one policy."""
    rng = torch.Generator().manual_seed(seed)
    problems = [p for p in problems for _ in range(GROUP)]
    task = train_small.toy_task(replace(config, eval_problems=1))
    roll = train_small.rollout(policy, processor, task, problems, config.max_tokens)
    scored = {name: train_small.score_all(config, policy, None, its, roll) for name, its in critics.items()}
    outcome, values = roll.outcome(), {name: its.values for name, its in scored.items()}
    advantages, weights, ends = credit_by_method(config, policy, processor, roll, scored, outcome)
    points, any_rewards = {}, values["sapo"]
    for kind in ("start", "last"):
        states = sapo.segment_gae(any_rewards, any_rewards, ends["entropy"], roll.mask, value_at=kind)[2]
        points[kind] = value_points(policy, processor, roll, values, states, config.max_tokens, rng)
    ends["random"] = random_ends(ends["entropy"], roll.mask, rng)
    found = [("blame", name, *blame(roll, a)) for name, a in advantages.items()]
    for name, (kind, its) in itertools.product(values, points.items()):
        errors = {f"{what}_{kind}": value for what, value in value_errors(its, name).items()}
        found.append(("values", name, len(its), errors))
    found += [("ends", name, len(problems), quality_of_ends(roll, marked)) for name, marked in ends.items()]
    found += [("roles", name, len(problems), weights_by_kind(roll, w)) for name, w in weights.items()]
    found.append(("policy", "sapo", len(problems), dict(reward=float(outcome.mean()))))
    return [dict(part=part, who=who, measure=what, value=value, n=n)
            for part, who, n, measures in found for what, value in measures.items()], points


def credit_by_method(config, policy, processor, roll, scored: dict, outcome) -> tuple[dict, dict, dict]:
    """Each method's advantages, SRPO's weights and SAPO's kinds of ends on one rollout, all (B, T)."""
    same, group = scored["sapo"], srpo.group_advantages(outcome, GROUP)

    def weigh(**variant):
        plan = train_small.Plan(int(torch.randint(2**31, ())), [torch.arange(len(roll.ids))], [])
        its = replace(config, **variant)
        return train_small.weigh_roles(its, policy, processor, roll, same, group, plan)[0]

    weights = {contrast: weigh(contrast=contrast) for contrast in ("blank", "blind")}
    group_weights = {"grpo": roll.mask.float(), "srpo": weights["blind"], "srpo, blank": weights["blank"],
                     "srpo, blank, sign-aware": weigh(contrast="blank", sign_aware=True)}
    advantages = {name: srpo.srpo_advantages(group, w) for name, w in group_weights.items()}
    for name, its in scored.items():
        own = settings_of(name, asdict(config) | dict(kl_coef=0.0))  # the outcome alone
        advantages[name] = train_small.assign_credit(own, policy, processor, roll, its, outcome).advantages
    ends = {kind: train_small.segment_ends(replace(config, segments=kind), roll, same)
            for kind in train_small.SEGMENTS}
    return advantages, weights, ends


def rows_of(world: str, workers: int = 1, seeds: int = SEEDS) -> list[dict]:
    """The rows of a world's CSV: all measurements, of all seeds. What is missing is measured first."""
    jobs = [dict(study.setting("sapo", **WORLDS[world]), seed=seed) for seed in range(seeds)]
    rows = [row for run in study.kept(jobs, measure, workers, kind="credit") for row in run["rows"]]
    columns = ("seed", "iteration", "part", "who", "measure", "value", "n")
    return [{c: round(row[c], 4) if c == "value" else row[c] for c in columns} for row in rows]


def table(part: str, rows: list[dict]) -> str:
    """The table of one of the four measurements in Markdown."""
    (caption, measures), wide = TABLES[part], {}
    for r in (r for r in rows if r["part"] == part):
        mine = wide.setdefault((r["who"], r["seed"]), dict(label=r["who"], seed=r["seed"]))
        mine[f"{r['measure']}, it. {r['iteration']}"] = r["value"]
    columns = [f"{measure}, it. {i}" for measure, iterations in measures.items() for i in iterations]
    lines = {who: [study.cell([r.get(c) for r in its]) for c in columns] for who, its in study.gather(
        (r["label"], r) for r in wide.values()).items()}
    seeds = len({r["seed"] for r in rows})
    said = f"{caption}: `python -m results.credit`, {seeds} seeds, with 95 % intervals."
    return study.markdown(said, [c.replace("_", " ") for c in columns], lines)


def credit(world: str, workers: int = 1, seeds: int = SEEDS) -> str:
    """Measure what is missing; write a world's CSV and tables; return the tables."""
    rows = rows_of(world, workers, seeds)
    study.pack()
    tables = {world + part: table(part, rows) for part in TABLES}
    study.publish(f"{world}credit", rows, tables)
    return "\n\n".join(tables.values())


# ----------------------------------------------------------------------------------------------- one response
def show(folder: str) -> None:
    """One real response with one slip, its tokens coloured by the advantages that each method gives them, as
    in SAPO's Fig. 1. All methods see the same response, group and critic."""
    folder = Path(folder)
    saved = run_folder.settings(folder, train_small.Config, "RUN")["config"]
    saved |= dict(algo="sapo", model=str(folder / "model"), device=None)
    config = train_small.complete(train_small.Config(**saved))
    policy, processor, critic, _ = train_small.load(config)
    critic.load_state_dict(torch.load(folder / "critic.pt", weights_only=True, map_location=config.device))
    torch.manual_seed(0)
    task = train_small.toy_task(config)
    problems = [p for p in task.held_out[:PROMPTS] for _ in range(GROUP)]
    roll = train_small.rollout(policy, processor, task, problems, config.max_tokens)
    outcome, scored = roll.outcome(), train_small.score_all(config, policy, None, critic, roll)
    both = dict(ppo=scored, sapo=scored)
    advantages, _, ends = credit_by_method(config, policy, processor, roll, both, outcome)
    i, slip = one_slip(roll, outcome)
    pieces = roll.pieces[i]
    rows = {name: advantages[name][i, : len(pieces)].cpu() for name in ("grpo", "srpo", "ppo", "sapo")}
    figure = draw_slip(pieces, toy_env.tokens_of(slip, pieces), rows, ends["entropy"][i].tolist())
    figure.suptitle(f"{roll.problems[i].question} Who is blamed for the slip (boxed)?\nRed: advantage below "
                    "0, blue: above, each method on a scale of its own. Lines: SAPO's segments", fontsize=10)
    figure.savefig(study.HERE / "credit.png", dpi=110)


def one_slip(roll: train_small.Rollout, outcome: torch.Tensor) -> tuple[int, toy_env.Statement]:
    """The first wrong response with one false statement, early, and a group with both outcomes."""
    mixed = (srpo.group_advantages(outcome, GROUP) != 0).tolist()
    for i, (problem, text) in enumerate(zip(roll.problems, roll.texts)):
        false = toy_env.false_statements(problem, text)
        early = len(false) == 1 and false[0].kind == "result" and false[0].end < 0.7 * len(text)
        if outcome[i] == 0 and mixed[i] and early:
            return i, false[0]
    raise SystemExit("no wrong response with a single early slip: try a longer chain or fewer iterations")


def draw_slip(pieces: list, slip: list, rows: dict, ends: list) -> Figure:
    """Two lines of tokens for each method. slip: indices of the boxed tokens; ends: True at SAPO's ends."""
    shown = [piece.strip(" ").replace("\n", "↵") for piece in pieces]
    half = len(shown) // 2
    widths = [len(piece) + 0.8 for piece in shown]
    lefts = [x for line in (widths[:half], widths[half:])
             for x in itertools.accumulate(line[:-1], initial=0.0)]
    figure = Figure(figsize=(9, 1.0 * len(rows) + 0.6), layout="constrained")
    for axis, (name, advantages) in zip(figure.subplots(len(rows), 1), rows.items()):
        levels = (advantages / advantages.abs().max()).tolist()
        for t, (x, width, piece, level) in enumerate(zip(lefts, widths, shown, levels)):
            y = 1 if t < half else 0
            colour = matplotlib.colormaps["RdBu"](0.5 + 0.4 * level)
            axis.add_patch(Rectangle((x, y + 0.05), width, 0.9, color=colour, lw=0))
            axis.text(x + width / 2, y + 0.48, piece, ha="center", va="center", fontsize=9,
                      color="white" if abs(level) > 0.8 else "black")
            if name == "sapo" and ends[t]:
                axis.vlines(x + width, y + 0.05, y + 0.95, color="black", lw=1.2)
            if t in slip:
                axis.add_patch(Rectangle((x, y + 0.05), width, 0.9, fill=False, lw=2.2, zorder=3))
        longest = max(x + width for x, width in zip(lefts, widths))
        axis.set(xlim=(0, longest), ylim=(0, 2), xticks=[], yticks=[], ylabel=name.upper())
        axis.spines[:].set_visible(False)
    return figure


def main() -> None:
    parser = study.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=1, help="seeds side by side, one core each")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("show").add_argument("run", help="a folder written by train_small.py --save")
    with run_folder.one_line("results.credit", ValueError, OSError):
        options = parser.parse_args()
        run_folder.expect(options.workers >= 0, "workers", options.workers, "0 or more")
        run_folder.expect(options.seeds >= 1, "seeds", options.seeds, "1 or more")
        if options.command == "show":
            show(options.run)
    if options.command is None:
        for world in WORLDS:
            print(credit(world, options.workers, options.seeds), end="\n\n")


if __name__ == "__main__":
    main()
