"""Imitation: the training loop of tiny_vlm (make.py), and of any other model (examples/warm_start.py).

Prompts are those of train_small.py, responses are tokenised as they would be sampled, and the loss is on
response tokens alone. Read in this order: tokenise → losses → imitate. B responses, T tokens.
"""

import math
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import trange

import toy_env
from support.data import Task
from support.inputs import banned_ids, full_inputs, see, take
from support.run_folder import NotFinite, expect

TEACHER = dict(misread=0.13, slip=0.1, habit=0.6)  # rates of the sloppy teacher (teacher.py)


def tokenise(model, processor, problems: list[toy_env.Problem], responses: list[str],
             max_tokens: float = math.inf) -> tuple[Tensor, Tensor, Tensor]:
    """-> ids (B, T), each row with the model's first end-of-sequence token at its end; their mask (B, T); and
    for each token whether every statement that has ended by then is true (B, T)."""
    tokenizer, rows, labels = processor.tokenizer, [], []
    eos = torch.tensor(model.generation_config.eos_token_id).view(-1).tolist()
    encoded = tokenizer(responses, add_special_tokens=False, return_offsets_mapping=True)
    for p, text, ids, spans in zip(problems, responses, encoded["input_ids"], encoded["offset_mapping"]):
        said, error = tokenizer.decode([i for i in ids if i not in eos]), toy_env.first_error(p, text)
        expect(said == text, "decoded demonstration", said, repr(text))
        expect(len(ids) < max_tokens, "max_tokens", max_tokens, f"{len(ids) + 1} or more, to say {text!r}")
        ends = torch.tensor([*(end for _, end in spans), len(text) + 1])
        rows.append(torch.tensor([*ids, eos[0]]))
        labels.append(ends < (error.end if error else math.inf))
    ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    mask = torch.arange(ids.shape[1]) < torch.tensor([*map(len, rows)])[:, None]
    return tuple(x.to(model.device) for x in (ids, mask, pad_sequence(labels, batch_first=True)))


def losses(model, head: nn.Linear, processor, task: Task, problems: list[toy_env.Problem],
           responses: list[str], micro_batch: int, max_tokens: float = math.inf) -> Iterator[tuple]:
    """Of `micro_batch` responses at a time, (2,): the loss of imitation and that of the head, as parts which
    add up to the means over all tokens of all responses; and what the head says after each token, as logits
    (B, T)."""
    rows = [slice(i, i + micro_batch) for i in range(0, len(problems), micro_batch)]
    tokens = [tokenise(model, processor, problems[row], responses[row], max_tokens) for row in rows]
    total = sum(int(mask.sum()) for _, mask, _ in tokens)
    for row, (ids, mask, true_so_far) in zip(rows, tokens):
        T, inputs = ids.shape[1], see(model, processor, task, problems[row])
        inputs = full_inputs(take(inputs, torch.arange(len(ids)), banned_ids(model)), ids, mask)
        output = model(**inputs, logits_to_keep=T + 1, use_cache=False, output_hidden_states=True)
        logits = output.logits[:, :-1][mask].float()  # for the token at each place; (tokens, vocabulary)
        judged = head(output.hidden_states[-1][:, -T:].float())[..., 0]  # after each token, (B, T)
        imitation = F.cross_entropy(logits, ids[mask], reduction="sum")
        truth = F.binary_cross_entropy_with_logits(judged[mask], true_so_far[mask].float(), reduction="sum")
        yield torch.stack([imitation, truth]) / total, judged


@torch.no_grad()
def mean_loss(*args) -> float:
    """The loss of imitation on all tokens. The arguments are those of `losses`."""
    return float(sum(part[0] for part, _ in losses(*args)))


def find_projector(model) -> dict[int, nn.Parameter]:
    """Weights of neither vision tower nor language model, by id; none of Qwen-VL, whose tower holds them."""
    parts = model.get_encoder("image"), model.get_decoder(), model.get_output_embeddings()
    others = {id(p) for part in parts for p in part.parameters()}
    return {id(p): p for p in model.parameters() if id(p) not in others}


def imitate(model, head: nn.Linear, processor, task: Task, draw: Callable[[int], tuple], steps: int,
            lr: float, projector_lr: float | None = None, truth: float = 0.0, micro_batch: int = 8,
            minutes: float = math.inf, max_tokens: float = math.inf,
            on_step: Callable[[int, Tensor], object] = lambda step, both: None) -> int:
    """Train what is not frozen of a model, on `draw(step)`: problems and responses. -> how many steps.

    projector_lr: None: that of the rest.  head: of one output, thrown away in the end. It learns to tell
    after each token whether all statements so far are true; `truth` is the weight of its loss.  steps,
    minutes: what is over first ends it. The rates rise over the first 100 steps, or a fifth of the whole, and
    fall to 0 over its last third.  on_step: gets the number of steps so far, and both losses (2,).
    NotFinite: a loss or the gradient is not.
    """
    start, own = time.time(), find_projector(getattr(model, "body", model)) if projector_lr else {}
    expect(own or not projector_lr, "projector_lr", projector_lr, "none, as the tower holds the projector")
    weights = [p for p in (*model.parameters(), *head.parameters()) if p.requires_grad]
    groups = [dict(params=[p for p in weights if id(p) not in own], highest=lr)]
    groups += [dict(params=[*own.values()], highest=projector_lr)] if own else []
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
    for step in (bar := trange(steps, desc="imitation")):
        done = max(step / steps, (time.time() - start) / 60 / minutes)  # share of the whole
        if done >= 1:
            return step
        for group in optimizer.param_groups:
            rise, fall = max((step + 1) / 100, 5 * done), 3 * (1 - done)
            group["lr"] = group["highest"] * min(1.0, rise, fall)
        both = torch.zeros(2, device=model.device)
        for part, _ in losses(model, head, processor, task, *draw(step), micro_batch, max_tokens):
            (part[0] + truth * part[1]).backward()
            both += part.detach()
        norm = nn.utils.clip_grad_norm_(weights, 1.0)
        if not (both.sum() + norm).isfinite():
            raise NotFinite(f"loss or gradient of step {step + 1} is not finite: try a lower --lr")
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{both[0]:.3f}", **dict(truth=f"{both[1]:.3f}") if truth else {})
        on_step(step + 1, both)
    return steps
