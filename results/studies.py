"""What is run: the studies' settings, as options of train_small.py. results/study.py runs them.

STUDIES: name → its question, the runs by label, the seeds, the columns of its CSV, and what is compared.
"""

from collections.abc import Sequence
from typing import NamedTuple

import toy_env
import train_small

# The setting of the studies: a chain long enough, and few enough responses, that nothing saturates.
SETTING = dict(operands=6, iterations=40, eval_every=40)
TUNING = (100, 101)  # the seeds that decide λ and rates; seeds 0 to 4 are reported
FILLER = dict(openings="many")
OFF_POLICY = dict(responses=512, iterations=10, critic_warmup=1, mini_batches=16, epochs=2)
POLICIES = {"on-policy": {}, "off-policy": OFF_POLICY,
            "off-policy at half the rate": OFF_POLICY | dict(lr=8e-5)}
SEGMENT = dict(ratio="segment")  # given where Table 2's ablation is made
RATE = {"grpo": 1.6e-4, "gspo": 3.2e-4, "ppo": 1.6e-4, "vc-ppo": 1.6e-4, "sapo": 1.6e-4, "srpo": 1.6e-4}
OWN_LAMBDA = {"sapo": 0.9, "ppo": 0.95, "vc-ppo": 0.99}  # the studies', in each world
LAMBDAS = {"sapo": (0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0),
           **dict.fromkeys(("ppo", "vc-ppo"), (0.8, 0.9, 0.95, 0.99, 1.0))}
BEST = {"grpo": dict(lr=3.2e-4), "ppo": dict(lam=0.99), "sapo": dict(lam=0.8)}  # on TUNING, if another
RATES = dict.fromkeys(RATE, (8e-5, 1.6e-4, 3.2e-4)) | {  # tried, at the best λ
    "grpo": (8e-5, 1.6e-4, 3.2e-4, 6.4e-4), "gspo": (1.6e-4, 3.2e-4, 6.4e-4)}
SAID = {"sapo": dict(value_at="start"), "srpo": dict(contrast="blind")}
WORDY = "tiny_vlm/wordy"  # for "none" too, where kinds of filler words are compared
NO_TRUTH, GUESSER = "runs/no-truth", "runs/guesser"
MADE = {NO_TRUTH: "python -m tiny_vlm.make --truth 0 --out " + NO_TRUTH,
        GUESSER: "python -m tiny_vlm.make --base tiny_vlm --steps 800 --lr 7e-4 --guess 0.6 --out " + GUESSER}
GUESS = dict(model=GUESSER, prior=0.6, operands=4)
QUANTILES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # of entropy, for lift

ACCURACY = ("accuracy_sampled", "accuracy_greedy", "accuracy_paper", "faithful_sampled")
CRITIC = ("explained_variance_last", "blame_auroc")
BASE = ("idle", "precision", "recall", "chance")  # of the base model
GROUNDED = ("perception_sampled", "lucky")
RATIO = ("mean_ratio_deviation", "max_ratio_deviation", "clip_fraction")


def setting(algo: str, **options) -> dict:
    """The options of a run. One at its default is left out, so that studies which vary others share the run.

    SAPO's always say where V is read, since the paper and its authors' code differ there; SRPO's, which
    contrast. With filler words λ is always given, and for a model of MADE so is all that train_small.py
    would set to the paper's values.
    """
    base = dict(SETTING, algo=algo, lr=RATE[algo]) | SAID.get(algo, {})
    if "openings" in options and algo in OWN_LAMBDA:
        base |= dict(lam=OWN_LAMBDA[algo])
    if options.get("model") in MADE:
        base |= dict(max_tokens=16 * options.get("operands", SETTING["operands"]) + 40)
        if algo in OWN_LAMBDA:
            base |= dict(lam=OWN_LAMBDA[algo], critic_lr=5e-5, head_lr=2e-3)
    return base | {k: v for k, v in options.items() if k in base or v != getattr(train_small.Config, k)}


BOUNDS = {"temperature 2": dict(weight_temperature=2.0), "clip 0.2": dict(weight_clip=0.2),
          "clip 0.8": dict(weight_clip=0.8)}  # (S4) has 1 and 0.5
VARIANTS = {  # of SRPO; those that were removed from srpo.py are in *-removed.csv
    **{contrast: dict(contrast=contrast) for contrast in ("blind", "blank")},
    **{f"blind, {bound}": its for bound, its in BOUNDS.items()},
    "blind, sign-aware": dict(sign_aware=True), "blank, sign-aware": dict(contrast="blank", sign_aware=True),
    **{f"blind, {bound}, sign-aware": dict(its, sign_aware=True) for bound, its in BOUNDS.items()}}

WIDE = dict(clip_low=0.45, clip_high=0.8)  # of a token: 0.8^3.3 and 1.2^3.3, as 3.3 tokens have one ratio
CLIPS = {  # off-policy, narrow ones first: label → algorithm, clip, and what decides about the ratio
    "token, 0.2": ("sapo", {}, dict(ratio="token")),
    "segment, 0.06": ("sapo", dict(clip_low=0.06, clip_high=0.06), SEGMENT),
    "segment, by length": ("sapo", {}, SEGMENT | dict(guard="length")),
    "ppo, 0.2": ("ppo", {}, {}),
    "segment, 0.2": ("sapo", {}, SEGMENT),
    "segment, dual clip": ("sapo", {}, SEGMENT | dict(guard="dual")),
    "segment, whitened within 5": ("sapo", {}, SEGMENT | dict(guard="within 5", whiten=True)),
    "segment, 0.2 and 0.28": ("sapo", dict(clip_high=0.28), SEGMENT),
    "token, wide": ("sapo", WIDE, dict(ratio="token")),
    "ppo, wide": ("ppo", WIDE, {})}
CLIP_WORLDS = {"": {}, ", filler words": FILLER, ", twice the rate": dict(lr=3.2e-4)}


class Study(NamedTuple):
    question: str
    runs: dict  # label → options of train_small.py
    seeds: Sequence[int] = range(5)
    columns: tuple = (*ACCURACY, "responses_to_80", *CRITIC)  # of the CSV
    pairs: tuple = ()  # (label, label): the first minus the second, seed by seed
    shown: tuple = ("accuracy_sampled", "faithful_sampled", "responses_to_80")  # of a page's table
    rows: tuple = ()  # its labels; all
    only_pairs: bool = False  # it has the pairs instead


def horizon(**world) -> dict:
    """Of a Study: three methods on chains of four lengths."""
    lengths = [f"{n} operands" for n in (2, 4, 6, 8)]
    return dict(runs={f"{a}, {n}": setting(a, **world, operands=int(n[0]))
                      for n in lengths for a in ("grpo", "ppo", "sapo")},
                pairs=tuple((f"sapo, {n}", f"{a}, {n}") for a in ("grpo", "ppo") for n in lengths),
                shown=("accuracy_sampled", "accuracy_paper", "faithful_sampled"), only_pairs=True)


STUDIES = {
    "rates": Study("The learning rates tried for each method at its best λ, on separate seeds", {
        f"{a}, {1e4 * lr:g}e-4": setting(a, **BEST.get(a, {}) | dict(lr=lr))
        for a, rates in RATES.items() for lr in rates}, seeds=TUNING),
    "table1": Study("SAPO Table 1: six methods on equally many responses", {
        **{a: setting(a) for a in RATE}, "grpo, tuned": setting("grpo", **BEST["grpo"]),
        "srpo, clip 0.2": setting("srpo", weight_clip=0.2)},
        pairs=(*(("sapo", a) for a in ("ppo", "vc-ppo", "grpo", "grpo, tuned", "gspo")),
               ("srpo", "grpo"), ("srpo", "grpo, tuned"), ("srpo, clip 0.2", "grpo"))),
    "choices": Study("Table 1 with V as in the official code, the paper's λ, or tuned on other seeds", {
        **{a: setting(a) for a in ("grpo", "ppo", "vc-ppo", "sapo")},
        "sapo, V at last": setting("sapo", value_at="last"),
        "sapo, lambda 0.99": setting("sapo", lam=0.99),
        **{f"{a}, tuned": setting(a, **BEST[a]) for a in ("ppo", "sapo")}},
        pairs=(*(("sapo, lambda 0.99", a) for a in ("ppo", "vc-ppo", "grpo")),
               *(("sapo, tuned", a) for a in ("ppo, tuned", "vc-ppo", "grpo")))),
    "table2": Study("SAPO Table 2: ratio per token or per segment, off-policy: 32 updates on 512 responses", {
        **{ratio: setting("sapo", **OFF_POLICY) | dict(ratio=ratio) for ratio in ("token", "segment")},
        **{a: setting(a, **OFF_POLICY) for a in ("ppo", "grpo")}},
        columns=(*ACCURACY, "responses_to_80", *RATIO),
        pairs=tuple(("segment", other) for other in ("token", "ppo", "grpo"))),
    "table3": Study("SAPO Table 3: where segments end", {
        s: setting("sapo", segments=s) for s in train_small.SEGMENTS},
        pairs=tuple(("entropy", other) for other in train_small.SEGMENTS[1:])),
    "wordy-table3": Study("SAPO Table 3 with filler words", {
        s: setting("sapo", **FILLER, segments=s) for s in train_small.SEGMENTS},
        pairs=tuple(("entropy", other) for other in train_small.SEGMENTS[1:])),
    "table3-last": Study("The same with V before a segment's last token, where the official code reads it", {
        s: setting("sapo", segments=s, value_at="last") for s in train_small.SEGMENTS}, seeds=range(2)),
    "figure3": Study("SAPO Fig. 3: lift of large value jumps at high entropy, by quantile (Eq. 12)", {
        a: setting(a) for a in ("ppo", "vc-ppo", "sapo")},
        columns=tuple(f"lift_{q}" for q in QUANTILES), shown=("lift_0.7", "lift_0.9", "lift_0.95")),
    "figure5": Study("SAPO Fig. 5: the share of tokens that end a segment", {
        f"{k} %": setting("sapo", top_percent=float(k)) for k in (5, 10, 20, 30, 50, 100)},
        pairs=tuple(("30 %", f"{k} %") for k in (5, 10, 20, 50, 100)) + (("50 %", "100 %"),)),
    "wordy-figure5": Study("SAPO Fig. 5 with filler words", {
        f"{k} %": setting("sapo", **FILLER, top_percent=float(k)) for k in (5, 10, 30, 50, 100)}),
    "figure6": Study("SAPO Fig. 6 and 7: value loss, entropy and response length", {
        a: setting(a) for a in ("ppo", "vc-ppo", "sapo")},
        columns=("value_loss", "entropy", "response_length")),
    "horizon": Study("Longer chains: does the gain grow with the horizon?", seeds=range(4),
                     **horizon()),
    "features": Study("A critic without features: tiny_vlm without the truth-aware backbone", {
        **{a: setting(a, model=NO_TRUTH) for a in ("grpo", "ppo", "vc-ppo")},
        "sapo, lambda 0.9": setting("sapo", model=NO_TRUTH),
        "sapo, lambda 0.99": setting("sapo", model=NO_TRUTH, lam=0.99)},
        pairs=(*(("sapo, lambda 0.99", a) for a in ("ppo", "vc-ppo", "grpo")), ("sapo, lambda 0.9", "ppo"))),
    "srpo": Study("SRPO's open choices", {
        **{a: setting(a) for a in ("grpo", "srpo")}, "blank": setting("srpo", contrast="blank"),
        "blank, sign-aware": setting("srpo", contrast="blank", sign_aware=True),
        **{f"blank, {c} image": setting("srpo", contrast="blank", corruption=c) for c in ("noise", "blank")}},
        columns=(*ACCURACY, *GROUNDED, "responses_to_80"),
        pairs=tuple((variant, "grpo") for variant in ("srpo", "blank", "blank, sign-aware")),
        shown=("accuracy_sampled", "faithful_sampled", "perception_sampled", "lucky")),
    "srpo-forms": Study("SRPO: contrasts, and weights of them, on separate seeds", {
        "grpo": setting("grpo"), **{label: setting("srpo", **form) for label, form in VARIANTS.items()}},
        seeds=TUNING, columns=(*ACCURACY, *GROUNDED, "responses_to_80")),
    "guessing": Study("A base model that guesses; the guess is right in 60 % of training, then never", {
        **{a: setting(a, **GUESS) for a in ("grpo", "srpo")},
        "srpo, sign-aware": setting("srpo", **GUESS, sign_aware=True),
        "srpo, sign-aware, clip 0.2": setting("srpo", **GUESS, sign_aware=True, weight_clip=0.2),
        **{a: setting(a, **GUESS) for a in ("ppo", "sapo")}},
        seeds=range(10), columns=(*ACCURACY, *GROUNDED),
        pairs=tuple((a, "grpo") for a in (
            "srpo", "srpo, sign-aware", "srpo, sign-aware, clip 0.2", "ppo", "sapo")),
        shown=("accuracy_sampled", "faithful_sampled", "perception_sampled", "lucky")),
    "guessing-forms": Study("A base model that guesses: SRPO's contrasts and weights, on separate seeds", {
        "grpo": setting("grpo", **GUESS), "grpo, 3.2e-4": setting("grpo", **GUESS, lr=3.2e-4),
        **{label: setting("srpo", **GUESS, **form) for label, form in VARIANTS.items()}},
        seeds=TUNING, columns=(*ACCURACY, *GROUNDED)),
    "lambda": Study("The λ tried for each method with a critic, on separate seeds", {
        f"{a}, lambda {x}": setting(a, **{} if x == own else dict(lam=x))
        for a, own in OWN_LAMBDA.items() for x in LAMBDAS[a]}, seeds=TUNING),
    "wordy-lambda": Study("With filler words: the λ tried for each method with a critic", {
        f"{a}, lambda {x}": setting(a, **FILLER, lam=x) for a in OWN_LAMBDA for x in LAMBDAS[a]},
        seeds=TUNING),
    "wording": Study("No, few or many filler words: how many uncertain tokens decide nothing at first", {
        kind: setting("grpo", openings=kind, model=model, iterations=1)
        for kind, model in zip(toy_env.OPENED, (WORDY, None, None))},
        seeds=range(3), columns=(*BASE, "entropy", "response_length"),
        shown=(*BASE, "entropy", "response_length")),
    "openings": Study("SAPO minus PPO: when do segments pay?", {
        f"{a}, {policy}, {kind}": setting(a, **how, **more) | (SEGMENT if a == "sapo" and how else {})
        for policy, how in POLICIES.items()
        for kind, more in (("none", {}), ("few", dict(openings="few")), ("many", FILLER))
        for a in ("ppo", "sapo")},
        columns=(*ACCURACY, "responses_to_80"),
        pairs=tuple((f"sapo, {policy}, {kind}", f"ppo, {policy}, {kind}")
                    for policy in POLICIES for kind in toy_env.OPENED), only_pairs=True),
    "wordy-table1": Study("SAPO Table 1 with filler words", {
        **{a: setting(a, **FILLER) for a in RATE},
        "grpo, twice the rate": setting("grpo", **FILLER, **BEST["grpo"]),
        **{f"{a}, lambda {x}": setting(a, **FILLER, lam=x)
           for a, x in (("ppo", 0.9), ("vc-ppo", 0.95), ("sapo", 0.8), ("sapo", 0.99))}},
        columns=(*ACCURACY, "perception_sampled", "responses_to_80", *CRITIC),
        pairs=(*(("sapo", a) for a in ("ppo", "vc-ppo", "grpo", "grpo, twice the rate", "ppo, lambda 0.9")),
               *(("sapo, lambda 0.8", a) for a in ("ppo", "vc-ppo, lambda 0.95")),
               *(("sapo, lambda 0.99", a) for a in ("ppo", "vc-ppo", "grpo")), ("srpo", "grpo")),
        rows=("grpo", "grpo, twice the rate", "gspo", "ppo", "ppo, lambda 0.9", "vc-ppo", "sapo", "srpo")),
    "wordy-falls": Study("What saves the two runs of wordy-figure5 that collapse on seed 1", {
        f"{k} %, {label}": setting("sapo", **FILLER, top_percent=float(k), **more) for k in (5, 50)
        for label, more in (("as it is", {}), ("half the rate", dict(lr=8e-5)),
                            ("token ratio", dict(ratio="token")),
                            ("returns with lambda 1", dict(lam_returns=1.0)))},
        seeds=(1,), columns=(*ACCURACY, "responses_to_80", *RATIO)),
    "wordy-horizon": Study("Longer chains with filler words", **horizon(**FILLER)),
    "wordy-table2": Study("SAPO Table 2 with filler words: 32 updates on 512 responses", {
        **{x: setting("sapo", **FILLER, **OFF_POLICY) | dict(ratio=x) for x in ("token", "segment")},
        **{a: setting(a, **FILLER, **OFF_POLICY) for a in ("ppo", "grpo")},
        "segment, half the rate": setting("sapo", **FILLER, **OFF_POLICY, lr=8e-5) | SEGMENT,
        "ppo, half the rate": setting("ppo", **FILLER, **OFF_POLICY, lr=8e-5)},
        columns=(*ACCURACY, "responses_to_80", *RATIO),
        pairs=(("segment", "token"), ("segment", "ppo"), ("segment, half the rate", "ppo, half the rate"))),
    "off-policy": Study("SAPO minus PPO off-policy, on ten seeds", {
        f"{a}, {world}": setting(a, **OFF_POLICY, **its) | (SEGMENT if a == "sapo" else {})
        for world, its in (("plain", {}), ("with words at half the rate", FILLER | dict(lr=8e-5)))
        for a in ("ppo", "sapo")}, seeds=range(10), columns=(*ACCURACY, "responses_to_80"),
        pairs=tuple((f"sapo, {x}", f"ppo, {x}") for x in ("plain", "with words at half the rate")),
        only_pairs=True),
    "clip": Study("Off-policy: which trust region is fast, and which collapses?", {
        f"{label}{world}": setting(algo, **OFF_POLICY, **its, **clip) | more
        for world, its in CLIP_WORLDS.items()
        for label, (algo, clip, more) in CLIPS.items()},
        seeds=range(10),
        columns=(*ACCURACY, "responses_to_80", "early_reward", "largest_fall", "kl_step", "free_log_ratio"),
        pairs=(*((label, "token, 0.2") for label in CLIPS if label != "token, 0.2"),
               ("segment, 0.2", "token, wide"), ("ppo, wide", "ppo, 0.2"), ("segment, 0.2", "ppo, wide")),
        shown=("early_reward", "largest_fall", "accuracy_sampled", "kl_step", "collapsed")),
}
