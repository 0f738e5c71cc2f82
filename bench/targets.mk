# The benchmark's targets; the Makefile includes this.
#
# wrk comes from the system (Debian, Ubuntu: apt install wrk). Everything else is installed on first use, into
# bench/.cache, from locks.

REPEATS ?= 3
CONNECTIONS ?= 64,16,1
PEERS ?=
PROFILE ?=
ROWS ?= 10000000

.PHONY: bench bench-growth bench-mirror bench-cut

bench: $(VENV)/.runtime $(VENV)/.project ## Measure against other receivers (SECONDS=3 REPEATS=3 PEERS=… PROFILE=1)
	@$(PY) -m bench.run --seconds $(or $(SECONDS),4) --repeats $(REPEATS) --connections $(CONNECTIONS) \
		$(if $(PEERS),--peers $(PEERS)) $(if $(PROFILE),--profile) $(ARGS)

bench-growth: $(VENV)/.runtime $(VENV)/.project ## Fill ten million events and measure again (ROWS=1000000 DAYS=8 SERVER="shared_buffers=4GB")
	@$(PY) -m bench.growth --rows $(ROWS) --seconds $(or $(SECONDS),4) --repeats $(REPEATS) $(if $(DAYS),--days $(DAYS)) \
		$(if $(SERVER),--server $(SERVER)) $(ARGS)

bench-mirror: $(VENV)/.runtime $(VENV)/.project ## What KAMIYO_MIRROR costs: the same events with and without it
	@$(PY) -m bench.mirror $(ARGS)

bench-cut: $(VENV)/.runtime $(VENV)/.project ## All for a moment, documentation untouched: that they still work
	@$(PY) -m bench.run --seconds 1 --repeats 1 --connections 64 --no-docs --results bench/.cache/cut.json $(ARGS)
	@$(PY) -m bench.growth --rows 30000 --seconds 1 --repeats 1 --no-docs --results bench/.cache/cut-growth.json
	@$(PY) -m bench.mirror --events 2000 --rounds 1
