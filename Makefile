# One virtual environment, .venv, serves every target; a second call reuses it.
PYTHON ?= python3
PORT ?= 8000
SERVE ?= 1
SCALE ?= quick
TASKS ?= rule110 depo gsm_infinite recall
WORKERS ?= 2
JOBS ?= 2
FILES ?= colab/*.ipynb

PY := .venv/bin/python
COLAB := .venv-colab/bin/python
STAMP := .venv/.stamp
# Two test workers on two cores: one thread each.
THREADS := OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help env test test-colab book notebooks lab reproduce student-release instructor-release grade slides clean

help:  ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-18s %s\n", $$1, $$2}' Makefile

env: $(STAMP)  ## set up .venv from constraints.txt (the other targets do so themselves)

# Where there is an NVIDIA GPU, torch comes the ordinary way; elsewhere the pinned one, from wherever pip looks.
$(STAMP): constraints.txt pyproject.toml
	@echo "setting up .venv: minutes and about 2 GB the first time, once"
	test -x $(PY) || $(PYTHON) -m venv .venv
	@if nvidia-smi >/dev/null 2>&1; then \
		grep -v '^torch==' constraints.txt > .venv/constraints.txt && \
		$(PY) -m pip install -q 'torch>=2.9'; \
	else \
		cp constraints.txt .venv/constraints.txt && \
		$(PY) -m pip install -q "$$(grep '^torch==' constraints.txt)"; \
	fi
	$(PY) -m pip install -q -c .venv/constraints.txt -e '.[book,lab,test,pretrained,course]'
	touch $@

test: $(STAMP)  ## lint, unit and property tests, the built site, and every chapter's stored outputs
	$(PY) -m ruff check .
	$(THREADS) SLEEPLIB_TEST_SITE=1 $(PY) -m pytest -q -n $(WORKERS) --dist loadgroup tests
	$(THREADS) $(PY) -m pytest -q -n $(WORKERS) --dist loadfile --nbval --nbval-current-env \
		--nbval-sanitize-with tests/nbval_sanitize.cfg book/*.ipynb

test-colab:  ## run the notebooks of colab/ under Colab's versions (but our torch), in a folder with nothing else (FILES=colab/01*)
	test -x $(COLAB) || $(PYTHON) -m venv .venv-colab
	$(COLAB) -m pip install -q "$$(grep '^torch==' constraints.txt)"
	$(COLAB) -m pip install -q -c constraints/colab.txt '.[pretrained]' ipykernel ipywidgets matplotlib pandas pillow seaborn nbval
	set -e; folder=$$(mktemp -d); cp $(FILES) $$folder; cd $$folder; $(THREADS) MPLBACKEND=agg \
		$(abspath $(COLAB)) -m pytest -q -p no:cacheprovider --nbval-lax --nbval-current-env .

book: $(STAMP)  ## build the book, warnings are errors, and serve it on 127.0.0.1:8000 (SERVE=0: only build)
	.venv/bin/jupyter-book build . -W --keep-going --all
ifneq ($(SERVE),0)
	$(PY) -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)
endif

notebooks: $(STAMP)  ## execute the chapters whose source changed (ALL=1: all of them)
	$(PY) book/build.py $(if $(ALL),--all)
	$(PY) book/runners.py

lab: $(STAMP)  ## open the chapters in JupyterLab
	.venv/bin/jupyter-lab --notebook-dir=book

reproduce: $(STAMP)  ## run what is missing, one niced process a core, resumable (SCALE=quick, rate, ablation, rival, taught, small, paper; TASKS=depo)
	code=0; for task in $(TASKS); do \
		$(PY) -m sleeplib reproduce $$task --scale $(SCALE) || code=$$?; test $$code != 130 || exit 130; \
	done; exit $$code

student-release: $(STAMP)  ## make the handouts of the course, and a zip of each, searched for solutions
	$(PY) course/release.py student

instructor-release: $(STAMP)  ## make autograder zips for Gradescope (SEED=a secret)
	@SEED='$(SEED)' $(PY) course/release.py instructor

grade: $(STAMP)  ## grade a folder of notebooks, resumable (SUBMISSIONS=folder SEED=a secret OUT=folder)
	@SEED='$(SEED)' $(THREADS) $(PY) course/grade.py '$(SUBMISSIONS)' --jobs $(JOBS) \
		$(if $(OUT),--out '$(OUT)') $(if $(WEAK),--weak)

slides: $(STAMP)  ## make the slides of the four lectures, one HTML file each, from the chapters
	$(PY) course/slides.py

clean:  ## remove what was built; keep .venv, records and checkpoints
	rm -rf _build build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name .venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
