"""examples/trl_*.py on two ranks (gloo, DDP) against one process with all their responses, on tiny_vlm.

The 24 responses of a generation are fixed by their place in it: three groups of 8, the second on both ranks.
Truncated responses are masked out, in one step all that a rank has. Written for TRL 1.16.0; skipped where
TRL is missing.
"""

import os
import random
import subprocess
import sys
from pathlib import Path

import conftest  # noqa: F401: the ranks need what it does for torchvision
import pytest
import torch

trl = pytest.importorskip("trl", reason="TRL is missing: pip install trl==1.16.0")

from examples import trl_sapo_segments, trl_srpo  # noqa: E402: they import TRL

RANKS, RESPONSES, ROOT = 2, 24, Path(__file__).parent.parent
SRPO, SEGMENTS = trl_srpo.SRPOTrainer, trl_sapo_segments.SegmentTrainer
CASES = {"srpo, 1 step": (SRPO, 1), "segments, 2 steps": (SEGMENTS, 2)}
OF_THE_MACHINE = ("time", "per_second", "flos")


def train(trainer_class, steps: int) -> dict[str, dict]:
    """First gradient, parameters and logs of two generations, of `steps` optimizer steps each."""
    ranks, first = int(os.environ.get("WORLD_SIZE", 1)), {}

    def coin(completions, **_):
        return [float(len(c[0]["content"]) % 2) for c in completions]

    def in_order(batch):  # not shuffled: each step of one process takes what the ranks take in it
        order = torch.arange(RESPONSES // ranks).view(RANKS // ranks, steps, -1).transpose(0, 1).flatten()
        take = {list: lambda x: [x[i] for i in order], torch.Tensor: lambda x: x[order] if x.dim() else x}
        return {name: take[type(x)](x) for name, x in batch.items()}

    class Fixed(trainer_class):
        def __init__(self, model, reward, *args):
            super().__init__(model, coin, *args)

        def _generate_single_turn(self, prompts, *_):
            start = 1000 * self.state.global_step + self.accelerator.process_index * len(prompts)
            texts = [self.respond(random.Random(start + i)) for i in range(len(prompts))]
            return self._tokenizer(texts)["input_ids"], None

        def respond(self, rng):
            number = lambda: "".join(rng.choices("0123456789", k=rng.randint(1, 9)))
            text = f"<perception> {number()} </perception> <think> {number()} </think> <answer> 1 </answer>"
            return text + "<eos>" * (rng.random() < 0.4)

        def training_step(self, *args):
            loss = super().training_step(*args)
            gradients = ((name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None)
            first.update({} if first else {name: gradient.clone() for name, gradient in gradients})
            return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl.trainer.grpo_trainer, "shuffle_sequence_dict", in_order)
        trainer = trl_srpo.run(
            Fixed, iterations=1, max_steps=2 * steps, steps_per_generation=steps, optim="sgd", use_cpu=True,
            learning_rate=0.01, per_device_train_batch_size=RESPONSES // ranks // steps, logging_steps=1,
            mask_truncated_completions=True, disable_tqdm=True)
    logs = {f"{i} {name}": torch.tensor(x) for i, log in enumerate(trainer.state.log_history)
            for name, x in log.items() if not any(word in name for word in OF_THE_MACHINE)}
    return dict(gradient=first, parameters=dict(trainer.model.named_parameters()), logs=logs)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each rank has of each case."""
    out = tmp_path_factory.mktemp("ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}", "--standalone",
              "--local-addr=127.0.0.1", __file__, out]
    done = subprocess.run(launch, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out / str(rank), weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_and_log_as_one_process(case, two):
    one = train(*CASES[case])
    for rank in two:
        for what, atol, rtol in ("gradient", 2e-7, 0), ("parameters", 3e-7, 0), ("logs", 1e-5, 1e-4):
            torch.testing.assert_close(rank[case][what], one[what], atol=atol, rtol=rtol)


if __name__ == "__main__":
    found = {case: train(*given) for case, given in CASES.items()}
    torch.save(found, Path(sys.argv[1]) / os.environ["RANK"])
