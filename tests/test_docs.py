"""The documentation builds without a warning, names every public object, and can be searched without a network."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import rein

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("sphinx")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", f"{out}/doctrees", "docs", f"{out}/html"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / "html"


@pytest.mark.slow
def test_the_site_names_every_public_object_needs_no_network_and_can_be_searched(site):
    text = (site / "api.html").read_text()
    public = [f"rein.{name}" for name in rein.__all__ if name not in ("__version__", "heads")]
    public += [f"rein.heads.{name}" for name in rein.heads.__all__]
    described = set(re.findall(r'id="(rein\.[\w.]+)"', text))
    missing = [name for name in public if name not in described and f"rein.errors.{name[5:]}" not in described]
    assert not missing
    assert (site / "searchindex.js").stat().st_size > 10_000
    loaded = re.compile(r'<(?:script|link|img)[^>]*(?:src|href)="(https?://[^"]*)"')
    for page in site.glob("*.html"):
        assert not loaded.findall(page.read_text()), page.name


def test_every_page_is_in_the_table_of_contents():
    index = (ROOT / "docs/index.md").read_text()
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    listed = {line for block in re.findall(r"```\{toctree\}(.*?)```", index, re.DOTALL) for line in block.split()}
    assert pages <= listed


def test_the_headings_of_troubleshooting_are_texts_of_errors():
    """Pieces of f-strings are joined, and what they insert is `...` in a heading."""
    code = " ".join(" ".join(path.read_text().split()) for path in (ROOT / "src").rglob("*.py"))
    code = re.sub(r'" f?"', "", code)
    headings = re.findall(r"^## (.*)$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    assert len(headings) > 10
    for heading in headings:
        pieces = [re.escape(piece.strip()) for piece in heading.split("...")]
        assert re.search(".{1,100}?".join(pieces), code), heading
