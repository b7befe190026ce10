"""`rein predict FILE PHOTOS`: the classes of photographs and videos, by a segmenter file, without a run folder.

Belongs here: `sources` lists what to predict, `folder` knows what of it is written, so that the same command resumes, `videos` reads
and writes videos (extra `video`), `page` shows the predictions, and `run` fills the folder. Imports `data`, `labels` and `pages`;
imported by `commands` and the command line.
"""

from rein.dgss.prediction.folder import PredictionFolder, Settings, digest
from rein.dgss.prediction.page import Predicted, write_page
from rein.dgss.prediction.run import Report, load, predict
from rein.dgss.prediction.sources import Source, find_sources

__all__ = [
    "Predicted",
    "PredictionFolder",
    "Report",
    "Settings",
    "Source",
    "digest",
    "find_sources",
    "load",
    "predict",
    "write_page",
]
