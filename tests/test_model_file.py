"""A segmenter file explains itself: `Segmenter.load` builds the backbone, `segment` needs no settings, other weights are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rein
from models import amplify_adapter, build
from rein import checkpoint
from rein.backbones import facts
from rein.cli import main
from rein.testing import pocket_vit, tiny_vit

CLASSES, PALETTE = ["road", "sky", "car"], [(128, 64, 128), (70, 130, 180), (0, 0, 142)]
FORMAT_1 = Path(__file__).parent / "files" / "format-1"


def segmenter(backbone=None, **settings):
    """A segmenter with an adapter that changes the features, for three classes."""
    torch.manual_seed(1)
    backbone = pocket_vit() if backbone is None else backbone
    model = amplify_adapter(rein.wrap(backbone, rein.ReinConfig(num_tokens=6, rank=2, query_dim=8)))
    head = rein.heads.LinearHead(backbone.embed_dim, 3)
    return rein.Segmenter(model, head, **{"classes": CLASSES, "palette": PALETTE, **settings}).eval()


@pytest.fixture(scope="module")
def model():
    return segmenter()


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "seg.safetensors"
    model.save(path)
    return path


def photo(height=70, width=90):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def rewritten(source, path, **entries):
    """A copy of a file with other metadata, as another writer could have made it."""
    with safe_open(source, "pt") as opened:
        metadata = opened.metadata()
    changed = {key: json.dumps({**json.loads(metadata[key]), **value}) for key, value in entries.items()}
    metadata = {key: value for key, value in {**metadata, **changed}.items() if key != "sha256"}
    tensors = load_file(source)
    save_file(tensors, path, metadata | {"sha256": checkpoint._digest(tensors, metadata)})
    return path


# -- the file builds its backbone


def test_a_file_alone_gives_the_same_predictions(model, file):
    again = rein.Segmenter.load(file)
    assert not again.training
    assert not any(p.requires_grad for name, p in again.backbone.named_parameters() if not name.startswith("rein."))
    assert torch.equal(again.segment(photo()).classes, model.segment(photo()).classes)
    assert (again.classes, again.palette, again.normalization) == (model.classes, model.palette, model.normalization)


def test_notes_are_kept(tmp_path):
    model = segmenter()
    model.notes = {"sources": ["day"], "scores": {"source validation": {"mIoU": 0.5}}, "window": 64, "stride": 32}
    model.save(tmp_path / "s.safetensors")
    assert rein.Segmenter.load(tmp_path / "s.safetensors").notes == model.notes


def test_sizes_with_which_the_backbone_was_built_are_restored(tmp_path):
    model = segmenter(pocket_vit(img_size=(64, 96), patch_size=16, dynamic_img_size=False))
    model.save(tmp_path / "s.safetensors")
    again = rein.Segmenter.load(tmp_path / "s.safetensors")
    embed = again.backbone.patch_embed
    assert (embed.img_size, embed.patch_size, again.backbone.dynamic_img_size) == ((64, 96), (16, 16), False)
    assert torch.equal(again.segment(photo()).classes, model.segment(photo()).classes)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_of_a_file_replace_timms(tmp_path, suffix):
    torch.manual_seed(3)
    backbone = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True)
    state = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    weights = tmp_path / f"weights{suffix}"
    save_file(state, weights) if suffix == ".safetensors" else torch.save(state, weights)
    model = segmenter(backbone)
    model.save(tmp_path / "s.safetensors")
    again = rein.Segmenter.load(tmp_path / "s.safetensors", weights=weights)
    assert torch.equal(again.segment(photo()).classes, model.segment(photo()).classes)


@pytest.mark.parametrize("way", ["timm's", "the authors'"])
def test_patches_that_were_resampled_in_either_way_are_built_again(tmp_path, way):
    from timm.models.vision_transformer import checkpoint_filter_fn

    from rein.backbones.creation import make_backbone

    torch.manual_seed(3)
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), weights)
    if way == "timm's":  # what timm.create_model(pretrained=True, patch_size=8) does
        backbone = timm.create_model("test_vit", num_classes=0, patch_size=8, dynamic_img_size=True)
        backbone.load_state_dict(checkpoint_filter_fn(load_file(weights), backbone))
    else:
        backbone = make_backbone("test_vit", False, 8, weights=weights)
    model = segmenter(backbone)
    model.save(tmp_path / "s.safetensors")
    again = rein.Segmenter.load(tmp_path / "s.safetensors", weights=weights)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"init_values": 0.5}, "84 tensors in its blocks, 2 attention heads and GELU activations"),
        ({"qk_norm": True}, "tensors in its blocks"),
        ({"num_heads": 4}, "4 attention heads"),
        ({"act_layer": torch.nn.SiLU}, "SiLU activations"),
    ],
)
def test_a_backbone_with_options_that_the_file_cannot_build_is_refused_without_it(tmp_path, options, difference):
    def make():
        torch.manual_seed(3)
        return timm.create_model("test_vit", num_classes=0, dynamic_img_size=True, **options)

    weights, path = tmp_path / "weights.safetensors", tmp_path / "s.safetensors"
    torch.manual_seed(3)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), weights)
    model = segmenter(make())
    model.save(path)
    with pytest.raises(rein.CheckpointError, match="options that the name does not imply") as caught:
        rein.Segmenter.load(path, weights=weights)
    assert difference in str(caught.value)
    assert "rein.Segmenter.load(path, backbone)" in str(caught.value)
    again = rein.Segmenter.load(path, make())
    assert torch.equal(again.segment(photo()).classes, model.segment(photo()).classes)


def test_saving_beside_trained_parameters_of_the_backbone_warns(model, tmp_path):
    model = segmenter()
    model.backbone.norm.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"2 parameters of the backbone are trainable \(norm.weight, norm.bias\), but the file"):
        model.save(tmp_path / "s.safetensors")
    with pytest.warns(UserWarning, match="does not hold the backbone's weights"):
        rein.save(model.backbone, tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["hf-hub:owner/name", "test_vit.../x", "test_vit.no_such_tag/../x"])
def test_a_name_that_is_an_address_or_no_tag_is_refused(file, tmp_path, name):
    path = rewritten(file, tmp_path / "s.safetensors", backbone={"name": name})
    with pytest.raises(rein.CheckpointError, match="cannot be built from its name: timm .* (has no model|cannot build)"):
        rein.Segmenter.load(path)


def test_timms_pretrained_weights_are_asked_for_by_their_full_name(tmp_path, monkeypatch):
    from rein.backbones import creation

    torch.manual_seed(3)
    backbone = timm.create_model("test_vit.r160_in1k", num_classes=0, dynamic_img_size=True)
    model, asked = segmenter(backbone), []
    model.save(tmp_path / "s.safetensors")

    def download(name):
        asked.append(name)
        torch.manual_seed(3)
        return timm.create_model(name, num_classes=0, dynamic_img_size=True)

    monkeypatch.setattr(creation, "_download", download)
    again = rein.Segmenter.load(tmp_path / "s.safetensors")
    assert asked == ["test_vit.r160_in1k"]
    assert torch.equal(again.segment(photo()).classes, model.segment(photo()).classes)


def test_backbone_and_weights_together_are_an_error(file, tmp_path):
    with pytest.raises(rein.InputError, match=r"backbone and weights were both given; .* Leave one of them out\."):
        rein.Segmenter.load(file, pocket_vit(), weights=tmp_path / "w.pth")


def test_a_file_of_version_1_says_that_it_does_not_state_the_backbone():
    with pytest.raises(
        rein.CheckpointError, match=r"does not state how to build its backbone, VisionTransformer.*load\(path, backbone\)"
    ):
        rein.Segmenter.load(FORMAT_1 / "segmenter.safetensors")


def test_a_backbone_that_timm_does_not_have_is_an_error_that_says_what_to_do(tmp_path):
    segmenter(tiny_vit(dynamic_img_size=True)).save(tmp_path / "s.safetensors")
    with pytest.raises(rein.CheckpointError, match=r"timm .* has no model 'VisionTransformer'\. Build the backbone, and pass it"):
        rein.Segmenter.load(tmp_path / "s.safetensors")


def test_the_pocket_backbone_of_another_version_keeps_its_message(file, tmp_path):
    path = rewritten(file, tmp_path / "s.safetensors", backbone={"architecture": "pocket_vit.v1", "name": "pocket_vit.v1"})
    with pytest.raises(
        rein.CheckpointError, match=r"trained on the weights pocket_vit\.v1, the model has pocket_vit\.v2: .*version of rein"
    ):
        rein.Segmenter.load(path)


@pytest.mark.parametrize(
    "create",
    [
        {"patch_size": [8192, 8192]},
        {"img_size": [8192, 8192]},
        {"img_size": [8192, 8192], "patch_size": [8, 8]},
        {"img_size": [-8, 8]},
        {"img_size": 64},
        {"dynamic_img_size": 1},
        {"depth": 12},
        [8, 8],
    ],
)
def test_a_file_that_asks_for_an_enormous_or_odd_backbone_is_refused_before_it_is_built(file, tmp_path, create):
    path = rewritten(file, tmp_path / "s.safetensors", backbone={"create": create})
    with pytest.raises(rein.CheckpointError, match="create of the backbone is"):
        rein.Segmenter.load(path)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"classes": ["a", "a", "b"]}, "expected different names"),
        ({"classes": ["a", "b"]}, "invalid facts: classes is .* one for each of the 3 classes"),
        ({"classes": "abc"}, "classes is 'abc'"),
        ({"palette": [["x", 0, 0]]}, "palette is"),
        ({"palette": [[0, 0, 0]]}, "invalid facts: palette is"),
        ({"normalization": {"mean": [0, 0, 0], "std": [1, 1, 0]}}, "normalization is"),
        ({"normalization": {"mean": [10**400], "std": [1]}}, "normalization is"),
        ({"normalization": [1]}, r"normalization is \[1\], expected a dictionary with mean and std"),
        ({"normalization": {"mean": [1]}}, "expected a dictionary with mean and std"),
        ({"ignore_label": "none"}, "ignore_label is"),
        ({"notes": []}, "expected a dictionary, with a dictionary notes"),
    ],
)
def test_invalid_facts_in_a_file_are_an_error(file, tmp_path, about, message):
    path = rewritten(file, tmp_path / "s.safetensors", about=about)
    with pytest.raises(rein.CheckpointError, match=message):
        rein.Segmenter.load(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": ["a", "b"]}, r"classes is \['a', 'b'\]; expected different names .* 3 classes"),
        ({"classes": ["a", "a", "b"]}, "expected different names"),
        ({"classes": "abc"}, "classes is 'abc'"),
        ({"classes": ["a", "b", "c\n"]}, "printable"),
        ({"palette": [(0, 0, 0)]}, r"palette is \[\(0, 0, 0\)\]; expected colours"),
        ({"palette": [(0, 0, 256)] * 3}, "from 0 to 255"),
        ({"normalization": ((0.5,), (0.0,))}, "normalization is"),
        ({"normalization": 0.5}, "normalization is 0.5"),
    ],
)
def test_invalid_facts_of_a_segmenter_are_an_error(settings, message):
    with pytest.raises(rein.InputError, match=message):
        segmenter(tiny_vit(), **settings)


@pytest.mark.parametrize("notes", [{"loss": float("nan")}, {"text": "a\x1b[2J"}, {"set": {1}}, [1]])
def test_notes_that_cannot_be_read_again_are_not_written(tmp_path, notes):
    model = segmenter(tiny_vit())
    model.notes = notes
    with pytest.raises((rein.InputError), match=r"was not written, because it could not be read again"):
        model.save(tmp_path / "s.safetensors")
    assert not (tmp_path / "s.safetensors").exists()


# -- other weights are refused


def test_an_adapter_on_other_weights_of_the_same_architecture_is_refused(tmp_path):
    torch.manual_seed(0)
    rein.save(rein.wrap(timm.create_model("test_vit", num_classes=0)), tmp_path / "a.safetensors")
    torch.manual_seed(1)
    other = timm.create_model("test_vit", num_classes=0)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    said = r"trained on the weights test_vit\.r160_in1k, the model has other ones: \S+ has .* in the file and .* in the model\."
    with pytest.raises(rein.CheckpointError, match=said + r".*check_weights=False"):
        rein.load(other, tmp_path / "a.safetensors")
    assert other.state_dict().keys() == before.keys()
    other.pretrained_cfg = {**other.pretrained_cfg, "tag": "mine"}
    with pytest.raises(rein.CheckpointError, match=r"on the weights test_vit\.r160_in1k, the model has test_vit\.mine: "):
        rein.load(other, tmp_path / "a.safetensors")
    assert hasattr(rein.load(other, tmp_path / "a.safetensors", check_weights=False), "rein")


def test_a_segmenter_on_other_weights_is_refused(tmp_path, file):
    other = pocket_vit()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.001)
    with pytest.raises(rein.CheckpointError, match=r"the weights pocket_vit\.v2, the model has other ones"):
        rein.Segmenter.load(file, other)
    assert not hasattr(other, "rein")
    rein.Segmenter.load(file, other, check_weights=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_sample_recognises_the_weights_in_another_dtype(tmp_path, dtype):
    rein.save(rein.wrap(pocket_vit()), tmp_path / "full.safetensors")
    rein.load(pocket_vit().to(dtype), tmp_path / "full.safetensors")
    rein.save(rein.wrap(pocket_vit().to(dtype)), tmp_path / "other.safetensors")
    rein.load(pocket_vit(), tmp_path / "other.safetensors")


def test_the_sample_does_not_depend_on_an_adapter_or_the_size_of_images():
    frozen = pocket_vit().requires_grad_(False)
    expected = facts.sample(frozen)
    dimensions = [frozen.get_parameter(name).ndim for name in expected["weights"]]
    assert (len(dimensions), dimensions.count(1)) == (2 * facts.SAMPLED, facts.SAMPLED)
    assert facts.sample(rein.wrap(pocket_vit())) == expected
    assert facts.sample(pocket_vit(img_size=64).requires_grad_(False)) == expected


def test_the_sample_reads_few_numbers(monkeypatch):
    class Count(torch.overrides.TorchFunctionMode):
        most = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in storages:
                self.most = max(self.most, result.numel())
            return result

    model = pocket_vit().requires_grad_(False)
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with Count() as count:
        facts.sample(model)
    assert 0 < count.most <= 2 * facts.SAMPLED * facts.VALUES, "a tensor is copied as a whole"


@pytest.mark.parametrize("part", ["blocks.7", "norm"])
def test_a_file_of_a_backbone_that_was_trained_too_is_refused_on_the_weights_before(tmp_path, part):
    model = segmenter()
    model.backbone.get_submodule(part).requires_grad_(True)
    with torch.no_grad():
        for parameter in model.backbone.get_submodule(part).parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    with pytest.warns(UserWarning, match="parameters of the backbone are trainable"):
        model.save(tmp_path / "s.safetensors")
    with pytest.raises(rein.CheckpointError, match=r"the model has other ones: .*\. Pass a file of the weights .*--weights FILE"):
        rein.Segmenter.load(tmp_path / "s.safetensors")
    state = {key: value for key, value in model.backbone.state_dict().items() if not key.startswith("rein.")}
    save_file(state, tmp_path / "w.safetensors")
    again = rein.Segmenter.load(tmp_path / "s.safetensors", weights=tmp_path / "w.safetensors")
    assert torch.equal(again.segment(photo()).classes, model.segment(photo()).classes)


def test_notes_that_are_longer_than_a_header_may_be_are_not_written(tmp_path):
    model = segmenter()
    model.notes = {"log": "x" * 3_000_000}
    with pytest.raises(rein.InputError, match="its header has 3,.* bytes, expected at most 2,097,152. Shorten the notes"):
        model.save(tmp_path / "s.safetensors")
    assert not (tmp_path / "s.safetensors").exists()


def test_a_backbone_without_timms_weights_does_not_state_their_tag_and_licence(tmp_path):
    from rein.backbones.creation import make_backbone

    model = segmenter(make_backbone("test_vit", False))
    model.save(tmp_path / "s.safetensors")
    stated = checkpoint.read(tmp_path / "s.safetensors")[1].backbone
    assert stated["name"] == "test_vit"
    assert "license" not in stated


@pytest.mark.parametrize(
    ("note", "edge", "size"), [(None, None, (70, 90)), (35, None, (35, 45)), (35, 0, (70, 90)), (None, 140, (140, 180))]
)
def test_images_are_resized_as_the_notes_or_the_argument_say(monkeypatch, note, edge, size):
    model, seen = segmenter(), []
    model.notes = {} if note is None else {"eval_edge": note}
    monkeypatch.setattr(
        model, "predict", lambda x, **settings: seen.append(tuple(x.shape[-2:])) or rein.Segmenter.predict(model, x)
    )
    result = model.segment(photo(), edge=edge)
    assert seen == [size]
    assert result.classes.shape == (70, 90)
    with pytest.raises(rein.InputError, match="edge is -1; expected a number of pixels"):
        model.segment(photo(), edge=-1)


@pytest.mark.parametrize("weights", [{"a": [1, 2]}, {"a": [1, 2, 3, "4"]}, {"a": [1, 2, 3, 10**400]}, [1], {"a": None}])
def test_a_sample_that_is_not_one_is_an_error(file, tmp_path, weights):
    path = rewritten(file, tmp_path / "s.safetensors", backbone={"weights": weights})
    with pytest.raises(rein.CheckpointError, match="is not a sample of weights"):
        rein.Segmenter.load(path)


# -- photographs


IMAGES = {
    "a PIL image": lambda array, folder: Image.fromarray(array),
    "an array": lambda array, folder: array,
    "an array that cannot be written": lambda array, folder: np.frombuffer(array.tobytes(), np.uint8).reshape(array.shape),
    "a tensor": lambda array, folder: torch.from_numpy(array).permute(2, 0, 1),
    "a path": lambda array, folder: saved(array, folder / "photo.png"),
    "a path as text": lambda array, folder: str(saved(array, folder / "photo.png")),
}


def saved(array, path):
    Image.fromarray(array).save(path)
    return path


@pytest.mark.parametrize("kind", IMAGES)
def test_every_kind_of_image_gives_the_same_classes_at_its_own_size(model, tmp_path, kind):
    array = photo()
    found = model.segment(IMAGES[kind](array, tmp_path))
    assert found.classes.shape == array.shape[:2]
    assert found.classes.dtype == torch.uint8
    assert torch.equal(found.classes, model.segment(array).classes)


def test_preprocess_normalises_as_the_file_says(file, tmp_path):
    path = rewritten(file, tmp_path / "s.safetensors", about={"normalization": {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]}})
    tensor = rein.Segmenter.load(path).preprocess(np.full((8, 9, 3), 51, np.uint8))
    assert tensor.shape == (1, 3, 8, 9)
    torch.testing.assert_close(tensor[0, :, 0, 0], torch.tensor([-3.0, -1.0, -1 / 3]))  # (0.2 - mean) / std


def test_grey_transparent_and_rotated_photographs_are_read_as_a_viewer_shows_them(model, tmp_path):
    picture = Image.fromarray(photo(20, 30))
    for mode in ("L", "RGBA", "P", "1", "CMYK"):
        assert model.segment(picture.convert(mode)).classes.shape == (20, 30)
    exif = Image.Exif()
    exif[274] = 6  # turned by 90 degrees
    picture.save(tmp_path / "turned.png", exif=exif)
    assert model.segment(tmp_path / "turned.png").classes.shape == (30, 20)


def test_the_overlay_and_the_mask_have_the_colours_of_the_classes(model, tmp_path):
    found = model.segment(photo())
    assert found.overlay().size == (90, 70)
    mask = np.array(found.overlay(alpha=1.0))
    assert np.array_equal(mask, np.array(PALETTE, np.uint8)[found.classes.numpy()])
    assert np.array_equal(np.array(found.overlay(alpha=0.0)), photo())
    found.save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as written:
        assert np.array_equal(np.array(written), found.classes.numpy())
        assert np.array_equal(np.array(written.convert("RGB")), mask)


def test_shares_name_the_classes_that_occur(model):
    shares = model.segment(photo()).shares()
    assert set(shares) <= set(CLASSES)
    assert sum(shares.values()) == pytest.approx(1)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)


BAD_IMAGES = {
    "a missing file": (lambda folder: folder / "no.jpg", r"cannot read .*no\.jpg: no such file"),
    "a folder": (lambda folder: folder, "cannot read .*: it is a folder"),
    "a text file": (lambda folder: written(folder / "a.jpg", b"hello"), "is not an image that Pillow can read"),
    "half a file": (lambda folder: half(folder), "cannot read .*half.png"),
    "an empty file": (lambda folder: written(folder / "a.png", b""), "is not an image that Pillow can read"),
    "floats": (lambda folder: photo() / 255, r"image is an array float64 of shape \(70, 90, 3\); expected uint8"),
    "a grey array": (lambda folder: photo()[..., 0], r"expected uint8 of shape \(H, W, 3\)"),
    "channels first": (lambda folder: photo().transpose(2, 0, 1), r"shape \(3, 70, 90\); expected uint8 of shape \(H, W, 3\)"),
    "a batch": (lambda folder: torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"expected uint8 of shape \(3, H, W\)"),
    "channels last": (lambda folder: torch.zeros(8, 8, 3, dtype=torch.uint8), r"expected uint8 of shape \(3, H, W\)"),
    "an empty tensor": (lambda folder: torch.zeros(3, 0, 8, dtype=torch.uint8), r"expected uint8 of shape \(3, H, W\)"),
    "16 bits": (lambda folder: Image.fromarray(np.zeros((4, 4), np.uint16)), "with more than 8 bits"),
    "None": (lambda folder: None, "image is a NoneType; expected a path"),
    "a number": (lambda folder: 3, "image is a int; expected a path"),
    "bytes": (lambda folder: b"photo", "image is a bytes; expected a path"),
}


def written(path, content):
    path.write_bytes(content)
    return path


def half(folder):
    path = saved(photo(), folder / "half.png")
    return written(path, path.read_bytes()[:2000])


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_an_image_that_is_not_one_is_an_error(model, tmp_path, kind):
    make, message = BAD_IMAGES[kind]
    with pytest.raises(rein.InputError, match=message):
        model.segment(make(tmp_path))


def test_a_mask_is_written_as_png_only(model, tmp_path):
    found = model.segment(photo(8, 8))
    with pytest.raises(rein.InputError, match=r"does not end in \.png"):
        found.save(tmp_path / "mask.jpg")
    with pytest.raises(rein.CheckpointError, match="cannot write"):
        found.save(tmp_path / "no" / "mask.png")
    with pytest.raises(rein.InputError, match="alpha is 2; expected a number from 0 to 1"):
        found.overlay(alpha=2)


def test_segment_uses_the_window_of_the_training(monkeypatch):
    model, used = segmenter(tiny_vit(dynamic_img_size=True)), []
    predict = model.predict
    monkeypatch.setattr(model, "predict", lambda images, **settings: used.append(settings) or predict(images, **settings))
    model.notes = {"window": 48, "stride": 32}
    model.segment(photo())
    model.segment(photo(), window=None)
    assert used == [{"window": 48, "stride": 32}, {"window": None}]


def test_a_head_for_depth_has_no_classes(tmp_path):
    backbone = rein.wrap(pocket_vit())
    model = rein.Segmenter(backbone, rein.heads.DepthHead(144))
    model.save(tmp_path / "depth.safetensors")
    again = rein.Segmenter.load(tmp_path / "depth.safetensors")
    assert again.classes == []
    with pytest.raises(rein.InputError, match=r"DepthHead predicts no classes; use segmenter\.predict"):
        again.segment(photo())


# -- rein info


def test_info_shows_what_the_file_states(tmp_path, capsys):
    model = segmenter()
    model.notes = {
        "sources": ["day"],
        "scores": {"source validation": {"mIoU": 0.6123}},
        "command": "rein fit --config streets-rein",
    }
    model.save(tmp_path / "s.safetensors")
    assert main(["info", str(tmp_path / "s.safetensors")]) == 0
    printed = capsys.readouterr().out
    for part in (
        "segmenter, format 2",
        "pocket_vit.v2, patches of 8 x 8 pixels, images of 128 x 128 pixels, licence apache-2.0, timm",
        "3: road, sky, car",
        "#804080 #4682b4 #00008e",
        "normalised with mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225",
        "label 255",
        "source validation mIoU 0.6123",
        "rein fit --config streets-rein",
        "rein.Segmenter.load(path)",
    ):
        assert part in printed


def test_info_states_the_version_of_an_old_file(capsys):
    assert main(["info", str(FORMAT_1 / "segmenter.safetensors")]) == 0
    printed = capsys.readouterr().out
    assert "segmenter, format 1" in printed
    assert "rein.Segmenter.load(path, backbone)" in printed


def test_a_build_in_the_test_models_is_described(tmp_path):
    rein.save(rein.wrap(build("sam")), tmp_path / "a.safetensors")
    assert "backbone" in checkpoint.describe_file(tmp_path / "a.safetensors")


def test_photographs_for_a_backbone_with_other_channels_are_refused():
    model = segmenter(tiny_vit(in_chans=4), normalization=([0.5] * 4, [0.2] * 4))
    with pytest.raises(rein.InputError, match=r"expects images of 4 channels, .* use segmenter\.predict"):
        model.segment(photo())


def test_a_path_in_place_of_the_backbone_is_an_error(file):
    with pytest.raises(rein.InputError, match=r"backbone is 'weights\.pth'; .* weights=FILE"):
        rein.Segmenter.load(file, "weights.pth")
