from types import SimpleNamespace

import pytest
import timm
import torch

import rein
from rein.dgss import methods
from rein.dgss.data.transforms import Normalize
from rein.dgss.training.experiment import Experiment
from rein.dgss.training.optimization import Optimization, anneal_weight_decay, make_optimizer, update_average
from rein.dgss.training.task import SegmentationTask
from rein.errors import InputError


def segmenter(wrap=True):
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True, patch_size=8)
    if wrap:
        rein.wrap(vit, rein.ReinConfig(query_dim=None, zero_init=True))
    return rein.Segmenter(vit, rein.heads.LinearHead(64, 2))


NORMALIZE = Normalize((0.5,) * 3, (0.25,) * 3)


def test_the_optimizer_has_the_authors_groups_and_the_poly_schedule():
    model = segmenter(wrap=False)
    task = SegmentationTask(model, NORMALIZE, Optimization(lr=1e-3))
    task.trainer = SimpleNamespace(max_steps=100)
    setup = task.configure_optimizers()
    optimizer, poly = setup["optimizer"], setup["lr_scheduler"]["scheduler"]
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert all(rates[id(p)] == pytest.approx(1e-4) for p in model.backbone.parameters())
    assert all(rates[id(p)] == pytest.approx(1e-3) for p in model.head.parameters())
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[id(model.backbone.blocks[0].norm1.weight)] == 0
    assert decays[id(model.backbone.blocks[0].attn.qkv.weight)] == 0.05
    for _ in range(50):
        optimizer.step()
        poly.step()
    assert max(group["lr"] for group in optimizer.param_groups) == pytest.approx(1e-3 * 0.5**0.9)


@pytest.mark.parametrize(
    ("warmup", "lr", "expected"),
    [
        # 1e-4 * (1 - step / 40000) ** 0.9
        (0, 1e-4, {0: 1e-4, 1: 9.99977e-5, 5000: 8.867624e-5, 10_000: 7.718895e-5, 25_000: 4.136453e-5, 39_999: 7.2135e-9}),
        # up to 10,000: 6e-5 * (1e-6 + (1 - 1e-6) * step / 10000); then 6e-5 * ((40000 - step) / 30000) ** 0.9
        (10_000, 6e-5, {0: 6e-11, 1: 6.059994e-9, 5000: 3.000003e-5, 10_000: 6e-5, 25_000: 3.21532e-5, 39_999: 5.60715e-9}),
    ],
)
def test_the_learning_rate_is_that_of_the_published_schedule(warmup, lr, expected):
    model = segmenter()
    task = SegmentationTask(model, NORMALIZE, Optimization(lr=lr, warmup_steps=warmup, warmup_factor=1e-6))
    task.trainer = SimpleNamespace(max_steps=40_000)
    setup = task.configure_optimizers()
    optimizer, schedule = setup["optimizer"], setup["lr_scheduler"]["scheduler"]
    optimizer.step()  # without gradients, it does nothing
    found = {}
    for step in range(40_001):
        found[step] = max(group["lr"] for group in optimizer.param_groups)
        schedule.step()
    assert {step: found[step] for step in expected} == pytest.approx(expected, rel=1e-6)
    assert found[40_000] == 0
    rising = [found[step + 1] > found[step] for step in range(40_000)]
    assert rising == [step < warmup for step in range(40_000)]


def test_a_warm_up_out_of_range_is_refused():
    with pytest.raises(
        InputError, match="warmup_steps is -1 and warmup_factor is 1e-06; expected at least 0 steps, and a factor"
    ):
        Optimization(warmup_steps=-1)
    with pytest.raises(InputError, match="warmup_factor is 0.0"):
        Optimization(warmup_factor=0.0)


def test_the_weight_decay_is_annealed_by_a_cosine_where_there_is_one():
    settings = Optimization(weight_decay=0.05, final_weight_decay=1e-5)
    values = {
        0: 0.05,
        10_000: 0.04267914,
        20_000: 0.025005,
        30_000: 0.00733087,
        39_999: 1.0000077e-5,
    }  # cos 0, 45, 90, 135, 180 degrees
    for step, value in values.items():
        assert settings.weight_decay_at(step, 40_000) == pytest.approx(value, abs=1e-8)
    model = segmenter(wrap=True)
    optimizer = make_optimizer(model, settings, (), steps=100)["optimizer"]
    decays = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for step, value in ((0, 0.05), (50, 0.025005), (25, 0.04267914)):
        anneal_weight_decay(optimizer, settings, step, 100)
        assert decays[id(model.head.classifier.weight)]["weight_decay"] == pytest.approx(value, abs=1e-8)
        assert decays[id(model.backbone.rein.tokens_a)]["weight_decay"] == 0
    anneal_weight_decay(optimizer, Optimization(weight_decay=0.03), 7, 100)  # constant
    assert decays[id(model.head.classifier.weight)]["weight_decay"] == pytest.approx(0.04267914, abs=1e-7)


def test_the_average_starts_as_the_weights_of_its_first_step_and_then_follows_them():
    settings, average = Optimization(ema=0.9998, ema_from=3), {}
    expected = None
    for step in range(1, 8):
        weights = {"w": torch.tensor([float(step), -1.0])}
        update_average(average, weights, settings, step)
        if step < 3:
            assert average == {}
        elif step == 3:
            expected = weights["w"].double()
        else:
            expected = (1 - 2e-4) * expected + 2e-4 * weights["w"].double()  # OpenMMLab's momentum
        if expected is not None:
            torch.testing.assert_close(average["w"].double(), expected, rtol=1e-6, atol=0)
    from_start = {}
    update_average(from_start, weights, Optimization(ema=0.9), 0)
    assert torch.equal(from_start["w"], weights["w"])
    assert from_start["w"] is not weights["w"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ema_from": 5}, "ema_from is 5 and ema is None; expected at least 0 steps, and a decay if they are more. Set ema"),
        ({"ema": 0.9, "ema_from": -1}, "ema_from is -1 and ema is 0.9; expected at least 0"),
        ({"final_weight_decay": 0.1}, "final_weight_decay is 0.1; expected 0 to weight_decay, 0.05. Lower it"),
        ({"final_weight_decay": -1e-5}, "final_weight_decay is -1e-05; expected 0 to"),
    ],
)
def test_schedules_that_cannot_be_followed_are_an_error(settings, message):
    with pytest.raises(InputError, match=message):
        Optimization(**settings)


def test_what_a_method_adds_can_have_a_rate_of_its_own():
    model = segmenter(wrap=True)
    task = SegmentationTask(model, NORMALIZE, Optimization(lr=1e-3, adapter_factor=0.3))
    task.trainer = SimpleNamespace(max_steps=100)
    groups = task.configure_optimizers()["optimizer"].param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert all(rates[id(p)] == pytest.approx(3e-4) for p in model.backbone.rein.parameters())
    assert all(rates[id(p)] == pytest.approx(1e-3) for p in model.head.parameters())
    with pytest.raises(InputError, match="rates must be above 0"):
        Optimization(adapter_factor=0.0)


@pytest.mark.parametrize("config", [rein.ReinConfig(num_tokens=6, rank=2), rein.ReinConfig(num_tokens=6, rank=None, share=False)])
def test_tokens_can_have_a_rate_of_their_own(config):
    vit = rein.wrap(timm.create_model("test_vit", num_classes=0, dynamic_img_size=True), config)
    settings = Optimization(lr=1e-3, adapter_factor=0.3, token_factor=10)
    task = SegmentationTask(rein.Segmenter(vit, rein.heads.LinearHead(64, 2)), NORMALIZE, settings)
    task.trainer = SimpleNamespace(max_steps=100)
    groups = task.configure_optimizers()["optimizer"].param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    tokens = {id(p) for p in vit.rein.token_parameters()}
    assert all(rates[id(p)] == pytest.approx(3e-3 if id(p) in tokens else 3e-4) for p in vit.rein.parameters())


def test_prompts_are_not_decayed_as_tokens_are_not():
    vit = methods.apply("vpt", timm.create_model("test_vit", num_classes=0, dynamic_img_size=True))
    task = SegmentationTask(rein.Segmenter(vit, rein.heads.LinearHead(64, 2)), NORMALIZE)
    task.trainer = SimpleNamespace(max_steps=10)
    groups = task.configure_optimizers()["optimizer"].param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays[id(vit.vpt.prompts)] == 0


def test_an_experiment_has_two_classes_or_more():
    """Refused before the backbone, which does not exist here, is built."""
    with pytest.raises(InputError, match="num_classes is 1; it must be 2 to 255. For a binary segmentation, count two classes"):
        Experiment(num_classes=1, backbone="nosuch")


def test_the_settings_of_a_head_choose_its_loss():
    settings = {"loss": {"cross_entropy": 1.0, "dice": 1.0}, "class_weights": [1, 5]}
    task = Experiment(
        num_classes=2, backbone="test_vit", pretrained=False, patch_size=8, head="LinearHead", head_settings=settings, window=None
    )
    assert task.segmenter.head.arguments.items() >= {"loss": settings["loss"], "class_weights": [1.0, 5.0]}.items()
    with pytest.raises(InputError, match=r"class_weights is \[1\]; expected a list of 2 numbers"):
        Experiment(num_classes=2, backbone="test_vit", pretrained=False, head="LinearHead", head_settings={"class_weights": [1]})


def test_a_training_step_goes_through_the_segmenters_call(monkeypatch):
    model = segmenter()
    task, seen = SegmentationTask(model, NORMALIZE), []
    monkeypatch.setattr(task, "log", lambda *args, **settings: None)
    model.register_forward_hook(lambda module, args, output: seen.append(output))
    loss = task.training_step((torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(1, 32, 32, dtype=torch.uint8)), 0)
    assert seen == [loss]
