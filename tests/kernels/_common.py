"""What tests of kernels, of their nodes in compiled graphs and of their gradients share."""

import pytest
import torch

from tests._numerics import SAME, relative_rms

INTERPRETER = [
    pytest.mark.interpreter,
    # Triton's interpreter on `range` of a kernel's number.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]
not_taken = pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.float64, "impl='triton' does not take float64; accepted: auto, portable"),
        (torch.float16, r"does not take torch\.float16 in Triton's interpreter"),
    ],
)
one_node = pytest.mark.skipif(
    not hasattr(torch.compiler, "_is_exporting_flag"),
    reason="before torch 2.7 a compilation cannot be told from an export, and inlines the tree",
)


def graph_of(function, *arguments):
    """The graphs that torch.compile makes of a call, as text, and the call's result."""
    graphs = []
    torch.compiler.reset()

    def keep(module, example):
        graphs.append(str(module.graph))
        return module

    result = torch.compile(function, fullgraph=True, backend=keep)(*arguments)
    return "".join(graphs), result


def assert_inlined(node, step, given):
    """Exports, which have to run without this package, and functional gradients do not hold the
    node. step: of the tensors given, by name."""
    plain = {name: x.detach() for name, x in given.items()}

    class Module(torch.nn.Module):
        def forward(self, tensors):
            return step(tensors)

    for strict in (False, True):
        assert node not in str(torch.export.export(Module(), (plain,), strict=strict).graph)
    gradient = torch.func.grad(lambda x: step(x).square().sum())
    found = torch.compile(gradient, fullgraph=True, backend="aot_eager")(plain)
    expected = gradient(plain)
    assert all(relative_rms(found[name], expected[name]) <= SAME for name in plain)


def assert_second_derivatives_refused(name, step, x):
    """A RuntimeError from the compiled operator `name`, not zeros. step: of nothing; x: one of the
    tensors that it reads."""
    loss = torch.compile(lambda: step().square().sum(), backend="eager")()
    with pytest.raises(
        RuntimeError, match=f"{name} has no second derivatives; leave it uncompiled"
    ):
        torch.autograd.grad(loss, [x], create_graph=True)


def every_gradient(y, inputs, of):
    """Of a loss of y: first gradients, made with a graph, and second ones; of y two at once, of
    the input `of`."""
    wide = y.float() if y.element_size() == 2 else y
    first = torch.autograd.grad(wide.square().sum(), inputs, create_graph=True)
    penalty = sum(x.square().sum() for x in first)
    second = torch.autograd.grad(penalty, inputs, retain_graph=True)
    several = torch.stack([torch.ones_like(y), -torch.ones_like(y)])
    (many,) = torch.autograd.grad(y, of, several, is_grads_batched=True)
    return [*(x.detach() for x in first), *second, many]


def assert_close(ours, others, limit):
    """Each tensor to its partner."""
    for a, b in zip(ours, others, strict=True):
        assert relative_rms(a, b) <= limit
