"Networks that kesi did not build, at random weights: factories by name, as a caller has them."
import functools
import pytest, torch, torchvision
import torch.nn.functional as F
from torch import nn

class Handmade(nn.Module):
    "A residual block, a depthwise convolution, a concatenation, a bias and a hidden linear layer."
    def __init__(self, classes=10):
        super().__init__()
        def conv(i, o, **kw):
            filters = nn.Conv2d(i, o, 3, padding=1, **kw)
            return nn.Sequential(filters, nn.BatchNorm2d(o), nn.ReLU(inplace=True))
        self.stem, self.down, self.inner = conv(3, 24), conv(24, 32, stride=2), conv(32, 48)
        self.outer = nn.Sequential(nn.Conv2d(48, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32))
        self.depthwise, self.left, self.right = conv(32, 32, groups=32), conv(32, 40), conv(32, 24)
        self.squeeze = conv(64, 20, stride=2)
        hidden, last = nn.Linear(20 * 4 * 4, 32), nn.Linear(32, classes)
        self.head = nn.Sequential(hidden, nn.ReLU(), nn.Dropout(.1), last)
    def forward(self, x):
        x = self.down(self.stem(x))
        x = self.depthwise(F.relu(x + self.outer(self.inner(x))))
        x = self.squeeze(torch.cat([self.left(x), self.right(x)], 1))
        return self.head(F.adaptive_avg_pool2d(x, 4).flatten(1))

def dense():
    "A small DenseNet, whose layers read everything before them."
    blocks, first = (2, 3, 2, 2), 16
    return torchvision.models.DenseNet(8, blocks, first, num_classes=10)

def _vision(name): return torchvision.models.get_model(name, weights=None, num_classes=10)

VISION = ('resnet50', 'mobilenet_v2', 'densenet121', 'efficientnet_b0')
FACTORIES = {'handmade': Handmade, 'dense': dense,
             **{n: functools.partial(_vision, n) for n in VISION}}
SHAPE = (3, 64, 64)

def names(heavy=('densenet121', 'efficientnet_b0')):
    "The names of all networks, the heavy ones for the soak only."
    return [pytest.param(n, marks=pytest.mark.soak) if n in heavy else n for n in FACTORIES]

@functools.cache
def pruned(name):
    "The unpruned network and the one that a pruning by 30 % leaves."
    from kesi.anynet import cut
    torch.manual_seed(0)
    net = FACTORIES[name]().eval()
    return net, cut(net, SHAPE, .3)
