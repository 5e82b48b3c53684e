"""Eleven families of models, tiny and untrained, with their real processors.

A family whose part of the library is missing (torchvision, num2words) is skipped by name. The oracles are the
distributions that `generate` sampled from, with its cache, and each response alone, without padding.
"""

import copy
import itertools
import math
import re
import shutil
import string
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import test_train_small
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import toy_env
import train_small
from examples import real_vlm
from support import inputs
from support import models as roles
from support.data import INSTRUCTION
from support.inputs import encode

# --------------------------------------------------------------------------------------------------- families
TEXT = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16)
LLAMA, QWEN2, GEMMA = (TEXT | dict(model_type=name) for name in ("llama", "qwen2", "gemma"))
MROPE = TEXT | dict(rope_parameters=dict(rope_type="default", mrope_section=[2, 3, 3]))
WINDOW = TEXT | dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"])
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32,
              patch_size=8)
CLIP, SIGLIP = (VISION | dict(model_type=f"{name}_vision_model") for name in ("clip", "siglip"))
SIGLIP["vision_use_head"] = False
PATCHES = dict(depth=2, num_heads=2, hidden_size=32, intermediate_size=64, out_hidden_size=64)
SIDE = dict(height=32, width=32)
TILES = dict(size=dict(longest_edge=64), max_image_size=dict(longest_edge=32))  # and the whole image
GRID = dict(image_grid_pinpoints=[[32, 32], [32, 64], [64, 32], [64, 64]])


class Family(NamedTuple):
    """What the tiny model of a family is built from."""

    name: str  # as its classes begin
    images: tuple[str, dict]  # its image processor
    config: dict
    settings: dict = {}  # of its processor
    videos: str | None = None  # its video processor, which needs torchvision
    spaces: str = "bytes"  # the kind of its tokenizer
    bos: str | None = None
    bos_by: str = ""  # who writes it: tokenizer, template, or both
    turn: tuple[str, str] | None = ("<|im_start|>", "<|im_end|>")  # begin and end; None: no chat template
    image: str = "<image>"  # how a template says it
    named: dict = {}  # tokens that the processor asks the tokenizer for


QWEN = dict(images=("Qwen2VL", dict(min_pixels=56 * 56, max_pixels=84 * 84)), videos="Qwen2VL",
            image="<|vision_start|><|image_pad|><|vision_end|>")
FAMILIES = {
    "llava": Family(
        "Llava", ("CLIP", dict(size=dict(shortest_edge=32), crop_size=SIDE)),
        dict(text_config=LLAMA, vision_config=CLIP),
        dict(patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1),
        spaces="llama", bos="<s>", bos_by="tokenizer", turn=("", "")),
    "llava_onevision": Family(
        "LlavaOnevision", ("LlavaOnevision", GRID | dict(size=SIDE)),
        GRID | dict(text_config=QWEN2, vision_config=SIGLIP),
        dict(num_image_tokens=16, vision_feature_select_strategy="full"), videos="LlavaOnevision"),
    "idefics3": Family(
        "Idefics3", ("Idefics3", TILES), dict(text_config=LLAMA, vision_config=VISION, scale_factor=2),
        dict(image_seq_len=4), bos="<|begin_of_text|>", bos_by="both", turn=("", "<end_of_utterance>")),
    "smolvlm": Family(
        "SmolVLM", ("SmolVLM", TILES), dict(text_config=LLAMA, vision_config=VISION, scale_factor=2),
        dict(image_seq_len=4), "SmolVLM", bos="<|im_start|>", bos_by="template",
        turn=("", "<end_of_utterance>")),
    "qwen2_vl": Family("Qwen2VL", config=dict(text_config=MROPE, vision_config=dict(
        depth=2, num_heads=2, embed_dim=32, hidden_size=64)), **QWEN),
    "qwen2_5_vl": Family("Qwen2_5_VL", config=dict(text_config=MROPE, vision_config=PATCHES | dict(
        window_size=56, fullatt_block_indexes=[1])), **QWEN),
    "qwen3_vl": Family("Qwen3VL", config=dict(text_config=MROPE, vision_config=PATCHES | dict(
        patch_size=14, num_position_embeddings=64, deepstack_visual_indexes=[0, 1])), **QWEN),
    "gemma3": Family(
        "Gemma3", ("Gemma3", dict(size=SIDE)),
        dict(text_config=WINDOW, vision_config=SIGLIP, mm_tokens_per_image=4),
        dict(image_seq_length=4), spaces="gemma", bos="<bos>", bos_by="both",
        turn=("<start_of_turn>", "<end_of_turn>"), image="<start_of_image>", named=dict(
            boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")),
    "internvl": Family(
        "InternVL", ("GotOcr2", dict(size=SIDE, crop_to_patches=True, max_patches=4)),
        dict(text_config=QWEN2, vision_config=VISION), dict(image_seq_length=4), "InternVL",
        image="<IMG_CONTEXT>", named=dict(start_image_token="<img>", end_image_token="</img>",
                                          context_image_token="<IMG_CONTEXT>", video_token="<video>")),
    "paligemma": Family(
        "PaliGemma", ("Siglip", dict(size=SIDE, image_seq_length=16)),
        dict(text_config=GEMMA, vision_config=SIGLIP, projection_dim=64, hidden_size=64),
        spaces="gemma", bos="<bos>", bos_by="tokenizer", turn=None),
    "mllama": Family(  # cross-attention; an image's id is beyond the vocabulary
        "Mllama", ("Mllama", dict(size=SIDE)), dict(
            text_config=TEXT | dict(cross_attention_layers=[1]), vision_config=VISION | dict(
                num_global_layers=1, intermediate_layers_indices=[0], vision_output_dim=64)),
        bos="<|begin_of_text|>", bos_by="both", image="<|image|>", named=dict(image_token="<|image|>")),
}
SPECIAL = """<pad> <eos> <s> <bos> <|begin_of_text|> <|im_start|> <|im_end|> <end_of_utterance>
    <start_of_turn> <end_of_turn> <image> <video> <fake_token_around_image> <global-img> <|vision_start|>
    <|vision_end|> <|image_pad|> <|video_pad|> <start_of_image> <end_of_image> <image_soft_token> <img> </img>
    <IMG_CONTEXT>""".split()
SPECIAL += [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]


def make_tokenizer(family):
    """Of bytes (GPT-2, Qwen), or with "▁" for a space and bytes for the unknown: "▁" also stands in front
    (Llama), or not (Gemma). It knows the instruction's words, but each tag is several tokens."""
    by_bytes, llama = family.spaces == "bytes", family.spaces == "llama"
    alphabet = [f"<0x{i:02X}>" for i in range(256)] + [*string.ascii_letters, "▁"]
    if by_bytes:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["Ġ▁"[not by_bytes] + word for word in re.findall("[A-Za-z]+", INSTRUCTION)]
    merges = [*dict.fromkeys((word[:i], word[i]) for word in words for i in range(1, len(word)))]
    tokens = {token: i for i, token in enumerate([*SPECIAL, *alphabet, *dict.fromkeys(map("".join, merges))])}
    core = Tokenizer(models.BPE(tokens, merges, byte_fallback=not by_bytes))
    if by_bytes:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
    else:
        front, strip = [normalizers.Prepend("▁")] * llama, [decoders.Strip(" ", 1, 0)] * llama
        core.normalizer = normalizers.Sequence([*front, normalizers.Replace(" ", "▁")])
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    if family.bos_by in ("tokenizer", "both"):
        core.post_processor = processors.TemplateProcessing(f"{family.bos} $A", f"{family.bos} $A $B:1",
                                                            [(family.bos, tokens[family.bos])])
    core.add_special_tokens(SPECIAL)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=family.bos, eos_token="<eos>", pad_token="<pad>",
        extra_special_tokens=family.named)


def make_model(family, folder, vocab_size=None):
    """Save model and processor. Weights are drawn wide, or all tokens would be about as likely."""
    tokenizer, template = make_tokenizer(family), None
    if family.turn:
        begin, end = family.turn
        bos = "{{ bos_token }}" if family.bos_by in ("template", "both") else ""
        template = (bos + "{% for m in messages %}" + begin + "{{ m.role }}: {% for c in m.content %}"
                    "{% if c.type == 'image' %}" + family.image + "{% else %}{{ c.text }}{% endif %}"
                    "{% endfor %}" + end + "\n{% endfor %}" + begin + "assistant: ")
    kind, settings = family.images
    parts = [getattr(transformers, kind + "ImageProcessorPil")(**settings), tokenizer]
    if family.videos:
        parts.append(getattr(transformers, family.videos + "VideoProcessor")())
    make = getattr(transformers, family.name + "Processor")
    processor = make(*parts, **family.settings, chat_template=template)
    processor.save_pretrained(folder)

    make = getattr(transformers, family.name + "ForConditionalGeneration")
    config = make.config_class(**copy.deepcopy(family.config))
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=1, pad_token_id=0)
    ids["vocab_size"] = vocab_size or len(tokenizer) - (family.name == "Mllama")
    image = family.named.get("image_token", processor.image_token)
    named = dict(image=image, video="<video>", vision_start="<|vision_start|>", vision_end="<|vision_end|>")
    ids |= {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in named.items()}
    for part in (config, config.get_text_config()):
        for name in ids:
            if hasattr(part, name):  # by an alias too
                setattr(part, name, ids[name])
    torch.manual_seed(0)
    model = make(config)
    for weight in model.parameters():
        if weight.dim() > 1 or weight.numel() == 1:  # a gate, at first closed
            torch.nn.init.normal_(weight, std=0.12)
    ends = [1, *range(70, len(tokenizer), 8)]  # one token in eight ends a response, or hardly any would end
    model.generation_config = transformers.GenerationConfig(eos_token_id=ends, pad_token_id=0)
    model.save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------- runs
SHORT = "Read, then compute."  # so that passes are
SIZES = (48, 48), (60, 100), (130, 40), (33, 37), (64, 64), (20, 90)
small = partial(test_train_small.small, max_tokens=10, eval_every=2, lr=1e-3)


def many_sizes(n, several=False):
    """Problems of 2 to 5 operands, their images stretched. several: every third has two, one in the text."""
    drawn = [toy_env.make_problem(i, operands=2 + i % 4) for i in range(n)]
    drawn = [replace(p, image=p.image.resize(SIZES[i % len(SIZES)])) for i, p in enumerate(drawn)]
    two = lambda p, q: replace(p, image=(p.image, q.image), question=f"<image>{p.question} <image> or so?")
    return [two(p, drawn[i - 1]) if several and i % 3 == 1 else p for i, p in enumerate(drawn)]


def make_family(name, folder):
    """Save its model, or skip the test where a part of the library is missing."""
    try:
        make_model(FAMILIES[name], folder)
    except ImportError as error:
        pytest.skip(f"{name}: {' '.join(str(error).split())[:150]}")
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """The folder of a family's model."""
    return make_family(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def sampled(family):
    """Models, a rollout of ragged prompts and responses, and the logits (B, T, V) it was sampled from."""
    config = small(family, max_tokens=48, temperature=0.8, mini_batches=1)
    torch.manual_seed(0)
    policy, processor, critic, reference = train_small.load(config)
    task = train_small.toy_task(config)._replace(tiles=True, instruction=SHORT)
    policy.generation_config.eos_token_id = policy.generation_config.eos_token_id[::3]  # for longer responses
    generate, kept = policy.generate, []

    def keep(**inputs):
        out = generate(**inputs, output_logits=True, return_dict_in_generate=True)
        kept.extend(out.logits)
        return out.sequences

    policy.generate = keep
    problems = many_sizes(16, several=processor.chat_template is not None)
    roll = train_small.rollout(policy, processor, task, problems, config.max_tokens, config.temperature)
    inputs = train_small.take(roll.inputs, roll.prompts, roll.image_ids)
    del policy.generate
    logits = torch.stack(kept, 1)[:, : roll.ids.shape[1]]
    lengths, prompts = roll.mask.sum(1).unique(), roll.inputs["attention_mask"].sum(1).unique()
    assert lengths.max() > 40 and len(lengths) > 6 and len(prompts) > 3
    return SimpleNamespace(**locals())


# ------------------------------------------------------------------------------------------------------ tests
@torch.no_grad()
def test_scores_are_those_of_sampling_and_of_each_response_alone(sampled):
    s, roll, temperature = sampled, sampled.roll, sampled.config.temperature
    ids = re.findall(r'"(?:image|video)_token_i\w+": (\d+)', s.policy.config.to_json_string())
    assert train_small.banned_ids(s.policy) == sorted({int(i) for i in ids if int(i) < s.logits.shape[2]})
    log_probs, _ = train_small.score(s.policy, s.inputs, roll.ids, roll.mask, temperature)
    logits = s.logits / temperature
    logits[..., train_small.banned_ids(s.policy)] = -torch.inf
    expected = logits.log_softmax(2).gather(2, roll.ids[..., None])[..., 0]
    assert (log_probs - expected)[roll.mask].abs().max() < 1e-4
    for problem, ids, keep, found in zip(roll.problems, roll.ids, roll.mask, log_probs):
        prompt = encode(s.processor, SHORT, [problem.image], [problem.question], "cpu")
        assert prompt["attention_mask"].all()
        prompt = train_small.take(prompt, torch.arange(1), roll.image_ids)
        alone, _ = train_small.score(s.policy, prompt, ids[None, keep], keep[None, keep], temperature)
        assert (alone[0] - found[keep]).abs().max() < 1e-4
    seen, pixels = s.inputs["attention_mask"], s.inputs["pixel_values"]
    for name, x in dict(attention_mask=torch.ones_like(seen), pixel_values=-pixels).items():  # these show
        off, _ = train_small.score(s.policy, s.inputs | {name: x}, roll.ids, roll.mask, temperature)
        assert (off - log_probs)[roll.mask].abs().max() > 1e-2


def test_pieces_join_to_the_text_and_a_prompt_has_one_bos(sampled):
    tokenizer, roll = sampled.processor.tokenizer, sampled.roll
    silent = {0, 1, *sampled.policy.generation_config.eos_token_id}
    for ids, keep, pieces, text in zip(roll.ids, roll.mask, roll.pieces, roll.texts):
        assert "".join(pieces) == text and len(pieces) == keep.sum()
        for t in range(1, len(pieces)):
            said = tokenizer.decode([i for i in ids[:t].tolist() if i not in silent])
            if text.startswith(said) and not said.endswith("\ufffd"):  # whole characters
                assert "".join(pieces[:t]) == said
    if tokenizer.bos_token:
        assert (roll.inputs["input_ids"] == tokenizer.bos_token_id).sum(1).tolist() == [1] * 16


def test_features_give_the_log_probs_and_gradients_of_pixels(sampled):
    s, found = sampled, []
    if s.policy.eyes is None:
        pytest.skip("cross-attention: pictures are seen in each pass")
    plain, _ = roles.load_policy(s.config.model, "cpu")
    pixels = encode(s.processor, SHORT, *zip(*((p.image, p.question) for p in s.problems)), "cpu")
    pixels = train_small.take(pixels, torch.arange(16), s.roll.image_ids)
    for model, inputs in ((s.policy, s.inputs), (plain, pixels)):
        whole = getattr(model, "whole", model)
        calls = []
        whole.get_encoder("image").register_forward_pre_hook(lambda *_: calls.append(1))
        log_probs, _ = train_small.score(model, inputs, s.roll.ids, s.roll.mask)
        log_probs[s.roll.mask].sum().backward()
        learnt = (whole.get_decoder(), whole.get_output_embeddings())
        gradient = torch.cat([p.grad.flatten() for part in learnt for p in part.parameters()])
        whole.zero_grad()
        found.append((log_probs.detach(), gradient, len(calls)))
    (ours, gradient, seen), (theirs, expected, again) = found
    assert seen == 0 < again and (ours - theirs)[s.roll.mask].abs().max() < 1e-5
    assert (gradient - expected).norm() < 1e-5 * expected.norm()


def test_parts_of_tokens_and_pieces_of_logits_give_the_gradient_of_the_whole_batch(sampled, monkeypatch):
    s, steps, outcome = SimpleNamespace(**vars(sampled)), [], torch.tensor([1.0, 0, 0, 1] * 4)
    torch.nn.init.ones_(s.critic.head.weight)  # at 0 it stops the gradient
    for size, logits in ((0, 2**30), (400, 20_000)):  # the family's own padding, positions and packing
        monkeypatch.setattr(train_small, "LOGITS", logits)  # in fp32 at a time
        s.config = replace(s.config, micro_tokens=size)
        s.scored = train_small.score_all(s.config, s.policy, s.reference, s.critic, s.roll)
        credit = train_small.assign_credit(s.config, s.policy, s.processor, s.roll, s.scored, outcome)
        _, *changes = test_train_small.updated(s, credit=credit)
        steps.append(torch.cat([x.flatten() for change in changes for x in change.values()]))
    assert steps[0].norm() > 0.5 and (steps[0] - steps[1]).norm() < 1e-3 * steps[0].norm()


@pytest.mark.parametrize("name", ["qwen2_vl", "llava"])  # bytes; a space in front is lost
def test_tags_that_are_special_tokens_are_text(name):
    tokenizer = make_tokenizer(FAMILIES[name])
    tokenizer.add_tokens(["<think>", "</think>", "<answer>"], special_tokens=True)
    text = "<perception> é 1 </perception> <think> one\ntwo </think> <answer> 3 </answer>"
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], 7, 0, 1]  # 7: the model's own end
    mask = torch.ones(1, len(ids)).bool()
    (pieces,), (said,) = train_small.read_tokens(tokenizer, torch.tensor([ids]), mask, [7])
    assert said.split() == text.split() and "".join(pieces) == said and pieces[-3:] == ["", "", ""]
    for role, part in zip(train_small.srpo.split_roles([pieces], mask), ("é 1", "one\ntwo")):
        assert "".join(piece for piece, on in zip(pieces, role[0]) if on).strip() == part


def test_templates_that_refuse_a_system_turn_or_open_a_tag(tmp_path, capsys):
    make_family("llava", tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    says = "{% for m in messages %}{% for c in m.content %}{{ c.text or '<image>' }}{% endfor %}{% endfor %}"
    for wrong in ("raise_exception('no system')", "'[INST]' + messages[0].content"):  # Gemma 2's, Pixtral's
        processor.chat_template = "{% if messages[0].role == 'system' %}{{ " + wrong + " }}{% endif %}" + says
        inputs = encode(processor, "Look!", [many_sizes(1)[0].image], ["What?"], "cpu")
        assert processor.tokenizer.decode(inputs["input_ids"][0]) == "<s> Look!\n" + "<image>" * 16 + " What?"
    for end, opened in {"<think>\n": ["<think>"], "a: <perception>": ["<perception>"],
                        "<think>\n\n</think>\n": [], "<|im_start|>": []}.items():
        processor.chat_template = says + end
        processor.save_pretrained(tmp_path)
        real_vlm.make_check(real_vlm.RealConfig(model=str(tmp_path)))
        assert re.findall("opens (<.*?>): no response has the format", capsys.readouterr().out) == opened


@pytest.mark.parametrize("kind, settings, said", [
    ("GitForCausalLM", dict(hidden_size=36, num_hidden_layers=1), "a class with .model, for the critic"),
    ("Blip2ForConditionalGeneration", dict(text_config=LLAMA, qformer_config=dict(num_hidden_layers=1)),
     "a class that takes logits_to_keep, not Bl"),
    ("no end", {}, "an end-of-sequence id")])
def test_a_model_that_cannot_be_sampled_or_scored_is_one_line(kind, settings, said, mini, tmp_path):
    folder = shutil.copytree(mini, tmp_path / "model")
    if kind == "no end":
        processor = transformers.AutoProcessor.from_pretrained(mini)
        processor.tokenizer.eos_token = None
        processor.save_pretrained(folder)
        transformers.GenerationConfig(eos_token_id=None).save_pretrained(folder)
    else:
        kind = getattr(transformers, kind)
        kind(kind.config_class(**settings, vision_config=VISION)).save_pretrained(folder)
    with pytest.raises(ValueError, match=f"model is '.*': expected {said}"):
        train_small.load(small(folder))
    assert "critic" not in said or train_small.load(small(folder, algo="grpo"))[2] is None


def test_parts_hold_each_row_once_within_the_budget_and_halve_in_a_full_memory(sampled, monkeypatch):
    roll, tried = sampled.roll, []
    lengths = roll.inputs["attention_mask"].sum(1)[roll.prompts] + roll.mask.sum(1)
    for budget in (1, 150, 400, 10**6):
        parts = roll.parts(torch.arange(16).flip(0), budget)
        assert sorted(torch.cat(parts).tolist()) == list(range(16))
        assert all(len(rows) == 1 or len(rows) * lengths[rows].max() <= budget for rows in parts)
        for rows in parts:
            inputs, ids, mask = roll.part(rows, trim=True)
            assert (inputs["attention_mask"].sum(0).all() or len(rows) == 1) and mask.any(0).all()
            assert (inputs["attention_mask"].sum(1) + mask.sum(1)).tolist() == lengths[rows].tolist()
    assert len(parts) == 1

    def function(rows):
        tried.append(len(rows))
        if len(rows) > 5:
            raise torch.OutOfMemoryError
        return rows.tolist()

    monkeypatch.setattr(roles, "FITS", {})
    for _ in range(2):
        assert sum(roles.in_parts("test", function, torch.arange(16), 16), []) == list(range(16))
    assert tried == [16, 8, 4, 4, 4, 4, 4, 4, 4, 4]  # the size that fits is kept
    with pytest.raises(torch.OutOfMemoryError):
        roles.in_parts("other", lambda rows: function(torch.arange(6)), torch.arange(2), 2)


def test_in_bfloat16_too_the_ratio_is_1_before_the_first_step(coin, tmp_path, monkeypatch):
    make_family("idefics3", tmp_path)
    more = dict(dtype="bfloat16", micro_tokens=400, out=f"{tmp_path}/run")
    config = small(tmp_path, algo="grpo", kl_coef=0.0, **more)
    stream = itertools.cycle(many_sizes(9, True))
    task = train_small.toy_task(config)._replace(stream=stream, instruction=SHORT)
    run, score_all = train_small.prepare(config, lambda _: task), train_small.score_all
    found = [train_small.step(run, 1)[3]]
    monkeypatch.setattr(train_small, "score_all", lambda *args: score_all(*args[:5]))  # in other parts
    found.append(train_small.step(run, 2)[3])
    assert [x["first_ratio_deviation"] > 0 for x in found] == [False, True]


@pytest.mark.parametrize("algo", ["sapo", "srpo"])  # which has all of GRPO's
def test_trains_and_sees_a_picture_once(family, algo, coin, tmp_path, monkeypatch):
    config = small(family, algo=algo, micro_tokens=400 * (algo == "srpo"), out=str(tmp_path / "run"))
    several, shown, corrupt = not family.name.startswith("paligemma"), [], train_small.srpo.corrupt_image
    monkeypatch.setattr(train_small.srpo, "corrupt_image", lambda *args, **more: shown.append(1) or corrupt(
        *args, **more))
    encoded, write = [], inputs.write_prompt
    monkeypatch.setattr(inputs, "write_prompt", lambda *args: encoded.append(1) or write(*args))
    stream = itertools.cycle(many_sizes(9, several))
    task = train_small.toy_task(config)._replace(stream=stream, instruction=SHORT)
    run, looks = train_small.prepare(config, lambda _: task), []
    tower = run.policy.whole.get_encoder("image")
    tower.register_forward_pre_hook(lambda *_: looks.append(1))
    weights = dict(run.policy.whole.named_parameters())
    frozen = {name: x.clone() for name, x in weights.items() if not x.requires_grad}
    history, _ = train_small.learn(run)
    assert len(shown) == (2 * 16 + 8 * several) * (algo == "srpo")  # all pictures of each response
    prompts, corrupted = 9 if algo == "sapo" else 2, 16 * (algo == "srpo")  # distinct ones
    assert len(encoded) == 4 + 2 * prompts + 2 * corrupted  # the held-out ones once a run
    if run.policy.eyes:  # eight at a time
        assert len(looks) == 2 * (math.ceil(prompts / 8) + corrupted // 8)
    assert frozen and all(x.equal(weights[name]) for name, x in frozen.items())
    assert len(history) == 3 and all(row["grad_norm"] > 0 for row in history[1:])
    assert history[1]["first_ratio_deviation"] < 1e-4 and abs(history[1]["kl_to_start"]) < 1e-5
    assert history[2]["kl_to_start"] != 0 and (algo != "sapo" or history[2]["value_loss"] > 0)
