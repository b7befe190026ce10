"""What a release needs: the version, the citation, the workflow and the templates."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest

import rein

ROOT = Path(__file__).parent.parent
yaml = pytest.importorskip("yaml")


def read(path):
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_the_version_is_that_of_the_installed_distribution():
    assert rein.__version__ == version("rein-adapter")
    assert re.match(r"\d+\.\d+", rein.__version__)


def test_the_citation_names_the_paper():
    citation = read("CITATION.cff")
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
    paper = citation["preferred-citation"]
    assert len(paper["authors"]) == 9
    assert paper["year"] == 2024
    assert "2312.04265" in str(paper["identifiers"])


def test_a_tag_is_tested_before_it_is_published_without_a_stored_password():
    workflow = read(".github/workflows/release.yml")
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML reads the key `on` as true
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    commands = [step.get("run") for step in build["steps"]]
    assert "make test" in commands
    assert "make test-dist" in commands
    assert publish["needs"] == "build"
    assert publish["permissions"] == {"id-token": "write"}
    assert "secrets" not in (ROOT / ".github/workflows/release.yml").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.name)
def test_issue_templates_are_forms(path):
    form = read(path)
    if path.name != "config.yml":
        assert {"name", "description", "body"} <= form.keys()
        assert all(item["attributes"].get("label") for item in form["body"])


def test_the_changelog_has_a_section_for_users():
    assert re.search(r"^## \d+\.\d+\.\d+", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
