import pytest
import torch
from torch.utils.data import TensorDataset

from rein.dgss.data.sampling import RunLoader, RunSampler, TransformedDataset, derived_seed, evenly_spaced
from rein.errors import InputError


class Noisy(torch.nn.Module):
    """A transform that draws random numbers."""

    def forward(self, image, label):
        return image + torch.rand(()), label


def data(count=5):
    return TensorDataset(torch.arange(count).float(), torch.arange(count))


def loader(start=0, workers=0, batches=7, rank=0, world=1, batch_size=2):
    sampler = RunSampler(5, batch_size, batches, seed=3, rank=rank, world_size=world)
    made = RunLoader(TransformedDataset(data(), Noisy(), seed=3), sampler, workers)
    if start:
        made.load_state_dict({"batches_served": start})
    return made


def values(batches):
    return [batch[0].tolist() for batch in batches]


def test_every_epoch_has_each_image_once_in_a_new_order():
    samples = [sample for batch in RunSampler(6, 2, 9, seed=0) for sample in batch]
    epochs = [[sample.index for sample in samples[start : start + 6]] for start in (0, 6, 12)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [sample.position for sample in samples] == list(range(18))


def test_a_resumed_run_serves_the_remaining_batches():
    whole = values(loader())
    half = loader()
    batches = iter(half)
    seen = [next(batches)[0].tolist() for _ in range(3)]
    rest = loader()
    rest.load_state_dict(half.state_dict())
    assert seen + values(rest) == whole
    assert len(rest) == len(half) == 7  # the length is that of the whole run, as the trainer expects


def test_the_state_of_an_older_checkpoint_is_read():
    resumed = loader()
    resumed.load_state_dict({"handed_out": 3})
    assert values(resumed) == values(loader(start=3))
    assert resumed.state_dict() == {"batches_served": 7}


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_loader_processes_does_not_change_the_batches(workers):
    assert values(loader(workers=workers)) == values(loader())


def test_devices_share_the_batches_of_one_device():
    one = list(RunSampler(5, 4, 3, seed=1))
    two = [list(RunSampler(5, 2, 3, seed=1, rank=rank, world_size=2)) for rank in range(2)]
    assert [first + second for first, second in zip(*two, strict=True)] == one


def test_loading_restores_the_random_state():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    TransformedDataset(data(), Noisy(), seed=0)[next(iter(RunSampler(5, 1, 1, 0)))[0]]
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_of_different_numbers_differ():
    seeds = {derived_seed(a, b) for a in range(30) for b in range(30)}
    assert len(seeds) == 900
    assert derived_seed(1, 2) == derived_seed(1, 2)


@pytest.mark.parametrize("size", [0, 5])
def test_an_empty_data_set_or_batch_is_refused(size):
    with pytest.raises(InputError, match=r"The data set has \d images and batch_size is \d; expected at least 1 of each"):
        RunSampler(size, 0 if size else 2, 3, seed=0)


@pytest.mark.parametrize(
    ("count", "limit", "expected"),
    [(3, None, [0, 1, 2]), (3, 5, [0, 1, 2]), (9, 3, [0, 4, 8]), (9, 1, [0]), (0, 4, [])],
)
def test_evenly_spaced_indices_include_the_first_and_the_last(count, limit, expected):
    assert evenly_spaced(count, limit) == expected
