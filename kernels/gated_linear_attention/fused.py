"""The Triton kernels as a function with gradients: what they take, and where they run.

Triton is imported when a call needs it, never before. Letters as in api.py.
"""

import torch
from torch import Tensor

from metala_vision.kernels._fused import many_or_second, portable_gradients, run
from metala_vision.kernels.gated_linear_attention.chunked import chunked


def precision(q: Tensor) -> str:
    """How products round their operands: DOT in kernels/_triton.py."""
    if q.dtype != torch.float32:
        return "bf16"
    if q.device.type != "cuda" or torch.version.hip is not None:  # Triton has it for NVIDIA alone
        return "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _calls(q, v, k, gate, log_decay, gate_divisor, scale, direction, order) -> list:
    """One call of the kernels; with one decay per direction, one for each."""
    from metala_vision.kernels.gated_linear_attention.triton_states import Call

    if order is not None and order.stride(-1) != 1:
        order = order.contiguous()
    decay = gate if log_decay is None else log_decay
    mode = "none" if decay is None else "gate" if log_decay is None else "log"
    numbers = (gate_divisor, scale)
    if decay is None or decay.dim() == 4:
        return [Call(q, v, k, decay, mode, order, *numbers, direction, precision(q))]
    return [
        Call(q, v, k, decay[i], mode, order, *numbers, way, precision(q))
        for i, way in enumerate(("forward", "backward"))
    ]


def forward(
    q: Tensor,
    v: Tensor,
    k: Tensor | None,
    gate: Tensor | None,
    log_decay: Tensor | None,
    gate_divisor: float,
    scale: float,
    direction: str,
    order: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `chunked`, without autograd; o is contiguous."""
    from metala_vision.kernels.gated_linear_attention.triton_fwd import forward_launches
    from metala_vision.kernels.gated_linear_attention.triton_states import padded

    calls = _calls(q, v, k, gate, log_decay, gate_divisor, scale, direction, order)
    dtype = q.dtype if len(calls) == 1 else torch.float32  # a sum is rounded once
    initial = None if initial_state is None else padded([initial_state], calls[0])
    leaving = padded([None], calls[0]) if output_final_state else None
    outputs = []
    for call in calls:
        o, launches = forward_launches(call, dtype, initial, leaving)
        run(launches, q.device)
        outputs.append(o)
    o = outputs[0] if len(calls) == 1 else (outputs[0] + outputs[1]).to(q.dtype)
    return o, None if leaving is None else _unpadded(leaving[:, 0], q, v)


def backward(
    d_o: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    v: Tensor,
    k: Tensor | None,
    gate: Tensor | None,
    log_decay: Tensor | None,
    gate_divisor: float,
    scale: float,
    direction: str,
    order: Tensor | None,
    initial_state: Tensor | None,
) -> list[Tensor | None]:
    """The gradients of q, v, k, gate, log_decay and initial_state, each in its own dtype; None
    for one that is not there."""
    from metala_vision.kernels.gated_linear_attention.triton_bwd import backward_launches
    from metala_vision.kernels.gated_linear_attention.triton_states import padded

    if d_o.stride(3) != 1 and d_o.shape[3] > 1:  # a sum's gradient, for one
        d_o = d_o.contiguous()
    calls = _calls(q, v, k, gate, log_decay, gate_divisor, scale, direction, order)
    dtype = None if len(calls) == 1 else torch.float32
    initial = leaving = None
    if initial_state is not None or d_final is not None:
        initial = padded([initial_state, d_final], calls[0])
        leaving = torch.empty_like(initial)
    found = []
    for call in calls:
        gradients, launches = backward_launches(call, d_o, dtype, initial, leaving)
        run(launches, q.device)
        found.append(gradients)
    of = {
        name: found[0][name] if len(calls) == 1 else found[0][name] + found[1][name]
        for name in ("q", "k", "v")
        if name in found[0]
    }
    decay = gate if log_decay is None else log_decay
    if decay is not None:
        each = [gradients["decay"] for gradients in found]
        of["gate" if log_decay is None else "log_decay"] = (
            each[0] if len(calls) == 1 else torch.stack(each)
        )
    if initial_state is not None:
        assert leaving is not None
        of["initial_state"] = _unpadded(leaving[:, 1], q, v)
    given = {"q": q, "v": v, "k": k, "gate": gate, "log_decay": log_decay}
    given["initial_state"] = initial_state
    return [
        None if x is None or name not in of else of[name].to(x.dtype) for name, x in given.items()
    ]


def _unpadded(states: Tensor, q: Tensor, v: Tensor) -> Tensor:
    """States [B * H, state] as [B, H, K, V]."""
    B, _, H, K = q.shape
    return states.unflatten(0, (B, H))[:, :, :K, : v.shape[3]].contiguous()


class Fused(torch.autograd.Function):
    """Saves its inputs alone, which their projections hold anyway."""

    @staticmethod
    def forward(
        ctx, q, v, k, gate, log_decay, initial_state, order, gate_divisor, scale, direction,
        output_final_state,
    ):  # fmt: skip
        ctx.save_for_backward(q, v, k, gate, log_decay, initial_state, order)
        ctx.options = (gate_divisor, scale, direction)
        ctx.with_final = output_final_state
        o, final = forward(
            q, v, k, gate, log_decay, *ctx.options, order, initial_state, output_final_state
        )
        return (o, final) if output_final_state else o

    @staticmethod
    def backward(ctx, d_o, d_final=None):  # type: ignore[override] # torch declares (ctx, *grads)
        *tensors, order = ctx.saved_tensors
        q, v, k, gate, log_decay, initial_state = tensors
        if many_or_second(d_o, d_final):
            gradients = portable_gradients(
                lambda q, v, k, gate, log_decay, initial_state: chunked(
                    q, v, k, gate, log_decay, *ctx.options, order, initial_state, ctx.with_final
                ),
                (d_o, d_final), tensors, ctx.needs_input_grad,
            )  # fmt: skip
        else:
            gradients = backward(
                d_o, d_final, q, v, k, gate, log_decay, *ctx.options, order, initial_state
            )
        return *gradients, None, None, None, None, None
