"""Adapter, segmenter and PyTorch files from anyone: the original's result, or an error in one line that changes nothing."""

import hashlib
import io
import json
import os
import pickle
import random
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save

import rein
from fuzzing import NUMBERS, changed_bytes, changed_values, counts, survive
from models import amplify_adapter, build
from official_reference import random_head
from rein import checkpoint, official, pytorch_files
from rein.official.names import ADAPTER_NAMES

CONFIG = rein.ReinConfig(num_tokens=6, rank=2, query_dim=64)
HEADS = {
    "linear": lambda: rein.heads.LinearHead(32, 3),
    "fpn": lambda: rein.heads.FPNHead([32] * 4, 3, channels=8, tower_channels=8),
    "mask2former": lambda: rein.heads.Mask2FormerHead(
        [32] * 4, 3, channels=64, encoder_layers=1, decoder_layers=1, encoder_feedforward=16, decoder_feedforward=16
    ),
}


def wrapped(seed=0):
    return amplify_adapter(rein.wrap(build("vit", seed), CONFIG))


def segmenter(head):
    torch.manual_seed(0)
    return rein.Segmenter(wrapped(), HEADS[head]())


def state_of(model):
    """A digest of everything that loading could change."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    trains = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    hooks = [(name, len(module._forward_hooks)) for name, module in model.named_modules()]
    keys = [(name, *sorted(vars(module))) for name, module in model.named_modules()]
    return digest.hexdigest(), trains, hooks, keys


class Reader:
    """Reads changed files with `load`; keeps the model as it was before each."""

    def __init__(self, folder, suffix, make, load, exact=True):
        self.path, self.load, self.make, self.exact = folder / f"file{suffix}", load, make, exact
        self.original = self.model = self.state = None

    def __call__(self, content):
        if self.model is None:
            self.model = self.make()
            self.state = state_of(self.model)
        self.path.write_bytes(content)
        try:
            found = self.load(self.path, self.model)
        except rein.ReinError:
            assert state_of(self.model) == self.state, "the model was changed"
            raise
        finally:
            assert [entry.name for entry in self.path.parent.iterdir()] == [self.path.name]
        self.model = None  # changed by a file that was read
        if self.original is None:
            self.original = state_of(found)
        assert not self.exact or state_of(found) == self.original, "another result than the original's"


def with_digest(path, metadata=None, tensors=None):
    """The content of a file with changed metadata or tensors and a digest that fits, as anyone can write."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() if metadata is None else metadata
    metadata = {key: value for key, value in metadata.items() if key != "sha256"}
    tensors = load_file(path) if tensors is None else tensors
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}  # safetensors refuses shared memory
    return save(tensors, metadata | {"sha256": checkpoint._digest(tensors, metadata)})


def changed_headers(path, count, seed=0):
    """Files whose header was changed and whose digest fits."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    parsed = {key: json.loads(value) for key, value in metadata.items() if key not in ("format", "sha256")}
    for header in changed_values(parsed, count, seed):
        if isinstance(header, dict):
            yield with_digest(path, {key: json.dumps(value) for key, value in header.items()}, tensors)
        else:
            yield with_digest(path, {"rein_format": json.dumps(header)}, tensors)


def changed_tensors(path, count, seed=0):
    """Files whose tensors were changed and whose digest fits."""
    generator, original = random.Random(seed), load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for _ in range(count):
        tensors = dict(original)
        name = generator.choice(sorted(tensors))
        tensor = tensors[name]
        tensors |= generator.choice(
            (
                {name: tensor.flatten()},
                {name: tensor[None]},
                {name: tensor.new_zeros(0, 2 ** generator.randrange(60))},
                {name: tensor.to(generator.choice([torch.int64, torch.bool, torch.bfloat16, torch.float8_e4m3fn, torch.uint8]))},
                {generator.choice(["x", "", "a\nb", "head.x", "rein.x", "stages.9.tokens_a", f"{name}.x"]): tensor},
                {name: torch.zeros(generator.randrange(1, 3000), generator.randrange(1, 50))},
                {generator.choice(sorted(tensors)): tensor},
            )
        )
        if generator.random() < 0.3:
            del tensors[generator.choice(sorted(tensors))]
        yield with_digest(path, metadata, tensors)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    rein.save(wrapped(), folder / "adapter")
    for head in HEADS:
        segmenter(head).save(folder / head)
    return folder


# -- adapter files


@pytest.mark.parametrize(("start", "share"), [("wrapped", 1), ("bare", 0.05)])
@counts(60, 6000)
def test_adapter_files_with_changed_bytes(files, tmp_path, start, share, count):
    make = wrapped if start == "wrapped" else lambda: build("vit")
    content = (files / "adapter").read_bytes()
    reader = Reader(tmp_path, ".safetensors", make, lambda path, model: rein.load(model, path))
    inputs = [content, *changed_bytes(content, max(10, int(share * count)))]
    outcomes = survive(reader, inputs)
    assert outcomes["CheckpointError"] > 0.9 * len(inputs)


@pytest.mark.parametrize(("start", "share"), [("wrapped", 1), ("bare", 0.1)])
@counts(60, 3000)
def test_adapter_files_with_a_changed_header_and_a_digest_that_fits(files, tmp_path, start, share, count):
    make = wrapped if start == "wrapped" else lambda: build("vit")
    reader = Reader(tmp_path, ".safetensors", make, lambda path, model: rein.load(model, path), exact=False)
    survive(reader, changed_headers(files / "adapter", max(10, int(share * count))))


@counts(40, 1000)
def test_adapter_files_with_changed_tensors_and_a_digest_that_fits(files, tmp_path, count):
    reader = Reader(tmp_path, ".safetensors", wrapped, lambda path, model: rein.load(model, path), exact=False)
    survive(reader, changed_tensors(files / "adapter", count))


sizes = st.one_of(st.integers(-2, 300), st.sampled_from(NUMBERS))
json_values = st.recursive(
    st.none() | st.booleans() | sizes | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    config=st.fixed_dictionaries(
        {"num_tokens": sizes, "rank": sizes | st.none(), "query_dim": sizes | st.none()},
        optional={"use_softmax": st.booleans(), "share": st.booleans(), "zero_init": st.booleans(), "scale_init": st.floats()},
    ),
    backbone=st.fixed_dictionaries(
        {"architecture": st.just("VisionTransformer") | st.text()},
        optional={
            "blocks": st.just([f"blocks.{i}" for i in range(4)]) | st.lists(st.text()) | json_values,
            "widths": st.just([32] * 4) | st.lists(sizes),
            "num_prefix_tokens": st.just([1] * 4) | st.lists(sizes),
            "given": json_values,
        },
    ),
    strict=st.booleans(),
)
def test_any_header_with_a_digest_that_fits_is_read_or_refused(files, tmp_path, config, backbone, strict):
    with safe_open(files / "adapter", "pt") as file:
        metadata = file.metadata()
    content = with_digest(files / "adapter", metadata | {"config": json.dumps(config), "backbone": json.dumps(backbone)})
    reader = Reader(tmp_path, ".safetensors", wrapped, lambda path, model: rein.load(model, path, strict=strict), exact=False)
    survive(reader, [content])


# -- segmenter files


def load_segmenter(path, model):
    return rein.Segmenter.load(path, model)


@pytest.mark.parametrize("head", HEADS)
@counts(20, 500)
def test_segmenter_files_with_changed_bytes(files, tmp_path, head, count):
    content = (files / head).read_bytes()
    inputs = [content, *changed_bytes(content, count)]
    outcomes = survive(Reader(tmp_path, ".safetensors", wrapped, load_segmenter), inputs)
    assert outcomes["CheckpointError"] > 0.7 * count


@pytest.mark.parametrize("head", HEADS)
@counts(40, 1000)
def test_segmenter_files_with_a_changed_header_and_a_digest_that_fits(files, tmp_path, head, count):
    survive(Reader(tmp_path, ".safetensors", wrapped, load_segmenter, exact=False), changed_headers(files / head, count))


@pytest.mark.parametrize("head", HEADS)
@counts(20, 300)
def test_segmenter_files_with_changed_tensors_and_a_digest_that_fits(files, tmp_path, head, count):
    survive(Reader(tmp_path, ".safetensors", wrapped, load_segmenter, exact=False), changed_tensors(files / head, count))


@counts(60, 1000)
def test_describing_a_changed_file_prints_no_control_characters(files, tmp_path, count):
    path = tmp_path / "file"

    def describe(content):
        path.write_bytes(content)
        assert all(line.isprintable() for line in checkpoint.describe_file(path).split("\n"))

    survive(describe, [*changed_headers(files / "linear", count), *changed_bytes((files / "linear").read_bytes(), count)])


@counts(40, 600)
def test_converting_a_changed_file_to_the_official_layout(files, tmp_path, count):
    path, out = tmp_path / "file", tmp_path / "out"

    def convert(content):
        path.write_bytes(content)
        try:
            official.to_official(path, out)
        except rein.ReinError:
            assert not out.exists()
            raise
        out.unlink()

    survive(convert, [*changed_headers(files / "mask2former", count), *changed_tensors(files / "mask2former", count)])


# -- the authors' checkpoints


def official_state():
    names = {ours: official_name for official_name, ours in ADAPTER_NAMES.items()}
    torch.manual_seed(0)
    model = wrapped()
    head = random_head([32] * 4, channels=64, num_classes=3, encoder_layers=1, decoder_layers=1, hidden=16, heads=4)
    state = {f"backbone.reins.{names[key]}": value.clone() for key, value in model.rein.state_dict().items()}
    state |= {f"decode_head.{key}": value for key, value in head.items()}
    return state | {f"backbone.{key}": value for key, value in build("vit", 3).state_dict().items()}


def saved(content, **settings):
    buffer = io.BytesIO()
    torch.save(content, buffer, **settings)
    return buffer.getvalue()


def rezipped(content, change):
    """A PyTorch file whose pickle was changed, with checksums that fit."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(buffer, "w") as target:
        for entry in source.infolist():
            data = source.read(entry)
            target.writestr(entry.filename, change(data) if entry.filename.endswith("data.pkl") else data)
    return buffer.getvalue()


def load_official(path, model):
    return official.load(path, model)


def official_reader(folder, exact=True):
    return Reader(folder, ".pth", lambda: build("vit"), load_official, exact)


@counts(40, 1000)
def test_official_checkpoints_with_changed_bytes(tmp_path, count):
    content = saved({"state_dict": official_state(), "meta": {"epoch": 1}})
    outcomes = survive(official_reader(tmp_path), [content, *changed_bytes(content, count)])
    assert outcomes["CheckpointError"] > 0.7 * count


@counts(40, 1000)
def test_official_checkpoints_with_a_changed_pickle_and_checksums_that_fit(tmp_path, count):
    content = saved({"state_dict": official_state()})
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        outline = archive.read("archive/data.pkl")
    inputs = (rezipped(content, lambda _, new=new: new) for new in changed_bytes(outline, count))
    survive(official_reader(tmp_path, exact=False), inputs)


@counts(20, 300)
def test_official_checkpoints_of_old_pytorch_with_changed_bytes(tmp_path, count):
    content = saved(official_state(), _use_new_zipfile_serialization=False)
    survive(official_reader(tmp_path, exact=False), [content, *changed_bytes(content, count)])


@counts(40, 600)
def test_official_checkpoints_with_changed_tensors(tmp_path, count):
    state, generator = official_state(), random.Random(0)

    def changed():
        for _ in range(count):
            other = dict(state)
            name = generator.choice(list(state))
            tensor = state[name]
            changes = [tensor.flatten(), tensor[None], tensor.new_zeros(0), tensor.long(), tensor * torch.nan, tensor.to_sparse()]
            changes += [tensor.to("meta"), tensor[..., None].expand(*tensor.shape, 10**9), torch.zeros(3, 5)]
            other[name] = generator.choice([*changes, "text", None, [tensor], {"x": tensor}, 10**12])
            if generator.random() < 0.3:
                del other[generator.choice(list(other))]
            yield saved({"state_dict": other})

    survive(official_reader(tmp_path), changed())


class Calls:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_nothing_that_a_file_names_is_called(tmp_path):
    made, path = tmp_path / "made", tmp_path / "file.pth"
    for call in (Calls(os.mkdir, str(made)), Calls(exec, f"import os; os.mkdir({str(made)!r})"), Calls(bytearray, 3 * 10**9)):
        for settings_ in ({}, {"_use_new_zipfile_serialization": False}):
            path.write_bytes(saved({"state_dict": {"a": torch.zeros(2)}, "other": call}, **settings_))
            with pytest.raises(rein.CheckpointError, match=r"it names \w+\.\w+, which is neither a tensor nor a plain value"):
                survive_one(pytorch_files.load, path)
            assert not made.exists()
    path.write_bytes(pickle.dumps(Calls(os.mkdir, str(made))))
    with pytest.raises(rein.CheckpointError, match="cannot be read as a PyTorch file"):
        pytorch_files.load(path)
    assert not made.exists()


def survive_one(read, path):
    errors = []

    def keep(value):
        try:
            read(value)
        except rein.ReinError as error:
            errors.append(error)
            raise

    survive(keep, [path], size_of=os.path.getsize)
    if errors:
        raise errors[0]


def test_a_small_file_that_asks_for_much_memory_is_refused(tmp_path):
    path = tmp_path / "file.pth"
    plain = saved({"a": torch.arange(4.0)})
    with zipfile.ZipFile(io.BytesIO(plain)) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, bytes(10**9) if name.endswith("data/0") else data)
    with pytest.raises(rein.CheckpointError, match="its parts are compressed or overlap"):
        survive_one(pytorch_files.load, path)
    # the pickle declares 127 numbers where the file has 4, or a tensor beyond them
    for old, new in ((b"K\x04tq", b"K\x7ftq"), (b"K\x04\x85q", b"K\x7f\x85q"), (b"K\x04\x85q", b"J\xff\xff\xff\x7f\x85q")):
        path.write_bytes(rezipped(plain, lambda data, old=old, new=new: data.replace(old, new)))
        with pytest.raises(rein.CheckpointError, match=r"has not the declared size|is larger than its storage"):
            survive_one(pytorch_files.load, path)
    path.write_bytes(saved({"a": torch.zeros(1).expand(10**12)}))
    with pytest.raises(rein.CheckpointError, match="its tensors take 4,000,000,000,000 bytes"):
        survive_one(pytorch_files.load, path)
    old = saved({"a": torch.arange(4.0)}, _use_new_zipfile_serialization=False)
    path.write_bytes(old.replace(b"K\x04Ntq", b"J\xff\xff\xff\x7fNtq"))
    with pytest.raises(rein.CheckpointError, match="its tensors are larger than the file"):
        survive_one(pytorch_files.load, path)
