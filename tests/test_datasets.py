"""The datasets' files in their exact formats, small: whole, cut short, damaged, missing.
Nothing is downloaded but from a server in this process."""
import gzip, hashlib, http.client, http.server, io, os, pickle, random, re, socket, struct
import subprocess, sys, tarfile, threading, time, zipfile, zlib
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from torch.testing import assert_close
from torchvision import datasets
from kesi import cli, data, models, paper, pipeline
from kesi.data import Loader, Split, load
from kesi.paper import UserError
from kesi.runtime import Runtime

md5 = lambda content: hashlib.md5(content).hexdigest()
NOWHERE = 'http://127.0.0.1:9/'          # nobody answers there
DEBIAN = '/usr/share/datasets/fashion-mnist'
same = lambda a, b: assert_close(a, b, rtol=0, atol=0)

@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    "No dataset is remembered from another test, none is taken from the system, no proxy is asked."
    forget()
    monkeypatch.setattr(data, '_DEBIAN', tmp_path/'no such package')
    monkeypatch.setattr(data, '_PAUSE', 0.)
    monkeypatch.setattr(data, '_TINY_COUNTS', (3, 3, 1))                      # as in `tiny_files`
    monkeypatch.setenv('no_proxy', '*')
    yield
    forget()

def forget():
    data._load.cache_clear()
    data._subset.cache_clear()

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        s, content = self.server, self.server.files.get(self.path)
        ranged = self.headers.get('Range')
        s.asked.append(ranged)
        if content is None: return self.send_error(404)
        begin = int(re.findall(r'\d+', ranged)[0]) if ranged and s.ranges else 0
        if begin and begin >= len(content): return self.send_error(416)
        self.send_response(206 if begin else 200)
        self.send_header('Content-Length', str(len(content) - begin))
        self.end_headers()
        piece = content[begin:begin + s.cut]
        self.wfile.write(piece)
        s.sent += len(piece)
        if s.reset: self.hang_up()

    def hang_up(self):
        "Reset the connection, as soon as the other side has read everything: a reset discards it."
        at_once, patience = struct.pack('ii', 1, 0), time.monotonic() + 120
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        self.wfile.flush()
        while self.server.taken < self.server.sent and time.monotonic() < patience: time.sleep(.005)
        self.connection.close()

    def log_message(self, *_): pass

@pytest.fixture
def server():
    """A server of files that honours ranges; `server.cut` sends at most so many bytes per answer,
    `server.asked` are the ranges."""
    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    s.files, s.asked, s.cut, s.ranges, s.reset = {}, [], 10**9, True, False
    s.sent = s.taken = 0                                             # bytes; `taken` where counted
    s.url = f'http://127.0.0.1:{s.server_port}/'
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield s
    s.shutdown()
    s.server_close()

# --- downloading
def fetched(server, home):
    "What the server has under /x, fetched into a folder."
    return data.fetch(server.url + 'x', home/'x', md5(server.files['/x'])).read_bytes()

def test_download_goes_on_where_it_stopped(server, tmp_path):
    server.files['/x'], server.cut = bytes(range(256)) * 40, 3000
    assert fetched(server, tmp_path/'new') == server.files['/x']
    assert server.asked == [None, 'bytes=3000-', 'bytes=6000-', 'bytes=9000-']

def test_an_earlier_part_is_used_and_a_wrong_one_thrown_away(server, tmp_path):
    server.files['/x'] = content = os.urandom(5000)
    (tmp_path/'x.part').write_bytes(content[:1234])
    assert fetched(server, tmp_path) == content
    assert server.asked == ['bytes=1234-']
    for wrong in (b'?' * 1234, content + b'?'):                      # other bytes; too many
        (tmp_path/'x').unlink(missing_ok=True)
        (tmp_path/'x.part').write_bytes(wrong)
        with pytest.raises(UserError, match='checksum'): fetched(server, tmp_path)
        assert not (tmp_path/'x').exists() and not (tmp_path/'x.part').exists()
    assert fetched(server, tmp_path) == content

def test_a_server_without_ranges_is_asked_from_the_start(server, tmp_path):
    server.files['/x'], server.ranges = b'abcdef' * 100, False
    (tmp_path/'x.part').write_bytes(b'abc')
    assert fetched(server, tmp_path) == server.files['/x']

def test_a_server_that_sends_nothing_is_given_up(server, tmp_path):
    server.files['/x'], server.cut = b'abc', 0
    with pytest.raises(OSError, match='nothing more comes after 0 bytes'): fetched(server, tmp_path)
    assert not (tmp_path/'x').exists() and len(server.asked) == data._ATTEMPTS

def test_many_small_pieces_make_a_whole_file(server, tmp_path):
    server.files['/x'], server.cut = bytes(range(256)) * 40, 256
    assert fetched(server, tmp_path) == server.files['/x']
    assert len(server.asked) == 40

def test_what_came_before_a_reset_is_kept(server, tmp_path, monkeypatch):
    read = http.client.HTTPResponse.read1
    def counted(*a):
        block = read(*a)
        server.taken += len(block)
        return block
    monkeypatch.setattr(http.client.HTTPResponse, 'read1', counted)
    server.files['/x'], server.cut, server.reset = os.urandom(10_000), 6000, True
    assert fetched(server, tmp_path) == server.files['/x']
    assert server.asked == [None, 'bytes=6000-']

def test_a_server_that_begins_anew_each_time_is_given_up(server, tmp_path):
    server.files['/x'], server.cut, server.ranges = b'abcdef' * 100, 400, False
    with pytest.raises(OSError, match='after 400 bytes.*kept'): fetched(server, tmp_path)
    assert (tmp_path/'x.part').stat().st_size == 400

@pytest.mark.parametrize('name', ['cifar10', 'cifar100', 'fashion_mnist', 'tiny_imagenet'])
def test_offline_says_what_to_put_where(name, tmp_path, monkeypatch):
    for kind in (datasets.CIFAR10, datasets.CIFAR100):
        monkeypatch.setattr(kind, 'url', NOWHERE + kind.filename)
    monkeypatch.setattr(datasets.FashionMNIST, 'mirrors', [NOWHERE])
    monkeypatch.setattr(data, '_TINY', (NOWHERE + 'tiny-imagenet-200.zip', '0' * 32))
    monkeypatch.setenv('KESI_DATA', str(tmp_path/'here'))
    with pytest.raises(UserError) as e: load(name)
    said = (name, str(tmp_path/'here'), 'cannot be downloaded', 'put ', '--data-root', 'KESI_DATA')
    assert all(t in str(e.value) for t in said)
    assert not [p for p in tmp_path.rglob('*') if p.is_file() and '.locks' not in p.parts]

# --- CIFAR: a tar of pickles
def cifar_files(kind, monkeypatch):
    "The files that the publishers make, small, and the images and labels in them."
    key, classes = ('labels', 10) if kind is datasets.CIFAR10 else ('fine_labels', 100)
    draw, made, all_x, all_y, n = np.random.default_rng(0), {}, [], [], 2 * classes
    for which in ('train_list', 'test_list'):
        checksums = []
        for file, _ in getattr(kind, which):
            x = draw.integers(0, 256, (n, 3072), dtype=np.uint8)
            y = [int(v) for v in draw.permutation(n) % classes]
            made[file] = pickle.dumps({'data': x, key: y})
            checksums.append([file, md5(made[file])])
            all_x.append(x)
            all_y += y
        monkeypatch.setattr(kind, which, checksums)
    meta = {kind.meta['key']: [f'class {i:02}' for i in range(classes)]}
    made[kind.meta['filename']] = pickle.dumps(meta)
    monkeypatch.setattr(kind, 'meta', {**kind.meta, 'md5': md5(made[kind.meta['filename']])})
    return made, np.concatenate(all_x).reshape(-1, 3, 32, 32), all_y

def tar_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w:gz') as tar:
        for file, content in files.items():
            info = tarfile.TarInfo(file)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()

def cifar_tar(kind, monkeypatch):
    "A tar file as the publishers make it, with torchvision's list of checksums patched to fit."
    files, x, y = cifar_files(kind, monkeypatch)
    tar = tar_of({f'{kind.base_folder}/{file}': content for file, content in files.items()})
    monkeypatch.setattr(kind, 'tgz_md5', md5(tar))
    monkeypatch.setattr(kind, 'url', NOWHERE + kind.filename)
    return tar, x, y

@pytest.mark.parametrize('kind', [datasets.CIFAR10, datasets.CIFAR100])
def test_cifar_is_read(kind, monkeypatch, tmp_path):
    tar, x, y = cifar_tar(kind, monkeypatch)
    classes = 10 if kind is datasets.CIFAR10 else 100
    (tmp_path/kind.filename).write_bytes(tar)
    d = load(kind.__name__.lower(), tmp_path)
    same(torch.cat([d.train.images, d.test.images]), torch.tensor(x))
    assert torch.cat([d.train.labels, d.test.labels]).tolist() == y
    assert (d.size, d.channels, d.pad, d.flip, len(d.classes)) == (32, 3, 4, True, classes)
    assert len(d.test) == 2 * classes and d.train.images.is_contiguous()
    assert d.mean == (.4914, .4822, .4465) and d.std == (.2023, .1994, .2010)
    (tmp_path/kind.filename).unlink()
    forget()
    again = load(kind.__name__.lower(), tmp_path)                             # the unpacked folder
    assert again.digest == d.digest                                           # is enough

def test_cifar_is_downloaded(monkeypatch, tmp_path, server):
    tar, x, _ = cifar_tar(datasets.CIFAR10, monkeypatch)
    server.files['/c.tar.gz'], server.cut = tar, len(tar) // 2 + 1
    monkeypatch.setattr(datasets.CIFAR10, 'url', server.url + 'c.tar.gz')
    assert len(load('cifar10', tmp_path).train) == 100 and len(server.asked) == 2

def test_cifar_cut_short_or_damaged(monkeypatch, tmp_path):
    tar, *_ = cifar_tar(datasets.CIFAR10, monkeypatch)
    for bad in (tar[:-100], tar[:500] + bytes([tar[500] ^ 1]) + tar[501:], b''):
        (tmp_path/'cifar-10-python.tar.gz').write_bytes(bad)
        with pytest.raises(UserError, match='damaged or incomplete; delete it'):
            load('cifar10', tmp_path)
        assert not (tmp_path/'cifar-10-batches-py').exists()
    (tmp_path/'cifar-10-python.tar.gz').write_bytes(tar)
    load('cifar10', tmp_path)
    (tmp_path/'cifar-10-batches-py'/'data_batch_3').write_bytes(b'half')
    forget()
    assert len(load('cifar10', tmp_path).train) == 100                       # unpacked again
    (tmp_path/'cifar-10-batches-py'/'batches.meta').write_bytes(b'half')
    forget()
    with pytest.raises(UserError, match='delete the folder'): load('cifar10', tmp_path)

class Evil:
    def __reduce__(self): return os.mkdir, (str(self.path),)

def test_cifar_pickles_are_not_opened_before_their_checksum(monkeypatch, tmp_path):
    tar, *_ = cifar_tar(datasets.CIFAR10, monkeypatch)
    (tmp_path/'cifar-10-python.tar.gz').write_bytes(tar)
    load('cifar10', tmp_path)
    Evil.path = tmp_path/'executed'
    for file in ('data_batch_1', 'test_batch', 'batches.meta'):
        (tmp_path/'cifar-10-python.tar.gz').unlink(missing_ok=True)
        forget()
        (tmp_path/'cifar-10-batches-py'/file).write_bytes(pickle.dumps(Evil()))
        with pytest.raises(UserError): load('cifar10', tmp_path)
    assert not Evil.path.exists()

# --- CIFAR: class folders
def png(x):
    buffer = io.BytesIO()
    Image.fromarray(x.permute(1, 2, 0).numpy()).save(buffer, 'PNG', compress_level=1)
    return buffer.getvalue()

def class_folders(d, seed, above='') -> dict: # path → content
    "A dataset as converters pass it on; the names of the images are drawn."
    draw, made = random.Random(seed), {'labels.txt': '\n'.join(d.classes).encode()}
    for part, split in (('train', d.train), ('test', d.test)):
        for x, k in zip(split.images, split.labels):
            made[f'{part}/{above}{d.classes[k]}/{draw.randrange(10**9)}.png'] = png(x)
    return made

@pytest.fixture
def official(monkeypatch, tmp_path):
    "name → a small CIFAR from its official files, and the table of its order."
    def make(name, table=True):
        kind = getattr(datasets, name.upper())
        home = tmp_path/'official'
        home.mkdir()
        tar, _, y = cifar_tar(kind, monkeypatch)
        (home/kind.filename).write_bytes(tar)
        d = load(name, home)
        forget()
        of_each = [len(s) // len(d.classes) for s in (d.train, d.test)]
        monkeypatch.setitem(data._CIFAR, name, (len(d.classes), *of_each))
        monkeypatch.setattr(data, '_ORDERS', home)
        if table: data._write_order(d, home/f'order-{name}.safetensors')
        return d
    return make

@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
def test_class_folders_and_their_archives_are_the_official_dataset(name, official, tmp_path):
    d, above = official(name), 'above/' if name == 'cifar100' else ''         # superclasses
    for seed in range(2): unpack(class_folders(d, seed, above), tmp_path/str(seed)/name)
    for seed, (ending, inside) in enumerate((('.tgz', name), ('.tar.gz', f'./{name}')), 2):
        files = {f'{inside}/{f}': c for f, c in class_folders(d, seed, above).items()}
        for f in (f'{inside}/train/._.png', f'{inside}/test/class 01/.x.png', '._a', 'x/train.png'):
            files[f] = b'not an image'
        (tmp_path/str(seed)).mkdir()
        (tmp_path/str(seed)/f'{name}{ending}').write_bytes(tar_of(files))
    for seed in range(4):
        found = load(name, tmp_path/str(seed))
        same(found.train.images, d.train.images)
        same(found.test.labels, d.test.labels)
        assert found.digest == d.digest and found.classes == d.classes
        some = len(d.train) // 2
        assert len(load(f'{name}@{some}', tmp_path/str(seed)).train) == some
    assert not list(tmp_path.glob('[0-9]/cifar-*'))                          # nothing was unpacked

def test_without_a_table_class_folders_have_an_order_of_their_own(official, tmp_path):
    d = official('cifar100', table=False)
    for seed in range(2): unpack(class_folders(d, seed), tmp_path/str(seed)/'cifar100')
    a, b = (load('cifar100', tmp_path/str(seed)) for seed in range(2))
    assert a.digest == b.digest != d.digest
    assert a.train.labels.bincount().tolist() == d.train.labels.bincount().tolist()

def test_equal_images_in_an_official_order(monkeypatch, tmp_path):
    x = torch.zeros(6, 3, 32, 32, dtype=torch.uint8)
    x[3] = x[5] = 7
    train, test = Split(x, torch.tensor([0, 1, 0, 1, 1, 0])), Split(x[2:4], torch.tensor([0, 1]))
    d = data._as_cifar('cifar10', train, test, ('a', 'b'))
    monkeypatch.setitem(data._CIFAR, 'cifar10', (2, 3, 1))
    monkeypatch.setattr(data, '_ORDERS', tmp_path)
    data._write_order(d, tmp_path/'order-cifar10.safetensors')
    unpack(class_folders(d, 0), tmp_path/'cifar10')
    assert load('cifar10', tmp_path).digest == d.digest

def test_official_files_come_before_class_folders(official, tmp_path):
    d = official('cifar10')
    unpack({'train/a/0.png': b'no image'}, tmp_path/'official'/'cifar10')
    assert load('cifar10', tmp_path/'official').digest == d.digest

def one_changed_pixel(files, name):
    x = np.array(Image.open(io.BytesIO(files[name])))
    x[3, 4, 1] ^= 1
    files[name] = png(torch.tensor(x).permute(2, 0, 1))

def one_twice(files, name):
    other = next(f for f in files if f.split('/')[:2] == name.split('/')[:2] and f != name)
    files[name] = files[other]

def swapped_classes(files, name):
    other = next(f for f in files if f.startswith('train/') and f.split('/')[1] not in name)
    files[name], files[other] = files[other], files[name]

def one_missing(files, name): del files[name]
def one_too_many(files, name): files[f'{name[:-4]}x.png'] = files[name]
def one_broken(files, name): files[name] = files[name][:60]
def one_larger(files, name): files[name] = png(torch.zeros(3, 33, 33, dtype=torch.uint8))
def another_class(files, name): files[f'train/zebra/{Path(name).name}'] = files.pop(name)
def no_test_images(files, name):
    for f in [f for f in files if f.startswith('test/')]: del files[f]

@pytest.mark.parametrize('harm, message', [
    (one_changed_pixel, 'not the official ones'), (one_twice, 'not the official ones'),
    (swapped_classes, 'not the official ones'), (one_missing, '10 classes, with 10 training and 2'),
    (one_too_many, '10 classes, with 10'), (another_class, 'holds 11, with'),
    (no_test_images, r'and \[0\]'), (one_broken, 'cannot be read'), (one_larger, 'one size')])
def test_class_folders_that_are_not_the_official_ones(harm, message, official, tmp_path):
    files = class_folders(official('cifar10'), 0)
    harm(files, next(f for f in files if f.startswith('train/')))
    unpack(files, tmp_path/'a'/'cifar10')
    (tmp_path/'b').mkdir()
    (tmp_path/'b'/'cifar10.tgz').write_bytes(tar_of(files))
    for place in 'ab':
        with pytest.raises(UserError, match=message) as e: load('cifar10', tmp_path/place)
        assert '\n' not in str(e.value)

def test_archives_of_class_folders_that_are_damaged(official, tmp_path):
    tar = tar_of(class_folders(official('cifar10'), 0))
    for bad in (b'', b'no tar', tar[:len(tar) // 2], tar[:1000] + b'????' + tar[1004:]):
        (tmp_path/'cifar10.tgz').write_bytes(bad)
        with pytest.raises(UserError, match='is damaged|cannot be read'):
            load('cifar10', tmp_path)

CIFAR10 = data.data_root()/'cifar-10-batches-py'

@pytest.mark.skipif(not CIFAR10.exists(), reason='the official files are not there')
def test_the_table_of_the_real_cifar10():
    "The table that ships with the package is that of the official files."
    d = load('cifar10')
    assert d.digest == '0950d2ef13ad'
    for part, split in (('train', d.train), ('test', d.test)):
        order, digest = data._by_fingerprint(split, d.classes)
        known, ranks = data._read_order('cifar10')[part]
        assert digest == known
        i = torch.tensor(order)[ranks]                             # equal images may be swapped
        same(split.images[i], split.images)
        same(split.labels[i], split.labels)

# --- Fashion-MNIST: gzipped idx
def idx(a): return bytes([0, 0, 8, a.ndim]) + struct.pack(f'>{a.ndim}I', *a.shape) + a.tobytes()

def idx_files(monkeypatch, n=(30, 10)):
    draw, out = np.random.default_rng(0), {}
    for part, k in zip(('train', 't10k'), n):
        images = draw.integers(0, 256, (k, 28, 28), dtype=np.uint8)
        out[f'{part}-images-idx3-ubyte.gz'] = idx(images)
        out[f'{part}-labels-idx1-ubyte.gz'] = idx((np.arange(k) % 10).astype(np.uint8))
    monkeypatch.setattr(data, '_FASHION', {f: md5(c) for f, c in out.items()})
    return out

def test_fashion_mnist_is_read_from_every_place(monkeypatch, tmp_path, server):
    files, digests = idx_files(monkeypatch), set()
    for i, place in enumerate(('FashionMNIST/raw', '', 'fashion-mnist')):
        root = tmp_path/str(i)
        unpack({f: gzip.compress(c, compresslevel=i + 1) for f, c in files.items()}, root/place)
        digests.add(load('fashion_mnist', root).digest)
    packed = {f: gzip.compress(c) for f, c in files.items()}
    server.files = {f'/{f}': c for f, c in packed.items()}
    monkeypatch.setattr(datasets.FashionMNIST, 'mirrors', [server.url])
    checksums = [(f, md5(c)) for f, c in packed.items()]
    monkeypatch.setattr(datasets.FashionMNIST, 'resources', checksums)
    d = load('fashion_mnist', tmp_path/'empty')
    assert digests == {d.digest} and (len(d.train), len(d.test)) == (30, 10)
    assert (d.size, d.channels, d.pad, d.flip) == (28, 1, 4, True)
    fourth = files['train-images-idx3-ubyte.gz'][16 + 3 * 784:16 + 4 * 784]
    assert d.train.images[3, 0].numpy().tobytes() == fourth
    monkeypatch.setattr(data, '_DEBIAN', tmp_path/'empty'/'FashionMNIST'/'raw')
    assert load('fashion_mnist', tmp_path/'another').digest == d.digest

def flipped(z): return z[:len(z) // 2] + bytes([z[len(z) // 2] ^ 8]) + z[len(z) // 2 + 1:]

@pytest.mark.parametrize('harm', [
    lambda z: z[:-1], lambda z: z[:len(z) // 2], lambda z: b'', flipped,
    lambda z: gzip.compress(gzip.decompress(z)[:-1]), lambda z: b'no gzip'])
@pytest.mark.parametrize('file', ['train-images-idx3-ubyte.gz', 't10k-labels-idx1-ubyte.gz'])
def test_fashion_mnist_damaged(harm, file, monkeypatch, tmp_path):
    packed = {f: gzip.compress(c) for f, c in idx_files(monkeypatch).items()}
    packed[file] = harm(packed[file])
    unpack(packed, tmp_path)
    with pytest.raises(UserError, match=f'{file}.*is damaged'): load('fashion_mnist', tmp_path)

@pytest.mark.parametrize('raw', [
    bytes([0, 0, 8, 1, 0, 0, 0, 9]) + b'12345', bytes([0, 0, 13, 1, 0, 0, 0, 1]) + b'1',
    bytes([0, 0, 8, 200]), b'\0'])
def test_idx_with_a_header_that_lies(raw, tmp_path):
    (tmp_path/'x.gz').write_bytes(gzip.compress(raw))
    with pytest.raises(UserError, match='is damaged'): data._read_idx(tmp_path/'x.gz', md5(raw))

@pytest.mark.skipif(not os.path.exists(DEBIAN), reason='dataset-fashion-mnist is not installed')
def test_the_real_fashion_mnist(monkeypatch, tmp_path):
    monkeypatch.setattr(data, '_DEBIAN', Path(DEBIAN))
    d = load('fashion_mnist', tmp_path)
    assert d.digest == 'efbf3d1d9501' and (len(d.train), len(d.test)) == (60_000, 10_000)
    assert d.train.labels.bincount().tolist() == [6000] * 10
    assert data._statistics(d.train.images) == (d.mean, d.std)

# --- Tiny-ImageNet: a zip of JPEGs and lists
def jpeg(seed, grey=False, side=64):
    shape = (4, 4) if grey else (4, 4, 3)
    a, buffer = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), io.BytesIO()
    Image.fromarray(a).resize((side, side)).save(buffer, 'JPEG', quality=95)
    return buffer.getvalue()

def listed(*pairs): return ''.join(f'{image}\t{c}\t0\t0\t9\t9\n' for image, c in pairs).encode()

def tiny_files(n=3):
    ids, files = ['n02', 'n01', 'n03'], {}                     # not sorted: their order counts
    files['wnids.txt'] = '\n'.join(ids).encode()
    files['words.txt'] = b'n01\tcat, puss\nn02\tdog\nn09\tunused'
    for k, c in enumerate(ids):
        boxes = ''.join(f'{c}_{i}.JPEG\t0\t0\t9\t9\n' for i in range(n))
        files[f'train/{c}/{c}_boxes.txt'] = boxes.encode()
        for i in range(n):
            files[f'train/{c}/images/{c}_{i}.JPEG'] = jpeg(10 * k + i, grey=i == 1)
    classes = zip(('val_0.JPEG', 'val_1.JPEG', 'val_2.JPEG'), ('n01', 'n03', 'n02'))
    files['val/val_annotations.txt'] = listed(*classes)
    for i in range(3): files[f'val/images/val_{i}.JPEG'] = jpeg(100 + i)
    return files

def tiny_zip(files, monkeypatch):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_DEFLATED) as z:
        for f, c in files.items(): z.writestr(f'tiny-imagenet-200/{f}', c)
    content = buffer.getvalue()
    monkeypatch.setattr(data, '_TINY', (NOWHERE + 'tiny-imagenet-200.zip', md5(content)))
    return content

def unpack(files, home):
    for f, c in files.items():
        (home/f).parent.mkdir(parents=True, exist_ok=True)
        (home/f).write_bytes(c)

def test_tiny_imagenet_zip_and_folder(monkeypatch, tmp_path, server):
    files = tiny_files()
    content = tiny_zip(files, monkeypatch)
    unpack({'tiny-imagenet-200.zip': content}, tmp_path/'zip')
    d = load('tiny_imagenet', tmp_path/'zip')
    assert d.classes == ('dog', 'cat', 'n03') and d.test.labels.tolist() == [1, 2, 0]
    assert d.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert d.size == 224 and tuple(d.train.images.shape) == (9, 3, 64, 64)
    assert d.train.images.is_contiguous()
    for i, f in ((0, 'train/n02/images/n02_0.JPEG'), (4, 'train/n01/images/n01_1.JPEG')):
        pixels = np.array(Image.open(io.BytesIO(files[f])).convert('RGB'))
        same(d.train.images[i].permute(1, 2, 0), torch.from_numpy(pixels))
    assert (d.train.images[4, 0] == d.train.images[4, 2]).all()               # grey: equal channels
    unpack(files, tmp_path/'folder'/'tiny-imagenet-200')
    assert load('tiny_imagenet', tmp_path/'folder').digest == d.digest
    server.files['/tiny-imagenet-200.zip'], server.cut = content, len(content) // 3
    monkeypatch.setattr(data, '_TINY', (server.url + 'tiny-imagenet-200.zip', md5(content)))
    assert load('tiny_imagenet', tmp_path/'download').digest == d.digest

def test_tiny_imagenet_damaged(monkeypatch, tmp_path):
    content = tiny_zip(tiny_files(), monkeypatch)
    for bad in (content[:-30], content[:300] + b'??' + content[302:], b''):
        (tmp_path/'tiny-imagenet-200.zip').write_bytes(bad)
        with pytest.raises(UserError, match='damaged or incomplete'):
            load('tiny_imagenet', tmp_path)

@pytest.mark.parametrize('file, content', [
    ('train/n01/images/n01_2.JPEG', None), ('val/images/val_1.JPEG', b'\xff\xd8 no image'),
    ('train/n02/images/n02_0.JPEG', jpeg(0)[:300]), ('train/n02/n02_boxes.txt', None),
    ('val/val_annotations.txt', b'val_0.JPEG\tn77\n'), ('val/val_annotations.txt', b'val_0.JPEG'),
    ('words.txt', None), ('val/images/val_0.JPEG', jpeg(1, side=32))])
def test_tiny_imagenet_incomplete_tree(file, content, tmp_path, monkeypatch):
    files = tiny_files()
    files.pop(file)
    if content: files[file] = content
    unpack(files, tmp_path/'folder'/'tiny-imagenet-200')
    unpack({'tiny-imagenet-200.zip': tiny_zip(files, monkeypatch)}, tmp_path/'zip')
    for place in ('folder', 'zip'):
        with pytest.raises(UserError, match='incomplete or damaged|one size'):
            load('tiny_imagenet', tmp_path/place)

@pytest.mark.parametrize('file, content', [
    ('val/val_annotations.txt', b'val_0.JPEG\tn01\nval_1.JPEG\tn03\n'),
    ('val/val_annotations.txt', b''), ('train/n01/n01_boxes.txt', b''),
    ('train/n01/n01_boxes.txt', b'n01_0.JPEG\n'), ('wnids.txt', b'n02\nn01\nn01'),
    ('wnids.txt', b'n02\nn01\nn03\nn03'), ('wnids.txt', b'')])
def test_tiny_imagenet_lists_cut_short(file, content, tmp_path):
    "Every file that they name is there, and yet it would be another dataset."
    unpack({**tiny_files(), file: content}, tmp_path/'tiny-imagenet-200')
    with pytest.raises(UserError, match='3 classes, with 3 training and 1 test|cannot be read'):
        load('tiny_imagenet', tmp_path)

def test_imagenet_start_and_view_through_the_pipeline(monkeypatch, tmp_path):
    unpack(tiny_files(), tmp_path/'tiny-imagenet-200')
    asked = []
    def fake(spec, seed):
        asked.append((spec.arch, spec.num_classes, seed))
        return models.build(spec, seed)
    monkeypatch.setattr(pipeline, 'pretrained', fake)
    small = replace(load('tiny_imagenet', tmp_path), view=40)
    monkeypatch.setattr(pipeline, 'load', lambda *a: small)
    batches = dict.fromkeys(('batch', 'retrain_batch', 'distill_batch'), 4)
    r = replace(paper.recipe('tiny_imagenet/resnet18').budget(.01), iterations=1, seeds=1,
                variants=('kesi',), **batches)
    home = pipeline.run(r, tmp_path/'runs', Runtime(threads=1), say=None)
    assert asked == [('resnet18', 3, 0)] and '"size": 40' in (home/'run.json').read_text()

# --- a folder of one's own
def flowers(root, parts=('train', 'test'), side=16):
    for p in parts:
        unpack({f'{c}/{i}.jpg': jpeg(i, side=side) for c in 'ab' for i in range(4)}, root/p)

def test_folder(tmp_path):
    flowers(tmp_path/'mine')
    flowers(tmp_path/'other', ('train', 'val'), 24)
    d, e = load('folder:mine', tmp_path), load('folder:other@12', tmp_path)
    assert (d.size, d.classes, len(d.train), e.size) == (16, ('a', 'b'), 8, 12)
    assert d.train.labels.tolist() == [0] * 4 + [1] * 4
    assert paper.recipe('folder:mine/resnet8').name == 'folder:mine/resnet8'
    (tmp_path/'mine'/'train'/'a'/'odd.png').write_bytes(jpeg(0, side=8))
    forget()
    with pytest.raises(UserError, match='odd.png.*8×8.*write folder:mine@SIZE'):
        load('folder:mine', tmp_path)
    assert load('folder:mine@16', tmp_path).size == 16
    (tmp_path/'mine'/'train'/'a'/'bad.png').write_bytes(b'no image')
    forget()
    with pytest.raises(UserError, match='bad.png.*cannot be read'): load('folder:mine@16', tmp_path)

@pytest.mark.parametrize('name, message', [
    ('none', 'no folder'), ('extra', 'without training images: c'), ('empty', 'no images of c'),
    ('nowhere', 'needs train/ and test/'), ('a/b', 'in the data root'),
    ('x@0', 'in the data root')])
def test_folder_mistakes(name, message, tmp_path):
    flowers(tmp_path/'none', ('train',))
    flowers(tmp_path/'extra')
    (tmp_path/'extra'/'test'/'c').mkdir()
    flowers(tmp_path/'empty')
    (tmp_path/'empty'/'train'/'c').mkdir()
    with pytest.raises(UserError, match=message): load(f'folder:{name}', tmp_path)

def test_folder_without_classes(tmp_path):
    unpack({f'{p}/0.jpg': jpeg(0) for p in ('train', 'test')}, tmp_path/'flat')
    with pytest.raises(UserError, match='folder of its own'): load('folder:flat', tmp_path)

def test_folder_leaves_hidden_files_out(tmp_path):
    flowers(tmp_path/'mine')
    hidden = {'.ipynb_checkpoints/0.png': jpeg(0), '._0.png': b'not an image'}
    unpack(hidden, tmp_path/'mine'/'train'/'a')
    assert len(load('folder:mine', tmp_path).train) == 8

def test_images_that_claim_too_much(tmp_path):
    flowers(tmp_path/'mine')
    header = b'IHDR' + struct.pack('>IIBBBBB', 30_000, 30_000, 8, 2, 0, 0, 0)
    size, checksum = struct.pack('>I', 13), struct.pack('>I', zlib.crc32(header))
    bomb = b'\x89PNG\r\n\x1a\n' + size + header + checksum
    (tmp_path/'mine'/'train'/'a'/'bomb.png').write_bytes(bomb)
    with pytest.raises(UserError, match='bomb.png.*cannot be read'): load('folder:mine@8', tmp_path)
    with pytest.raises(UserError, match='half of the memory'): load('folder:mine@99999', tmp_path)

def test_roots_that_are_none(tmp_path, monkeypatch):
    with pytest.raises(UserError, match='no folder for datasets'):
        load('fashion_mnist', '~nobody-has-this-name/x')
    with pytest.raises(UserError): load('fashion_mnist', 'a\0b')
    monkeypatch.setattr(datasets.FashionMNIST, 'mirrors', [NOWHERE])
    with pytest.raises(UserError, match='dataset-fashion-mnist') as e:
        load('fashion_mnist', tmp_path)
    assert all(f in str(e.value) for f in data._FASHION)
    (tmp_path/'tiny-imagenet-200.zip').mkdir()
    with pytest.raises(UserError, match='tiny'): load('tiny_imagenet', tmp_path)

def test_a_subset_follows_the_data_root(tmp_path, monkeypatch):
    "What is remembered of one folder is not taken for another's."
    means = iter(((.1,), (.2,)))
    another = lambda name, root: replace(load('digits'), mean=next(means))
    monkeypatch.setitem(data._LOADERS, 'cifar10', another)
    digests = []
    for d in 'ab':
        monkeypatch.setenv('KESI_DATA', str(tmp_path/d))
        digests.append(load('cifar10@500').digest)
    assert digests[0] != digests[1]

# --- the rest
def test_digits_and_their_batches_have_not_changed():
    d = load('digits')
    assert d.digest == 'fba5bbbc79bf'
    h = hashlib.sha256()
    for x, y in Loader(d, d.train, 128).epoch(0, 'pin', 1):
        h.update(x.contiguous().numpy().tobytes())
        h.update(y.numpy().tobytes())
    assert h.hexdigest()[:16] == 'b0d5e557261b2182'

LIGHT = '''
import sys, kesi.data, kesi.scale
heavy = 'torchvision', 'sklearn', 'scipy', 'PIL', 'matplotlib', 'torch._dynamo'
print([name for name in heavy if name in sys.modules])
'''

def test_what_a_run_imports_is_light():
    done = subprocess.run([sys.executable, '-c', LIGHT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'

def test_a_held_out_part_through_the_command(tmp_path, capsys, no_pictures):
    import safetensors.torch
    run = '--set valid=0.2 --set iterations=1 --seeds 1 --budget .01 --threads 1'.split()
    out = tmp_path/'runs'
    assert cli.kesi_run(['digits/resnet8', *run, '--out', str(out)]) == 0
    assert capsys.readouterr().err == ''
    found, = out.glob('baseline-*/predictions.safetensors')
    measured = safetensors.torch.load_file(found)['labels']
    assert len(measured) == 200         # a fifth of the training images, not the 797 of the test
