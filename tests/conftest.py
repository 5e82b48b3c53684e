"""What several test files need. They run from the repository root: `python -m pytest -q`."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded, nor asked for

import sys  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # for tiny models, and beside other processes, more of them only wait


def torchvision_beside_another_torch():
    """Its operators may be compiled for another build. Images need none of them, but two must be known."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return None
    except RuntimeError:  # operator torchvision::nms does not exist
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library


KEEP_ALIVE = torchvision_beside_another_torch()  # before transformers looks for it

import transformers  # noqa: E402

import toy_env  # noqa: E402


@pytest.fixture(scope="session")
def mini(tmp_path_factory):
    """The folder of an untrained miniature whose saved settings are all wrong for training."""
    from tiny_vlm import make  # with train_small and all it imports, which a rank needs not

    folder = tmp_path_factory.mktemp("mini")
    torch.manual_seed(0)
    processor = make.make_processor()
    processor.tokenizer.padding_side = "right"
    model = make.make_model(processor.tokenizer, width=32, layers=1, vision_layers=1)
    model.config.text_config.attention_dropout = model.config.vision_config.attention_dropout = 0.5
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=processor.tokenizer.eos_token_id, pad_token_id=processor.tokenizer.pad_token_id,
        do_sample=True, temperature=0.3, top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=1.5,
        no_repeat_ngram_size=2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def coin(monkeypatch):
    """A reward that an untrained model gets now and then, in the toy world and beyond."""
    for reward in ("toy_env.reward", "examples.real_vlm.reward"):
        monkeypatch.setattr(reward, lambda problem, text: float(len(text) % 2))


@pytest.fixture
def few_tries(monkeypatch):
    """A problem that cannot be drawn is given up after 5,000 tries: those that can need a few hundred."""
    monkeypatch.setattr(toy_env, "range", lambda *n: range(*(min(x, 5000) for x in n)), raising=False)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Data sets that are loaded leave their copies in the test's own folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def flags(**options):
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


@pytest.fixture
def command(monkeypatch):
    """Runs train_small.py, or what `how` says, in this process. -> its exit status."""
    import train_small

    def run(*arguments, how=(), **options):
        monkeypatch.setattr(sys, "argv", ["train_small.py", *arguments, *flags(**options)])
        try:
            train_small.main(*how)
        except SystemExit as stop:
            return stop.code
        return 0

    return run
