"""SAPO in verl, for whom one machine is too small: verl (Ray, FSDP, vLLM) is the engine, sapo.py the maths.

NOT verl's loss_mode="sapo": that is *Soft Adaptive Policy Optimization* (arXiv 2511.20347), another method.

verl's registries cannot carry SAPO: an advantage estimator is given neither values nor entropies, a policy
loss no ends, and a loss registered as "sapo" would silently replace the other method's. A trainer class can,
without a patch, from verl 0.9.0 on. PYTHONPATH is this repository's folder; two lines are for each node:

    pip install "verl[vllm,fsdp]==0.9.1" && export PYTHONPATH=... VERL_USE_EXTERNAL_MODULES=examples.verl_sapo
    ray start --head  # on the others: --address=HEAD:6379
    python -m verl.trainer.main_ppo trainer.v1.trainer_mode=segments critic.enable=True \\
        algorithm.lam=0.99 algorithm.use_kl_in_reward=True algorithm.kl_ctrl.kl_coef=0.001 \\
        actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean critic.cliprange_value=inf \\
        +trainer.v1.segments.top_percent=30 +trainer.v1.segments.value_at=start

and verl's own options. As in the paper, unlike verl: advantages are not whitened, no dual clip, no 0.5 in the
value loss. As in verl, a row that pads a mini-batch counts in its mean, with a loss of 0.

[fsdp] pins TRL 0.27, whose value head makes a VLM a critic, and flash-attn, which that needs. TRL 1.16 has no
such head; beside it verl builds no model. A running cluster learns neither variable from verl: export before
`ray start`, or set ray_kwargs.ray_init.runtime_env. verl shows the model no image if it does not know its
processor by name; the trainer refuses all but PROCESSORS: Qwen's, and Mllama, where verl's own loop fails.
FSDP2 needs ….wrap_policy.transformer_layer_cls_to_wrap=[…] for a SigLIP or CLIP tower, embeddings untied.

Ran in float32 on CPUs (tests/test_verl_nodes.py): main_ppo on two Ray nodes of a rank each, FSDP2 over gloo,
tiny_vlm, `generate` for vLLM; two steps equal sapo.py's in one process to 1e-6. Never ran: the pip line, a
GPU, NCCL, vLLM, two machines, bf16, TRL's value head, a model of PROCESSORS or larger than the tiny one.
"""

from functools import partial

import transfer_queue as tq
from omegaconf import OmegaConf
from tensordict import TensorDict
from torch import Tensor
from transformers import AutoProcessor
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.metric import Metric
from verl.workers.utils.padding import no_padding_2_padding, response_to_nested

import sapo

NEEDED = {"critic.enable": True, "algorithm.adv_estimator": "gae", "distillation.enabled": False,
          "algorithm.rollout_correction.bypass_mode": False, "algorithm.rollout_correction.rollout_is": None,
          "actor_rollout_ref.actor.use_kl_loss": False, "actor_rollout_ref.actor.entropy_coeff": 0,
          "actor_rollout_ref.actor.loss_agg_mode": "seq-mean-token-mean"}
PROCESSORS = [f"{name}Processor" for name in "Qwen2VL Qwen2_5_VL Qwen3VL Glm4v Glm46V Mllama Gemma4".split()]


def credit(data: TensorDict, gamma: float, lam: float, top_percent: float, value_at: str) -> dict:
    """The sampling policy's segments and their advantages, once per rollout. data: verl's, padded (B, T)."""
    mask, rewards = data["response_mask"], data.get("token_level_rewards", data["rm_scores"])  # (B, T)
    ends = sapo.ends_by_entropy(data["entropy"], mask, top_percent)
    found = sapo.segment_gae(rewards, data["values"], ends, mask, gamma, lam, value_at)
    return {"ends": ends} | dict(zip(("advantages", "returns", "value_mask"), found))


def policy_loss(clip_low: float, clip_high: float, model_output: dict, data: TensorDict, dp_group=None):
    """sapo.policy_loss of a micro-batch, as verl's actor calls it. -> loss (); metrics."""
    log_probs = no_padding_2_padding(model_output["log_probs"], data)       # (B, T)
    rows = data.select("response_mask", "old_log_probs", "advantages", "ends").to_padded_tensor()
    mask, ends = rows["response_mask"].bool(), rows["ends"]
    loss, metrics = sapo.policy_loss(log_probs, rows["old_log_probs"], rows["advantages"], ends, mask,
                                     clip_low, clip_high)
    share = _share(mask, data)
    metrics = {f"actor/{name}": Metric("max", x) if "max" in name else Metric("sum", x * share)
               for name, x in (metrics | {"pg_loss": loss}).items()}
    return loss * share, metrics


def value_loss(clip: float, model_output: dict, data: TensorDict, dp_group=None):
    """sapo.value_loss of a micro-batch, as verl's critic calls it. -> loss (); metrics."""
    values = no_padding_2_padding(model_output["values"], data)             # (B, T)
    rows = data.select("values", "returns", "value_mask").to_padded_tensor()
    loss = sapo.value_loss(values, rows["returns"], rows["value_mask"], rows["values"], clip)
    loss = loss * _share(rows["value_mask"], data)
    return loss, {"critic/vf_loss": Metric("sum", loss)}


def _share(mask: Tensor, data: TensorDict) -> Tensor:
    """Of a micro-batch's mean over responses in the mini-batch's on all GPUs, over which FSDP averages."""
    return mask.any(1).sum() / data["global_batch_size"] * data["dp_size"]


@register_trainer("segments")
class SAPOTrainer(PPOTrainerSync):
    def __init__(self, config):
        for name, needed in NEEDED.items():
            if (value := OmegaConf.select(config, name)) != needed:
                raise ValueError(f"{name} is {value}: expected {needed}")
        self.options = dict(top_percent=30.0, value_at="start") | dict(config.trainer.v1.get("segments", {}))
        config.trainer.v1.trainer_mode = "sync"                             # other names are async to verl
        super().__init__(config)

    def _init_tokenizer(self):
        super()._init_tokenizer()
        if self.processor is None:                                          # of a text model, or unknown
            remote = self.config.actor_rollout_ref.model.trust_remote_code
            found = AutoProcessor.from_pretrained(self.tokenizer.name_or_path, trust_remote_code=remote)
            if "Processor" in (name := type(found).__name__):
                raise ValueError(f"processor is {name}: expected {' or '.join(PROCESSORS)}, which verl knows")

    def _setup(self):
        super()._setup()
        actor, critic = self.config.actor_rollout_ref.actor, self.config.critic
        self.actor_rollout_wg.set_loss_fn(partial(policy_loss, actor.clip_ratio_low, actor.clip_ratio_high))
        self.critic_wg.set_loss_fn(partial(value_loss, critic.cliprange_value))

    def _compute_advantage(self, batch, metrics):
        batch = super()._compute_advantage(batch, metrics)                  # for the KL penalty in rewards
        fields = ["response_mask", "rm_scores", "token_level_rewards", "values", "entropy"]
        data = tq.kv_batch_get(batch.keys, batch.partition_id, fields)
        padded, algorithm = data.to_padded_tensor(), self.config.algorithm
        found = credit(padded, algorithm.gamma, algorithm.lam, **self.options)
        responses = padded["response_mask"].any(1).sum()                    # not counting rows of padding
        metrics["segments/mean"] = (found["ends"].sum() / responses).item()
        rows = {name: response_to_nested(x, data["response_mask"]) for name, x in found.items()}
        rows = TensorDict(rows, batch_size=len(batch))                      # in place of verl's GAE
        return tq.kv_batch_put(batch.keys, batch.partition_id, rows)
