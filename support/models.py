"""Models: loading one, and its three roles: policy, critic and reference.

Policy and reference are called as any model of transformers, the critic is a sapo.SegmentCritic. `load` makes
three copies of a small model. `make_roles` lets the roles of a large one share what is frozen.
"""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from inspect import signature
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

import sapo
from support.run_folder import expect, first_line


# ------------------------------------------------------------------------------------------------------- load
def load_policy(name: str, device: str, dtype: torch.dtype = torch.float32) -> tuple:
    """Policy and processor of a folder or hub name. ValueError: no such model, not whole, not of use."""
    try:
        processor = transformers.AutoProcessor.from_pretrained(name)
        policy, found = transformers.AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype, output_loading_info=True)
        processor.tokenizer.padding_side = "left"
    except Exception as error:  # a library's: of any kind
        raise ValueError(f"model is {name!r}: expected an image-text-to-text model, a folder or "
                         f"a name ({first_line(error)})") from error
    missing = [*found["missing_keys"], *found["mismatched_keys"]]
    expect(not missing, "model", name,
           f"all weights, but {len(missing)} are missing or of another shape, {missing[:1]} the first")
    expect("logits_to_keep" in signature(policy.forward).parameters, "model", name,
           f"a class that takes logits_to_keep, not {type(policy).__name__}")
    policy = policy.to(device).eval()  # eval: no dropout, or the first ratio is not 1
    torch.backends.cudnn.allow_tf32 = False  # nor is it where rounding in an image tower hangs on batch size
    own, tokenizer = policy.generation_config.eos_token_id, processor.tokenizer
    eos = tokenizer.eos_token_id if own in (None, []) else own  # 0 is an id like any other
    expect(eos is not None, "model", name, "an end-of-sequence id, the model's or its tokenizer's")
    eos = eos if isinstance(eos, list) else [eos]
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = eos[0]
    # Nothing else of its settings: a cut-off in sampling that scoring lacks would bias the ratio.
    ids = dict(eos_token_id=eos, pad_token_id=tokenizer.pad_token_id)
    policy.generation_config = transformers.GenerationConfig(**ids)
    return policy, processor


def make_critic(policy, role: Callable) -> sapo.SegmentCritic:
    """On the policy's pretrained backbone in a role, such as a copy, with a value head that starts at 0."""
    expect(hasattr(policy, "model"), "model", type(policy).__name__,
           "a class with .model, for the critic to read (grpo, gspo and srpo have none)")
    return sapo.SegmentCritic(role(policy.model), policy.config.get_text_config().hidden_size)


def load(config) -> tuple:
    """Policy, processor, and, for the methods that need them, critic and frozen reference (else None)."""
    policy, processor = load_policy(config.model, config.device)
    reference = copy.deepcopy(policy).requires_grad_(False) if config.kl_coef > 0 else None
    critic = make_critic(policy, copy.deepcopy).to(config.device) if config.critic else None
    return policy, processor, critic, reference


def make_optimizers(config, policy, critic) -> list[tuple]:
    """(model, AdamW) of the policy, and of the critic, whose pretrained part and new head differ in rate."""
    pairs = [(policy, torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=0.0))]
    if critic:
        groups = [dict(params=critic.backbone.parameters(), lr=config.critic_lr),
                  dict(params=critic.head.parameters(), lr=config.head_lr)]
        pairs.append((critic, torch.optim.AdamW(groups, weight_decay=0.0)))
    return pairs


def save(run) -> None:
    """The models of a train_small.Run, in OUT/model and OUT/critic.pt."""
    out = Path(run.config.out)
    run.policy.save_pretrained(out / "model")
    run.processor.save_pretrained(out / "model")
    if run.critic:
        torch.save(run.critic.state_dict(), out / "critic.pt")


# ----------------------------------------------------------------------------------- one model in three roles
class Role(nn.Module):
    """A model as policy, critic's backbone or reference. Roles may share one model: each puts its own adapter
    on before a pass. As the model is no submodule, `parameters()` are those that this role trains.

    whole: the model that holds adapters; body: what is called, the whole or its backbone; adapter: a name,
    "" for the base alone, None for a model without adapters.
    """

    def __init__(self, config, whole, body, adapter: str | None = None):
        super().__init__()
        self.__dict__.update(whole=whole, body=body)  # past nn.Module, which would register them
        self.adapter, self.bfloat16 = adapter, config.dtype == "bfloat16"
        self.config, self.device = body.config, body.device
        self.generation_config = getattr(body, "generation_config", None)
        self.layers = [m for m in body.modules() if isinstance(m, GradientCheckpointingLayer)]
        self.put_on()
        self.own = nn.ParameterList(p for p in body.parameters() if p.requires_grad)

    def put_on(self) -> None:
        if self.adapter:
            self.whole.enable_adapters()
            self.whole.set_adapter(self.adapter)
        elif self.adapter == "":
            self.whole.disable_adapters()

    @contextmanager
    def turn(self):
        self.put_on()
        for layer in self.layers:  # in training they recompute, and drop the cache that sampling needs; their
            layer.training = torch.is_grad_enabled()  # submodules stay as they are: no dropout
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            yield

    def forward(self, **inputs):
        with self.turn():
            output = self.body(**inputs)
        if output[0].requires_grad:
            output[0].register_hook(self.still_on)
        return output

    def still_on(self, _) -> None:
        """An adapter that is put on freezes the others: their gradients would be missing without a word."""
        if not all(p.requires_grad for p in self.own):
            raise RuntimeError(f"adapter {self.adapter} is off: expected backward before another's forward")

    @torch.no_grad()
    def generate(self, **inputs) -> torch.Tensor:
        with self.turn():
            return self.body.generate(**inputs)

    def save_pretrained(self, folder: Path) -> None:
        self.put_on()
        self.whole.save_pretrained(folder)


def base_dtype(config) -> torch.dtype:
    """Of weights: bfloat16 if they are frozen. A trained one would round AdamW's step of 1e-6 away."""
    return torch.bfloat16 if config.lora and config.dtype == "bfloat16" else torch.float32


def make_roles(config, model) -> tuple:
    """Policy, critic and reference from a pretrained model; None for what the algorithm does not need."""
    if config.checkpointing:
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
        model.disable_input_require_grads()  # else a frozen tower would have a backward pass
    if config.lora:  # one frozen copy of the weights for three roles
        from peft import LoraConfig

        text = model.get_decoder()
        prefix = next(name for name, module in model.named_modules() if module is text)
        linear = [f"{prefix}.{name}" for name, m in text.named_modules() if isinstance(m, nn.Linear)]
        for name in ("policy", "critic")[:1 + config.critic]:
            adapter = LoraConfig(r=config.lora, lora_alpha=2 * config.lora, target_modules=linear)
            model.requires_grad_(False).add_adapter(adapter, adapter_name=name)
        for name, weight in model.eval().named_parameters():
            weight.data = weight.data.float() if ".lora_" in name else weight.data  # not in the base's dtype
    tower = () if config.train_vision else model.get_encoder("image").requires_grad_(False).parameters()
    frozen = {id(weight): weight for weight in tower}  # to deepcopy as if copied: all share the tower

    def role(body, name: str) -> Role:
        if config.lora:
            return Role(config, model, body, name)
        body = body if name == "policy" else copy.deepcopy(body, dict(frozen))
        return Role(config, body, body if name else body.requires_grad_(False))

    policy = role(model, "policy")
    critic = make_critic(model, lambda x: role(x, "critic")).to(policy.device) if config.critic else None
    return policy, critic, role(model, "") if config.kl_coef > 0 else None
