"""What the portable forms share: plain scriptable PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def plainly_eager(x: Tensor) -> bool:
    """Whether eager Python computes with x itself: under no compiler, transform or tracer."""
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0  # fake tensors, counters of operations
        and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None  # make_fx
        and torch.autograd.forward_ad._current_level < 0
    )


def may_keep(x: Tensor) -> bool:
    """Whether a tensor made beside x may serve later calls: it is real, and no CUDA graph's."""
    return plainly_eager(x) and not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def in_place(x: Tensor) -> bool:
    """Whether what is made on the way may be written over: eager inference.

    A new tensor costs a CPU as much as the operation that fills it.
    """
    if torch.jit.is_scripting():
        return False
    else:  # the compiler of scripts reads no further
        return not torch.is_grad_enabled() and plainly_eager(x)


def decay_and_key(gate: Tensor, gate_divisor: float) -> tuple[Tensor, Tensor]:
    """log alpha = logsigmoid(gate) / gate_divisor, and the key 1 - alpha.

    In float32, or float64 for a float64 gate: a 16-bit alpha near 1 would lose the key.
    """
    dtype = torch.float64 if gate.dtype == torch.float64 else torch.float32
    log_decay = F.logsigmoid(gate.to(dtype))
    if in_place(gate):
        log_decay.div_(gate_divisor)
        return log_decay, torch.expm1(log_decay).neg_()
    log_decay = log_decay / gate_divisor
    return log_decay, key_of(log_decay)


def key_of(log_decay: Tensor) -> Tensor:
    """1 - exp(log_decay), exact near 0 and near 1, and so is its derivative."""
    exact = -torch.expm1(log_decay)
    if not torch.is_grad_enabled():
        return exact
    # autograd takes expm1's derivative from its result: 0 instead of alpha where alpha < eps
    key = 1.0 - log_decay.exp()
    return key + (exact - key).detach()
