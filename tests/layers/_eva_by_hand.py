"""EVA as a loop over tokens, groups and heads; see _by_hand.py."""

import numpy as np

from tests.layers._by_hand import convolve, norm, turned2d


def eva(
    x, p, H, conv, direction, visits, rope=False, window=2, landmarks=2, disjoint=False,
    counted=False,
):  # fmt: skip
    """EVA, arXiv 2302.04542, as its authors released it for vision, without noise, for one image.

    disjoint: groups cut at the windows' borders, those of the token's own window left out.
    counted: log |P_c| added to a group's score.
    """
    Gh, Gw, C = x.shape
    N, K = Gh * Gw, C // H
    x = convolve(x, p.get("conv.conv.weight"), conv, direction).reshape(N, C)
    q, k, v = np.split(x @ p["in_proj.weight"].T + p["in_proj.bias"], 3, axis=1)
    if rope:
        q, k = turned2d(q, H, Gw), turned2d(k, H, Gw)
    side = 1
    while (side + 1) ** 2 * landmarks <= N:
        side += 1
    window_of, members = [], {}
    for t in range(N):
        r, c = t // Gw, t % Gw
        window_of.append((r // window, c // window))
        group = (r // side, c // side)
        if disjoint:
            cut = min(side, window)
            group = (*window_of[t], r % window // cut, c % window // cut)
        members.setdefault(group, []).append(t)

    def summary(name, vectors):
        z = p[f"{name}_proj.weight"] @ np.mean(vectors, axis=0) + p[f"{name}_proj.bias"]
        return norm(z, "layer") * p[f"{name}_norm.weight"] + p[f"{name}_norm.bias"]

    y = np.zeros((N, C))
    for h in range(H):
        a = slice(h * K, h * K + K)
        keys, values = {}, {}
        for group, tokens in members.items():
            keys[group] = summary("key", [k[m, a] for m in tokens])
            w = (summary("query", [q[m, a] for m in tokens]) + keys[group]) / 2
            xi = [np.exp((w @ k[m, a] - k[m, a] @ k[m, a] / 2) / np.sqrt(K)) for m in tokens]
            values[group] = sum(e * v[m, a] for e, m in zip(xi, tokens, strict=True)) / sum(xi)
        for i in range(N):
            weights, heard_of = [], []
            for j in range(N):
                if window_of[j] == window_of[i]:
                    dr, dc = i // Gw - j // Gw, i % Gw - j % Gw
                    entry = (dr + window - 1) * (2 * window - 1) + dc + window - 1
                    bias = p["relative_bias"][entry, h]
                    weights.append(np.exp(q[i, a] @ k[j, a] / np.sqrt(K) + bias))
                    heard_of.append(v[j, a])
            for group, tokens in members.items():
                if not (disjoint and group[:2] == window_of[i]):
                    weight = np.exp(q[i, a] @ keys[group] / np.sqrt(K))
                    weights.append(weight * (len(tokens) if counted else 1))
                    heard_of.append(values[group])
            y[i, a] = sum(e * z for e, z in zip(weights, heard_of, strict=True)) / sum(weights)
    return (y @ p["out_proj.weight"].T + p["out_proj.bias"]).reshape(Gh, Gw, C)
