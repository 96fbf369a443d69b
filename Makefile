# SPDX-License-Identifier: GPL-2.0-or-later
# Everything starts from Debian, git and make. Try `make help`.

SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON := /usr/bin/python3
VENV := .venv
CACHE := $(or $(BACKUPCTL_CACHE),.cache)
WORKERS := $(shell n=$$(nproc); echo $$((n > 4 ? 4 : n)))
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

# Debian package: why. Only those that are missing are installed.
PACKAGES := \
    python3-venv:makes_.venv_with_the_system's_Python \
    python3-libnbd:reads_and_writes_over_NBD_(not_on_PyPI) \
    qemu-system-x86:the_QEMU_to_back_up_in_tests_and_demo \
    qemu-system-common:qemu-storage-daemon,_which_serves_the_repository's_images \
    qemu-utils:qemu-img \
    seabios:lets_that_QEMU_boot_a_guest \
    e2fsprogs:makes_and_checks_the_test_guest's_file_system \
    cpio:packs_the_test_guest \
    xz-utils:unpacks_kernel_modules \
    libglib2.0-0:the_guest_agent's_library

.PHONY: help setup packages check test test-long demo bench clean

help: ## Show this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

setup: packages $(VENV)/.ready ## Install what is missing; leaves .venv/bin/backupctl (1 min, then nothing)

packages:
	@missing=(); for entry in $(PACKAGES); do name=$${entry%%:*}; \
	    dpkg-query -W -f '$${Status}' "$$name" 2>/dev/null | grep -q 'ok installed' || { missing+=("$$name"); \
	    why=$${entry#*:}; echo "installing $$name: $${why//_/ }"; }; done; \
	if [ $${#missing[@]} -gt 0 ]; then \
	    $(SUDO) apt-get -q update >/dev/null && \
	    DEBIAN_FRONTEND=noninteractive $(SUDO) -E apt-get -q -y --no-install-recommends install "$${missing[@]}" >/dev/null; fi

# The system's own interpreter, because Debian's libnbd serves no other.
$(VENV)/.ready: requirements.txt pyproject.toml | packages
	@echo "making $(VENV): backupctl and its pinned Python packages"
	@$(PYTHON) -m venv --system-site-packages $(VENV)
	@$(VENV)/bin/pip install -q --disable-pip-version-check --require-hashes -r requirements.txt
	@$(VENV)/bin/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

check: setup ## Format, lint, types (10 s)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

test: setup ## All tests on QEMU 7.2 and 10.0 and on a real guest (5 min)
	$(VENV)/bin/pytest -n $(WORKERS) -m "not slow"

test-long: setup ## The tests that take longer than CI has time for
	$(VENV)/bin/pytest -n $(WORKERS) -m slow

demo: setup ## The main job live, on a real Linux guest (2 min)
	@$(VENV)/bin/python -m fixtures.demo

bench: setup ## Speed of the copy, as a ratio to qemu-img convert in the same run (1 min)
	$(VENV)/bin/python -m fixtures.bench_copy

clean: ## Remove what setup and tests made here
	rm -rf $(VENV) $(CACHE) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
