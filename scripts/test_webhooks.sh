#!/usr/bin/env bash
# The full check of a running Kamiyo: health, a signed event in, processed, a duplicate, a forgery, statistics, failed
# list. Exit status 0 when every step is as it should be.
#
#   ./scripts/test_webhooks.sh [BASE_URL]          default: http://localhost:$PORT, PORT 8000
#
# ADMIN_API_KEY and STRIPE_WEBHOOK_SECRET come from the environment, .env, or what `make run` made. With the Stripe CLI
# installed and logged in, and `stripe listen` forwarding here, the event comes from Stripe; otherwise from the
# built-in simulator. KAMIYO_SIMULATE=1 always takes the simulator.
set -uo pipefail
case ${1:-} in
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
    -*) echo "test_webhooks.sh takes the address of a server, such as https://api.example.com; see --help" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.." || exit 2

value_of() { # NAME: the environment, then .env, then the development secrets
    local name=$1 file line
    if [ -n "${!name:-}" ]; then printf '%s' "${!name}"; return; fi
    for file in .env "${KAMIYO_DATA_DIR:-.kamiyo}/development.env"; do
        [ -r "$file" ] || continue
        line=$(grep -E "^(export )?$name=" "$file" | tail -n 1) || continue
        line=${line#*=}; line=${line%[\"\']}; line=${line#[\"\']}
        if [ -n "$line" ]; then printf '%s' "$line"; return; fi
    done
}

base=${1:-http://localhost:$(value_of PORT | grep . || echo 8000)}
api=$base/api/v1/webhooks
admin_key=$(value_of ADMIN_API_KEY)
kamiyo=$(command -v .venv/bin/kamiyo || command -v kamiyo) || { echo "kamiyo is not installed: run make run first"; exit 2; }
failures=0
reply=$(mktemp); trap 'rm -f "$reply"' EXIT

step() { # SENTENCE STATUS: 0 is well
    if [ "$2" -eq 0 ]; then printf '  ok    %s\n' "$1"; else printf '  FAIL  %s\n' "$1"; failures=$((failures + 1)); fi
}
# The key goes in by a file descriptor: on the command line every user of the machine could read it.
call() { # METHOD PATH [CURL OPTION…]: prints the HTTP status, leaves the body in $reply
    local method=$1 path=$2; shift 2
    curl -sS -m 20 -o "$reply" -w '%{http_code}' -X "$method" -H @<(printf 'X-Admin-Key: %s' "$admin_key") "$@" "$api$path"
}
said() { grep -q "$1" "$reply"; }
field() { sed -n "s/.*\"$1\": *\"\([^\"]*\)\".*/\1/p" | head -n 1; }

echo "Testing $api"

status=$(call GET /health) || status=000
if [ "$status" = 000 ]; then echo "  FAIL  nothing answers at $base: start it with make run"; exit 1; fi
[ "$status" = 200 ] && said '"webhook_system"'
step "health answers ($(field status < "$reply"))" $?

status=$(call GET /supported-events)
[ "$status" = 200 ] && said '"customer.subscription.created"'
step "the supported events are listed" $?

if [ -z "$admin_key" ]; then echo "  FAIL  ADMIN_API_KEY is not set, neither here nor in .env: the rest cannot be checked"; exit 1; fi
# Each further try with a wrong key would be answered more slowly.
status=$(call GET '/events?limit=1')
case $status in
    401) echo "  FAIL  $base does not take the ADMIN_API_KEY that is set here: give it the server's; the rest cannot be checked"; exit 1 ;;
    503) echo "  FAIL  $base has no ADMIN_API_KEY, or no database: $(field detail < "$reply"); the rest cannot be checked"; exit 1 ;;
esac

from_stripe=no
if [ -z "${KAMIYO_SIMULATE:-}" ] && command -v stripe > /dev/null && stripe config --list 2> /dev/null | grep -q 'test_mode_api_key'; then
    from_stripe=yes
fi

if [ "$from_stripe" = yes ]; then
    call GET '/events?limit=1' > /dev/null; newest=$(field event_id < "$reply")
    stripe trigger customer.created > /dev/null 2>&1
    step "stripe trigger customer.created (with stripe listen forwarding here)" $?
    for _ in $(seq 50); do
        call GET '/events?type=customer.created&limit=1' > /dev/null; event=$(field event_id < "$reply")
        [ -n "$event" ] && [ "$event" != "$newest" ] && break
        sleep 0.2
    done
    [ -n "${event:-}" ] && [ "$event" != "$newest" ]
    step "the event from Stripe arrived: ${event:-none}" $?
else
    lines=$("$kamiyo" trigger customer.created --only --repeat 2 --json --url "$api/stripe")
    event=$(printf '%s\n' "$lines" | head -n 1 | field event_id)
    printf '%s\n' "$lines" | head -n 1 | grep -q '"status_code": 200, "message": "Event received"'
    received=$?
    step "a signed event is received: ${event:-none}" $received
    if [ $received -ne 0 ]; then
        printf '        %s\n' "$(printf '%s\n' "$lines" | head -n 1 | field message)"
        echo "        Is STRIPE_WEBHOOK_SECRET here one of the server's? The rest cannot be checked."
        exit 1
    fi
    printf '%s\n' "$lines" | tail -n 1 | grep -q '"status_code": 200, "message": "Event already \(received\|processed\)"'
    step "its duplicate is known, and answered 200" $?
fi

outcome=none
for _ in $(seq 100); do
    call GET "/events/${event:-none}" > /dev/null
    outcome=$(field status < "$reply"); [ "$outcome" = processed ] && break
    sleep 0.1
done
[ "$outcome" = processed ]
step "it is processed (status: ${outcome:-unknown})" $?

forged='{"id":"evt_forged","object":"event","type":"customer.created","data":{"object":{"id":"cus_forged","object":"customer"}}}'
status=$(call POST /stripe -H 'Content-Type: application/json' -d "$forged")
[ "$status" = 400 ] && said 'Missing Stripe signature header'
step "a delivery without a signature is refused" $?
status=$(call POST /stripe -H "Stripe-Signature: t=$(date +%s),v1=$(printf '0%.0s' $(seq 64))" -d "$forged")
[ "$status" = 400 ] && said 'Invalid signature'
step "a forged signature is refused" $?
[ "$(call GET /events/evt_forged)" = 404 ]
step "and nothing of it was stored" $?

status=$(call GET /statistics)
[ "$status" = 200 ] && said '"total_events"'
step "statistics: $(grep -o '"total_events":[0-9]*' "$reply" | tr -d '"')" $?
status=$(call GET /events/failed/list)
[ "$status" = 200 ] && said '"count"'
step "failed events: $(grep -o '"count":[0-9]*' "$reply" | tr -d '"')" $?
status=$(curl -sS -m 20 -o /dev/null -w '%{http_code}' "$api/statistics")
[ "$status" = 401 ]
step "without the admin key the door is shut" $?
curl -sS -m 20 -o "$reply" "$base/metrics" && said '^webhook_events_total'
step "Prometheus metrics at /metrics" $?

if [ "$failures" -eq 0 ]; then echo "All is well."; else echo "$failures of the steps failed."; fi
[ "$failures" -eq 0 ]
