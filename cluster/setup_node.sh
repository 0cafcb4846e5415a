#!/usr/bin/env bash
# On every node, by its setup_commands: the Python of cluster/python-version, the packages of constraints.txt, in .venv.
# Head and workers run this same file, so they cannot differ. Run again, it changes nothing that is in place.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=$HOME/.memlib-uv/bin/uv
if [ ! -x "$uv" ]; then
  python3 -m venv "$HOME/.memlib-uv" || { sudo apt-get update -q && sudo apt-get install -yq python3-venv &&
    python3 -m venv --clear "$HOME/.memlib-uv"; }
  "$HOME/.memlib-uv/bin/pip" install --quiet uv==0.13.9
fi
python=$(cat cluster/python-version)
[ "$(.venv/bin/python -c 'import platform; print(platform.python_version())' 2>/dev/null)" = "$python" ] ||
  "$uv" venv --clear --python "$python" .venv
"$uv" pip install --quiet --python .venv/bin/python --constraint constraints.txt --editable '.[cluster]'
profile='export PATH=$HOME/memlib/.venv/bin:$PATH RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0  # memlib'
grep -qsF "$profile" ~/.bashrc || echo "$profile" >> ~/.bashrc
