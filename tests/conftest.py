import drive, pytest
from kesi import pipeline, report

@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    "Tests that replace the data set or the drawing leave nothing behind."
    for module, names in ((pipeline, ('load',)), (report, ('_save', 'plot_run', 'plot_tradeoff'))):
        for n in names: monkeypatch.setattr(module, n, getattr(module, n))

@pytest.fixture
def no_pictures(monkeypatch):
    "Drawing takes longer than the runs of many tests; those that look at pictures go without this."
    for name in ('plot_run', 'plot_tradeoff'): monkeypatch.setattr(report, name, lambda r: None)
    monkeypatch.setattr(report, '_save', lambda figure, path: None)

@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    "A finished, never disturbed tiny run: its folder and its content."
    out = tmp_path_factory.mktemp('tiny')/'runs'
    assert drive.finish(out, tiny=True) == 0, out.with_suffix('.log').read_text()
    assert not drive.debris(out)
    return out, drive.content(out)

def pytest_collection_modifyitems(items):
    "The browser's long tests come first: many short ones even out what several workers do."
    items.sort(key=lambda item: item.path.name != 'test_site.py')
