"""Domain-generalized semantic segmentation: train on one domain, evaluate on domains that training never shows (extra `train`).

recipe -> `training.experiment.Experiment` + `data.datamodule.DomainData` -> Trainer -> run folder -> `evaluation.results`. `commands`
runs this from the command line; `demo` is a loop over recipes.
"""
