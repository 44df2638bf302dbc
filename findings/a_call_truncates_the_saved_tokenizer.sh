#!/usr/bin/env bash
# truncation=True in one call of a transformers tokenizer stays in the tokenizer underneath: save_pretrained writes it
# into tokenizer.json, and whoever reads that file with tokenizers gets every text cut, as serving engines do.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0 tokenizers==0.23.3
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import tokenizers
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer, text = PreTrainedTokenizerFast(tokenizer_object=words), " ".join("b" * 100)
tokenizer.save_pretrained("before")
tokenizer(text, truncation=True, max_length=8)
tokenizer.save_pretrained("after")
lengths = [len(Tokenizer.from_file(f"{name}/tokenizer.json").encode(text).ids) for name in ("before", "after")]
print(f"100 words by the tokenizer.json saved before the call: {lengths[0]} tokens, after it: {lengths[1]}")
print("by transformers from the same folder:", len(PreTrainedTokenizerFast.from_pretrained("after")(text).input_ids))
assert lengths == [100, 8], "a call leaves nothing behind now"
PYTHON
