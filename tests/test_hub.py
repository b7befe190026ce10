"""Sharing on the Hugging Face hub: round trips through a small hub on the loopback, model cards, and failures."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import yaml
from huggingface_hub import constants

import rein
from models import amplify_adapter
from rein import remote
from rein.cli import main
from rein.hub import model_card
from rein.testing import pocket_vit

pytestmark = pytest.mark.skipif(
    int(huggingface_hub.__version__.split(".")[0]) < 1, reason="the hub of these tests speaks with clients of version 1 and newer"
)
SMALL = rein.ReinConfig(num_tokens=6, rank=2, query_dim=8)


class Hub(ThreadingHTTPServer):
    """What rein uses of the hub's interface: create, branch, commit and resolve. `status` refuses every request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = {}  # name -> revision (branch or commit) -> file -> content
        self.messages, self.status = [], None

    def commit(self, name, revision, files):
        branches = self.repositories[name]
        files = {**branches[revision], **files}
        oid = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        branches[revision] = branches[oid] = files
        branches.setdefault("heads", {})[revision] = oid
        return oid


class Handler(BaseHTTPRequestHandler):
    """Answers the client of huggingface_hub."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, status, content=b"", **headers):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status, code=""):
        self.answer(status, b"{}", X_Error_Code=code, X_Error_Message=code)

    def do_POST(self):
        hub, body = self.server, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if hub.status:
            return self.refuse(hub.status)
        path = unquote(self.path.partition("?")[0])
        if path == "/api/repos/create":
            entry = json.loads(body)
            name = f"{entry['organization']}/{entry['name']}" if entry.get("organization") else entry["name"]
            hub.repositories.setdefault(name, {"main": {}})
            return self.answer(200, json.dumps({"url": f"https://huggingface.co/{name}"}).encode())
        if path == "/api/validate-yaml":
            return self.answer(200, b'{"warnings": [], "errors": []}')
        kind, name, branch = re.fullmatch(r"/api/models/(?=.*?/(preupload|commit|branch)/)([^/]+/[^/]+)/\w+/(.+)", path).groups()
        if kind == "branch":
            hub.repositories[name].setdefault(branch, dict(hub.repositories[name]["main"]))
            return self.answer(200, b"{}")
        if kind == "preupload":
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            return self.answer(200, json.dumps({"files": files}).encode())
        lines = [json.loads(line) for line in body.splitlines()]
        files = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"}
        hub.messages.append(lines[0]["value"]["summary"])
        oid = hub.commit(name, branch, files)
        url = f"https://huggingface.co/{name}/commit/{oid}"
        return self.answer(200, json.dumps({"commitUrl": url, "commitOid": oid, "success": True}).encode())

    def do_GET(self):
        hub = self.server
        if hub.status:
            return self.refuse(hub.status)
        name, revision, file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/(.+)/([^/]+)", unquote(self.path)).groups()
        branches = hub.repositories.get(name)
        if branches is None:
            return self.refuse(404, "RepoNotFound")
        if revision not in branches or revision == "heads":
            return self.refuse(404, "RevisionNotFound")
        if file not in branches[revision]:
            return self.refuse(404, "EntryNotFound")
        content = branches[revision][file]
        oid = branches["heads"].get(revision, revision)
        return self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=oid)

    do_HEAD = do_GET  # noqa: N815 - the name that http.server asks for


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(remote, "getproxies", dict)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 20)
    yield server
    server.shutdown()
    server.server_close()


def wrapped():
    torch.manual_seed(0)
    return amplify_adapter(rein.wrap(pocket_vit(), SMALL))


def segmenter():
    model = rein.Segmenter(wrapped(), rein.heads.LinearHead(144, 3), classes=["road", "sky", "car|van"]).eval()
    model.notes = {
        "sources": ["day"],
        "scores": {"source validation": {"mIoU": 0.6123}},
        "command": "rein fit --config mine.yaml",
    }
    return model


def photo():
    return np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)


def test_a_segmenter_comes_back_from_the_hub(hub):
    model = segmenter()
    address = rein.push_to_hub(model, "me/streets")
    assert re.fullmatch(r"hf://me/streets@[0-9a-f]{40}", address)
    for name in (address, "hf://me/streets", "hf://me/streets@main"):
        again = rein.Segmenter.load(name)
        assert torch.equal(again.segment(photo()).classes, model.segment(photo()).classes)
        assert again.notes == model.notes


def test_an_adapter_comes_back_from_the_hub(hub):
    model, images = wrapped(), torch.rand(1, 3, 32, 32)
    address = rein.push_to_hub(model, "me/night", private=True, message="first")
    assert torch.equal(rein.load(pocket_vit(), address)(images), model(images))
    assert hub.messages == ["first"]


def test_one_of_several_adapters_is_uploaded_by_its_name(hub):
    model, images = pocket_vit(), torch.rand(1, 3, 32, 32)
    for name in ("day", "night"):
        rein.wrap(model, SMALL, name=name)
    amplify_adapter(model)
    address = rein.push_to_hub(model, "me/night", name="night")
    with model.rein.active("night"):
        assert torch.equal(rein.load(pocket_vit(), address)(images), model(images))
    with pytest.raises(rein.InputError, match="a segmenter is uploaded with its active adapter"):
        rein.push_to_hub(rein.Segmenter(model, rein.heads.LinearHead(144, 2)), "me/night", name="night")


def test_a_revision_stays_what_it_was(hub):
    first = segmenter()
    old = rein.push_to_hub(first, "me/streets", revision="v1")
    second = segmenter()
    with torch.no_grad():
        second.head.classifier.bias.add_(torch.tensor([9.0, 0.0, -9.0])) if hasattr(second.head, "classifier") else [
            p.mul_(-1) for p in second.head.parameters()
        ]
    rein.push_to_hub(second, "me/streets")
    for address, model in ((old, first), ("hf://me/streets@v1", first), ("hf://me/streets", second)):
        assert torch.equal(rein.Segmenter.load(address).segment(photo()).classes, model.segment(photo()).classes)
    assert not torch.equal(first.segment(photo()).classes, second.segment(photo()).classes)


def test_info_describes_a_file_on_the_hub(hub, capsys):
    rein.push_to_hub(segmenter(), "me/streets")
    assert main(["info", "hf://me/streets"]) == 0
    assert "3: road, sky, car|van" in capsys.readouterr().out


def test_a_file_in_the_cache_is_used_without_a_network(hub, monkeypatch):
    rein.push_to_hub(segmenter(), "me/streets")
    rein.Segmenter.load("hf://me/streets")
    hub.shutdown()
    hub.server_close()
    assert rein.Segmenter.load("hf://me/streets").classes == ["road", "sky", "car|van"]
    with pytest.raises(
        rein.CheckpointError, match=r"hf://me/other: the hub cannot be reached, and the file is not in its cache\."
    ):
        rein.Segmenter.load("hf://me/other")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://me/none", r"cannot load hf://me/none: me/none does not exist, or you have no access.*hf auth login"),
        ("hf://me/streets@v9", r"it has no revision 'v9'; expected a branch, a tag or a commit"),
        ("hf://me/empty", r"it has no file model\.safetensors, which rein\.push_to_hub writes"),
        ("hf://streets", r"hf://streets is not an address on the hub; expected hf://OWNER/NAME"),
        ("hf://me/streets@", "is not an address"),
        ("hf://me/streets/file.safetensors", "is not an address"),
        ("hf://me/../../etc", "is not an address"),
    ],
)
def test_an_address_that_leads_nowhere_is_an_error(hub, address, message):
    hub.repositories |= {"me/streets": {"main": {}, "heads": {}}, "me/empty": {"main": {}, "heads": {}}}
    with pytest.raises(rein.CheckpointError, match=message):
        rein.Segmenter.load(address)


def test_a_file_of_another_kind_on_the_hub_is_an_error(hub):
    rein.push_to_hub(wrapped(), "me/night")
    with pytest.raises(rein.CheckpointError, match=r"hf://me/night is an adapter file, expected a segmenter file"):
        rein.Segmenter.load("hf://me/night")


@pytest.mark.parametrize("status", [401, 403])
def test_an_upload_without_permission_is_an_error(hub, status):
    hub.status = status
    with pytest.raises(rein.CheckpointError, match=r"cannot write to hf://me/streets: .*hf auth login"):
        rein.push_to_hub(wrapped(), "me/streets")


def test_an_upload_that_the_hub_refuses_is_an_error(hub):
    hub.status = 400
    with pytest.raises(rein.CheckpointError, match=r"cannot write to hf://me/streets: "):
        rein.push_to_hub(wrapped(), "me/streets")


@pytest.mark.parametrize("name", ["streets", "me/a/b", "", None, "me/", "hf://me/streets", "../x"])
def test_a_repository_name_is_checked_before_anything_is_sent(hub, name):
    with pytest.raises(rein.InputError, match="expected 'owner/name'"):
        rein.push_to_hub(wrapped(), name)
    assert not hub.repositories


def test_a_bare_model_is_refused(hub):
    with pytest.raises(rein.WrapError):
        rein.push_to_hub(pocket_vit(), "me/streets")


def test_the_hub_needs_its_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for use in (lambda: rein.push_to_hub(wrapped(), "me/a"), lambda: rein.Segmenter.load("hf://me/a")):
        with pytest.raises(rein.MissingExtraError, match=r"pip install 'rein-adapter\[hub\]'"):
            use()


# -- the model card


def card_of(hub, name):
    text = hub.repositories[name]["main"]["README.md"].decode()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_of_a_segmenter_states_the_facts_of_the_file(hub):
    rein.push_to_hub(segmenter(), "me/streets", license="cc-by-4.0")
    front, body = card_of(hub, "me/streets")
    assert front["library_name"] == "rein"
    assert front["license"] == "cc-by-4.0"
    assert front["pipeline_tag"] == "image-segmentation"
    for part in ("pocket_vit.v2", r"3: road, sky, car\|van", "mIoU 0.6123", "rein fit --config mine.yaml", "licence apache-2.0"):
        assert part in body
    assert 'rein.Segmenter.load("hf://me/streets")' in body


def test_the_card_of_an_adapter_names_timms_weights_and_their_licence(hub):
    backbone = timm.create_model("vit_tiny_patch16_224.augreg_in21k", num_classes=0)
    rein.push_to_hub(rein.wrap(backbone, SMALL), "me/night")
    front, body = card_of(hub, "me/night")
    assert front["base_model"] == "timm/vit_tiny_patch16_224.augreg_in21k"
    assert front["license"] == "apache-2.0"
    assert "pipeline_tag" not in front
    assert 'model = timm.create_model("vit_tiny_patch16_224.augreg_in21k", pretrained=True, num_classes=0, ' in body
    assert 'rein.load(model, "hf://me/night")' in body


def test_a_licence_that_the_hub_does_not_know_is_named(hub):
    rein.push_to_hub(segmenter(), "me/streets", license="dinov3-license")
    front, _ = card_of(hub, "me/streets")
    assert (front["license"], front["license_name"]) == ("other", "dinov3-license")


def test_the_text_of_a_card_cannot_change_its_layout(tmp_path):
    model = segmenter()
    model.notes = {"x | y": "<script>alert(1)</script> | [a](b)"}
    model.save(tmp_path / "s.safetensors")
    text = model_card(rein.checkpoint.read(tmp_path / "s.safetensors")[1], "me/streets")
    assert "<script>" not in text
    row = next(line for line in text.splitlines() if "alert" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 3


def test_an_upload_in_offline_mode_says_so(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(rein.CheckpointError, match="HF_HUB_OFFLINE is set"):
        rein.push_to_hub(wrapped(), "me/streets")
