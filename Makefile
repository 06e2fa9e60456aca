# Everything is set up in a virtual environment of its own; nothing else on the machine changes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NANO := examples/mobilellm-r1-nano

.PHONY: quickstart test testbed tools clients swift lint docs clean

quickstart: $(VENV)/.executorch,onnx,coreml  ## The demo checkpoint to a verified .pte that answers a question
	$(BIN)/mobilellm export mobilellm-r1-nano-int4 --checkpoint $(NANO) -o build/nano
	$(BIN)/mobilellm generate build/nano --prompt "Ada has 12 eggs. Ada finds 7 more. Ada sells 5. How many eggs does Ada have now?"

# By name: in xdist's order, of the number of tests, the files of a few long tests come last.
test: $(VENV)/.dev  ## All tests, on two processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=25

testbed: $(VENV)/.dev  ## Devices for the tests: adbd, and an arm64 Debian in qemu (Debian, root)
	PYTHON=$(abspath $(BIN))/python tests/devices/testbed.sh

tools: $(VENV)/.dev  ## Programs for the tests: browser, registry, Arm emulator, clients of others (Debian, root)
	PYTHON=$(abspath $(BIN))/python tests/tools.sh

clients: $(VENV)/.dev  ## Run the clients of others (see tools), and write the table of docs/clients.md
	rm -f build/clients.jsonl
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/clients
	$(BIN)/python tests/clients/table.py

swift:  ## A Swift compiler for the test of the iOS sample, 470 MB to download (Debian)
	tests/ios/swift.sh

lint: $(VENV)/.dev  ## Format, lint and static types
	$(BIN)/ruff format --check devices exporter tests examples
	$(BIN)/ruff check devices exporter tests examples
	$(BIN)/mypy

docs: $(VENV)/.docs  ## The pages in docs/ as a site in build/docs; a broken link fails
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/.%: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[$*]"
	touch $@
