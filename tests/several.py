"What the tests of several processes run under torchrun: `several.py gradients FILE` or `several.py run FOLDER [RANK EPOCH]`."
import os, signal, sys
import drive, torch
from kesi import cli, training
from kesi.data import Dataset, Loader, Split
from kesi.models import Spec, build
from kesi.runtime import Runtime, launched
from kesi.schedules import Training

def runtime(**kw): return Runtime(threads=1, processes=launched(), evaluate=1, **kw)

def uneven(train=66, test=53):
    "Sets that neither 2 nor 3 processes can divide evenly; 66 images in batches of 16 leave two for the last, too few for 3."
    d = drive.blobs()
    images, labels = torch.cat([d.train.images, d.test.images]), torch.cat([d.train.labels, d.test.labels])
    return Dataset('uneven', Split(images[:train], labels[:train]), Split(images[-test:], labels[-test:]), d.classes, d.mean, d.std, flip=False)

def still(net):
    "Batch norm in evaluation mode, whatever the loop says."
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.eval(); m.train = lambda mode=True: None
    return net

def gradients(rt):
    "The gradients of each step of a training, its history and its result; and what batches of 13 measure."
    data, seen, real = uneven(), [], torch.optim.SGD.step
    def step(self, *a): seen.append([p.grad.clone() for g in self.param_groups for p in g['params']]); return real(self, *a)
    torch.optim.SGD.step = step
    try: net, history = training.fit(still(build(Spec('resnet8', num_classes=4, in_channels=1))), data, Training(2, 16, .05, weight_decay=1e-4), rt=rt)
    finally: torch.optim.SGD.step = real
    return {'gradients': seen, 'history': history, 'weights': net.state_dict(), 'measured': training.evaluate(rt.place(net), Loader(data, data.test, 13, rt), rt)}

def run(rt, out, rank=None, epoch=None):
    "A tiny run; one process may be killed in some epoch. Processes other than the main one must not write."
    real, count = training._epoch, [0]
    def fatal(*a):
        count[0] += 1
        if rt.rank == rank and count[0] == epoch: os.kill(os.getpid(), signal.SIGKILL)
        return real(*a)
    def never(*a, **kw): raise AssertionError('only the main process may write')
    training._epoch = fatal
    if rt.rank: os.replace = os.rename = never
    drive.RT = rt
    drive.go(out, drive.TINY, drive.blobs(), print)

if __name__ == '__main__':
    what, path, *how = sys.argv[1:]
    rt = runtime(precision='float64' if what == 'gradients' else 'float32')
    if what == 'gradients':
        found = gradients(rt)
        if rt.rank == 0: torch.save(found, path)
    else: sys.exit(cli.guarded(lambda args: run(rt, path, *map(int, how)), None))
