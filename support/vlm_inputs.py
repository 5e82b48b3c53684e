"""What the families of vision-language models differ in: loading, inputs, the text of a token.

For train_small.py, where each function is one line. No family has a branch of its own: all hold for whatever
`AutoModelForImageTextToText` loads. In order: load, encode prompts, add responses, take rows, read tokens.
"""

import torch
import transformers
from torch import Tensor

from support.run_folder import first_line


def load_policy(name: str, device: str, dtype: torch.dtype = torch.float32) -> tuple:
    """Policy and processor of a folder or hub name. ValueError: no such model, or not whole."""
    try:
        processor = transformers.AutoProcessor.from_pretrained(name)
        policy, found = transformers.AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype, output_loading_info=True)
        processor.tokenizer.padding_side = "left"
    except Exception as error:  # a library's: of any kind
        raise ValueError(f"model is {name!r}: expected an image-text-to-text model, a folder or "
                         f"a name ({first_line(error)})") from error
    if missing := [*found["missing_keys"], *found["mismatched_keys"]]:
        raise ValueError(f"model is {name!r}: expected all weights, but {missing[0]} and "
                         f"{len(missing) - 1} more are missing or of another shape")
    policy = policy.to(device).eval()  # eval: no dropout, or the first ratio is not 1
    torch.backends.cudnn.allow_tf32 = False  # nor is it where rounding in an image tower hangs on batch size
    own, tokenizer = policy.generation_config.eos_token_id, processor.tokenizer
    eos = tokenizer.eos_token_id if own is None else own  # 0 is an id like any other
    eos = eos if isinstance(eos, list) else [eos]
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = eos[0]
    # Nothing else of its settings: a cut-off in sampling that scoring lacks would bias the ratio.
    ids = dict(eos_token_id=eos, pad_token_id=tokenizer.pad_token_id)
    policy.generation_config = transformers.GenerationConfig(**ids)
    return policy, processor


def banned_ids(policy) -> list[int]:
    """Ids of image and video placeholders: who samples one cannot be scored, as its features are missing."""
    names = ("image_token_id", "image_token_index", "video_token_id")
    return sorted({i for name in names if isinstance(i := getattr(policy.config, name, None), int)})


def encode(processor, instruction: str, images: list, questions: list[str], device: str) -> dict[str, Tensor]:
    """The model's inputs for prompts of an image and a question, padded on the left. Images stay in main
    memory until `take` moves some: in tiles, those of 128 prompts are gigabytes. ValueError: a question holds
    an image's placeholder, for which there is no image."""
    for question in questions:
        if (token := getattr(processor, "image_token", None)) and token in question:
            raise ValueError(f"question is {question[:80]!r}: expected one without {token}")
    system = {"role": "system", "content": [{"type": "text", "text": instruction}]}
    users = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q}]} for q in questions]
    if processor.chat_template is None:
        texts = [f"{processor.image_token}{instruction}\n{question}" for question in questions]
    else:
        texts = [processor.apply_chat_template([system, user], add_generation_prompt=True) for user in users]
    images = [[image] for image in images]  # a list per prompt: a flat one is one prompt's to some processors
    bos = processor.tokenizer.bos_token  # some templates write it, so the tokenizer must not
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt",
                       add_special_tokens=not (bos and texts[0].startswith(bos)))
    inputs = {k: x for k, x in inputs.items() if k != "labels"}  # PaliGemma's, of the prompt
    return {k: x.to(device) if x.shape == inputs["input_ids"].shape else x for k, x in inputs.items()}


def full_inputs(inputs: dict[str, Tensor], ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Inputs for prompt and response together. Type ids of a response are 0 where those of the prompt mark
    something (its image); else 1, as in PaliGemma, where tokens of type 0 see the future."""
    per_token = {k: x for k, x in inputs.items() if x.shape == inputs["input_ids"].shape}
    tails = {k: torch.full_like(ids, not x.any()) for k, x in per_token.items()}
    tails |= dict(input_ids=ids, attention_mask=mask)
    return inputs | {k: torch.cat([x, tails[k].to(x)], 1) for k, x in per_token.items()}


def take(inputs: dict[str, Tensor], rows: Tensor, image_ids: list[int] = ()) -> dict[str, Tensor]:
    """The inputs of some rows, on the tokens' device. Where all images are packed (Qwen-VL's patches,
    InternVL's tiles), a prompt's are as many as its share of the image tokens, whose ids are `image_ids`."""
    taken, B, ids = {}, len(inputs["input_ids"]), inputs["input_ids"]
    tokens = torch.isin(ids, ids.new_tensor(image_ids)).sum(1)  # (B,)
    for name, x in inputs.items():
        sizes = tokens * len(x) // tokens.sum().clamp(min=1)
        if len(x) == B:
            taken[name] = x[rows.to(x.device)].to(ids.device)
        elif sizes.sum() == len(x):
            packed = x.split(sizes.tolist())
            taken[name] = torch.cat([packed[i] for i in rows.tolist()]).to(ids.device)
        else:
            raise ValueError(f"{name} is {len(x)} rows for {B} prompts: expected one each, or as many for "
                             f"each of the {int(tokens.sum())} image tokens")
    return taken


def read_tokens(tokenizer, ids: Tensor, mask: Tensor) -> tuple[list[list[str]], list[str]]:
    """The text of each token of each response, "" for special ones; and of the whole. ids, mask (B, T)."""
    responses = [row[keep].tolist() for row, keep in zip(ids, mask)]
    piece = {i: tokenizer.decode([i], skip_special_tokens=True) for i in ids.unique().tolist()}
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    pieces = [[piece[i] for i in row] for row in responses]
    return [row if "".join(row) == text else cut(tokenizer, tokens, text)
            for row, tokens, text in zip(pieces, responses, texts)], texts


def cut(tokenizer, ids: list[int], text: str) -> list[str]:
    """The text of each token where one alone reads otherwise: a leading space is lost, bytes are no
    character yet. Each is read after those before it; bytes belong to the token that completes them."""
    pieces, start, read, done = [], 0, 0, 0  # done: characters of the first `read` tokens
    for end in range(1, len(ids) + 1):
        before, now = (tokenizer.decode(ids[start:i], skip_special_tokens=True) for i in (read, end))
        new = now[len(before):]
        pieces.append(new if text.startswith(new, done) and not new.endswith("\ufffd") else "")
        if pieces[-1]:
            start, read, done = read, end, done + len(new)
    return [*pieces[:-1], pieces[-1] + text[done:]]
