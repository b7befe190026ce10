"""Measure the latency of `server.py`: clients that send an image, wait for the answer, and send it again.

python load_test.py IMAGE --url http://127.0.0.1:8000/ --clients 4 --requests 200

Prints how many answers had each status and, for those with 200, the median and the 99th percentile of the time from connecting to the
last byte of the answer. It needs the standard library only.
"""

import argparse
import http.client
import statistics
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit


def load(url: str, image: bytes, clients: int, requests: int) -> tuple[Counter, list[float], float]:
    """Send `requests` images from `clients` threads.

    Returns:
        Number of answers by status ("lost" for a connection that broke), seconds of each answer with 200, seconds of the whole test.
    """
    parts, statuses, times, lock = urlsplit(url), Counter[object](), list[float](), threading.Lock()
    left = iter(range(requests))

    def client() -> None:
        while True:
            with lock:
                if next(left, None) is None:
                    return
            start = time.perf_counter()
            connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
            try:
                connection.request("POST", parts.path or "/", image)
                answer = connection.getresponse()
                answer.read()
                status: object = answer.status
            except (OSError, http.client.HTTPException):
                status = "lost"
            finally:
                connection.close()
            with lock:
                statuses[status] += 1
                if status == 200:
                    times.append(time.perf_counter() - start)
            if status == 503:
                time.sleep(0.05)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses, times, time.perf_counter() - begin


def summarise(statuses: Counter, times: list[float], seconds: float) -> str:
    """One line: answers by status, median and 99th percentile in milliseconds, answers with 200 per second."""
    counts = ", ".join(f"{number} x {status}" for status, number in sorted(statuses.items(), key=str))
    if len(times) < 2:
        return f"{counts}; too few answers with 200 for a median"
    percentiles = statistics.quantiles(times, n=100, method="inclusive")
    median, most = 1000 * statistics.median(times), 1000 * percentiles[98]
    return f"{counts}; median {median:.0f} ms, p99 {most:.0f} ms, {len(times) / seconds:.1f} images per second"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000/")
    parser.add_argument("--clients", type=int, default=4, help="number of clients at a time")
    parser.add_argument("--requests", type=int, default=200, help="number of images in all")
    options = parser.parse_args()
    print(summarise(*load(options.url, options.image.read_bytes(), options.clients, options.requests)))


if __name__ == "__main__":
    main()
