"""Make tiny_vlm/ again, from its configuration: `python -m tiny_vlm.make`.

A LLaVA-class model of 1.3 million parameters that reads the pictures of toy_env.py. It is given what a real
VLM brings from its own pretraining, and no more:

- Its vision tower learns to tell digits and colours apart, cell by cell, before there is any text. Without
  this the digits stay at chance for 1,000 steps of imitation, long after everything else is learned.
- It imitates a *sloppy teacher* (teacher.py). So it reads and computes, but with the teacher's
  slips and habits: these are what reinforcement learning is to remove.
- An auxiliary linear head learns to tell after every token whether all statements so far are true. The head
  is thrown away; its features stay: the backbone is truth-aware. A critic needs that: a model that has only
  imitated cannot tell a true statement from a false one, and outcomes do not teach it in a few thousand
  responses.

Two more models continue from it. tiny_vlm/wordy/ learned filler words (toy_env.OPENINGS); the one that
guesses learned to name a colour's usual number without looking. It is made for one study only:

    python -m tiny_vlm.make --base tiny_vlm --steps 1500 --lr 7e-4 --openings none few many --out OUT
    python -m tiny_vlm.make --base tiny_vlm --steps 800 --lr 7e-4 --guess 0.6 --out runs/guesser

Read in this order: make_processor → make_model → pretrain_vision → draw → pretrain → write_card. The training
loop is imitation.py's.
"""

import argparse
import itertools
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import trange

import toy_env
import train_small
from support.data import Task
from support.options import best_device
from tiny_vlm.imitation import TEACHER, imitate, losses, tokenise
from tiny_vlm.teacher import demonstration

GRID, CELL = 3, 16  # one image token per cell: the patch size is the cell size
TASK = Task(iter(()), [], "", toy_env.reward)  # its chat template has no instruction
PIECES = r" ?[-+×=,?] ?|[a-z]+ ?|[0-9]| ?</?[a-z]+> ?|\n"  # reversible: the spaces belong to the tokens
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)  # the system turn, an instruction for models that have not seen the format, is left out


def make_processor(wordy: bool = False) -> transformers.LlavaProcessor:
    """Word-level tokenizer (digits apart), Pillow image processor and chat template, as a LlavaProcessor.
    wordy: with the filler words."""
    colours = [c + " " for c in toy_env.COLOURS]
    signs = [s for o in toy_env.OPERATORS for s in (o + " ", f" {o} ")]
    tags = ["<perception> ", " </perception> ", "<think> ", " </think> ", "<answer> ", " </answer>"]
    words = [*map(str, range(10)), *colours, *signs, "-", "= ", " = ", "?", ", ", "\n", *tags]
    filler = [w + " " for opening in toy_env.OPENINGS for w in opening.split()]
    words += [*dict.fromkeys(filler), "? ", "few ", "many ", "openings"] if wordy else []
    special = ["<pad>", "<eos>", "<unk>", "<image>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left", extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
    )
    side = GRID * CELL
    images = transformers.SiglipImageProcessorPil(size={"height": side, "width": side})
    return transformers.LlavaProcessor(images, fast, patch_size=CELL, chat_template=TEMPLATE,
                                       vision_feature_select_strategy="full")


def make_model(tokenizer, width: int = 128, layers: int = 4, vision_layers: int = 2) -> torch.nn.Module:
    """A LlavaForConditionalGeneration: a SigLIP tower, a projector and a Llama."""
    scale = 0.9 * width**-0.5  # of the initial weights: the default, 0.02, is for wide models
    ids = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    vision = transformers.SiglipVisionConfig(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=vision_layers,
        num_attention_heads=4, image_size=GRID * CELL, patch_size=CELL, vision_use_head=False,
    )
    text = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=512, initializer_range=scale,
        tie_word_embeddings=False, bos_token_id=None, **ids,
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.image_token_id,
        image_seq_length=GRID * GRID, vision_feature_select_strategy="full", vision_feature_layer=-1,
    )
    config.initializer_range = scale
    model = transformers.LlavaForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig(**ids)
    return model


def pretrain_vision(model, processor, steps: int, size: int = 64, lr: float = 2e-3, seed: int = 0,
                    device: str = "cpu") -> float:
    """Teach tower and projector to see: linear heads, thrown away, name number and colour of each slot.
    -> the share of numbers right in the last batch."""
    rng, colours = random.Random(seed), list(toy_env.COLOURS)
    numbers = toy_env.LARGEST + 1
    head = torch.nn.Linear(model.config.text_config.hidden_size, numbers + len(colours) + 1, device=device)
    modules = (model.model.vision_tower, model.model.multi_modal_projector, head)
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    bar = trange(steps, desc="vision")
    for step in bar:
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 50, 2 * (1 - step / steps))
        level = dict(operands=6, distractors=GRID * GRID - 6 - rng.randint(0, 2), grid=GRID, cell=CELL)
        problems = [toy_env.make_problem(rng.getrandbits(48), **level) for _ in range(size)]
        number = torch.full((size, GRID * GRID), -100)  # -100, an empty slot: no number to name
        colour = torch.full((size, GRID * GRID), len(colours))
        for i, problem in enumerate(problems):
            for cell in problem.cells:
                number[i, cell.row * GRID + cell.column] = cell.number
                colour[i, cell.row * GRID + cell.column] = colours.index(cell.colour)
        pixels = processor.image_processor([p.image for p in problems], return_tensors="pt")["pixel_values"]
        features = model.model.get_image_features(pixels.to(device)).pooler_output
        logits = head(torch.stack(list(features))).cpu()  # (B, slots, numbers and colours)
        loss = F.cross_entropy(logits[..., :numbers].flatten(0, 1), number.flatten(), ignore_index=-100)
        loss = loss + F.cross_entropy(logits[..., numbers:].flatten(0, 1), colour.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        right = (logits[..., :numbers].argmax(-1) == number)[number >= 0].float().mean()
        if step % 50 == 0:
            bar.write(f"vision {step}: loss {loss:.3f}, numbers right {right:.3f}")
    return float(right)


def draw(rng: random.Random, size: int, operands: int, openings: Sequence[str] = ("none",),
         guess: float = 0.0) -> tuple[list[toy_env.Problem], list[str]]:
    """Problems of one difficulty, with each kind of filler words in turn, and the teacher's responses."""
    levels = [
        dict(operands=operands, distractors=rng.randint(0, min(3, GRID * GRID - operands)),
             operators=rng.choice(("+-", "+-", "+-", "+-×")), openings=openings[i % len(openings)])
        for i in range(size)
    ]
    problems = [toy_env.make_problem(rng.getrandbits(48), grid=GRID, cell=CELL, **level) for level in levels]
    return problems, [demonstration(p, rng, guess=guess, **TEACHER) for p in problems]


def pretrain(model, processor, steps: int, size: int = 64, lr: float = 1e-3, seed: int = 0,
             truth: float = 1.0, save: str | None = None, operands: int = 3, **teacher) -> float:
    """Imitation, of `size` demonstrations a step. The hardest chain grows from `operands` to 8 over the first
    half of the steps. teacher: as draw. -> the AUROC, at the ends of fresh demonstrations, of the head, which
    is then thrown away."""
    rng = random.Random(seed)
    head = torch.nn.Linear(model.config.text_config.hidden_size, 1, device=model.device)

    def at(step: int) -> tuple:
        return draw(rng, size, rng.randint(2, min(8, operands + 10 * step // steps)), **teacher)

    def keep(step: int, both: torch.Tensor) -> None:
        if save and step % 1000 == 1:
            model.save_pretrained(save)
            processor.save_pretrained(save)

    imitate(model, head, processor, TASK, at, steps, lr, truth=truth, micro_batch=size, on_step=keep)
    return truth_auroc(model, head, processor, rng, **teacher)


@torch.no_grad()
def truth_auroc(model, head, processor, rng: random.Random, batches: int = 16, **teacher) -> float:
    """The chance that the head puts a faultless demonstration above a faulty one, at their last tokens."""
    judged, labels = [], []
    for i in range(batches):
        drawn = draw(rng, 64, 2 + i % 7, **teacher)
        [(_, logits)] = losses(model, head, processor, TASK, *drawn, micro_batch=64)
        _, mask, true_so_far = tokenise(model, processor, *drawn)
        last = torch.arange(64), mask.sum(1).cpu() - 1
        judged.append(logits[last].cpu())
        labels.append(true_so_far[last].cpu())
    judged, labels = torch.cat(judged), torch.cat(labels)
    return float((judged[labels][:, None] > judged[~labels]).float().mean())


# --------------------------------------------------------------------------------------------------- the card
def errors(policy, processor, operands: int, n: int = 512, openings: str = "none",
           **mode) -> tuple[float, dict[str, float]]:
    """Accuracy on held-out problems, and the share of responses by kind of first false statement."""
    level = dict(operands=operands, openings=openings, eval_problems=n)
    config = train_small.complete(train_small.Config(algo="grpo", **level))
    task = train_small.toy_task(config)
    problems = task.held_out
    roll = train_small.rollout(policy, processor, task, problems, config.max_tokens, **mode)
    first = [toy_env.first_error(p, t) for p, t in zip(problems, roll.texts)]
    kinds = {kind: sum(e is not None and e.kind == kind for e in first) / n for kind in KINDS}
    return float(roll.outcome().mean()), kinds


KINDS = ("reading", "operand", "result", "answer", "format")
CARD = """# {name}

A LLaVA-class model (SigLIP tower, projector, Llama; {parameters:,} parameters, {size:.1f} MB) that reads the
pictures of `toy_env.py` and computes with slips and habits: a base model of `train_small.py`. Nothing in it
was downloaded. `AutoProcessor` and `AutoModelForImageTextToText` load this folder with `from_pretrained`.

Made by `{command}` (seed {seed}) in {minutes:.0f} minutes on {device}, with {versions}.
It imitated demonstrations with 2 to 8 operands and 0 to 3 distractors, a quarter of them with ×, by a teacher
with {teacher}.{filler} An auxiliary head learned to tell whether all statements so far are true (AUROC
{auroc:.3f} at the end of fresh demonstrations) and was thrown away.

Held-out problems ({n} per row, + and -): accuracy, and share of responses by kind of first false statement.
Wrong readings and results are the teacher's; wrong operands and unreadable responses, the model's own.

| operands | decoding | accuracy | reading | operand | result | answer | format |
|---|---|---|---|---|---|---|---|
{rows}
"""


def write_card(out: str, policy, processor, n: int = 512, openings: Sequence[str] = ("none",),
               **facts) -> None:
    """Measure the model and write OUT/README.md."""
    torch.manual_seed(0)
    rows = []
    for operands, words in itertools.product(range(2, 9), openings):
        for name, mode in (("greedy", dict(greedy=True)), ("T = 1", {})):
            accuracy, kinds = errors(policy, processor, operands, n, words, **mode)
            shares = " | ".join(f"{kinds[kind]:.3f}" for kind in KINDS)
            level = operands if len(openings) == 1 else f"{operands}, openings: {words}"
            rows.append(f"| {level} | {name} | {accuracy:.3f} | {shares} |")
    facts |= dict(name=Path(out).name, parameters=policy.num_parameters(), rows="\n".join(rows), n=n)
    facts["size"] = (Path(out) / "model.safetensors").stat().st_size / 1e6  # MB
    facts["teacher"] = ", ".join(f"{k} {v}" for k, v in (TEACHER | facts["guess"]).items())
    filler = f" The question asks for filler words (openings): {', '.join(openings)}."
    facts["filler"] = filler if len(openings) > 1 else ""
    facts["versions"] = f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"
    (Path(out) / "README.md").write_text(CARD.format(**facts), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=style)
    parser.add_argument("--out", default=str(Path(__file__).parent), help="folder to write")
    parser.add_argument("--base", help="a model to continue from, without vision steps")
    parser.add_argument("--openings", nargs="+", choices=[*toy_env.OPENED], default=["none"],
                        help="filler words in the demonstrations, each kind in turn")
    parser.add_argument("--guess", type=float, default=0.0, help="how often it guesses instead of looking")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of imitation")
    parser.add_argument("--steps", type=int, default=3600, help="steps of imitation, 64 demonstrations each")
    parser.add_argument("--vision-steps", type=int, default=1000, help="vision steps, 64 images each")
    parser.add_argument("--truth", type=float, default=1.0, help="weight of the auxiliary head; 0: none")
    parser.add_argument("--card-problems", type=int, default=512, help="held-out problems a row of the card")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the demonstrations")
    parser.add_argument("--device", default=best_device(), help="cuda, mps or cpu")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    processor, start = make_processor(wordy=options.openings != ["none"]), time.time()
    if options.base:
        model = transformers.AutoModelForImageTextToText.from_pretrained(options.base).to(options.device)
        model.resize_token_embeddings(len(processor.tokenizer))
    else:
        model = make_model(processor.tokenizer).to(options.device)
        pretrain_vision(model, processor, options.vision_steps, seed=options.seed, device=options.device)
    teacher = dict(openings=options.openings, guess=options.guess)
    auroc = pretrain(model, processor, options.steps, lr=options.lr, truth=options.truth, seed=options.seed,
                     save=options.out, operands=8 if options.base else 3, **teacher)
    model.eval().save_pretrained(options.out)
    processor.save_pretrained(options.out)
    changed = {k: v for k, v in vars(options).items() if v != parser.get_default(k)}
    texts = {k: " ".join(v) if isinstance(v, list) else v for k, v in changed.items()}
    given = [f"--{k.replace('_', '-')} {v}" for k, v in texts.items() if k not in ("out", "device")]
    gpu = options.device == "cuda"
    guess = dict(guess=options.guess) if options.guess else {}
    write_card(options.out, model, processor, options.card_problems, options.openings, auroc=auroc,
               guess=guess, seed=options.seed, minutes=(time.time() - start) / 60,
               command=" ".join(["python -m tiny_vlm.make", *given]),
               device=torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} CPU threads")


if __name__ == "__main__":
    main()
