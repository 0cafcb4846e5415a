#!/usr/bin/env bash
# Prints the exact versions of an environment with the extra `cluster`: constraints.txt, its overrides in place.
set -euo pipefail
cd "$(dirname "$0")/.."
overridden=$(sed -n 's/^\([A-Za-z0-9_.-]*\)==.*/\1/p' cluster/overrides.txt | paste -sd'|')
grep -v -E "^($overridden)==" constraints.txt
cat cluster/overrides.txt
