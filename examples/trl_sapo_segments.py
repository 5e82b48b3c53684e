"""Segments in TRL, without a critic: SAPO's ends and segment ratio on GRPO's advantages.

    pip install -r requirements.txt trl==1.16.0 && python -m examples.trl_sapo_segments
    torchrun --nproc_per_node 2 -m examples.trl_sapo_segments               # not accelerate: see trl_srpo.py

THIS IS NOT SAPO (arXiv 2605.01327): it has no critic, so no value of a segment and no GAE (Eq. 6-7, 10). All
segments of a response share its group's advantage. What is left is where they end (section 4.2) and their
ratio (Eq. 8-9): something between GRPO (each token a segment) and GSPO (each response a segment). Nor is it
TRL's loss_type="sapo": that is *Soft Adaptive Policy Optimization* (arXiv 2511.20347), another method. All of
SAPO is in train_small.py, and in verl_sapo.py for many GPUs.

TRL hands a subclass no entropy of the sampling policy, and no log-probabilities where steps are aligned: one
more forward pass gets both. `compute_loss` then is sapo.policy_loss; options that would change TRL's own loss
are refused. It builds on private methods, which may change: it was run with TRL 1.16.0.
"""

import inspect

import torch
from torch import Tensor
from trl import GRPOTrainer

import sapo
from examples.trl_srpo import log_over_ranks, run  # run: the toy world, for the example only

NEEDED = {"loss_type": "grpo", "importance_sampling_level": "token", "beta": 0.0, "delta": None,
          "top_entropy_quantile": 1.0, "entropy_coef": 0.0, "use_adaptive_entropy": False,
          "off_policy_mask_threshold": None, "use_vllm": False}


class SegmentTrainer(GRPOTrainer):
    top_percent = 30.0                                                      # section 4.2: k

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name, needed in NEEDED.items():
            if (value := getattr(self.args, name)) != needed:
                raise ValueError(f"{name} is {value!r}: expected {needed!r}")
        if self.aux_loss_enabled:
            raise ValueError(f"router_aux_loss_coef is {self.router_aux_loss_coef}: expected 0.0")

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        batch = super()._generate_and_score_completions(inputs)
        with torch.no_grad():                                               # both (B, T)
            old, entropy = self.score(self.model, batch, self.args.per_device_train_batch_size)
        mask = response_mask(batch)
        ends = self.ends(entropy, mask)
        counts = ends.sum(1)[mask.any(1)]                                   # not of responses masked out
        log_over_ranks(self, {"segments/per_response": counts, "entropy": entropy[mask.bool()]})
        return batch | {"old_per_token_logps": old, "ends": ends}           # TRL shuffles and splits it all

    def ends(self, entropy: Tensor, mask: Tensor) -> Tensor:
        """Last token of each segment, bool (B, T): fixed for all steps on a batch."""
        return sapo.ends_by_entropy(entropy, mask, self.top_percent)

    def score(self, model, batch: dict, batch_size: int | None = None) -> tuple[Tensor, Tensor]:
        """The model's log-probabilities and entropies, (B, T), of the responses in TRL's batch."""
        score = self._get_per_token_logps_and_entropies
        images = {k: x for k, x in batch.items() if k in inspect.signature(score).parameters}
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        T = batch["completion_ids"].shape[1]
        return score(model, ids, attention, T, batch_size=batch_size, compute_entropy=True, **images)[:2]

    def compute_loss(self, model, inputs: dict, return_outputs=False, num_items_in_batch=None) -> Tensor:
        mask = response_mask(inputs)                                        # (B, T)
        log_probs, _ = self.score(model, inputs)
        advantages = inputs["advantages"][:, None].expand(mask.shape)       # TRL's, of groups; (B, T)
        loss, metrics = sapo.policy_loss(log_probs, inputs["old_per_token_logps"], advantages, inputs["ends"],
                                         mask, self.epsilon_low, self.epsilon_high)  # Eq. 8-9
        present = int(mask.any(1).sum())                                    # responses not masked out
        log_over_ranks(self, {f"segments/{name}": x.expand(present) for name, x in metrics.items()})
        # sapo.py takes the mean over these, TRL over all. So must we: DDP averages over ranks, where one with
        # few of them would weigh as much as one with many.
        loss = loss * present / len(mask)
        return loss / (self.current_gradient_accumulation_steps if self.model.training else 1)  # TRL's "grpo"


def response_mask(batch: dict) -> Tensor:
    """Response tokens (B, T). A tool's answer between two turns leaves a hole, which sapo.py refuses."""
    return batch["completion_mask"] * batch.get("tool_mask", 1)


if __name__ == "__main__":
    run(SegmentTrainer)
