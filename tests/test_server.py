"""The example of a server, `docs/examples/server.py`: what it answers, overload and garbage included."""

import http.client
import importlib.util
import io
import queue
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import rein
from rein import export
from rein.testing import tiny_vit

EXAMPLES = Path(__file__).parent.parent / "docs/examples"


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


server, load_test = example("server"), example("load_test")


def classes_of(images):
    """A model whose classes are the red channel, divided by 64."""
    return images[:, 0] // 64


@pytest.fixture
def serve():
    """A function that starts a server and returns its port."""
    running = []

    def start(run=classes_of, **limits):
        started = server.Server(("127.0.0.1", 0), run, **{"min_side": 4, "timeout": 30, **limits})
        thread = threading.Thread(target=started.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        running.append((started, thread))
        return started.server_address[1]

    yield start
    for started, thread in running:
        started.shutdown()
        thread.join()
        started.server_close()


def send(port, body=b"", method="POST", path="/", headers=None):
    """Status, body and headers of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers
    finally:
        connection.close()


def send_raw(port, request, close=True):
    """What the server answers to bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(request)
        if close:
            connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def encoded(height=8, width=12, kind="png", mode="RGB"):
    pixels = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(content, kind)
    return content.getvalue(), pixels


def test_an_image_is_answered_with_its_classes_at_its_size(serve):
    body, pixels = encoded()
    status, answer, headers = send(serve(), body)
    assert (status, headers["Content-Type"]) == (200, "image/png")
    with Image.open(io.BytesIO(answer)) as classes:
        assert np.array_equal(np.asarray(classes), pixels[..., 0] // 64)


@pytest.mark.parametrize(("kind", "mode"), [("jpeg", "RGB"), ("jpeg", "L"), ("png", "RGBA"), ("png", "P"), ("png", "1")])
def test_every_kind_of_png_and_jpeg_is_read(serve, kind, mode):
    status, answer, _ = send(serve(), encoded(kind=kind, mode=mode)[0])
    assert status == 200
    with Image.open(io.BytesIO(answer)) as classes:
        assert classes.size == (12, 8)


def test_a_photograph_is_turned_as_its_exif_entry_says(serve):
    pixels, exif, content = np.full((16, 24, 3), 200, np.uint8), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(pixels).save(content, "jpeg", exif=exif)
    status, answer, _ = send(serve(), content.getvalue())
    assert status == 200
    with Image.open(io.BytesIO(answer)) as classes:
        assert classes.size == (16, 24)


def test_more_than_eight_bits_are_answered_with_400(serve):
    content = io.BytesIO()
    Image.fromarray(np.full((8, 12), 40_000, np.uint16)).save(content, "png")
    assert send(serve(), content.getvalue())[:2] == (400, b"the image has more than 8 bits; convert it to 8 bits first\n")


def test_health_is_answered_and_other_paths_are_not(serve):
    port = serve()
    assert send(port, method="GET", path="/health")[:2] == (200, b"ok\n")
    assert send(port, method="GET")[:2] == (404, b"POST an image to /\n")
    assert send(port, encoded()[0], path="/other")[0] == 404
    assert send(port, method="DELETE")[0] == 501


def test_garbage_is_answered_with_400_and_the_server_goes_on(serve):
    port, image = serve(), encoded()[0]
    gif = io.BytesIO()
    Image.new("RGB", (8, 8)).save(gif, "gif")
    for body in (b"", b"garbage", image[:-30], image[:40] + b"\0" * 60, gif.getvalue(), bytes(range(256)) * 50):
        assert send(port, body)[:2] == (400, b"the body is no complete PNG or JPEG image\n")
    assert send(port, encoded(2, 12)[0])[:2] == (400, b"the image has 12 x 2 pixels; each side must have at least 4\n")
    assert send(port, image)[0] == 200


def test_bodies_without_a_true_length_are_refused(serve):
    port = serve()
    assert b" 411 " in send_raw(port, b"POST / HTTP/1.0\r\n\r\n").splitlines()[0]
    for length in (b"-5", b"many", b"1e3", "²".encode("latin-1")):
        assert b" 411 " in send_raw(port, b"POST / HTTP/1.0\r\nContent-Length: " + length + b"\r\n\r\n").splitlines()[0]
    cut = send_raw(port, b"POST / HTTP/1.0\r\nContent-Length: 100\r\n\r\nhalf")
    assert cut.endswith(b"the body has 4 bytes, Content-Length says 100\n")
    assert b" 400 " in send_raw(port, b"\x16\x03\x01 garbage\r\n\r\n")
    assert send(port, encoded()[0])[0] == 200


def test_large_bodies_and_images_are_refused_before_they_are_read(serve):
    runs = []
    port = serve(lambda images: runs.append(images), max_bytes=2000, max_pixels=100)
    status, text, _ = send(port, b"x" * 2001)
    assert (status, text) == (413, b"the body has 2001 bytes; at most 2000 are accepted\n")
    assert b" 413 " in send_raw(port, b"POST / HTTP/1.0\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n").splitlines()[0]
    bomb = io.BytesIO()
    Image.new("1", (11, 10)).save(bomb, "png")
    status, text, _ = send(port, bomb.getvalue())
    assert (status, text) == (413, b"the image has 11 x 10 pixels; at most 100 in all are accepted\n")
    assert not runs


def test_a_client_that_stops_sending_is_answered_with_408_and_loses_its_place(serve):
    port = serve(timeout=0.2, queue=0)
    answer = send_raw(port, b"POST / HTTP/1.0\r\nContent-Length: 100\r\n\r\nhalf", close=False)
    assert b" 408 " in answer.splitlines()[0]
    assert send(port, encoded()[0])[0] == 200


class Gate:
    """A model that waits until it is opened, and counts how many calls run at a time."""

    def __init__(self):
        self.open, self.running, self.most = threading.Event(), 0, 0

    def __call__(self, images):
        self.running += 1
        self.most = max(self.most, self.running)
        assert self.open.wait(30)
        self.running -= 1
        return classes_of(images)


def test_an_overloaded_server_answers_503_at_once_and_finishes_what_it_accepted(serve):
    gate, body, answers = Gate(), encoded()[0], queue.Queue()
    port = serve(gate, queue=2)
    clients = [threading.Thread(target=lambda: answers.put(send(port, body))) for _ in range(5)]
    for client in clients:
        client.start()
    for _ in range(2):  # while the model waits, so that three have their places
        status, text, headers = answers.get(timeout=30)
        assert (status, text, headers["Retry-After"]) == (503, b"all places are taken; try again\n", "1")
    assert answers.empty()
    assert send(port, method="GET", path="/health")[0] == 200
    gate.open.set()
    assert [answers.get(timeout=30)[0] for _ in range(3)] == [200] * 3
    for client in clients:
        client.join()
    assert gate.most == 1
    assert send(port, body)[0] == 200


def test_more_connections_than_allowed_are_closed_with_503(serve):
    port = serve(connections=1, timeout=30)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as idle:
        idle.sendall(b"POST / HTTP/1.0\r\n")
        assert b" 503 " in send_raw(port, b"")
        idle.shutdown(socket.SHUT_WR)
        while idle.recv(65536):
            pass


def test_a_model_that_fails_is_answered_with_500_and_the_server_goes_on(serve, caplog):
    def run(images):
        if images.shape[2] == 8:
            raise RuntimeError("secret")
        return classes_of(images)

    port = serve(run)
    assert send(port, encoded()[0])[:2] == (500, b"the model failed on this image\n")
    assert "secret" in caplog.text
    assert send(port, encoded(9)[0])[0] == 200


def test_the_load_test_counts_answers_and_states_median_and_p99(serve):
    port = serve()
    statuses, times, seconds = load_test.load(f"http://127.0.0.1:{port}/", encoded()[0], clients=3, requests=20)
    assert statuses == {200: 20}
    assert len(times) == 20
    assert 0 < max(times) <= seconds
    hundred = [number / 1000 for number in range(1, 101)]
    assert load_test.summarise({200: 100, 503: 7}, hundred, 2.0) == (
        "100 x 200, 7 x 503; median 50 ms, p99 99 ms, 50.0 images per second"
    )
    assert load_test.summarise({503: 7}, [], 2.0) == "7 x 503; too few answers with 200 for a median"


@pytest.mark.slow
def test_an_exported_file_is_served_and_one_without_argmax_is_refused(serve, tmp_path):
    torch.manual_seed(0)
    model = rein.Segmenter(rein.wrap(tiny_vit(dynamic_img_size=True, depth=2)), rein.heads.LinearHead([32], 4)).eval()
    export.export_segmenter(model, tmp_path / "model.pt2", normalise=True, argmax=True)
    body, pixels = encoded(40, 33)
    status, answer, _ = send(serve(server.read_model(tmp_path / "model.pt2"), min_side=17), body)
    assert status == 200
    expected = torch.export.load(tmp_path / "model.pt2").module()(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    with Image.open(io.BytesIO(answer)) as classes:
        assert np.array_equal(np.asarray(classes), expected[0].numpy())
    export.export_segmenter(model, tmp_path / "fixed.pt2", normalise=True, argmax=True, batch=1, size=(33, 40))
    port = serve(server.read_model(tmp_path / "fixed.pt2"), min_side=17)
    assert send(port, encoded(33, 40)[0])[0] == 200
    message = b"the image has 33 x 40 pixels; the model takes 40 x 33; resize it first\n"
    assert send(port, encoded(40, 33)[0])[:2] == (400, message)
    export.export_segmenter(model, tmp_path / "batch.pt2", normalise=True, argmax=True, batch=2)
    with pytest.raises(SystemExit, match="takes batches of 2 images; write it without --batch, or with --batch 1"):
        server.read_model(tmp_path / "batch.pt2")
    export.export_segmenter(model, tmp_path / "logits.pt2")
    with pytest.raises(SystemExit, match=r"takes tensor\(float32\) and returns logits; write it with: rein export FILE"):
        server.read_model(tmp_path / "logits.pt2")
