"For any network, plan and seed: cutting equals silencing, spec and file bring it back."
import tempfile
from dataclasses import replace
from pathlib import Path
import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch.testing import assert_close
from kesi import paper
from kesi.macs import count
from kesi.models import Spec, build, load, read_spec, save
from kesi.pruning import (cost_of, keep_filters, narrow, prune_filters, prune_weights, rates_for,
                          sparsity, widen, zero_filters)
from kesi.runtime import generator

SMALL = ('resnet8', 'resnet14', 'preresnet11', 'preresnet20', 'wrn_10_1', 'wrn_10_2', 'wrn_16_1',
         'vgg16', 'resnet18', 'resnet34')

def quick(n):
    return settings(max_examples=n, deadline=None, derandomize=True,
                    suppress_health_check=list(HealthCheck))

@st.composite
def specs(draw, archs=SMALL):
    "A spec of a small network: widths from 1 to 12 (VGG's and ResNet-18's full ones are slow)."
    arch = draw(st.sampled_from(archs))
    n = len(paper.full_widths(arch))
    widths = draw(st.lists(st.integers(1, 12), min_size=n, max_size=n))
    classes, channels = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    return Spec(arch, tuple(widths), num_classes=classes, in_channels=channels)

@st.composite
def plans(draw, spec):
    "Rates that leave something of every layer: one for all, one per stage, or one per width."
    def rate(width): return st.floats(0, .999).filter(lambda r: int(width * (1 - r)) >= 1)
    kind, stages = draw(st.sampled_from(('all', 'stage', 'width'))), paper.stages(spec.arch)
    if kind == 'all': return draw(rate(min(spec.widths)))
    if kind == 'width': return tuple(draw(rate(w)) for w in spec.widths)
    starts = [sum(stages[:i]) for i in range(len(stages))]
    return tuple(draw(rate(min(spec.widths[i:i + n]))) for i, n in zip(starts, stages))

def shaken(spec, seed):
    "A network in double precision, for evaluation, with norms away from their initial values."
    net, g = build(spec, seed).double().eval(), generator('shaken', seed)
    for t in net.state_dict().values():
        if t.ndim == 1: t.copy_(torch.rand(t.shape, generator=g, dtype=t.dtype) + .5)
    return net

def images(spec, seed, size):
    shape = 2, spec.in_channels, size, size
    return torch.randn(shape, dtype=torch.float64, generator=generator('images', seed))

def same(a, b): assert_close(a, b, rtol=0, atol=1e-10 * max(1., b.abs().max().item()))

@quick(50)
@given(st.data(), specs(), st.integers(0, 2**32), st.sampled_from((16, 17, 20)))
@torch.no_grad()
def test_pruned_equals_zeroed_and_can_be_saved(data, spec, seed, size):
    net, rates = shaken(spec, seed), data.draw(plans(spec))
    x, before = images(spec, seed, size), {n: t.clone() for n, t in net.state_dict().items()}
    keep, small = keep_filters(net, rates), prune_filters(net, rates)
    logits = small(x)
    same(logits, zero_filters(net, keep)(x))
    widths = paper.shrink(spec.widths, paper.expand(spec.arch, rates))
    assert small.spec == replace(spec, widths=widths)
    for n, t in net.state_dict().items():
        assert torch.equal(t, before[n]), f'{n} of the big network was changed'
    rebuilt = build(small.spec).double().eval()
    rebuilt.load_state_dict(small.state_dict())
    assert torch.equal(rebuilt(x), logits)
    with tempfile.TemporaryDirectory() as d:
        path = save(small, Path(d) / 'net.safetensors')
        again = load(path)
        assert read_spec(path) == again.spec == small.spec and not again.training
        assert torch.equal(again(x), logits)

@quick(40)
@given(st.data(), specs(), st.integers(0, 2**32))
@torch.no_grad()
def test_any_choice_of_filters(data, spec, seed):
    "Any filters may be kept, other ones in units of one width; widening brings them back."
    net, x = shaken(spec, seed), images(spec, seed, 16)
    counts, g = [data.draw(st.integers(1, w)) for w in spec.widths], generator('keep', seed)
    def some(width): return torch.randperm(spec.widths[width], generator=g)[:counts[width]]
    keep = [some(u.width).sort().values for u in net.units()]
    small = narrow(net, keep)
    assert small.spec.widths == tuple(counts)
    same(small(x), zero_filters(net, keep)(x))
    back = widen(small, spec.widths, keep)
    same(back(x), small(x))
    again = narrow(back, keep).state_dict().values()
    for a, b in zip(again, small.state_dict().values(), strict=True): assert torch.equal(a, b)

@quick(30)
@given(specs(), st.integers(0, 2**32), st.integers(2, 4))
@torch.no_grad()
def test_pruning_twice_ranks_what_is_left(spec, seed, times):
    net, gentle = shaken(replace(spec, widths=tuple(w + 8 for w in spec.widths)), seed), .2
    for _ in range(times):
        scores = [net.get_parameter(f'{u.conv}.weight').abs().sum((1, 2, 3)) for u in net.units()]
        for s, k in zip(scores, keep_filters(net, gentle), strict=True):
            gone = torch.ones(len(s), dtype=torch.bool).index_fill_(0, k, False)
            assert not gone.any() or s[gone].max() <= s[k].min() + 1e-12
            assert torch.equal(k, k.sort().values)
        net = prune_filters(net, gentle)

@quick(25)
@given(specs(), st.integers(0, 2**32), st.floats(0, .999))
@torch.no_grad()
def test_weight_pruning(spec, seed, share):
    net = build(spec, seed)
    sparse = prune_weights(net, share)
    total = sum(m.weight.numel() for m in net.modules() if isinstance(m, torch.nn.Conv2d))
    assert sparse.spec == spec and round(sparsity(sparse) * total) == int(total * share)
    again = prune_weights(sparse, share)                  # the zeros are the smallest weights now
    assert round(sparsity(again) * total) == int(total * share)

@quick(15)
@given(specs(), st.sampled_from((16, 20)))
def test_exact_costs(spec, size):
    "The cost that is computed from widths is the one that is counted."
    is_wide = spec.arch in ('vgg16', 'resnet18', 'resnet34')      # their full widths would be slow
    widths = tuple(w + 3 for w in spec.widths) if is_wide else paper.full_widths(spec.arch)
    whole, c = replace(spec, widths=widths), count(spec, size)
    for of in ('macs', 'params'):
        assert cost_of(whole, size, of)(spec.widths) == getattr(c, of)

@pytest.mark.parametrize('target', ({'macs': .6}, {'macs': .9}, {'params': .6}))
@pytest.mark.parametrize('arch', ('resnet20', 'preresnet29', 'wrn_16_2', 'vgg16', 'resnet18'))
def test_rates_reach_the_target_and_not_much_more(arch, target):
    (of, share), = target.items()
    rates = rates_for(arch, size=32, iterations=3, **target)
    widths = paper.full_widths(arch)
    for _ in range(3): widths = paper.shrink(widths, rates)
    cost = cost_of(Spec(arch), 32, of)
    left = cost(widths) / cost(paper.full_widths(arch))
    assert share - .1 < left <= share
    assert all((r > 0) == (p > 0) for r, p in zip(rates, paper.plan(arch), strict=True))
