"""SRPO in verl, for whom one machine is too small: verl (Ray, FSDP, vLLM) is the engine, srpo.py the weights.

verl's loss takes an advantage per token. So a trainer class suffices, without a patch: the actor scores its
responses once more, on corrupted images, and srpo.py weighs the tokens of verl's GRPO. PYTHONPATH is this
repository's folder; two lines are for each node:

    pip install "verl[vllm,fsdp]==0.9.1" && export PYTHONPATH=... VERL_USE_EXTERNAL_MODULES=examples.verl_srpo
    ray start --head  # on the others: --address=HEAD:6379
    python -m verl.trainer.main_ppo trainer.v1.trainer_mode=roles algorithm.adv_estimator=grpo \\
        actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean actor_rollout_ref.actor.clip_ratio_c=1e9 \\
        actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0.01 \\
        actor_rollout_ref.rollout.n=8 +trainer.v1.roles.alpha=1.0 +trainer.v1.roles.kind=patches

and verl's own options; `roles` takes alpha and the arguments of srpo.corrupt_image. Prompts must ask for the
tags of srpo.py. clip_ratio_c: no dual clip. As in verl, k3 ends at 10, a group of equal outcomes may keep a
rounding error for advantages, and a row that pads a mini-batch counts in its mean, with a loss of 0.

A step costs one more forward pass of the actor, and one process, the trainer's, corrupts all the images. A
response with a tool's turn stops the run, a video stays as it is. What examples/verl_sapo.py says of
processors, of a running cluster and of FSDP2 holds here too.

Ran in float32 on CPUs (tests/test_verl_nodes.py): main_ppo on a Ray node of one rank, once on two such nodes,
FSDP2 over gloo, tiny_vlm, `generate` for vLLM; two steps equal srpo.py's in one process to 1e-6. Of Qwen's
families only the images ran (tests/test_verl.py). Never ran: the pip line, a GPU, NCCL, vLLM, two machines,
bf16, verl's own data set, LoRA, a model larger than the tiny one.
"""

import asyncio
import zlib

import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from tensordict import NonTensorStack, TensorDict
from torch import Tensor
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.tokenizer import build_multimodal_processor_inputs
from verl.workers.utils.padding import response_from_nested, response_to_nested

import srpo

NEEDED = {"algorithm.adv_estimator": "grpo", "algorithm.norm_adv_by_std_in_grpo": True,
          "algorithm.rollout_correction.bypass_mode": False, "actor_rollout_ref.actor.clip_ratio_c": 1e9,
          "actor_rollout_ref.actor.loss_agg_mode": "seq-mean-token-mean",
          "actor_rollout_ref.actor.policy_loss.loss_mode": "vanilla"}


@register_trainer("roles")
class SRPOTrainer(PPOTrainerSync):
    def __init__(self, config):
        for name, needed in NEEDED.items():
            if (value := OmegaConf.select(config, name)) != needed:
                raise ValueError(f"{name} is {value}: expected {needed}")
        self.corruption = dict(config.trainer.v1.get("roles", {}))
        self.alpha = self.corruption.pop("alpha", 1.0)                      # (S5); 0 is verl's GRPO
        config.trainer.v1.trainer_mode = "sync"                             # other names are async to verl
        super().__init__(config)

    def _init_tokenizer(self):
        super()._init_tokenizer()
        if self.processor is None:                                          # of a text model, or unknown
            raise ValueError("processor is None: expected one that verl knows, for images")

    def _compute_advantage(self, batch, metrics):
        batch = super()._compute_advantage(batch, metrics)                  # verl's GRPO, (S1)
        other = self.log_probs_of_corrupted(batch)                          # (B, T)
        fields = ["responses", "response_mask", "old_log_probs", "advantages"]
        data = tq.kv_batch_get(batch.keys, batch.partition_id, fields)
        silent = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id   # only these: a tag may be special
        pieces = [["" if i in silent else self.tokenizer.decode([i]) for i in row.tolist()]
                  for row in data["responses"].unbind()]
        padded = data.to_padded_tensor()                                    # (B, T)
        perception, reasoning = srpo.split_roles(pieces, padded["response_mask"])
        on_image = srpo.contrast(padded["old_log_probs"], other, padded["response_mask"])
        contrasts = torch.where(perception, on_image, -on_image)            # (S2)
        weights = srpo.role_weights(contrasts, perception, reasoning)       # (S3), (S4)
        advantages = srpo.srpo_advantages(padded["advantages"][:, 0], weights, self.alpha)  # (S5)
        for name, role in {"perception": perception, "reasoning": reasoning}.items():
            count = role.sum().clamp(min=1)                                 # means, 0 without any
            metrics[f"contrast/{name}"] = (contrasts[role].sum() / count).item()
            metrics[f"weight/{name}"] = (weights[role].sum() / count).item()
        rows = {"advantages": response_to_nested(advantages, data["response_mask"])}
        return tq.kv_batch_put(batch.keys, batch.partition_id, TensorDict(rows, batch_size=len(batch)))

    def log_probs_of_corrupted(self, batch: tq.KVBatchMeta) -> Tensor:
        """The actor's log-probabilities (B, T) of the responses, where it sees corrupted images."""
        where = batch.keys, batch.partition_id
        rows = tq.kv_batch_get(*where, ["raw_prompt", "multi_modal_inputs"])
        seeds = [zlib.crc32(key.encode()) for key in batch.keys]            # others in each response and step
        inputs = map(self.corrupted, rows["raw_prompt"], rows["multi_modal_inputs"], seeds)
        inputs = TensorDict({"multi_modal_inputs": NonTensorStack(*inputs)}, batch_size=len(batch))
        tq.kv_batch_put(*where, inputs)
        batch.extra_info.update(calculate_entropy=False, compute_loss=False, no_lora_adapter=False,
                                temperature=self.config.actor_rollout_ref.rollout.temperature)
        self.actor_rollout_wg.compute_log_prob(batch)
        tq.kv_batch_put(*where, rows.select("multi_modal_inputs"))          # the true images, to train on
        found = tq.kv_batch_get(*where, ["log_probs", "response_mask"])
        return response_from_nested(found["log_probs"], found["response_mask"]).to_padded_tensor(0.0)

    def corrupted(self, prompt: list[dict], inputs: dict, seed: int) -> dict:
        """The model's inputs of a prompt's images, corrupted; made as verl's agent loop made `inputs`."""
        if "pixel_values" not in inputs:                                    # no image, or a row of padding
            return inputs
        options, data = self.config.data, self.train_dataset
        look = getattr(data, "process_multi_modal_info", None) or data.process_vision_info
        size = getattr(self.processor.image_processor, "patch_size", 14)
        images, *_ = asyncio.run(look(prompt, image_patch_size=size, config=options))
        images = [srpo.corrupt_image(image.convert("RGB"), seed=seed, **self.corruption) for image in images]
        text = self.processor.apply_chat_template(prompt, tokenize=False)
        made = build_multimodal_processor_inputs(self.processor, text=[text], images=images,
                                                 mm_processor_kwargs=options.get("mm_processor_kwargs"))
        return inputs | {"pixel_values": made["pixel_values"]}
