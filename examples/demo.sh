#!/bin/sh
# `make demo`: a source file with a hole, filled by the bundled demo model. Needs mlx-codellama on PATH.
set -eu
cd "$(dirname "$0")"

echo "── before: examples/counting.py, with a hole at <FILL_ME>"
cat counting.py
echo
echo "── mlx-codellama infill examples/counting.py --whole --stats"
mlx-codellama infill counting.py --whole --stats
echo
echo "── the same as a diff: mlx-codellama infill examples/counting.py --diff"
mlx-codellama infill counting.py --diff
