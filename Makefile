# Granary. Two commands on a fresh machine: `make demo` and `make test`. `make help` lists the rest.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
PY := .venv/bin/python

# What `make harvest` is asked to do
MODEL ?= black-forest-labs/FLUX.1-schnell
LAYERS ?= all
STREAMS ?=
PROMPTS ?=
IMAGES ?=
RESOLUTION ?=
OUT ?= data/$(subst /,--,$(MODEL))
FLAGS ?=

JOBS ?= 2
DEMO ?= demo
# Spinning threads of two programs on one machine slow each other up to twentyfold.
export OMP_WAIT_POLICY ?= PASSIVE
DEMO_TRAIN ?= 768
DEMO_VAL ?= 448
DEMO_HARVEST ?= --model tiny-flux --prompts builtin:shapes --batch-size 32
# Fewer than 8 % of the features active, and small batches: a minute and a half of training for eleven dictionaries.
DEMO_TRAINING ?= --activation topk --k 64 --expansion 8 --batch 1024 --epochs 2 --lr 3e-3 --lr-warmup-rows 20000 \
  --schedule cosine --decoder-bias mean --autocast auto
DEMO_ANALYSIS = --store "$(DEMO)/store-val" --dictionaries "$(DEMO)/dictionaries"

.PHONY: help setup demo test test-all test-gpu check format bench bench-store bench-train bench-analyze bench-circuits steer-demo explore faithfulness-demo validate-demo notebooks test-exchange torture torture-training torture-workers harvest tiny-flux clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 19

setup: .venv/installed ## create .venv with the locked dependencies

.venv/installed: requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Granary needs Python 3.11 or newer; say PYTHON=python3.12")'
	@echo "installing the locked dependencies into .venv (a few minutes, once)"
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check --quiet --requirement requirements.lock
	@touch $@

demo: .venv/installed ## prompts -> stores -> packs -> dictionaries -> graphs -> report, on tiny-flux, in DEMO=demo
	$(PY) -m harvest $(DEMO_HARVEST) --split train --images $(DEMO_TRAIN) --pictures none --out "$(DEMO)/store-train"
	$(PY) -m harvest $(DEMO_HARVEST) --split val --images $(DEMO_VAL) --pictures png --trace --trace-images 0-31 --trace-steps 3 --out "$(DEMO)/store-val"
	$(PY) -m store info "$(DEMO)/store-val"
	$(PY) -m store pack "$(DEMO)/store-train" --split train --out "$(DEMO)/pack-train"
	$(PY) -m store pack "$(DEMO)/store-val" --split val --out "$(DEMO)/pack-val"
	$(PY) -m train --pack "$(DEMO)/pack-train" --val "$(DEMO)/pack-val" --kind transcoder --sites all $(DEMO_TRAINING) --out "$(DEMO)/dictionaries"
	$(PY) -m train --pack "$(DEMO)/pack-train" --val "$(DEMO)/pack-val" --kind sae --sites img_2 $(DEMO_TRAINING) --out "$(DEMO)/dictionaries"
	$(PY) -m analyze scores $(DEMO_ANALYSIS) --out "$(DEMO)/analysis"
	$(PY) -m analyze scan $(DEMO_ANALYSIS) --kind contrastive --positive '\bred\b' --images 0-31 --sites img_3-4 --steps 3 --rank auroc --best 4 --name red --out "$(DEMO)/analysis"
	$(PY) -m analyze graph $(DEMO_ANALYSIS) --targets "$(DEMO)/analysis/scan/red.csv" --check --out "$(DEMO)/graphs"
	$(PY) -m analyze all $(DEMO_ANALYSIS) --graphs "$(DEMO)/graphs" --out "$(DEMO)/analysis"

steer-demo: .venv/installed ## after make demo: suppress the circuit of every colour, beside single features, and judge the pictures, in DEMO=demo
	@test -d "$(DEMO)/analysis" || { echo "there is no $(DEMO)/analysis: run make demo first"; exit 2; }
	$(PY) -m harvest $(DEMO_HARVEST) --split val --images 96 --steps 0,1 --pictures none --trace --trace-images 0-95 --trace-steps 0,1 --out "$(DEMO)/store-circuits"
	$(PY) -m harvest $(DEMO_HARVEST) --split val --images 384 --seed 1 --layers 0 --streams img --steps 0 --pictures png --out "$(DEMO)/store-fresh"
	$(PY) -m analyze targets --traces "$(DEMO)/store-circuits" $(DEMO_ANALYSIS) --analysis "$(DEMO)/analysis" --out "$(DEMO)/circuits.csv"
	$(PY) -m analyze graph --store "$(DEMO)/store-circuits" --dictionaries "$(DEMO)/dictionaries" --targets "$(DEMO)/circuits.csv" --skip-inactive --no-page --out "$(DEMO)/circuits"
	$(PY) -m analyze guided $(DEMO_ANALYSIS) --traces "$(DEMO)/store-circuits" --analysis "$(DEMO)/analysis" --graphs "$(DEMO)/circuits" \
	  --judge "$(DEMO)/store-fresh" --images 32 --own circuit,contrast,single --out "$(DEMO)/guided"
	$(PY) -m analyze report $(DEMO_ANALYSIS) --graphs "$(DEMO)/graphs" --steering "$(DEMO)/guided" --out "$(DEMO)/analysis"

explore: .venv/installed ## after make demo: a local app to find features, move sliders and see the picture change
	$(PY) -m analyze explore $(DEMO_ANALYSIS) --analysis "$(DEMO)/analysis" --graphs "$(DEMO)/graphs" --out "$(DEMO)/explored"

DEMO_SPARSITY ?= --kind transcoder,sae --sites img_1,img_3,img_4 --activation topk --k 8,16,32,64 --expansion 8 --batch 1024 --epochs 1 \
  --lr 3e-3 --lr-warmup-rows 20000 --schedule cosine --decoder-bias mean --autocast auto

faithfulness-demo: .venv/installed ## after make demo: sparsity against faithfulness, transcoders against SAEs, in DEMO=demo
	@test -d "$(DEMO)/pack-train" || { echo "there is no $(DEMO)/pack-train: run make demo first"; exit 2; }
	$(PY) -m train --pack "$(DEMO)/pack-train" --val "$(DEMO)/pack-val" $(DEMO_SPARSITY) --out "$(DEMO)/sparsity"
	$(PY) -m analyze faithfulness --store "$(DEMO)/store-val" --dictionaries "$(DEMO)/sparsity/k-8" "$(DEMO)/sparsity/k-16" "$(DEMO)/sparsity/k-32" "$(DEMO)/sparsity/k-64" --each-step --images 0-15 --out "$(DEMO)/faithfulness"
	$(PY) -m analyze faithfulness --store "$(DEMO)/store-val" --dictionaries "$(DEMO)/dictionaries" --scope cumulative,all --images 0-31 --out "$(DEMO)/faithfulness-all"

validate-demo: .venv/installed ## after make demo: perturb what the demo's graphs name in the model itself, in DEMO=demo
	@test -d "$(DEMO)/graphs" || { echo "there is no $(DEMO)/graphs: run make demo first"; exit 2; }
	$(PY) -m analyze scan $(DEMO_ANALYSIS) --kind top --images 0-31 --sites img_3-4 --steps 3 --best 12 --name strongest --out "$(DEMO)/analysis"
	$(PY) -m analyze graph $(DEMO_ANALYSIS) --targets "$(DEMO)/analysis/scan/strongest.csv" --no-page --out "$(DEMO)/strongest-graphs"
	$(PY) -m analyze validate $(DEMO_ANALYSIS) --graphs "$(DEMO)/strongest-graphs" "$(DEMO)/graphs" --out "$(DEMO)/validation"
	$(PY) -m analyze validate $(DEMO_ANALYSIS) --graphs "$(DEMO)/graphs" --sources feature,error,rest --hold mlps --out "$(DEMO)/validation-kinds"

notebooks: .venv/installed ## after make demo: run the notebooks, and keep them with what they show in DEMO/notebooks
	GRANARY_DEMO="$(abspath $(DEMO))" $(PY) notebooks/run.py "$(DEMO)/notebooks"

harvest: .venv/installed ## run FLUX over prompts: make harvest LAYERS=0-15 [STREAMS= MODEL= PROMPTS= IMAGES= RESOLUTION= OUT= FLAGS=]
	$(PY) -m harvest --model "$(MODEL)" --layers "$(LAYERS)" $(if $(STREAMS),--streams "$(STREAMS)") --out "$(OUT)" \
	  $(if $(PROMPTS),--prompts "$(PROMPTS)") $(if $(IMAGES),--images $(IMAGES)) $(if $(RESOLUTION),--resolution $(RESOLUTION)) $(FLAGS)

# Files of tests are shared out among JOBS processes, each with one thread: two of them are half again as fast as one with two.
# Where Python was told to keep no bytecode, every process of theirs would compile all of it again.
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses $(JOBS) --dist loadfile

test: .venv/installed ## the tests that need no GPU and no network [JOBS=2]
	$(PYTEST) -m "not slow and not gpu"

test-all: .venv/installed ## the slow tests as well
	$(PYTEST) -m "not gpu"

test-gpu: .venv/installed ## the tests that need a GPU [CUDA_VISIBLE_DEVICES=0]
	CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES:-0} $(PY) -m pytest -m gpu

check: .venv/installed ## format, lint, types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

format: .venv/installed ## put the code into shape
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

bench: .venv/installed ## one table: Granary beside its peers, and beside what this machine could do at best (about twelve minutes)
	$(PY) -m bench --markdown build/bench.md

bench-store: .venv/installed .bench-peers/installed ## the store against raw files, memory maps, zarr-python and tensorstore
	$(PY) -m bench --only store --size full --out build/bench-store.json

.bench-peers/installed: .venv/installed # what we compare with and do not depend on
	$(PY) -m pip install --disable-pip-version-check --quiet --no-deps --target .bench-peers tensorstore==0.1.86
	@touch $@

bench-train: .venv/installed .bench-peers/train/installed ## packing, loading and training against a copy, a memory map, the reference's loop and three peers
	$(PY) -m bench --only pack,loader,step,shared,trainers --size full --out build/bench-train.json
	$(PY) -m bench.learned

bench-analyze: .venv/installed ## scores, features and coherence against plain passes and loops; memory at ten times the images
	$(PY) -m bench --only scores,features,coherence --size full --out build/bench-analyze.json
	$(PY) -m bench.analyze_memory

bench-circuits: .venv/installed ## attribution per expanded node against the whole model per node, as the reference does it
	$(PY) -m bench --only circuits --size full --out build/bench-circuits.json

test-exchange: .venv/installed .bench-peers/circuit-tracer/installed ## a graph of ours in circuit-tracer's own frontend (needs npm and chromium)
	$(PY) -m pytest tests/test_circuit_tracer_frontend.py

.bench-peers/circuit-tracer/installed: .venv/installed # its frontend, and the libraries that its page loads
	$(PY) -m pip install --disable-pip-version-check --quiet --no-deps --target .bench-peers/circuit-tracer circuit-tracer==0.5.0
	npm install --silent --no-audit --no-fund --ignore-scripts --prefix .bench-peers/circuit-tracer d3@7.9.0 d3-jetpack@2.2.1 dagre@0.8.5 pako@2.1.0
	@touch $@

.bench-peers/train/installed: .venv/installed bench/peers.txt
	$(PY) -m pip install --disable-pip-version-check --quiet --no-deps --target .bench-peers/train --requirement bench/peers.txt
	@touch $@

torture-training: .venv/installed ## kill packs and trainings 50 times; every pack and dictionary must end byte-equal
	$(PY) -m tests.torture_training --kills 50

torture-workers: .venv/installed ## four workers of one store, one killed, one stopped: the others finish it
	$(PY) -m tests.stopped_workers --fresh --parts 16 --lease-seconds 10

torture: .venv/installed ## kill harvests, resumes and extensions until 100 kills fell inside a part; every store must end byte-equal
	$(PY) -m tests.torture --kills 100

tiny-flux: .venv/installed ## train the embedded model again (about 45 minutes on 2 cores; resumable)
	$(PY) -m harvest.tiny_flux

clean: ## remove what the demo and the builds wrote
	rm -rf "$(DEMO)" build .pytest_cache .mypy_cache .ruff_cache .hypothesis
