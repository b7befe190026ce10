from types import SimpleNamespace

import pytest
import timm
import torch
from torch.utils.data import TensorDataset

import rein
from rein.dgss import methods
from rein.dgss.metrics import ConfusionMatrix
from rein.dgss.task import SegmentationTask
from rein.dgss.training import BestState, Schedule, fit, judge
from rein.dgss.transforms import Normalize
from rein.errors import InputError


def blocks(count=6, seed=0):
    """Images whose class can be seen: dark or bright quarters."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 2, (count, 2, 2), generator=generator).repeat_interleave(16, 1).repeat_interleave(16, 2)
    image = (
        60 + 130 * label[:, None].expand(-1, 3, -1, -1) + torch.randint(-20, 20, (count, 3, 32, 32), generator=generator)
    ).byte()
    return TensorDataset(image, label.byte())


def segmenter(wrap=True):
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True, patch_size=8)
    if wrap:
        rein.wrap(vit, rein.ReinConfig(query_dim=None, zero_init=True))
    return rein.Segmenter(vit, rein.heads.LinearHead(64, 2))


NORMALIZE = Normalize((0.5,) * 3, (0.25,) * 3)


class Log(BestState):
    def __init__(self, path):
        self.saved = []
        super().__init__(path, lambda segmenter, path: self.saved.append(segmenter.head.classifier.weight.clone()))


def test_training_learns_on_the_source_and_keeps_the_best_state(tmp_path):
    model, best = segmenter(), BestState(tmp_path / "best.safetensors", lambda s, path: s.save(path))
    schedule = Schedule(steps=30, batch_size=4, lr=3e-3, validations=3)
    fit(model, blocks(), blocks(4, seed=1), normalize=NORMALIZE, schedule=schedule, best=best)
    assert best.miou > 0.8
    assert 0 < best.step <= 30
    again = rein.Segmenter.load(best.path, segmenter(wrap=False).backbone)
    confusion = judge(again, blocks(4, seed=1), NORMALIZE, lambda loader: loader)
    assert confusion.mean_iou() == pytest.approx(best.miou)
    assert not any(p.requires_grad for name, p in model.backbone.named_parameters() if not name.startswith("rein."))


def test_only_improvements_are_saved(tmp_path):
    best = Log(tmp_path / "never")
    task = SegmentationTask(segmenter(), NORMALIZE, Schedule(steps=10))
    values = iter([0.5, 0.4, 0.6, 0.6])
    task.confusions[0] = ConfusionMatrix(2)
    task.confusions[0].mean_iou = lambda: next(values)

    class Trainer:
        global_step = 7

    for _ in range(4):
        best.on_validation_end(Trainer, task)
    assert len(best.saved) == 2
    assert best.miou == 0.6


def test_the_same_seed_trains_to_the_same_weights(tmp_path):
    ends = []
    for _ in range(2):
        model = segmenter()
        fit(model, blocks(), blocks(2), normalize=NORMALIZE, schedule=Schedule(steps=4, seed=5), best=Log(tmp_path / "never"))
        ends.append([p.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_the_optimizer_has_the_authors_groups_and_the_poly_schedule():
    schedule = Schedule(steps=100, lr=1e-3)
    model = segmenter(wrap=False)
    task = SegmentationTask(model, NORMALIZE, schedule)
    task.trainer = SimpleNamespace(max_steps=schedule.steps)
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


def test_what_a_method_adds_can_have_a_rate_of_its_own():
    model = segmenter(wrap=True)
    task = SegmentationTask(model, NORMALIZE, Schedule(steps=100, lr=1e-3, adapter_factor=0.3))
    task.trainer = SimpleNamespace(max_steps=100)
    groups = task.configure_optimizers()["optimizer"].param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert all(rates[id(p)] == pytest.approx(3e-4) for p in model.backbone.rein.parameters())
    assert all(rates[id(p)] == pytest.approx(1e-3) for p in model.head.parameters())
    with pytest.raises(InputError, match="rates must be above 0"):
        Schedule(steps=1, adapter_factor=0.0)


def test_prompts_are_spared_from_decay_as_tokens_are():
    vit = methods.apply("vpt", timm.create_model("test_vit", num_classes=0, dynamic_img_size=True))
    task = SegmentationTask(rein.Segmenter(vit, rein.heads.LinearHead(64, 2)), NORMALIZE, Schedule(steps=10))
    task.trainer = SimpleNamespace(max_steps=10)
    groups = task.configure_optimizers()["optimizer"].param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays[id(vit.vpt.prompts)] == 0


def test_ctrl_c_is_passed_on_and_leaves_the_best_state(tmp_path):
    model, best = segmenter(), BestState(tmp_path / "best.safetensors", lambda s, path: s.save(path))

    class Impatient(TensorDataset):
        def __getitem__(self, index):
            if best.miou is not None:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    data = Impatient(*blocks().tensors)
    with pytest.raises(KeyboardInterrupt):
        fit(model, data, blocks(2), normalize=NORMALIZE, schedule=Schedule(steps=20, validations=10), best=best)
    assert rein.Segmenter.load(best.path, segmenter(wrap=False).backbone).head.num_classes == 2
