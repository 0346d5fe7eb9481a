#!/bin/sh
# `make demo`: a source file with a hole, filled by the bundled demo model. Needs mlx-codellama on PATH.
set -eu
cd "$(dirname "$0")"

echo "── before: examples/mean.py, with a hole at <FILL_ME>"
cat mean.py
echo
echo "── mlx-codellama infill examples/mean.py --order spm --whole --stats"
mlx-codellama infill mean.py --order spm --whole --stats
echo
echo "── the same as a diff: mlx-codellama infill examples/mean.py --order spm --diff"
mlx-codellama infill mean.py --order spm --diff
