#!/usr/bin/env bash
# Makes this machine ready to be a node of a cluster, on every provider: `setup.sh [aws|gcp]`, where the name of a cloud
# adds what its autoscaler needs. `ray up` runs it on each node; a second time it changes nothing. It expects the checkout in ~/vla-dist, and installs it with all packages into ~/.vla-dist/venv, unless
# /opt/vla-dist is a virtual environment that has them: an image, or a machine without internet.
set -euo pipefail

source_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
own_dir=$HOME/.vla-dist
case "${1:-}" in
    aws) cloud=("boto3>=1.40,<2") module=boto3 ;;
    gcp) cloud=("google-api-python-client>=2.150,<3" "google-auth>=2.35,<3" "cryptography>=42") module=googleapiclient ;;
    "") cloud=() module=sys ;;
    *) echo "vla-dist: cloud '$1' is not known; setup.sh takes aws, gcp or nothing" >&2; exit 2 ;;
esac
mkdir -p "$own_dir" && chmod 700 "$own_dir"
for token in "$HOME/.ray/auth_token" "$own_dir/fleet_token"; do
    [ -s "$token" ] || { echo "vla-dist: $token was not shipped; run 'vla-dist cluster tokens' where you run ray up" >&2; exit 1; }
    chmod 600 "$token"
done

if [ -x /opt/vla-dist/bin/ray ]; then
    venv=/opt/vla-dist
else
    venv=$own_dir/venv
    for program in python3.11 make rsync; do
        command -v "$program" >/dev/null || missing="${missing:-} $program"
    done
    if [ -n "${missing:-}" ]; then
        sudo apt-get update -qq
        sudo apt-get install -y -qq python3.11 python3.11-venv make rsync
    fi
    make --no-print-directory -C "$source_dir" setup VENV="$venv" PYTHON=python3.11
fi
"$venv/bin/python" -c "import $module" 2>/dev/null || "$venv/bin/python" -m pip install --quiet "${cloud[@]}"

# All now and none later: when a file of the checkout on the head differs, an autoscaler that starts again there, after a
# restart of Ray on the head, sets up every other node anew and kills what runs on it.
"$venv/bin/python" -m compileall -q "$source_dir/vla_dist" >/dev/null

cat > "$own_dir/environment" <<END
# Written by cluster/setup.sh for every login: Ray reaches nodes through SSH.
case ":\$PATH:" in *":$venv/bin:"*) ;; *) export PATH="$venv/bin:\$PATH" ;; esac
export PYTHONPATH="$source_dir"
export PYTHONDONTWRITEBYTECODE=1
export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0
END
# First in the file: many distributions' .bashrc ends early for shells without a terminal.
line='. "$HOME/.vla-dist/environment"  # vla-dist'
touch "$HOME/.bashrc"
grep -qxF "$line" "$HOME/.bashrc" || { echo "$line"; cat "$HOME/.bashrc"; } > "$own_dir/bashrc"
if [ -s "$own_dir/bashrc" ]; then mv "$own_dir/bashrc" "$HOME/.bashrc"; fi
rm -f "$own_dir/bashrc"

. "$own_dir/environment"
vla-dist --version >/dev/null || { echo "vla-dist: $venv cannot run vla-dist on this machine" >&2; exit 1; }
