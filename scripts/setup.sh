#!/usr/bin/env bash
# Creates .venv and installs the project into it, once. Sourced by the other scripts: setup_venv [EXTRA]
# PYTHON chooses the interpreter. Installs again only if pyproject.toml or constraints.txt changed.

setup_venv() {
    local extra="${1:-}" python="${PYTHON:-python3}" stamp wanted
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "Python 3.10 or newer is needed; set PYTHON to one (found: $("$python" --version 2>&1 || true))" >&2
        return 1
    fi
    stamp=".venv/installed${extra:+-$extra}"
    wanted="$(cat pyproject.toml constraints.txt | cksum) $(pwd)"
    # An installation with more extras works as well.
    if [ -z "$extra" ] && grep -qsxF "$wanted" .venv/installed*; then return 0; fi
    if grep -qsxF "$wanted" "$stamp"; then return 0; fi
    echo "Setting up .venv (the first time takes some minutes) ..." >&2
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    # torch goes first and alone, so that no later package chooses another build of it.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
        --editable ".${extra:+[$extra]}"
    echo "$wanted" > "$stamp"
}

find_python() { # sets PYTHON: the caller's, else .venv's, else python3
    if [ -z "${PYTHON:-}" ]; then
        if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
    fi
    export PYTHON
}

find_port() { # sets MASTER_PORT: the caller's, else a free one; several machines need one known beforehand
    if [ -z "${MASTER_PORT:-}" ]; then
        MASTER_PORT=29500
        if [ "${NNODES:-1}" -eq 1 ] && [ -z "${HOSTFILE:-}" ]; then
            MASTER_PORT="$("$PYTHON" -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')"
        fi
    fi
}
