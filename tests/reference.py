"""Second witness: SPEC's equations (1)-(8) written down one by one, slow and plain, sharing no code with `rein`."""

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


def _of(state, name, layer):
    shared = f"{name}.weight" in state
    prefix = name if shared else f"{name}.{layer}"
    return state[f"{prefix}.weight"], state[f"{prefix}.bias"]


def _tokens(state):
    if "tokens" in state:
        return state["tokens"]
    return state["tokens_a"] @ state["tokens_b"]


def refine(state, f, layer, use_softmax=True):
    """Equations 1 to 5 for patch tokens f (..., N, C), from a dictionary of rein-named tensors."""
    t = _tokens(state)[layer]
    w_t, b_t = _of(state, "token_mlp", layer)
    w_f, b_f = _of(state, "delta_mlp", layer)
    s = f @ t.T
    if use_softmax:
        s = torch.softmax(s / math.sqrt(f.shape[-1]), -1)
    v = t[1:] @ w_t.T + b_t
    delta = (s[..., 1:] @ v + f) @ w_f.T + b_f
    return f + state.get("scale", 1.0) * delta


def queries(state):
    """Equation 7, from a dictionary of rein-named tensors."""
    z = []
    for layer, t in enumerate(_tokens(state)):
        w_q, b_q = _of(state, "query_proj", layer)
        z.append(t @ w_q.T + b_q)
    maximum, mean, last = torch.stack(z).max(0).values, sum(z) / len(z), z[-1]
    m, q = last.shape
    merged = torch.empty(m, 3 * q, dtype=last.dtype)
    for channel in range(q):
        merged[:, 3 * channel] = maximum[:, channel]
        merged[:, 3 * channel + 1] = mean[:, channel]
        merged[:, 3 * channel + 2] = last[:, channel]
    return merged @ state["query_merge.weight"].T + state["query_merge.bias"]
