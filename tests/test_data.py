"""Rows of a data set: each is what a person sees in it, or named and skipped. And rewards of any kind."""

import itertools
import math
import re
from decimal import Decimal
from io import BytesIO
from types import SimpleNamespace

import datasets
import numpy
import pytest
import torch
import transformers
from PIL import Image, ImageDraw
from test_models import make_family

import toy_env
import train_small
from examples import real_vlm
from examples.own_data import dataset_task, from_row
from support import curves
from support.inputs import encode

ROW = dict(image=toy_env.make_problem(0).image, question="red?", answer="1")
KINDS = dict(image=datasets.Image(), question=datasets.Value("string"), answer=datasets.Value("string"))


@pytest.fixture
def task(monkeypatch):
    """Makes the task of a data set in memory: its splits, each a list of rows."""
    def make(how=lambda config: dataset_task(config, "", None), model="", seed=0, answer=None, **splits):
        features = datasets.Features(KINDS | dict(answer=answer)) if answer else None
        tables = {name: datasets.Dataset.from_list(rows, features=features) for name, rows in splits.items()}
        monkeypatch.setattr(datasets, "load_dataset", lambda _: datasets.DatasetDict(tables))
        return how(real_vlm.RealConfig(responses=4, eval_problems=4, dataset="here", model=model, seed=seed))

    return make


# ------------------------------------------------------------------------------------------------------- rows
REFUSED = {2: dict(image=ROW["image"].resize((2000, 4))), 3: dict(image=ROW["image"].resize((3, 900))),
           5: dict(question="is <|video_pad|> there?"), 8: dict(question="no <|image_pad|>, or?"),
           11: dict(question="in <image> or <image>?"), 12: dict(answer=" \n")}


def test_a_row_that_only_the_processor_refuses_is_named_once_and_skipped(task, tmp_path, capsys):
    rows = [ROW | dict(question=f"{i}?") | REFUSED.get(i, {}) for i in range(20)]
    make_family("qwen2_5_vl", tmp_path)
    one, other = (task(real_vlm.make_task, model=str(tmp_path), train=rows, test=[ROW, ROW | REFUSED[2]])
                  for _ in "ab")
    fine = sorted(rows[i]["question"] for i in range(20) if i not in REFUSED)
    drawn = [p.question for p in itertools.islice(one.stream, 42)]
    said = capsys.readouterr().err
    assert sorted(drawn[:14]) == sorted(drawn[14:28]) == fine and len(one.skipped) == 6 == len(REFUSED)
    assert all(said.count(f"\nrow {i} of the data set is skipped: ") == 1 for i in REFUSED)
    assert "expected one without <|video_pad|>\n" in said and "expected one without <|image_pad|>\n" in said
    assert len(one.held_out) == 1 and said.count("held-out row 1 of the data set is skipped: ") == 2
    assert drawn == [p.question for p in itertools.islice(other.stream, 42)]  # as where a run goes on


def test_broken_rows_are_named_once_skipped_and_counted(task, monkeypatch, capsys):
    png = KINDS["image"].encode_example(ROW["image"])["bytes"]
    broken = {3: dict(image=dict(bytes=png[:60])), 5: dict(image=dict(bytes=b"no image")),
              8: dict(image=Image.new("I;16", (4, 4))), 13: dict(question=None)}
    rows = [ROW | dict(question=f"{i}?") | broken.get(i, {}) for i in range(18)]
    made = task(answer=KINDS["answer"], train=rows, test=[ROW])
    drawn = [next(made.stream).question for _ in range(28)]  # two passes
    assert sorted(drawn[:14]) == sorted(drawn[14:]) == sorted({*drawn})
    named = re.findall(r"row (\d+) of the data set is skipped: \S+", capsys.readouterr().err)
    assert sorted(map(int, named)) == [*broken]
    [monkeypatch.setattr(curves, name, print) for name in ("report", "plot")]
    curves.show(SimpleNamespace(config=train_small.Config(out="here"), task=made), [], ((), ()), 0)
    assert "4 rows of the data set could not be read" in capsys.readouterr().out


def test_pictures_stand_at_their_marks_or_the_row_is_refused(tmp_path):
    folders = (make_family(name, tmp_path / name) for name in ("llava", "paligemma"))
    llava, paligemma = map(transformers.AutoProcessor.from_pretrained, folders)
    dark, light = Image.new("RGB", (32, 32)), Image.new("RGB", (32, 32), "white")

    def inputs(processor, question, *images):
        problem = from_row(dict(images=[*images], question=question, answer="1"))
        return encode(processor, "Look.", [problem.image], [problem.question], "cpu")

    for question, expected in {
            "<image>Is <image> brighter?": "#Is#brighter?", "Is <image> or <image>": "Is#or#",
            "<image>\n<image> Which?": "##Which?", "Which?": "##Which?", "<image>Is it?": "#Isit?",
            "Is <image> it?": "Is#it?", "It: <image>": "It:#"}.items():
        found = inputs(llava, question, *(dark, light)[:expected.count("#")])
        text = llava.tokenizer.decode(found["input_ids"][0]).replace("<image>" * 16, "#")
        assert f"user:{expected}assistant:" in "".join(text.split()), text
        assert (found["pixel_values"].mean((1, 2, 3)).diff() > 1).tolist() == [True] * (text.count("#") - 1)
    for question in ("<image>Is it?", "<image>Is <image> or <image>?"):
        with pytest.raises(ValueError, match="question is '<image>Is .*: expected 2 <image>, one a picture"):
            inputs(llava, question, dark, light)
    llava.chat_template = "{% for m in messages %}" + "".join(  # LLaVA 1.5's: images in front
        "{% for c in m.content if c.type == '" + kind + "' %}{{ c.text or '<image>' }}{% endfor %}"
        for kind in ("image", "text")) + "{% endfor %}"
    for processor in (llava, paligemma):
        inputs(processor, "Which?", dark, light)
        with pytest.raises(ValueError, match="question is '<image>Is .*: expected pictures in front"):
            inputs(processor, "<image>Is <image> brighter?", dark, light)


@pytest.mark.parametrize("mode, key", [("RGBA", None), ("LA", None), ("PA", None), ("P", 1), ("P", b"\xff\0"),
                                       ("L", 200), ("RGB", (0, 200, 0)), ("1", 255)])
def test_what_is_transparent_is_white(mode, key):
    file, more = BytesIO(), {} if key is None else dict(transparency=key)
    clear, black = (1 if mode == "P" else key, 0) if more else ((0, 200, 0, 0), (0, 0, 0, 255))
    image = Image.new(mode if more else "RGBA", (60, 60), clear)
    image.putpalette([0, 0, 0, 0, 200, 0]) if mode == "P" else None
    ImageDraw.Draw(image).line((5, 5, 55, 55), fill=black, width=3)
    image.convert(mode).save(file, "TIFF" if mode == "PA" else "PNG", **more)
    found = from_row(ROW | dict(image=Image.open(file))).image
    assert (found.mode, found.getpixel((50, 5)), found.getpixel((30, 30))) == ("RGB", (255,) * 3, (0,) * 3)
    half = from_row(ROW | dict(image=Image.new("RGBA", (2, 2), (0, 0, 255, 51)))).image  # a fifth of blue
    assert half.getpixel((0, 0)) == (204, 204, 255)


@pytest.mark.parametrize("wrong", [dict(answer=x) for x in (
    "", " ", "\n\t", "\xa0", math.nan, -math.inf, None, ["7"], {"a": 1}, True, b"7")] + [
    dict(image=x) for x in (None, [], [None], "a.png", Image.new("I;16", (4, 4)))])
def test_answers_are_texts_and_no_answer_and_no_picture_are_named(wrong):
    for answer, text in (("7\n", "7"), (7.0, "7"), (7, "7"), (0.1, "0.1"), (" a b ", "a b")):
        assert from_row(ROW | dict(answer=answer)).answer == text
    named = "question, answer is 'red[?]', .*: expected" if "answer" in wrong else "image.mode is .* 8 bits"
    with pytest.raises(ValueError, match=named):
        from_row(ROW | wrong)


def test_a_class_is_its_name(task, capsys):
    rows = [ROW | dict(answer=i % 3 - 1) for i in range(9)]  # -1: without a label
    made = task(answer=datasets.ClassLabel(names=["cat", "dog"]), train=rows, test=rows[2:3])
    assert {next(made.stream).answer for _ in range(12)} == {"cat", "dog"}
    assert made.held_out[0].answer == "dog" and capsys.readouterr().err.count(" is skipped: ") == 3


@pytest.mark.parametrize("others, kept", [
    (["val"], "val"), (["test", "dev"], "dev"), (["test", "validation"], "validation"), (["extra"], "extra"),
    (["test", "testmini", "extra"], "testmini"), ([], "train")])
def test_another_split_is_held_out_the_same_for_every_seed(task, capsys, others, kept):
    splits = {name: [ROW | dict(question=f"{name} {i}") for i in range(30)] for name in ("train", *others)}
    made = task(seed=0, **splits), task(seed=1, **splits)
    held_out, same = ([p.question for p in x.held_out] for x in made)
    drawn, other = ([next(x.stream).question for _ in range(30)] for x in made)
    assert held_out == same and len({*held_out}) == 4 and {x.split()[0] for x in held_out} == {kept}
    assert drawn != other and not {*drawn} & {*held_out} and {x.split()[0] for x in drawn} == {"train"}
    assert len({*drawn, *held_out}) == 30 + 4 * (kept != "train")  # each row is for one of the two
    assert capsys.readouterr().out.startswith(f"held out, to evaluate on: 4 rows of split {kept}\n")


# ---------------------------------------------------------------------------------------------------- rewards
def test_rewards_are_numbers_of_any_kind_and_what_is_none_is_named(capsys):
    fine = [1, True, numpy.int64(1), numpy.half(1), numpy.True_, torch.tensor(1), torch.ones(1), Decimal(1)]
    for i, given in enumerate([*fine, None, math.nan, "1", [], 1j, torch.tensor(math.nan), numpy.inf]):
        task = train_small.Task(None, [], "", lambda problem, text: given)
        found = task.rewards([None] * 3, ["one", "cut off", "two"], [False, True, False])
        said = "" if i < len(fine) else f"reward is {given!r} of 'one': expected a number\n"
        assert [*map(type, found)] == [float] * 3 and capsys.readouterr().err == said
        assert found == [1, 0, 1] if i < len(fine) else math.isnan(found[0]) and found[1] == 0
