"""Serve an attached model over HTTP through transformers' pipeline.

python examples/serve.py --port 8000 & curl -d 'Once upon a time' 'localhost:8000?new_tokens=20'
"""

import argparse
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import parse_qs, urlparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from seerattention import attach, load_gates
from seerattention.hosts.transformers import usage
from seerattention.measure.bundled import GATES, TEACHER

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=str(TEACHER), help="hub id or folder")
parser.add_argument("--gates", default=str(GATES), help="hub id or folder")
parser.add_argument("--policy", default="top_k:0.1,sink_blocks=1,dense_last_rows=2")
parser.add_argument("--port", type=int, default=8000, help="0: any free one")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(args.model).to(device)
# Whatever takes a model takes an attached one; `transformers serve` takes names and loads models itself, so
# there is no moment to attach gates.
attach(model, load_gates(args.gates), args.policy)
generate = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(args.model))


class Handler(BaseHTTPRequestHandler):
    """Continues the text of a POST; a GET says how layers were computed so far."""

    def do_POST(self) -> None:
        """Continue a text."""
        prompt = self.rfile.read(int(self.headers["Content-Length"])).decode()
        asked = parse_qs(urlparse(self.path).query).get("new_tokens", ["50"])
        (out,) = generate(prompt, max_new_tokens=int(asked[0]), do_sample=False, return_full_text=False)
        self.answer(out["generated_text"])

    def do_GET(self) -> None:
        """Say what ran sparse and what dense."""
        self.answer("".join(f"{count} {how}\n" for how, count in usage(model).items()))

    def answer(self, text: str) -> None:
        """Send a text."""
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())


server = HTTPServer(("127.0.0.1", args.port), Handler)
print(f"http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
