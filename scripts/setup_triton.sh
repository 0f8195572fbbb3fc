#!/usr/bin/env bash
# Puts Triton into .cache, beside the environment and not into it: only the processes that interpret or compile
# the GPU kernels for a test see it. Does nothing when it is there. Prints its folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=$(sed -n 's/^triton==\([^ ]*\).*/\1/p' requirements/triton.txt)
folder=.cache/triton-$version
mkdir -p .cache
exec 9>.cache/triton.lock
flock 9
if [[ ! -d $folder ]]; then
    rm -rf "$folder.part"
    python3 -m pip --no-input install -qq --root-user-action=ignore --no-deps --no-compile --require-hashes \
        --only-binary=:all: --python-version "${STEERMOE_PYTHON:-3.11}" --target "$folder.part" -r requirements/triton.txt >&2
    mv "$folder.part" "$folder"
fi
echo "$PWD/$folder"
