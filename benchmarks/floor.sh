#!/bin/bash
# What benchmarks/converge holds Ansible against: the same done by a shell on the hosts. It goes there as
# ssh's command with one call at its end; what is large or secret comes on standard input.
set -euo pipefail

home=/opt/prefect
config=/etc/prefect
given=/run/floor # see floor.yml

# What a converge has made, but for what it compiles or downloads on the host (the environments), and for
# state.
paths() {
    local path
    for path in "$config" "$config"-firewall*.nft $given /etc/rustfs /etc/headscale \
        /etc/postgresql/17/main/{conf.d/prefect-fleet.conf,pg_hba.conf} /etc/sysctl.d/60-prefect-fleet.conf \
        /etc/systemd/system /usr/local/bin /usr/local/sbin "$home"; do
        if [ -e "$path" ]; then echo "${path#/}"; fi
    done
}

services() {
    systemctl list-units --plain --no-legend --state=active 'prefect-*' haproxy.service headscale.service \
        'postgresql@*' rustfs.service tailscaled.service | awk '{print $1}'
}

# Prints what the other calls need to know, as this shell reads it.
notes() {
    local control_url
    control_url=$(tailscale debug prefs 2>/dev/null | sed -n 's/.*"ControlURL": "\(.*\)".*/\1/p') || true
    printf '%s=%q\n' \
        packages "$(dpkg-query --show --showformat='${db:Status-Status} ${Package}\n' | sed -n 's/^installed //p')" \
        users "$(getent passwd prefect prefect-server rustfs)" \
        services "$(services)" \
        control_url "$control_url"
}

# Prints the checksums of the files. Python's caches are made by whatever runs.
sums() {
    cd /
    paths | xargs -I{} find {} -path "${home#/}/venvs" -prune -o -path "${home#/}/uv" -prune -o \
        -name __pycache__ -prune -o -type f -print0 | xargs --null sha256sum
}

# Prints a tar of the files.
files() {
    install -d -m 0700 $given
    if [ -e /etc/postgresql/17/main/conf.d/prefect-fleet.conf ]; then
        # Its password is stored as what verifies it.
        (umask 077 && as_postgres pg_dumpall --roles-only | sed -n '/ ROLE prefect\b/p' >$given/roles.sql)
    fi
    paths | tar --create --directory=/ --exclude="${home#/}/venvs" --exclude="${home#/}/uv" \
        --exclude=__pycache__ --exclude='*dhis2-standin*' --files-from=-
}

# Prints a tar of the settings of a worker host's workers.
workers() {
    tar --create --directory=/ "${config#/}/workers"
}

# Prints a tar of the state that gives a host its keys, its address in the tailnet, its buckets and
# their users. What holds it open is stopped: the host is to be removed.
state() {
    local path
    systemctl stop tailscaled.service
    systemctl stop headscale.service rustfs.service 2>/dev/null || true
    for path in headscale private/headscale rustfs tailscale; do
        if [ -e "/var/lib/$path" ]; then echo "var/lib/$path"; fi
    done | tar --create --directory=/ --files-from=-
}

as_postgres() {
    runuser --user=postgres -- "$@"
}

as_client() {
    systemd-run --quiet --pipe --wait --collect --service-type=exec --uid=prefect \
        --property=EnvironmentFile=$config/client.env --setenv=PREFECT_LOGGING_LEVEL=WARNING \
        --setenv=PYTHONPATH=$home/src "$@"
}

wait_for() { # a command that is to succeed
    local end=$((SECONDS + 300))
    until "$@" >/dev/null 2>&1; do
        if [ $SECONDS -ge $end ]; then
            echo "$(hostname): this never succeeded: $*" >&2
            exit 1
        fi
        sleep 0.2
    done
}

get() { # address
    curl --noproxy '*' --fail --silent --max-time 5 "$@"
}

port_open() { # host:port
    timeout 2 bash -c ": </dev/tcp/${1/://}"
}

# Of the API, with the password on standard input.
api() { # path
    (
        # shellcheck source=/dev/null
        . $config/client.env
        printf 'user = "%s"\n' "$PREFECT_API_AUTH_STRING" |
            get --config - "$PREFECT_API_URL/$1"
    )
}

setting() { # file, name
    sed -n "s/^$2='\{0,1\}\([^']*\)'\{0,1\}$/\1/p" "$1"
}

# Files of the workers of all pools but the canary's.
worker_settings() {
    local file
    for file in "$config"/workers/*.env; do
        [ "$file" = "$config/workers/canary.env" ] || echo "$file"
    done
}

wait_for_workers() {
    local file address
    worker_settings | while read -r file; do
        address=$(setting "$file" PREFECT_WORKER_WEBSERVER_HOST):$(setting "$file" PREFECT_WORKER_WEBSERVER_PORT)
        wait_for get "http://$address/health"
    done
}

start_workers() { # start or restart
    worker_settings | sed 's,.*/\(.*\)\.env,prefect-worker@\1.service,' | xargs systemctl "$1"
    wait_for_workers
}

install_environment() {
    local venv uv compile=false
    venv=$(readlink $home/venv)
    [ -e "$venv/complete" ] && return
    cd $home/locks
    uv=$home/uv/$(sha256sum uv.txt | cut -c 1-12)
    case $groups in *" prefect_server "* | *" prefect_worker "*) compile=true ;; esac
    python3 -m venv --clear "$uv"
    "$uv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps \
        --requirement=uv.txt
    export UV_SYSTEM_CERTS=true UV_COMPILE_BYTECODE=$compile
    "$uv/bin/uv" venv --quiet --clear --python=/usr/bin/python3 "$venv"
    "$uv/bin/uv" pip sync --quiet --require-hashes --python="$venv/bin/python" "$(basename "$venv").txt"
    chmod go-w "$venv/.lock"
    touch "$venv/complete"
}

install_packages() {
    # shellcheck disable=SC2154,SC2086 # from `notes`: names with line breaks between
    if ! dpkg-query --show $packages >/dev/null 2>&1; then
        apt-get -qq update
        DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get -qq --yes --no-install-recommends \
            install $packages </dev/null >/dev/null
    fi
}

create_users() {
    local name user_home shell
    # shellcheck disable=SC2154 # from `notes`
    while IFS=: read -r name _ _ _ _ user_home shell; do
        id "$name" >/dev/null 2>&1 ||
            useradd --system --user-group --home-dir "$user_home" --shell "$shell" "$name"
    done <<<"$users"
    install -d -m 0700 -o prefect -g prefect /var/lib/prefect
}

start_database() {
    systemctl restart postgresql@17-main.service
    as_postgres psql --quiet <$given/roles.sql
    as_postgres createdb --owner=prefect --encoding=UTF8 --template=template0 prefect
}

start_server() {
    wait_for port_open "$(sed -n 's,^PREFECT_SERVER_DATABASE_CONNECTION_URL=.*@\(.*\)/.*,\1,p' $config/server.env)"
    systemctl start prefect-server.service
    wait_for get http://127.0.0.1:4200/api/ready
    systemctl restart haproxy.service prefect-sweep.service
}

work() {
    systemctl start prefect-manifests.timer
    wait_for api ready
    case $groups in
        *" first "*) as_client $home/venv/bin/python -m prefect_fleet.pools - <$given/pools.json ;;
        *) wait_for api work_pools/canary ;;
    esac
    start_workers start
    case $groups in
        *" first "*) write_deployments converge ;;
        *) wait_for api deployments/name/canary/canary ;;
    esac
    canary
}

write_deployments() { # which settings
    as_client --working-directory="$(readlink -f $home/current)" $home/venv/bin/python -m prefect_fleet.deploy \
        --root "$(readlink -f $home/current)" --home $home --settings - <"$given/$1.json"
}

canary() {
    systemctl start prefect-worker@canary.service
    as_client $home/venv/bin/python -m prefect_fleet.canary "$(hostname)"
    systemctl stop prefect-worker@canary.service
}

# A bare host to one that has done its part. Standard input: what `files` and `state` printed.
# Hosts wait for one another only where one cannot go on without the other.
bare() { # the host's groups, and `first` for the worker host that deploys
    groups=" $* "
    install_packages
    create_users
    tar --extract --directory=/ --ignore-zeros
    systemctl daemon-reload
    sysctl --quiet --load=/etc/sysctl.d/60-prefect-fleet.conf
    systemctl start prefect-firewall.service
    case $groups in *" headscale "*) systemctl start headscale.service ;; esac
    # shellcheck disable=SC2154 # from `notes`
    if [ -n "$control_url" ]; then
        wait_for get "$control_url/health"
        systemctl start tailscaled.service
    fi
    case $groups in *" rustfs "*) systemctl start rustfs.service ;; esac
    case $groups in *" postgres "*) start_database ;; esac
    install_environment
    case $groups in *" prefect_server "*) start_server ;; esac
    case $groups in *" prefect_worker "*) work ;; esac
}

# Is everything there? Standard input: what `sums` printed.
nothing() {
    cd /
    # shellcheck disable=SC2086 # names with line breaks between
    dpkg-query --show $packages >/dev/null
    sha256sum --check --quiet
    # shellcheck disable=SC2086,SC2154 # as above
    systemctl is-active --quiet $services
    test -e "$(readlink $home/venv)/complete"
}

# One file a worker, then its restart, which drains it. Standard input: a tar of the files.
variable() {
    tar --extract --directory=/
    start_workers restart
}

# Standard input: a packed release.
release() { # its name
    rm -rf "${home:?}/releases/$1"
    tar --extract --gzip --directory=$home/releases
    ln --symbolic --force --no-dereference "releases/$1" $home/current.new
    mv --no-target-directory $home/current.new $home/current
}
