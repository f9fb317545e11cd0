# Makes the checkout's own environment in .venv and activates it; sourced, from anywhere, by the scripts that need it:
#     source scripts/env.sh
# PYTHON names the interpreter to build it with (3.11 or 3.12; default python3). What is installed is what pyproject.toml
# asks for, in the versions of constraints.txt; nothing is installed again until one of the three changes. Where .venv is
# a link, what it leads to is taken as it is.

helix_env() {
    local root venv python version wanted stamp began=$SECONDS
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P) || return
    venv=$root/.venv stamp=$root/.venv/helix.stamp
    unset PYTHONHOME

    python=${PYTHON:-$venv/bin/python}
    [[ -n ${PYTHON:-} || -x $python ]] || python=python3
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || version="not there"
    if [[ $version != 3.1[12] ]]; then
        echo "PYTHON = $python is $version, Helix needs Python 3.11 or 3.12: set PYTHON to one of these" >&2
        return 2
    fi

    if [[ -L $venv ]]; then # another checkout's: nothing is installed into it, and it is never made anew
        if [[ ! -x $venv/bin/python ]]; then
            echo ".venv leads to $(readlink "$venv"), where no environment is: remove the link" >&2
            return 2
        fi
        export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
        hash -r
        return
    fi

    wanted="$version $root $(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)"
    if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
        # An environment that is missing, half-made, copied, moved or of another version has no such pip.
        if [[ $("$venv/bin/pip" --version 2>/dev/null) != *" from $venv/"*"(python $version)" ]]; then
            echo "Making .venv with Python $version" >&2
            "$python" -m venv --clear "$venv" || return
        fi
        echo "Installing what pyproject.toml asks for into .venv (once; a few minutes)" >&2
        "$venv/bin/python" -m pip install -qq --disable-pip-version-check \
            -c "$root/constraints.txt" -e "$root[dev]" >&2 || return
        echo "$wanted" >"$stamp"
        echo "Made the environment in $((SECONDS - began)) s" >&2
    fi
    export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
    hash -r
}

helix_env
