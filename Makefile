# Everything happens in a virtual environment beside this file. `make run` and `make test` need Python 3.11 (or newer) and nothing else.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
ENV := OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
PATHS = PATH="$(CURDIR)/$(BIN):$$PATH"
NOTEBOOKS = $(shell find nbs -name '*.ipynb' -not -path '*/.*' | sort)

.PHONY: run test test-notebooks test-rest soak bench notebooks docs lab clean

run: .venv/installed        ## the main job: ResNet-20 on digits, 3 seeds, all variants, with a report at the end
	$(BIN)/kesi_run

test: .venv/developer       ## everything that must hold before a commit; notebooks and tests side by side
	$(PATHS) $(BIN)/ruff check kesi tests docs
	$(MAKE) -j 2 test-notebooks test-rest

test-notebooks: .venv/developer
	$(PATHS) $(ENV) $(BIN)/nbdev_test --n_workers 3 --do_print

test-rest: .venv/developer
	$(PATHS) $(ENV) $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations 12 -m "not soak" tests

soak: .venv/developer       ## the long tests: many kills, races, full disks, hundreds of bad inputs
	$(PATHS) $(ENV) $(BIN)/python -m pytest -q -m soak tests

bench: .venv/developer      ## how fast this machine is: about ten minutes; the measurements go to bench.json, a picture beside them
	$(PATHS) $(BIN)/kesi_bench

notebooks: .venv/developer  ## export the package, execute all notebooks in place, clean them, write README.md
	$(PATHS) $(BIN)/nbdev_export
	for n in $(NOTEBOOKS); do echo $$n; $(PATHS) $(ENV) $(BIN)/jupyter nbconvert --log-level=ERROR --to notebook --execute --ExecutePreprocessor.store_widget_state=False --inplace $$n || exit 1; done
	$(PATHS) $(BIN)/nbdev_clean
	$(PATHS) $(BIN)/python docs/picture.py
	$(BIN)/python docs/readme.py

docs: .venv/docs            ## the site, in _docs/html
	$(BIN)/python docs/build.py

lab: .venv/developer        ## JupyterLab, opened at the first chapter
	$(PATHS) $(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --ServerApp.root_dir=nbs --LabApp.default_url=/lab/tree/index.ipynb

clean:                      ## remove what was installed and built; run folders stay
	rm -rf .venv _docs *.egg-info build

.venv/made:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip
	touch $@

.venv/installed: .venv/made settings.ini setup.py
	$(BIN)/pip install -q -e .
	touch $@

.venv/developer: .venv/made settings.ini setup.py
	$(BIN)/pip install -q -e '.[dev]'
	touch $@ .venv/installed

.venv/docs: .venv/made settings.ini setup.py
	$(BIN)/pip install -q -e '.[docs]'
	touch $@ .venv/installed
