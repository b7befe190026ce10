"""`rein predict FILE PHOTOS`: a segmenter file in, masks, overlays, probabilities and a page out; it resumes and protects files."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import rein
from rein.cli import main
from rein.dgss import pages, prediction
from rein.dgss.prediction import videos
from rein.errors import InputError
from rein.testing import pocket_vit

CLASSES = ["road", "sky", "car"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A segmenter file, whose head is random."""
    torch.manual_seed(0)
    vit = pocket_vit()
    head = rein.heads.LinearHead([vit.embed_dim] * 4, num_classes=3)
    path = tmp_path_factory.mktemp("model") / "seg.safetensors"
    palette = [(128, 64, 128), (70, 130, 180), (0, 0, 142)]
    rein.Segmenter(vit.requires_grad_(False), head, classes=CLASSES, palette=palette).save(path)
    return path


@pytest.fixture
def photos(tmp_path):
    """Three photographs, one of them in a folder below and one of another size."""
    folder = tmp_path / "photos"
    (folder / "trip").mkdir(parents=True)
    for number, (name, size) in enumerate({"a.png": (48, 32), "b.JPG": (64, 40), "trip/c.jpeg": (48, 32)}.items()):
        draw(folder / name, number, size)
    return folder


def draw(path, seed=0, size=(48, 32)):
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 6, 3)).astype(np.uint8)
    Image.fromarray(pixels).resize(size).save(path)
    return path


def run(*arguments):
    return main(["predict", *map(str, arguments)])


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_folder_becomes_masks_overlays_and_a_page(model, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(model, photos, "--out", out) == 0
    assert files(out) == [
        "index.html",
        "overlays/a.jpg",
        "overlays/b.jpg",
        "overlays/trip/c.jpg",
        "predictions.json",
        "predictions/a.png",
        "predictions/b.png",
        "predictions/trip/c.png",
    ]
    assert f"3 predictions are in {out / 'predictions'}; to see them, open {out / 'index.html'}" in capsys.readouterr().out
    page = (out / "index.html").read_text()
    assert all(f"<h3>{name}</h3>" in page for name in ("a", "b", "trip/c"))
    assert "pocket_vit" in page


def test_masks_are_what_the_segmenter_finds_at_the_images_own_size(model, photos, tmp_path):
    out = tmp_path / "out"
    assert run(model, photos, "--out", out, "--batch-size", 2) == 0
    segmenter = rein.Segmenter.load(model)
    for path, name in ((photos / "a.png", "a"), (photos / "b.JPG", "b"), (photos / "trip/c.jpeg", "trip/c")):
        expected = segmenter.segment(path)
        with Image.open(out / f"predictions/{name}.png") as mask, Image.open(out / f"overlays/{name}.jpg") as overlay:
            assert mask.mode == "P"
            assert mask.getpalette()[:9] == [128, 64, 128, 70, 130, 180, 0, 0, 142]
            assert (np.array(mask) == expected.classes.numpy()).mean() > 0.999  # a batch adds in another order
            assert overlay.size == mask.size == expected.classes.shape[::-1]


def test_probabilities_sum_to_one_and_agree_with_the_mask(model, photos, tmp_path):
    out = tmp_path / "out"
    assert run(model, photos / "b.JPG", "--out", out, "--probabilities") == 0
    probabilities = np.load(out / "probabilities/b.npy")
    assert probabilities.shape == (3, 40, 64)
    assert probabilities.dtype == np.float16
    np.testing.assert_allclose(probabilities.astype(float).sum(0), 1, atol=3e-3)  # three roundings to 11 bits
    with Image.open(out / "predictions/b.png") as mask:
        chosen = np.take_along_axis(probabilities, np.array(mask)[None].astype(int), 0)[0]
    assert (chosen == probabilities.max(0)).all()


def test_a_photograph_is_turned_as_its_exif_data_state(model, tmp_path):
    path, exif = tmp_path / "turned.jpg", Image.Exif()
    exif[274] = 6
    Image.new("RGB", (48, 32), "red").save(path, exif=exif)
    assert run(model, path, "--out", tmp_path / "out") == 0
    for name in ("predictions/turned.png", "overlays/turned.jpg"):
        with Image.open(tmp_path / "out" / name) as written:
            assert written.size == (32, 48)


def test_an_edge_and_windows_change_how_an_image_is_predicted_but_not_the_size_of_its_mask(model, photos, tmp_path):
    masks = []
    for number, options in enumerate(([], ["--eval-edge", 16], ["--window", 16, "--stride", 8])):
        assert run(model, photos / "b.JPG", "--out", tmp_path / str(number), *options) == 0
        with Image.open(tmp_path / str(number) / "predictions/b.png") as mask:
            assert mask.size == (64, 40)
            masks.append(np.array(mask))
    assert (masks[0] != masks[1]).any()
    assert (masks[0] != masks[2]).any()


def test_a_compiled_segmenter_writes_the_same_masks(model, photos, tmp_path, monkeypatch):
    compiled = []

    def compile(module):
        compiled.append(module)
        torch.nn.Module.compile(module, backend="eager")

    monkeypatch.setattr(rein.Segmenter, "compile", compile)
    for name, options in (("eager", []), ("compiled", ["--compile"])):
        assert run(model, photos / "a.png", "--out", tmp_path / name, *options) == 0
    assert len(compiled) == 1
    assert (tmp_path / "eager/predictions/a.png").read_bytes() == (tmp_path / "compiled/predictions/a.png").read_bytes()


@pytest.mark.parametrize(
    ("notes", "window", "stride"), [({"window": 16, "stride": 8}, 16, 8), ({"window": None}, None, None), ({}, 512, None)]
)
def test_windows_of_the_file_are_used_as_segment_uses_them(model, photos, tmp_path, notes, window, stride):
    segmenter = rein.Segmenter.load(model)
    segmenter.notes = notes
    segmenter.save(tmp_path / "seg.safetensors")
    assert run(tmp_path / "seg.safetensors", photos / "a.png", "--out", tmp_path / "out", "--probabilities") == 0
    expected = segmenter.predict(segmenter.preprocess(photos / "a.png"), window, stride).softmax(1)[0]
    written = torch.from_numpy(np.load(tmp_path / "out/probabilities/a.npy"))
    torch.testing.assert_close(written.float(), expected, atol=1e-3, rtol=0)
    mask = torch.from_numpy(np.array(Image.open(tmp_path / "out/predictions/a.png")))
    assert torch.equal(mask, segmenter.segment(photos / "a.png").classes)


# -- what is found


def test_patterns_and_folders_find_each_image_once_and_ignore_other_files(photos, tmp_path):
    (photos / "notes.txt").write_text("x")
    (photos / ".hidden.png").write_bytes(b"x")
    sources, videos = prediction.find_sources([photos / "**/*.jpeg", photos, photos / "a.png"], tmp_path / "out")
    assert [source.name for source in sources] == ["c", "a", "b"]
    assert not videos


def test_the_folder_of_the_predictions_is_not_searched(model, photos, capsys):
    for _ in range(2):
        assert run(model, photos, "--out", photos / "out") == 0
    assert "3 predictions are in" in capsys.readouterr().out
    assert len(list((photos / "out/predictions").rglob("*.png"))) == 3


def test_images_of_the_same_name_keep_their_suffix_or_their_folder(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        draw(tmp_path / folder / "x.png")
    draw(tmp_path / "one/x.jpg")
    sources, _ = prediction.find_sources([tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    assert [source.name for source in sources] == ["one/x.jpg", "one/x.png", "two/x"]


def test_two_images_that_would_get_the_same_name_are_refused(tmp_path):
    for folder in ("p/q", "r/q"):
        (tmp_path / folder).mkdir(parents=True)
        draw(tmp_path / folder / "x.png")
    with pytest.raises(InputError, match=r"several images are named q/x.png; expected different names"):
        prediction.find_sources([tmp_path / "p/q", tmp_path / "r/q"], tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nothing"], r"nothing does not exist; expected an image, a video, a folder or a pattern"),
        (["*.gif"], r"no file matches \*.gif. Check the pattern"),
        (["empty"], r"empty has no images; expected files that end in .jpg"),
    ],
)
def test_arguments_without_images_are_refused(arguments, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=text):
        prediction.find_sources(arguments, tmp_path / "out")


# -- earlier predictions


def test_the_same_command_keeps_what_is_done_and_predicts_what_is_missing(model, photos, tmp_path, capsys):
    out = tmp_path / "out"
    run(model, photos, "--out", out)
    kept = (out / "predictions/a.png").stat().st_mtime_ns
    (out / "predictions/b.png").unlink()
    draw(photos / "new.png")
    capsys.readouterr()
    assert run(model, photos, "--out", out) == 0
    assert f"4 predictions are in {out / 'predictions'}, 2 of them earlier" in capsys.readouterr().out
    assert (out / "predictions/a.png").stat().st_mtime_ns == kept
    assert (out / "predictions/new.png").exists()
    assert (out / "index.html").read_text().count("<h3>") == 4


def test_an_interrupted_command_says_what_is_done_and_resumes(model, photos, tmp_path, capsys, monkeypatch):
    out, written = tmp_path / "out", prediction.PredictionFolder.write

    def interrupt(folder, name, *arguments, **options):
        if name == "b":
            raise KeyboardInterrupt
        written(folder, name, *arguments, **options)

    monkeypatch.setattr(prediction.PredictionFolder, "write", interrupt)
    assert run(model, photos, "--out", out) == 130
    assert f"rein: interrupted; 1 predictions are in {out / 'predictions'}. The same command resumes." in capsys.readouterr().err
    monkeypatch.undo()
    assert run(model, photos, "--out", out) == 0
    assert "3 predictions are in" in capsys.readouterr().out


def test_a_killed_command_leaves_no_mask_without_its_other_outputs(model, photos, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*arguments):
        raise Killed

    monkeypatch.setattr("rein.images.Segmentation.save", kill)
    with pytest.raises(Killed):
        run(model, photos / "a.png", "--out", tmp_path / "out", "--probabilities")
    assert not list((tmp_path / "out/predictions").glob("*.png"))
    monkeypatch.undo()
    assert run(model, photos / "a.png", "--out", tmp_path / "out", "--probabilities") == 0
    assert (tmp_path / "out/predictions/a.png").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [(["--probabilities"], "probabilities was False and is True"), (["--window", 16], "window was None and is 16")],
)
def test_other_settings_do_not_mix_with_earlier_predictions(model, photos, tmp_path, capsys, options, text):
    out = tmp_path / "out"
    run(model, photos, "--out", out)
    before = (out / "predictions/a.png").stat().st_mtime_ns
    assert run(model, photos, "--out", out, *options) == 2
    assert f"holds predictions with other settings: {text}. Replace them with --overwrite" in capsys.readouterr().err
    assert (out / "predictions/a.png").stat().st_mtime_ns == before
    assert run(model, photos, "--out", out, *options, "--overwrite") == 0
    assert (out / "predictions/a.png").stat().st_mtime_ns > before


def test_another_file_of_a_segmenter_is_another_setting(model, photos, tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    segmenter = rein.Segmenter.load(model)
    with torch.no_grad():
        next(segmenter.head.parameters()).mul_(-1)
    segmenter.save(other)
    run(model, photos, "--out", tmp_path / "out")
    assert run(other, photos, "--out", tmp_path / "out") == 2
    assert "other settings: another segmenter file" in capsys.readouterr().err


def test_predictions_of_other_images_are_not_taken_for_those_of_new_ones(model, photos, tmp_path, capsys):
    out = tmp_path / "out"
    run(model, photos, "--out", out)
    (tmp_path / "more").mkdir()
    other = draw(tmp_path / "more/a.png", 9)
    assert run(model, other, "--out", out) == 2
    expected = f"1 of 1 predictions exist already, of other images or of images that have changed, the first: {out}"
    assert expected in capsys.readouterr().err
    draw(photos / "a.png", 5, (20, 20))
    assert run(model, photos, "--out", out) == 2
    assert run(model, photos, "--out", out, "--overwrite") == 0
    with Image.open(out / "predictions/a.png") as mask:
        assert mask.size == (20, 20)


def test_masks_of_another_program_are_not_replaced(model, photos, tmp_path, capsys):
    path = tmp_path / "out/predictions/a.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    assert run(model, photos, "--out", tmp_path / "out") == 2
    assert "predictions exist already" in capsys.readouterr().err
    assert path.read_bytes() == b"mine"


def test_a_bad_model_file_leaves_predictions_that_it_was_to_overwrite(model, photos, tmp_path, capsys):
    out, bad = tmp_path / "out", tmp_path / "bad.safetensors"
    run(model, photos, "--out", out)
    bad.write_bytes(model.read_bytes()[:5000])
    before = files(out)
    assert run(bad, photos, "--out", out, "--overwrite") == 2
    assert "bad.safetensors" in capsys.readouterr().err
    assert files(out) == before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"settings": 1, "sources": {}}', '{"settings": {}, "sources": {"a": 3}}'])
def test_a_damaged_state_file_is_named(model, photos, tmp_path, capsys, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/predictions.json").write_text(content)
    assert run(model, photos, "--out", tmp_path / "out") == 2
    assert "predictions.json cannot be read" in capsys.readouterr().err


def test_an_input_is_never_replaced(model, tmp_path, capsys):
    (tmp_path / "predictions").mkdir()
    path = draw(tmp_path / "predictions/a.png")
    before = path.read_bytes()
    assert run(model, path, "--out", tmp_path, "--overwrite") == 2
    assert "would replace an input. Choose another --out." in capsys.readouterr().err
    assert path.read_bytes() == before


def test_progress_states_the_time_left(capsys):
    with prediction.run._Progress(4, kept=0) as progress:
        for clock in ("start_t", "last_print_t"):  # as if the first image had taken a minute
            setattr(progress._bar, clock, getattr(progress._bar, clock) - 60)
        progress.advance()
    assert "1/4 [01:00<03:00, 60.00s/image]" in capsys.readouterr().err


# -- what cannot be predicted


def test_images_that_cannot_be_read_are_named_and_the_others_predicted(model, photos, tmp_path, capsys):
    out = tmp_path / "out"
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:60])
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(photos / "deep.png")
    (photos / "gone.png").symlink_to(tmp_path / "nowhere.png")
    for _ in range(2):  # the second call names them, too
        assert run(model, photos, "--out", out) == 1
        said = capsys.readouterr()
        lines = [line for line in said.err.splitlines() if line.startswith("rein: no prediction: ")]
        assert [name in line for name, line in zip(("broken.png", "deep.png", "gone.png"), lines, strict=True)] == [True] * 3
        assert "3 predictions are in" in said.out
    assert "3 without a prediction" in (out / "index.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["MISSING", "PHOTOS", "--out", "OUT"], "cannot use"),
        (["MODEL", "--out", "OUT"], "required: PHOTO"),
        (["MODEL", "PHOTOS"], "required: --out"),
        (["MODEL", "PHOTOS", "--out", "OUT", "--device", "toaster"], "the device toaster cannot be used"),
        (["MODEL", "PHOTOS", "--out", "OUT", "--window", "0"], "not a whole number"),
        (["MODEL", "PHOTOS", "--out", "MODEL"], "cannot be made"),
        (["PHOTOS/a.png", "PHOTOS", "--out", "OUT"], "a.png"),
    ],
)
def test_bad_arguments_give_one_line(model, photos, tmp_path, capsys, arguments, text):
    words = {"MODEL": model, "PHOTOS": photos, "OUT": tmp_path / "out", "MISSING": tmp_path / "none.safetensors"}
    arguments = [str(words.get(word, str(word).replace("PHOTOS", str(photos)))) for word in arguments]
    try:
        code = run(*arguments)
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr().err.strip()
    assert code == 2
    assert text in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_stride_above_the_window_and_a_device_without_values_are_refused_at_once(model, photos, tmp_path, capsys):
    for options, text in (
        (["--window", 16, "--stride", 32], "the stride is 32 pixels, and the window 16; expected a stride no larger"),
        (["--device", "meta"], "the device meta holds no values"),
    ):
        assert run(model, photos, "--out", tmp_path / "out", *options) == 2
        assert text in capsys.readouterr().err
        assert not (tmp_path / "out/index.html").exists()


def test_other_weights_of_the_backbone_are_not_mixed_with_earlier_predictions(model, photos, tmp_path, capsys):
    state = {key: value.clone() for key, value in pocket_vit().state_dict().items()}
    for name in ("one", "two"):
        save_file(state, tmp_path / f"{name}.safetensors", {"name": name})
    arguments = (model, photos / "a.png", "--out", tmp_path / "out", "--weights")
    assert run(*arguments, tmp_path / "one.safetensors") == 0
    assert run(*arguments, tmp_path / "two.safetensors") == 2
    assert "predictions with other settings: another file of weights" in capsys.readouterr().err


def test_the_edge_that_the_file_states_is_used_as_segment_uses_it(model, photos, tmp_path):
    segmenter = rein.Segmenter.load(model)
    segmenter.notes = {"eval_edge": 16}
    segmenter.save(tmp_path / "seg.safetensors")
    masks = []
    for name, options in (("stated", []), ("own", ["--eval-edge", 0])):
        assert run(tmp_path / "seg.safetensors", photos / "a.png", "--out", tmp_path / name, *options) == 0
        masks.append(torch.from_numpy(np.array(Image.open(tmp_path / name / "predictions/a.png"))))
    assert torch.equal(masks[0], segmenter.segment(photos / "a.png").classes)
    assert torch.equal(masks[1], segmenter.segment(photos / "a.png", edge=0).classes)
    assert not torch.equal(masks[0], masks[1])
    assert "shortest edge of 16 pixels" in (tmp_path / "stated/index.html").read_text()


def test_outputs_of_an_earlier_call_are_not_predicted_and_missing_ones_are_written_again(model, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)
    for _ in range(2):
        assert run(model, "**/*.[pjJ]*[gG]", "--out", ".") == 0
    names = files(photos / "predictions")
    assert len(names) == len(files(photos / "overlays")) == 3
    overlay = next((photos / "overlays").rglob("*.jpg"))
    overlay.unlink()
    assert run(model, "**/*.[pjJ]*[gG]", "--out", ".") == 0
    assert overlay.exists()


def test_predicting_needs_no_extra(model, photos, tmp_path):
    program = f"""
import sys
for name in ("lightning", "jsonargparse", "tensorboard", "yaml", "scipy", "cv2", "matplotlib", "av", "transformers"):
    sys.modules[name] = None
from rein.cli import main
sys.exit(main(["predict", {str(model)!r}, {str(photos / "a.png")!r}, "--out", {str(tmp_path / "out")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/predictions/a.png").exists()


def test_the_page_shows_a_sample_of_many_predictions(model, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "MOST", 2)
    run(model, photos, "--out", tmp_path / "out")
    page = (tmp_path / "out/index.html").read_text()
    assert page.count("<h3>") == 2
    assert "1 more predictions have no picture here" in page


def test_the_state_names_classes_and_sources(model, photos, tmp_path):
    run(model, photos / "a.png", "--out", tmp_path / "out")
    state = json.loads((tmp_path / "out/predictions.json").read_text())
    assert state["classes"] == CLASSES
    assert state["sources"]["a"][0] == str(photos / "a.png")


# -- videos


@pytest.fixture
def video(tmp_path):
    """Five frames."""
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for number in range(5):
            pixels = np.full((32, 48, 3), 40 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def test_a_video_that_ends_early_is_named(model, tmp_path, capsys):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "whole.avi"), "w") as container:
        stream = container.add_stream("mjpeg", rate=5)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuvj420p"
        for number in range(12):
            pixels = np.random.default_rng(number).integers(0, 256, (32, 48, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    content = (tmp_path / "whole.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(content[: len(content) // 2])
    assert run(model, tmp_path / "whole.avi", "--out", tmp_path / "whole") == 0
    capsys.readouterr()
    assert run(model, tmp_path / "cut.avi", "--out", tmp_path / "cut") == 1
    assert "cut.avi ends early: " in capsys.readouterr().err


def test_a_video_becomes_a_mask_for_each_frame_and_a_video_of_overlays(model, video, tmp_path, capsys):
    av = pytest.importorskip("av")
    out = tmp_path / "out"
    assert run(model, video, "--out", out) == 0
    masks = [f"predictions/clip.mp4/{number:06}.png" for number in range(5)]
    assert files(out) == ["index.html", "overlays/clip.mp4", "predictions.json", *masks]
    with av.open(str(out / "overlays/clip.mp4")) as container:
        frames = list(container.decode(video=0))
        assert [len(frames), frames[0].width, frames[0].height, float(container.streams.video[0].average_rate)] == [5, 48, 32, 5]
    assert "<h3>clip.mp4/000002</h3>" in (out / "index.html").read_text()
    (out / "overlays/clip.mp4").unlink()
    (out / masks[3]).unlink()
    capsys.readouterr()
    assert run(model, video, "--out", out) == 0
    assert "5 predictions are in" in (said := capsys.readouterr().out)
    assert "4 of them earlier" in said
    assert (out / "overlays/clip.mp4").exists()
    assert run(model, video, "--out", out) == 0
    assert "5 of them earlier" in capsys.readouterr().out


def test_a_damaged_video_is_named_and_gets_no_overlays(model, video, tmp_path, capsys):
    video.write_bytes(video.read_bytes()[:200])
    assert run(model, video, "--out", tmp_path / "out") == 1
    assert "clip.mp4 cannot be read as a video" in capsys.readouterr().err
    assert not (tmp_path / "out/overlays").exists()


def test_videos_in_folders_are_left_out_and_named(model, video, photos, tmp_path, capsys):
    shutil.copy(video, photos / "clip.MP4")
    assert run(model, photos, "--out", tmp_path / "out") == 0
    assert (
        f"1 videos in the folders are left out; name a video to predict it, such as {photos / 'clip.MP4'}"
        in capsys.readouterr().out
    )
    assert run(model, photos, photos / "clip.MP4", "--out", tmp_path / "out") == 0
    assert "8 predictions are in" in capsys.readouterr().out


def test_a_video_without_its_extra_says_what_to_install(tmp_path, monkeypatch, capsys):
    (tmp_path / "clip.mp4").write_bytes(b"x")
    (tmp_path / "seg.safetensors").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "av", None)
    assert run(tmp_path / "seg.safetensors", tmp_path / "clip.mp4", "--out", tmp_path / "out") == 2
    assert "pip install 'rein-adapter[video]'" in capsys.readouterr().err


def test_frames_are_turned_as_the_video_states(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "turned.mp4"
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:, 24:] = 255  # the right half is white; turned counterclockwise, it is above
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this version of PyAV cannot write a rotation")
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.set_display_rotation(90)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    ((_, frame),) = videos.frames(path, [])
    assert frame.shape == (3, 48, 32)
    assert frame[:, :20].float().mean() > 200
    assert frame[:, 28:].float().mean() < 50


def test_photographs_are_predicted_without_pyav_into_a_folder_with_a_video(model, video, photos, tmp_path, monkeypatch):
    assert run(model, video, "--out", tmp_path / "out") == 0
    monkeypatch.setitem(sys.modules, "av", None)
    assert run(model, photos, "--out", tmp_path / "out") == 0
    assert (tmp_path / "out/index.html").read_text().count("<h3>") == 3
