"""examples/verl_*.py against verl's estimator and losses, and in verl's own trainer, workers and engine.

One process, one CPU. Stand-ins: a dict for the TransferQueue, calls for Ray, a plain module for FSDP's; the
real ones are in tests/test_verl_nodes.py.
verl has an environment of its own, as it pins an older transformers; elsewhere this file is skipped.
"""

import copy
import inspect
import re
import zlib
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers.modeling_outputs import TokenClassifierOutput

pytest.importorskip("verl")

import transfer_queue
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from tensordict import NonTensorStack, TensorDict
from verl.experimental.agent_loop import AgentLoopWorker
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
import srpo
import toy_env
import train_small
from examples import verl_sapo, verl_srpo

LENGTHS, PROMPTS = [5, 1, 7, 3, 0, 6], [3, 2, 4, 1, 2, 5]                   # 0: a padding row of verl's
TOKENS = [max(n, 1) for n in LENGTHS]                                       # it has a token, masked out
CONFIG = dict(ppo_micro_batch_size_per_gpu=1, loss_agg_mode="seq-mean-token-mean")
TRAINERS = {verl_sapo: verl_sapo.SAPOTrainer, verl_srpo: verl_srpo.SRPOTrainer}
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
def header_options(example):
    """Of the command in the header of the example."""
    return re.findall(r"\S+=\S+", example.__doc__.split("main_ppo")[1].split("\n\n")[0])


def settings(*more, example=verl_sapo):
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=[*header_options(example), *more])


@pytest.mark.parametrize("example", TRAINERS)
def test_the_command_in_the_header_makes_a_synchronous_trainer(example):
    config = settings(example=example)
    trainer = get_trainer_cls(config.trainer.v1.trainer_mode)(config)
    assert type(trainer) is TRAINERS[example] and trainer.use_reference_policy
    assert isinstance(trainer.replay_buffer, ReplayBuffer)
    assert not isinstance(trainer.replay_buffer, ReplayBufferAsync)
    if example is verl_sapo:
        assert trainer.use_critic and trainer.options == {"top_percent": 30, "value_at": "start"}
    else:
        assert not trainer.use_critic and trainer.alpha == 1 and trainer.corruption == {"kind": "patches"}
    assert core_algos.POLICY_LOSS_REGISTRY["sapo"] is core_algos.compute_policy_loss_sapo  # the other SAPO's


@pytest.mark.parametrize("example", TRAINERS)
def test_settings_that_would_be_another_method_are_refused(example):
    config = settings(example=example)
    for name in example.NEEDED:
        changed = config.copy()
        OmegaConf.update(changed, name, "other")
        with pytest.raises(ValueError, match=f"{name} is other: expected"):
            TRAINERS[example](changed)


@pytest.mark.parametrize("example", TRAINERS)
def test_a_processor_that_verl_does_not_know_is_refused(example):
    known = re.findall(r'case "(\w+)":', inspect.getsource(hf_processor))
    assert verl_sapo.PROCESSORS == known
    trainer = TRAINERS[example](settings("actor_rollout_ref.model.path=tiny_vlm", example=example))
    with pytest.raises(ValueError, match="processor is (LlavaProcessor: expected Qwen2VLProcessor or|None)"):
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
        self.critic, self.config = critic, critic.backbone.config
        torch.nn.init.normal_(critic.head.weight, std=0.1, generator=torch.Generator().manual_seed(0))

    def forward(self, **inputs):
        hidden = self.critic.backbone(**inputs).last_hidden_state
        return TokenClassifierOutput(logits=self.critic.head(hidden))       # FSDP2 finds tensors in it


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


def message(problem):
    """A problem as verl's data sets give it."""
    content = [{"type": "image", "image": problem.image}, {"type": "text", "text": problem.question}]
    return [{"role": "user", "content": content}]


class Data:
    """Finds a prompt's images, as verl's data sets do."""

    @classmethod
    async def process_vision_info(cls, messages, **_):
        return [part["image"] for part in messages[0]["content"] if part["type"] == "image"], None


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
    columns["uid"] = NonTensorStack(*(str(i // 4) for i in range(len(rows))))
    columns["raw_prompt"] = NonTensorStack(*map(message, roll.problems))
    return TensorDict(columns, batch_size=len(rows))


def score(model, roll, temperature=1.0, **others):
    """Log-probabilities (B, T) and logits (B, T, V) of a rollout. others: inputs in place of its own."""
    inputs = train_small.full_inputs(roll.inputs | others, roll.ids, roll.mask)
    logits = model(**inputs).logits[:, -roll.mask.shape[1] - 1:-1] / temperature
    return logits.log_softmax(-1).gather(2, roll.ids[..., None])[..., 0], logits


def alone(policy, values, reference, optimizers, roll, outcome, temperature=1.0, value_at="last", size=4,
          share=1.0):
    """The same step by sapo.py alone, on the rollout padded as a whole, in mini-batches of `size`.

    share: of real rows in verl's mini-batch. -> entropy; ends; the last losses and gradient norms
    """
    inputs, mask = train_small.full_inputs(roll.inputs, roll.ids, roll.mask), roll.mask
    log_probs = lambda model: score(model, roll, temperature)[0]            # (B, T)

    def value():
        return values(**inputs).logits[:, -mask.shape[1] - 1:-1, 0]         # (B, T)

    with torch.no_grad():
        old, logits = score(policy, roll, temperature)
        entropy = sapo.token_entropy(logits)
        ends = sapo.ends_by_entropy(entropy, mask, 30)
        rewards = sapo.kl_rewards(outcome, old, log_probs(reference), mask, 0.001)
        advantages, returns, value_mask = sapo.segment_gae(rewards, value(), ends, mask, 1.0, 0.99, value_at)
    for rows in torch.arange(len(mask)).split(size):
        given = log_probs(policy), old, advantages, ends, mask
        policy_loss, _ = sapo.policy_loss(*(x[rows] for x in given))
        losses = policy_loss * share, sapo.value_loss(value()[rows], returns[rows], value_mask[rows]) * share
        sum(losses).backward()
        norms = [norm_and_step(*pair) for pair in zip((policy, values), optimizers)]
    return entropy, ends, [*losses, *norms]


def norm_and_step(model, optimizer):
    norm = torch.nn.utils.get_total_norm([x.grad for x in model.parameters() if x.grad is not None])
    optimizer.step()
    optimizer.zero_grad()
    return norm


def weighed(policy, roll, pixels, outcome, group):
    """SRPO's advantages (B, T) by srpo.py alone, and the old log-probabilities. pixels: corrupted."""
    with torch.no_grad():
        old, other = score(policy, roll)[0], score(policy, roll, pixel_values=pixels)[0]
    perception, reasoning = srpo.split_roles(roll.pieces, roll.mask)
    on_image = srpo.contrast(old, other, roll.mask)
    weights = srpo.role_weights(torch.where(perception, on_image, -on_image), perception, reasoning)
    return srpo.srpo_advantages(srpo.group_advantages(outcome, group), weights), old


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


def test_srpos_advantages_in_verls_trainer_are_those_of_srpo_alone(queue, monkeypatch):
    torch.manual_seed(0)
    config = train_small.complete(train_small.Config(device="cpu", algo="srpo"))
    policy, processor, *_ = train_small.load(config)
    parts = dict(actor_rollout_wg=Worker(Engine(policy, 0.0), queue), distillation_config=None,
                 tokenizer=processor.tokenizer, processor=processor, train_dataset=Data)
    monkeypatch.setattr(PPOTrainerSync, "_setup", lambda self: self.__dict__.update(parts))
    trainer = verl_srpo.SRPOTrainer(settings("+trainer.v1.roles.patch=8", example=verl_srpo))
    trainer._setup()
    problems = [toy_env.make_problem(i // 4) for i in range(8)]
    roll = train_small.rollout(policy, processor, train_small.toy_task(config), problems, 46)
    outcome, keys, metrics = torch.randn(8), [f"{i // 4}_{i % 4}_0" for i in range(8)], {}
    batch = queue.kv_batch_put(keys, "train", as_verl(roll, outcome))
    batch = trainer._compute_advantage(trainer._compute_old_log_prob(batch, metrics), metrics)
    seeds = [zlib.crc32(key.encode()) for key in keys]
    images = [srpo.corrupt_image(p.image, patch=8, seed=seed) for p, seed in zip(problems, seeds)]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    advantages, _ = weighed(policy, roll, pixels, outcome, group=4)
    for i, key in enumerate(keys):
        close(queue[key]["advantages"], advantages[i][roll.mask[i]], atol=2e-6)
        assert queue[key]["multi_modal_inputs"]["pixel_values"].equal(roll.inputs["pixel_values"][i:i + 1])
    assert metrics["weight/perception"] > 1.1 and metrics["contrast/perception"] > 1
    assert len({image.tobytes() for image in images}) == 8                  # though there are two problems


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_an_image_with_no_patch_blackened_is_what_verls_agent_loop_made(family, tmp_path):
    from test_models import FAMILIES, make_model

    try:
        make_model(FAMILIES[family], tmp_path)
    except ImportError as error:                                            # torchvision
        pytest.skip(str(error))
    images = [toy_env.make_problem(i).image.resize((130, 60 + 40 * i)) for i in range(2)]
    prompt = [{"role": "user", "content": [{"type": "image", "image": image} for image in images]}]
    processor = hf_processor(tmp_path)
    text = processor.apply_chat_template(prompt, tokenize=False)
    ids = processor(text=[text], images=images, return_tensors="pt")["input_ids"]
    agent = SimpleNamespace(processor=processor, tokenizer=processor.tokenizer)
    output = SimpleNamespace(multi_modal_data={"images": images}, mm_processor_kwargs={})
    inputs = AgentLoopWorker._compute_multi_modal_inputs(agent, output, ids)
    trainer = verl_srpo.SRPOTrainer(settings(example=verl_srpo))
    trainer.processor, trainer.train_dataset = processor, Data
    for trainer.corruption in ({"share": 0}, {"share": 0.5}):
        found = trainer.corrupted(prompt, inputs, seed=0)
        assert found.keys() == inputs.keys() and found["pixel_values"].shape == inputs["pixel_values"].shape
        assert found["pixel_values"].equal(inputs["pixel_values"]) == (trainer.corruption["share"] == 0)
