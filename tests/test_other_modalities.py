"""Audio and video transformers of transformers, whose tokens are no grid of an image: wrapped, trained, saved and loaded."""

import copy

import pytest
import torch
from torch import nn

import rein

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
AUDIO = {"max_length": 64, "num_mel_bins": 32}
SPEECH = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
SPEECH |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.5, "apply_spec_augment": False}
VIDEO = {"image_size": 32, "num_frames": 4}
MODELS = {  # class, configuration, the only input and its shape for one example, number of prefix tokens
    "spectrograms (AST)": ("AST", AUDIO, "input_values", (64, 32), 2),
    "speech (wav2vec 2.0)": ("Wav2Vec2", SPEECH, "input_values", (1600,), 0),
    "video (VideoMAE)": ("VideoMAE", {**VIDEO, "patch_size": 8}, "pixel_values", (4, 3, 32, 32), 0),
    "video (ViViT)": ("Vivit", {**VIDEO, "tubelet_size": [2, 8, 8]}, "pixel_values", (4, 3, 32, 32), 1),
    "video (TimeSformer)": ("Timesformer", {**VIDEO, "patch_size": 8}, "pixel_values", (4, 3, 32, 32), 1),
}
every_model = pytest.mark.parametrize("name", MODELS)


def build(name):
    """The bare model, always with the same weights, inputs of eight examples, and arguments of `wrap`."""
    kind, settings, argument, shape, prefix = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**SMALL, **settings)).eval()
    inputs = {argument: torch.randn(8, *shape)}
    example = {argument: inputs[argument][:2]}
    return model, inputs, {"num_prefix_tokens": prefix, "example_inputs": example}


def layers(model):
    """The transformer's layers; their attribute depends on the model and on the version of transformers."""
    for owner in (model, model.encoder if hasattr(model, "encoder") else model):
        for name in ("layers", "layer"):
            if isinstance(getattr(owner, name, None), nn.ModuleList):
                return list(getattr(owner, name))
    raise AssertionError(type(model))


def wrap(name):
    model, inputs, arguments = build(name)
    config = rein.ReinConfig(num_tokens=8, rank=4, query_dim=None)
    return rein.wrap(model, config, blocks=layers(model), **arguments), inputs


@every_model
def test_the_adapter_of_another_modality_trains_is_saved_and_loads(name, tmp_path):
    model, inputs = wrap(name)
    frozen = {key: value.clone() for key, value in model.state_dict().items() if not key.startswith("rein.")}
    classifier = nn.Linear(32, 2)
    classes = torch.arange(8) % 2
    optimizer = torch.optim.AdamW([*rein.param_groups(model, lr=1e-2), {"params": classifier.parameters(), "lr": 1e-2}])
    model.train()
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(classifier(model(**inputs).last_hidden_state.mean(1)), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(model.rein.tokens_a.grad.flatten(1).abs().amax(1) > 0)  # every layer
    assert all(torch.equal(model.state_dict()[key], value) for key, value in frozen.items())

    rein.save(model, tmp_path / "adapter.safetensors")
    bare, _, arguments = build(name)
    again = rein.load(copy.deepcopy(bare), tmp_path / "adapter.safetensors", example_inputs=arguments["example_inputs"])
    model.eval()
    with torch.no_grad():
        trained = model(**inputs).last_hidden_state
        assert torch.equal(again(**inputs).last_hidden_state, trained)
        with rein.disabled(again):
            assert torch.equal(again(**inputs).last_hidden_state, bare(**inputs).last_hidden_state)
        assert not torch.allclose(bare(**inputs).last_hidden_state, trained, atol=1e-2)


@every_model
def test_the_frozen_part_of_another_modality_is_deterministic_in_training(name):
    """wav2vec 2.0 drops layers in training, and masks features if `apply_spec_augment` is set."""
    model, inputs = wrap(name)
    model.train()
    assert torch.equal(model(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


def test_speech_of_another_length_is_refined():
    model, _ = wrap("speech (wav2vec 2.0)")
    with torch.no_grad():
        model.rein.scale.fill_(0.5)
        for length in (800, 2400):
            x = torch.randn(1, length)
            refined = model(x).last_hidden_state
            with rein.disabled(model):
                assert not torch.allclose(model(x).last_hidden_state, refined)


@pytest.mark.parametrize("name", ["spectrograms (AST)", "video (ViViT)"])
def test_prefix_tokens_of_another_modality_stay(name):
    model, inputs = wrap(name)
    prefix = MODELS[name][-1]
    with torch.no_grad():
        model.rein.scale.fill_(0.5)
    seen = []
    first = layers(model)[0]
    first.register_forward_hook(lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output))
    with torch.no_grad():
        model(**inputs)
        with rein.disabled(model):
            model(**inputs)
    refined, bare = seen
    assert torch.equal(refined[:, :prefix], bare[:, :prefix])
    assert not torch.allclose(refined[:, prefix:], bare[:, prefix:])


@every_model
def test_a_segmenter_refuses_a_model_that_takes_no_images(name):
    model, _ = wrap(name)
    with pytest.raises(rein.UnsupportedBackboneError):
        rein.Segmenter(model, rein.heads.LinearHead([32], 3))
