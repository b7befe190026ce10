"""The adapter against numbers from the authors' own modules (see `conformance/README.md`).

Tolerances are relative to the largest entry of each reference tensor. They allow another order of float32 sums only: the authors'
own float32 and float64 runs differ by up to 3.3e-7.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rein
from reference import OFFICIAL, from_official

FOLDER = Path(__file__).parent / "conformance"
CASES = json.loads((FOLDER / "cases.json").read_text())
OUTPUT32, GRADIENT32, ANY64 = 5e-7, 5e-6, 1e-13

MODULE_CASES = [
    (file, case, bits)
    for file in ("reins_module.safetensors", "lorareins_module.safetensors")
    for case, settings in CASES[file].items()
    for bits in ((32, 64) if settings["has_float64"] else (32,))
]


def with_prefix(tensors, prefix):
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def assert_close(got, expected, relative, name):
    expected = expected.to(got.dtype).reshape(got.shape)
    error = (got.detach() - expected).abs().max().item()
    allowed = relative * expected.abs().max().item()
    assert error <= allowed, f"{name}: off by {error:.2e}, allowed {allowed:.2e}"


def build_config(official, rank=None):
    return rein.ReinConfig(
        num_tokens=official["token_length"],
        rank=rank,
        query_dim=official["query_dims"] if official.get("link_token_to_query", True) else None,
        use_softmax=official.get("use_softmax", True),
        scale_init=official["scale_init"],
        zero_init=official.get("zero_mlp_delta_f", False),
    )


def build_adapter(official, state):
    rank = state["learnable_tokens_a"].shape[-1] if "learnable_tokens_a" in state else None
    config = build_config(official, rank)
    adapter = rein.ReinAdapter(official["embed_dims"], official["num_layers"], config, patch_size=official["patch_size"])
    dtype = next(iter(state.values())).dtype
    unused = [] if config.query_dim else ["transform.weight", "transform.bias", "merge.weight", "merge.bias"]
    adapter.to(dtype).load_state_dict(from_official({k: v for k, v in state.items() if k not in unused}))
    return adapter


@pytest.mark.parametrize("form", ["forward", "reference_forward"])
@pytest.mark.parametrize(("file", "case", "bits"), MODULE_CASES)
def test_both_forms_of_the_adapter_give_the_authors_outputs_and_gradients(file, case, bits, form):
    settings, tensors = CASES[file][case], load_file(FOLDER / file)
    official, dtype = settings["config"], getattr(torch, f"float{bits}")
    state = {k: v.to(dtype) for k, v in with_prefix(tensors, f"state/{settings['state']}/").items()}
    expected = with_prefix(tensors, f"case{64 if bits == 64 else ''}/{case}/")
    outputs, gradients = (OUTPUT32, GRADIENT32) if bits == 32 else (ANY64, ANY64)

    adapter = build_adapter(official, state)
    refine, layers = getattr(adapter, form), official["num_layers"]
    feats, cotangents = tensors["in/feats"][:layers].to(dtype), tensors["cot/feats"][:layers].to(dtype)
    feats.requires_grad_()
    prefix = int(settings["has_cls_token"])
    refined = torch.stack([torch.cat((f[:, :prefix], refine(f[:, prefix:], i)), 1) for i, f in enumerate(feats)])
    loss = (refined * cotangents).sum()
    if adapter.config.query_dim:
        queries = adapter.queries()
        assert_close(queries, expected["query"], outputs, "queries")
        loss = loss + (queries * tensors["cot/query"][: official["token_length"]].to(dtype)).sum()
    loss.backward()

    def as_stored(tensor):  # cases with batch_first=False store (L, N, B, C)
        return tensor if settings["batch_first"] else tensor.transpose(1, 2)

    assert_close(as_stored(refined), expected["out"], outputs, "outputs")
    assert_close(as_stored(feats.grad), expected["grad_in"], gradients, "gradient of the input")
    parameters = dict(adapter.named_parameters())
    compared = 0
    for name, gradient in with_prefix(expected, "grad/").items():
        if OFFICIAL[name] in parameters:
            assert_close(parameters[OFFICIAL[name]].grad, gradient, gradients, f"gradient of {name}")
            compared += 1
    assert compared == len(parameters)


@pytest.mark.parametrize("run", ["single_group", "official_groups"])
@pytest.mark.parametrize("bits", [32, 64])
def test_five_adamw_steps_end_where_the_authors_end(run, bits):
    settings, tensors = CASES["lorareins_adamw.safetensors"], load_file(FOLDER / "lorareins_adamw.safetensors")
    dtype = getattr(torch, f"float{bits}")
    adapter = build_adapter(settings["config"], {k: v.to(dtype) for k, v in with_prefix(tensors, "init/").items()})
    recipe = dict(settings["adamw"], betas=tuple(settings["adamw"]["betas"]))
    steps = recipe.pop("steps")
    if settings["runs"][run]["grouped"]:
        groups = rein.param_groups(adapter, lr=recipe["lr"], weight_decay=recipe["weight_decay"])
    else:
        groups = adapter.parameters()
    optimizer = torch.optim.AdamW(groups, **recipe)
    x, target, target_query = (tensors[k].to(dtype) for k in ("in", "target", "target_query"))
    for step in range(1, steps + 1):
        y = x
        for layer in range(adapter.num_layers):
            y = torch.cat((y[:, :1], adapter(y[:, 1:], layer)), 1)
        loss = (y - target).square().mean()
        if settings["runs"][run]["loss_uses_queries"]:
            loss = loss + (adapter.queries() - target_query).square().mean()
        losses = settings["runs"][run]["losses64" if bits == 64 else "losses"]
        assert loss.item() == pytest.approx(losses[step - 1], abs=2e-6 if bits == 32 else 1e-12)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if bits == 32 or step == steps:
            expected = with_prefix(tensors, f"{run}/step{step}/" if bits == 32 else f"{run}/step5_64/")
            ours = dict(adapter.named_parameters())
            assert len(expected) == len(ours)
            for name, value in expected.items():
                error = (ours[OFFICIAL[name]].detach() - value).abs().max().item()
                assert error <= (2e-6 if bits == 32 else 1e-12), f"{name} after step {step}: off by {error:.2e}"
