"""The OpenAI server: over HTTP, under load, with requests that are given up, and without its worker."""

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from seerattention.measure import bundled
from tests.vllm.engines import NEW_TOKENS, Alone, settings, texts

#: Seconds after which a server that does not answer is a failure.
PATIENCE = 240
REQUESTS, AT_ONCE = 200, 16
#: Of prompts under load; no two share a beginning.
MIXED = (1200, 700, 333, 130, 65, 64, 20, 1)


class Server:
    """A server in a process of its own, on a port of this machine's."""

    def __init__(self, folder, given, *more):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.log = folder / "log.txt"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host=127.0.0.1"]
        command += [
            f"--port={port}",
            f"--model={bundled.TEACHER}",
            "--served-model-name=teacher",
            "--dtype=float32",
        ]
        command += ["--enforce-eager", "--max-model-len=4096", "--max-num-batched-tokens=512"]
        command += ["--num-gpu-blocks-override=96", f"--additional-config={json.dumps(given or {})}", *more]
        counts = folder / "counts"
        counts.mkdir()
        own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PROMETHEUS_MULTIPROC_DIR": str(counts)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE)

    def wait(self):
        """Until it answers."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if self.client.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.5)
        pytest.fail(self.log.read_text()[-5000:])

    def answer(self, prompt, tokens=NEW_TOKENS, **more):
        """The tokens that it adds to a prompt."""
        asked = {
            "model": "teacher",
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        found = self.client.post("/v1/completions", json={**asked, "return_token_ids": True, **more})
        found.raise_for_status()
        return found.json()["choices"][0]["token_ids"]

    def metrics(self):
        """Its counts, by name and layer, all processes' together."""
        found = Counter()
        for family in text_string_to_metric_families(self.client.get("/metrics").text):
            for sample in family.samples:
                found[sample.name, sample.labels.get("layer"), sample.labels.get("attention")] += sample.value
        return found

    def children(self):
        """The processes that it has, by name."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        return {" ".join(child.cmdline()): child for child in found}

    def memory(self):
        """What they hold, in bytes."""
        return sum(child.memory_info().rss for child in self.children().values())

    def worker(self):
        """The one that computes."""
        (found,) = [child for name, child in self.children().items() if name.startswith("VLLM::Worker")]
        return found


@contextmanager
def serving(folder, given=None, *more):
    """A server that answers; more are options of vLLM's."""
    made = Server(folder, given, *more)
    try:
        made.wait()
        yield made
    finally:
        made.process.terminate()
        made.process.wait(PATIENCE)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    given = {"seerattention": settings(aligned=True)}
    with serving(tmp_path_factory.mktemp("server"), given) as made:
        yield made


@contextmanager
def streaming(server, prompt, tokens):
    """A request whose answer is read while it is made."""
    asked = {"model": "teacher", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    with server.client.stream("POST", "/v1/completions", json=asked) as response:
        lines = response.iter_lines()
        next(lines)
        yield lines


def test_answers_and_what_is_read(server):
    prompts = texts(1500, 777, begin=20000)
    expected, rows = Alone().answers(prompts)
    before = server.metrics()
    assert [server.answer(prompt) for prompt in prompts] == expected
    counted = server.metrics() - before
    for layer in range(8):
        heads = [blocks for key, row in rows.items() if key[0] == layer for blocks in row]
        assert counted["seerattention_blocks_read_total", str(layer), None] == sum(map(len, heads))
        causal = sum(n * (n + 1) // 2 for n in (24, 13)) * len(heads) // (24 + 13)
        assert counted["seerattention_blocks_causal_total", str(layer), None] == causal
        assert counted["seerattention_prompt_tokens_total", str(layer), "sparse"] == 1500 + 777


def load(server, prompts, expected=None):
    """Give a server a load, and return by how many bytes its second half let it grow."""
    order = random.Random(0).choices(range(len(prompts)), k=REQUESTS)
    used = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for half in (order[: REQUESTS // 2], order[REQUESTS // 2 :]):
            got = list(pool.map(lambda which: server.answer(prompts[which]), half))
            if expected is not None:
                assert [which for which, out in zip(half, got, strict=True) if out != expected[which]] == []
            used.append(server.memory())
    return used[1] - used[0]


def test_a_load_of_mixed_requests(server, tmp_path):
    """None lost, none wrong, and no more memory from one half to the next than vLLM takes by itself."""
    prompts = texts(*MIXED, begin=24600)
    alone = Alone()
    grown = load(server, prompts, [alone.answer(prompt) for prompt in prompts])
    with serving(tmp_path) as plain:
        assert grown < load(plain, prompts) + 32 * 2**20


def test_requests_that_are_given_up(server):
    prompts = texts(1500, 300, begin=30000)
    expected = Alone().answer(prompts[1])
    for _ in range(3):
        with streaming(server, prompts[0], 2000):
            pass
    assert server.answer(prompts[1]) == expected
    end = time.monotonic() + PATIENCE
    while server.metrics()["vllm:num_requests_running", None, None] and time.monotonic() < end:
        time.sleep(0.2)
    assert server.metrics()["vllm:num_requests_running", None, None] == 0


def test_without_its_worker_it_ends(server):
    """Whoever waits is told, and whoever supervises the server can start another."""
    told, children = False, server.children().values()
    try:
        with streaming(server, texts(300, begin=30000)[0], 3000) as lines:
            server.worker().kill()
            told = any('"error"' in line for line in lines)
    except httpx.TransportError:
        told = True
    assert told
    assert server.process.wait(PATIENCE) is not None
    assert psutil.wait_procs(children, PATIENCE)[1] == []


def test_engines_that_share_the_requests(tmp_path):
    prompts = texts(1500, 777, 700, 600, begin=20000)
    expected, _ = Alone().answers(prompts)
    with serving(tmp_path, {"seerattention": settings(aligned=True)}, "--data-parallel-size=2") as both:
        assert sum(name.startswith("VLLM::EngineCore_DP") for name in both.children()) == 2
        with ThreadPoolExecutor(len(prompts)) as pool:
            assert list(pool.map(both.answer, prompts)) == expected
        counted = both.metrics()["seerattention_prompt_tokens_total", "0", "sparse"]
    assert counted == sum(map(len, prompts))
