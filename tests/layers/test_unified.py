"""Every gated recurrence as an instance of the unified form, and that each of its five functions
counts."""

import copy
import dataclasses
import re

import pytest
import timm
import torch
from torch import nn

from metala_vision.kernels.gated_linear_attention import DIRECTIONS
from metala_vision.layers import (
    Functions,
    GLAMixer,
    HeadNorm,
    HGRN2Mixer,
    HGRNMixer,
    LinearAttentionMixer,
    LRUMixer,
    MambaMixer,
    MetaLAMixer,
    ReGLAMixer,
    RetNetMixer,
    Shared,
    UnifiedMixer,
    unified,
)
from metala_vision.layers.unified import FUNCTIONS
from metala_vision.layers.unified_instances import BOUNDED, INSTANCES, NO_RECURRENCE
from metala_vision.models import FAMILIES
from tests._numerics import normal, relative_rms
from tests.train._runs import ROOT

C, H = 16, 2
# float64: some hundred roundings of 1e-16, of sums of a dozen terms; found: 8e-16
EXACT = 1e-14
# What a function may be off, relative, and still be noticed: the output is then off by 0.09 to 4
# times as much, a hundred times the tolerance and more.
SLIGHT = 1e-10
GAMMA = torch.linspace(0, 0.9, C, dtype=torch.float64)

CASES = [
    (MetaLAMixer, {}),
    (MetaLAMixer, {"shared_decay": False, "tau": 4.0}),
    (MetaLAMixer, {"key": "projected"}),
    (MetaLAMixer, {"self_aug": False}),
    (MetaLAMixer, {"rope": True}),
    (GLAMixer, {}),
    (GLAMixer, {"shared_decay": False, "average": True, "norm": "rms", "rank": 3}),
    (GLAMixer, {"rope": True}),
    (HGRNMixer, {}),
    (HGRNMixer, {"lower_bound": GAMMA}),
    (HGRN2Mixer, {}),
    (HGRN2Mixer, {"lower_bound": GAMMA, "rope": True}),
    (ReGLAMixer, {}),
    (ReGLAMixer, {"refine": False, "rope": True}),
    (RetNetMixer, {}),
    (RetNetMixer, {"rotary": "none", "value_ratio": 2, "norm": "rms"}),
    (RetNetMixer, {"decay": "transnormer", "layer": 1, "depth": 3}),
    (RetNetMixer, {"rope": True}),
    (LinearAttentionMixer, {}),
    (LinearAttentionMixer, {"feature_map": "relu"}),
    (LinearAttentionMixer, {"rope": True}),
    (LRUMixer, {}),
    (MambaMixer, {}),
    (MambaMixer, {"shared_parameters": True, "average": False}),
    (MambaMixer, {"expand": 1, "d_state": 5, "dt_rank": 3}),
]


def name_of(value):
    return "-".join(value) if isinstance(value, dict) else getattr(value, "__name__", None)


def made(mixer_cls, options, **more):
    """The mixer with random weights, as a function, and as an instance's maker."""
    options = {**options, **more}
    bound = options.pop("lower_bound", None)
    mixer = mixer_cls(C, H, **options, dtype=torch.float64)
    with torch.no_grad():
        for i, parameter in enumerate(mixer.parameters()):
            parameter.copy_(0.5 * normal(*parameter.shape, seed=i))
    own = (lambda x: mixer(x, bound)) if bound is not None else mixer
    if isinstance(mixer, BOUNDED) and bound is None:
        bound = torch.zeros(C, dtype=torch.float64)
    return mixer, own, lambda **kwargs: unified(mixer, bound, **kwargs)


@pytest.mark.parametrize(("mixer_cls", "options"), CASES, ids=name_of)
def test_a_mixer_is_an_instance(mixer_cls, options):
    x = normal(2, 3, 4, C, seed=50)
    for direction in DIRECTIONS:
        if direction != "bidirectional" and not options.get("shared_decay", True):
            continue
        for scans in ("raster", ("column", "spiral")):
            _, own, instance = made(mixer_cls, options, direction=direction, scans=scans)
            expected = own(x).detach()
            for impl in ("loop", "auto"):
                found = instance(impl=impl)(x).detach()
                assert relative_rms(found, expected) <= EXACT, (direction, scans, impl)


@pytest.mark.parametrize("conv", ["causal1d", "none"])
@pytest.mark.parametrize("mixer_cls", INSTANCES, ids=name_of)
def test_behind_any_convolution(mixer_cls, conv):
    _, own, instance = made(mixer_cls, {"conv": conv, "direction": "backward"})
    x = normal(1, 3, 4, C, seed=50)
    assert relative_rms(instance()(x).detach(), own(x).detach()) <= EXACT


def slightly_off(function, num_heads, size):
    """The function with each of its values, of each token, changed by up to `size` of it. A
    constant becomes one for each token and head: a factor for all would be lost in a norm."""

    def changed(x, way):
        given = function(x, way)
        if not isinstance(given, torch.Tensor):
            given = torch.full((*x.shape[:3], num_heads), given, dtype=x.dtype)
        given = given.expand(*x.shape[:3], *given.shape[3:])
        return given * (1 - size * normal(*given.shape, seed=7).abs())

    return changed


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("mixer_cls", "options"), CASES, ids=name_of)
def test_each_function_of_each_instance_counts(mixer_cls, options, name):
    _, own, instance = made(mixer_cls, options)
    x = normal(1, 3, 4, C, seed=50)
    wrong = instance()
    heads = wrong.num_heads if name != "gate" else own(x).shape[3]
    if name == "gate" and mixer_cls is LRUMixer:
        heads = 4 * C  # Re and Im of both passes
    wrong.replace(**{name: slightly_off(getattr(wrong, name), heads, SLIGHT)})
    error = relative_rms(wrong(x).detach(), own(x).detach())
    assert 100 * EXACT < error < 10 * SLIGHT  # and it is a slight error, no failure


@pytest.mark.parametrize(
    ("mixer_cls", "part"),
    [(MetaLAMixer, "direct"), (MambaMixer, "direct"), (LRUMixer, "beside"),
     (LinearAttentionMixer, "normaliser_query"), (LinearAttentionMixer, "normaliser_key")],
    ids=name_of,
)  # fmt: skip
def test_what_stands_beside_the_five_counts_too(mixer_cls, part):
    _, own, instance = made(mixer_cls, {})
    x = normal(1, 3, 4, C, seed=50)
    wrong = instance()
    right = getattr(wrong, part)
    # a factor for all of a query or key counts too: it is a row sum's
    setattr(wrong, part, lambda *args: right(*args) * (1 + SLIGHT))
    assert 10 * EXACT < relative_rms(wrong(x).detach(), own(x).detach()) < 10 * SLIGHT


def test_every_instance_is_compared():
    assert {mixer_cls for mixer_cls, _ in CASES} == set(INSTANCES)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_is_forgotten(family):
    """A new family needs an instance, or to be named as no recurrence."""
    mixer = timm.create_model(f"{family}_nano", depth=1, device="meta").blocks[0].mixer
    assert (type(mixer) in INSTANCES) != (type(mixer) in NO_RECURRENCE)
    if type(mixer) in INSTANCES:
        own = INSTANCES[type(mixer)]
        assert len(own.formulas) == 6 and all(own.formulas)


@pytest.mark.parametrize("mixer_cls", INSTANCES, ids=name_of)
def test_an_instance_trains_the_mixer_it_was_made_of(mixer_cls):
    mixer, own, instance = made(mixer_cls, {})
    made_of_it = instance()
    assert {id(p) for p in made_of_it.parameters()} == {id(p) for p in mixer.parameters()}
    x, weight = normal(1, 3, 4, C, seed=50), normal(1, 3, 4, C, seed=51)
    expected, found = (
        torch.autograd.grad((f(x) * weight).sum(), list(mixer.parameters()))
        for f in (own, made_of_it)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_rms(ours, theirs) <= 100 * EXACT


def test_a_copy_is_a_copy():
    mixer, own, instance = made(HGRN2Mixer, {})
    x, made_of_it = normal(1, 3, 4, C, seed=50), instance()
    before, other = own(x).detach(), copy.deepcopy(made_of_it)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.zero_()
    assert torch.equal(made_of_it(x), own(x))
    assert relative_rms(other(x).detach(), before) <= EXACT


def own_mixer(num_heads=H, **options):
    """Five functions, of two passes that differ, with one decay a head."""
    layers = [nn.Linear(C, n, dtype=torch.float64) for n in (8, 8, C, H, H, C)]

    class Decay(nn.Module):
        def __init__(self):
            super().__init__()
            self.ways = nn.ModuleList(layers[3:5])

        def forward(self, x, way):
            return torch.sigmoid(self.ways[way](x))

    functions = Functions(
        Shared(layers[0]), Shared(layers[1], nn.Softplus()), Shared(layers[2]), Decay(),
        Shared(layers[5], nn.SiLU()),
    )  # fmt: skip
    return UnifiedMixer(functions, C, num_heads, norm=HeadNorm(), **options).double()


@pytest.mark.parametrize("scans", ["raster", ("spiral", "column")], ids=str)
def test_the_operator_is_the_loop(scans):
    torch.manual_seed(0)
    mixer = own_mixer(scans=scans)
    x = normal(2, 3, 4, C, seed=50)
    results = {}
    for mixer.impl in ("loop", "operator"):
        y = mixer(x)
        results[mixer.impl] = [y, *torch.autograd.grad(y.square().sum(), list(mixer.parameters()))]
    assert len(results["loop"]) == 1 + 12 + 2  # y, weights of six layers, the convolution and W_O
    for ours, loop in zip(results["operator"], results["loop"], strict=True):
        assert loop.abs().max() > 0
        assert relative_rms(ours.detach(), loop.detach()) <= 100 * EXACT


def test_passes_with_functions_of_their_own_are_two_mixers():
    torch.manual_seed(0)
    mixer = own_mixer(conv="none")
    mixer.norm, mixer.out = None, nn.Identity()
    mixer.replace(gate=lambda x, way: 1.0)
    x = normal(1, 2, 3, C, seed=50)
    alone = []
    for mixer.direction in ("forward", "backward"):
        alone.append(mixer(x))
    mixer.direction = "bidirectional"
    assert relative_rms(mixer(x).detach(), sum(alone).detach()) <= EXACT
    # the last token alone hears of all; in the other pass, the first
    grown = x.clone()
    grown[:, 0, 0] += 1
    mixer.direction = "backward"
    assert torch.equal(mixer(grown).flatten(1, 2)[:, 1:], alone[1].flatten(1, 2)[:, 1:])


def test_a_decay_of_zero_forgets_and_has_gradients():
    mixer = own_mixer(conv="none", direction="forward")
    decay = torch.zeros((), dtype=torch.float64, requires_grad=True)
    mixer.replace(decay=lambda x, way: decay.expand(*x.shape[:3], H))
    x = normal(1, 1, 5, C, seed=50)
    whole = mixer(x)
    last = mixer(x[:, :, -1:])
    assert relative_rms(whole[:, :, -1:].detach(), last.detach()) <= EXACT
    (gradient,) = torch.autograd.grad(whole.sum(), decay)
    assert torch.isfinite(gradient)


def test_under_autocast_decays_keep_their_precision():
    torch.manual_seed(0)
    mixer = own_mixer(direction="forward", conv="none").float()
    with torch.no_grad():
        mixer.decay.ways[0].bias.fill_(8.0)  # 0.9997: in bfloat16 it is 1
    seen = []
    right = mixer.decay.forward
    mixer.decay.forward = lambda x, way: seen.append(right(x, way)) or seen[-1]
    x = torch.randn(1, 6, 6, C)
    with torch.no_grad():
        expected = mixer(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = mixer(x)
    assert seen[1].dtype == torch.float32 and seen[1].max() < 1
    assert relative_rms(found, expected) <= 2e-2  # some ten roundings of 2^-9 on the way


@pytest.mark.export
@pytest.mark.parametrize("impl", ["loop", "operator"])
def test_compiled_it_is_itself(impl):
    """In one graph, with its gradients; the graph is run by the same operators."""
    torch.manual_seed(0)
    mixer = own_mixer(impl=impl)
    x = normal(2, 2, 3, C, seed=50).requires_grad_()
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    weight = normal(2, 2, 3, C, seed=51)
    inputs = [x, *mixer.parameters()]
    found, expected = (
        [y.detach(), *torch.autograd.grad((y * weight).sum(), inputs)]
        for y in (compiled(x), mixer(x))
    )
    for own, other in zip(found, expected, strict=True):
        assert relative_rms(own, other) <= EXACT


def test_a_gate_may_be_one_a_head():
    mixer = own_mixer(conv="none")
    x, results = normal(1, 2, 3, C), []
    gates = torch.sigmoid(x[..., :H])
    for gate in (gates, gates.unsqueeze(4), gates.repeat_interleave(C // H, 3)):
        mixer.replace(gate=lambda x, way, gate=gate: gate)
        results.append(mixer(x))
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[2])


def test_numbers_that_are_decays():
    mixer = own_mixer(conv="none")
    mixer.replace(query=lambda x, way: 1.0, key=lambda x, way: 1.0)
    for number in (0.999, 0.9j):
        mixer.replace(decay=lambda x, way, number=number: number)
        for x in (normal(1, 2, 3, C), torch.zeros(1, 2, 3, C, dtype=torch.bfloat16)):
            mixer.replace(value=lambda x, way: x)
            assert abs(mixer.parts(x, 0)[3].flatten()[0].item() - number) < 1e-7


def test_what_it_makes_itself_has_the_dtype_asked_for():
    functions = own_mixer().functions
    mixer = UnifiedMixer(functions, C, H, dtype=torch.float64)
    assert {p.dtype for p in mixer.parameters()} == {torch.float64}
    with pytest.raises(ValueError, match=r"^out takes 16 channels, values and norm gave 4; out=nn"):
        mixer.replace(value=lambda x, way: x[..., :4], gate=lambda x, way: 1.0)
        mixer(normal(1, 2, 3, C))


def test_functions_are_kept_as_they_were_given():
    functions = own_mixer().functions
    assert [field.name for field in dataclasses.fields(functions)] == list(FUNCTIONS)
    assert isinstance(functions.query, Shared)


def test_the_example_of_the_documentation_trains():
    text = (ROOT / "docs" / "unified.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.S)
    torch.manual_seed(0)
    names: dict = {}
    exec(example, names)
    assert names["losses"][-1] < 0.5 * names["losses"][0]
    made = names["my_mixer"](8, device="meta", dtype=torch.float64)
    assert all(p.is_meta and p.dtype == torch.float64 for p in made.parameters())
    assert isinstance(names["model"].blocks[0].mixer, UnifiedMixer)
