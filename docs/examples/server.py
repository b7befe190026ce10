"""An HTTP server for a file of `rein export FILE MODEL --normalise --argmax`. It needs Pillow, NumPy, and onnxruntime or torch.

python server.py MODEL.onnx --port 8000
curl --data-binary @photo.jpg http://127.0.0.1:8000/ > classes.png

POST / takes a PNG or JPEG and returns a PNG of class numbers at the same size. GET /health returns "ok". One image is segmented at a
time, and `--queue` images wait. More get 503 at once, so that nobody waits long and the memory stays bounded. Errors are one line of
text: 400 for a body that is no image or is cut off, and for an image of a size that the model does not take, 408 for a body that does
not arrive, 411 without Content-Length, 413 for too many bytes or pixels, 500 if the model fails, 503 if the server is full. It has no
encryption and no passwords: outside of a private network, put a reverse proxy before it.
"""

import argparse
import contextlib
import io
import logging
import socket
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

Run = Callable[[np.ndarray], np.ndarray]  # uint8 (1, 3, H, W), RGB -> uint8 (1, H, W), classes
log = logging.getLogger("server")


class RequestError(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Server(ThreadingHTTPServer):
    """Serves a function from images to classes.

    Args:
        address: host and port; port 0 means a free one.
        run: the function; it is called by one thread at a time.
        queue: number of images that wait while another is segmented.
        max_bytes: largest body of a request.
        max_pixels: largest height x width of an image.
        min_side: smallest height and width of an image, in pixels.
        timeout: seconds that a client may pause while it sends.
        connections: number of connections at a time; others are closed with 503.
    """

    daemon_threads = True
    request_queue_size = 64  # connections that the system keeps until they are accepted

    def __init__(
        self,
        address: tuple[str, int],
        run: Run,
        *,
        queue: int = 8,
        max_bytes: int = 20_000_000,
        max_pixels: int = 4_000_000,
        min_side: int = 64,
        timeout: float = 10,
        connections: int = 128,
    ) -> None:
        super().__init__(address, Handler)
        self.run, self.max_bytes, self.max_pixels, self.min_side, self.seconds = run, max_bytes, max_pixels, min_side, timeout
        self.places = threading.BoundedSemaphore(queue + 1)
        self.turn = threading.Lock()
        self.connections = threading.BoundedSemaphore(connections)

    def process_request(self, request: socket.socket, address: tuple[str, int]) -> None:
        if self.connections.acquire(blocking=False):
            super().process_request(request, address)
        else:
            request.settimeout(1)
            with contextlib.suppress(OSError):
                request.sendall(b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 1\r\n\r\ntoo many connections\n")
            self.shutdown_request(request)

    def process_request_thread(self, request: socket.socket, address: tuple[str, int]) -> None:
        try:
            super().process_request_thread(request, address)
        finally:
            self.connections.release()

    def handle_error(self, request: socket.socket, address: tuple[str, int]) -> None:
        log.warning("%s: connection lost: %s", address[0], sys.exc_info()[1])


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Server

    def setup(self) -> None:
        self.timeout = self.server.seconds
        super().setup()

    def do_GET(self) -> None:
        if self.path == "/health":
            self.answer(200, b"ok\n")
        else:
            self.answer(404, b"POST an image to /\n")

    def do_POST(self) -> None:
        length = 0
        try:
            length = self.length()
            if not self.server.places.acquire(blocking=False):  # before the body is read, so that bodies cannot fill the memory
                raise RequestError(503, "all places are taken; try again")
            try:
                body, length = self.body(length), 0
                classes = self.segment(decode(body, self.server.max_pixels, self.server.min_side))
            finally:
                self.server.places.release()
            content = io.BytesIO()
            Image.fromarray(classes).save(content, "png", compress_level=1)
            self.answer(200, content.getvalue(), "image/png")
        except RequestError as refused:
            self.answer(refused.status, f"{refused}\n".encode())
            self.discard(length)

    def length(self) -> int:
        if self.path != "/":
            raise RequestError(404, "POST an image to /")
        text = self.headers.get("Content-Length", "")
        if not (text.isascii() and text.isdigit()):
            raise RequestError(411, "Content-Length is missing or no number; send the size of the image in bytes")
        if len(text) > 12 or int(text) > self.server.max_bytes:
            raise RequestError(413, f"the body has {text[:20]} bytes; at most {self.server.max_bytes} are accepted")
        return int(text)

    def body(self, length: int) -> bytes:
        try:
            body = self.rfile.read(length)
        except TimeoutError as error:
            raise RequestError(408, f"no data arrived for {self.server.seconds:g} seconds") from error
        if len(body) < length:
            raise RequestError(400, f"the body has {len(body)} bytes, Content-Length says {length}")
        return body

    def segment(self, image: np.ndarray) -> np.ndarray:
        try:
            with self.server.turn:
                return self.server.run(image[None].transpose(0, 3, 1, 2))[0]
        except RequestError:
            raise
        except Exception as error:  # the server goes on
            log.exception("the model failed on an image of shape %s", image.shape)
            raise RequestError(500, "the model failed on this image") from error

    def discard(self, length: int) -> None:
        """Read what the client still sends: closing a connection with unread data would discard the answer, too."""
        with contextlib.suppress(OSError):
            while length > 0 and (part := self.rfile.read1(min(length, 65536))):
                length -= len(part)

    def answer(self, status: int, content: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if status == 503:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def log_message(self, format: str, *values: object) -> None:
        log.info("%s: " + format, self.client_address[0], *values)


def decode(body: bytes, max_pixels: int, min_side: int) -> np.ndarray:
    """The image (H, W, 3), uint8. Its size is checked before its pixels take memory."""
    Image.MAX_IMAGE_PIXELS = None  # `max_pixels` is checked instead
    try:
        image = Image.open(io.BytesIO(body), formats=("PNG", "JPEG"))
        width, height = image.size
        if width * height > max_pixels:
            raise RequestError(413, f"the image has {width} x {height} pixels; at most {max_pixels} in all are accepted")
        if min(width, height) < min_side:
            raise RequestError(400, f"the image has {width} x {height} pixels; each side must have at least {min_side}")
        if image.mode.startswith(("I", "F")):
            raise RequestError(400, "the image has more than 8 bits; convert it to 8 bits first")
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))  # turned as a telephone says
    except RequestError:
        raise
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise RequestError(400, "the body is no complete PNG or JPEG image") from error


def read_model(path: Path, threads: int | None = None) -> Run:
    """Read a file that takes uint8 images and returns classes."""
    if path.suffix == ".onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names, shape = [session.get_inputs()[0].type, session.get_outputs()[0].name], session.get_inputs()[0].shape
        run = lambda images: session.run(None, {"images": np.ascontiguousarray(images)})[0]  # noqa: E731
    else:
        import torch

        if threads:
            torch.set_num_threads(threads)
        program = torch.export.load(path)
        module = program.module()
        example = next(node for node in program.graph.nodes if node.name == program.graph_signature.user_inputs[0])
        output = next(node for node in program.graph.nodes if node.name == program.graph_signature.user_outputs[0])
        dtypes = [each.meta["val"].dtype for each in (example, output)]
        names = [f"tensor({str(dtypes[0]).removeprefix('torch.')})", "classes" if dtypes[1] == torch.uint8 else "logits"]
        shape = example.meta["val"].shape

        def run(images: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return module(torch.from_numpy(np.ascontiguousarray(images))).numpy()

    if names != ["tensor(uint8)", "classes"]:
        sys.exit(f"{path} takes {names[0]} and returns {names[1]}; write it with: rein export FILE {path} --normalise --argmax")
    fixed = [side if isinstance(side, int) else None for side in shape]  # None: any
    if fixed[0] not in (None, 1):
        sys.exit(f"{path} takes batches of {fixed[0]} images; write it without --batch, or with --batch 1")

    def run_checked(images: np.ndarray) -> np.ndarray:
        (height, width), (rows, columns) = images.shape[2:], fixed[2:]
        if rows not in (None, height) or columns not in (None, width):
            raise RequestError(400, f"the image has {width} x {height} pixels; the model takes {columns} x {rows}; resize it first")
        return run(images)

    return run_checked


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The text above as it is, and the default of each option."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("model", type=Path, help="a .onnx or .pt2 file of rein export with --normalise --argmax")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at")
    parser.add_argument("--port", type=int, default=8000, help="port to serve at; 0 takes a free one")
    parser.add_argument("--queue", type=int, default=8, help="number of images that wait while another is segmented")
    parser.add_argument("--max-bytes", type=int, default=20_000_000, help="largest body of a request")
    parser.add_argument("--max-pixels", type=int, default=4_000_000, help="largest height x width of an image")
    parser.add_argument("--min-side", type=int, default=64, help="smallest height and width of an image")
    parser.add_argument("--threads", type=int, help="processor threads of the model; by default, the runtime chooses")
    options = parser.parse_args()
    if not options.model.is_file():
        parser.error(f"{options.model} is no file; expected a file of rein export")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    limits = {name: getattr(options, name) for name in ("queue", "max_bytes", "max_pixels", "min_side")}
    if min(limits["max_bytes"], limits["max_pixels"]) < 1 or limits["queue"] < 0:
        parser.error("--max-bytes and --max-pixels must be at least 1, and --queue at least 0")
    try:
        server = Server((options.host, options.port), read_model(options.model, options.threads), **limits)
    except (OSError, OverflowError) as error:
        parser.error(f"cannot serve at {options.host}:{options.port}: {error}; choose another --port")
    print(f"serving {options.model} at http://{options.host}:{server.server_address[1]}/", flush=True)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
