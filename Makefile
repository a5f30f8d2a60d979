# make run · make test · make docs · make lab: each sets up .venv first when it is missing or its pins have changed.
PYTHON ?= python3
BIN := .venv/bin
DEV := $(foreach r,$(shell sed -n 's/^dev_requirements *= *//p' settings.ini),'$(r)')

.PHONY: run test docs lab export readme
run: .venv/ready
	$(BIN)/whatmatters run roar

test: .venv/ready
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal tests

# the site, without network: chapters, experiments, ledger, papers
docs: .venv/ready
	$(BIN)/python nbs/site/build.py _docs

# a workspace beside your own, laid out anew at every start; LAB="--no-browser --port 9000" hands on options
lab: export JUPYTERLAB_WORKSPACES_DIR := .venv/workspaces
lab: .venv/ready
	$(BIN)/jupyter labextension disable @jupyterlab/apputils-extension:announcements
	$(BIN)/jupyter lab workspaces import nbs/lab.json
	$(BIN)/jupyter lab --LabApp.default_url=/lab/workspaces/whatmatters $(LAB)

# after editing a notebook, or a new record: the package, its requirements and the README with its figures follow
export: .venv/ready
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/nbdev_requirements --path pkg
	$(BIN)/jupyter nbconvert --log-level ERROR --execute --to notebook --inplace nbs/index.ipynb
	$(BIN)/nbdev_clean --fname nbs/index.ipynb
	$(MAKE) readme

README := README.md
readme:
	$(BIN)/jupyter nbconvert --log-level ERROR --to markdown --stdout --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_cell_tags hide --TagRemovePreprocessor.remove_input_tags remove-input nbs/index.ipynb \
		> $(README).partial
	sed 's#\](\([a-z]*/[^)]*\.ipynb\))#](nbs/\1)#g' $(README).partial > $(README) && rm $(README).partial

.venv/ready: constraints.txt pkg/pyproject.toml pkg/requirements.txt
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit('PYTHON: got Python %d.%d, want 3.11 to 3.13, as in: make PYTHON=python3.12 test' % v)"
	@echo 'setting up .venv with the pinned environment: a few minutes, once'
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ./pkg $(DEV)
	touch $@
