"""Pages: one HTML file each, without a network; names are escaped. Sorting and sliders are tried in a browser if there is one."""

import base64
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from rein.dgss import pages
from rein.dgss.labels import LabelSpace

SPACE = LabelSpace(("road", "sky", "car"), ((128, 64, 128), (70, 130, 180), (0, 0, 142)))
EVIL = "<script>alert(1)</script>\"'&amp;\ud800"
NAN = float("nan")


class Parsed(HTMLParser):
    """The elements of a page: (tag, attributes), and the texts by the tag that was opened last."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.texts, self._last = [], {}, ""
        self.feed(page.decode("utf-8"))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._last = tag

    def handle_data(self, data):
        self.texts.setdefault(self._last, []).append(data)

    def with_class(self, name):
        return [attributes for _, attributes in self.elements if name in (attributes.get("class") or "").split()]


def image(width=60, height=40):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3)).astype(np.uint8))


def classes(value=0, width=60, height=40):
    return np.full((height, width), value, np.uint8)


def prediction_page(name="photo", **options):
    shares = {"road": 0.75, "sky": 0.2499, "car": 0.0001}
    picture = pages.Picture(name, image(), [pages.Layer("overlay", classes())], shares)
    return pages.predictions("Predictions", {"backbone": "pocket_vit"}, [picture], SPACE, **options)


def result_page(name="rein", domain="night"):
    label = classes(0)
    layers = [pages.Layer("truth", label)]
    for method, value in (("frozen", 1), (name, 2)):
        layers += [pages.Layer(method, classes(value)), pages.errors(f"errors of {method}", label, classes(value))]
    table = pages.Table(
        "IoU", ["class", domain, "fog"], {"road": [5.0, 30.0], "sky": [NAN, 20.0], "car": [10.0, 20.0]}, [7.5, 23.3]
    )
    examples = {domain: [pages.Picture("pair 1", image(), layers), pages.Picture("pair 2", image(), layers)]}
    return pages.evaluation("Comparison", {"protocol": "rein"}, [table], {domain: table}, examples, SPACE, ["a note"])


@pytest.mark.parametrize("page", [prediction_page(), result_page()], ids=["predictions", "results"])
def test_a_page_refers_to_nothing_outside_and_forbids_it(page):
    parsed = Parsed(page)
    targets = [
        value for _, attributes in parsed.elements for key, value in attributes.items() if key in ("src", "href", "srcset")
    ]
    assert targets
    assert all(target.startswith("data:image/") for target in targets)
    assert not re.findall(rb"url\(|@import|https?://", page)
    policy = next(attributes["content"] for tag, attributes in parsed.elements if attributes.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:;")


@pytest.mark.parametrize(
    "page",
    [prediction_page(EVIL, problems=[EVIL]), result_page(EVIL, EVIL), pages.predictions(EVIL, {EVIL: EVIL}, [], SPACE)],
    ids=["predictions", "results", "title"],
)
def test_names_cannot_add_elements_or_attributes_to_a_page(page):
    parsed = Parsed(page)
    assert sum(tag == "script" for tag, _ in parsed.elements) == 1
    assert b"<script>alert" not in page
    assert any("<script>alert(1)</script>\"'&amp;?" in text for texts in parsed.texts.values() for text in texts)
    assert all(not key.startswith("on") for _, attributes in parsed.elements for key in attributes)


def test_every_picture_has_a_text_and_its_size():
    for page in (prediction_page(), result_page()):
        pictures = [attributes for tag, attributes in Parsed(page).elements if tag == "img"]
        assert pictures
        assert all(attributes["alt"] and attributes["width"] == "60" and attributes["height"] == "40" for attributes in pictures)


def test_a_large_photograph_is_stored_at_the_size_of_the_page():
    picture = pages.Picture("large", image(2000, 1000), [pages.Layer("overlay", classes(1, 2000, 1000))])
    page = pages.predictions("Predictions", {}, [picture], SPACE)
    stored = [decode(attributes["src"]) for tag, attributes in Parsed(page).elements if tag == "img"]
    assert [each.size for each in stored] == [(640, 320)] * 2
    assert len(page) < 400_000


def decode(source):
    return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))


def test_a_layer_has_the_colours_of_the_classes_and_is_transparent_where_it_is_ignored():
    mask = classes(2)
    mask[:10] = 255
    picture = pages.Picture("pair", image(), [pages.Layer("truth", mask), pages.errors("errors", mask, classes(1))])
    page = pages.evaluation("Test", {}, [], {}, {"day": [picture]}, SPACE)
    truth, wrong = (np.array(decode(each["src"]).convert("RGBA")) for each in Parsed(page).with_class("mask"))
    assert (truth[10:] == (0, 0, 142, 255)).all()
    assert (truth[:10, :, 3] == 0).all()
    assert (wrong[10:] == (220, 30, 30, 255)).all()
    assert (wrong[:10, :, 3] == 0).all(), "ignored pixels are not wrong"


def test_the_legend_of_a_prediction_names_classes_with_their_shares():
    texts = [text.strip() for text in Parsed(prediction_page()).texts["span"]]
    assert texts[:6] == ["road", "75.0 %", "sky", "25.0 %", "car", "below 0.1 %"]


def test_a_table_marks_missing_figures_and_keeps_the_mean_in_its_footer():
    parsed = Parsed(result_page())
    cells = [attributes.get("data-value") for tag, attributes in parsed.elements if tag == "td"]
    assert cells[:8] == ["5", "30", None, "20", "10", "20", "7.5", "23.3"]
    assert [tag for tag, _ in parsed.elements if tag in ("tbody", "tfoot")][:2] == ["tbody", "tfoot"]
    assert "–" in parsed.texts["td"]


def test_the_largest_figure_is_bold_only_where_figures_differ():
    rows = {"road": [0.0, 0.0], "sky": [20.0, 19.0], "car": [7.01, 7.02]}
    page = pages.evaluation("Test", {}, [pages.Table("IoU", ["class", "a", "b"], rows, best=True)], {}, {}, SPACE)
    assert [each["data-value"] for each in Parsed(page).with_class("best")] == ["20"]


def test_problems_and_what_is_left_out_are_stated():
    page = prediction_page(left_out=7, problems=["a.png cannot be read"])
    assert "7 more predictions have no picture here" in page.decode()
    assert "1 without a prediction" in page.decode()
    assert "a.png cannot be read" in Parsed(page).texts["li"]


def test_the_truth_can_be_compared_with_the_only_prediction():
    label = classes()
    layers = [pages.Layer("truth", label), pages.Layer("prediction", classes(1)), pages.errors("errors", label, classes(1))]
    page = pages.evaluation("Test", {}, [], {}, {"day": [pages.Picture("pair", image(), layers)]}, SPACE)
    assert [attributes["value"] for _, attributes in Parsed(page).elements if "selected" in attributes] == ["0", "1"]


# -- in a browser


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def in_browser(page, program, tmp_path):
    """Append a program to the page; returns the texts that it reports, one per line."""
    program = (
        f"const report = []; {program}; document.body.innerHTML = ''; document.body.textContent = `<<${{report.join('|')}}>>`;"
    )
    path = tmp_path / "page.html"
    path.write_bytes(page.replace(b"</body>", f"<script>{program}</script></body>".encode()))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    command = [BROWSER, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    return re.search(r"&lt;&lt;(.*)&gt;&gt;", printed)[1].split("|")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_a_click_on_a_heading_sorts_and_a_second_click_reverses(tmp_path):
    program = """
    const table = document.querySelector("table");
    const order = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent).join(" ");
    const click = (column) => {
      const heading = table.tHead.rows[0].cells[column];
      heading.querySelector("button").click();
      report.push(`${order()} ${heading.getAttribute("aria-sort")}`);
    };
    report.push(order()); click(1); click(1); click(0); click(2);
    report.push(table.tHead.rows[0].cells[0].getAttribute("aria-sort"), table.tFoot.rows.length)
    """
    assert in_browser(result_page(), program, tmp_path) == [
        "road sky car",
        "car road sky descending",  # the class without a figure stays last
        "road car sky ascending",
        "car road sky ascending",
        "road car sky descending",  # equal figures keep their order
        "none",
        "1",
    ]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_the_slider_moves_the_boundary_between_the_two_chosen_layers(tmp_path):
    program = """
    const comparer = document.querySelector(".comparer");
    const slider = comparer.querySelector("input");
    const [left, right] = ["left", "right"].map((side) => comparer.querySelector(`.${side}`));
    const clips = () => [left, right].map((each) => getComputedStyle(each).clipPath).join(" ");
    report.push(document.querySelectorAll(".comparer").length, clips());
    slider.value = 20; slider.dispatchEvent(new Event("input"));
    report.push(clips(), slider.getAttribute("aria-label"));
    const select = document.querySelector(".controls select");
    select.value = "0"; select.dispatchEvent(new Event("change"));
    const truth = document.querySelector('.mask[data-layer="0"]');
    report.push(left.src === truth.src, left.alt, comparer.querySelector(".from").textContent);
    const opacity = document.querySelector(".controls input");
    opacity.value = 30; opacity.dispatchEvent(new Event("input"));
    report.push(getComputedStyle(truth).opacity, document.querySelector(".controls").hidden)
    """
    count, before, after, label, same, alt, name, opacity, hidden = in_browser(result_page(), program, tmp_path)
    assert count == "2"
    assert before != after
    assert "80%" in after.split(") ")[0], "the left layer ends at 20 per cent"
    assert "20%" in after.split(") ")[1], "the right layer begins there"
    assert label == "boundary between frozen (left) and rein (right)"
    assert (same, alt, name, opacity, hidden) == ("true", "truth of pair 1", "truth", "0.3", "false")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_the_browser_lays_the_mask_over_a_copy_of_the_photograph(tmp_path):
    program = """
    const [photo, copy] = document.querySelectorAll(".photo");
    report.push(photo.src === copy.src, copy.parentElement.className, photo.naturalWidth, photo.complete)
    """
    assert in_browser(prediction_page(), program, tmp_path) == ["true", "stack", "60", "true"]
