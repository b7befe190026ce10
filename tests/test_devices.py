"""The same numbers on every device: each test runs on the CPU, and on a GPU where there is one (marker `gpu`)."""

import copy

import pytest
import torch
from torch import nn

import rein
from rein.testing import tiny_vit

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]),
]
every_device = pytest.mark.parametrize("device", DEVICES)


def model_and_batch():
    torch.manual_seed(0)
    vit = rein.wrap(tiny_vit())
    with torch.no_grad():
        vit.rein.scale.fill_(0.3)
    head = rein.heads.FPNHead([vit.embed_dim] * 4, num_classes=5, channels=16, dropout=0.0)
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(0, 5, (2, 32, 32))
    return rein.Segmenter(vit, head).train(), images, labels


def gradients(model, images, labels, step=None):
    """Gradients of every trained parameter, on the CPU; `step(model, images, labels)` runs backward itself."""
    model.zero_grad()
    if step is None:
        model(images, labels).backward()
    else:
        step(model, images, labels)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: p.grad.detach().float().cpu() for name, p in trained.items() if not name.startswith("backbone.rein.query")}


def largest_difference(got, expected):
    """Largest relative error of a parameter's gradient, by the Euclidean norm."""
    assert got.keys() == expected.keys()
    return max(float((got[name] - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-3)) for name in got)


@pytest.fixture
def case(device):
    model, images, labels = model_and_batch()
    expected = gradients(model, images, labels)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield model.to(device), images.to(device), labels.to(device), expected
    torch.set_float32_matmul_precision(before)


@every_device
def test_gradients_are_those_of_the_cpu(case):
    model, images, labels, expected = case
    assert len(expected) > 10
    assert largest_difference(gradients(model, images, labels), expected) < 1e-4


@every_device
def test_inference_agrees_with_the_published_equations(case):
    model, images, _, _ = case
    vit = model.backbone.eval()
    with torch.no_grad():
        refined = vit.forward_features(images)
        with rein.disabled(vit):
            tokens = vit._pos_embed(vit.patch_embed(images))
            for layer, block in enumerate(vit.blocks):
                tokens = block(tokens)
                patches = vit.rein.reference_forward(tokens[:, vit.num_prefix_tokens :], layer)
                tokens = torch.cat([tokens[:, : vit.num_prefix_tokens], patches], 1)
            expected = vit.norm(tokens)
    assert torch.allclose(refined, expected, atol=1e-5)


@every_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_a_gradient_scaler_keep_the_gradients_within_the_precision(case, device, dtype):
    model, images, labels, expected = case
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)

    def step(model, images, labels):
        with torch.autocast(device, dtype):
            loss = model(images, labels)
        scaler.scale(loss).backward()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        scaler.unscale_(optimizer)

    assert (
        largest_difference(gradients(model, images, labels, step), expected) < 0.3
    )  # older CPU kernels accumulate in half precision


@every_device
def test_gradient_checkpointing_of_the_backbone_gives_the_same_gradients(case):
    model, images, labels, expected = case
    model.backbone.set_grad_checkpointing(True)
    assert largest_difference(gradients(model, images, labels), expected) < 1e-4


@every_device
def test_a_compiled_model_gives_the_same_outputs_and_gradients(case, device):
    model, images, labels, expected = case
    options = {"mode": "reduce-overhead"} if device == "cuda" else {"backend": "aot_eager"}
    compiled = torch.compile(model, **options)
    for _ in range(3):  # CUDA graphs are recorded in the second call
        got = gradients(model, images, labels, lambda _, x, y: compiled(x, y).backward())
    assert largest_difference(got, expected) < 1e-3
    eager = copy.deepcopy(model).eval()
    with torch.no_grad():
        assert torch.allclose(torch.compile(eager, **options)(images), eager(images), atol=1e-4)


@every_device
def test_an_adapter_moves_between_devices_by_its_file(case, device, tmp_path):
    model, images, _, _ = case
    rein.save(model.backbone, tmp_path / "a.safetensors")
    bare = rein.unwrap(copy.deepcopy(model.backbone)).eval()
    rein.load(bare, tmp_path / "a.safetensors")
    assert {parameter.device.type for parameter in bare.parameters()} == {device}
    model.backbone.eval()
    with torch.no_grad():
        assert torch.allclose(bare(images), model.backbone(images), atol=1e-6)
        on_cpu = bare.cpu()(images.cpu())
    assert torch.allclose(on_cpu, model.backbone(images).detach().cpu(), atol=1e-4)


@every_device
def test_adamw_steps_reduce_the_loss(case):
    model, images, labels, _ = case
    optimizer = torch.optim.AdamW(rein.param_groups(model, lr=1e-3, weight_decay=0.05))
    losses = []
    for _ in range(10):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
