"""SRPO in TRL: a GRPOTrainer whose advantages are per token. Sampling, loss and saving stay TRL's.

    pip install -r requirements.txt trl==1.16.0 && python -m examples.trl_srpo
    torchrun --nproc_per_node 2 -m examples.trl_srpo                # two GPUs, or two processes on a CPU

TRL's loss takes advantages (B,) and, from a subclass, (B, T). So one override suffices: the policy scores
its responses again, on corrupted images, and srpo.py weighs their tokens. Copy the class and log_over_ranks,
give it your model, data (TRL's column `image` or `images`) and reward. It builds on private methods that may
change: it was run with TRL 1.16.0. Of TRL's defaults `run` turns off what srpo.py does not share: loss_type
"dapo" and, where beta > 0, a KL penalty times the ratio. What stays is std + 1e-4 in groups (srpo.py: 1e-6).

Several processes train and log as one with all their responses does. torchrun launches them, on CPUs too:
there `accelerate launch --cpu --num_processes 2` starts a single process without a word.
"""

import inspect
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer
from trl.data_utils import apply_chat_template, prepare_multimodal_messages

import srpo
import toy_env

MODEL = Path(__file__).parent.parent / "tiny_vlm"


class SRPOTrainer(GRPOTrainer):
    alpha = 1.0                                                             # (S5); 0 is TRL's GRPO
    corruption = dict(kind="patches", share=0.5, patch=16)                  # 16: a cell of the toy world

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        batch = super()._generate_and_score_completions(inputs)
        weights = self.role_weights(inputs, batch)                          # (S5): TRL's (B,) to (B, T)
        return batch | {"advantages": srpo.srpo_advantages(batch["advantages"], weights, self.alpha)}

    @torch.no_grad()
    def role_weights(self, rows: list[dict], batch: dict) -> Tensor:
        """SRPO's weights (B, T) of the responses in TRL's batch to these rows of the data set."""
        ids, tokenizer = batch["completion_ids"], self._tokenizer
        mask = batch["completion_mask"] * batch.get("tool_mask", 1)         # (B, T); srpo.py refuses holes
        silent = {*self.eos_token_ids, tokenizer.pad_token_id}              # only these: a tag may be special
        pieces = [["" if i in silent else tokenizer.decode([i]) for i in row] for row in ids.tolist()]
        perception, reasoning = srpo.split_roles(pieces, mask)
        pixels = {"pixel_values": self.corrupted_pixels(rows).to(batch["pixel_values"])}
        had = "old_per_token_logps" in batch                                # not where steps are aligned
        old = batch["old_per_token_logps"] if had else self.log_probs(batch, ids)  # (B, T)
        on_image = srpo.contrast(old, self.log_probs(batch | pixels, ids), mask)  # (B, T)
        contrasts = torch.where(perception, on_image, -on_image)            # (S2)
        weights = srpo.role_weights(contrasts, perception, reasoning)       # (S3), (S4), (B, T)
        roles = {"perception": perception, "reasoning": reasoning}
        log_over_ranks(self, {f"{what}/{name}": x[role] for name, role in roles.items()
                              for what, x in (("contrast", contrasts), ("weight", weights))})
        return weights

    def log_probs(self, batch: dict, ids: Tensor) -> Tensor:
        """The policy's log-probabilities (B, T) of responses `ids` to the prompts and images of the batch."""
        score = self._get_per_token_logps_and_entropies
        images = {k: x for k, x in batch.items() if k in inspect.signature(score).parameters}
        size, whole = self.args.per_device_train_batch_size, torch.cat([batch["prompt_ids"], ids], 1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        return score(self.model, whole, attention, ids.shape[1], batch_size=size, **images)[0]

    def corrupted_pixels(self, rows: list[dict]) -> Tensor:
        """Corrupted images as the model takes them; other patches for each response, rank and step."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        seed = (self.state.global_step * ranks + rank) * len(rows)          # one process draws the same
        images = [[srpo.corrupt_image(image.convert("RGB"), seed=seed + i, **self.corruption)
                   for image in row.get("images") or [row["image"]]] for i, row in enumerate(rows)]
        prompts = [prepare_multimodal_messages(row["prompt"], own) for row, own in zip(rows, images)]
        texts = [apply_chat_template({"prompt": p}, self.processing_class)["prompt"] for p in prompts]
        inputs = self.processing_class(images=images, text=texts, padding=True, return_tensors="pt")
        return inputs["pixel_values"]


def log_over_ranks(trainer: GRPOTrainer, metrics: dict[str, Tensor]) -> None:
    """Log each metric's mean over the values of all ranks, 0 without any; the largest if its name has max_.
    Ranks may hold different numbers of values. All must call this, with the same names in the same order."""
    own = [[x.sum().item(), x.numel(), x.max().item() if x.numel() else 0.0] for x in metrics.values()]
    own = torch.tensor([own], dtype=torch.float32, device=trainer.accelerator.device)
    total, count, largest = trainer.accelerator.gather(own).unbind(2)       # (ranks, metrics)
    means, largest = total.sum(0) / count.sum(0).clamp(min=1), largest.amax(0)
    log = trainer._metrics["train" if trainer.model.training else "eval"]
    for name, mean, most in zip(metrics, means.tolist(), largest.tolist()):
        log[name].append(most if "max_" in name else mean)


def correct(completions: list, answer: list[str], **_) -> list[float]:
    return [float(toy_env.stated_answer(c[0]["content"]) == a) for c, a in zip(completions, answer)]


def run(trainer_class: type[GRPOTrainer], iterations: int = 20, **settings) -> GRPOTrainer:
    """Train tiny_vlm on the toy world: 128 responses (16 prompts × 8) per iteration and process, 4 steps."""
    rows = toy_env.make_dataset(16 * iterations, operands=4, distractors=0)
    rows = rows.map(lambda row: {"prompt": [{"role": "user", "content": row["question"]}]})
    ours = dict(loss_type="grpo", use_bias_correction_kl=False, disable_dropout=True)  # or noise is contrast
    toy = dict(max_steps=4 * iterations, steps_per_generation=4, per_device_train_batch_size=32, bf16=False,
               num_generations=8, max_completion_length=104, learning_rate=1.6e-4, logging_steps=4,
               save_strategy="no", gradient_checkpointing=False, use_cpu=not torch.cuda.is_available())
    with tempfile.TemporaryDirectory() as out:
        trainer = trainer_class(str(MODEL), correct, GRPOConfig(out, **ours | toy | settings), rows)
        trainer.train()
    return trainer


if __name__ == "__main__":
    run(SRPOTrainer, beta=0.01)
