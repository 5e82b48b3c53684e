"""examples/verl_*.py in verl's main_ppo, on Ray nodes of one rank each, against one process without verl.

tests/verl_cpu.py says what is real and what stands in. All traffic is on 127.0.0.1. Skipped without verl.
"""

import json
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("verl")
cluster_utils = pytest.importorskip("ray.cluster_utils")

from test_verl import Data, Values, alone, close, header_options, message, norm_and_step, score, weighed

import srpo
import toy_env
import train_small
from examples import verl_sapo, verl_srpo

TESTS, TINY = Path(__file__).parent, Path(__file__).parent.parent / "tiny_vlm"
ENVIRONMENT = dict(
    VERL_USE_EXTERNAL_MODULES="verl_cpu", PYTHONPATH=f"{TESTS.parent}:{TESTS}", VERL_PLATFORM="cpu",
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",                                  # this keeps Ray on 127.0.0.1
    http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9",      # and its questions to a cloud
    no_proxy="127.0.0.1", GLOO_SOCKET_IFNAME="lo", RAY_USAGE_STATS_ENABLED="0",
    RAY_memory_monitor_refresh_ms="0", OMP_NUM_THREADS="1", TRANSFER_QUEUE_ENABLE="1")
ACTOR, REF = "actor_rollout_ref.actor", "actor_rollout_ref.ref"
OPTIONS = {
    "trainer": "device=cpu n_gpus_per_node=1 total_training_steps=2 logger=[file] test_freq=-1 "
               "save_freq=-1 val_before_train=False resume_mode=disable",
    "data": "custom_cls.path=pkg://test_verl_nodes custom_cls.name=Problems train_files=- val_files=- "
            "shuffle=False train_batch_size=4 max_prompt_length=64 max_response_length=48 "
            "dataloader_num_workers=0",
    "reward": "num_workers=1",
    "reward.custom_reward_function": "path=pkg://test_verl_nodes name=reward",
    "actor_rollout_ref.rollout": "name=generate n=2 tensor_model_parallel_size=1 agent.num_workers=1 "
                                 "agent.default_agent_loop=keyed",
    f"actor_rollout_ref.rollout {REF}": "log_prob_micro_batch_size_per_gpu=2",
    "transfer_queue": "backend.SimpleStorage.num_data_storage_units=1",
    "actor_rollout_ref.model critic.model": f"path={TINY} tokenizer_path={TINY} use_remove_padding=False "
                                            "override_config.attn_implementation=sdpa",
    f"{ACTOR} {REF} critic": "strategy=fsdp2",
    f"{ACTOR} critic": "ppo_mini_batch_size=4 ppo_micro_batch_size_per_gpu=2 use_dynamic_bsz=False "
                       "optim.optimizer=SGD optim.weight_decay=0 optim.clip_grad=1e9",
    f"{ACTOR}.optim": "lr=0.05",
    "critic.optim": "lr=0.005",
    f"{ACTOR}.fsdp_config {REF}.fsdp_config critic.fsdp":
        "use_torch_compile=False mixed_precision={param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32} "
        "wrap_policy.transformer_layer_cls_to_wrap=[LlamaDecoderLayer,SiglipEncoderLayer]"}


class Problems(torch.utils.data.Dataset, Data):
    """Four a step, two responses each. One of the second step gets none, so that verl pads the mini-batch."""

    def __init__(self, **_):
        """Of verl's, none is of use."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {"raw_prompt": message(toy_env.make_problem(i)), "index": i, "data_source": "toy",
                "reward_model": {"ground_truth": None}, "__rollout_n__": 0 if i == 5 else 2}


def reward(solution_str, **_):
    """Whatever differs among responses."""
    return float(zlib.crc32(solution_str.encode()) % 7)


@pytest.fixture
def out(tmp_path, monkeypatch, request):
    """What two steps on some nodes have recorded, by the command in the header of the example: a folder."""
    example, nodes = request.param
    environment = ENVIRONMENT | dict(VERL_CPU_OUT=tmp_path, VERL_FILE_LOGGER_PATH=tmp_path / "log")
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))                                # before the nodes start
    options = [f"++{place}.{option}" for places, options in OPTIONS.items()
               for place in places.split() for option in options.split()]
    node = dict(num_cpus=8, num_gpus=1, object_store_memory=2 ** 27, node_ip_address="127.0.0.1")
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=node | dict(include_dashboard=False))
    try:
        for _ in range(nodes - 1):
            cluster.add_node(**node)
        join = f"+ray_kwargs.ray_init={{address:'{cluster.address}',_node_ip_address:127.0.0.1}}"
        command = [sys.executable, "-m", "verl.trainer.main_ppo", *header_options(example), *options, join,
                   f"trainer.nnodes={nodes}", "hydra.run.dir=.", "hydra.output_subdir=null"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-9000:] + done.stderr[-9000:]
    finally:
        cluster.shutdown()
    return tmp_path


def recorded(out, step, processor):
    """Keys of a step's responses, their images, the rollout as train_small.py has it, and the outcome."""
    rows = [torch.load(path, weights_only=False) for path in sorted(out.glob(f"response.{step - 1}.*.pt"))]
    assert len(rows) == {1: 8, 2: 6}[step]                                  # verl pads the second to 8
    keys, prompts, responses, images = zip(*rows)
    tokenizer, ids = processor.tokenizer, torch.nn.utils.rnn.pad_sequence(responses, batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(x) for x in responses])[:, None]
    inputs = tokenizer.pad(dict(input_ids=prompts), padding_side="left", return_tensors="pt")
    pieces = [tokenizer.batch_decode(x[:, None], skip_special_tokens=True) for x in responses]
    roll = SimpleNamespace(inputs=dict(inputs, pixel_values=see(processor, images)), ids=ids, mask=mask,
                           pieces=pieces)
    return keys, images, roll, torch.tensor([reward("".join(row)) for row in pieces])


def see(processor, images):
    return processor.image_processor([*images], return_tensors="pt")["pixel_values"]


def actor_of(out, step, nodes):
    """The actor's weights, as the servers got them from a rank on each node."""
    actors, where = zip(*(torch.load(out / f"actor.{step}.{rank}.pt") for rank in range(nodes)))
    assert len({*where}) == nodes
    close(actors, actors[:1] * nodes, atol=0, rtol=0)
    return actors[0]


def assert_moved_as(model, verls, was):
    close(verls, dict(model.state_dict()))
    assert max((verls[name] - x).abs().max() for name, x in was.items()) > 1e-3


@pytest.mark.parametrize("out", [(verl_sapo, 2)], indirect=True)
def test_two_steps_on_two_nodes_are_those_of_sapo_alone(out):
    config = train_small.complete(train_small.Config(device="cpu"))
    policy, processor, critic, reference = train_small.load(config)
    values = Values(critic).eval()
    before = actor_of(out, 0, 2), torch.load(out / "critic.0.pt")
    values.load_state_dict(before[1])
    optimizers = torch.optim.SGD(policy.parameters(), 0.05), torch.optim.SGD(critic.parameters(), 0.005)
    for step, line in enumerate((out / "log").read_text().splitlines(), 1):
        keys, _, roll, outcome = recorded(out, step, processor)
        _, ends, expected = alone(policy, values, reference, optimizers, roll, outcome, value_at="start",
                                  size=8, share=len(keys) / 8)
        logged = json.loads(line)["data"]
        names = "actor/pg_loss", "critic/vf_loss", "actor/grad_norm", "critic/grad_norm"
        close(torch.tensor([logged[name] for name in names]), torch.stack(expected).detach())
        assert logged["segments/mean"] == pytest.approx(ends.sum(1).float().mean().item())
        assert_moved_as(policy, actor_of(out, step, 2), before[0])
        assert_moved_as(values, torch.load(out / f"critic.{step}.pt"), before[1])
    assert step == 2


@pytest.mark.parametrize("out", [(verl_srpo, 1)], indirect=True)
def test_two_steps_are_those_of_srpo_alone(out):
    config = train_small.complete(train_small.Config(device="cpu", algo="srpo"))
    policy, processor, _, reference = train_small.load(config)
    before, optimizer = actor_of(out, 0, 1), torch.optim.SGD(policy.parameters(), 0.05)
    for step, line in enumerate((out / "log").read_text().splitlines(), 1):
        keys, images, roll, outcome = recorded(out, step, processor)
        corrupted = [srpo.corrupt_image(x, seed=zlib.crc32(key.encode())) for x, key in zip(images, keys)]
        advantages, old = weighed(policy, roll, see(processor, corrupted), outcome, group=2)
        loss, _ = srpo.grpo_loss(score(policy, roll)[0], old, advantages, roll.mask, kl_coef=0.01,
                                 ref_log_probs=score(reference, roll)[0])
        (loss * len(keys) / 8).backward()
        expected = loss * len(keys) / 8, norm_and_step(policy, optimizer)
        logged = json.loads(line)["data"]
        found = torch.tensor([logged[name] for name in ("actor/loss", "actor/grad_norm")])
        close(found, torch.stack(expected).detach())
        assert_moved_as(policy, actor_of(out, step, 1), before)
    assert step == 2
