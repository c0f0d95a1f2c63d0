"What cannot be pruned or read is refused with a clear error, and no file ever runs code."
import os, pickle, zipfile
from urllib.error import URLError
import numpy as np, pytest, torch, torchvision
import authors
from kesi import paper
from kesi.models import Spec, build, from_authors, load, pretrained, save
from kesi.paper import UserError
from kesi.pruning import keep_filters, narrow, prune_filters, prune_weights, rates_for, widen
from kesi.runtime import DamagedFile, KesiError

EXPECTED = 'ignore:Detected pickle protocol', 'ignore:Validating sparse tensor'
pytestmark = pytest.mark.filterwarnings(*EXPECTED)

# Plans

@pytest.mark.parametrize('arch', ('resnet8', 'preresnet11', 'wrn_10_1', 'vgg16', 'resnet18'))
def test_rates_that_empty_a_layer(arch):
    narrow_spec = Spec(arch, (2,) * len(paper.full_widths(arch)))
    for rates in (.9, [.9] * len(paper.stages(arch)), [0.] * (len(narrow_spec.widths) - 1) + [.6]):
        with pytest.raises(UserError, match='would remove all 2 filters of width .*at least one'):
            prune_filters(build(narrow_spec), rates)
    with pytest.raises(UserError, match='would remove all'):
        paper.Recipe(arch=arch, rates=(.9,), iterations=5)

def test_from_64_at_rate_03_ten_prunings_leave_nothing():
    assert min(paper.Recipe(arch='resnet56', iterations=9).widths(9)) >= 1
    with pytest.raises(UserError, match='at least one'):
        paper.Recipe(arch='resnet56', iterations=10)

@pytest.mark.parametrize('arch', ('resnet8', 'preresnet11', 'wrn_10_1', 'vgg16', 'resnet18'))
def test_plans_of_the_wrong_length(arch):
    net, stages, widths = build(Spec(arch)), len(paper.stages(arch)), len(paper.full_widths(arch))
    for n in {0, 2, stages - 1, stages + 1, widths + 1} - {1, stages, widths}:
        with pytest.raises(UserError, match=f'{arch} takes 1 rate for all, .*got {n}$'):
            prune_filters(net, [.1] * n)
    keep = keep_filters(net, .5)
    with pytest.raises(UserError, match=f'has {len(keep)} units'): narrow(net, keep[:-1])
    with pytest.raises(UserError, match=f'has {widths} widths'): widen(net, net.spec.widths[1:])

@pytest.mark.parametrize('rate', (-.1, 1., 1.5, float('nan'), float('inf'), '0.1', None, True))
def test_rates_that_are_no_rates(rate):
    net = build(Spec('resnet8'))
    with pytest.raises(UserError, match='from 0 to below 1'): prune_filters(net, [rate] * 3)
    with pytest.raises(UserError, match='from 0 to below 1'): prune_weights(net, rate)

def test_units_of_one_width_keep_equally_many():
    net = build(Spec('preresnet11'))
    keep = [k.clone() for k in keep_filters(net, .5)]
    keep[1] = keep[1][:-1]
    with pytest.raises(UserError, match='share a width'): narrow(net, keep)

def test_targets_out_of_reach():
    for arch in ('resnet8', 'vgg16'):
        with pytest.raises(UserError, match='out of reach'): rates_for(arch, macs=.02)
    for bad in ({},
                {'macs': .5, 'params': .5},
                {'macs': 0},
                {'macs': 1},
                {'params': 35},
                {'macs': 'half'},
                {'macs': True},
                {'macs': .5, 'rates': 0.}):
        with pytest.raises(UserError): rates_for('resnet8', **bad)

# Files

@pytest.fixture(scope='module')
def good():
    state = build(Spec('resnet20')).state_dict()
    return {'cfg': list(paper.full_widths('resnet20')), 'state_dict': state}

@pytest.fixture
def path(tmp_path): return tmp_path / 'model_best.pth.tar'

def refused(path, arch='resnet20', error=DamagedFile, match=None):
    with pytest.raises(error, match=match) as e: from_authors(path, arch)
    assert str(path) in str(e.value) and len(str(e.value)) < 500
    return str(e.value)

@pytest.mark.parametrize('content', (
    pytest.param(b'', id='empty'),
    pytest.param(b'not a checkpoint', id='text'),
    pytest.param(b'\x80\x04.', id='truncated'),
    pytest.param(bytes(range(256)) * 4, id='bytes'),
    pytest.param(b'PK\x03\x04' + bytes(100), id='zip'),
    pytest.param(b'{"cfg": [1, 2]}', id='json'),
    pytest.param(b'\x80\x02}q\x00.', id='dict')))
def test_not_a_checkpoint(path, content):
    path.write_bytes(content)
    refused(path)

@pytest.mark.parametrize('content', (
    [1, 2],
    3,
    'text',
    None,
    torch.zeros(3),
    {},
    {'cfg': [16] * 9},
    {'state_dict': None},
    {'state_dict': {}},
    {'state_dict': [1]},
    {'state_dict': {'conv1.weight': 1}},
    {'state_dict': {3: torch.zeros(1)}}), ids=str)
def test_a_pickle_of_something_else(path, content):
    torch.save(content, path)
    refused(path, match='state_dict')

def test_a_damaged_file(path, good):
    torch.save(good, path)
    whole = path.read_bytes()
    for cut in (10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:cut])
        refused(path)

def test_a_file_of_ours(path):
    save(build(Spec('resnet20')), path)
    refused(path)

def test_one_of_theirs_is_none_of_ours(path, good):
    torch.save(good, path)
    with pytest.raises(DamagedFile, match='not a network saved by kesi'): load(path)

def test_missing(path, tmp_path):
    refused(path, error=UserError, match='there is no file')
    with pytest.raises(UserError): from_authors(tmp_path, 'resnet20')

NAMED = 'resnet56', 'vgg16', 'resnet18', 'wrn_16_8'

@pytest.mark.parametrize('is_a', authors.ARCHS)
def test_another_architecture(path, is_a):
    spec = Spec('wrn_16_8', (4,) * 6) if is_a == 'wrn_16_8' else Spec(is_a)
    torch.save({'state_dict': build(spec).state_dict()}, path)
    for said in set(NAMED) - {is_a}:
        refused(path, said, UserError, f'does not hold a {said}: its layers are those of {is_a}')

def test_the_same_layers_in_other_sizes(path):
    torch.save({'state_dict': build(Spec('wrn_16_2')).state_dict()}, path)
    refused(path, 'wrn_16_8', UserError, 'has shape .* instead of')
    refused(path, 'wrn_28_10', UserError, 'does not hold a wrn_28_10')

def test_unknown_names(path, good):
    with pytest.raises(UserError, match='unknown network'): from_authors(path, 'resnet57')
    torch.save({'state_dict': {**good['state_dict'], 'fc.extra': torch.zeros(1)}}, path)
    refused(path, error=UserError, match="unknown, such as 'fc.extra'")
    rest = {n: t for n, t in good['state_dict'].items() if n != 'fc.bias'}
    torch.save({'state_dict': rest}, path)
    refused(path, error=UserError, match="missing .*'fc.bias'")

@pytest.mark.parametrize('cfg', ([16] * 8, [15] + [16] * 8, 'sixteen', 16, {'0': 16}, []), ids=str)
def test_a_cfg_that_contradicts_the_tensors(path, good, cfg):
    torch.save({**good, 'cfg': cfg}, path)
    refused(path, match='contradicts itself')

def test_widths_that_contradict_each_other(path):
    state = build(Spec('preresnet11')).state_dict()
    state['layer2.0.conv1.weight'] = state['layer2.0.conv1.weight'][:-1].clone()
    torch.save({'state_dict': state}, path)
    refused(path, 'preresnet11', UserError, 'has shape')

def test_tensors_of_the_wrong_kind(path, good):
    for bad in (torch.zeros(16), torch.zeros(16, 3, 3, 3).to_sparse(), torch.zeros(0, 3, 3, 3)):
        torch.save({'state_dict': {**good['state_dict'], 'conv1.weight': bad}}, path)
        with pytest.raises((UserError, DamagedFile)): from_authors(path, 'resnet20')

def test_what_else_the_files_hold_is_ignored(path, good):
    "Optimizer state, accuracies, half precision; files from before norms counted their batches."
    net = build(Spec('resnet20'))
    opt = torch.optim.SGD(net.parameters(), lr=.1, momentum=.9)
    net(torch.zeros(2, 3, 16, 16)).sum().backward()
    opt.step()
    state = {n: t for n, t in good['state_dict'].items() if not n.endswith('num_batches_tracked')}
    more = {'best_prec1': torch.tensor(.9), 'acc': 93.1, 'epoch': 3, 'arch': 'x'}
    torch.save({**good, 'state_dict': state, 'optimizer': opt.state_dict(), **more}, path)
    again = from_authors(path, 'resnet20')
    assert again.bn1.num_batches_tracked == 0
    assert torch.equal(again.fc.weight, good['state_dict']['fc.weight'])
    halved = lambda t: t.half() if t.is_floating_point() else t
    torch.save({'state_dict': {n: halved(t) for n, t in good['state_dict'].items()}}, path)
    assert {p.dtype for p in from_authors(path, 'resnet20').parameters()} == {torch.float32}

# Code in files

class Attack:
    "A pickle of this calls a function when it is opened without care."
    def __init__(self, call, *args): self.call, self.args = call, args
    def __reduce__(self): return self.call, self.args

@pytest.mark.parametrize('where', ('alone', 'extra', 'cfg', 'state_dict', 'tensor', 'name'))
@pytest.mark.parametrize('call', ('mkdir', 'system', 'exec'))
def test_no_code_is_run(path, tmp_path, good, call, where):
    trap = tmp_path / 'sprung'
    attack = {'mkdir': Attack(os.mkdir, str(trap)),
              'system': Attack(os.system, f'touch {trap}'),
              'exec': Attack(exec, f'open({str(trap)!r}, "w")')}[call]
    content = {'alone': attack,
               'extra': {**good, 'extra': attack},
               'cfg': {**good, 'cfg': attack},
               'state_dict': {**good, 'state_dict': attack},
               'tensor': {**good, 'state_dict': {**good['state_dict'], 'fc.bias': attack}},
               'name': {**good, 'best': {'deep': [attack]}}}[where]
    torch.save(content, path)
    assert 'Nothing was run' in refused(path, match='would run code') and not trap.exists()
    with open(path, 'wb') as f:
        pickle.dump(content, f)                       # a bare pickle, not torch's archive
    refused(path)
    assert not trap.exists()
    torch.save(content, path, _use_new_zipfile_serialization=False)           # torch's old format
    refused(path)
    assert not trap.exists()
    torch.load(path, weights_only=False)                             # and the trap was a real one
    assert trap.exists()

def test_a_whole_module_is_code_too(path):
    torch.save({'state_dict': build(Spec('resnet8'))}, path)
    assert 'would run code' in refused(path)

def test_an_archive_of_something_else(path):
    with zipfile.ZipFile(path, 'w') as z: z.writestr('archive/readme', 'hello')
    refused(path)
    np.savez(path.with_suffix('.npz'), a=np.zeros(3))
    refused(path.with_suffix('.npz'))

# A start from ImageNet

def test_pretrained_refuses_what_does_not_fit():
    for spec in (Spec('resnet56'), Spec('resnet18', (64,) * 8), Spec('resnet18', in_channels=1)):
        with pytest.raises(UserError, match='ImageNet'): pretrained(spec, state={})

@pytest.mark.parametrize('arch', ('resnet18', 'resnet34'))
def test_pretrained_asks_torchvision(monkeypatch, arch):
    asked, theirs = [], torchvision.models.get_model(arch)
    def answer(self, **options):
        asked.append((self.url, options))
        return theirs.state_dict()
    monkeypatch.setattr(torchvision.models.WeightsEnum, 'get_state_dict', answer)
    for classes in (1000, 200):
        own = pretrained(Spec(arch, num_classes=classes), seed=1)
        found = own.state_dict()
        for n, t in theirs.state_dict().items():
            if classes == 1000 or not n.startswith("fc."): assert torch.equal(found[n], t), n
    assert own.training and own.fc.weight.shape == (200, 512)
    assert len(asked) == 2
    url, options = asked[0]
    assert f'{arch}-' in url and options['check_hash'] and options['weights_only']

class Code:
    "A pickle of it writes a file when it is read."
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return open, (self.path, 'w')

@pytest.mark.parametrize('bad', ['empty', 'text', 'code'])
def test_pretrained_from_a_bad_file(monkeypatch, tmp_path, bad):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    home = tmp_path/'hub'/'checkpoints'
    home.mkdir(parents=True)
    file = home/torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url.rsplit('/')[-1]
    if bad == 'code': torch.save({'conv1.weight': Code(tmp_path/'written')}, file)
    else: file.write_bytes(b'' if bad == 'empty' else b'no weights')
    with pytest.raises(KesiError, match='put that file into .*checkpoints'):
        pretrained(Spec('resnet18'))
    assert not (tmp_path/'written').exists()

def test_pretrained_without_a_connection(monkeypatch):
    def answer(self, **options): raise URLError('no route to host')
    monkeypatch.setattr(torchvision.models.WeightsEnum, 'get_state_dict', answer)
    said = 'cannot get the ImageNet weights from https.*no route to host'
    with pytest.raises(KesiError, match=said): pretrained(Spec('resnet18'))
