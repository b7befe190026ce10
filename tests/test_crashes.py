"""Saving under adverse conditions: after every one of them the file is the old one or the new one, and nothing else is left."""

import copy
import errno
import itertools
import os
import random
import resource
import signal
import stat
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import rein
from fuzzing import counts
from models import build
from rein import files
from rein.files import replace_file

CONFIG = rein.ReinConfig(num_tokens=100, rank=64, query_dim=128)
OLD, NEW = b"old " * 1000, b"new " * 2000


ADAPTER = rein.wrap(build("vit"), CONFIG)


@torch.no_grad()
def fill(model, value):
    """Set all numbers of the adapter to `value`."""
    for parameter in model.rein.parameters():
        parameter.fill_(value)
    return model


def adapter(value):
    return fill(copy.deepcopy(ADAPTER), value)


def start_saving(path, values, count=10**9):
    """Start a process that saves one adapter after the other to one file; returns its id."""
    models = [copy.deepcopy(ADAPTER) for _ in values]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of forks, as other threads could hold locks
        process = os.fork()
    if process:
        return process
    code = 1
    try:
        for model, value in zip(models, values, strict=True):
            fill(model, value)
        for number in range(count):
            rein.save(models[number % len(models)], path)
        code = 0
    finally:
        os._exit(code)


def value_in(path):
    """The one number in the adapter of a file that `saving` wrote; reading checks its digest."""
    model = rein.load(copy.deepcopy(ADAPTER), path)
    values = {value for parameter in model.rein.parameters() for value in parameter.unique().tolist()}
    assert len(values) == 1
    return values.pop()


@counts(20, 200)
def test_a_process_that_is_killed_while_it_saves_leaves_a_whole_file(tmp_path, count):
    path, generator = tmp_path / "a.safetensors", random.Random(0)
    rein.save(adapter(0.0), path)
    abandoned = 0
    for kill in range(10 * count):  # more than `count` only as long as no process was killed within a write
        if kill >= count and abandoned:
            break
        before, values = path.stat().st_mtime_ns, [2.0 * kill + 1, 2.0 * kill + 2]
        process = start_saving(path, values)
        while path.stat().st_mtime_ns == before:
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.02))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert value_in(path) in values
        abandoned += len(list(tmp_path.iterdir())) - 1
    rein.save(adapter(0.5), path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name], "temporary files of killed processes are left"
    assert abandoned > 0, "no process was killed within a write"


def test_processes_that_save_to_one_name_at_once_leave_a_whole_file(tmp_path):
    path = tmp_path / "a.safetensors"
    rein.save(adapter(0.0), path)
    running = {start_saving(path, [value], 40) for value in (1.0, 2.0, 3.0)}
    found = set()
    while running:
        found.add(value_in(path))
        process, status = os.waitpid(-1, os.WNOHANG)
        assert status == 0
        running -= {process}
    assert found <= {0.0, 1.0, 2.0, 3.0}
    assert value_in(path) > 0
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    rein.save(adapter(1.0), path)
    map_tensors, replaced = torch.UntypedStorage.from_file, []

    def map_late(*arguments, **options):  # safetensors has read the header, and opens the file again for the tensors
        if not replaced:
            replaced.append(rein.save(adapter(2.0), path))
        return map_tensors(*arguments, **options)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", map_late)
    assert value_in(path) == 2.0
    assert replaced


def test_a_file_that_is_replaced_all_the_time_is_an_error(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    rein.save(adapter(1.0), path)
    versions = itertools.count()
    monkeypatch.setattr(files, "_version_of", lambda _: (next(versions),))
    with pytest.raises(rein.CheckpointError, match="cannot read .*: it is replaced all the time"):
        rein.load(copy.deepcopy(ADAPTER), path)


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.write_bytes(OLD)
    return path


def refused(path, message, kept=OLD):
    """Saving is refused with the message, and the folder is as before."""
    before = sorted(entry.name for entry in path.parent.iterdir())
    with pytest.raises(rein.CheckpointError, match=rf"^cannot write .*{message}.*\.$"):
        replace_file(path, NEW)
    assert kept is None or path.read_bytes() == kept
    assert sorted(entry.name for entry in path.parent.iterdir()) == before


@contextmanager
def file_size_limit(size):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_write_that_ends_halfway_keeps_the_old_file(old):
    with file_size_limit(5000):
        refused(old, "File too large")


@pytest.mark.parametrize("call", ["open", "fsync", "chmod", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT])
def test_an_error_of_the_file_system_keeps_the_old_file(old, monkeypatch, call, number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    refused(old, os.strerror(number))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_interruption_leaves_no_temporary_file(old, monkeypatch, call):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, call, interrupt)
    with pytest.raises(KeyboardInterrupt):
        replace_file(old, NEW)
    assert old.read_bytes() == OLD
    assert [entry.name for entry in old.parent.iterdir()] == [old.name]


def test_a_full_disk_keeps_the_old_file(old):
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=32k none {old.parent} 2>/dev/null") != 0:
        pytest.skip("a small file system can be mounted by root only")
    try:
        old.write_bytes(OLD)
        with pytest.raises(rein.CheckpointError, match="cannot write .*: No space left on device"):
            replace_file(old, NEW * 100)
        assert old.read_bytes() == OLD
        assert [entry.name for entry in old.parent.iterdir()] == [old.name]
        replace_file(old, NEW)
        assert old.read_bytes() == NEW
    finally:
        assert os.system(f"umount {old.parent}") == 0


def test_a_read_only_folder_is_an_error(old):
    if os.geteuid() == 0:
        pytest.skip("root may write to a read-only folder")
    old.parent.chmod(0o555)
    try:
        refused(old, "Permission denied")
    finally:
        old.parent.chmod(0o755)


def test_what_is_in_the_way_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "it is a folder", None)
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "it is not a regular file", None)
    (tmp_path / "file").write_bytes(OLD)
    for path, message in (
        (tmp_path / "nowhere" / "a", "nowhere does not exist"),
        (tmp_path / "file" / "a", "Not a directory"),
        (tmp_path / ("a" * 300), "File name too long"),
        (tmp_path / "a\0b", "embedded null"),
        ("/dev/null", "it is not a regular file"),
    ):
        with pytest.raises(rein.CheckpointError, match=f"cannot write .*{message}"):
            replace_file(path, NEW)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder", "pipe"]


def test_a_symbolic_link_is_written_through(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "b" / "file")  # the target does not exist yet
    for content in (OLD, NEW):
        replace_file(tmp_path / "a" / "link", content)
        assert (tmp_path / "a" / "link").is_symlink()
        assert (tmp_path / "b" / "file").read_bytes() == content
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(rein.CheckpointError, match=r"cannot write .*[Ss]ymlink loop|Too many levels of symbolic links"):
        replace_file(tmp_path / "loop", NEW)
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["link"]


def test_a_link_to_itself_is_refused_where_resolve_returns_it(tmp_path, monkeypatch):
    """As from Python 3.13 on."""
    monkeypatch.setattr(Path, "resolve", lambda self: Path(os.path.realpath(self)))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(rein.CheckpointError, match="Too many levels of symbolic links"):
        replace_file(tmp_path / "loop", NEW)
    assert (tmp_path / "loop").is_symlink()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o755])
def test_an_existing_file_keeps_its_mode(old, mode):
    old.chmod(mode)
    replace_file(old, NEW)
    assert stat.S_IMODE(old.stat().st_mode) == mode
    assert old.read_bytes() == NEW


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_mode_of_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        replace_file(tmp_path / "file", NEW)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


def test_the_content_of_a_private_file_is_never_readable_for_others(old, monkeypatch):
    old.chmod(0o600)
    modes = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (modes.append(os.stat(paths[0]).st_mode), replace(*paths)))
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (modes.append(os.fstat(descriptor).st_mode), fsync(descriptor)))
    replace_file(old, NEW)
    assert {stat.S_IMODE(mode) for mode in modes if stat.S_ISREG(mode)} == {0o600}


def test_a_write_protected_file_is_kept(old, monkeypatch):
    old.chmod(0o444)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write to every file
    refused(old, "the file is write-protected")


def test_only_temporary_files_of_killed_processes_are_removed(old):
    with files._temporary(old, 0o600) as (_, running):
        abandoned = running.with_name(running.name[:-20] + "0" * 16 + ".tmp")
        others = [old.with_name(name) for name in (".file.notes.tmp", ".file.tmp", ".other.0123456789abcdef.tmp", "0.tmp")]
        for path in (abandoned, *others):
            path.write_bytes(OLD)
        replace_file(old, NEW)
        assert running.exists()
        assert not abandoned.exists()
        assert all(path.exists() for path in others)
    assert not running.exists()


def test_a_folder_that_cannot_be_synced_is_no_error(old, monkeypatch):
    def fail(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(files, "_sync_folder", fail)
    replace_file(old, NEW)
    assert old.read_bytes() == NEW


def test_every_writer_of_rein_keeps_the_old_file(tmp_path, monkeypatch):
    segmenter = rein.Segmenter(adapter(1.0), rein.heads.LinearHead(32, 3))
    paths = {name: tmp_path / name for name in ("adapter", "segmenter")}
    rein.save(segmenter.backbone, paths["adapter"])
    segmenter.save(paths["segmenter"])
    before = {name: path.read_bytes() for name, path in paths.items()}
    with torch.no_grad():
        segmenter.backbone.rein.scale.fill_(2.0)
    for save, path in ((lambda p: rein.save(segmenter.backbone, p), paths["adapter"]), (segmenter.save, paths["segmenter"])):
        with file_size_limit(10_000), pytest.raises(rein.CheckpointError, match="cannot write .*File too large"):
            save(path)
    assert {name: path.read_bytes() for name, path in paths.items()} == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(paths)
