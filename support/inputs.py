"""Prompts, images and padding as a model takes them, and the text of a token.

No family of models has a branch of its own: the functions hold for those in the README. In order: encode
prompts, add responses, take rows, read tokens.
"""

import torch
from torch import Tensor


def banned_ids(policy) -> list[int]:
    """Ids of image and video placeholders: a sampled one cannot be scored, as it has no image features."""
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
