#!/usr/bin/env bash
# Runs a command with KAMIYO_TEST_DATABASE_URL set to a throw-away server of Debian's PostgreSQL, and ends that server:
#   scripts/with_debian_postgres.sh make test
set -euo pipefail

bin=$(compgen -G '/usr/lib/postgresql/*/bin' | sort -V | tail -n 1 || true)
if [[ -z $bin ]]; then
    echo "Debian's PostgreSQL is not here: apt-get install postgresql" >&2
    exit 1
fi

# PostgreSQL does not run as root; the package's own user can do it then.
as_owner() { if [[ $EUID -eq 0 ]]; then runuser -u postgres -- "$@"; else "$@"; fi; }

folder=$(mktemp -d)
[[ $EUID -ne 0 ]] || chown postgres "$folder"
port=$(python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
stop() {
    as_owner "$bin/pg_ctl" -D "$folder/data" -m immediate -w stop >/dev/null 2>&1 || true
    rm -rf "$folder"
}
trap stop EXIT

cd /
as_owner "$bin/initdb" -D "$folder/data" -U kamiyo --auth=trust --encoding=UTF8 --locale=C.UTF-8 >/dev/null
as_owner "$bin/pg_ctl" -D "$folder/data" -l "$folder/log" -w start \
    -o "-p $port -k $folder -h 127.0.0.1 -c fsync=off -c full_page_writes=off -c max_connections=200 -c max_locks_per_transaction=256" >/dev/null
cd "$OLDPWD"
KAMIYO_TEST_DATABASE_URL="postgresql://kamiyo@127.0.0.1:$port/postgres" "$@"
