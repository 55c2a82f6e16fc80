"""Calls of the kernels and their truth, for the interpreter and for a GPU."""

import torch

from metala_vision.kernels.depthwise_conv import depthwise_conv_silu
from metala_vision.kernels.gated_linear_attention import gated_linear_attention
from metala_vision.kernels.gated_linear_attention.reference import reference
from metala_vision.kernels.gated_norm import gated_norm
from metala_vision.kernels.linear_recurrence import linear_recurrence
from metala_vision.kernels.selective_scan import selective_scan
from tests._numerics import GATES, normal, relative_rms

TAU = 16.0


def inputs(N, gates="N(0,1)", *, B=1, H=1, K=32, V=16, dtype=torch.float32):
    """q, v, gate and d_o in float32, rounded to dtype first."""
    tensors = (
        normal(B, N, H, K, seed=0),
        normal(B, N, H, V, seed=1),
        GATES[gates](normal(B, N, H, K, seed=2)),
        normal(B, N, H, V, seed=3),
    )
    return [x.to(dtype).float() for x in tensors]


def truth(q, v, gate, d_o, direction):
    """The same by the recurrence and autograd, in float64."""
    given = [x.double().requires_grad_() for x in (q, v, gate)]
    scale = q.shape[3] ** -0.5
    o, _ = reference(
        given[0], given[1], None, given[2], None, TAU, scale, direction, None, None, False
    )
    gradients = torch.autograd.grad(o, given, d_o.double())
    return {"o": o.detach(), **dict(zip(("q", "v", "gate"), gradients, strict=True))}


MODES = {
    "gate": {},
    "gate, key": {"key": True},
    "log decay": {"decay": "log_decay"},
    "log decay, key": {"decay": "log_decay", "key": True},
    "undecayed": {"decay": None, "key": True},
    "two gates": {"per_direction": True},
    "two log decays, key": {"decay": "log_decay", "key": True, "per_direction": True},
    "order": {"order": "one"},
    "order per head, wide": {"order": "per head", "K": 40, "V": 20},
    "forward, states": {"direction": "forward", "states": True},
    "backward, states": {"direction": "backward", "states": True},
    "forward, states, wide": {"direction": "forward", "states": True, "K": 40},
    "backward, states, wide, order": {
        "direction": "backward", "states": True, "K": 40, "order": "per head",
    },
    "forward, undecayed": {"direction": "forward", "decay": None, "key": True},
}  # fmt: skip


def mode_errors(
    N, gates="half-100-half+8", *, direction="bidirectional", decay="gate", key=False,
    per_direction=False, order=None, states=False, B=1, H=2, K=16, V=16, device="cpu",
    working_dtype=torch.float32,
):  # fmt: skip
    """Relative RMS error of the outputs and of every gradient of one call against float64."""
    inputs = {name: normal(B, N, H, e, seed=i) for i, (name, e) in enumerate((("q", K), ("v", V)))}
    if key:
        inputs["k"] = normal(B, N, H, K, seed=2)
    if decay:
        gate = GATES[gates](normal(*([2] if per_direction else []), B, N, H, K, seed=3))
        inputs[decay] = gate if decay == "gate" else torch.nn.functional.logsigmoid(gate) / TAU
    if states:
        inputs["initial_state"] = normal(B, H, K, V, seed=4)
    visits = torch.stack([torch.randperm(N) for _ in range(H)], 1).t()  # not contiguous
    visits = {None: None, "one": visits[0].int(), "per head": visits}[order]
    visits = None if visits is None else visits.to(device)
    incoming = [normal(B, N, H, V, seed=5), normal(B, H, K, V, seed=6)][: 1 + states]

    def cast(name, x, dtype):
        """Rounded as the kernels get it; states are float32."""
        state = name in ("initial_state", "S")
        x = x.to(torch.float32 if state else working_dtype)
        dtype = torch.float32 if state and dtype != torch.float64 else dtype
        return x.to(device, dtype).requires_grad_()

    results = []
    for impl, dtype in (("triton", working_dtype), ("reference", torch.float64)):
        given = {name: cast(name, x, dtype) for name, x in inputs.items()}
        out = gated_linear_attention(
            **given, direction=direction, order=visits, output_final_state=states, impl=impl
        )
        out = list(out) if states else [out]
        gradients = torch.autograd.grad(
            out,
            list(given.values()),
            [cast(name, x, dtype).detach() for name, x in zip("oS", incoming, strict=False)],
        )
        results.append(
            {
                "o": out[0].detach(),
                "S": out[-1].detach(),
                **dict(zip(given, gradients, strict=True)),
            }
        )
    return {name: relative_rms(results[0][name], x) for name, x in results[1].items()}


# What a call of gated_norm may bring: keys or gates, a bias, the norm.
NORM_MODES = {
    "plain": {"aug": None, "bias": False},
    "rms, bias": {"aug": None, "norm": "rms"},
    "gate": {},
    "key, rms": {"aug": "k", "norm": "rms", "bias": False},
}


def norm_inputs(
    N, gates="N(0,1)", *, aug="gate", bias=True, B=2, H=2, K=16, V=16, dtype=torch.float32,
    device="cpu",
):  # fmt: skip
    """Tensors by name; projections as slices of one, as a layer has them."""
    one = normal(B, N, H * (2 * V + 2 * K), seed=0)
    sizes = [H * K, H * V, H * K, H * V]
    if aug == "gate":
        one[..., : H * K] = GATES[gates](one[..., : H * K])
    key, output_gate, q, v = (
        x.unflatten(2, (H, -1)) for x in one.to(device, dtype).split(sizes, dim=2)
    )
    given = {"o": normal(B, N, H, V, seed=1), "output_gate": output_gate}
    if bias:
        given["bias"] = normal(H, V, seed=2)
    if aug:
        given |= {"q": q, aug: key, "v": v, "w_aug": normal(H, K, seed=3)}
    return {name: x.to(device, dtype) for name, x in given.items()}


def norm_errors(
    N, gates="half-100-half+8", *, norm="layer", impl="triton", device="cpu",
    working_dtype=torch.float32, **shape,
):  # fmt: skip
    """Relative RMS error of the output and of every gradient of one call against float64."""
    inputs = norm_inputs(N, gates, **shape, dtype=working_dtype, device=device)
    d_y = normal(*inputs["o"].shape, seed=9).to(working_dtype)
    results = []
    for form, dtype in ((impl, working_dtype), ("reference", torch.float64)):
        given = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
        y = gated_norm(**given, norm=norm, impl=form)
        assert y.dtype == dtype
        found = torch.autograd.grad(y, list(given.values()), d_y.to(device, dtype))
        results.append({"y": y.detach(), **dict(zip(given, found, strict=True))})
    return {name: relative_rms(results[0][name], x) for name, x in results[1].items()}


# What a call of depthwise_conv_silu may bring: taps, where they start, a bias.
CONV_MODES = {
    "3x3": {},
    "3x3, bias": {"bias": True},
    "causal": {"taps": (1, 4), "left": 3, "bias": True},
    "backward": {"taps": (1, 4), "left": 0},
    "nine": {"taps": (1, 9), "left": 8},
    "lopsided": {"taps": (2, 3), "left": 0},
    "one": {"taps": (1, 1), "left": 0, "bias": True},
}


def conv_inputs(
    grid=(5, 7), *, taps=(3, 3), left=1, bias=False, B=2, C=20, dtype=torch.float32, device="cpu",
):  # fmt: skip
    """Arguments by name; the map as a slice of a projection."""
    if taps[0] == 1:
        grid = (1, grid[0] * grid[1])
    x = normal(B, *grid, 2 * C, seed=0).to(device, dtype)[..., C:]
    given = {"x": x, "weight": normal(C, *taps, seed=1).to(device, dtype)}
    if bias:
        given["bias"] = normal(C, seed=2).to(device, dtype)
    return given, {"top": taps[0] // 2, "left": left}


def conv_errors(
    grid=(5, 7), *, impl="triton", device="cpu", working_dtype=torch.float32, **shape
):  # fmt: skip
    """Relative RMS error of the output and of every gradient of one call against float64."""
    inputs, padding = conv_inputs(grid, dtype=working_dtype, device=device, **shape)
    d_y = normal(*inputs["x"].shape, seed=9).to(working_dtype)
    results = []
    for form, dtype in ((impl, working_dtype), ("reference", torch.float64)):
        given = {name: t.detach().to(dtype).requires_grad_() for name, t in inputs.items()}
        y = depthwise_conv_silu(**given, **padding, impl=form)
        assert y.dtype == dtype
        found = torch.autograd.grad(y, list(given.values()), d_y.to(device, dtype))
        results.append({"y": y.detach(), **dict(zip(given, found, strict=True))})
    return {name: relative_rms(results[0][name], t) for name, t in results[1].items()}


# What a call of linear_recurrence may bring: one b for each direction, an order.
RECURRENCE_MODES = {
    "forward": {"direction": "forward"},
    "backward": {"direction": "backward"},
    "both": {},
    "both, two": {"per_direction": True},
    "both, order": {"order": True},
    "backward, order": {"direction": "backward", "order": True},
}


def recurrence_errors(
    N, gates="half-100-half+8", *, direction="bidirectional", per_direction=False, order=False,
    B=2, M=2, C=5, impl="triton", device="cpu", working_dtype=torch.float32,
):  # fmt: skip
    """Relative RMS error of the states and of both gradients of one call against float64."""
    lead = [2] if per_direction else []
    # as a slice of a projection
    b = normal(*lead, B, N, M + 1, C, seed=0).to(device, working_dtype)[..., :M, :]
    decay = torch.nn.functional.logsigmoid(GATES[gates](normal(B, N, C, seed=1))) / TAU
    given = {"b": b, "log_decay": decay.to(device, torch.float32)}
    # not contiguous
    visits = torch.stack([torch.randperm(N).int()] * 2, 1)[:, 0].to(device) if order else None
    results = []
    for form, dtype in ((impl, working_dtype), ("reference", torch.float64)):
        double = dtype == torch.float64
        inputs = {
            name: x.detach().to(dtype if name == "b" or double else x.dtype).requires_grad_()
            for name, x in given.items()
        }
        h = linear_recurrence(**inputs, direction=direction, order=visits, impl=form)
        d_h = normal(*h.shape, seed=2).to(working_dtype).to(device, dtype)
        found = torch.autograd.grad(h, list(inputs.values()), d_h)
        results.append({"h": h.detach(), **dict(zip(inputs, found, strict=True))})
    return {name: relative_rms(results[0][name], x) for name, x in results[1].items()}


# Steps before softplus. Steps of e^-100 are below float32's range, and so are products with them:
# where all are, there is no relative error to speak of.
STEP_GATES = [name for name in GATES if name != "all-100"]

# What a call of selective_scan may bring: which tensors come one for each direction, an order.
SCAN_MODES = {
    "forward": {"direction": "forward"},
    "backward, order": {"direction": "backward", "order": True},
    "both": {},
    "both, two": {"own": ("u", "delta", "A", "k", "q", "skip", "delta_bias")},
    "both, two u, order": {"own": ("u",), "order": True},
    "both, plain": {"leave_out": ("skip", "delta_bias")},
}


def scan_inputs(N, gates="N(0,1)", *, B=2, E=5, M=3, own=(), leave_out=(), device="cpu",
                dtype=torch.float32):  # fmt: skip
    """The tensors of a call by name; k and q as slices of one projection, as a layer has them."""
    shapes = {
        "u": (B, N, E), "delta": (B, N, E), "A": (E, M), "k": (B, N, M + 1), "q": (B, N, M),
        "skip": (E,), "delta_bias": (E,),
    }  # fmt: skip
    given = {}
    for i, (name, shape) in enumerate(shapes.items()):
        x = normal(*([2] if name in own else []), *shape, seed=i)
        if name == "delta":
            x = GATES[gates](x)
        if name == "A":
            x = -16 * x.abs()  # to e^-40 for a step of 1
        of_activations = name in ("u", "delta", "k", "q")
        x = x.to(device, dtype if of_activations else torch.float32)
        given[name] = x[..., :M] if name == "k" else x
    return {name: x for name, x in given.items() if name not in leave_out}


def scan_errors(
    N, gates="half-100-half+8", *, direction="bidirectional", order=False, impl="triton",
    device="cpu", working_dtype=torch.float32, **shape,
):  # fmt: skip
    """Relative RMS error of the output and of every gradient of one call against float64."""
    given = scan_inputs(N, gates, device=device, dtype=working_dtype, **shape)
    # not contiguous
    visits = torch.stack([torch.randperm(N).int()] * 2, 1)[:, 0].to(device) if order else None
    results = []
    for form, double in ((impl, working_dtype == torch.float64), ("reference", True)):
        inputs = {
            name: x.detach().to(torch.float64 if double else x.dtype).requires_grad_()
            for name, x in given.items()
        }
        y = selective_scan(**inputs, direction=direction, order=visits, impl=form)
        d_y = normal(*y.shape, seed=9).to(working_dtype).to(device, y.dtype)
        found = torch.autograd.grad(y, list(inputs.values()), d_y)
        results.append({"y": y.detach(), **dict(zip(inputs, found, strict=True))})
    # A gradient that is a product of steps and decays may lie below the normal numbers, 1e-38.
    return {name: relative_rms(results[0][name], x, 1e-30) for name, x in results[1].items()}
