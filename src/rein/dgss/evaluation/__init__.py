"""How good is a run: confusion matrix and mIoU, results as tables and JSON, comparison of runs, callbacks that write them.

Belongs here: everything from predictions to figures and pictures. Imports `labels`, `panels` and `data`; imported by `training`
and the commands.
"""
