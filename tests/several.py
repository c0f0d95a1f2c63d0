"""What the tests of several processes run under torchrun.

`several.py run FOLDER [RANK EPOCH]`: a tiny run, in which one process may be killed.
`several.py both FOLDER FILE`: the gradients of a training into the file, then such a run."""
import os, signal, sys, time
from pathlib import Path
import drive, torch
from kesi import cli, training
from kesi.data import Dataset, Loader, Split
from kesi.models import Spec, build
from kesi.runtime import Runtime, launched
from kesi.schedules import Training


def runtime(**kw): return Runtime(threads=1, processes=launched(), evaluate=1, **kw)


def uneven(train=66, test=53):
    """Sets that neither 2 nor 3 processes can divide evenly.

    66 images in batches of 16 leave two for the last, too few for 3."""
    d = drive.blobs()
    images = torch.cat([d.train.images, d.test.images])
    labels = torch.cat([d.train.labels, d.test.labels])
    splits = Split(images[:train], labels[:train]), Split(images[-test:], labels[-test:])
    return Dataset('uneven', *splits, d.classes, d.mean, d.std, flip=False)


def still(net):
    "Batch norm in evaluation mode, whatever the loop says."
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.eval()
            m.train = lambda mode=True: None
    return net


def gradients(rt):
    "The gradients of each step of a training, its history, its result; what batches of 13 measure."
    data, seen, real = uneven(), [], torch.optim.SGD.step
    def step(self, *a):
        seen.append([p.grad.clone() for g in self.param_groups for p in g['params']])
        return real(self, *a)
    net = build(Spec('resnet8', num_classes=4, in_channels=1))
    how = Training(2, 16, .05, weight_decay=1e-4)
    torch.optim.SGD.step = step
    try: net, history = training.fit(still(net), data, how, rt=rt)
    finally: torch.optim.SGD.step = real
    measured = training.evaluate(rt.place(net), Loader(data, data.test, 13, rt), rt)
    return {'gradients': seen, 'history': history, 'weights': net.state_dict(),
            'measured': measured}


def never(*a, **kw): raise AssertionError('only the main process may write')


def wait_for_a_checkpoint(out, patience=120):
    "The main process may still be writing that of the epoch before."
    end = time.monotonic() + patience
    while not list(Path(out).glob('.*.partial/checkpoint.safetensors')):
        assert time.monotonic() < end, 'no checkpoint'
        time.sleep(.02)


def run(rt, out, rank=None, epoch=None):
    "A tiny run; one process may be killed in some epoch. Only the main process may write."
    real, count = training._epoch, [0]
    def fatal(*a):
        count[0] += 1
        if rt.rank == rank and count[0] == epoch:
            wait_for_a_checkpoint(out)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*a)
    training._epoch = fatal
    if rt.rank: os.replace = os.rename = never
    drive.RT = rt
    drive.go(out, drive.TINY, drive.blobs(), print)


if __name__ == '__main__':
    what, out, *how = sys.argv[1:]
    if what == 'both':
        found, file = gradients(runtime(precision='float64')), how.pop()
        if runtime().rank == 0: torch.save(found, file)
    sys.exit(cli.guarded(lambda args: run(runtime(), out, *map(int, how)), None))
