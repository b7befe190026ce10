import pytest
import torch
from torch.utils.data import TensorDataset

from rein.dgss.sampling import Drawn, RunLoader, RunSampler, derived_seed
from rein.errors import InputError


class Noisy(torch.nn.Module):
    """A transform that draws."""

    def forward(self, image, label):
        return image + torch.rand(()), label


def data(count=5):
    return TensorDataset(torch.arange(count).float(), torch.arange(count))


def loader(start=0, workers=0, batches=7, rank=0, world=1, batch_size=2):
    sampler = RunSampler(5, batch_size, batches, seed=3, rank=rank, world_size=world)
    made = RunLoader(Drawn(data(), Noisy(), seed=3), sampler, workers)
    if start:
        made.load_state_dict({"handed_out": start})
    return made


def values(batches):
    return [batch[0].tolist() for batch in batches]


def test_every_time_through_shows_each_image_once_in_a_new_order():
    draws = [draw for batch in RunSampler(6, 2, 9, seed=0) for draw in batch]
    rounds = [[draw.image for draw in draws[start : start + 6]] for start in (0, 6, 12)]
    assert all(sorted(each) == list(range(6)) for each in rounds)
    assert len({tuple(each) for each in rounds}) == 3
    assert [draw.place for draw in draws] == list(range(18))


def test_a_run_that_goes_on_sees_what_it_would_have_seen():
    whole = values(loader())
    half = loader()
    batches = iter(half)
    seen = [next(batches)[0].tolist() for _ in range(3)]
    rest = loader()
    rest.load_state_dict(half.state_dict())
    assert seen + values(rest) == whole
    assert len(rest) == len(half) == 7  # of the whole run, as the trainer counts


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_loading_processes_changes_nothing(workers):
    assert values(loader(workers=workers)) == values(loader())


def test_devices_share_the_batches_that_one_would_see():
    one = list(RunSampler(5, 4, 3, seed=1))
    two = [list(RunSampler(5, 2, 3, seed=1, rank=rank, world_size=2)) for rank in range(2)]
    assert [first + second for first, second in zip(*two, strict=True)] == one


def test_loading_leaves_the_random_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Drawn(data(), Noisy(), seed=0)[next(iter(RunSampler(5, 1, 1, 0)))[0]]
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_of_different_numbers_differ():
    seeds = {derived_seed(a, b) for a in range(30) for b in range(30)}
    assert len(seeds) == 900
    assert derived_seed(1, 2) == derived_seed(1, 2)


@pytest.mark.parametrize("size", [0, 5])
def test_nothing_to_draw_from_is_an_error(size):
    with pytest.raises(InputError, match="there must be one at least"):
        RunSampler(size, 0 if size else 2, 3, seed=0)
