"""Read, load and convert checkpoints of the authors of Rein ("official checkpoints").

`names` maps parameter names, `state_dict` converts state dicts, and `files` reads and writes files. All of it is written from a
description of the official layout and not from the authors' code.
"""

from rein.backbones.resampling import resample
from rein.official.files import convert_file, load, read, to_official
from rein.official.state_dict import Official, convert

__all__ = ["Official", "convert", "convert_file", "load", "read", "resample", "to_official"]
