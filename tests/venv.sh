#!/usr/bin/env bash
# Makes a virtual environment from locked requirements, unless it is there: tests/venv.sh FOLDER REQUIREMENTS [FLAG OF UV]…
set -euo pipefail
folder=$1 requirements=$2
cd "$(dirname "$0")/.."
python=$(readlink -f "$(command -v python3.11 || command -v python3)")  # also from within the environment that is made anew
key=$( (cat "$requirements" requirements/uv.txt pyproject.toml; "$python" --version; pwd) | sha256sum | cut -d' ' -f1)
[ "$(cat "$folder/.graft-key" 2>/dev/null)" = "$key" ] && exit 0
echo "==> making $folder from $requirements (the packages are kept in uv's cache)"
if ! "$python" -c 'import ensurepip' 2>/dev/null; then
  echo "    installing python3-venv"
  DEBIAN_FRONTEND=noninteractive apt-get update -q >/dev/null
  DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends python3-venv >/dev/null
fi
rm -rf "$folder"
"$python" -m venv "$folder"
"$folder/bin/pip" install -q --disable-pip-version-check --require-hashes --only-binary :all: -r requirements/uv.txt
"$folder/bin/uv" pip install -q --python "$folder/bin/python" --system-certs --require-hashes "${@:3}" -r "$requirements"
# Our own packages, as they are in this checkout.
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
printf '%s\n' "$PWD/operator" "$PWD/trainer-image" "$PWD/server-image" "$PWD/tests" > "$site/graft-checkout.pth"
echo "$key" > "$folder/.graft-key"
