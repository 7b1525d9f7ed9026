#!/usr/bin/env bash
# Settles on a GPU, in ten minutes, what a CPU cannot: do the CUDA paths work, what do they cost, does
# a whole training succeed.  Needs Python with torch, and either an installed fairseq or the folder
# KIT (default: .gpu), carried to a machine that has no network:
#
#   KIT/site.tgz   packages that the machine lacks: fairseq and what it needs, for its Python
#   KIT/minilm     all-MiniLM-L6-v2 as Hugging Face has it
#   KIT/glue       GLUE's TSV folders: CoLA, MRPC, RTE, STS-B
#
#   bash scripts/gpu/first_run.sh                               all parts, ten minutes; findings in OUT
#   bash scripts/gpu/first_run.sh --parts smoke tests           two of them
#   bash scripts/gpu/first_run.sh --device cpu --minutes 3      the dry run: smallest shapes, same code
#
# Variables: PYTHON (python3), KIT (.gpu), OUT (first_run).
set -euo pipefail
PYTHON=${PYTHON:-python3} KIT=${KIT:-.gpu} OUT=${OUT:-first_run}
[[ $PYTHON == /* || $PYTHON != */* ]] || PYTHON=$PWD/$PYTHON
[[ $KIT == /* ]] || KIT=$PWD/$KIT
[[ $OUT == /* ]] || OUT=$PWD/$OUT
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
imports() { "$PYTHON" -c 'import fairseq' 2>&1; }
if ! error=$(imports); then
    SITE=$(mktemp -d)
    trap 'rm -rf "$SITE"' EXIT
    [ ! -f "$KIT/site.tgz" ] || tar xzf "$KIT/site.tgz" -C "$SITE"
    export PYTHONPATH="$SITE:$PYTHONPATH"
    error=$(imports) || {
        echo "PYTHON=$PYTHON: ${error##*$'\n'}. It needs torch, and fairseq or KIT/site.tgz" \
            "(KIT=$KIT) for its Python." >&2
        exit 2
    }
fi
"$PYTHON" -m scripts.gpu --kit "$KIT" --out "$OUT" "$@" &
trap 'kill -TERM $!' HUP INT TERM
wait $! || wait $!  # the first one ends at a signal
