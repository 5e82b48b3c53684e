"""Prompts, pictures and padding as a model takes them, and the text of a token.

No family of models has a branch of its own: the functions hold for those in the README. In order: write
prompts, encode them, see their pictures, add responses, take rows, read tokens.
"""

import re

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from support.models import in_parts
from support.run_folder import expect

MARK = "<image>"  # in a question about a tuple of pictures: the place of each
TILING = "do_image_splitting", "crop_to_patches", "do_pan_and_scan"  # what families call it
LEAST = 192  # pixels a side, of a picture that is not cut into tiles: of 48 Qwen-VL makes 4 tokens


def banned_ids(policy) -> list[int]:
    """Ids of image and video placeholders: a sampled one cannot be scored, as it has no image features. Those
    beyond the vocabulary (Mllama's) are never sampled."""
    names = ("image_token_id", "image_token_index", "video_token_id")
    ids = {i for name in names if isinstance(i := getattr(policy.config, name, None), int)}
    return sorted(i for i in ids if i < policy.config.get_text_config().vocab_size)


def write_prompt(processor, instruction: str, image, question: str) -> str:
    """A picture, or a tuple of them, stands in front of the question; or each of a tuple at its MARK. Where
    the chat template refuses a system turn (Pixtral's), the instruction opens the user's. ValueError: the
    question has a placeholder, or other marks than pictures, or the template puts them elsewhere."""
    images, texts = (image, question.split(MARK)) if isinstance(image, tuple) else ((image,), [question])
    texts = [""] * len(images) + texts if len(texts) == 1 else texts
    parts = [part for text in texts for part in ({"type": "image"}, {"type": "text", "text": text})
             if part.get("text") != ""][1:]
    told = {"type": "text", "text": instruction}
    write = lambda **turns: processor.apply_chat_template(
        [dict(role=role, content=content) for role, content in turns.items()], add_generation_prompt=True)
    try:
        prompt = write(system=[told], user=parts) if processor.chat_template else (
            processor.image_token * len(images) + f"{instruction}\n" + "".join(texts))
    except Exception:  # raised by the template, or in it, where it expects a text: of any kind
        prompt = write(user=[told | {"text": instruction + "\n"}, *parts])
    tokens = [x for name, x in vars(processor).items() if name.endswith("_token") and isinstance(x, str)]
    wrong = [f"one without {x}" for x in tokens if x and any(x in text for text in texts)]
    expect(not wrong, "question", question[:80], "".join(wrong[:1]))
    expect(len(texts) == len(images) + 1, "question", question[:80], f"{len(images)} {MARK}, one a picture")
    said = [re.escape(text.strip()) for text in texts if text.strip()]
    expect(len(said) < 2 or not re.search(r"\s*".join(said), prompt.replace(instruction, "")), "question",
           question[:80], "pictures in front, where the chat template puts them")
    return prompt


def encode(processor, instruction: str, images: list, questions: list[str], device: str,
           tiles: bool = True) -> dict[str, Tensor]:
    """The model's inputs for prompts (see write_prompt), padded on the left. Images stay in main memory until
    `take` moves some: in tiles, those of 128 prompts are gigabytes. tiles: see support.data.Task."""
    prompts = [write_prompt(processor, instruction, *pair) for pair in zip(images, questions)]
    images = [[*image] if isinstance(image, tuple) else [image] for image in images]
    options = {} if tiles else {x: False for x in TILING if hasattr(processor.image_processor, x)}
    if not tiles:
        images = [[enlarged(image, processor) for image in row] for row in images]
    bos = processor.tokenizer.bos_token  # some templates write it, so the tokenizer must not
    inputs = processor(text=prompts, images=images, padding=len(images) > 1, return_tensors="pt",
                       add_special_tokens=not (bos and prompts[0].startswith(bos)), **options)
    inputs = {k: x for k, x in inputs.items() if k != "labels"}  # PaliGemma's, of the prompt
    if max(map(len, images)) > 1:
        inputs["images"] = torch.tensor([*map(len, images)])  # of each prompt: for `take`
    return {k: x.to(device) if x.shape == inputs["input_ids"].shape else x for k, x in inputs.items()}


def enlarged(image: Image.Image, processor) -> Image.Image:
    """LEAST pixels a side or more, by a whole factor; or as it is, where the processor makes it that size."""
    size = dict(getattr(processor.image_processor, "size", None) or {})
    factor = 1 if size.get("width") == image.width else -(-LEAST // min(image.size))
    return image.resize([factor * side for side in image.size], Image.Resampling.NEAREST)


def see(policy, processor, task, problems: list, images: list | None = None) -> dict[str, Tensor]:
    """`encode` for problems and their images, or others. Where vision is frozen (support.models.Eyes), with
    features for pixels, eight prompts at a time: pixels never pile up."""
    images, eyes = images or [p.image for p in problems], getattr(policy, "eyes", None)

    def some(rows):
        its = [images[i] for i in rows], [problems[i].question for i in rows]
        inputs = encode(processor, task.instruction, *its, policy.device, task.tiles)
        return inputs if eyes is None else policy.autocast()(eyes.look)(inputs)

    everything = torch.arange(len(problems))
    if eyes is None:
        return some(everything)
    return join(in_parts("look", some, everything, 8), policy.generation_config.pad_token_id)


def join(parts: list[dict[str, Tensor]], pad_id: int) -> dict[str, Tensor]:
    """One batch of several, padded on the left."""
    columns, L = {}, max(part["input_ids"].shape[1] for part in parts)
    for part in parts:
        B, length = part["input_ids"].shape
        for name, x in (dict(images=torch.ones(B, dtype=torch.long)) | part).items():
            if x.shape[:2] == (B, length):
                left = (0, 0) * (x.dim() - 2) + (L - length, 0)
                x = pad(x, left, value=pad_id if name == "input_ids" else 0)
            columns.setdefault(name, []).append(x)
    return {name: torch.cat(column) for name, column in columns.items()}


def full_inputs(inputs: dict[str, Tensor], ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Inputs for prompt and response together. Type ids of a response are 0 where those of the prompt mark
    something (its image); else 1, as in PaliGemma, where tokens of type 0 see the future. A mask of
    cross-attention ends as it ended in the prompt."""
    longer = {k: x for k, x in inputs.items() if x.shape[:2] == inputs["input_ids"].shape}
    tails = {k: torch.full_like(ids, not x.any()) if x.dim() == 2 else
             x[:, -1:].expand(-1, ids.shape[1], *x.shape[2:]) for k, x in longer.items()}
    tails |= dict(input_ids=ids, attention_mask=mask)
    return inputs | {k: torch.cat([x, tails[k].to(x)], 1) for k, x in longer.items()}


def take(inputs: dict[str, Tensor], rows: Tensor, image_ids: list[int] = (),
         trim: bool = False) -> dict[str, Tensor]:
    """The inputs of some rows, on the tokens' device. Where all images are in a row, a prompt has as many as
    pictures; where they are packed (Qwen-VL's patches, InternVL's tiles, features), as many as is its share
    of the image tokens, whose ids are `image_ids`. trim: without the columns that are padding in all rows."""
    taken, B, ids = {}, len(inputs["input_ids"]), inputs["input_ids"]
    first = ids.shape[1] - int(inputs["attention_mask"][rows].sum(1).max()) if trim else 0
    tokens = torch.isin(ids, ids.new_tensor(image_ids)).sum(1)  # (B,)
    pictures = inputs.get("images", torch.ones(B, dtype=torch.long))  # (B,)
    for name, x in inputs.items():
        sizes = pictures if len(x) == pictures.sum() else tokens * len(x) // tokens.sum().clamp(min=1)
        if x.shape[:2] == ids.shape:
            taken[name] = x[rows, first:]
        elif len(x) == B:
            taken[name] = x[rows.to(x.device)].to(ids.device)
        elif sizes.sum() == len(x):
            packed = x.split(sizes.tolist())
            taken[name] = torch.cat([packed[i] for i in rows.tolist()]).to(ids.device)
        else:
            raise ValueError(f"{name} is {len(x)} rows for {B} prompts: expected one each, or as many for "
                             f"each of the {int(tokens.sum())} image tokens")
    return {name: x for name, x in taken.items() if name != "images"}


def in_order(parts: list[Tensor], rows: list[Tensor], T: int) -> Tensor:
    """(B, T) of parts (b, t), which are of these rows."""
    whole = torch.cat([pad(part, (0, T - part.shape[1])) for part in parts])
    return whole[torch.cat(rows).argsort()]


def read_tokens(tokenizer, ids: Tensor, mask: Tensor, silent=()) -> tuple[list[list[str]], list[str]]:
    """The text of each token of each response, and of the whole. ids, mask (B, T). End-of-sequence and
    padding tokens, the tokenizer's and `silent`, are "". Other special tokens are text: some have <think>."""
    silent = {*silent, tokenizer.eos_token_id, tokenizer.pad_token_id}
    read = lambda row: tokenizer.decode([i for i in row if i not in silent])
    responses = [row[keep].tolist() for row, keep in zip(ids, mask)]
    piece = {i: read([i]) for i in ids.unique().tolist()}
    texts = [*map(read, responses)]
    pieces = [[piece[i] for i in row] for row in responses]
    return [row if "".join(row) == text else cut(read, tokens, text)
            for row, tokens, text in zip(pieces, responses, texts)], texts


def cut(read, ids: list[int], text: str) -> list[str]:
    """The text of each token where one alone reads otherwise: a leading space is lost, bytes are no
    character yet. Each is read after those before it; bytes belong to the token that completes them."""
    pieces, start, end_of_read, done = [], 0, 0, 0  # done: characters of the first `end_of_read` tokens
    for end in range(1, len(ids) + 1):
        before, now = (read(ids[start:i]) for i in (end_of_read, end))
        new = now[len(before):]
        pieces.append(new if text.startswith(new, done) and not new.endswith("\ufffd") else "")
        if pieces[-1]:
            start, end_of_read, done = end_of_read, end, done + len(new)
    return [*pieces[:-1], pieces[-1] + text[done:]]
