import torch

torch.set_num_threads(1)  # the suite runs in parallel processes; small tensors gain nothing from threads
