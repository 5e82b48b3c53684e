"""verl 0.9.1 on CPUs, by what it lets one register: platform, engines, agent loop and rollout replica.

For tests/test_verl_nodes.py. Real: Ray's workers, TransferQueue, FSDP2 over gloo, verl's agent loop, and the
weights' way to the rollout. Stand-ins: tiny_vlm, `generate` for vLLM, a linear head for TRL's, "GPU" a name.
VERL_USE_EXTERNAL_MODULES=verl_cpu loads this file in every process; it records in the folder VERL_CPU_OUT.
A patch of a private name gives the line of verl that needs it.
"""

import contextlib
import os
import sys
import zlib
from types import SimpleNamespace

import conftest  # noqa: F401  # torchvision may be another torch's

sys.modules["trl"] = None  # models/transformers/monkey_patch.py:352 wants a value head; TRL 1.16 has none

import ray  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaProcessor  # noqa: E402
from verl.plugin.platform.platform_base import PlatformBase  # noqa: E402
from verl.plugin.platform.platform_manager import PlatformRegistry  # noqa: E402


# ------------------------------------------------------------------------------------------------- platform
def answer(value=None):
    """A call of verl's to its device, with what a CPU answers."""
    return lambda *_, **__: value


@PlatformRegistry.register("cpu")
class PlatformCPU(PlatformBase):
    device_name = vendor_name = "cpu"
    device_module = SimpleNamespace(
        is_available=answer(True), get_device_name=answer("CPU"), mem_get_info=answer((1, 1)),
        get_rng_state=torch.get_rng_state, set_rng_state=torch.set_rng_state, **dict.fromkeys((
            "current_device empty_cache ipc_collect max_memory_allocated max_memory_reserved set_device "
            "memory_allocated memory_reserved reset_peak_memory_stats synchronize").split(), answer(0)))
    is_available, is_ipc_supported, device_count = answer(True), answer(False), answer(1)
    current_device, communication_backend_name = answer("cpu"), answer("gloo")
    ray_resource_name, visible_devices_envvar = answer("GPU"), answer("CUDA_VISIBLE_DEVICES")
    ray_noset_envvars, get_device_capability = answer([]), answer((None, None))
    manual_seed = manual_seed_all = set_device = synchronize = empty_cache = answer()
    set_allocator_settings = cudart = profiler_start = profiler_stop = answer()
    nvtx_range = answer(contextlib.nullcontext())


from verl.experimental.agent_loop.agent_loop import register  # noqa: E402  # these ask for the platform
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop  # noqa: E402
from verl.workers.engine.base import EngineRegistry  # noqa: E402
from verl.workers.engine.fsdp import transformer_impl  # noqa: E402
from verl.workers.rollout import base  # noqa: E402
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput  # noqa: E402

from examples import verl_sapo, verl_srpo  # noqa: E402, F401

OUT = os.environ["VERL_CPU_OUT"]
init_process_group = torch.distributed.init_process_group  # utils/distributed.py:63, :89: a device twice
torch.distributed.init_process_group = lambda backend=None, *args, **more: init_process_group(
    "gloo" if backend == "cpu:gloo,cpu:gloo" else backend, *args, **more)
transformer_impl.CPUOffloadPolicy = answer()  # transformer_impl.py:462 pins memory, which takes CUDA
LlavaProcessor.__name__ = "MllamaProcessor"  # utils/tokenizer/tokenizer.py:208; this one needs as little


# -------------------------------------------------------------------------------------------------- engines
EngineRegistry.register("language_model", "fsdp2", device="cpu")(transformer_impl.FSDPEngineWithLMHead)


@EngineRegistry.register("value_model", "fsdp2", device="cpu")
class Critic(transformer_impl.FSDPEngineWithValueHead):
    steps = 0

    def _build_module(self):                                                # utils/model.py:641: flash-attn
        from test_verl import Values, train_small                           # pytest too, so only here
        config = train_small.complete(train_small.Config(device="cpu"))
        module = Values(train_small.load(config)[2])
        torch.save(module.state_dict(), f"{OUT}/critic.0.pt")
        return module

    def optimizer_step(self):
        norm, self.steps = super().optimizer_step(), self.steps + 1
        state = {name: x.full_tensor() for name, x in self.module.state_dict().items()}
        torch.save(state, f"{OUT}/critic.{self.steps}.pt")
        return norm


# -------------------------------------------------------------------------------------------------- rollout
@register("keyed")
class Keyed(SingleTurnAgentLoop):
    """Tells the server the key that verl gives to the response."""

    async def run(self, sampling_params, **kwargs):
        key = "{uid}_{session_id}_0".format(**kwargs)
        return await super().run(sampling_params | {"key": key}, **kwargs)


class Server:
    """Samples in a process of its own. The arguments are those that verl gives to vLLM's."""

    def __init__(self, path, rank):
        self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
        self.images, self.rank = AutoProcessor.from_pretrained(path).image_processor, rank

    def set_weights(self, weights, node, steps):
        self.model.load_state_dict(weights)
        self.steps = steps
        torch.save((weights, node), f"{OUT}/actor.{steps}.{self.rank}.pt")

    async def generate(self, prompt_ids, sampling_params, image_data, **_):
        ids, pixels = torch.tensor([prompt_ids]), self.images(image_data, return_tensors="pt")["pixel_values"]
        _, session, _ = (key := sampling_params["key"]).split("_")
        torch.manual_seed(zlib.crc32(f"{prompt_ids}{session}{self.steps}".encode()))  # whoever is asked
        out = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, do_sample=True, top_k=0,
            max_new_tokens=46, output_logits=True, return_dict_in_generate=True)
        response = out.sequences[0, len(prompt_ids):]
        torch.save((key, prompt_ids, response, image_data[0]), f"{OUT}/response.{self.steps}.{key}.pt")
        log_probs = torch.cat(out.logits).log_softmax(-1).gather(1, response[:, None])[:, 0]
        return TokenOutput(token_ids=response.tolist(), log_probs=log_probs.tolist(), stop_reason="completed",
                           extra_fields={"global_steps": self.steps})

    async def sleep(self, **_):
        """Here and in the next calls a GPU's memory would change hands."""

    wake_up = clear_kv_cache = release_kv_cache = resume_kv_cache = sleep
    abort_all_requests = resume_generation = sleep


class Replica(RolloutReplica):
    async def launch_servers(self):
        self._server_address = f"server_{self.replica_rank}"
        server = ray.remote(Server).options(name=self._server_address, num_cpus=0)
        self.servers = [server.remote(self.model_config.path, self.replica_rank)]
        self._server_handle = self.servers[0]


class Adapter(base.BaseRollout):
    """The rank's end of the weights' way to its server."""

    async def update_weights(self, weights, global_steps=0, **_):
        server, node = f"server_{torch.distributed.get_rank()}", ray.get_runtime_context().get_node_id()
        weights = {name: x.clone() for name, x in weights}
        await ray.get_actor(server).set_weights.remote(weights, node, global_steps)

    resume = release = Server.sleep                                         # nothing was released


RolloutReplicaRegistry.register("generate", answer(Replica))
base._ROLLOUT_REGISTRY["generate", "async"] = "verl_cpu.Adapter"            # base.py:107: no function for it
