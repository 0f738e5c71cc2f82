# Kamiyo Webhooks. `make` says what there is; Python 3.11 or newer and make are all it needs.
# Written for GNU make 3.81 too, which is the one macOS has.

PYTHON ?= python3
ARGS ?=

VENV := .venv
# Programs run as modules: their scripts in .venv do not start from every folder (a `$$` in its name, say).
PY := $(VENV)/bin/python
PIP := PIP_ROOT_USER_ACTION=ignore $(PY) -m pip --disable-pip-version-check --no-input -qq

# Scripts in .venv hold its path, so they are of no use once the folder was moved.
PLACE := $(shell cat $(VENV)/.place 2>/dev/null)
ifneq ($(PLACE),)
ifneq ($(PLACE),$(CURDIR))
$(shell rm -rf $(VENV))
endif
endif

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help run test properties check lock clean

help: ## Say what there is
	@echo "Kamiyo Webhooks"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-21s %s\n", $$1, $$2 }'
	@echo
	@echo "  PYTHON=python3.13 chooses the Python that .venv is made with; ARGS=\"…\" goes to the program that is run."

run: $(VENV)/.runtime $(VENV)/.project ## Set up if need be, and start on http://127.0.0.1:8000 (PORT=9000: another port)
	@exec $(PY) -m kamiyo serve --dev $(ARGS)

# The tests start some two hundred interpreters, and each would compile this project anew where nothing is kept.
test properties: export PYTHONDONTWRITEBYTECODE :=

# Side by side, one more than there are cores, since many of them wait; what runs against the clock comes after, two and two.
BESIDE = $(shell n=`getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2`; [ $$n -lt 4 ] && expr $$n + 1 || echo 4)

# How often a story that fails is told once more: not at all, but in CI, which prints both. See docs/decisions/0029.
AGAIN = $(if $(RERUNS),--reruns $(RERUNS))

test: $(VENV)/.dev $(VENV)/.project ## Run the tests (ARGS="tests/test_event.py -x")
ifeq ($(ARGS),)
	@$(PY) -m pytest -q $(AGAIN) -n $(BESIDE) --dist worksteal -m "not alone"
	@$(PY) -m pytest -q $(AGAIN) -n 2 --dist loadgroup -m alone tests/stories
else
	@$(PY) -m pytest $(ARGS)
endif

properties: $(VENV)/.dev $(VENV)/.project ## The laws of order, tried for much longer than the tests do (THOROUGHNESS=10)
	@KAMIYO_THOROUGHNESS=$(or $(THOROUGHNESS),10) $(PY) -m pytest -q -n auto --timeout 3600 tests/test_order.py tests/test_ties.py

check: $(VENV)/.dev $(VENV)/.project ## Lint, format, types, security, known vulnerabilities
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy kamiyo api tests $(if $(wildcard bench/*.py),bench)
	$(PY) -m bandit -q -c pyproject.toml -r kamiyo api
	@$(PY) -m pip_audit --disable-pip --require-hashes -r requirements-dev.txt --progress-spinner off --format json \
		2>$(VENV)/.audit.log | $(PY) -c "$$AUDIT" $(VENV)/.audit.log

lock: $(VENV)/.dev ## Write the lock files from requirements*.in (ARGS=--upgrade: newest versions)
	@set -e; for name in requirements requirements-otel requirements-dev; do \
		cp $$name.txt $(VENV)/lock.txt; \
		$(PY) -m uv pip compile -q --no-config --universal --python-version 3.11 --generate-hashes \
			--no-emit-index-url --no-annotate --no-header $(ARGS) $$name.in \
			$$([ $$name = requirements ] || echo --constraint requirements.txt) -o $(VENV)/lock.txt >/dev/null; \
		if cmp -s $(VENV)/lock.txt $$name.txt; then echo "$$name.txt is as it was."; \
		else cp $(VENV)/lock.txt $$name.txt; echo "$$name.txt is new; the next make installs it."; fi; \
	done

clean: ## Remove what make and the tools made; never the data in .kamiyo
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .schemathesis test-results
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp stands for a lock that is installed. A lock that changed since makes .venv anew, so that nothing of an
# older one stays; a stamp that is missing adds to what is there.
$(VENV)/.runtime: requirements.txt
	@$(install)

$(VENV)/.dev: requirements-dev.txt requirements.txt
	@$(install)
	@touch $(VENV)/.runtime

$(VENV)/.project: pyproject.toml $(VENV)/.runtime
	@$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

define install
set -e; \
if [ -e $@ ]; then rm -rf $(VENV); fi; \
if ! $(PY) -c 'import pip' 2>/dev/null; then \
	command -v "$(PYTHON)" >/dev/null || { \
		echo "Kamiyo needs Python 3.11 or newer, and there is no $(PYTHON). Name one: make $(MAKECMDGOALS) PYTHON=…"; exit 1; }; \
	"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Kamiyo needs Python 3.11 or newer, and $(PYTHON) is `"$(PYTHON)" -V 2>&1`. Name another: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }; \
	"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv"; exit 1; }; \
	"$(PYTHON)" -m venv --clear $(VENV); \
fi; \
echo "Installing `grep -c '==' $<` packages of $< into $(VENV), once…"; \
$(PIP) install --require-hashes -r $<; \
pwd -P > $(VENV)/.place; \
touch $@
endef

# pip-audit is content when nothing could be looked up; this says so.
define AUDIT
import json, sys
try:
    packages = json.load(sys.stdin)["dependencies"]
except ValueError:
    reason = open(sys.argv[1]).read().strip().splitlines()[-1:]
    print("audit: NOT DONE, pip-audit could not ask the database of known vulnerabilities:", *reason)
    sys.exit(0)
found = [(p, v) for p in packages for v in p.get("vulns", ())]
for package, vulnerability in found:
    print("audit:", package["name"], package["version"], vulnerability["id"], "fixed in", vulnerability["fix_versions"])
skipped = sum("skip_reason" in p for p in packages)
print(f"audit: {len(packages) - skipped} packages looked up, {len(found)} known vulnerabilities")
if skipped:
    print(f"audit: NOT DONE for {skipped} packages, which the database does not know or does not tell of here")
sys.exit(bool(found))
endef
export AUDIT

# The longer proofs: benchmarks and the chaos run.
-include bench/*.mk
