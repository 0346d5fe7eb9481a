#!/bin/sh
# `make demo`: a source file with a hole, filled by the bundled demo model. Needs mlx-codellama on PATH.
set -eu
cd "$(dirname "$0")"

echo "── before: examples/stack.py, with a hole at <FILL_ME>"
cat stack.py
echo
echo "── mlx-codellama infill examples/stack.py --order spm --whole --stats"
mlx-codellama infill stack.py --order spm --whole --stats
echo
echo "── the same as a diff: mlx-codellama infill examples/stack.py --order spm --diff"
mlx-codellama infill stack.py --order spm --diff
echo
echo "── without what follows the hole it has to write the argument itself: … | mlx-codellama infill - --order spm -n 6"
sed '/<FILL_ME>/{s/<FILL_ME>.*/<FILL_ME>/;q;}' stack.py | mlx-codellama infill - --order spm -n 6
echo
echo "── now yours: . .venv/bin/activate, then mlx-codellama --help (or .venv/bin/mlx-codellama --help)"
