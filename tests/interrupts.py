"""Interrupt a call at each of its lines, as Ctrl-C or an error there would."""

import linecache
import sys
from pathlib import Path

import rein

PACKAGE = Path(rein.__file__).parent


class Interrupt(BaseException):
    """Raised at a chosen line."""


def lines_of(call, files):
    """The lines of `files`, in the package, that `call` runs, in order of their first run."""
    found = {}
    _trace(call, files, lambda line: found.setdefault(line))
    return list(found)


def interrupt(call, files, line):
    """Run `call` and raise `Interrupt` where it first runs `line`; return whether it did."""

    def stop(current):
        if current == line:
            sys.settrace(None)
            raise Interrupt(line)

    try:
        _trace(call, files, stop)
    except Interrupt:
        return True
    return False


def _trace(call, files, visit):
    paths = {str(PACKAGE / file): file for file in files}

    def trace(frame, event, arg):
        path = frame.f_code.co_filename
        if path not in paths:
            return None
        # an exception that a tracer raises when a `with` block ends would skip the end of its context manager
        if event == "line" and not linecache.getline(path, frame.f_lineno).lstrip().startswith("with "):
            visit((paths[path], frame.f_lineno))
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(previous)
