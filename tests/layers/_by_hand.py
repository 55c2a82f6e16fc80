"""Published equations written out in numpy, token by token: no code of the package's."""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def convolve(x, weight, conv, direction, bias=0.0):
    """The short convolution of one image [Gh, Gw, C], index by index."""
    Gh, Gw, C = x.shape
    out = np.zeros_like(x)
    if conv == "none":
        return x
    if conv == "depthwise2d":
        for r in range(Gh):
            for c in range(Gw):
                for i in range(3):
                    for j in range(3):
                        rr, cc = r + i - 1, c + j - 1
                        if 0 <= rr < Gh and 0 <= cc < Gw:
                            out[r, c] += weight[:, 0, i, j] * x[rr, cc]
        return silu(out + bias)
    tokens, N = x.reshape(-1, C), Gh * Gw
    out = out.reshape(-1, C)
    width = {"causal1d": 4, "causal1d(2)": 2, "causal1d(5)": 5}[conv]
    for t in range(N):
        for i in range(width):
            back = width - 1 - i
            s = t + back if direction == "backward" else t - back
            if 0 <= s < N:
                out[t] += weight[:, 0, i] * tokens[s]
    return silu(out + bias).reshape(Gh, Gw, C)


def turn(x, r, c):
    """Axial rotary embedding of one vector [K] at row r, column c."""
    K, out = len(x), x.copy()
    for pair in range(K // 2):
        i = pair % (K // 4)
        angle = (r if pair < K // 4 else c) * 100 ** (-4 * i / K)
        even, odd = x[2 * pair], x[2 * pair + 1]
        out[2 * pair] = even * np.cos(angle) - odd * np.sin(angle)
        out[2 * pair + 1] = even * np.sin(angle) + odd * np.cos(angle)
    return out


def steps(N, direction):
    """For each pass, the tokens in the sequence that it visits them."""
    return {
        "forward": [range(N)], "backward": [range(N)[::-1]],
        "bidirectional": [range(N), range(N)[::-1]],
    }[direction]  # fmt: skip


def norm(x, kind, eps=1e-5):
    """LayerNorm or RMSNorm of one vector, without weights."""
    if kind == "layer":
        x = x - x.mean()
    return x / np.sqrt((x**2).mean() + eps)


def recurrence(q, keys, v, alphas, direction, visits, scale):
    """The sum over passes of o_t = scale q_t S_t of one head; keys and alphas by pass."""
    o = np.zeros_like(v)
    for i, way in enumerate(steps(len(q), direction)):
        S = np.zeros((q.shape[1], v.shape[1]))
        for step in way:
            t = visits[step]
            S = alphas[i][t][:, None] * S + np.outer(keys[i][t], v[t])
            o[t] += scale * q[t] @ S
    return o


def turned2d(x, H, Gw):
    """x [N, C] with every head turned by row and column."""
    K = x.shape[1] // H
    heads = [
        [turn(x[t, h * K : h * K + K], t // Gw, t % Gw) for h in range(H)] for t in range(len(x))
    ]
    return np.array(heads).reshape(x.shape)


def gla(
    x, p, H, conv, direction, visits, shared_decay=True, average=False, kind="layer", rope=False
):
    """GLA, arXiv 2312.06635, section 4.4, for one image [Gh, Gw, C]."""
    Gh, Gw, C = x.shape
    N, half = Gh * Gw, C // 2
    K, V = half // H, C // H
    x = convolve(x, p.get("conv.conv.weight"), conv, direction).reshape(N, C)
    q, k, v, r, low = (
        x @ w.T for w in np.split(p["in_proj.weight"], np.cumsum([half, half, C, C]))
    )
    if rope:
        q, k = turned2d(q, H, Gw), turned2d(k, H, Gw)
    a = low @ p["decay_proj.weight"].T + p["decay_proj.bias"]
    alphas = [
        sigmoid(a[:, i * half : (i + 1) * half]) ** (1 / 16) for i in range(a.shape[1] // half)
    ]
    y = np.zeros((N, C))
    for h in range(H):
        keys, values = slice(h * K, h * K + K), slice(h * V, h * V + V)
        both = [alpha[:, keys] for alpha in alphas] * (2 if shared_decay else 1)
        o = recurrence(
            q[:, keys], [k[:, keys]] * 2, v[:, values], both, direction, visits[h], K**-0.5
        )
        for t in range(N):
            y[t, values] = norm(o[t] / (2 if average else 1), kind)
    y = y * silu(r + p["output_gate_bias"])
    return (y @ p["out_proj.weight"].T).reshape(Gh, Gw, C)


def hgrn2(x, p, H, conv, direction, visits, gamma=0.0, rope=False):
    """HGRN2, arXiv 2404.07904, for one image; gamma [C], the layer's lower bound."""
    Gh, Gw, C = x.shape
    N, K = Gh * Gw, C // H
    x = convolve(x, p.get("conv.conv.weight"), conv, direction).reshape(N, C)
    q, f, i = np.split(x @ p["in_proj.weight"].T + p["in_proj.bias"], 3, axis=1)
    q, f, i = sigmoid(q), gamma + (1 - gamma) * sigmoid(f), silu(i)
    k = 1 - f
    if rope:
        q, k = turned2d(q, H, Gw), turned2d(k, H, Gw)
    o = np.zeros((N, C))
    for h in range(H):
        c = slice(h * K, h * K + K)
        o[:, c] = recurrence(
            q[:, c], [k[:, c]] * 2, i[:, c], [f[:, c]] * 2, direction, visits[h], 1.0
        )
    y = np.stack([norm(o[t], "layer") for t in range(N)]) * p["norm.weight"] + p["norm.bias"]
    return (y @ p["out_proj.weight"].T).reshape(Gh, Gw, C)


def regla(x, p, H, conv, direction, visits, rope=False):
    """ReGLA, arXiv 2502.01578, for one image: features over the maximum of all tokens, then, in one
    direction, each token's output over that of the tokens it hears of."""
    Gh, Gw, C = x.shape
    N, K = Gh * Gw, C // H
    x = convolve(x, p.get("conv.conv.weight"), conv, direction).reshape(N, C)
    parts = x @ p["in_proj.weight"].T
    q, k, v = np.split(parts[:, : 3 * C], 3, axis=1)
    gates = sigmoid(parts[:, 3 * C :] + p["gate_bias"])
    F, r = gates[:, :C], gates[:, C:]
    if r.size:
        F = (1 - r) * F**2 + r * (1 - (1 - F) ** 2)
    y = np.zeros((N, C))
    for h in range(H):
        c = slice(h * K, h * K + K)
        phi_q = np.exp(q[:, c] - q[:, c].max(1, keepdims=True))
        phi_k = np.exp(k[:, c] - k[:, c].max())
        if rope:
            phi_q, phi_k = turned2d(phi_q, 1, Gw), turned2d(phi_k, 1, Gw)
        o = recurrence(
            phi_q, [phi_k] * 2, v[:, c], [F[:, c]] * 2, direction, visits[h],
            1 / (np.e * np.sqrt(K * (np.e**2 - 1))),
        )  # fmt: skip
        if direction != "bidirectional":
            for step in range(N):
                heard_of = [visits[h][s] for s in heard(step, N, direction)]
                o[visits[h][step]] *= np.exp(k[:, c].max() - k[heard_of, c].max())
        for t in range(N):
            y[t, c] = norm(o[t], "layer")
    return (y @ p["out_proj.weight"].T).reshape(Gh, Gw, C)


def retnet(
    x, p, H, conv, direction, visits, ratio=1, gammas=None, rotary=True, kind="layer",
    rope=False,
):  # fmt: skip
    """RetNet, arXiv 2307.08621, equations 5 to 8, for one image; gammas [H]."""
    Gh, Gw, C = x.shape
    N, K = Gh * Gw, C // H
    V = ratio * K
    x = convolve(x, p.get("conv.conv.weight"), conv, direction).reshape(N, C)
    q, k, v, g = (x @ w.T for w in np.split(p["in_proj.weight"], np.cumsum([C, C, ratio * C])))
    if rope:
        q, k = turned2d(q, H, Gw), turned2d(k, H, Gw)
    y = np.zeros((N, H * V))
    for h in range(H):
        keys, values = slice(h * K, h * K + K), slice(h * V, h * V + V)
        turned = []
        for z in (q[:, keys], k[:, keys]):
            z = z.copy()
            for step in range(N) if rotary and not rope else ():
                t = visits[h][step]
                # a pair as one complex number, times e^(i n theta)
                theta = 10000.0 ** -np.linspace(0, 1, K // 2)
                pair = (z[t, 0::2] + 1j * z[t, 1::2]) * np.exp(1j * step * theta)
                z[t, 0::2], z[t, 1::2] = pair.real, pair.imag
            turned.append(z)
        gamma = 1 - 2.0 ** (-5 - h) if gammas is None else gammas[h]
        alpha = np.full((N, K), gamma)
        o = recurrence(
            turned[0], [turned[1]] * 2, v[:, values], [alpha] * 2, direction, visits[h], K**-0.5
        )
        for t in range(N):
            y[t, values] = norm(o[t], kind)
    return (y * silu(g) @ p["out_proj.weight"].T).reshape(Gh, Gw, C)


def heard(step, N, direction):
    """The steps that a step hears of."""
    return {
        "forward": range(step + 1), "backward": range(step, N), "bidirectional": range(N)
    }[direction]  # fmt: skip


def projected(x, p, conv, direction):
    """q, k and v of one image [Gh, Gw, C]."""
    C = x.shape[2]
    x = convolve(x, p.get("conv.conv.weight"), conv, direction).reshape(-1, C)
    return (x @ w.T for w in np.split(p["in_proj.weight"], 3))


def attention(x, p, H, conv, direction, visits, rope=False):
    """Softmax attention, arXiv 1706.03762, equation 1, for one image."""
    Gh, Gw, C = x.shape
    N, K = Gh * Gw, C // H
    q, k, v = projected(x, p, conv, direction)
    if rope:
        q, k = turned2d(q, H, Gw), turned2d(k, H, Gw)
    y = np.zeros((N, C))
    for h in range(H):
        c = slice(h * K, h * K + K)
        for step in range(N):
            t, others = visits[h][step], [visits[h][s] for s in heard(step, N, direction)]
            weight = np.exp([q[t, c] @ k[s, c] / np.sqrt(K) for s in others])
            y[t, c] = sum(w * v[s, c] for w, s in zip(weight, others, strict=True)) / weight.sum()
    return (y @ p["out_proj.weight"].T).reshape(Gh, Gw, C)


def linear_attention(x, p, H, conv, direction, visits, kind="elu", rope=False):
    """The linear Transformer, arXiv 2006.16236, equations 4 to 12, for one image."""
    Gh, Gw, C = x.shape
    N, K = Gh * Gw, C // H
    q, k, v = projected(x, p, conv, direction)

    def phi(z):
        return np.maximum(z, 0) if kind == "relu" else np.where(z > 0, z + 1, np.exp(z))

    q, k = phi(q), phi(k)
    # the numerator's; the row sums are of those that are not turned
    turned_q, turned_k = (turned2d(q, H, Gw), turned2d(k, H, Gw)) if rope else (q, k)
    y = np.zeros((N, C))
    for h in range(H):
        c = slice(h * K, h * K + K)
        for step in range(N):
            t, others = visits[h][step], [visits[h][s] for s in heard(step, N, direction)]
            weight = [turned_q[t, c] @ turned_k[s, c] for s in others]
            total = sum(w * v[s, c] for w, s in zip(weight, others, strict=True))
            y[t, c] = total / (sum(q[t, c] @ k[s, c] for s in others) + 1e-6)
    return (y @ p["out_proj.weight"].T).reshape(Gh, Gw, C)


def complex_recurrence(u, decay, theta, direction, visits):
    """The states [N, C] of each pass of h_t = decay_t e^(i theta) h_{t-1} + u_t, all complex."""
    found = []
    for i, way in enumerate(steps(len(u), direction)):
        h, states = np.zeros(u.shape[1], complex), np.zeros(u.shape, complex)
        for step in way:
            t = visits[step]
            h = decay[t] * np.exp(1j * theta[i]) * h + u[t]
            states[t] = h
        found.append(states)
    return found


def by_group(u, decay, theta, direction, visits):
    """The same, every group of channels along its own scan."""
    E = u.shape[1] // len(visits)
    parts = [
        complex_recurrence(u[:, p], decay[:, p], theta[:, p], direction, visits[i])
        for i, p in enumerate(slice(j * E, j * E + E) for j in range(len(visits)))
    ]
    return [np.concatenate(states, 1) for states in zip(*parts, strict=True)]


def hgrn(x, p, H, conv, direction, visits, gamma=0.0):
    """HGRN, arXiv 2311.04823, section 3, for one image; gamma [C], the layer's lower bound."""
    Gh, Gw, C = x.shape
    N = Gh * Gw
    x = convolve(x, p.get("conv.conv.weight"), conv, direction).reshape(N, C)
    parts = x @ p["in_proj.weight"].T + p["in_proj.bias"]
    re, im, f, g = np.split(parts, [C, 2 * C, 3 * C], axis=1)
    f = gamma + (1 - gamma) * sigmoid(f)
    u = (1 - f) * (silu(re) + 1j * silu(im))
    h = sum(by_group(u, f, p["theta"], direction, visits))
    y = np.stack([norm(row, "layer") for row in np.concatenate([h.real, h.imag], 1)])
    y = (y * p["norm.weight"] + p["norm.bias"]) * silu(g)
    return (y @ p["out_proj.weight"].T).reshape(Gh, Gw, C)


def lru(x, p, H, conv, direction, visits):
    """LRU, arXiv 2303.06349, section 3, for one image."""
    Gh, Gw, C = x.shape
    x = convolve(x, p.get("conv.conv.weight"), conv, direction).reshape(-1, C)
    B = p["in_proj.weight"][:C] + 1j * p["in_proj.weight"][C:]
    u = (x @ B.T) * np.exp(p["log_gain"])
    decay = np.broadcast_to(np.exp(-np.exp(p["nu"])), u.shape)
    theta = np.broadcast_to(np.exp(p["theta"]), (2, C))
    y = p["skip"] * x
    for i, h in enumerate(by_group(u, decay, theta, direction, visits)):
        w = p["out_proj.weight"][:, 2 * i * C : 2 * (i + 1) * C]
        y = y + (h @ (w[:, :C] + 1j * w[:, C:]).conj().T).real
    return y.reshape(Gh, Gw, C)


def mamba(x, p, H, conv, direction, visits, average=True):
    """Mamba, arXiv 2312.00752, algorithm 2, as in Vim, arXiv 2401.09417, for one image."""
    Gh, Gw, C = x.shape
    N = Gh * Gw
    E = p["out_proj.weight"].shape[1]
    u_in, z = np.split(x.reshape(N, C) @ p["in_proj.weight"].T, 2, axis=1)
    ways = steps(N, direction)
    own = sum(name.endswith("A_log") for name in p)
    y = np.zeros((N, E))
    for i, way in enumerate(ways):
        w = {
            name.split(".", 2)[2]: value
            for name, value in p.items()
            if name.startswith(f"ways.{i if own > 1 else 0}.")
        }
        side = ["forward", "backward"][i] if own > 1 else direction
        bias = w.get("conv.conv.bias", 0)
        u = convolve(u_in.reshape(Gh, Gw, E), w.get("conv.conv.weight"), conv, side, bias)
        u = u.reshape(N, E)
        A = -np.exp(w["A_log"])
        R, M = w["dt_weight"].shape[1], A.shape[1]
        r, k, q = np.split(u @ w["x_proj.weight"].T, [R, R + M], axis=1)
        step = np.log1p(np.exp(r @ w["dt_weight"].T + w["dt_bias"]))
        for c in range(E):
            h = np.zeros(M)
            for at in way:
                t = visits[c * len(visits) // E][at]
                h = np.exp(step[t, c] * A[c]) * h + step[t, c] * k[t] * u[t, c]
                y[t, c] += q[t] @ h + w["skip"][c] * u[t, c]
    if average:
        y = y / len(ways)
    return (y * silu(z) @ p["out_proj.weight"].T).reshape(Gh, Gw, C)
