"""`push_to_hub`: share an adapter or a segmenter on the Hugging Face hub, with a model card that states what its file states."""

from __future__ import annotations

import html
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from rein import checkpoint, remote
from rein._version import __version__
from rein.errors import CheckpointError, InputError, one_line
from rein.extras import require
from rein.segmenter import Segmenter

# the hub's own names of licences; it takes others as "other" with a name
_LICENCES = (
    "apache-2.0 mit bsd-2-clause bsd-3-clause cc0-1.0 cc-by-4.0 cc-by-sa-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 gpl-3.0 openrail"
)


def push_to_hub(
    model: nn.Module,
    repository: str,
    *,
    name: str | None = None,
    private: bool = False,
    revision: str | None = None,
    license: str | None = None,
    message: str | None = None,
) -> str:
    """Upload a segmenter, or the adapter of a wrapped model, to a repository of the Hugging Face hub (extra `hub`).

    The repository is created if it does not exist. `model.safetensors` is the file that `save` writes, without the weights of the
    backbone. `README.md` is a model card made from the file's facts, and replaces an earlier one. Log in first: `hf auth login`.

    Args:
        model: a `Segmenter`, or a model that `rein.wrap` has wrapped.
        repository: `owner/name`.
        name: which adapter, if the model has several; None is the active one.
        private: create a private repository; an existing one stays as it is.
        revision: branch to write to, which is created if it does not exist; None means the main one.
        license: license of the uploaded file, such as `mit`; None means that of the backbone's weights, if the file states it.
        message: the message of the commit.

    Returns:
        The address of this upload for `rein.load` and `Segmenter.load`, `hf://owner/name@commit`.

    Raises:
        InputError: `repository` does not have the form `owner/name`, no adapter has this name, or the segmenter cannot be saved.
        WrapError: the model is neither a segmenter nor wrapped.
        CheckpointError: the hub refuses the upload, or cannot be reached.
        MissingExtraError: huggingface_hub is not installed.
    """
    if not remote.is_repository(repository):
        raise InputError(f"repository is {one_line(repr(repository))}; expected 'owner/name', such as 'me/streets-night'.")
    if name is not None and isinstance(model, Segmenter):
        raise InputError(
            f"name is {one_line(repr(name))}, but a segmenter is uploaded with its active adapter. Leave the name out, or pass "
            "segmenter.backbone."
        )
    hub = require("huggingface_hub", "hub")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / remote.FILE
        if isinstance(model, Segmenter):
            model.save(path)
        else:
            checkpoint.save(model, path, name=name)
        header = checkpoint.read(path)[1]
        contents = {remote.FILE: path.read_bytes(), "README.md": model_card(header, repository, license).encode()}
    try:
        api = hub.HfApi(library_name="rein", library_version=__version__)
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.create_commit(
            repository,
            [hub.CommitOperationAdd(name, content) for name, content in contents.items()],
            commit_message=message or f"Upload {header.kind} with rein {__version__}",
            revision=revision,
        )
    except Exception as error:  # each kind of failure has a class of its own, and they change between versions
        raise CheckpointError(f"cannot write to hf://{repository}: {remote.reason_of(error, repository, revision)}") from error
    return f"hf://{repository}@{commit.oid}"


def model_card(header: checkpoint.Header, repository: str, license: str | None = None) -> str:
    """The model card of a file: the hub's metadata, how to load it, and its facts.

    Args:
        header: of the file.
        repository: `owner/name`.
        license: as for `push_to_hub`.
    """
    hub = require("huggingface_hub", "hub")
    license = license or header.backbone.get("license")
    known = license in (None, *_LICENCES.split())
    classes = (header.about or {}).get("classes")
    data = hub.ModelCardData(
        library_name="rein",
        license=license if known else "other",
        license_name=None if known else license,
        base_model=_base_model(header.backbone.get("name", "")),
        pipeline_tag="image-segmentation" if classes else None,
        tags=["rein", "domain-generalization", *(["semantic-segmentation"] if classes else [])],
    )
    what, use = "An adapter", [*_backbone_code(header.backbone), f'rein.load(model, "hf://{repository}")']
    if header.kind == "segmenter":
        what = "A decode head" if header.config is None else "An adapter and a decode head"
        given = checkpoint.arguments_to_load(f'"hf://{repository}"', header)
        use = [f"segmenter = rein.Segmenter.load({given})"]
        if classes:
            use.append('segmenter.segment("photo.jpg").overlay().save("overlay.png")')
    rows = "\n".join(f"| {_cell(title)} | {_cell(text)} |" for title, text in checkpoint.describe_header(header))
    code = "\n".join(["import rein", *(["import timm"] if header.kind == "adapter" else []), "", *use])
    return f"""---
{data.to_yaml().strip()}
---

# {repository.partition("/")[2]}

{what} for a frozen vision transformer, trained with rein (`pip install 'rein-adapter[hub]'`). The weights of the backbone are not
part of it.

```python
{code}
```

| fact | value |
| --- | --- |
{rows}
"""


def _backbone_code(stated: dict[str, Any]) -> list[str]:
    """The lines of Python that build the backbone, as far as the file states it."""
    name, create = stated.get("name", stated["architecture"]), stated.get("create", {})
    if name.startswith("pocket_vit"):
        return ["model = rein.testing.pocket_vit()"]
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in sorted(create.items())}
    arguments = ", ".join(["num_classes=0", *(f"{key}={value!r}" for key, value in settings.items())])
    if "." in name:
        return [f'model = timm.create_model("{name}", pretrained=True, {arguments})']
    return [f'model = timm.create_model("{name}", {arguments})', "# load its weights, which are not timm's"]


def _base_model(name: str) -> str | None:
    """The hub's repository of timm's weights of this name; None for others."""
    import timm

    if "." not in name or not timm.is_model(name):
        return None
    config: Any = timm.get_pretrained_cfg(name, allow_unregistered=False)
    found = getattr(config, "hf_hub_id", None)
    if not found:
        return None
    return f"{found}{name}" if found.endswith("/") else str(found)


def _cell(text: str) -> str:
    """A text for a cell of a Markdown table."""
    return html.escape(text, quote=False).replace("|", "\\|").replace("`", "\\`").replace("[", "\\[").replace("*", "\\*")
