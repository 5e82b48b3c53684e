"""Models: loading one, its three roles (policy, critic, reference), and what keeps real ones in memory.

Policy and reference are called as any model of transformers, the critic is a sapo.SegmentCritic. tiny_vlm has
three copies. Of any other model the vision tower is frozen: the roles share it, and it sees a picture once
(`Eyes`). With `lora` they share all but their adapters (`Role`).
"""

import copy
import sys
from collections.abc import Callable
from contextlib import contextmanager
from inspect import signature
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

import sapo
from support.run_folder import expect, first_line

FITS = {}  # what is done → rows at a time, as memory was once full


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


def load(config) -> tuple:
    """Policy, processor, and, for the methods that need them, critic and frozen reference (else None)."""
    model, processor = load_policy(config.model, config.device, base_dtype(config))
    if (n := model.num_parameters()) > 1e9 and not config.lora:  # weights, gradients and AdamW are 16 bytes
        size = n * (16 * (1 + config.critic) + 4 * (config.kl_coef > 0)) / 1e9
        print(f"model has {n / 1e9:.1f} billion parameters: to train all takes about {size:.0f} GB, and "
              "--lora 16 far less", file=sys.stderr)
    policy, critic, reference = make_roles(config, model)
    return policy, processor, critic, reference


def make_critic(policy, role: Callable) -> sapo.SegmentCritic:
    """On the policy's pretrained backbone in a role, such as a copy, with a value head that starts at 0."""
    expect(hasattr(policy, "model"), "model", type(policy).__name__,
           "a class with .model, for the critic to read (grpo, gspo and srpo have none)")
    return sapo.SegmentCritic(role(policy.model), policy.config.get_text_config().hidden_size)


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


# --------------------------------------------------------------------------------------------- frozen vision
class Eyes:
    """In place of a model's get_image_features: vision tower and projector, called once for a picture instead
    of in every pass of every role. A model then gets features for pixels, a row (1 + K, H) for each image
    token: what is put in the token's place, and what K deeper layers add (Qwen3-VL)."""

    def __init__(self, model):
        self.plain, self.shape = model.get_image_features, None
        self.names = signature(self.plain).parameters
        model.get_image_features = self

    def __deepcopy__(self, _) -> "Eyes":  # critic and reference see through the policy's
        return self

    @torch.no_grad()
    def look(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inputs of prompts with features for pixels, in main memory."""
        device = inputs["input_ids"].device
        its = {name: x.to(device) for name, x in inputs.items() if name in self.names}
        found = self.plain(**its, return_dict=True)
        layers = [found.pooler_output, *(getattr(found, "deepstack_features", None) or ())]
        # In some versions of some families a layer is a list, of a tensor for each picture.
        self.ends = [x.shape[1:] if isinstance(x, Tensor) else None for x in layers]
        self.kind, layers = type(found), [x if isinstance(x, Tensor) else torch.cat([*x]) for x in layers]
        features = torch.stack([x.flatten(0, -2) for x in layers], 1).cpu()  # (image tokens, 1 + K, H)
        self.shape = features.shape[1:]
        return {k: x for k, x in inputs.items() if not k.startswith("pixel_")} | dict(pixel_values=features)

    def __call__(self, pixel_values: Tensor, *args, **kwargs):
        if pixel_values.shape[1:] != self.shape:  # pixels
            return self.plain(pixel_values, *args, **kwargs)
        layers = [[x] if end is None else x.reshape(-1, *end)
                  for x, end in zip(pixel_values.unbind(1), self.ends)]
        output = self.kind(last_hidden_state=layers[0])  # an empty one would be false
        output.pooler_output, output.deepstack_features = layers[0], layers[1:]
        return output


# ----------------------------------------------------------------------------------- one model in three roles
class Role(nn.Module):
    """A model as policy, critic's backbone or reference. Roles may share one model: each puts its own adapter
    on before a pass. As the model is no submodule, `parameters()` are those that this role trains.

    whole: the model that holds adapters; body: what is called, the whole or its backbone; adapter: a name,
    "" for the base alone, None for a model without adapters; eyes: if pictures are seen once, what sees them.
    """

    def __init__(self, config, whole, body, adapter: str | None = None, eyes: Eyes | None = None):
        super().__init__()
        self.__dict__.update(whole=whole, body=body)  # past nn.Module, which would register them
        self.adapter, self.eyes, self.bfloat16 = adapter, eyes, config.dtype == "bfloat16"
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

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    @contextmanager
    def turn(self):
        self.put_on()
        for layer in self.layers:  # in training they recompute, and drop the cache that sampling needs; their
            layer.training = torch.is_grad_enabled()  # submodules stay as they are: no dropout
        with self.autocast():
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
    def generate(self, **inputs) -> Tensor:
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
    eyes = None
    if not config.train_vision:  # the language model alone learns
        model.requires_grad_(False)
        for part in (model.get_decoder(), model.get_output_embeddings()):
            part.requires_grad_(True)
        eyes = Eyes(model.model) if hasattr(getattr(model, "model", None), "get_image_features") else None
    if config.checkpointing:
        name = "activation_checkpointing_enable"  # or what it was called before
        getattr(model, name, model.gradient_checkpointing_enable)(dict(use_reentrant=False))
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
    plain = config.train_vision and not (config.lora or config.checkpointing or config.dtype == "bfloat16")
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}  # to deepcopy as if copied: shared

    def role(body, name: str):
        if config.lora:
            return Role(config, model, body, name, eyes)
        body = body if name == "policy" else copy.deepcopy(body, dict(frozen))
        body = body if name else body.requires_grad_(False)
        return body if plain else Role(config, body, body, eyes=eyes)

    critic = make_critic(model, lambda body: role(body, "critic")).to(model.device) if config.critic else None
    return role(model, "policy"), critic, role(model, "") if config.kl_coef > 0 else None


# ------------------------------------------------------------------------------------------------ full memory
def in_parts(what: str, function: Callable, rows: Tensor, size: int) -> list:
    """`function` of `size` rows at a time; of half as many, from then on, when the GPU's memory is full."""
    results = []
    while len(rows):
        n = min(FITS.get(what, size), size, len(rows))
        try:
            results.append(function(rows[:n]))
            rows = rows[n:]
        except torch.OutOfMemoryError:
            if n == 1:
                raise
            FITS[what] = (n + 1) // 2
    return results


def hidden_and_head(model, **inputs) -> tuple[Tensor, Callable]:
    """What logits are made of, (B, t, H), and what makes them, so that those of all tokens need not be in
    memory together. Where that is more than a head (a soft cap, a scale), the logits and the identity."""
    body = getattr(model, "body", model)
    head, made = body.get_output_embeddings(), []
    if not getattr(body, "changes_logits", False):
        body.set_output_embeddings(stand_in := nn.Identity())
        stand_in.register_forward_hook(lambda module, args, output: made.append(output))
        try:
            hidden = model(**inputs).logits
        finally:
            body.set_output_embeddings(head)
        if hidden is made[0]:
            return hidden, model.autocast()(head.__call__) if body is not model else head
        body.changes_logits = True
    return model(**inputs).logits, nn.Identity()
