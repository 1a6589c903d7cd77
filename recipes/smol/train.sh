#!/bin/sh
# The whole recipe; each step goes on from its checkpoint in $SMOL_WORK when it is called again.
set -e
cd "$(dirname "$0")/../.."
export PYTHONPATH="python:recipes/smol:$PYTHONPATH" SMOL_WORK="${SMOL_WORK:-$PWD/smol-work}" OMP_NUM_THREADS=1
PYTHON="${PYTHON:-python}"
"$PYTHON" -m dualedit.cli fetch smol
"$PYTHON" recipes/smol/tower.py --minutes "${TOWER_MINUTES:-26}"
[ -f "$SMOL_WORK/vocabulary.pt" ] || "$PYTHON" recipes/smol/vocabulary.py
[ -f "$SMOL_WORK/replay.pt" ] || "$PYTHON" recipes/smol/replay.py
"$PYTHON" recipes/smol/reader.py --minutes "${READER_MINUTES:-64}"
"$PYTHON" recipes/smol/export.py
"$PYTHON" -m dualedit.cli fetch smol
"$PYTHON" recipes/smol/measure.py --role validation
"$PYTHON" recipes/smol/editors.py balancedit
"$PYTHON" recipes/smol/adapters.py
"$PYTHON" recipes/smol/editors.py dualedit
