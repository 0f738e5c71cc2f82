# The storm, and what load does. Included by the Makefile.
#
#   make chaos                    ten minutes, a new seed (it is printed)
#   make chaos SECONDS=120        the cut that CI runs
#   make chaos SECONDS=60 SEED=7  the same storm as the last time with 7
#   make faults                   six broken builds, each of which has to be caught
#   make load                     two servers on one customer, for a minute

.PHONY: chaos faults load

chaos: $(VENV)/.dev $(VENV)/.project ## Kill, pause and cut off a whole system under load; judge its tables (SECONDS=600 SEED=7)
	@$(PY) -m bench.chaos --seconds $(or $(SECONDS),600) $(if $(SEED),--seed $(SEED))

# A build that three storms do not catch ends the loop with 1.
faults: $(VENV)/.dev $(VENV)/.project ## Run the storm on builds with a deliberate fault: each must be caught, by name
	@set -e; for fault in `$(PY) -m bench.chaos --list-broken`; do \
		caught=; \
		for seed in $(or $(SEED),5 6 7); do \
			if $(PY) -m bench.chaos --seconds $(or $(SECONDS),20) --seed $$seed --broken $$fault --must-be-caught; \
			then caught=yes; break; fi; \
		done; \
		test -n "$$caught"; \
	done

load: $(VENV)/.dev $(VENV)/.project ## The stories of load, the first of them for a minute (SECONDS=60)
	@KAMIYO_LOAD_SECONDS=$(or $(SECONDS),60) $(PY) -m pytest tests/stories/test_load.py --timeout 900
