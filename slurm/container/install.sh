#!/bin/bash
# What both recipes of a container do, from the root of the checkout. DALI: cuda120 or cuda130, as setup.py knows them.
set -euo pipefail

export DEBIAN_FRONTEND=noninteractive
apt-get update
# Triton compiles its launchers with gcc against Python's headers; git tells the run's manifest the revision
apt-get install -y --no-install-recommends ca-certificates gcc git libc6-dev python3 python3-dev python3-venv
rm -rf /var/lib/apt/lists/*

python3 -m venv /opt/poa
POA_DALI=${DALI:?cuda120 or cuda130} /opt/poa/bin/pip install --no-cache-dir '.[onnx]'
/opt/poa/bin/poa --help >/dev/null
