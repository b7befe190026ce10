"""Several devices: here, processes on the CPU that talk by gloo."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing as processes
import yaml
from torch.distributed.tensor import DTensor

import rein
from dgss.folders import make_folder
from models import build, images
from rein.cli import main
from rein.dgss import methods
from rein.dgss.training.sharding import shard

pytestmark = pytest.mark.filterwarnings("ignore")


def configuration(data, out, **model):
    domain = {"dataset": "folder", "path": str(data)}
    return {
        "out": str(out),
        "model": {
            "backbone": "test_vit",
            "pretrained": False,
            "patch_size": 8,
            "head": "LinearHead",
            "lr": 1e-3,
            "window": 32,
            **model,
        },
        "data": {
            "sources": [{**domain, "split": "day", "title": "day"}],
            "targets": [{**domain, "split": "dusk", "title": "dusk"}],
            "held_out": 2,
            "crop": 32,
            "batch_size": 1,
            "workers": 0,
        },
        "trainer": {"max_steps": 3, "val_check_interval": 3, "enable_progress_bar": False, "accelerator": "cpu", "devices": 2},
    }


@pytest.mark.parametrize("method", ["rein", "full", pytest.param("soma", marks=pytest.mark.sweep)])
def test_data_parallel_training_and_evaluation_need_no_settings(tmp_path, method):
    """A linear head uses no queries, and full fine-tuning no final norm; DDP still finds a gradient for every parameter."""
    data = make_folder(tmp_path / "data", count=5)
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(configuration(data, tmp_path / "out", method=method)))
    command = [sys.executable, "-m", "rein.cli"]
    two = ["--trainer.strategy", "ddp"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "fit", "--config", str(path), *two], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if method == "full":
        return
    ious = []
    done = subprocess.run([*command, "test", "--config", str(path), *two], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ious.append(json.loads((tmp_path / "out/test/results.json").read_text())["results"][0]["iou"])
    assert main(["test", "--config", str(path), "--trainer.devices", "1"]) == 0
    ious.append(json.loads((tmp_path / "out/test/results.json").read_text())["results"][0]["iou"])
    assert ious[0] == ious[1]


def segmenter(method):
    backbone = build("vit with registers")
    methods.apply(method, backbone, **({"num_tokens": 6, "rank": 2} if method == "rein" else {}))
    torch.manual_seed(0)
    return rein.Segmenter(backbone, rein.heads.FPNHead([32] * 4, 3, channels=8, tower_channels=8)).eval()  # no dropout


def batch():
    labels = torch.randint(0, 3, (2, 32, 32), generator=torch.Generator().manual_seed(0))
    return images(2), labels


def run_sharded(rank, method, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = segmenter(method)
    shard(model, torch.distributed.init_device_mesh("cpu", (2,)))
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters() if parameter.ndim)
    inputs, labels = batch()
    loss = model(inputs[rank, None], labels[rank, None])
    loss.backward()
    gradients = {
        name: parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    predicted = model.predict(batch()[0], window=32)
    if method == "rein":
        rein.save(model.backbone, f"{folder}/adapter.safetensors")
    if rank == 0:
        torch.save({"gradients": gradients, "predicted": predicted}, f"{folder}/rank0.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method", ["rein", "full", pytest.param("soma", marks=pytest.mark.sweep)])
def test_weights_sharded_by_fsdp_give_the_same_loss_gradients_and_predictions(tmp_path, method, unused_tcp_port):
    processes.spawn(run_sharded, (method, unused_tcp_port, str(tmp_path)), nprocs=2)
    got = torch.load(tmp_path / "rank0.pt", weights_only=True)
    model = segmenter(method)
    model(*batch()).backward()  # a mean over both images, each with as many labelled pixels
    wanted = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert got["gradients"].keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert torch.allclose(got["gradients"][name], gradient, atol=1e-6), name
    if method == "rein":
        saved = rein.load(build("vit with registers"), tmp_path / "adapter.safetensors").rein.state_dict()
        assert all(torch.equal(tensor, saved[name]) for name, tensor in model.backbone.rein.state_dict().items())
    assert torch.allclose(got["predicted"], model.predict(batch()[0], window=32), atol=1e-5)


@pytest.fixture
def unused_tcp_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
