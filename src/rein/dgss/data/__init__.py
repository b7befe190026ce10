"""Images and labels: data sets in their publishers' layouts, transforms, sampling, and the data module that serves them.

Belongs here: everything between files on disk and batches. Imports `labels`, `panels` and `scenes`; imported by `evaluation`,
`training` and the commands.
"""
