"""DistributedDataParallel around a `Segmenter`: two processes on the CPU give the gradients of one process with both batches."""

import contextlib
import os
import re
import socket
from datetime import timedelta
from pathlib import Path

import pytest
import timm
import torch
import torch.multiprocessing as processes
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import rein
from models import amplify_adapter, build
from test_heads import HEADS

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS, MICRO_BATCHES, SIZE = 3, 2, 32
SMALL = {"num_tokens": 6, "rank": 2}


def wrapped(config, family="vit with registers"):
    return amplify_adapter(rein.wrap(build(family), rein.ReinConfig(**SMALL, **config)))


def linear():
    """The head uses no queries."""
    return rein.Segmenter(wrapped({"query_dim": 8}), rein.heads.LinearHead(32, 3))


def first_blocks():
    """The head uses no queries and not the layers of the last blocks, which have MLPs of their own."""
    return rein.Segmenter(wrapped({"query_dim": 8, "share": False}), rein.heads.LinearHead([32, 32], 3), indices=[0, 1])


def first_stages():
    """The head does not use the adapter of the last stage."""
    torch.manual_seed(0)
    backbone = amplify_adapter(rein.wrap(timm.create_model("test_convnext", num_classes=0), rein.ReinConfig(**SMALL)))
    return rein.Segmenter(backbone, rein.heads.LinearHead([24, 32], 3), indices=[0, 1])


def linked():
    """The head uses the queries."""
    template = HEADS["linked mask2former"](3)
    head = type(template)(**{**template.arguments, "in_channels": [32] * 4})
    return rein.Segmenter(wrapped({"query_dim": 64}), head)


def bare():
    """All of the backbone trains; the head does not use its final norm."""
    return rein.Segmenter(build("vit with registers"), rein.heads.LinearHead(32, 3))


# model, arguments of DistributedDataParallel, whether the user computes the loss from logits, whether gradients are accumulated
CASES = {
    "loss": (linear, {}, False, False),
    "loss, static graph": (linear, {"static_graph": True}, False, False),
    "loss, accumulated": (linear, {}, False, True),
    "loss, static graph, accumulated": (linear, {"static_graph": True}, False, True),
    "own loss": (linear, {}, True, False),
    "own loss, static graph": (linear, {"static_graph": True}, True, False),
    "own loss, accumulated": (linear, {"gradient_as_bucket_view": True}, True, True),
    "own loss, first blocks": (first_blocks, {}, True, False),
    "loss, first blocks": (first_blocks, {}, False, False),
    "own loss, first stages": (first_stages, {}, True, False),
    "own loss, linked queries": (linked, {}, True, False),
    "full fine-tuning": (bare, {"find_unused_parameters": True}, False, False),
}


def make(name):
    torch.manual_seed(3)
    return CASES[name][0]().eval()  # no dropout


def batch(step, micro_batch):
    """Two images and labels; each image has as many labelled pixels, so the mean over both is the mean of their means."""
    generator = torch.Generator().manual_seed(10 * step + micro_batch)
    return torch.randn(2, 3, SIZE, SIZE, generator=generator), torch.randint(0, 3, (2, SIZE, SIZE), generator=generator)


def train(name, model, images_of):
    """The gradients of each step; `images_of` selects the images of a batch."""
    _, settings, own_loss, accumulated = CASES[name]
    parameters = {key.removeprefix("module."): p for key, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.05)
    found = []
    for step in range(STEPS):
        optimizer.zero_grad()
        # with a static graph torch fails if the very first backward pass is in no_sync, for every model
        count = MICRO_BATCHES if accumulated and (step or "static_graph" not in settings) else 1
        for micro_batch in range(count):
            images, labels = (tensor[images_of] for tensor in batch(step, micro_batch))
            last = micro_batch == count - 1
            with contextlib.nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():
                loss = F.cross_entropy(model(images), labels) if own_loss else model(images, labels)
                loss.backward()
        found.append({key: p.grad.clone() for key, p in parameters.items() if p.grad is not None})
        optimizer.step()
    return found


def run_cases(rank, folder):
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"  # a port could be taken by another test
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    found = {}
    for name, (_, settings, _, _) in CASES.items():
        found[name] = train(name, DistributedDataParallel(make(name), **settings), slice(rank, rank + 1))
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The gradients of all cases on both ranks."""
    folder = tmp_path_factory.mktemp("ddp")
    processes.spawn(run_cases, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def unused_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_gradients_of_one_with_both_batches(found, name):
    expected = train(name, make(name), slice(None))
    for of_rank in found:
        assert len(of_rank[name]) == STEPS
        for got, wanted in zip(of_rank[name], expected, strict=True):
            assert got.keys() == wanted.keys()
            for key, gradient in wanted.items():  # sums in another order, and steps of 0.05 between them
                assert torch.allclose(got[key], gradient, rtol=1e-4, atol=1e-6), key
    assert any(gradient.abs().max() > 1e-4 for gradient in expected[-1].values())


def run_example(rank, port, code, folder):
    real = timm.create_model

    def small(name, pretrained=False, **settings):
        return real(name.partition(".")[0], pretrained=False, embed_dim=48, num_heads=4, **settings)

    timm.create_model = small
    os.chdir(folder)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    exec(compile(code, "training.md", "exec"), {})


def test_the_example_of_the_documentation_runs_on_two_processes(tmp_path):
    text = (Path(__file__).parent.parent / "docs/training.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "DistributedDataParallel" in block]
    processes.spawn(run_example, (unused_port(), code, str(tmp_path)), nprocs=2)
    assert "rein.Segmenter.load" in rein.checkpoint.describe_file(tmp_path / "mine.safetensors")
