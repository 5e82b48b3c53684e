"""examples/verl_sapo.py in verl's main_ppo, two Ray nodes of one rank each, against sapo.py in one process.

tests/verl_cpu.py says what is real and what stands in. All traffic is on 127.0.0.1. Skipped without verl.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("verl")
cluster_utils = pytest.importorskip("ray.cluster_utils")

from test_verl import Values, alone, close, header_options

import train_small

TESTS, TINY = Path(__file__).parent, Path(__file__).parent.parent / "tiny_vlm"
ENVIRONMENT = dict(
    VERL_USE_EXTERNAL_MODULES="verl_cpu", PYTHONPATH=f"{TESTS.parent}:{TESTS}", VERL_PLATFORM="cpu",
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",                                  # this keeps Ray on 127.0.0.1
    http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9",      # and its questions to a cloud
    no_proxy="127.0.0.1", GLOO_SOCKET_IFNAME="lo", RAY_USAGE_STATS_ENABLED="0",
    RAY_memory_monitor_refresh_ms="0", OMP_NUM_THREADS="1", TRANSFER_QUEUE_ENABLE="1")
ACTOR, REF = "actor_rollout_ref.actor", "actor_rollout_ref.ref"
OPTIONS = {
    "trainer": "device=cpu nnodes=2 n_gpus_per_node=1 total_training_steps=2 logger=[file] test_freq=-1 "
               "save_freq=-1 val_before_train=False resume_mode=disable",
    "data": "custom_cls.path=pkg://verl_cpu custom_cls.name=Problems train_files=- val_files=- shuffle=False "
            "train_batch_size=8 max_prompt_length=64 max_response_length=48 dataloader_num_workers=0",
    "reward": "num_workers=1 custom_reward_function.path=pkg://verl_cpu custom_reward_function.name=reward",
    "actor_rollout_ref.rollout": "name=generate agent.num_workers=1 tensor_model_parallel_size=1",
    f"actor_rollout_ref.rollout {REF}": "log_prob_micro_batch_size_per_gpu=2",
    "transfer_queue": "backend.SimpleStorage.num_data_storage_units=1",
    "actor_rollout_ref.model critic.model": f"path={TINY} tokenizer_path={TINY} use_remove_padding=False "
                                            "override_config.attn_implementation=sdpa",
    f"{ACTOR} {REF} critic": "strategy=fsdp2",
    f"{ACTOR} critic": "ppo_mini_batch_size=8 ppo_micro_batch_size_per_gpu=2 use_dynamic_bsz=False "
                       "optim.optimizer=SGD optim.weight_decay=0 optim.clip_grad=1e9",
    f"{ACTOR}.optim": "lr=0.05",
    "critic.optim": "lr=0.005",
    f"{ACTOR}.fsdp_config {REF}.fsdp_config critic.fsdp":
        "use_torch_compile=False mixed_precision={param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32} "
        "wrap_policy.transformer_layer_cls_to_wrap=[LlamaDecoderLayer,SiglipEncoderLayer]"}


@pytest.fixture
def out(tmp_path, monkeypatch):
    """What two steps on two nodes have recorded, by the command in the header of the example: a folder."""
    environment = ENVIRONMENT | dict(VERL_CPU_OUT=tmp_path, VERL_FILE_LOGGER_PATH=tmp_path / "log")
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))                                # before the nodes start
    options = [f"++{place}.{option}" for places, options in OPTIONS.items()
               for place in places.split() for option in options.split()]
    node = dict(num_cpus=8, num_gpus=1, object_store_memory=2 ** 27, node_ip_address="127.0.0.1")
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=node | dict(include_dashboard=False))
    try:
        cluster.add_node(**node)
        join = f"+ray_kwargs.ray_init={{address:'{cluster.address}',_node_ip_address:127.0.0.1}}"
        command = [sys.executable, "-m", "verl.trainer.main_ppo", *header_options(), *options, join,
                   "hydra.run.dir=.", "hydra.output_subdir=null"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-9000:] + done.stderr[-9000:]
    finally:
        cluster.shutdown()
    return tmp_path


def test_two_steps_on_two_nodes_are_those_of_sapo_alone(out):
    config = train_small.complete(train_small.Config(device="cpu"))
    policy, processor, critic, reference = train_small.load(config)
    values = Values(critic).eval()
    before = torch.load(out / "actor.0.0.pt")[0], torch.load(out / "critic.0.pt")
    critic.load_state_dict(before[1])
    optimizers = torch.optim.SGD(policy.parameters(), 0.05), torch.optim.SGD(critic.parameters(), 0.005)
    for step, line in enumerate((out / "log").read_text().splitlines(), 1):
        rows = [torch.load(path) for path in out.glob(f"response.{step - 1}.*.pt")]
        assert len(rows) == {1: 8, 2: 6}[step]                              # verl pads the second to 8
        prompts, responses, pixels = zip(*rows)
        inputs = processor.tokenizer.pad(dict(input_ids=prompts), padding_side="left", return_tensors="pt")
        texts = processor.tokenizer.batch_decode(responses, skip_special_tokens=True)
        ids = torch.nn.utils.rnn.pad_sequence(responses, batch_first=True)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(x) for x in responses])[:, None]
        roll = SimpleNamespace(inputs=dict(inputs, pixel_values=torch.cat(pixels)), ids=ids, mask=mask)
        outcome = torch.tensor([float(len(text) % 3) for text in texts])
        _, ends, expected = alone(policy, values, reference, optimizers, roll, outcome, value_at="start",
                                  size=8, share=len(rows) / 8)
        logged = json.loads(line)["data"]
        names = "actor/pg_loss", "critic/vf_loss", "actor/grad_norm", "critic/grad_norm"
        close(torch.tensor([logged[name] for name in names]), torch.stack(expected).detach())
        assert logged["segments/mean"] == pytest.approx(ends.sum(1).float().mean().item())
        (actor, first), (same, second) = (torch.load(out / f"actor.{step}.{rank}.pt") for rank in (0, 1))
        assert first != second                                              # a rank on each node
        close(actor, same, atol=0, rtol=0)                                  # as the two servers got it
        for was, mine, verls in zip(before, (policy, critic), (actor, torch.load(out / f"critic.{step}.pt"))):
            close(verls, dict(mine.state_dict()))
            assert max((verls[name] - x).abs().max() for name, x in was.items()) > 1e-3
    assert step == 2
