"""Wrapped models in worker processes and threads, and two wrapped models at once."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import multiprocessing
from torch.utils.data import DataLoader

import rein
from models import amplify_adapter, build, images
from workers import Features, train_a_step

SMALL = rein.ReinConfig(num_tokens=6, rank=2, query_dim=8)
THREADS = 4
every_method = pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])


def wrapped(family="vit", seed=0):
    model = build(family, seed)
    return amplify_adapter(rein.wrap(model, SMALL)).eval()


def bare_twin(model):
    return rein.unwrap(copy.deepcopy(model)).requires_grad_(False)


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
@every_method
def test_a_worker_process_computes_the_features_of_its_parent(method):
    model, x = wrapped(), images(3)
    loader = DataLoader(Features(model, x), batch_size=3, num_workers=1, multiprocessing_context=method)
    with torch.no_grad():
        expected = torch.cat([model.forward_features(image[None]) for image in x])
    (found,) = loader
    assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
@every_method
def test_a_worker_process_trains_its_own_copy_as_the_parent_would(method):
    model, x = wrapped(), images()
    before = copy.deepcopy(model.rein.state_dict())
    with multiprocessing.get_context(method).Pool(1) as pool:
        found = pool.apply(train_a_step, (copy.deepcopy(model), x))
    assert all(torch.equal(value, before[name]) for name, value in model.rein.state_dict().items())
    expected = train_a_step(model, x)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def run_in_threads(function):
    """Call `function(number)` in several threads that start together, and return the results."""
    barrier = threading.Barrier(THREADS)

    def run(number):
        barrier.wait()
        return function(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


@pytest.mark.parametrize("grad", [False, True])
def test_threads_that_run_one_model_get_the_results_of_single_runs(grad):
    model = wrapped()
    parameters = [parameter for name, parameter in model.rein.named_parameters() if "query" not in name]

    def run(number):
        found = []
        for index in range(5):
            with torch.set_grad_enabled(grad):
                features = model.forward_features(images(1 + number, seed=index))
            found += torch.autograd.grad(features.square().mean(), parameters) if grad else [features]
        return found

    expected = [run(number) for number in range(THREADS)]
    for found, alone in zip(run_in_threads(run), expected, strict=True):
        assert all(torch.equal(got, value) for got, value in zip(found, alone, strict=True))


def test_disabled_applies_to_every_thread_and_ends_when_its_thread_leaves():
    model, x = wrapped(), images()
    with torch.no_grad():
        refined, bare = model(x), bare_twin(model)(x)
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with rein.disabled(model):
            entered.set()
            leave.wait(timeout=60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert entered.wait(timeout=60)
    with torch.no_grad():
        assert torch.equal(model(x), bare)
        with rein.disabled(model):
            leave.set()
            thread.join()
            assert torch.equal(model(x), bare)  # this thread's context is still open
        assert torch.equal(model(x), refined)


def test_contexts_that_overlap_in_any_order_leave_the_model_enabled():
    model, x = wrapped(), images()
    with torch.no_grad():
        refined, bare = model(x), bare_twin(model)(x)

        def run(number):
            for _ in range(20):
                with rein.disabled(model):
                    assert torch.equal(model(x), bare)
            return True

        assert all(run_in_threads(run))
        assert torch.equal(model(x), refined)
    rein.unwrap(model)


def test_a_copy_that_is_made_while_another_thread_disables_the_model_is_enabled():
    model, x = wrapped(), images()
    refined = model(x)
    with rein.disabled(model):
        twin = copy.deepcopy(model)
    assert torch.equal(twin(x), refined)
    with rein.disabled(twin):
        assert not torch.equal(twin(x), refined)
    assert torch.equal(twin(x), refined)


def test_two_wrapped_models_train_together_as_each_alone():
    one, two, x = wrapped(seed=0), wrapped("dinov3", seed=1), images()

    def gradients(*models):
        for model in models:
            model.zero_grad()
        sum(model.train()(x).square().mean() for model in models).backward()
        return [p.grad.clone() for model in models for name, p in model.rein.named_parameters() if "query" not in name]

    for found, alone in zip(gradients(one, two), gradients(one) + gradients(two), strict=True):
        assert torch.equal(found, alone)
    refined, bare = two(x), bare_twin(one)(x)
    with rein.disabled(one):
        assert torch.equal(one(x), bare)
        assert torch.equal(two(x), refined)
    rein.unwrap(one)
    assert torch.equal(two(x), refined)


def test_the_features_of_one_wrapped_model_may_be_the_input_of_another():
    one, two, x = wrapped(seed=0), wrapped(seed=1), images()
    embedded = one.forward_features(x)
    for block in two.blocks:
        embedded = block(embedded)
    embedded.square().mean().backward()
    for model in (one, two):
        assert (model.rein.tokens_a.grad.flatten(1).abs().amax(1) > 0).all()
