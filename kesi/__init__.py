__version__ = "0.1.0"

_OFFERED = {'compress': 'anynet', 'save': 'anynet', 'load': 'anynet',
            'export': 'deploy', 'share': 'deploy', 'zoo': 'pretrained'}

def __getattr__(name):
    "`kesi.compress` and its kin are imported at first use: `import kesi.paper` stays light."
    if name in _OFFERED:
        from importlib import import_module
        return getattr(import_module(f'.{_OFFERED[name]}', __name__), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

def __dir__(): return sorted([*globals(), *_OFFERED])
