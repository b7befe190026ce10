import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import rein
from models import FAMILIES, amplify_adapter, build, images
from rein.errors import InputError
from rein.segmenter import _windows, default_indices
from test_heads import HEADS

SMALL = rein.ReinConfig(num_tokens=6, rank=2, query_dim=None)
DYNAMIC, FIXED = "vit with registers", "vit"
every_head = pytest.mark.parametrize("head", HEADS)


def segmenter(family=DYNAMIC, head="fpn", wrap=True, num_classes=5):
    """A segmenter in eval mode over a small backbone."""
    backbone = build(family)
    if wrap:
        amplify_adapter(rein.wrap(backbone, SMALL))
    torch.manual_seed(1)
    template = HEADS[head](num_classes)
    arguments = {**template.arguments, "in_channels": [32] * len(template.in_channels)}
    return rein.Segmenter(backbone, type(template)(**arguments)).eval()


@pytest.mark.parametrize("head", ["linear, one map", "fpn", "linked mask2former", "smp dpt", "smp upernet"])
@pytest.mark.parametrize("family", [DYNAMIC, FIXED, "dinov3"])
@pytest.mark.parametrize("size", [(32, 32), (17, 29), (45, 70), (8, 90), (1, 1)])
def test_logits_have_the_size_of_the_images(family, head, size):
    logits = segmenter(family, head)(images(2, *size))
    assert logits.shape == (2, 5, *size)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_backbone_family_gives_logits_and_gradients(family):
    model = segmenter(family, "linear, four maps")
    logits = model(images(1, 45, 70))
    assert logits.shape == (1, 5, 45, 70)
    assert torch.isfinite(logits).all()
    model.train()(images(1, 30, 26), torch.ones(1, 30, 26, dtype=torch.long)).backward()
    assert model.backbone.rein.tokens_b.grad.flatten(1).abs().amax(1).min() > 0


def test_images_are_padded_right_and_bottom_and_logits_are_cropped():
    model, x = segmenter(), images(1, 27, 44)
    padded = F.pad(x, (0, 4, 0, 5))
    assert torch.allclose(model(x), model(padded)[..., :27, :44])


@every_head
def test_the_adapter_changes_the_logits_and_gets_gradients_from_the_loss(head):
    model, x = segmenter(head=head), images()
    with rein.disabled(model.backbone):
        bare = model(x)
    assert not torch.allclose(model(x), bare)
    labels = torch.randint(0, 5, (2, 32, 32), generator=torch.Generator().manual_seed(0))
    model(x, labels).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".rein." in name or name.startswith("head.")), name


@every_head
@pytest.mark.parametrize("wrap", [True, False])
def test_a_call_with_labels_is_the_loss_and_has_the_same_gradients(head, wrap):
    model, x = segmenter(head=head, wrap=wrap), images(2, 27, 44)
    labels = torch.randint(0, 5, (2, 27, 44), generator=torch.Generator().manual_seed(0))
    found = []
    for compute in (model, model.loss):
        model.zero_grad()
        torch.manual_seed(0)  # the points of Mask2Former's loss
        loss = compute(x, labels)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert loss.shape == ()
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_hooks_of_the_segmenter_see_every_call_that_trains():
    """Wrappers such as FSDP2 prepare the parameters in hooks."""
    model, seen = segmenter(), []
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args)))
    labels = torch.zeros(2, 32, 32, dtype=torch.long)
    model(images())
    model(images(), labels)
    model.loss(images(), labels)
    assert seen == [1, 2, 2]


def test_the_loss_is_the_mean_cross_entropy_of_the_logits():
    model, x = segmenter(), images(2, 27, 44)
    labels = torch.randint(0, 5, (2, 27, 44), generator=torch.Generator().manual_seed(0))
    labels[0, :9] = 255
    expected = F.cross_entropy(model(x), labels, ignore_index=255)
    assert model(x, labels).item() == pytest.approx(expected.item(), rel=1e-5)
    assert model(x, torch.full_like(labels, 255)).item() == 0


def test_a_bare_backbone_can_be_fully_trained_or_frozen():
    full, frozen = segmenter(wrap=False), segmenter(wrap=False)
    frozen.backbone.requires_grad_(False)
    assert full.train().backbone.blocks[0].training
    assert not frozen.train().backbone.training
    assert frozen.head.training
    labels = torch.zeros(2, 32, 32, dtype=torch.long)
    full(images(), labels).backward()
    assert full.backbone.blocks[0].attn.qkv.weight.grad is not None
    frozen(images(), labels).backward()
    assert frozen.backbone.blocks[0].attn.qkv.weight.grad is None


@pytest.mark.parametrize(("window", "stride"), [(16, 8), ((16, 24), (16, 11)), (16, None), (40, 40)])
def test_sliding_windows_average_the_logits_of_each_window(window, stride):
    model, x = segmenter(), images(2, 40, 56)
    height, width = (window, window) if isinstance(window, int) else window
    step = (max(1, height * 2 // 3), max(1, width * 2 // 3)) if stride is None else stride
    down, across = (step, step) if isinstance(step, int) else step
    total, count = torch.zeros(2, 5, 40, 56), torch.zeros(40, 56)
    tops = sorted({min(top, max(0, 40 - height)) for top in range(0, 40, down)})
    lefts = sorted({min(left, max(0, 56 - width)) for left in range(0, 56, across)})
    for top in tops:
        for left in lefts:
            crop = x[..., top : top + height, left : left + width]
            total[..., top : top + height, left : left + width] += model(crop)
            count[top : top + height, left : left + width] += 1
    assert torch.allclose(model.predict(x, window, stride), total / count, atol=1e-5)


def test_an_image_smaller_than_the_window_is_predicted_at_once():
    model, x = segmenter(), images(1, 30, 44)
    with torch.no_grad():  # with gradients, the adapter rounds differently
        whole = model(x)
    assert torch.equal(model.predict(x), whole)
    assert torch.equal(model.predict(x, window=None), whole)


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(10, 4, 3), (10, 4, 4), (10, 10, 3), (3, 10, 3), (1024, 512, 341), (11, 4, 1)]
)
def test_windows_cover_every_pixel_in_order_and_stay_inside(length, window, stride):
    windows = _windows(length, window, stride)
    assert windows[0].start == 0
    assert windows[-1].stop == length
    assert all(w.stop - w.start == min(window, length) for w in windows)
    assert all(0 < b.start - a.start <= stride and b.start <= a.stop for a, b in pairwise(windows))


def test_predict_computes_no_gradients_and_restores_every_mode():
    model = segmenter(head="linear, four maps").train()
    model.head.dropout.eval()
    modes = [module.training for module in model.modules()]
    first, second = (model.predict(images(), window=16, stride=8) for _ in range(2))
    assert not first.requires_grad
    assert torch.equal(first, second)
    assert [module.training for module in model.modules()] == modes


def test_default_indices_are_those_of_the_paper():
    assert default_indices(24, 4) == [7, 11, 15, 23]
    assert default_indices(12, 4) == [3, 5, 7, 11]
    assert default_indices(12, 1) == [11]
    assert all(len(set(default_indices(depth, 4))) == 4 for depth in range(4, 60))
    assert default_indices(4, 2) == [1, 3]


def test_indices_select_the_feature_maps():
    backbone = amplify_adapter(rein.wrap(build(DYNAMIC), SMALL))
    head = rein.heads.LinearHead([32, 32], 3).eval()
    model = rein.Segmenter(backbone, head, indices=[0, 2])
    maps = backbone.forward_intermediates(images(), indices=[0, 2], intermediates_only=True)
    expected = F.interpolate(head(maps), (32, 32), mode="bilinear")
    assert torch.allclose(model(images()), expected)


@every_head
@pytest.mark.parametrize("wrap", [True, False])
def test_one_file_restores_adapter_and_head(tmp_path, head, wrap):
    model, x = segmenter(head=head, wrap=wrap), images(1, 45, 30)
    if not wrap:
        with pytest.raises(InputError, match="the backbone is bare and has trainable parameters"):
            model.save(tmp_path / "model.safetensors")
        model.backbone.requires_grad_(False)
    model.save(tmp_path / "model.safetensors")
    backbone = build(DYNAMIC)
    again = rein.Segmenter.load(tmp_path / "model.safetensors", backbone).eval()
    assert again.backbone is backbone
    assert again.indices == model.indices
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("head", ["linear, one map", "mask2former"])
def test_a_file_restores_the_settings_of_the_loss(tmp_path, head):
    model = segmenter(head=head)
    settings = {"class_weights": [1.0, 5000.0, 0.5, 1.0, 0.0]}
    settings |= {} if head == "mask2former" else {"loss": {"cross_entropy": 1.0, "dice": 3.0}}
    model.head = type(model.head)(**model.head.arguments, **settings)
    model.save(tmp_path / "model.safetensors")
    again = rein.Segmenter.load(tmp_path / "model.safetensors", build(DYNAMIC)).eval()
    assert again.head.arguments.items() >= settings.items()
    values = []
    for each in (model.eval(), again):
        torch.manual_seed(0)  # the points of Mask2Former's loss
        values.append(each(images(), torch.arange(32).expand(2, 32, 32) % 5).item())
    assert values[0] == values[1]


def test_a_file_of_another_kind_or_for_another_backbone_is_an_error(tmp_path):
    model = segmenter()
    model.save(tmp_path / "model.safetensors")
    rein.save(model.backbone, tmp_path / "adapter.safetensors")
    backbone = build(DYNAMIC)
    keys = list(backbone.state_dict())
    with pytest.raises(rein.CheckpointError, match=r"is an adapter file, expected a segmenter file; load it with rein.load"):
        rein.Segmenter.load(tmp_path / "adapter.safetensors", backbone)
    with pytest.raises(
        rein.CheckpointError, match=r"is a segmenter file, expected an adapter file; load it with rein.Segmenter.load"
    ):
        rein.load(backbone, tmp_path / "model.safetensors")
    with pytest.raises(rein.CheckpointError, match="was trained on VisionTransformer, the model is Eva"):
        rein.Segmenter.load(tmp_path / "model.safetensors", build("dinov3"))
    with pytest.raises(rein.CheckpointError, match=r"the file has widths \[32, .*, the model has \[64, "):
        rein.Segmenter.load(tmp_path / "model.safetensors", build(DYNAMIC, embed_dim=64))
    assert list(backbone.state_dict()) == keys


def test_saving_a_custom_head_is_an_error():
    class CustomHead(rein.heads.LinearHead):
        pass

    model = rein.Segmenter(build(DYNAMIC).requires_grad_(False), CustomHead(32, 3))
    with pytest.raises(InputError, match=r"head is a CustomHead, expected a class of rein.heads"):
        model.save("never.safetensors")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: m(torch.zeros(3, 32, 32)),
            r"images must be floating point \(B, 3, H, W\), got torch.float32 of shape \(3, 32, 32\)",
        ),
        (lambda m: m(torch.zeros(1, 4, 32, 32)), r"\(1, 4, 32, 32\)"),
        (lambda m: m(torch.zeros(1, 3, 0, 32)), r"\(1, 3, 0, 32\)"),
        (lambda m: m(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), "got torch.uint8"),
        (
            lambda m: m(images(), torch.zeros(2, 32, 32)),
            r"labels must be integers of shape \(2, 32, 32\).*got torch.float32",
        ),
        (lambda m: m(images(), torch.zeros(2, 32, 31, dtype=torch.long)), r"of shape \(2, 32, 31\)"),
        (
            lambda m: m(images(), torch.full((2, 32, 32), 5)),
            r"labels must be 0 to 4, or 255 for ignored pixels, got \[5\]",
        ),
        (lambda m: m(images(), torch.full((2, 32, 32), -1)), r"got \[-1\]"),
        (lambda m: m.predict(images(), window=0), r"window is \(0, 0\)"),
        (lambda m: m.predict(images(), window=16, stride=17), "the stride no larger than the window"),
        (lambda m: m.predict(images(), window=32.5), "must be an integer number of pixels"),
        (lambda m: m("image"), "images must be a tensor"),
    ],
)
def test_invalid_input_is_an_error(call, message):
    with pytest.raises(InputError, match=message):
        call(segmenter())


def test_training_on_images_larger_than_a_fixed_size_is_an_error():
    with pytest.raises(InputError, match="images are 40 x 32, the backbone accepts at most 32 x 32; train on crops"):
        segmenter(FIXED)(images(1, 40, 32), torch.zeros(1, 40, 32, dtype=torch.long))


@pytest.mark.parametrize("indices", [[0, 1, 2], [0, 1, 2, 4], [0, 2, 1, 3], [0, 1, 1, 3], [-1, 1, 2, 3]])
def test_invalid_indices_are_an_error(indices):
    head = rein.heads.LinearHead([32] * 4, 3)
    with pytest.raises(InputError, match="indices is .*; it must be 4 increasing integers from 0 to 3"):
        rein.Segmenter(build(DYNAMIC), head, indices)


def test_a_head_that_requires_queries_needs_an_adapter_with_queries():
    class QueryHead(rein.heads.LinearHead):
        uses_queries = True

        def forward(self, maps, queries=None):
            return super().forward(maps) + queries.mean()

    with pytest.raises(InputError, match="QueryHead requires an adapter's queries and cannot learn queries"):
        rein.Segmenter(build(DYNAMIC), QueryHead(32, 3))
    with pytest.raises(InputError, match="QueryHead requires an adapter's queries and cannot learn queries"):
        rein.Segmenter(rein.wrap(build(DYNAMIC), SMALL), QueryHead(32, 3))
    model = rein.Segmenter(rein.wrap(build(DYNAMIC), rein.ReinConfig(num_tokens=4, rank=2, query_dim=6)), QueryHead(32, 3))
    model(images()).sum().backward()
    assert model.backbone.rein.query_merge.weight.grad is not None


def test_a_patch_size_that_does_not_divide_the_fixed_size_leaves_no_pixel_out():
    backbone = build(FIXED, img_size=44)  # 5 x 5 patches of 8 cover 40 pixels
    model = rein.Segmenter(backbone, rein.heads.LinearHead(32, 3)).eval()
    x = images(1, 44, 44)
    changed = x.clone()
    changed[..., 40:] += 1
    with torch.no_grad():
        assert (model(changed) - model(x))[..., 40:].abs().min() > 0
        assert model(x[..., :40, :40]).shape == (1, 3, 40, 40)
    with pytest.raises(InputError, match="images are 44 x 44, the backbone accepts at most 40 x 40"):
        model(x, torch.zeros(1, 44, 44, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_backbone_and_head_can_have_different_dtypes(tmp_path, dtype):
    model, x = segmenter(), images()
    expected = model(x)
    model.backbone.to(dtype)
    for inputs in (x, x.to(dtype)):
        logits = model(inputs)
        assert logits.dtype == torch.float32
        assert torch.allclose(logits, expected, atol=0.2)
    model(x, torch.zeros(2, 32, 32, dtype=torch.uint16)).backward()
    assert model.head.classifier.weight.grad.dtype == torch.float32
    model.save(tmp_path / "model.safetensors")
    again = rein.Segmenter.load(tmp_path / "model.safetensors", build(DYNAMIC).to(dtype)).eval()
    assert torch.allclose(again(x).float(), logits, atol=1e-2)


@pytest.mark.parametrize("own_loss", [False, True])
@pytest.mark.parametrize("share", [False, True])
def test_parameters_of_the_adapter_that_the_head_does_not_use_have_zero_gradients(own_loss, share):
    backbone = rein.wrap(build(DYNAMIC), rein.ReinConfig(num_tokens=6, rank=2, query_dim=8, share=share))
    model = rein.Segmenter(backbone, rein.heads.LinearHead([32, 32], 3), indices=[0, 1])
    labels = torch.zeros(2, 32, 32, dtype=torch.long)
    with torch.no_grad():
        expected = model(images())
        backbone.rein.query_merge.bias[0] = torch.nan  # an unused value does not matter
    logits = model(images())
    assert torch.allclose(logits, expected, atol=1e-6)  # with gradients, the adapter rounds differently
    loss = F.cross_entropy(logits, labels) if own_loss else model(images(), labels)
    assert loss.item() == pytest.approx(F.cross_entropy(expected, labels).item(), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)  # DDP requires all
    unused = [backbone.rein.query_merge.weight] + ([] if share else [backbone.rein.delta_mlp[3].weight])
    assert all((parameter.grad == 0).all() for parameter in unused)
    assert (backbone.rein.tokens_a.grad[2:] == 0).all()
    assert (backbone.rein.tokens_a.grad[:2] != 0).any()


def test_a_frozen_adapter_leaves_logits_without_a_graph():
    model = segmenter()
    model.requires_grad_(False)
    assert not model(images()).requires_grad
    model.head.requires_grad_(True)
    assert model(images()).requires_grad
    assert not model.predict(images()).requires_grad


def test_a_file_that_does_not_fit_leaves_the_backbone_unchanged(tmp_path):
    segmenter().save(tmp_path / "deep.safetensors")
    shallow = build(DYNAMIC, depth=3)
    with pytest.raises(rein.CheckpointError, match="does not fit this VisionTransformer: indices"):
        rein.Segmenter.load(tmp_path / "deep.safetensors", shallow)
    assert not hasattr(shallow, "rein")
    bare = segmenter(wrap=False)
    bare.backbone.requires_grad_(False)
    bare.save(tmp_path / "bare.safetensors")
    with pytest.raises(rein.CheckpointError, match="head for a bare backbone, but this backbone is wrapped"):
        rein.Segmenter.load(tmp_path / "bare.safetensors", segmenter().backbone)


def test_a_backbone_with_fewer_blocks_than_maps_is_an_error():
    with pytest.raises(InputError, match="the head expects 4 maps, the backbone has 3 blocks"):
        rein.Segmenter(build(DYNAMIC, depth=3), rein.heads.LinearHead([32] * 4, 3))


def test_a_segmenter_runs_in_half_precision_and_compiled():
    model, x = segmenter(), images()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.float32
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), model(x), atol=1e-5)


def test_the_compiled_loss_has_the_same_gradients():
    backbone = amplify_adapter(rein.wrap(build(DYNAMIC), rein.ReinConfig(num_tokens=6, rank=2, query_dim=8)))
    model, x, labels = rein.Segmenter(backbone, rein.heads.LinearHead(32, 3)), images(), torch.zeros(2, 32, 32, dtype=torch.long)
    torch._dynamo.reset()
    found = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        loss = call(x, labels)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(found[0]) > 10
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*found, strict=True))


def test_flips_and_scales_are_averaged():
    model, x = segmenter(), images(1, 32, 48)
    flipped = model.predict(x.flip(-1), None).flip(-1)
    assert torch.allclose(model.predict(x, None, flip=True), (model.predict(x, None) + flipped) / 2, atol=1e-6)
    half = F.interpolate(x, (16, 24), mode="bilinear", align_corners=False)
    half = F.interpolate(model.predict(half, None), (32, 48), mode="bilinear", align_corners=False)
    expected = (model.predict(x, None) + half) / 2
    assert torch.allclose(model.predict(x, None, scales=(1.0, 0.5)), expected, atol=1e-6)
    assert model.predict(x, 16, 8, flip=True, scales=(0.75, 1.3)).shape == (1, 5, 32, 48)


@every_head
def test_batches_of_windows_give_the_same_logits(head):
    model, x = segmenter(head=head), images(2, 50, 70)
    expected = model.predict(x, 24, 16)
    assert torch.allclose(model.predict(x, 24, 16, window_batch=5), expected, atol=1e-4)


@pytest.mark.parametrize(
    "settings", [{"scales": ()}, {"scales": (0.0,)}, {"scales": (float("nan"),)}, {"scales": 1.5}, {"window_batch": 0}]
)
def test_invalid_settings_of_predict_are_an_error(settings):
    with pytest.raises(InputError, match="scales is .* and window_batch is .*; scales must be a list of"):
        segmenter().predict(images(), **settings)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
def test_memory_grows_with_the_window_and_not_with_the_image():
    """Besides the logits, which have the size of the image: 8 MB here."""
    program = """
import pathlib, re, timm, torch, rein
vit = rein.wrap(timm.create_model("vit_small_patch16_224", img_size=256, num_classes=0, dynamic_img_size=True))
model = rein.Segmenter(vit, rein.heads.LinearHead([384] * 4, 2))
status = pathlib.Path("/proc/self/status")
for window in (256, None):
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1])
    assert model.predict(torch.zeros(1, 3, 512, 2048), window=window, stride=window).shape == (1, 2, 512, 2048)
    print(int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1]) - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    windows, whole = map(int, done.stdout.split())
    assert windows < 0.5 * whole, f"{windows} kB in windows, {whole} kB at once"
