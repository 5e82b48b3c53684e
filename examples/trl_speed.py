"""GRPO's speed here and in TRL, on the same model, images and responses, in one process, taking turns.

    pip install -r requirements.txt trl==1.16.0 && python -m examples.trl_speed

Both sample 128 responses (16 prompts × 8) per iteration and take four optimizer steps of 32 responses on them, with
a k3 KL penalty of 0.01 to a reference. Prints the seconds per iteration of each round, and the median ratio.
"""

import tempfile
import time
from statistics import median

import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import toy_env
import train_small

ITERATIONS, ROUNDS = 6, 3


def ours():
    """Seconds per iteration of train_small.train, without its evaluations."""
    marks = []
    with tempfile.TemporaryDirectory() as out:
        more = dict(eval_every=10**6, eval_problems=8, lr=1e-6, out=out)
        config = train_small.Config(algo="grpo", iterations=ITERATIONS + 2, **more)
        train_small.train(config, on_iteration=lambda *_: marks.append(time.perf_counter()))
    return (marks[-2] - marks[0]) / ITERATIONS  # the last iteration ends with an evaluation


class Clock(TrainerCallback):
    def __init__(self):
        self.marks = []

    def on_step_end(self, *_, **__):
        self.marks.append(time.perf_counter())


def theirs():
    """Seconds per 128 responses of TRL's GRPOTrainer."""
    config = train_small.complete(train_small.Config(algo="grpo"))
    rows = toy_env.make_dataset(16 * (ITERATIONS + 2), operands=config.operands, distractors=config.distractors)
    rows = rows.map(lambda row: {"prompt": [{"role": "user", "content": row["question"]}]}).remove_columns("question")
    clock = Clock()

    def correct(completions, answer, **_):
        return [float(toy_env.stated_answer(c[0]["content"]) == a) for c, a in zip(completions, answer)]

    with tempfile.TemporaryDirectory() as out:
        settings = GRPOConfig(
            out, per_device_train_batch_size=32, steps_per_generation=4, num_generations=8, beta=0.01,
            max_steps=4 * (ITERATIONS + 1), max_completion_length=config.max_tokens, temperature=1.0, learning_rate=1e-6,
            gradient_checkpointing=False, bf16=False, use_cpu=config.device == "cpu", shuffle_dataset=False,
            logging_steps=10**6, save_strategy="no", report_to="none", disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            AutoModelForImageTextToText.from_pretrained(config.model, dtype=torch.float32), reward_funcs=correct,
            args=settings, train_dataset=rows, processing_class=AutoProcessor.from_pretrained(config.model),
            callbacks=[clock],
        )
        trainer.train()
    return (clock.marks[-1] - clock.marks[3]) / ITERATIONS


def main():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    pairs = []
    for i in range(ROUNDS):
        pairs.append((ours(), theirs()))
        print(f"round {i}: ours {pairs[-1][0]:.2f} s, TRL {pairs[-1][1]:.2f} s", flush=True)
    print(f"responses per second, ours / TRL: {median(b / a for a, b in pairs):.2f}")


if __name__ == "__main__":
    main()
