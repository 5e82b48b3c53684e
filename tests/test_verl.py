"""examples/verl_sapo.py against verl's estimator and losses, and in verl's own trainer, workers and engine.

One process, one CPU. Stand-ins: a dict for the TransferQueue, calls for Ray, a plain module for FSDP's; the
real ones are in tests/test_verl_nodes.py.
verl has an environment of its own, as it pins an older transformers; elsewhere this file is skipped.
"""

import copy
import inspect
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("verl")

import transfer_queue
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from tensordict import NonTensorStack, TensorDict
from verl.protocol import DataProto
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.ppo.v1 import PPOTrainerSync, get_trainer_cls
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync
from verl.utils import tensordict_utils as tu
from verl.utils.profiler import DistProfiler, DistProfilerExtension
from verl.utils.tokenizer import hf_processor
from verl.utils.torch_functional import masked_whiten
from verl.workers import engine_workers
from verl.workers.config import FSDPActorConfig, FSDPCriticConfig
from verl.workers.engine.fsdp import transformer_impl
from verl.workers.utils import losses

import sapo
import toy_env
import train_small
from examples import verl_sapo

LENGTHS, PROMPTS = [5, 1, 7, 3, 0, 6], [3, 2, 4, 1, 2, 5]                   # 0: a padding row of verl's
TOKENS = [max(n, 1) for n in LENGTHS]                                       # it has a token, masked out
CONFIG = dict(ppo_micro_batch_size_per_gpu=1, loss_agg_mode="seq-mean-token-mean")
close = partial(torch.testing.assert_close, atol=1e-6, rtol=1e-6)


# ---------------------------------------------------------------------------- random tensors as verl has them
def nested(rows):
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def put(data, **padded):
    """Padded (B, T) tensors among `data`, as ragged rows."""
    for name, x in padded.items():
        data[name] = nested(x[i, :n].clone() for i, n in enumerate(TOKENS))


def batch(spread=0.3, top_percent=40.0, value_at="start"):
    """Random rows as a worker of verl is given them, with segments; the padded tensors they are made of."""
    torch.manual_seed(0)
    names = ("values", "new_values", "entropy", "old_log_probs", "log_probs", "rm_scores")
    dense = {name: torch.randn(len(LENGTHS), max(LENGTHS)) for name in names}
    dense["log_probs"] = dense["old_log_probs"] + spread * dense["log_probs"]
    dense["response_mask"] = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    dense |= verl_sapo.credit(dense, 1.0, 0.9, top_percent, value_at)
    data = TensorDict({}, batch_size=len(LENGTHS))
    put(data, **dense)
    for name, lengths in (("prompts", PROMPTS), ("responses", TOKENS)):
        data[name] = nested(torch.zeros(n, dtype=torch.long) for n in lengths)
    tu.assign_non_tensor(data, dp_size=2, global_batch_size=len(LENGTHS), batch_num_tokens=sum(LENGTHS))
    return data, dense, dense["response_mask"]


def gradient(loss, data, name, x, rows=range(len(LENGTHS))):
    """Of `loss` by x (B, T), given to it as a model's output: over the prompt too, and one token earlier."""
    x = x.clone().requires_grad_()
    output = [torch.cat([x.new_full((PROMPTS[i] - 1,), 99.0), x[i, :TOKENS[i]], x.new_full((1,), 99.0)])
              for i in rows]
    value, metrics = loss(model_output={name: nested(output)}, data=data)
    return value.detach(), torch.autograd.grad(value, x)[0], metrics


# ------------------------------------------------------------------- verl's numbers, where they must be equal
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.99), (0.9, 0.5)])
def test_with_an_end_at_every_token_credit_is_verls_gae(gamma, lam):
    _, dense, mask = batch()
    dense["token_level_rewards"] = torch.randn(mask.shape)
    found, on = verl_sapo.credit(dense, gamma, lam, top_percent=100, value_at="start"), mask.bool()
    proto = DataProto(TensorDict(dense, batch_size=len(mask)))
    theirs = compute_advantage(proto, "gae", gamma, lam, config={})
    assert found["ends"].equal(on) and found["value_mask"].equal(on)
    close(found["returns"][on], theirs.batch["returns"][on])
    close(masked_whiten(found["advantages"], mask)[on], theirs.batch["advantages"][on])


@pytest.mark.parametrize("spread", [0.02, 1.0])
@pytest.mark.parametrize("mode", ["vanilla", "gspo"])
def test_with_an_end_at_every_token_or_one_the_policy_loss_is_verls(mode, spread):
    data, dense, mask = batch(spread)
    if mode == "gspo":                                                      # one advantage per response
        put(data, ends=sapo.ends_once(mask), advantages=dense["advantages"][:, :1].expand(mask.shape))
    else:
        put(data, ends=sapo.ends_every_token(mask), advantages=torch.randn(mask.shape))
    config = FSDPActorConfig(**CONFIG, rollout_n=1, clip_ratio_c=1e9, clip_ratio_high=0.28,  # c: no dual clip
                             policy_loss={"loss_mode": mode})
    ours = gradient(partial(verl_sapo.policy_loss, 0.2, 0.28), data, "log_probs", dense["log_probs"])
    theirs = gradient(partial(losses.ppo_loss, config), data, "log_probs", dense["log_probs"])
    close(ours[:2], theirs[:2])
    logged = [metrics["actor/pg_loss"].aggregate() for *_, metrics in (ours, theirs)]
    assert logged[0] == pytest.approx(logged[1], abs=1e-6)


@pytest.mark.parametrize("clip", [0.1, float("inf")])
def test_with_an_end_at_every_token_the_value_loss_is_twice_verls(clip):
    data, dense, _ = batch(top_percent=100)
    config = FSDPCriticConfig(**CONFIG, cliprange_value=clip)
    ours = gradient(partial(verl_sapo.value_loss, clip), data, "values", dense["new_values"])
    theirs = gradient(partial(losses.value_loss, config), data, "values", dense["new_values"])
    close(ours[:2], tuple(2 * x for x in theirs[:2]))


def test_the_policy_loss_is_sapos_over_the_responses():
    data, dense, mask = batch()
    real = mask.bool().any(1)
    share = real.sum() / len(mask) * 2                                      # of all rows, on two GPUs
    names = ("log_probs", "old_log_probs", "advantages", "ends", "response_mask")
    expected, metrics = sapo.policy_loss(*(dense[name][real] for name in names), 0.2, 0.2)
    loss = partial(verl_sapo.policy_loss, 0.2, 0.2)
    loss, _, logged = gradient(loss, data, "log_probs", dense["log_probs"])
    close(loss, expected * share)
    assert all(logged[f"actor/{name}"].aggregate() == pytest.approx(float(x if "max" in name else x * share))
               for name, x in metrics.items())


@pytest.mark.parametrize("value_at", ["start", "last"])
def test_values_are_trained_where_they_were_read(value_at):
    data, dense, mask = batch(value_at=value_at)
    starts = torch.nn.functional.pad(dense["ends"][:, :-1], (1, 0), value=True) & mask.bool()
    assert dense["value_mask"].equal(starts if value_at == "start" else dense["ends"])
    slope = gradient(partial(verl_sapo.value_loss, float("inf")), data, "values", torch.zeros(mask.shape))[1]
    assert (slope != 0).equal(dense["value_mask"])


@pytest.mark.parametrize("loss, name", [(partial(verl_sapo.policy_loss, 0.2, 0.2), "log_probs"),
                                        (partial(verl_sapo.value_loss, 0.5), "values")])
def test_micro_batches_add_up_also_where_one_is_all_padding(loss, name):
    data, dense, _ = batch()
    value, slope, metrics = gradient(loss, data, name, dense["log_probs"])
    rows = [(tu.index_select_tensor_dict(data, torch.tensor([i])), [i]) for i in range(len(LENGTHS))]
    parts = [gradient(loss, part, name, dense["log_probs"], i) for part, i in rows]
    close(sum(part[0] for part in parts), value)
    close(sum(part[1] for part in parts), slope)
    for key, metric in metrics.items():
        total = metric.init_list()
        for part in parts:
            total.extend(part[2][key])
        assert total.aggregate() == pytest.approx(metric.aggregate(), abs=1e-6)


# ----------------------------------------------------------------------------------- verl's own configuration
def header_options():
    """Of the command in the header of the example."""
    return re.findall(r"\S+=\S+", verl_sapo.__doc__.split("main_ppo")[1].split("\n\n")[0])


def settings(*more):
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=[*header_options(), *more])


def test_the_command_in_the_header_makes_a_synchronous_trainer():
    config = settings()
    trainer = get_trainer_cls(config.trainer.v1.trainer_mode)(config)
    assert type(trainer) is verl_sapo.SAPOTrainer and trainer.use_critic and trainer.use_reference_policy
    assert isinstance(trainer.replay_buffer, ReplayBuffer)
    assert not isinstance(trainer.replay_buffer, ReplayBufferAsync)
    assert trainer.options == {"top_percent": 30, "value_at": "start"}
    assert core_algos.POLICY_LOSS_REGISTRY["sapo"] is core_algos.compute_policy_loss_sapo  # the other SAPO's


def test_settings_that_would_not_be_sapo_are_refused():
    config = settings()
    for name in verl_sapo.NEEDED:
        changed = config.copy()
        OmegaConf.update(changed, name, "other")
        with pytest.raises(ValueError, match=f"{name} is other: expected"):
            verl_sapo.SAPOTrainer(changed)


def test_a_processor_that_verl_does_not_know_is_refused():
    known = re.findall(r'case "(\w+)":', inspect.getsource(hf_processor))
    assert verl_sapo.PROCESSORS == known
    trainer = verl_sapo.SAPOTrainer(settings("actor_rollout_ref.model.path=tiny_vlm"))
    with pytest.raises(ValueError, match="processor is LlavaProcessor: expected Qwen2VLProcessor or"):
        trainer._init_tokenizer()


# --------------------------------------------------------------------- verl's own trainer, workers and engine
class Queue(dict):
    """The TransferQueue's rows, in this process: key -> field -> tensor or anything else."""

    def kv_batch_put(self, keys, partition_id, fields):
        for i, key in enumerate(keys):
            self.setdefault(key, {}).update({name: fields[name][i] for name in fields.keys()})
        return transfer_queue.KVBatchMeta(keys=keys, tags=[{}] * len(keys), partition_id=partition_id)

    def kv_batch_get(self, keys, partition_id, select_fields=None):
        rows = [self[key] for key in keys]
        columns = {name: [row[name] for row in rows] for name in select_fields or rows[0] if name in rows[0]}
        return TensorDict({name: nested(x) if torch.is_tensor(x[0]) else NonTensorStack(*x)
                           for name, x in columns.items()}, batch_size=len(keys))


class Engine(transformer_impl.FSDPEngineWithLMHead):
    """verl's FSDP engine around a module that is not sharded."""
    is_param_offload_enabled = is_optimizer_offload_enabled = False

    def __init__(self, module, lr):
        self.module, self.optimizer = module, torch.optim.SGD(module.parameters(), lr)
        self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer, 1.0)
        self.optimizer_config = SimpleNamespace(clip_grad=1e9)
        self.engine_config = SimpleNamespace(entropy_checkpointing=False, forward_only=False, fsdp_size=1)
        self.ulysses_device_mesh = self.ulysses_parallel_group = None
        self.ulysses_sequence_parallel_size, self.use_ulysses_sp, self.pad_to_length = 1, False, False
        self._autocast_dtype, self._qat_enabled = torch.float32, False


class ValueEngine(Engine):
    prepare_model_outputs = transformer_impl.FSDPEngineWithValueHead.prepare_model_outputs


class Worker(engine_workers.TrainingWorker):
    """verl's worker with such an engine, called as verl's trainer calls a group of them."""

    def __init__(self, engine, queue):
        settings = dict(use_dynamic_bsz=False, use_fused_kernels=False, forward_only=False)
        settings |= dict(max_token_len_per_gpu=0, micro_batch_size_per_gpu=2)
        settings |= dict(infer_max_token_len_per_gpu=0, infer_micro_batch_size_per_gpu=2)
        self.engine, self.engine_config, self.model_config = engine, SimpleNamespace(**settings), {}
        self.flops_counter = SimpleNamespace(estimate_flops=lambda *_, **__: (0.0, 1.0))
        self.queue, self.device_name = queue, "cpu"
        DistProfilerExtension.__init__(self, DistProfiler(rank=0))

    def call(self, work, batch):
        data = self.queue.kv_batch_get(batch.keys, batch.partition_id)
        tu.assign_non_tensor(data, **batch.extra_info)
        out = work(data)
        if found := {name: x for name, x in out.items() if torch.is_tensor(x)}:
            self.queue.kv_batch_put(batch.keys, batch.partition_id, TensorDict(found, batch_size=len(batch)))
        return out

    def compute_log_prob(self, batch):
        return [self.call(super().infer_batch, batch)] * len(batch)

    compute_ref_log_prob = compute_log_prob

    def infer_batch(self, batch):
        return SimpleNamespace(futures=self.compute_log_prob(batch))

    def update_actor(self, batch):
        return {"metrics": tu.get(self.call(super().train_mini_batch, batch), "metrics")}

    def train_mini_batch(self, batch):
        return SimpleNamespace(get=lambda: self.update_actor(batch))


class Values(torch.nn.Module):
    """A critic as verl loads one: its logits are values, (B, L, 1)."""

    def __init__(self, critic):
        super().__init__()
        self.critic = critic
        torch.nn.init.normal_(critic.head.weight, std=0.1)

    def forward(self, **inputs):
        return SimpleNamespace(logits=self.critic.head(self.critic.backbone(**inputs).last_hidden_state))


@pytest.fixture
def queue(monkeypatch):
    queue = Queue()
    monkeypatch.setattr(transfer_queue, "kv_batch_put", queue.kv_batch_put)
    monkeypatch.setattr(transfer_queue, "kv_batch_get", queue.kv_batch_get)
    monkeypatch.setattr(transformer_impl, "get_device_id", lambda: "cpu")
    monkeypatch.setattr(transformer_impl, "get_device_name", lambda: "cpu")
    monkeypatch.setattr("ray.get", lambda x: x)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield queue
    torch.distributed.destroy_process_group()


def as_verl(roll, outcome):
    """A rollout as verl's agent loop leaves it in the queue."""
    rows = []
    for i, score in enumerate(outcome):
        prompt = roll.inputs["input_ids"][i][roll.inputs["attention_mask"][i] == 1]
        response = roll.ids[i][roll.mask[i]]
        whole, ones = torch.cat([prompt, response]), torch.ones_like(response)
        rows.append(dict(
            prompts=prompt, responses=response, input_ids=whole, position_ids=torch.arange(len(whole)),
            response_mask=ones, loss_mask=ones, rm_scores=score * (ones.cumsum(0) == len(ones)),
            rollout_log_probs=-torch.rand(len(ones))))
    columns = {name: nested(row[name] for row in rows) for name in rows[0]}
    pixels = [{"pixel_values": x[None]} for x in roll.inputs["pixel_values"]]
    columns["multi_modal_inputs"] = NonTensorStack(*pixels)
    columns["uid"] = NonTensorStack(*map(str, range(len(rows))))
    return TensorDict(columns, batch_size=len(rows))


def alone(policy, values, reference, optimizers, roll, outcome, temperature=1.0, value_at="last", size=4,
          share=1.0):
    """The same step by sapo.py alone, on the rollout padded as a whole, in mini-batches of `size`.

    share: of real rows in verl's mini-batch. -> entropy; ends; the last losses and gradient norms
    """
    inputs, mask = train_small.full_inputs(roll.inputs, roll.ids, roll.mask), roll.mask

    def score(model):
        logits = model(**inputs).logits[:, -mask.shape[1] - 1:-1] / temperature  # (B, T, V)
        return logits.log_softmax(-1).gather(2, roll.ids[..., None])[..., 0], logits

    def value():
        return values(**inputs).logits[:, -mask.shape[1] - 1:-1, 0]         # (B, T)

    with torch.no_grad():
        old, logits = score(policy)
        entropy = sapo.token_entropy(logits)
        ends = sapo.ends_by_entropy(entropy, mask, 30)
        rewards = sapo.kl_rewards(outcome, old, score(reference)[0], mask, 0.001)
        advantages, returns, value_mask = sapo.segment_gae(rewards, value(), ends, mask, 1.0, 0.99, value_at)
    for rows in torch.arange(len(mask)).split(size):
        policy_loss, _ = sapo.policy_loss(*(x[rows] for x in (score(policy)[0], old, advantages, ends, mask)))
        losses = policy_loss * share, sapo.value_loss(value()[rows], returns[rows], value_mask[rows]) * share
        sum(losses).backward()
        norms = [torch.nn.utils.get_total_norm([x.grad for x in model.parameters() if x.grad is not None])
                 for model in (policy, values)]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return entropy, ends, [*losses, *norms]


def weights(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


def test_three_steps_of_verls_trainer_are_those_of_sapo_alone(queue, monkeypatch):
    torch.manual_seed(0)
    config = train_small.complete(train_small.Config(device="cpu"))
    policy, processor, critic, reference = train_small.load(config)
    theirs = policy, Values(critic).eval()
    ours = copy.deepcopy(theirs)
    optimizers = [torch.optim.SGD(model.parameters(), lr) for model, lr in zip(ours, (0.03, 0.003))]
    task, temperature = train_small.toy_task(config), 2.0
    problems = [toy_env.make_problem(seed) for seed in range(8)]
    groups = dict(actor_rollout_wg=Worker(Engine(theirs[0], 0.03), queue), ref_in_actor=False,
                  critic_wg=Worker(ValueEngine(theirs[1], 0.003), queue), distillation_config=None,
                  ref_policy_wg=Worker(Engine(reference, 0.0), queue))
    monkeypatch.setattr(PPOTrainerSync, "_setup", lambda self: self.__dict__.update(groups))
    trainer = verl_sapo.SAPOTrainer(settings(
        "actor_rollout_ref.actor.ppo_mini_batch_size=4", "critic.ppo_mini_batch_size=4",
        f"actor_rollout_ref.rollout.temperature={temperature}", "trainer.v1.segments.value_at=last"))
    trainer._setup()
    for step in range(3):
        roll = train_small.rollout(policy, processor, task, problems, 12, temperature)
        cut = torch.arange(roll.mask.shape[1]) < 12 - torch.arange(8)[:, None]
        roll, outcome = roll._replace(mask=roll.mask & cut), torch.randn(8)  # all lengths differ
        keys, metrics, before = [f"{step}_{i}" for i in range(8)], {}, [weights(model) for model in ours]
        batch = queue.kv_batch_put(keys, "train", as_verl(roll, outcome))
        for work in (trainer._compute_old_log_prob, trainer._compute_ref_log_prob, trainer._compute_values,
                     trainer._compute_advantage, trainer._update_critic, trainer._update_actor):
            batch = work(batch, metrics)
        entropy, ends, _ = alone(*ours, reference, optimizers, roll, outcome, temperature)
        for i, key in enumerate(keys):
            close(queue[key]["entropy"], entropy[i][roll.mask[i]], atol=1e-5)
            assert queue[key]["ends"].equal(ends[i][roll.mask[i]])
        for old, mine, verls in zip(before, map(weights, ours), map(weights, theirs)):
            assert (mine - old).abs().max() > 1e-3
            torch.testing.assert_close(mine, verls, atol=2e-6, rtol=1e-5)
        assert metrics["segments/mean"] == pytest.approx(ends.sum(1).float().mean().item())
        assert metrics["actor/max_ratio_deviation"] > 1e-3                  # in the second mini-batch
