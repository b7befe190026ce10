"""What worker processes of `test_processes` run. A new process imports it by name, so it is not part of a test module."""

import torch
from torch.utils.data import Dataset


class Features(Dataset):
    """Features of one image each, computed by a model in the worker process."""

    def __init__(self, model, images):
        self.model, self.images = model, images

    def __len__(self):
        return len(self.images)

    @torch.no_grad()
    def __getitem__(self, index):
        return self.model.forward_features(self.images[index : index + 1])[0]


def train_a_step(model, images):
    """Take one optimizer step; return the new values of the adapter."""
    torch.set_num_threads(1)
    optimizer = torch.optim.SGD(model.rein.parameters(), lr=0.1)
    model.train()(images).square().mean().backward()
    optimizer.step()
    return {name: value.detach().clone() for name, value in model.rein.state_dict().items()}
