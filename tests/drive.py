"Small runs, in processes of their own, that can be told where to die: for kills and races."
import errno, fcntl, functools, json, multiprocessing, os, resource, signal, stat, sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import torch
from kesi import cli, paper, pipeline, report
from kesi.data import Dataset, Split
from kesi.runtime import Runtime

processes = multiprocessing.get_context('forkserver')
# the first optimizer imports torch._dynamo, which takes seconds
PRELOADED = ['torch._dynamo', 'fvcore.nn', 'kesi.cli', 'kesi.report', 'drive']
processes.set_forkserver_preload(PRELOADED)
RT = Runtime(threads=1)
SMALL = replace(paper.recipe('digits/resnet8'), seeds=1, iterations=2, epochs=3, retrain_epochs=1,
                distill_epochs=2, batch=128)
TINY = replace(SMALL, iterations=1, epochs=2, retrain_epochs=2, batch=16, retrain_batch=32,
               distill_batch=32)

@functools.cache
def blobs(name='blobs', n=64):
    "64 images in four classes, so that a whole run takes a second or two."
    g = torch.Generator().manual_seed(0)
    y = torch.arange(2 * n) % 4
    noise = torch.randint(90, (2 * n, 1, 8, 8), generator=g)
    x = (y.view(-1, 1, 1, 1) * 40 + noise).to(torch.uint8)
    return Dataset(name, Split(x[:n], y[:n]), Split(x[n:], y[n:]), tuple('abcd'), (.4,), (.25,),
                   flip=False)

def go(out, recipe=SMALL, data=None, say=lambda line: None):
    "Run and report."
    if data is not None:                    # pictures take longer than such a run
        pipeline.load, report._save = (lambda name, root=None: data), (lambda fig, path: None)
        report.plot_run = report.plot_tradeoff = lambda r: None
    home = pipeline.run(recipe, out, RT, say=say)
    if RT.rank == 0: report.write(home)
    return home

MOMENTS = ('before', 'write', 'after')

def operations(found, act):
    """Watch the files of this process: each moment of an operation is `act(number, name, moment)`.

    An operation ends with a rename, of a file or of a stage's folder; `write` is when half of a
    file is on the disk."""
    moves, fsync = {n: getattr(os, n) for n in ('replace', 'rename')}, os.fsync
    def moved(how):
        def f(a, b, **kw):
            found.append(Path(b).name)
            act(len(found), found[-1], 'before')
            how(a, b, **kw)
            act(len(found), found[-1], 'after')
        return f
    def synced(fd):
        if not stat.S_ISREG(os.fstat(fd).st_mode): return fsync(fd)
        path = os.readlink(f'/proc/self/fd/{fd}')
        name = Path(path).name[1:].rsplit('.', 2)[0]
        halve = lambda: os.truncate(path, os.fstat(fd).st_size // 2)
        act(len(found) + 1, name, 'write', halve)
        fsync(fd)
    for n, how in moves.items(): setattr(os, n, moved(how))
    os.fsync = synced

def die_at(which, moment, number=signal.SIGKILL):
    "End at a moment of an operation: the n-th, or the first on a name that begins so."
    def act(n, name, at, halve=lambda: None):
        is_it = name.startswith(which) if isinstance(which, str) else n == which
        if at != moment or not is_it: return
        halve()
        os.kill(os.getpid(), number)
    operations([], act)

class Limited:
    "A log that may grow while all other files are limited in size."
    def __init__(self, file, limit):
        self.file, self.limit = file, limit
        self.set(limit)
    def set(self, limit): resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    def write(self, text):
        self.set(resource.RLIM_INFINITY)
        self.file.write(text)
        self.file.flush()
        self.set(self.limit)
    def flush(self): pass
    def isatty(self): return False

def without_locks():
    import filelock
    def none(self, *a, **kw): raise OSError(errno.ENOSYS, 'no locks here')
    filelock.FileLock.acquire = fcntl.flock = none

def told_what_is_computed():
    compute = pipeline.Store._compute
    def told(self, stage, *a):
        print('computing', stage.kind)
        compute(self, stage, *a)
    pipeline.Store._compute = told

def child(out, recipe, tiny, how, log):
    "One process; its exit code is the command's. What it says goes into the file `log`."
    sys.stdout = sys.stderr = open(log, 'a', buffering=1)
    # a shell's background jobs ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if 'kill' in how: die_at(*how['kill'])
    if 'watch' in how:
        found, file = [], Path(how['watch'])
        operations(found, lambda *a: file.write_text('\n'.join(found)))
    if 'limit' in how: sys.stdout = sys.stderr = Limited(sys.stdout, how['limit'])
    if how.get('lockless'): without_locks()
    told_what_is_computed()
    data = blobs() if tiny else None
    sys.exit(cli.guarded(lambda args: go(out, recipe, data, print), SimpleNamespace()))

def start(out, recipe=None, tiny=False, log=None, **how):
    "Start a run in another process."
    recipe, log = recipe or (TINY if tiny else SMALL), log or Path(out).with_suffix('.log')
    p = processes.Process(target=child, args=(str(out), recipe, tiny, how, str(log)))
    p.start()
    return p

def finish(*a, **kw):
    "Run in another process; its exit code (−9: killed)."
    p = start(*a, **kw)
    p.join()
    return p.exitcode

def content(out):
    """Everything that must not depend on kills: files of stages by name, metrics, and the reports
    without their provenance."""
    out, found = Path(out), {}
    for folder in sorted(p.parent for p in out.glob('*/manifest.json')):
        m = json.loads((folder/'manifest.json').read_text())
        names = sorted(p.name for p in folder.iterdir())
        found[folder.name] = m['metrics'], m['stage'], m['files'], names
        for n in m['files']: found[f'{folder.name}/{n}'] = (folder/n).read_bytes()
    for p in sorted(out.glob('reports/**/report.json')):
        r = json.loads(p.read_text())
        del r['provenance']
        found[str(p.relative_to(out))] = r
        for other in p.parent.iterdir():
            if other.suffix in ('.svg', '.png') or other.name == 'run.json':
                found[str(other.relative_to(out))] = other.read_bytes()
    return found

def same(out, good):
    "Is a run folder's content the expected one, bit by bit?"
    mine = content(out)
    assert sorted(mine) == sorted(good)
    for n in good: assert mine[n] == good[n], n

def debris(out):
    "Unfinished files and hidden folders of a run folder."
    return sorted(str(p.relative_to(out)) for p in Path(out).rglob('.*') if p.name != '.locks')
