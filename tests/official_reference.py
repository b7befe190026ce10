"""Reference implementation of Mask2Former on tensors with OpenMMLab's names, written from the papers' equations.

It shares no code with `rein`, and tests compare converted official heads with it.
Deformable attention: arXiv 2010.04159, Eq. 3; masked attention and the decoder: arXiv 2112.01527, section 3.2 and Fig. 2.
"""

import math

import torch
import torch.nn.functional as F


def linear(s, key, x):
    return x @ s[f"{key}.weight"].T + s[f"{key}.bias"]


def norm(s, key, x):
    return F.layer_norm(x, x.shape[-1:], s[f"{key}.weight"], s[f"{key}.bias"])


def group_norm(s, key, x):
    return F.group_norm(x, 32, s[f"{key}.weight"], s[f"{key}.bias"])


def sine(height, width, channels):
    """Position embedding (C, H, W): y in the first half of the channels, x in the second; sine and cosine alternate."""
    half = channels // 2
    y = torch.arange(1, height + 1) / (height + 1e-6) * 2 * math.pi
    x = torch.arange(1, width + 1) / (width + 1e-6) * 2 * math.pi
    period = 10000 ** (2 * (torch.arange(half) // 2) / half)

    def encode(p):
        angle = p[:, None] / period
        return torch.where(torch.arange(half) % 2 == 0, angle.sin(), angle.cos()).T  # (C / 2, n)

    rows = encode(y)[:, :, None].expand(-1, -1, width)
    columns = encode(x)[:, None, :].expand(-1, height, -1)
    return torch.cat((rows, columns))


def deformable(s, key, query, values, sizes, heads):
    """Deformable attention for one image: query (N, C) and values (N, C), with the levels of `sizes` concatenated."""
    n, c = query.shape
    points, levels = 4, len(sizes)
    v = linear(s, f"{key}.value_proj", values).reshape(n, heads, c // heads)
    offsets = linear(s, f"{key}.sampling_offsets", query).reshape(n, heads, levels, points, 2)
    weights = linear(s, f"{key}.attention_weights", query).reshape(n, heads, levels * points).softmax(-1)
    weights = weights.reshape(n, heads, levels, points)
    centres = torch.cat(
        [
            torch.stack(
                torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")[::-1], -1
            ).reshape(-1, 2)
            for h, w in sizes
        ]
    )
    out, start = torch.zeros(n, heads, c // heads), 0
    for level, (h, w) in enumerate(sizes):
        maps = v[start : start + h * w].reshape(h, w, heads, -1).permute(2, 3, 0, 1)  # (heads, C / heads, h, w)
        start += h * w
        locations = centres[:, None, None] + offsets[:, :, level] / torch.tensor([w, h])  # (N, heads, points, 2), x before y
        sampled = F.grid_sample(maps, 2 * locations.permute(1, 0, 2, 3) - 1, align_corners=False)  # (heads, C / heads, N, points)
        out += (sampled * weights[:, :, level].permute(1, 0, 2)[:, None]).sum(-1).permute(2, 0, 1)
    return linear(s, f"{key}.output_proj", out.reshape(n, c))


def attention(s, key, query, keys, values, heads, blocked=None):
    """Multi-head attention for one image; `blocked` (m, N) is True for keys that a query must not attend to."""
    w, b = s[f"{key}.attn.in_proj_weight"].chunk(3), s[f"{key}.attn.in_proj_bias"].chunk(3)

    def split(x, i):
        return (x @ w[i].T + b[i]).reshape(len(x), heads, -1).transpose(0, 1)

    q, k, v = split(query, 0), split(keys, 1), split(values, 2)
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    if blocked is not None:
        scores = scores.masked_fill(blocked, -math.inf)
    x = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(query), -1)
    return linear(s, f"{key}.attn.out_proj", x)


def mask2former(s, maps, queries, heads):
    """Class logits (m, K + 1) and mask logits (m, h, w) of one image; maps (C, h, w), finest first."""
    p, t = "pixel_decoder", "transformer_decoder"
    inputs = []
    for i, x in enumerate([maps[3], maps[2], maps[1]]):
        x = F.conv2d(x[None], s[f"{p}.input_convs.{i}.conv.weight"], s[f"{p}.input_convs.{i}.conv.bias"])
        inputs.append(group_norm(s, f"{p}.input_convs.{i}.gn", x)[0])
    sizes = [tuple(x.shape[-2:]) for x in inputs]
    c = inputs[0].shape[0]
    positions = [sine(h, w, c).flatten(1).T for h, w in sizes]
    query_positions = torch.cat([position + s[f"{p}.level_encoding.weight"][i] for i, position in enumerate(positions)])
    x = torch.cat([each.flatten(1).T for each in inputs])
    layer = 0
    while f"{p}.encoder.layers.{layer}.norms.0.weight" in s:
        key = f"{p}.encoder.layers.{layer}"
        x = norm(s, f"{key}.norms.0", x + deformable(s, f"{key}.self_attn", x + query_positions, x, sizes, heads))
        hidden = linear(s, f"{key}.ffn.layers.0.0", x).relu()
        x = norm(s, f"{key}.norms.1", x + linear(s, f"{key}.ffn.layers.1", hidden))
        layer += 1
    levels = [each.T.reshape(c, *size) for each, size in zip(x.split([h * w for h, w in sizes]), sizes, strict=True)]
    fine = group_norm(s, f"{p}.lateral_convs.0.gn", F.conv2d(maps[0][None], s[f"{p}.lateral_convs.0.conv.weight"]))
    fine = fine + F.interpolate(levels[2][None], fine.shape[-2:], mode="bilinear", align_corners=False)
    fine = F.conv2d(fine, s[f"{p}.output_convs.0.conv.weight"], padding=1)
    fine = group_norm(s, f"{p}.output_convs.0.gn", fine).relu()
    pixels = F.conv2d(fine, s[f"{p}.mask_feature.weight"], s[f"{p}.mask_feature.bias"])[0]

    def predict(state):
        state = norm(s, f"{t}.post_norm", state)
        embedding = linear(s, "mask_embed.4", linear(s, "mask_embed.2", linear(s, "mask_embed.0", state).relu()).relu())
        return linear(s, "cls_embed", state), torch.einsum("mc,chw->mhw", embedding, pixels)

    features = [level.flatten(1).T + s["level_embed.weight"][i] for i, level in enumerate(levels)]
    state = linear(s, "querys2feat", queries)
    classes, masks = predict(state)
    layer = 0
    while f"{t}.layers.{layer}.norms.0.weight" in s:
        key, level = f"{t}.layers.{layer}", layer % 3
        blocked = F.interpolate(masks[None], sizes[level], mode="bilinear", align_corners=False)[0].flatten(1).sigmoid() < 0.5
        blocked &= ~blocked.all(1, keepdim=True)  # a query whose mask is empty attends to all keys
        keys = features[level] + positions[level]
        attended = attention(s, f"{key}.cross_attn", state + queries, keys, features[level], heads, blocked)
        state = norm(s, f"{key}.norms.0", state + attended)
        state = norm(
            s, f"{key}.norms.1", state + attention(s, f"{key}.self_attn", state + queries, state + queries, state, heads)
        )
        hidden = linear(s, f"{key}.ffn.layers.0.0", state).relu()
        state = norm(s, f"{key}.norms.2", state + linear(s, f"{key}.ffn.layers.1", hidden))
        classes, masks = predict(state)
        layer += 1
    return classes, masks


def random_head(in_channels, channels, num_classes, encoder_layers, decoder_layers, hidden, heads, seed=0):
    """State dict of a complete `decode_head` in the official layout, with random weights."""
    g = torch.Generator().manual_seed(seed)
    s = {}

    def add(key, *shape, bias=True):
        s[f"{key}.weight"] = torch.randn(*shape, generator=g) / math.sqrt(math.prod(shape[1:]) or 1)
        if bias:
            s[f"{key}.bias"] = 0.1 * torch.randn(shape[0], generator=g)

    def add_norm(key):
        s[f"{key}.weight"] = 1 + 0.1 * torch.randn(channels, generator=g)
        s[f"{key}.bias"] = 0.1 * torch.randn(channels, generator=g)

    for i, c in enumerate(reversed(in_channels[1:])):
        add(f"pixel_decoder.input_convs.{i}.conv", channels, c, 1, 1)
        add_norm(f"pixel_decoder.input_convs.{i}.gn")
    for i in range(encoder_layers):
        key = f"pixel_decoder.encoder.layers.{i}"
        add(f"{key}.self_attn.sampling_offsets", heads * 3 * 4 * 2, channels)
        s[f"{key}.self_attn.sampling_offsets.bias"] = 2 * torch.randn(heads * 24, generator=g)
        add(f"{key}.self_attn.attention_weights", heads * 3 * 4, channels)
        add(f"{key}.self_attn.value_proj", channels, channels)
        add(f"{key}.self_attn.output_proj", channels, channels)
        add(f"{key}.ffn.layers.0.0", hidden, channels)
        add(f"{key}.ffn.layers.1", channels, hidden)
        add_norm(f"{key}.norms.0")
        add_norm(f"{key}.norms.1")
    add("pixel_decoder.lateral_convs.0.conv", channels, in_channels[0], 1, 1, bias=False)
    add_norm("pixel_decoder.lateral_convs.0.gn")
    add("pixel_decoder.output_convs.0.conv", channels, channels, 3, 3, bias=False)
    add_norm("pixel_decoder.output_convs.0.gn")
    add("pixel_decoder.mask_feature", channels, channels, 1, 1)
    add("pixel_decoder.level_encoding", 3, channels, bias=False)
    for i in range(decoder_layers):
        key = f"transformer_decoder.layers.{i}"
        for part in ("cross_attn", "self_attn"):
            s[f"{key}.{part}.attn.in_proj_weight"] = torch.randn(3 * channels, channels, generator=g) / math.sqrt(channels)
            s[f"{key}.{part}.attn.in_proj_bias"] = 0.1 * torch.randn(3 * channels, generator=g)
            add(f"{key}.{part}.attn.out_proj", channels, channels)
        add(f"{key}.ffn.layers.0.0", hidden, channels)
        add(f"{key}.ffn.layers.1", channels, hidden)
        for n in range(3):
            add_norm(f"{key}.norms.{n}")
    add_norm("transformer_decoder.post_norm")
    add("level_embed", 3, channels, bias=False)
    add("cls_embed", num_classes + 1, channels)
    for i in (0, 2, 4):
        add(f"mask_embed.{i}", channels, channels)
    add("querys2feat", channels, channels)
    return s
