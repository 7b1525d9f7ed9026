#!/usr/bin/env bash
# Makes the environment in which the package is used, tested and shown: `make setup`.
#
#   VENV=.venv       where it is made; an environment that exists is completed
#   PYTHON=python3   the interpreter to make it with, 3.8 or later
#
# A torch that is already there (a CUDA build, say) is kept: that of VENV, or that of PYTHON, which
# the new environment then shares.  Running again does nothing until a pinned version changes.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3}
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { echo "setup: $*" >&2; }
die() { say "$*"; exit 1; }
python_line() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }
torch_version() { "$1" -c 'import torch; print(torch.__version__)' 2>/dev/null; }
pip_install() { "$VENV/bin/python" -m pip install --quiet --no-warn-script-location "$@"; }

# --- the interpreter and its pins ---------------------------------------------------
[ ! -x "$VENV/bin/python" ] || BASE="$VENV/bin/python"
BASE=${BASE:-$PYTHON}
command -v "$BASE" >/dev/null || die "PYTHON=$PYTHON is not found; name one as PYTHON=/path/to/python3"
LINE=$(python_line "$BASE")
case $LINE in
    3.8 | 3.9 | 3.10) PINS=requirements/py38.txt TORCH=torch==2.1.2 FAIRSEQ=fairseq==0.12.2 ;;
    3.*) PINS=requirements/py311.txt TORCH=torch==2.13.0 FAIRSEQ=fairseq-fixed==0.12.3.1 ;;
    *) die "$BASE is Python $LINE; 3.8 or later is needed, name one as PYTHON=python3.11" ;;
esac
if [ "$PYTHON" != python3 ] && [ "$(python_line "$PYTHON")" != "$LINE" ]; then
    die "$VENV holds Python $LINE, not PYTHON=$PYTHON; name another VENV or remove this one"
fi

# The stamp is written last, so a set-up that was interrupted is taken up again.
STAMP="$VENV/.deltasam_fairseq"
KEY="$PWD $(cat "$PINS" setup.py pyproject.toml scripts/setup.sh | cksum)"
if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$KEY" ]; then exit 0; fi

# --- the environment ----------------------------------------------------------------
if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    SHARE=
    if FOUND=$(torch_version "$PYTHON"); then
        say "sharing torch $FOUND of $PYTHON"
        SHARE=--system-site-packages
    fi
    say "making $VENV with Python $LINE"
    "$PYTHON" -m venv $SHARE "$VENV" || die "$PYTHON -m venv $VENV failed (on Debian: python3-venv)"
fi
if FOUND=$(torch_version "$VENV/bin/python"); then
    say "keeping torch $FOUND"
else
    say "installing $TORCH"
    pip_install --constraint "$PINS" "$TORCH"
fi
if [ "$PINS" = requirements/py38.txt ]; then
    pip_install "pip<24.1" # later ones refuse the metadata of omegaconf 2.0.6
fi
say "installing what $PINS lists"
pip_install --requirement "$PINS"

say "installing $FAIRSEQ (built from source, about two minutes)"
if [ "$PINS" = requirements/py311.txt ]; then
    # Not isolated: an isolated build fetches a second torch.  No dependencies: they are pinned
    # above, less torchaudio, which text never imports.
    pip_install --no-build-isolation --no-deps "$FAIRSEQ"
else
    # Isolated: 0.12.2 does not build otherwise.  The pins hold inside the isolated build too.
    PIP_CONSTRAINT="$PWD/$PINS" pip_install --no-deps "$FAIRSEQ"
fi
pip_install --no-build-isolation --no-deps --editable .

"$VENV/bin/python" - <<'PY' || die "the environment does not work; remove $VENV and run again"
import fairseq, numpy, sentencepiece, sklearn, torch

torch.from_numpy(numpy.zeros(1))  # fails where torch and numpy do not fit
PY
echo "$KEY" >"$STAMP"
say "done"
