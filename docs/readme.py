"""Fill the generated parts of README.md and docs/ from result files; ``--check`` only compares.

python docs/readme.py
"""

from __future__ import annotations

import re
import sys

import torch

from generated import (
    calibration,
    choosing,
    decode,
    designs,
    front,
    parallel,
    prefill,
    results,
    serving,
    training,
)
from generated.reports import FORMER, ROOT
from seerattention.cli.info import markdown

#: The generated parts of every page.
PAGES = {
    "README.md": {
        "real": front.real,
        "headline": front.headline,
        "decoding": front.decoding,
        "supported": front.supported,
    },
    "docs/results.md": {
        "quality": results.quality,
        "times": results.times,
        "lengths": results.lengths,
        "table": results.table_of_all,
        "gpu-short": results.gpu_short,
        "decode-quality": results.decode_quality,
    },
    "docs/serving.md": {
        "first-token": serving.first_token,
        "first-token-gpu": serving.first_token_gpu,
    },
    "docs/support.md": {
        "support": markdown,
        "dense": prefill.dense_below,
    },
    "docs/kernels.md": {
        "bench": prefill.bench,
        "native": prefill.native,
        "gpu": prefill.gpu,
        "pages": prefill.pages,
        "peers": prefill.peers,
        "crossover": prefill.crossover,
        "pooled": training.pooled,
        "approximate": choosing.approximate,
        "distill-step": training.distill_step,
        "parallel": parallel.parallel,
        "backward": training.backward,
        "decode": decode.decode,
        "decode-step": decode.decode_step,
    },
    "docs/lab/kernels.md": {
        "backward-sweep": training.backward_sweep,
    },
    "docs/method.md": {
        "gates-path": lambda: designs.gates("path"),
        "gates-objectives": lambda: designs.gates("objectives"),
        "gates-narrow": lambda: designs.gates("narrow"),
        "gates-final": lambda: designs.gates_final("llama"),
        "gates-second": lambda: designs.gates_final("qwen3", FORMER),
        "calibrated-targets": calibration.targets,
        "decode-gates": choosing.decode_gates,
        "prefill-gates": choosing.prefill_gates,
        "longer": choosing.longer,
        "calibrated-compared": calibration.compared,
        "yarn": training.yarn,
    },
}


def main() -> None:
    """Write the pages, or compare them."""
    # Tables are of a machine on which nothing was compiled, wherever they are made.
    torch.hub.set_dir(ROOT / "nothing" / "hub")
    for name, bodies in PAGES.items():
        page = ROOT / name
        before = text = page.read_text()
        for part, body in bodies.items():
            made, pattern = body(), rf"(<!-- {part} -->\n).*?(<!-- end -->)"
            text, found = re.subn(pattern, lambda m, made=made: f"{m[1]}{made}\n{m[2]}", text, flags=re.S)
            if found != 1:
                sys.exit(f"{name} must hold one part marked <!-- {part} -->, it holds {found}")
        if "--check" not in sys.argv:
            page.write_text(text)
        elif text != before:
            sys.exit(f"{name} differs from the result files; run python docs/readme.py")


if __name__ == "__main__":
    main()
