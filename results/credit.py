"""Where the credit goes: what the papers argue, measured where the truth about each statement is known.

    python -m results.study credit --workers 2     the measurements below: results/credit.csv, results/credit_study.png
    python -m results.study show-credit RUN        one response, coloured by who blames what: results/credit.png

SAPO trains the policy. Beside it the other CRITICS learn from the same rollouts, with as many updates. At
CHECKPOINTS, on fresh rollouts of the same policy, each method assigns credit, and we measure

1. blame: does -A point at the one false statement of a wrong response?
2. values: V against the mean outcome of CONTINUATIONS samples from the same prefix (Monte Carlo)
3. borders: are the ends of segments at decision points, the digits of readings and results?
4. roles: SRPO's weights, by kind of statement
"""

import csv
import itertools
import json
import multiprocessing
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

import torch
import transformers

import sapo
import srpo
import toy_env
import train_small
from results import study

SEEDS = 3
CHECKPOINTS = (5, 10, 20, 40)  # iterations
PROMPTS, GROUP = 64, 8  # rollouts of a checkpoint
PREFIXES, CONTINUATIONS = 64, 64  # of each kind of border
CRITICS = {"sapo": {}, "sapo, V at last": dict(value_at="last"), "ppo": {}, "vc-ppo": {}}  # name → options beside algo
COLOURS = {"sapo": "C0", "sapo, V at last": "C9", "ppo": "C1", "vc-ppo": "C2"}


# ------------------------------------------------------------------------------------------------------- statements


def tokens_of(statement, pieces):
    """Indices of the tokens that overlap a statement's characters."""
    ends = list(itertools.accumulate(map(len, pieces)))
    return [t for t, (end, piece) in enumerate(zip(ends, pieces))
            if piece and end - len(piece) < statement.end and end > statement.start]


def number_tokens(statement, pieces):
    """Those of them with a digit."""
    return [t for t in tokens_of(statement, pieces) if any(c.isdigit() for c in pieces[t])]


def slips(roll, rewards):
    """(row, statements, the false one) for each wrong response with exactly one false statement."""
    for row, (problem, text) in enumerate(zip(roll.problems, roll.texts)):
        stated = [s for s in toy_env.statements(problem, text) if s.start < s.end]
        false = toy_env.false_statements(problem, text)
        if rewards[row] == 0 and len(false) == 1 and false[0] in stated and len(stated) > 1:
            yield row, stated, false[0]


def auroc(high, low):
    """Chance that one of `high` is above one of `low`; ties count half."""
    return fmean((a > b) + (a == b) / 2 for a in high for b in low)


# --------------------------------------------------------------------------------------------------- 1. blame


def blame(roll, rewards, advantages):
    """-A as a pointer to the slip, within responses: AUROC of its tokens against all others, AUROC of its mean against
    the other statements', and how often its mean is the lowest of all (ties share). Means over responses."""
    tokens, among, top = [], [], []
    for row, stated, false in slips(roll, rewards):
        a, pieces = advantages[row].tolist(), roll.pieces[row]
        guilty = set(tokens_of(false, pieces))
        tokens.append(auroc([-a[t] for t in guilty], [-a[t] for t in range(len(pieces)) if t not in guilty]))
        means = {s: fmean(a[t] for t in tokens_of(s, pieces)) for s in stated}
        among.append(auroc([-means[false]], [-m for s, m in means.items() if s != false]))
        lowest = [s for s, m in means.items() if m == min(means.values())]
        top.append((false in lowest) / len(lowest))
    return dict(auroc_tokens=tokens, auroc_statements=among, top1_statements=top)


# -------------------------------------------------------------------------------------------------- 2. values


@torch.no_grad()
def monte_carlo(policy, processor, roll, row, t, max_tokens):
    """The mean outcome of CONTINUATIONS samples after the first t tokens of a response."""
    prompt = train_small.take(roll.inputs, torch.tensor([row]))
    prefix = roll.ids[row : row + 1, :t]
    inputs = train_small.full_inputs(prompt, prefix, torch.ones_like(prefix))
    inputs = {k: x.repeat(CONTINUATIONS, *[1] * (x.dim() - 1)) for k, x in inputs.items()}
    settings = dict(do_sample=True, top_k=0, suppress_tokens=train_small.banned_ids(policy))
    ids = policy.generate(**inputs, **settings, max_new_tokens=max_tokens - t)
    texts = processor.tokenizer.batch_decode(ids[:, -(ids.shape[1] - prompt["input_ids"].shape[1]) :],
                                             skip_special_tokens=True)
    return fmean(toy_env.reward(roll.problems[row], text) for text in texts)


def value_points(policy, processor, roll, values, borders, max_tokens, rng):
    """For each kind of border, before a segment's first or last token, PREFIXES of them, each of another response:
    {kind: [[Monte-Carlo value, {critic: V}], …]}."""
    points = {}
    for kind, at in borders.items():
        points[kind] = []
        for row in torch.randperm(len(roll.ids), generator=rng)[:PREFIXES].tolist():
            candidates = at[row].nonzero().flatten()
            t = int(candidates[torch.randint(len(candidates), (), generator=rng)])
            truth = monte_carlo(policy, processor, roll, row, t, max_tokens)
            points[kind].append([round(truth, 4), {name: round(float(v[row, t]), 4) for name, v in values.items()}])
    return points


def value_errors(points, name):
    """Mean squared error and explained variance of V against the Monte-Carlo value, both freed of the sampling noise
    of the latter, which is p (1 - p) / (n - 1) in expectation; and the bias, mean of V - MC."""
    truth, v = (torch.tensor(x, dtype=torch.float64) for x in zip(*((p, vs[name]) for p, vs in points)))
    noise = (truth * (1 - truth) / (CONTINUATIONS - 1)).mean()
    error, spread = ((v - truth) ** 2).mean() - noise, truth.var() - noise
    residual = (v - truth).var() - noise
    return dict(value_error=float(error), value_bias=float((v - truth).mean()),
                value_ev=float(1 - residual / spread))


# ------------------------------------------------------------------------------------------------- 3. borders


def border_quality(roll, ends):
    """Precision and recall of the ends against the digits of readings and results; a response's last end is given."""
    hits = marked = true = 0
    for row, (problem, text) in enumerate(zip(roll.problems, roll.texts)):
        pieces = roll.pieces[row]
        decisions = {t for s in toy_env.statements(problem, text) if s.kind in ("reading", "result")
                     for t in number_tokens(s, pieces)}
        chosen = set(ends[row, : len(pieces) - 1].nonzero().flatten().tolist())
        hits, marked, true = hits + len(chosen & decisions), marked + len(chosen), true + len(decisions)
    return dict(precision=hits / max(1, marked), recall=hits / max(1, true))


def random_ends(ends, mask, rng):
    """As many ends per response, elsewhere."""
    last = sapo.ends_once(mask)
    order = torch.rand(mask.shape, generator=rng).masked_fill(~mask | last, -1).argsort(1, descending=True).argsort(1)
    return (order < (ends & ~last).sum(1, keepdim=True)) & mask | last


# --------------------------------------------------------------------------------------------------- 4. roles


def weights_by_kind(roll, rewards, weights):
    """SRPO's mean weight on the digits of true and false readings, of operands (copied) and results (computed)."""
    kinds = {"true reading": [], "false reading": [], "copied": [], "computed": [], "false result": []}
    for row, (problem, text) in enumerate(zip(roll.problems, roll.texts)):
        for s in toy_env.statements(problem, text):
            w = [float(weights[row, t]) for t in number_tokens(s, roll.pieces[row])]
            kind = {"reading": "true reading" if s.true else "false reading", "operand": "copied",
                    "result": "computed" if s.true else "false result"}.get(s.kind)
            if kind and (s.true or kind.startswith("false")):
                kinds[kind] += w
    return {kind: fmean(w) for kind, w in kinds.items() if w}


# ------------------------------------------------------------------------------------------------------ the study


def settings_of(name, **options):
    """The full config of a critic's name."""
    return train_small.complete(train_small.Config(**{**options, "algo": name.split(",")[0], **CRITICS[name]}))


def measure(options, seed):
    """Train with SAPO and measure at the checkpoints: rows (iteration, part, who, measure, value, n), and the points
    (Monte-Carlo value, {critic: V}) of each checkpoint."""
    config = settings_of("sapo", seed=seed, **options)
    torch.manual_seed(seed)
    others = {}
    for name in list(CRITICS)[1:]:
        other = settings_of(name, seed=seed, **options)
        _, _, critic, _ = train_small.load(other)
        groups = [dict(params=critic.backbone.parameters(), lr=other.critic_lr),
                  dict(params=critic.head.parameters(), lr=other.head_lr)]
        others[name] = other, critic, [(critic, torch.optim.AdamW(groups, weight_decay=0.0))]
    processor = transformers.AutoProcessor.from_pretrained(config.model)
    processor.tokenizer.padding_side = "left"
    difficulty = train_small.difficulty(config)
    held_out = toy_env.make_problems(PROMPTS * len(CHECKPOINTS), seed=1 + seed, split="eval", **difficulty)
    rows, points = [], {}

    def watch(i, policy, critic, roll, scored, credit):
        with torch.random.fork_rng():  # measuring changes nothing in training
            torch.manual_seed(1000 * seed + i)
            for other, its_critic, optimizers in others.values():
                with torch.no_grad():
                    values = its_critic(roll.ids.shape[1], **train_small.full_inputs(roll.inputs, roll.ids, roll.mask))
                its = scored._replace(values=values)
                its_credit = train_small.assign_credit(other, policy, processor, roll, its, roll.rewards())
                train_small.update(other, policy, its_critic, optimizers, roll, its, its_credit, learn_policy=False)
            if i in CHECKPOINTS:
                k = CHECKPOINTS.index(i)
                critics = {"sapo": critic} | {name: its_critic for name, (_, its_critic, _) in others.items()}
                found, points[i] = checkpoint(config, policy, processor, critics, held_out[k * PROMPTS :][:PROMPTS], i)
                rows.extend(dict(seed=seed, iteration=i, **row) for row in found)

    train_small.train(config, watch)
    return dict(rows=rows, points=points)


def checkpoint(config, policy, processor, critics, problems, seed):
    """All four measurements on fresh rollouts of one policy."""
    rng = torch.Generator().manual_seed(seed)
    roll = train_small.rollout(policy, processor, [p for p in problems for _ in range(GROUP)], config.max_tokens)
    rewards, rows = roll.rewards(), []
    scored = {name: train_small.score_all(config, policy, None, critic, roll) for name, critic in critics.items()}
    advantages, weights, ends = credit_by_method(config, policy, processor, roll, scored, rewards)
    for name, a in advantages.items():
        for what, values in blame(roll, rewards, a).items():
            if values:
                rows.append(dict(part="blame", who=name, measure=what, value=fmean(values), n=len(values)))
    values = {name: s.values for name, s in scored.items()}
    at = lambda kind: sapo.segment_gae(values["sapo"], values["sapo"], ends["entropy"], roll.mask, value_at=kind)[2]
    points = value_points(policy, processor, roll, values, {kind: at(kind) for kind in ("start", "last")},
                          config.max_tokens, rng)
    for name, kind in itertools.product(values, points):
        for what, value in value_errors(points[kind], name).items():
            rows.append(dict(part="values", who=name, measure=f"{what}_{kind}", value=value, n=len(points[kind])))
    ends["random"] = random_ends(ends["entropy"], roll.mask, rng)
    for name, marked in ends.items():
        for what, value in border_quality(roll, marked).items():
            rows.append(dict(part="borders", who=name, measure=what, value=value, n=len(roll.ids)))
    for name, w in weights.items():
        for what, value in weights_by_kind(roll, rewards, w).items():
            rows.append(dict(part="roles", who=name, measure=what, value=value, n=len(roll.ids)))
    rows.append(dict(part="policy", who="sapo", measure="reward", value=float(rewards.mean()), n=len(roll.ids)))
    return rows, points


def credit_by_method(config, policy, processor, roll, scored, rewards):
    """Each method's advantages, SRPO's weights and SAPO's kinds of ends on one rollout, all (B, T)."""
    mask, group = roll.mask, srpo.group_advantages(rewards, GROUP)
    same, weights = scored["sapo"], {}
    for contrast in ("blank", "blind"):
        variant = replace(config, contrast=contrast)
        weights[contrast] = train_small.role_weights(variant, policy, processor, roll, same, group)
    signed = train_small.role_weights(replace(config, sign_aware=True), policy, processor, roll, same, group)
    group_weights = {"grpo": mask.float(), "srpo": weights["blank"], "srpo, blind": weights["blind"],
                     "srpo, sign-aware": signed}
    advantages = {name: srpo.srpo_advantages(group, w) for name, w in group_weights.items()}
    for name in scored:
        settings = settings_of(name, **{**asdict(config), "lam": None, "kl_coef": 0.0})  # the outcome alone
        its = train_small.assign_credit(settings, policy, processor, roll, scored[name], rewards)
        advantages[name] = its.advantages
    ends = {kind: train_small.segment_ends(replace(config, segments=kind), roll, same)
            for kind in ("entropy", "newline", "step", "probability")}
    return advantages, weights, ends


def run(seed):
    """The measurements of one seed, or its stored ones."""
    options = {k: v for k, v in study.setting("sapo").items() if k != "algo"}
    return study.stored(f"credit-seed-{seed}", lambda: measure(options, seed))


def credit(workers, seeds=None):
    """Run what is missing; write CSV and picture; return the tables as text."""
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        found = pool.map(run, range(seeds or SEEDS), chunksize=1)
    rows = [dict(row, value=round(row["value"], 4)) for result in found for row in result["rows"]]
    with open(study.HERE / "credit.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["seed", "iteration", "part", "who", "measure", "value", "n"])
        writer.writeheader()
        writer.writerows(rows)
    picture(read(), [result["points"] for result in found], study.HERE / "credit_study.png")
    return table()


# ------------------------------------------------------------------------------------------------- tables, pictures

TABLES = {  # part → caption, (measure, iteration) of its columns
    "blame": ("Blame: AUROC of −Â for the tokens of the one false statement, by iteration; then over statements",
              [("auroc_tokens", i) for i in CHECKPOINTS] + [("auroc_statements", 10), ("top1_statements", 10)]),
    "values": ("V before the first token of a segment, against Monte Carlo: mean squared error by iteration; explained "
               "variance and bias; error before a last token",
               [("value_error_start", i) for i in CHECKPOINTS]
               + [("value_ev_start", 10), ("value_bias_start", 10), ("value_error_last", 10), ("value_error_last", 40)]),
    "borders": ("Ends of segments at decision points (digits of readings and results)",
                [(measure, i) for measure in ("precision", "recall") for i in (5, 40)]),
    "roles": ("SRPO's weights on digits, 1 on average",
              [(kind, 10) for kind in ("true reading", "false reading", "copied", "computed", "false result")]),
}


def read():
    """(part, who, measure, iteration) → values over seeds, from the CSV."""
    values = {}
    with open(study.HERE / "credit.csv") as file:
        for r in csv.DictReader(file):
            values.setdefault((r["part"], r["who"], r["measure"], int(r["iteration"])), []).append(float(r["value"]))
    return values


def table():
    """The tables in Markdown, from the CSV."""
    values, blocks = read(), []
    seeds = max(map(len, values.values()))
    for part, (caption, columns) in TABLES.items():
        heads = [f"{measure.replace('_', ' ')}, it. {i}" for measure, i in columns]
        lines = [f"**{caption}** (`python -m results.study credit`, seeds: {seeds})", "",
                 "| | " + " | ".join(heads) + " |", "|---" * (len(columns) + 1) + "|"]
        for who in dict.fromkeys(w for p, w, _, _ in values if p == part):
            cells = [study.cell(values.get((part, who, measure, i), [])) for measure, i in columns]
            lines.append(f"| {who} | " + " | ".join(cells) + " |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def picture(values, points, path):
    """Blame and value error as training goes on, calibration of the critics, precision and recall of the ends."""
    plt = study.pyplot()
    figure, axes = plt.subplots(2, 3, figsize=(14, 7.5), layout="constrained")
    curves = [("blame", "auroc_tokens", "blame: AUROC over tokens"),
              ("blame", "top1_statements", "blame: top-1 over statements"),
              ("values", "value_error_start", "squared error of V before first tokens"),
              ("values", "value_error_last", "squared error of V before last tokens")]
    for axis, (part, measure, title) in zip(axes.flat, curves):
        for i, who in enumerate(dict.fromkeys(w for p, w, m, _ in values if (p, m) == (part, measure))):
            at = [(it, study.interval(values[part, who, measure, it])) for it in CHECKPOINTS
                  if (part, who, measure, it) in values]
            colour = COLOURS.get(who, f"C{i + 3}")
            axis.plot([it for it, _ in at], [m[0] for _, m in at], marker="o", ms=3, color=colour, label=who)
            axis.fill_between([it for it, _ in at], [m[1] for _, m in at], [m[2] for _, m in at], color=colour,
                              alpha=0.15, lw=0)
        axis.set(title=title, xlabel="iteration")
        axis.grid(alpha=0.3)
    axes.flat[0].set_ylim(0, 1)
    axes.flat[0].legend(fontsize=7, ncol=2, loc="lower center")
    axis = axes.flat[4]
    for who in CRITICS:  # tenths of V, all seeds, checkpoints from the second on, before first tokens
        pairs = sorted((v[who], truth) for p in points for it in CHECKPOINTS[1:] for truth, v in p[str(it)]["start"])
        parts = [pairs[k * len(pairs) // 10 : (k + 1) * len(pairs) // 10] for k in range(10)]
        axis.plot([fmean(v for v, _ in p) for p in parts], [fmean(t for _, t in p) for p in parts], marker="o", ms=3,
                  color=COLOURS[who], label=who)
    axis.plot([0, 1], [0, 1], color="black", lw=0.8)
    axis.set(title="calibration: V (tenths) and Monte-Carlo value", xlabel="V", ylabel="share of right continuations")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    axis = axes.flat[5]
    spots = {}  # newline and step share one
    for who in dict.fromkeys(w for p, w, _, _ in values if p == "borders"):
        spot = tuple(fmean(values["borders", who, m, CHECKPOINTS[0]]) for m in ("recall", "precision"))
        spots.setdefault(spot, []).append(who)
    for spot, names in spots.items():
        axis.plot(*spot, "o", clip_on=False)
        axis.annotate(", ".join(names), spot, xytext=(6, 5), textcoords="offset points", fontsize=8)
    axis.set(title=f"ends at decision points, iteration {CHECKPOINTS[0]}", xlabel="recall", ylabel="precision",
             xlim=(0, 1.1), ylim=(0, 1.1))
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def show_credit(folder, path):
    """One real response with one slip, its tokens coloured by the advantage that each method gives them: the picture of
    SAPO's Fig. 1, from a run. All rows see the same response, group and critic."""
    if not (Path(folder or "") / "critic.pt").exists():
        raise SystemExit(f"RUN={folder}: expected the folder of a run with a critic (sapo, ppo, vc-ppo) and --save")
    config = train_small.complete(train_small.Config(**json.loads((Path(folder) / "config.json").read_text())))
    config = replace(config, model=str(Path(folder) / "model"), algo="sapo")
    policy, processor, critic, _ = train_small.load(config)
    critic.load_state_dict(torch.load(Path(folder) / "critic.pt", weights_only=True))
    torch.manual_seed(0)
    problems = [p for p in train_small.eval_problems(config)[:PROMPTS] for _ in range(GROUP)]
    roll = train_small.rollout(policy, processor, problems, config.max_tokens)
    rewards, scored = roll.rewards(), train_small.score_all(config, policy, None, critic, roll)
    chosen, slip = one_slip(roll, rewards)
    advantages, _, ends = credit_by_method(config, policy, processor, roll, dict(ppo=scored, sapo=scored), rewards)
    rows = {name: advantages[name.lower()][chosen] for name in ("GRPO", "SRPO", "PPO", "SAPO")}
    draw_credit(roll, chosen, slip, rows, ends["entropy"][chosen], path)


def one_slip(roll, rewards):
    """The first wrong response with exactly one false statement, a group with both outcomes, and most still to come."""
    for i, (problem, text) in enumerate(zip(roll.problems, roll.texts)):
        false = toy_env.false_statements(problem, text)
        mixed = 0 < rewards[i // 8 * 8 : i // 8 * 8 + 8].sum() < 8
        early = len(false) == 1 and false[0].kind == "result" and false[0].end < 0.7 * len(text)
        if rewards[i] == 0 and mixed and early:
            return i, false[0]
    raise SystemExit("no wrong response with a single early slip: try a run with a longer chain or fewer iterations")


def draw_credit(roll, chosen, slip, rows, ends, path):
    plt = study.pyplot()
    pieces, problem = roll.pieces[chosen], roll.problems[chosen]
    figure, axes = plt.subplots(len(rows), 1, figsize=(15, 1.0 * len(rows) + 0.6), layout="constrained")
    for axis, (name, advantages) in zip(axes, rows.items()):
        scale, x, character, box = float(advantages.abs().max()), 0.0, 0, []
        for piece, advantage, end in zip(pieces, advantages.tolist(), ends.tolist()):
            shown, level = piece.strip(" ").replace("\n", "↵"), advantage / scale
            width = len(shown) + 0.8
            axis.barh(0, width, left=x, height=1, color=plt.get_cmap("RdBu")(0.5 + 0.4 * level))
            axis.text(x + width / 2, 0, shown, ha="center", va="center", fontsize=10,
                      color="white" if abs(level) > 0.8 else "black")
            if slip.start < character + len(piece) and character < slip.end:
                box += [x, x + width]
            x, character = x + width, character + len(piece)
            if name == "SAPO" and end:
                axis.plot([x, x], [-0.5, 0.5], color="black", lw=1)
        axis.add_patch(plt.Rectangle((box[0], -0.5), box[-1] - box[0], 1, fill=False, lw=2.5, zorder=3))
        axis.set(xlim=(0, x), ylim=(-0.55, 0.55), xticks=[], yticks=[], ylabel=name)
        axis.spines[:].set_visible(False)
    asked = problem.question[:-1] + problem.answer
    figure.suptitle(f"{asked}: who is blamed for the slip (boxed)? Red: advantage below 0, "
                    "blue: above. Lines: where SAPO's segments end", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)
