"""`rein.testing.pocket_vit`, a plain timm model with packaged weights, and the scripts that pretrain and probe it."""

import json
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models import VisionTransformer

import rein
from benchmarks.pocket import encoders, pool, pretrain, probe, views, wider
from rein.backbones import input_spec, normalization
from rein.dgss.scenes import DOMAINS, render_domains
from rein.errors import CheckpointError, InputError
from rein.testing import check_backbone, pocket_vit
from rein.testing.models import POCKET_VIT, POCKET_WEIGHTS


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def features(model, images):
    return model.eval().forward_features(images)


def test_it_is_a_plain_timm_vision_transformer_of_about_two_million_parameters():
    model = pocket_vit()
    assert type(model) is VisionTransformer
    assert 1.5e6 < sum(parameter.numel() for parameter in model.parameters()) < 2.5e6
    assert len(model.blocks) == 8


def test_the_weights_are_small_and_name_the_run_that_made_them():
    assert POCKET_WEIGHTS.stat().st_size <= 5_000_000
    with safe_open(POCKET_WEIGHTS, "pt") as file:
        about = json.loads(file.metadata()["about"])
    assert about["license"] == "Apache-2.0"
    assert about["made_by"] == "benchmarks/pocket/pretrain.py"
    assert about["step"] == about["steps"]


def test_timm_itself_loads_the_weights(images):
    by_timm = VisionTransformer(**POCKET_VIT)
    timm.models.load_checkpoint(by_timm, str(POCKET_WEIGHTS), strict=True)
    assert torch.equal(features(by_timm, images), features(pocket_vit(), images))


def test_the_weights_do_not_depend_on_the_seed_and_are_float32(images):
    torch.manual_seed(1)
    first = pocket_vit()
    torch.manual_seed(2)
    assert torch.equal(features(first, images), features(pocket_vit(), images))
    assert {parameter.dtype for parameter in first.parameters()} == {torch.float32}


def test_without_weights_it_is_random(images):
    torch.manual_seed(1)
    assert not torch.allclose(features(pocket_vit(pretrained=False), images), features(pocket_vit(), images))


@pytest.mark.parametrize("size", [64, (96, 160)])
def test_it_accepts_another_image_size(size):
    model = pocket_vit(img_size=size)
    height, width = (size, size) if isinstance(size, int) else size
    assert features(model, torch.randn(1, 3, height, width)).shape == (1, 1 + height * width // 64, 144)
    assert torch.equal(model.blocks[0].attn.qkv.weight, pocket_vit().blocks[0].attn.qkv.weight)


def test_rein_knows_its_image_sizes_and_normalisation():
    model = pocket_vit()
    assert (input_spec(model).fixed_size, input_spec(model).multiple) == (None, (8, 8))
    assert normalization(model) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_settings_that_do_not_fit_the_weights_are_refused():
    with pytest.raises(InputError, match=r"do not fit \{'embed_dim': 96\}; pass pretrained=False"):
        pocket_vit(embed_dim=96)


def test_another_number_of_heads_is_refused_although_the_shapes_fit():
    with pytest.raises(InputError, match=r"have 3 heads and do not fit \{'num_heads': 4\}"):
        pocket_vit(num_heads=4)


def test_it_can_have_a_classifier(images):
    model = pocket_vit(num_classes=10)
    assert model(images).shape == (2, 10)
    assert torch.equal(features(model, images), features(pocket_vit(), images))


def test_an_adapter_does_not_fit_another_patch_size(tmp_path):
    rein.save(rein.wrap(pocket_vit()), tmp_path / "adapter.safetensors")
    rein.load(pocket_vit(), tmp_path / "adapter.safetensors")
    with pytest.raises(CheckpointError, match=r"pocket_vit_patch16\.v2"):
        rein.load(pocket_vit(patch_size=16), tmp_path / "adapter.safetensors")


def test_an_adapter_for_the_weights_of_another_version_is_refused(tmp_path):
    model = rein.wrap(pocket_vit())
    model.pretrained_cfg["architecture"] = "pocket_vit"  # as in files for the first weights
    rein.save(model, tmp_path / "adapter.safetensors")
    with pytest.raises(
        CheckpointError, match=r"trained on the weights pocket_vit, the model has pocket_vit\.v2: .*Train the adapter"
    ):
        rein.load(pocket_vit(), tmp_path / "adapter.safetensors")


def test_it_passes_the_backbone_checks(images):
    assert "features" in check_backbone(pocket_vit(), images, compile=False)
    assert rein.summary(rein.wrap(pocket_vit())).backbone == "pocket_vit.v2"


def test_a_probe_of_its_features_beats_random_ones_by_day_and_in_unseen_domains():
    torch.manual_seed(0)
    few = {"fit_on": range(20), "evaluate_on": range(2000, 2008)}
    random, pretrained = (probe.evaluate(pocket_vit(weights), **few) for weights in (False, True))
    assert pretrained["day"] > random["day"] + 4
    assert np.mean([pretrained[d] - random[d] for d in ("fog", "night", "rain", "snow")]) > 6


def test_the_curve_probes_every_checkpoint_that_was_kept(tmp_path, monkeypatch):
    pretrain.train(options(tmp_path, keep=2))
    monkeypatch.setattr(probe, "CHOOSING", (range(3), range(500, 502)))
    rows = probe.curve(tmp_path)
    assert [(row["step"], row["images"]) for row in rows] == [(2, 6), (4, 6)]
    last = pocket_vit(pretrained=False)
    last.load_state_dict(torch.load(tmp_path / "step-4.pt", weights_only=True)["encoder"])
    assert rows[-1]["day"] == pytest.approx(probe.evaluate(last, *probe.CHOOSING)["day"], abs=0.05)
    assert not probe.curve(tmp_path / "nothing")


def options(work, **changes):
    facts = {
        "work": work,
        "encoder": "pocket_vit",
        "device": "cpu",
        "seed": 3,
        "images": 6,
        "batch": 2,
        "steps": 4,
        "stop": None,
        "every": 1,
        "keep": None,
        "threads": 1,
    }
    return Namespace(**{**facts, **changes})


def test_pretraining_resumes_exactly(tmp_path, capsys):
    for folder in ("whole", "halves"):
        (tmp_path / folder).mkdir()
    pretrain.train(options(tmp_path / "whole"))
    whole = capsys.readouterr().out
    pretrain.train(options(tmp_path / "halves", stop=2))
    pretrain.train(options(tmp_path / "halves"))
    losses = [[line.partition(",")[0] for line in text.splitlines()] for text in (whole, capsys.readouterr().out)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    written = []
    for folder in ("whole", "halves"):
        pretrain.export(tmp_path / folder, tmp_path / folder / "weights.safetensors")
        written.append((tmp_path / folder / "weights.safetensors").read_bytes())
    assert written[0] == written[1]
    pocket_vit(pretrained=False).load_state_dict(load_file(tmp_path / "whole" / "weights.safetensors"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The folder of a pretraining run of another encoder."""
    work = tmp_path_factory.mktemp("other")
    pretrain.train(options(work, encoder="test_vit", images=2, steps=2, keep=2))
    return work


def test_another_encoder_is_pretrained_exported_and_probed(other, monkeypatch, capsys):
    with pytest.raises(SystemExit, match=r"weights of test_vit, not of pocket_vit. Export them to another file with --to"):
        pretrain.export(other, POCKET_WEIGHTS)
    pretrain.export(other, other / "weights.safetensors")
    about = encoders.about(other / "weights.safetensors")
    assert (about["encoder"], about["step"], about["what"].partition(":")[0]) == ("test_vit", 2, "test_vit")
    model, stored = encoders.load(other / "weights.safetensors"), load_file(other / "weights.safetensors")
    assert model.patch_embed.img_size == (128, 128)
    assert all(torch.equal(value, stored[name].float()) for name, value in model.state_dict().items())
    monkeypatch.setattr(probe, "CHOOSING", (range(3), range(500, 502)))
    command = ["--weights", str(other / "weights.safetensors"), "--out", str(other / "probe.json"), "--tiny"]
    probe.main(command)
    assert set(json.loads((other / "probe.json").read_text())) == {"random", "pretrained"}
    assert [row["step"] for row in probe.curve(other)] == [2]
    assert encoders.about()["encoder"] == "pocket_vit"


def test_the_wider_comparison_does_not_repeat_what_is_finished(tmp_path, monkeypatch):
    called = []

    def write(name):
        def run(arguments):
            called.append((name, arguments))
            for flag in ("--to", "--out"):
                if flag in arguments and name != "compare":
                    path = Path(arguments[arguments.index(flag) + 1])
                    save_file({}, path, {"about": "{}"})
            return 0

        return run

    for module, name in ((wider.pretrain, "pretrain"), (wider.probe, "probe")):
        monkeypatch.setattr(module, "main", write(name))
    monkeypatch.setattr(wider, "generalise", write("compare"))
    command = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--workers", "3"]
    (tmp_path / "work").mkdir()
    assert wider.main(command) == 0
    assert [name for name, _ in called] == ["pretrain", "pretrain", "probe", "compare", "compare"]
    assert (tmp_path / "out/wider-probe.json").read_bytes() == (tmp_path / "work/wider-probe.json").read_bytes()
    assert called[-1][1][:3] == ["mask2former", "--steps", "2000"]
    assert called[-1][1][-4:] == ["--workers", "3", "--out", str(tmp_path / "out")]
    assert wider.main(command) == 0
    assert [name for name, _ in called[5:]] == ["compare", "compare"]
    with pytest.raises(SystemExit):
        wider.main([*command, "--device", "meta"])


def test_what_the_pretraining_cannot_use_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        pretrain.main(["--work", str(tmp_path), "--encoder", "vit_smal", "--images", "2"])
    assert "timm has no model 'vit_smal'. Similar names:" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        pretrain.main(["--work", str(tmp_path), "--encoder", "vit_small_patch16_dinov3", "--images", "2"])
    assert "expected a VisionTransformer of timm with a class token and no other prefix token" in capsys.readouterr().err
    with pytest.raises(InputError, match="no norm before the blocks"):
        encoders.build("vit_base_patch16_clip_224")
    for arguments, message in (
        (["--stop", "0"], "--stop 0; expected at least 1"),
        (["--to", "weights.safetensors"], "--to names the file of --export"),
        (["--device", "meta"], "--device meta; expected cpu, cuda or cuda:N"),
    ):
        with pytest.raises(SystemExit):
            pretrain.main(["--work", str(tmp_path), *arguments])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="has no checkpoint.pt. Pretrain first"):
        pretrain.main(["--work", str(tmp_path), "--export"])
    assert not list(tmp_path.glob("*"))  # found before images are rendered
    rein.save(rein.wrap(pocket_vit()), tmp_path / "adapter.safetensors")
    with pytest.raises(SystemExit):
        probe.main(["--weights", str(tmp_path / "adapter.safetensors"), "--out", str(tmp_path / "probe.json")])
    assert "adapter.safetensors is not a file that `python -m benchmarks.pocket.pretrain --export" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_step_on_a_gpu_has_the_loss_of_the_cpu():
    pairs = np.stack([pool.draw_pair(number, seed=0) for number in range(2)])
    losses = []
    for device in ("cpu", "cuda"):
        model, optimizer = pretrain.build(0, device=device)
        losses.append([pretrain.train_step(model, optimizer, pairs, step, options(None, device=device)) for step in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)  # bfloat16 inside


@pytest.mark.parametrize("change", [{"seed": 4}, {"encoder": "test_vit"}, {"device": "meta"}])
def test_a_checkpoint_of_another_run_is_refused(change, tmp_path):
    pretrain.train(options(tmp_path, stop=1))
    with pytest.raises(SystemExit, match="belongs to another run, .*Choose another --work"):
        pretrain.train(options(tmp_path, **change))


def test_a_pair_of_the_pool_depends_only_on_seed_and_number(tmp_path):
    made = pool.make_pool(tmp_path / "pool.npy", 3, seed=0, workers=1)
    assert all(np.array_equal(made[number], pool.draw_pair(number, seed=0)) for number in (2, 0, 1))
    assert not np.array_equal(made[0], pool.draw_pair(0, seed=1))
    with pytest.raises(ValueError, match="holds 3 pairs; expected at least 4"):
        pool.make_pool(tmp_path / "pool.npy", 4, seed=0, workers=1)
    with pytest.raises(ValueError, match="expected at most 100000"):
        pool.make_pool(tmp_path / "other.npy", 100_001, seed=0, workers=1)


def test_a_pair_shows_one_street_by_day_and_in_another_look():
    found = {}
    for number in range(40):
        day, other = np.split(pool.draw_pair(number, seed=0), 2, -1)
        for domain in DOMAINS[1:]:
            scenes = render_domains(pool.FIRST_STREET + number, ("day", domain))
            if np.array_equal(other, scenes[1].image):  # neither a texture nor zoomed
                assert np.array_equal(day, scenes[0].image)
                found[domain] = number
        if len(found) > 1:
            return
    raise AssertionError(f"pairs of at least two looks were expected among the first; found {found}")


def test_a_texture_stands_twice():
    texture = np.split(next(pair for pair in map(partial(pool.draw_pair, seed=0), range(100)) if is_texture(pair)), 2, -1)
    assert np.array_equal(*texture)


def is_texture(pair):
    return np.array_equal(pair[..., :3], pair[..., 3:])


def test_both_images_of_a_pair_are_cropped_alike():
    image = torch.randint(256, (4, 128, 256, 3), dtype=torch.uint8)
    first, second = views.crops(torch.cat([image, image], -1), (96, 192), torch.Generator().manual_seed(0)).split(3, 1)
    assert first.shape == (4, 3, 96, 192)
    assert torch.equal(first, second)
    assert 0 <= first.min() < first.max() <= 1


def test_the_teacher_follows_the_encoder_without_gradients():
    model, optimizer = pretrain.build(0)
    before = {name: value.clone() for name, value in model.teacher.state_dict().items()}
    pairs = np.stack([pool.draw_pair(number, seed=0) for number in range(2)])
    pretrain.train_step(model, optimizer, pairs, 0, options(None))
    moved, encoder = model.teacher.state_dict(), model.encoder.state_dict()
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert not trained & {id(parameter) for parameter in model.teacher.parameters()}
    for name in ("blocks.7.attn.qkv.weight", "patch_embed.proj.weight"):
        expected = before[name] + (1 - pretrain.FIRST_MOMENTUM) * (encoder[name] - before[name])
        torch.testing.assert_close(moved[name], expected, rtol=0, atol=1e-7)
        assert not torch.equal(moved[name], before[name])


def test_unfinished_weights_are_not_exported_into_the_package(tmp_path):
    pretrain.train(options(tmp_path, stop=1))
    before = POCKET_WEIGHTS.read_bytes()
    with pytest.raises(SystemExit, match="at step 1 of 4. Finish it, or export to another file with --to"):
        pretrain.export(tmp_path, POCKET_WEIGHTS)
    assert POCKET_WEIGHTS.read_bytes() == before
