"""The rotating recurrences: complex states whose phase does not depend on the data.

    h_t = a_t e^(i theta) h_{t-1} + u_t

With h_t = e^(i theta t) z_t the phase goes: z_t = a_t z_{t-1} + e^(-i theta t) u_t, a real
recurrence of real and imaginary part. From the last token on, theta changes its sign.

B batch, N tokens, C channels, D directions. Complex numbers are [..., 2, C], real part first.
"""

import torch
from timm.layers import register_notrace_function
from torch import Tensor

from metala_vision.kernels.linear_recurrence import linear_recurrence_op

from .scan import inverse


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., 2, C] times cos + i sin [..., C]."""
    re, im = x.select(-2, 0), x.select(-2, 1)
    return torch.stack([re * cos - im * sin, re * sin + im * cos], -2)


def _angles(theta: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of steps [N] times theta [C], [N, C]; angles of many turns, so in float64."""
    wide = theta if theta.device.type == "mps" else theta.double()
    angle = steps.to(wide.dtype).unsqueeze(1) * wide
    return angle.cos().to(theta.dtype), angle.sin().to(theta.dtype)


def _along(
    u: Tensor, log_decay: Tensor, theta: Tensor, direction: str, order: Tensor | None
) -> Tensor:
    """`rotating_recurrence` along one order [N]."""
    N = u.shape[1]
    steps = torch.arange(N, device=u.device)
    if order is not None:
        steps = inverse(order)
    both = direction == "bidirectional"
    turned: list[Tensor] = []
    backs: list[tuple[Tensor, Tensor]] = []
    for i in range(theta.shape[0]):
        reverse = direction == "backward" or i == 1
        cos, sin = _angles(-theta[i] if reverse else theta[i], steps)
        turned.append(_turn(u, cos, -sin))
        backs.append((cos, sin))
    into = torch.stack(turned) if both else turned[0]
    z = linear_recurrence_op(into, log_decay, direction, order)
    if not both:
        z = z.unsqueeze(0)
    return torch.stack([_turn(z[i], backs[i][0], backs[i][1]) for i in range(len(backs))])


@register_notrace_function
def rotating_recurrence(
    u: Tensor, log_decay: Tensor, theta: Tensor, direction: str, order: Tensor | None
) -> Tensor:
    """The states h [D, B, N, 2, C] of each direction, forward first; float32, or float64 for u's.

    u [B, N, 2, C], log_decay [B, N, C], theta [D, C], order [N], or [G, N] for G groups of
    channels.
    """
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    u, log_decay, theta = u.to(dtype), log_decay.to(dtype), theta.to(dtype)
    if order is None or order.dim() == 1:
        return _along(u, log_decay, theta, direction, order)
    G = order.shape[0]
    E = u.shape[3] // G
    groups: list[Tensor] = []
    for i in range(G):
        part = slice(i * E, i * E + E)
        groups.append(
            _along(u[..., part], log_decay[..., part], theta[:, part], direction, order[i])
        )
    return torch.cat(groups, 4)
