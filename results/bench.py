"""Speed: an iteration's phases against the bare model, sapo.py against slow loops, GRPO here against TRL's.

    python -m results.bench --algo grpo     any options of train_small.py
    python -m results.bench --maths         needs pytest
    python -m results.bench --trl           first: pip install -r requirements.txt trl==1.16.0; and --model

The bare model is its own generate, and the language model's forward and backward pass over the same parts
with the logits of one token; "look": the distinct prompts through the processor and, of a model whose vision
is frozen, through its tower.

Against TRL, both take turns in one process, on the same model, images and questions. Each iteration samples
128 responses (16 prompts × 8), and takes four steps of 32 responses with the same loss: a clip at 1 ± 0.2 and
a k3 KL penalty of 0.01, averaged over a response's tokens, then over responses.
"""

import sys
import tempfile
import time
from collections import defaultdict
from statistics import median

import torch
import transformers

import sapo
import toy_env
import train_small
from support.models import load_policy
from support.options import difficulty, parse_arguments
from support.run_folder import one_line


# ----------------------------------------------------------------------------------------------------- phases
def bench(config: train_small.Config, repeats: int = 5) -> dict[str, float]:
    """Median seconds of each phase of an iteration, and of the bare model on as many tokens. Printed, with
    responses per second and peak memory."""
    config = train_small.complete(config)
    torch.manual_seed(config.seed)
    policy, processor, critic, reference = train_small.load(config)
    optimizers = train_small.make_optimizers(config, policy, critic)
    task, taken = train_small.toy_task(config), defaultdict(list)

    def timed(name, function, *args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        if config.device == "cuda":
            torch.cuda.synchronize()
        taken[name].append(time.perf_counter() - start)
        return result

    def algorithm(roll, scored, outcome, plan):
        """All that the algorithm adds to model and optimizer: credit, losses, and their gradients."""
        credit = train_small.assign_credit(config, policy, processor, roll, scored, outcome, plan)
        log_probs = scored.log_probs.clone().requires_grad_()
        train_small.policy_objective(config, log_probs, scored, credit, roll.mask)[0].backward()
        if critic:
            values = scored.values.clone().requires_grad_()
            sapo.value_loss(values, credit.returns, credit.value_mask).backward()
        return credit

    for _ in range(repeats + 1):
        problems = train_small.take_prompts(config, task)
        roll = timed("sampling", train_small.rollout, policy, processor, task, problems,
                     config.max_tokens)
        outcome, plan = timed("outcome", roll.outcome), train_small.draw_plan(config, roll)
        inputs = train_small.take(roll.inputs, roll.prompts, roll.image_ids)
        timed("scoring", train_small.score_all, config, policy, reference, None, roll, plan)
        if critic:
            with torch.no_grad():
                timed("critic", train_small.value, critic, inputs, roll.ids, roll.mask)
        scored = train_small.score_all(config, policy, reference, critic, roll, plan)
        credit = timed("algorithm", algorithm, roll, scored, outcome, plan)
        timed("update", train_small.update, config, policy, critic, optimizers, roll, scored, credit, plan)
        T, banned = roll.ids.shape[1], train_small.banned_ids(policy) or None
        settings = dict(do_sample=True, top_k=0, min_new_tokens=T, max_new_tokens=T, suppress_tokens=banned)
        timed("bare look", train_small.see, policy, processor, task, [*{id(p): p for p in problems}.values()])
        timed("bare generate", policy.generate, **inputs, **settings)
        whole = [roll.part(rows, config.micro_tokens > 0) for rows in plan.scored]
        whole = [train_small.full_inputs(*part) | dict(use_cache=False) for part in whole]

        def language_model(backward=False):
            for part in whole:  # one token's logits, as a head of our own reads all
                loss = policy(**part, logits_to_keep=1).logits.sum()
                loss.backward() if backward else None

        with torch.no_grad():
            timed("bare forward", language_model)
        timed("bare forward + backward", language_model, backward=True)
        policy.zero_grad()

    seconds = {name: median(x[1:]) for name, x in taken.items()}  # the first one warms up
    iteration = sum(s for name, s in seconds.items() if not name.startswith("bare"))
    seconds["bare look + generate"] = seconds["bare look"] + seconds["bare generate"]
    beside = {"sampling": ("bare look + generate", 1), "scoring": ("bare forward", 1 + bool(reference)),
              "critic": ("bare forward", 1), "update": ("bare forward + backward", 1 + bool(critic))}
    print(f"{config.algo}, {config.responses} responses, {config.device}, {torch.get_num_threads()} threads")
    for name, s in seconds.items():
        bare, models = beside.get(name, ("", 1))
        share = "" if name.startswith("bare") else f"{s / iteration:7.1%}"
        times = f"{s / models / seconds[bare]:6.2f} × {models} {bare}" if bare else ""
        print(f"{name:24}{1000 * s:9.1f} ms{share}{times}")
    print(f"{config.responses / iteration:.0f} responses/s, peak memory {peak_memory(config.device):.2f} GiB")
    return seconds


def peak_memory(device: str) -> float:
    """GiB: of the GPU, else of the process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


# ------------------------------------------------------------------------------------------------------ maths
def maths(repeats: int = 5) -> float:
    """How many times as fast as the slow loops of test_sapo.py sapo.py's chain is: ends, GAE, loss and its
    gradient, on 48 responses of 256 to 512 tokens. Medians, taken in turn; printed."""
    from test_sapo import batch, fast_chain, slow_chain  # it needs pytest

    d, taken = batch(48, 512, shortest=256), {fast_chain: [], slow_chain: []}
    fast_chain(d, d.log_probs.clone().requires_grad_())  # warms up
    for chain in [fast_chain, slow_chain] * repeats:
        start = time.perf_counter()
        chain(d, d.log_probs.clone().requires_grad_())
        taken[chain].append(time.perf_counter() - start)
    fast, slow = (median(taken[chain]) for chain in (fast_chain, slow_chain))
    print(f"sapo.py {1000 * fast:.1f} ms, slow loops {1000 * slow:.0f} ms: {slow / fast:.0f} times as fast")
    return slow / fast


# -------------------------------------------------------------------------------------------------------- TRL
def ours(iterations: int, model: str | None = None) -> float:
    """Seconds per iteration of train_small.learn, without its evaluations."""
    marks = []
    with tempfile.TemporaryDirectory() as out:
        more = dict(eval_every=10**6, eval_problems=8, lr=1e-6, out=out, patience=0, model=model)
        config = train_small.Config(algo="grpo", iterations=iterations + 2, **more)
        train_small.learn(train_small.prepare(config), lambda *_: marks.append(time.perf_counter()))
    return (marks[-2] - marks[0]) / iterations  # the last iteration ends with an evaluation


def theirs(iterations: int, model: str | None = None) -> float:
    """Seconds per 128 responses of TRL's GRPOTrainer."""
    from trl import GRPOConfig, GRPOTrainer

    config = train_small.complete(train_small.Config(algo="grpo", model=model, train_vision=True))
    rows = toy_env.make_dataset(16 * (iterations + 2), **difficulty(config))
    rows = rows.map(lambda row: {"prompt": [{"role": "user", "content": row["question"]}]})
    policy, processor = load_policy(config.model, config.device)
    marks = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            marks.append(time.perf_counter())

    def correct(completions, answer, **_):
        return [float(toy_env.stated_answer(c[0]["content"]) == a) for c, a in zip(completions, answer)]

    with tempfile.TemporaryDirectory() as out:
        settings = GRPOConfig(
            out, per_device_train_batch_size=32, steps_per_generation=4, num_generations=8, temperature=1.0,
            max_steps=4 * (iterations + 1), max_completion_length=config.max_tokens, learning_rate=1e-6,
            loss_type="grpo", epsilon=0.2, beta=0.01, use_bias_correction_kl=False, scale_rewards="group",
            gradient_checkpointing=config.checkpointing, bf16=config.dtype == "bfloat16",
            use_cpu=config.device == "cpu", shuffle_dataset=False, logging_steps=10**6,
            save_strategy="no", report_to="none", disable_tqdm=True)
        GRPOTrainer(policy, correct, settings, rows.remove_columns("question"), processing_class=processor,
                    callbacks=[Clock()]).train()
    return (marks[-1] - marks[3]) / iterations


def compare(model: str | None = None, iterations: int = 6, rounds: int = 3) -> None:
    """Print the seconds per 128 responses of each round, and the median ratio."""
    pairs = []
    for i in range(rounds):
        pairs.append((ours(iterations, model), theirs(iterations, model)))
        print(f"round {i}: ours {pairs[-1][0]:.2f} s, TRL {pairs[-1][1]:.2f} s", flush=True)
    print(f"responses per second, ours / TRL: {median(b / a for a, b in pairs):.2f}")


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with one_line("results.bench", ValueError, OSError):
        if "--trl" in sys.argv:
            sys.argv.remove("--trl")
            compare(parse_arguments(train_small.Config, "").model)
        elif sys.argv[1:] == ["--maths"]:
            maths()
        else:
            bench(parse_arguments(train_small.Config, __doc__.split("\n")[0]))


if __name__ == "__main__":
    main()
