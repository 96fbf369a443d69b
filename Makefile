# SPDX-License-Identifier: GPL-2.0-or-later
# Everything starts from Debian, git and make. Try `make help`.

SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON := /usr/bin/python3
VENV := .venv
CACHE := $(or $(BACKUPCTL_CACHE),.cache)
# Twice as many as there are cores, up to four: most tests wait for a QEMU, or for a time-out, now and then.
WORKERS := $(shell n=$$(nproc); echo $$((n > 1 ? 4 : 2)))
PIP := $(VENV)/bin/pip install -q --disable-pip-version-check --no-input
LOCK := --quiet --generate-hashes --allow-unsafe --all-build-deps --strip-extras --no-annotate \
    --no-emit-options --no-emit-index-url --no-emit-find-links --no-emit-trusted-host

QUICK := $(addprefix tests/,unit screens drills/test_drill.py integration/test_known_moment.py \
    integration/test_protocol_page.py integration/test_prune_command.py)

.PHONY: help setup packages packages-for-tests check test test-quick test-long explore planted screens report-picture man drills fuzz demo \
    bench bench-quick bench-scale dist deb deb-test site lock clean

help: ## Show this (at once)
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

setup: $(VENV)/.ready ## Install what is missing; leaves .venv/bin/backupctl (1 min, then at once)

packages:
	@fixtures/packages.sh

packages-for-tests:
	@fixtures/packages.sh tests

# The system's own interpreter, because Debian's libnbd serves no other.
$(VENV)/.ready: requirements.txt pyproject.toml | packages
	@echo "making $(VENV): backupctl and the pinned Python packages that it needs"
	@$(PYTHON) -m venv --system-site-packages $(VENV)
	@$(PIP) --require-hashes -r requirements.txt
	@$(PIP) --no-deps --no-build-isolation -e .
	@$(VENV)/bin/python -m compileall -q backupctl  # a unit that may write nowhere would do it at each run
	@touch $@

$(VENV)/.tools: requirements-dev.txt $(VENV)/.ready | packages-for-tests
	@echo "adding to $(VENV) what checks and tests need: ruff, mypy, pytest"
	@$(PIP) --require-hashes -r requirements-dev.txt
	@touch $@

check: $(VENV)/.tools ## Format, lint, types (10 s)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

test: $(VENV)/.tools ## All tests but the slow ones, on QEMU 7.2, 10.0 and 11.1 and on real guests (20 min on two cores)
	$(VENV)/bin/pytest -n $(WORKERS) -m "not slow"

test-quick: $(VENV)/.tools ## Unit tests, screens, known points in time and some drills, for the working hour (3 min on two cores)
	$(VENV)/bin/pytest -n $(WORKERS) -m "not slow and not guest" $(QUICK)

test-long: $(VENV)/.tools ## The tests that take longer than CI has time for (an hour or more)
	$(VENV)/bin/pytest -n $(WORKERS) -m slow --ignore tests/exploration --ignore tests/planted

screens: $(VENV)/.tools ## Keep every screen as it is now, after a change of what is seen; then read the difference (20 s)
	BACKUPCTL_RENEW_SCREENS=1 $(VENV)/bin/pytest -q -n $(WORKERS) tests/screens

report-picture: setup ## Make the picture of a report in docs/ anew, after a change of its looks (10 s)
	$(VENV)/bin/python -m fixtures.report_picture docs/report.png

man: setup ## Make the manual pages and shell completions in share/ anew, after a change of commands or options (3 s)
	$(VENV)/bin/python -m fixtures.manual

drills: $(VENV)/.tools ## Break runs in every way, on the simulator and on a real QEMU (5 min)
	$(VENV)/bin/backupctl drill --on simulator
	$(VENV)/bin/backupctl drill --on qemu
	$(VENV)/bin/pytest -n $(WORKERS) tests/drills tests/integration/test_failures.py tests/integration/test_topology.py

fuzz: $(VENV)/.tools ## Feed every parser with garbage; FUZZ_SECONDS=60 for longer on each (3 min)
	$(VENV)/bin/python -m tests.fuzz --seconds $(or $(FUZZ_SECONDS),8)

explore: $(VENV)/.tools ## Interrupt a run, and the recovery after it, at every step, on the simulator (hours)
	$(VENV)/bin/pytest -n $(WORKERS) -m slow tests/exploration

planted: $(VENV)/.tools ## Plant bugs, one at a time: the tests must catch each (4 min)
	$(VENV)/bin/pytest -n $(WORKERS) tests/planted

demo: setup ## The main job live, on a real Linux guest; on the simulator where there is no QEMU (30 s; 4 s)
	@$(VENV)/bin/python -m fixtures.demo

bench: setup packages-for-tests ## Measure every command beside what else people would use; AGAINST=PROGRAM for another backupctl (10 min)
	$(VENV)/bin/python -m fixtures.bench --json docs/performance.json $(if $(AGAINST),--against $(AGAINST))
	$(VENV)/bin/python -m fixtures.bench.report
	$(VENV)/bin/python -m fixtures.bench_fixed --rounds 3 $(if $(AGAINST),--against $(AGAINST))
	$(VENV)/bin/python -m fixtures.bench_simulator

bench-scale: setup packages-for-tests ## Measure list, check and report on 1,000 VMs with 400 points each, on 4 GB of disk (15 min)
	$(VENV)/bin/python -m fixtures.many_vms

bench-quick: setup packages-for-tests ## Fail if a ratio to qemu-img is half of what docs/performance.json has (1 min)
	$(VENV)/bin/python -m fixtures.bench.quick

site: $(VENV)/.tools ## Build the documentation as a site, in the cache; what is missing or leads nowhere is an error (10 s)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict -f fixtures/site/mkdocs.yml

dist: setup ## Build the wheel and the source distribution in dist/, the same from the same commit (5 s)
	@$(VENV)/bin/python -m fixtures.dist

deb: setup ## Build the Debian package in dist/, for this Debian or RELEASE=12, 13; needs debhelper (1 min)
	@$(VENV)/bin/python -m fixtures.deb $(if $(RELEASE),--release $(RELEASE))

deb-test: $(VENV)/.tools ## Install, use, upgrade and remove the package on Debian 12 and 13; needs root (10 min, the first time longer)
	@fixtures/packages.sh build
	$(VENV)/bin/pytest -m "slow or not slow" tests/packages

lock: packages ## Pin the Python packages anew, with their hashes, after a change of pyproject.toml (1 min)
	@$(PYTHON) -m venv $(CACHE)/pip-tools
	@$(CACHE)/pip-tools/bin/pip install -q --disable-pip-version-check --require-hashes -r requirements-lock.txt
	@for pair in "requirements.txt" "requirements-dev.txt --extra=dev" "requirements-lock.txt --extra=lock"; do \
	    CUSTOM_COMPILE_COMMAND="make lock" $(CACHE)/pip-tools/bin/pip-compile $(LOCK) -o $$pair pyproject.toml && \
	    sed -i '1i # SPDX-License-Identifier: GPL-2.0-or-later' $${pair%% *} || exit 1; done

clean: ## Remove what setup and tests made here (at once)
	rm -rf $(VENV) $(CACHE) dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
