"""The Triton kernels as a function with gradients: what they take, and where they run.

Triton is imported when a call needs it, never before. Letters as in api.py.
"""

from functools import cache

import torch
from torch import Tensor

from metala_vision.kernels.gated_linear_attention.chunked import chunked


@cache
def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU (TRITON_INTERPRET=1)."""
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)


@cache
def runs_on(device: torch.device) -> bool:
    """Whether there are kernels for a device: a GPU of compute capability 8.0 on, or AMD's."""
    if device.type == "cpu":
        return interpreted()
    # The interpreter would take a GPU's tensors too, and multiply 16-bit ones wrongly.
    if device.type != "cuda" or not torch.cuda.is_available() or interpreted():
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def why_not(
    q: Tensor,
    k: Tensor | None,
    gate: Tensor | None,
    order: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> str:
    """What of a call the kernels do not take, in words; nothing if they take it."""
    if q.dtype == torch.float64 or (gate is not None and gate.dtype == torch.float64):
        return "float64"
    if k is not None:
        return "a key"
    if gate is None:
        return "log_decay"
    if gate.dim() == 5:
        return "one gate per direction"
    if order is not None:
        return "an order"
    if initial_state is not None or output_final_state:
        return "states"
    if q.device.type == "cpu" and q.dtype != torch.float32:
        return f"{q.dtype} in Triton's interpreter"
    return ""


def precision(q: Tensor) -> str:
    """How products round their operands: DOT in kernels/_triton.py."""
    if q.dtype != torch.float32:
        return "bf16"
    if q.device.type != "cuda" or torch.version.hip is not None:  # Triton has it for NVIDIA alone
        return "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def forward(
    q: Tensor, v: Tensor, gate: Tensor, gate_divisor: float, scale: float, direction: str
) -> Tensor:
    """o [B, N, H, V] in q's dtype, contiguous; without autograd."""
    from metala_vision.kernels.gated_linear_attention.triton_fwd import forward_launches

    o, launches = forward_launches(q, v, gate, gate_divisor, scale, direction, precision(q))
    _run(launches, q.device)
    return o


def backward(
    d_o: Tensor,
    q: Tensor,
    v: Tensor,
    gate: Tensor,
    gate_divisor: float,
    scale: float,
    direction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, v and gate, contiguous, each in the dtype of its own."""
    from metala_vision.kernels.gated_linear_attention.triton_bwd import backward_launches

    if d_o.stride(3) != 1:  # a sum's gradient, for one
        d_o = d_o.contiguous()
    gradients, launches = backward_launches(
        d_o, q, v, gate, gate_divisor, scale, direction, precision(q)
    )
    _run(launches, q.device)
    return gradients


def _run(launches, device: torch.device) -> None:
    if device.type == "cpu":
        for launch in launches:
            launch.run()
        return
    with torch.cuda.device(device):  # Triton launches on the current one
        for launch in launches:
            launch.run()


class Fused(torch.autograd.Function):
    """Saves q, v and gate alone, which their projections hold anyway."""

    @staticmethod
    def forward(ctx, q, v, gate, gate_divisor, scale, direction):
        ctx.save_for_backward(q, v, gate)
        ctx.options = (gate_divisor, scale, direction)
        return forward(q, v, gate, *ctx.options)

    @staticmethod
    def backward(ctx, d_o):  # type: ignore[override]
        q, v, gate = ctx.saved_tensors
        many = torch._C._functorch.is_legacy_batchedtensor(d_o)  # is_grads_batched
        if torch.is_grad_enabled() or many or torch._C._are_functorch_transforms_active():
            # For a second derivative, or many gradients at once: the portable form.
            create_graph = torch.is_grad_enabled()
            wanted = [x for x, n in zip((q, v, gate), ctx.needs_input_grad, strict=False) if n]
            with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
                o, _ = chunked(q, v, None, gate, None, *ctx.options, None, None, False)
                found = torch.autograd.grad(o, wanted, d_o, create_graph=create_graph)
            made = iter(found)
            gradients = [next(made) if n else None for n in ctx.needs_input_grad[:3]]
        else:
            gradients = backward(d_o, q, v, gate, *ctx.options)
        return *gradients, None, None, None
