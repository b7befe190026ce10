"""Pictures that compare predictions with the ground truth."""

import numpy as np
from PIL import Image

from rein.dgss import panels
from rein.dgss.labels import CITYSCAPES


def example(miou=0.5):
    label = np.full((16, 32), 255, np.uint8)
    label[:, :16] = 0
    image = np.zeros((16, 32, 3), np.uint8)
    return panels.Example("day", image, label, {"m": np.ones((16, 32), int)}, {"m": miou})


def count(picture, colour):
    return int((np.array(picture) == colour).all(-1).sum())


def test_predictions_are_shown_only_where_the_truth_is_known():
    picture = panels.comparison([example()], CITYSCAPES, "title", cell_width=200)
    truth, wrong = (count(picture, CITYSCAPES.palette[k]) for k in (0, 1))
    assert wrong == 100 * 100  # the labelled half of the prediction's cell
    assert truth == 100 * 100 + 15 * 15  # the labelled half of the truth's cell, and the legend's square


def test_errors_are_red_below_the_prediction():
    plain, marked = (panels.comparison([example()], CITYSCAPES, "title", cell_width=200, errors=e) for e in (False, True))
    assert count(plain, (220, 30, 30)) == 0
    assert 0.9 * 100 * 100 < count(marked, (220, 30, 30)) <= 100 * 100  # bilinear at the border
    assert marked.height == plain.height + 100 + panels.GAP


def test_a_miou_that_is_not_a_number_has_no_badge():
    with_badge, without = (panels.comparison([example(miou)], CITYSCAPES, "title") for miou in (0.5, float("nan")))
    assert count(with_badge, panels.FAINT) > 0
    assert count(without, panels.FAINT) == 0


def test_long_names_stand_below_their_rows():
    cell = panels.Cell(np.zeros((10, 20, 3), np.uint8), Image.Resampling.NEAREST)
    rows = [panels.GridRow("a/very/long/name/of/an/image" * 3, [[cell, cell]])]
    picture = panels.grid("title", ["one", "two"], rows, [("road", (1, 2, 3))], 100, names_below=True)
    assert picture.width == 2 * panels.MARGIN + 2 * 100 + panels.GAP
    assert count(picture, (1, 2, 3)) == 15 * 15
