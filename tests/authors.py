"""Files in the format of the paper's authors, with weights that follow from the tensors' names
(see data/golden/README.md)."""
import functools, json, zlib
from pathlib import Path
import numpy as np, torch

GOLDEN = Path(__file__).parent / 'data' / 'golden'
# Networks of which the authors' logits are known, and of which only tensor names and shapes are
WITH_VALUES = ('resnet56', 'vgg16')
BY_NAME = ('resnet110', 'preresnet164', 'wrn_16_8', 'resnet18', 'resnet34')
ARCHS = WITH_VALUES + BY_NAME

def facts(arch):
    folder = GOLDEN if arch in WITH_VALUES else GOLDEN / 'names'
    return json.loads((folder / f'{arch}.json').read_text())

def tensor(arch, name, shape):
    "The tensor of that name."
    g = np.random.RandomState(zlib.crc32(f'{arch}/{name}'.encode()))
    if name.endswith('num_batches_tracked'): return torch.tensor(7)
    variances = (.5, 1.5) if arch == 'vgg16' else (2, 6)
    if name.endswith('running_mean'): v = g.standard_normal(shape) * .1
    elif name.endswith('running_var'): v = g.uniform(*variances, shape)
    elif len(shape) == 1 and name.endswith('weight'): v = g.uniform(.5, 1.5, shape)
    elif len(shape) == 1: v = g.standard_normal(shape) * .1
    elif len(shape) == 2: v = g.standard_normal(shape) * (1 / shape[1]) ** .5
    else: v = g.standard_normal(shape) * (2 / (shape[1] * shape[2] * shape[3])) ** .5
    return torch.tensor(v.astype(np.float32))

@functools.cache
def state_dict(arch):
    named = facts(arch)['state_dict']
    return {n: tensor(arch, n, tuple(shape)) for n, shape in named}

def cfg(arch):
    found = facts(arch)['cfg']
    return found['0'] if isinstance(found, dict) else found

def write(path, arch, with_cfg=True, prefix='', **more):
    "Save a checkpoint as the authors do."
    state = {prefix + n: t for n, t in state_dict(arch).items()}
    content = {'epoch': 300, 'best_prec1': torch.tensor(.93), 'state_dict': state, **more}
    if with_cfg: content.setdefault('cfg', cfg(arch))
    torch.save(content, path)
    return path

def images(arch):
    shape = (2, 3, 224, 224) if arch in ('resnet18', 'resnet34') else (8, 3, 32, 32)
    return torch.tensor(np.random.RandomState(1234).standard_normal(shape).astype(np.float32))
