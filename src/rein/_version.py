"""The version of the installed distribution, which comes from the tag in the repository."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("rein-adapter")
except PackageNotFoundError:  # sources that are not installed
    __version__ = "0.0.0"
