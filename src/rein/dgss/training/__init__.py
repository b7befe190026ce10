"""Fit a segmenter: the training step, the experiment that a recipe describes, its backbone, its checkpoints.

Belongs here: everything that changes weights or keeps them. Imports `data`, `evaluation` and `methods`; imported by the commands.
"""
