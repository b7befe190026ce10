import pytest
import torch

from benchmarks import memory
from benchmarks.__main__ import rows_of
from benchmarks.options import Options

TINY = Options(tiny=True)
NAME, SIZE = "test_vit", 64


@pytest.fixture(scope="module")
def rows():
    return list(rows_of("memory", TINY))


def by_form(rows, measure):
    return {row["form"]: row for row in rows if row["measure"] == measure}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", memory.FORMS)
def test_the_count_on_fake_tensors_equals_the_bytes_that_autograd_saves(form, dtype):
    options = Options(tiny=True, dtype=dtype)
    model = memory.build(options, form, NAME, SIZE)
    for batch in (1, 3):
        x = memory.images(options, SIZE, batch).requires_grad_(form == "bare")
        assert memory.count_kept_bytes(options, form, NAME, SIZE, batch, form == "bare") == memory.kept_bytes(model, x) > 0


def test_each_storage_counts_once_and_weights_and_images_do_not_count():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(5))

        def forward(self, x):
            y = self.weight * x  # saves weight and images
            return y[:2] * y[3:]  # saves two views of y

    assert memory.kept_bytes(Model(), torch.ones(5)) == 5 * 4


def test_the_step_of_every_form_keeps_the_bytes_counted_on_fake_tensors(rows):
    steps = by_form(rows, "step")
    assert set(steps) == {"published", "rein", "full"}
    for form, row in steps.items():
        assert row["kept_bytes"] == memory.count_kept_bytes(TINY, form, NAME, row["size"], row["batch"], form == "bare")
        assert row["optimizer_bytes"] == 8 * row["trainable_parameters"]
        assert row["gradient_bytes"] == 4 * row["trainable_parameters"]
    assert steps["rein"]["kept_bytes"] < steps["published"]["kept_bytes"] < steps["full"]["kept_bytes"]
    assert steps["rein"]["trainable_parameters"] == steps["published"]["trainable_parameters"]
    assert steps["full"]["trainable_parameters"] * 4 == steps["full"]["weights_bytes"]


def test_rein_adds_little_more_than_the_patch_tokens_of_each_layer(rows):
    adapters = by_form(rows, "adapter")
    # the prefix token is kept too, and matrices whose size does not depend on the images
    assert 1 <= adapters["rein"]["added_per_layer_over_nc"] < 1.5 < adapters["published"]["added_per_layer_over_nc"]
    assert adapters["rein"]["added_bytes_per_layer"] < adapters["published"]["added_bytes_per_layer"]


def test_the_peak_covers_the_action_only():
    megabytes = 2**20

    def peak_of_allocating(amount):
        return memory.peak_of_process(lambda: torch.ones(amount * megabytes // 4))

    first = peak_of_allocating(256)
    if first["peak_bytes"] is None:
        assert "not measured" in first["peak_of"]
        return
    assert 200 * megabytes < first["peak_bytes"] < 300 * megabytes  # freed memory of other tests may be used again
    assert peak_of_allocating(32)["peak_bytes"] < 100 * megabytes  # the earlier allocation does not count


def test_the_largest_batch_and_crop_fit_and_the_next_larger_ones_do_not(rows):
    budget, patch = memory.GIB // 64, 16
    batches, crops = (by_form(rows, f"largest {what}") for what in ("batch", "crop"))
    assert set(batches) == set(crops) == {"published", "rein", "full"}
    for form in batches:
        batch, crop = batches[form]["batch"], crops[form]["size"]
        assert (
            memory.required_bytes(TINY, form, NAME, SIZE, batch)
            <= budget
            < memory.required_bytes(TINY, form, NAME, SIZE, batch + 1)
        )
        assert (
            memory.required_bytes(TINY, form, NAME, crop, 1) <= budget < memory.required_bytes(TINY, form, NAME, crop + patch, 1)
        )
    assert batches["full"]["batch"] < batches["published"]["batch"] < batches["rein"]["batch"]


def test_the_count_on_a_cpu_is_at_most_the_peak_of_a_step(rows):
    for form, row in by_form(rows, "step").items():
        static = row["weights_bytes"] + row["optimizer_bytes"] + 4 * 3 * SIZE**2 * row["batch"]
        counted = memory.required_bytes(TINY, form, NAME, row["size"], row["batch"]) - static
        assert counted == max(row["kept_bytes"], row["gradient_bytes"])
        if row["peak_bytes"] is not None:
            assert 0.8 * counted < row["peak_bytes"] < 3 * counted  # small allocations are not returned at once


def test_checkpointing_keeps_a_fraction_of_the_bytes():
    plain, checkpointed = (memory.count_kept_bytes(TINY, form, NAME, SIZE, 16, False) for form in ("rein", "rein checkpointed"))
    assert 4 * checkpointed < plain


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("budget", [5, 10, 11, 37.5, 900, 12345])
def test_the_largest_count_within_a_budget_is_found_in_few_trials(power, budget):
    tried = []

    def required(count):
        tried.append(count)
        return 9 + count**power + 0.3 * count if count < 5000 else float("inf")

    found = memory.largest(required, budget, power)
    assert found == 0 or required(found) <= budget
    assert required(found + 1) > budget
    assert len(tried) < 20


def test_the_largest_count_is_found_below_the_count_that_runs_out_of_memory():
    assert memory.largest(lambda count: count if count <= 77 else float("inf"), 1e9, 1) == 77
