"""A small seeded fuzzer for the readers of files: changed bytes, changed values, and a check that a reader fails as it should.

A test names a reader and a list of inputs; `survive` runs the reader on each. Every input must give the result of the unchanged file
or raise one of rein's errors, in one line, within a time and with little memory. `python -m pytest -m sweep tests/test_fuzz*` (`make
fuzz`) runs the full number of inputs, the ordinary suite a sample.
"""

import copy
import random
import re
import signal
from collections import Counter
from contextlib import contextmanager

import pytest

from rein.errors import ReinError

SECONDS = 20  # for one input; a reader needs milliseconds, the rest is for a busy machine
SPARE_MEMORY = 64 * 2**20  # bytes besides twice the file: modules that are imported on first use, and Python's own objects


def counts(sample, full):
    """Parametrise a test with `count`: `sample` inputs in the ordinary suite, `full` in the sweep."""
    return pytest.mark.parametrize("count", [sample, pytest.param(full, marks=pytest.mark.sweep)])


# -- inputs


def changed_bytes(content, count, seed=0):
    """`count` changed copies of a file's content; each has one to three changes of one kind."""
    generator = random.Random(seed)
    for _ in range(count):
        data = bytearray(content)
        change = generator.choice(_CHANGES)
        for _ in range(generator.choice((1, 1, 1, 2, 3))):
            change(data, generator)
        yield bytes(data)


def _flip(data, generator):
    if data:
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)


def _flip_near_the_start(data, generator):
    if data:
        data[generator.randrange(min(len(data), 400))] = generator.randrange(256)


def _cut(data, generator):
    del data[generator.randrange(len(data) + 1) :]


def _remove(data, generator):
    start = generator.randrange(len(data) + 1)
    del data[start : start + generator.choice((1, 8, 100))]


def _insert(data, generator):
    start = generator.randrange(len(data) + 1)
    data[start:start] = generator.randbytes(generator.choice((1, 8, 100)))


def _repeat(data, generator):
    start = generator.randrange(len(data) + 1)
    data[start:start] = data[start : start + generator.choice((8, 100, 1000))]


def _overwrite(data, generator):
    start, length = generator.randrange(len(data) + 1), generator.choice((4, 8, 64))
    data[start : start + length] = generator.choice((b"\0", b"\xff", b"\x7f")) * length


def _append(data, generator):
    data += generator.randbytes(generator.choice((1, 100)))


def _change_a_number(data, generator):
    """Replace a number that is written in digits."""
    numbers = [match.span() for match in re.finditer(rb"\d+", bytes(data))]
    if numbers:
        start, end = generator.choice(numbers)
        data[start:end] = str(generator.choice(NUMBERS)).encode()


def _change_a_word(data, generator):
    words = [match.span() for match in re.finditer(rb"[A-Za-z_]{3,}", bytes(data))]
    if words:
        start, end = generator.choice(words)
        data[start:end] = generator.choice((b"x", b"null", b"true", b"[]", b"\\n\\u0000", b"rein" * 50))


_CHANGES = (
    *(_flip, _flip_near_the_start, _cut, _remove, _insert, _repeat, _overwrite, _append),
    *(_change_a_number, _change_a_number, _change_a_word),
)
NUMBERS = (0, 1, 2, 3, -1, 7, 255, 256, 65_536, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64, 10**30)
OTHERS = (
    *NUMBERS,
    *(None, True, False, 0.5, -0.0, 1e300, "", "x", "a\nb\x1b[31m\0", "\u202e", "../../x", "/dev/zero", "x" * 5000),
    *([], [[]], [1], ["x"], [None] * 1000, {}, {"x": 1}, {"": {}}),
)


def changed_values(value, count, seed=0):
    """`count` changed copies of a value of JSON or YAML: an entry is replaced, removed, added, repeated, or moved elsewhere."""
    generator = random.Random(seed)
    for _ in range(count):
        changed = copy.deepcopy(value)
        for _ in range(generator.choice((1, 1, 1, 2, 3))):
            changed = _changed_once(changed, generator)
        yield changed


def _changed_once(value, generator):
    holders = list(_holders(value))
    if not holders or generator.random() < 0.02:
        return copy.deepcopy(generator.choice(OTHERS))
    holder = generator.choice(holders)
    key = generator.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    action = generator.random()
    if action < 0.55:
        holder[key] = copy.deepcopy(generator.choice(OTHERS))
    elif action < 0.7:
        del holder[key]
    elif action < 0.85:
        other = generator.choice(holders)
        source = generator.choice(list(other) if isinstance(other, dict) else range(len(other)))
        holder[key] = copy.deepcopy(other[source])
    elif isinstance(holder, dict):
        holder[generator.choice(("x", "", "class_path", str(key).upper()))] = copy.deepcopy(generator.choice(OTHERS))
    else:
        holder.insert(key, copy.deepcopy(generator.choice([*holder, *OTHERS])))
    return value


def _holders(value):
    """Every dictionary and list with at least one entry, inside a value or the value itself."""
    if isinstance(value, dict | list) and value:
        yield value
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _holders(entry)


# -- the check


def survive(read, inputs, size_of=len):
    """Run `read` on every input and return the number of inputs by outcome: `read`, or the first words of an error.

    Args:
        read: reads one input; asserts that the result is the original's, and that an error left nothing behind.
        inputs: the inputs.
        size_of: number of bytes of an input's file.

    The test fails if an input raises anything but one of rein's errors, if an error has several lines, or if reading takes longer
    than `SECONDS`, or more memory than twice the file besides `SPARE_MEMORY`.
    """
    outcomes = Counter()
    for number, data in enumerate(inputs):
        before = _reset_peak_memory()
        try:
            with _limit(SECONDS):
                read(data)
            outcomes["read"] += 1
        except ReinError as error:
            text = str(error)
            assert text.isprintable(), f"input {number}: not one line: {text[:500]!r}"
            assert len(text) < 5000, f"input {number}: a long text: {text[:500]!r}"
            outcomes[type(error).__name__] += 1
        except Exception as error:
            raise AssertionError(f"input {number} raises {type(error).__name__}: {data!r:.2000}") from error
        peak = _peak_memory() - before
        assert peak <= 2 * size_of(data) + SPARE_MEMORY, f"input {number} takes {peak:,} bytes: {data!r:.2000}"
    return outcomes


@contextmanager
def _limit(seconds):
    """Raise an error of no ReinError's kind after some seconds."""

    def stop(*_):
        raise TimeoutError(f"longer than {seconds} seconds")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def _reset_peak_memory():
    """Set the peak of this process's memory to its present size, which is returned, in bytes; 0 where Linux's /proc is missing."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return 0
    return _status("VmRSS")


def _peak_memory():
    return _status("VmHWM")


def _status(key):
    try:
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith(f"{key}:"))
    except (OSError, StopIteration):
        return 0
