"""SAPO, SRPO and the other four on a real vision-language model and data set, with one GPU of 24 GB.

    pip install torchvision num2words math-verify peft  # SmolVLM needs the first two; the judge; --lora
    python -m examples.real_vlm --model HuggingFaceTB/SmolVLM-256M-Instruct --dataset hiyouga/geometry3k
    python -m examples.real_vlm --model Qwen/Qwen2.5-VL-3B-Instruct --dataset hiyouga/geometry3k --lora 16

With --memory it prints an estimate of the memory that the run needs, and loads no weights. train_small.py's
options hold. It is also how to bring your own: data and reward make a Task, which train_small.prepare takes.
Ran (tests/test_real_vlm.py): tiny models on a CPU. By hand: steps of models of these two shapes with random
weights on a GPU. Never: their real weights.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import numpy
import torch
import transformers
from transformers.hf_argparser import HfArg

import srpo
import toy_env
import train_small
from examples import judge
from support import models
from examples.own_data import dataset_task
from support.data import Task
from support.inputs import encode, write_prompt
from support.run_folder import first_line

INSTRUCTION = (
    "Describe what the image shows that the question needs inside <perception></perception>, reason step by "
    "step inside <think></think>, and give the final answer alone inside <answer></answer>."
)  # srpo.py tells perception from reasoning by these tags

@dataclass
class RealConfig(train_small.Config):
    """train_small's options with other defaults, and those of a data set."""

    model: str = HfArg(default="HuggingFaceTB/SmolVLM-256M-Instruct", help="folder or hub name")
    dataset: str = HfArg(default="hiyouga/geometry3k", help="folder or name for load_dataset, with image(s), "
                                                            "question or problem, and answer")
    max_tokens: int | None = HfArg(default=1024, help="longest response (paper: 2048)")
    eval_problems: int = HfArg(default=64, help="held-out problems per evaluation")
    memory: bool = HfArg(default=False, help="print an estimate of the memory that is needed, and stop")
    prompt_tokens: int = HfArg(default=1024, help="of a prompt with its image, for --memory")
    patches: int = HfArg(default=16384, help="of an image with its tiles in the vision tower, for --memory")


def reward(problem: toy_env.Problem, response: str) -> float:
    """0.9 for the right answer; up to 0.1 for the format, a share for each tag in place: a model that does
    not know the six would never find all of them at once."""
    found = judge.stated_answer(response)
    right = found is not None and judge.same(problem.answer, found)
    places = [response.find(tag) if response.count(tag) == 1 else -1 for tag in srpo.TAGS]
    in_place = [place > max([-1, *places[:i]]) for i, place in enumerate(places)]
    return 0.9 * right + 0.1 * fmean(in_place)


# ----------------------------------------------------------------------------------------------------- memory
def one_layer(config: RealConfig, decoder, tokens: int) -> tuple[int, int]:
    """Bytes that a decoder of one layer, run on the CPU, keeps of a response: for the backward pass (without
    weights, but with copies of them in bfloat16) and in the cache of sampling."""
    kept, weights = {}, {p.data_ptr() for p in decoder.parameters()}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return x

    embedded = decoder.get_input_embeddings().weight.new_zeros(1, tokens, decoder.config.hidden_size)
    padded = (torch.arange(tokens) > 0).long()[None]  # so that there is a mask
    inputs = dict(inputs_embeds=embedded.requires_grad_(), attention_mask=padded)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.dtype == "bfloat16"):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            decoder(**inputs, use_cache=False)
        with torch.no_grad():
            cache = decoder(**inputs, use_cache=True).past_key_values.layers[0]
    return sum(x.nbytes() for x in kept.values()), cache.keys.nbytes + cache.values.nbytes


def estimate_memory(config: RealConfig) -> dict[str, float]:
    """Bytes on the GPU. Counted, on the model without weights: weights, gradients, AdamW. Estimated: copies,
    activations and cache, from one layer on 16, 32 and 64 tokens (a parabola); logits, as six pieces in fp32;
    the look of a frozen tower at eight prompts. Not: a trained tower's activations, CUDA, fragments."""
    settings = transformers.AutoConfig.from_pretrained(config.model)
    text, dtype = settings.get_text_config(), models.base_dtype(config)
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(settings, dtype=dtype).eval()
        policy, critic, reference = models.make_roles(config, model)
    own, whole, other = ({id(p): p.nbytes for p in m.parameters()} if m else {}
                         for m in (critic, model, getattr(reference, "whole", reference)))
    step = [sum(p.nbytes for p in policy.parameters()), sum(own.values())]  # AdamW's step works on a copy
    rows = {"weights": sum(size for i, size in whole.items() if i not in own), "gradients": sum(step),
            "AdamW": 2 * sum(step), "reference": sum(size for i, size in other.items() if i not in whole),
            "critic's weights": sum(own.values())}
    B, T, layers = config.responses, config.max_tokens, text.num_hidden_layers
    L, H = config.prompt_tokens + T, text.hidden_size
    b = max(1, config.micro_tokens // L) if config.micro_tokens else B  # responses in a pass
    size = 2 if config.dtype == "bfloat16" else 4
    if config.lora:
        policy.put_on()
    decoder = model.get_decoder()
    decoder.layers = decoder.layers[:1]
    decoder.to_empty(device="cpu")
    kept, cached = zip(*(one_layer(config, decoder, n) for n in (16, 32, 64)))
    square, slope, copies = numpy.polyfit((16, 32, 64), kept, 2)
    activations = b * L * (square * L + slope)  # of a layer
    vision = getattr(settings, "vision_config", None)
    wide = 4 * vision.hidden_size + 2 * getattr(vision, "intermediate_size", 4 * vision.hidden_size)
    rows |= {"copies of weights": max(0.0, layers * copies),
             "sampling: KV cache, inputs":
             B * (layers * L * cached[0] / 16 + config.prompt_tokens * H * size),
             "looking at eight prompts": 0 if config.train_vision else 8 * config.patches * wide * size,
             "logits": 24 * min(b * (T + 1) * text.vocab_size, train_small.LOGITS),
             "activations": layers * b * L * H * dtype.itemsize + activations
             if config.checkpointing else layers * activations}
    sampling, looking, logits, activations = [*rows.values()][-4:]
    using = rows["copies of weights"] + max(sampling, looking, logits + activations)
    return rows | {"total, at the worst moment": sum([*rows.values()][:5]) + max(using, *step)}


def print_memory(config: RealConfig) -> None:
    for name, size in (rows := estimate_memory(config)).items():
        print(f"{name:28}{size / 1e9:8.2f} GB")
    there = torch.cuda.is_available()
    room = torch.cuda.mem_get_info()[0] if there else 24e9
    if config.train_vision:
        print("without the activations of the vision tower, which is trained")
    print(f"{'fits' if size < room else 'does not fit'} the {room / 1e9:.1f} GB "
          f"{'free on this GPU' if there else 'of a GPU of 24 GB (there is none here)'}")


# ------------------------------------------------------------------------------------------------------- main
def make_check(config: RealConfig) -> Callable:
    """-> what raises for a problem that the model's processor refuses, such as a picture of 2000 × 4."""
    try:
        processor = transformers.AutoProcessor.from_pretrained(config.model)
    except Exception as error:  # a library's: of any kind
        raise ValueError(f"model is {config.model!r}: expected one with a processor "
                         f"({first_line(error)})") from error
    end = write_prompt(processor, "", None, "?").rpartition("?")[2]
    if tag := [tag for tag in re.findall("|".join(srpo.TAGS), end)[-1:] if "/" not in tag]:
        print(f"the chat template opens {tag[0]}: no response has the format of the instruction, nor roles "
              "for SRPO, unless the template leaves that tag to the response")
    return lambda p: encode(processor, INSTRUCTION, [p.image], [p.question], "cpu")


def make_task(config: RealConfig) -> Task:
    task = dataset_task(config, INSTRUCTION, reward, partial(make_check, config))
    print(f"answers are judged by {'math-verify' if judge.math_verify else 'value and spelling alone'}")
    return task


def begin(config: RealConfig) -> train_small.Run:
    config = train_small.complete(config)
    if config.memory:
        print_memory(config)
        sys.exit()
    return train_small.prepare(config, make_task)


if __name__ == "__main__":
    train_small.main("-m examples.real_vlm", RealConfig, begin)
