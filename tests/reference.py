"""Names and equations that tests of the adapter compare with; nothing here uses code of `rein`."""

import math

import torch

# the authors' parameter names -> rein's, for one adapter
OFFICIAL = {
    "scale": "scale",
    "learnable_tokens": "tokens",
    "learnable_tokens_a": "tokens_a",
    "learnable_tokens_b": "tokens_b",
    "mlp_token2feat.weight": "token_mlp.weight",
    "mlp_token2feat.bias": "token_mlp.bias",
    "mlp_delta_f.weight": "delta_mlp.weight",
    "mlp_delta_f.bias": "delta_mlp.bias",
    "transform.weight": "query_proj.weight",
    "transform.bias": "query_proj.bias",
    "merge.weight": "query_merge.weight",
    "merge.bias": "query_merge.bias",
}


def from_official(state):
    """A state dict in the authors' names, in rein's names."""
    return {OFFICIAL[key]: value for key, value in state.items()}


def randomize(adapter, seed=0):
    """Give every parameter a value that makes each term of the equations matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name.endswith("scale"):
                parameter.fill_(0.7)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) / math.sqrt(adapter.dim))
    return adapter


def queries(state):
    """Eq. 8 to 10 of the paper, channel by channel, from a state dict."""
    tokens = state["tokens"] if "tokens" in state else state["tokens_a"] @ state["tokens_b"]
    z = []
    for layer, t in enumerate(tokens):
        name = "query_proj" if "query_proj.weight" in state else f"query_proj.{layer}"
        z.append(t @ state[f"{name}.weight"].T + state[f"{name}.bias"])
    maximum, mean, last = torch.stack(z).max(0).values, sum(z) / len(z), z[-1]
    m, q = last.shape
    merged = torch.empty(m, 3 * q, dtype=last.dtype)
    for channel in range(q):
        merged[:, 3 * channel] = maximum[:, channel]
        merged[:, 3 * channel + 1] = mean[:, channel]
        merged[:, 3 * channel + 2] = last[:, channel]
    return merged @ state["query_merge.weight"].T + state["query_merge.bias"]
