import torch

torch.set_num_threads(1)  # the suite runs in parallel processes; small tensors gain nothing from threads

collect_ignore = ["example_project"]  # a project of its own; test_pytest_plugin.py runs its suite
