"""`seerattention bench`: one report for every device, checked outputs, peers, pictures, crossovers."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from seerattention import cli

SMALL = ("--tokens", 256, "--block", 32, "--repeats", 1, "--head-dim", 16, "--heads", 4, "--kv-heads", 2)


def invoke(*arguments):
    return CliRunner().invoke(cli.app(), [str(a) for a in arguments])


@pytest.fixture(autouse=True)
def _no_compiling(monkeypatch):
    from seerattention.ops.block_sparse_attention import BACKENDS

    monkeypatch.setattr(BACKENDS["flex"], "unsupported", lambda *a, **k: ["not in this test"])


@pytest.fixture
def peers(tmp_path, monkeypatch):
    """A module with a right and a wrong peer."""
    (tmp_path / "my_peers.py").write_text(
        "from seerattention import block_sparse_attention, block_sparse_decode\n"
        "def right(q, k, v, selection):\n"
        "    return block_sparse_attention(q, k, v, selection, backend='reference')\n"
        "def step(q, k, v, selection):\n"
        "    return block_sparse_decode(q, k, v, selection, backend='gather')\n"
        "def wrong_step(q, k, v, selection):\n"
        "    return 1.5 * step(q, k, v, selection)\n"
        "def wrong(q, k, v, selection):\n"
        "    return 1.5 * right(q, k, v, selection)\n"
        "constant = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


def test_prefill_measures_masks_gates_and_peers(peers, tmp_path):
    out = tmp_path / "results" / "prefill.json"
    masks = ("random", "group", "gate", "band")
    more = ["--density", 1, "--density", 0.3, *(word for mask in masks for word in ("--mask", mask))]
    more += ["--gate", "published", "--teacher-tokens", 256, "--peer", "my_peers:right", "--block", 64]
    result = invoke("bench", "prefill", "--out", out, *SMALL, *more)
    assert result.exit_code == 0, result.output
    assert "left out: flex: not in this test" in result.output
    report = json.loads(out.read_text())
    assert {r["backend"] for r in report["rows"]} == {"dense sdpa", "gather", "my_peers:right"}
    assert {r["kind"] for r in report["rows"]} == {"dense", "backend", "peer"}
    dense, *others = report["rows"]
    assert (dense["mask"], dense["density"], dense["speedup"], dense["block"]) == ("full", 1, 1, None)
    # Everything once per block size, 30 % once per mask besides; two things run each.
    assert len(others) == 2 * 2 * (1 + len(masks))
    assert {r["mask"] for r in others if r["asked"] == 0.3} == set(masks)
    for row in report["rows"]:
        assert row["range_ms"][0] <= row["ms"] <= row["range_ms"][1]
        # Rates are over the same pairs, whatever the times: full selections do what dense attention does.
        if row["mask"] == "full":
            assert row["tflops"] * row["ms"] == pytest.approx(dense["tflops"] * dense["ms"], rel=0.01)
    assert [(r["gate"], r["block"], r["backend"]) for r in report["layers"]] == [
        ("published", 32, "gather"),
        ("published", 64, "gather"),
    ]
    assert report["layers"][0]["memory_mb"] is None
    assert report["ceilings"]["l2_tbs"] is None
    assert report["versions"]["device"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    drawn = invoke("bench", "roofline", out, "--out", tmp_path / "again.svg")
    assert drawn.exit_code == 0, drawn.output
    assert "tokens" in (tmp_path / "again.svg").read_text()


def test_prefill_times_keys_in_pages(tmp_path):
    out = tmp_path / "prefill.json"
    # No whole number of pages; outputs are checked against the keys as they lie without.
    sizes = (*SMALL[:1], 250, *SMALL[2:], "--density", 0.3, "--gate", "published")
    result = invoke("bench", "prefill", "--out", out, *sizes, "--page", 64, "--page", 16)
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    paged = {r["backend"] for r in report["rows"] if r["kind"] == "paged"}
    assert paged == {"gather, pages of 64", "gather, pages of 16"}
    # Whole layers hold their keys behind one another.
    assert [r["backend"] for r in report["layers"]] == ["gather"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--page", 0], "pages must be a whole number >= 1, got 0"),
        (["--mask", "stripes"], "masks must be one of random, group, gate, band, got 'stripes'"),
        (["--gate", "best"], "gates must be one of published, sub16, sub8, default, 8-bits, got 'best'"),
        (["--peers", "cudnn,fa9"], "peers must be one of cudnn, fa2, fa4, flex, got 'fa9'"),
        (["--density", 1.5], "densities must be in (0, 1], got 1.5"),
        (["--dtype", "int8"], "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (["--tokens", 0], "tokens must be a whole number >= 1, got 0"),
        (["--peer", "nothing"], "a peer must be module:function, got 'nothing'"),
        (["--peer", "no_such_module:f"], "is its folder on PYTHONPATH?"),
        (["--peer", "my_peers:constant"], "my_peers has no function 'constant'"),
        (
            ["--peer", "my_peers:wrong"],
            "my_peers:wrong random 32 0.3 is wrong at 256 tokens and is not timed",
        ),
        (["--device", "abacus"], "device must be one of cpu, cuda, got 'abacus'"),
        (["--heads", 5], "heads, 5, must be a multiple of kv_heads, 2"),
    ],
)
def test_bad_options_and_wrong_peers_end_in_one_sentence(peers, tmp_path, more, words):
    out = tmp_path / "new" / "prefill.json"
    result = invoke("bench", "prefill", "--out", out, *SMALL, "--density", 0.3, *more)
    assert result.exit_code == 2, result.output
    message = " ".join(result.output.split())
    assert words in message
    assert message.count("error:") == 1
    assert not out.parent.exists()


def test_no_picture_without_matplotlib(tmp_path, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else found(name, *a)
    )
    options = (*SMALL, "--density", 0.3, "--gate", "none")
    result = invoke("bench", "prefill", "--out", tmp_path / "p.json", *options)
    assert result.exit_code == 0, result.output
    assert "no picture without matplotlib" in result.output
    assert json.loads((tmp_path / "p.json").read_text())["layers"] == []
    asked = invoke("bench", "prefill", "--out", tmp_path / "q.json", "--figure", tmp_path / "q.png", *options)
    assert asked.exit_code == 2
    assert "pip install 'seerattention[plot]'" in " ".join(asked.output.split())


def test_crossover_measures_and_keeps_other_devices(tmp_path):
    out = tmp_path / "crossover.json"
    other = {"device_type": "cuda", "device": "Some GPU", "dense_below": 1, "rows": []}
    out.write_text(json.dumps([other]))
    options = ("--tokens", 128, "--tokens", 256, "--repeats", 1, "--block", 32, "--device", "cpu")
    result = invoke("bench", "crossover", "--out", out, *options)
    assert result.exit_code == 0, result.output
    mine, kept = json.loads(out.read_text())
    assert kept == other
    assert (mine["device_type"], mine["backend"], mine["gate"]) == ("cpu", "gather", "default")
    assert [row["tokens"] for row in mine["rows"]] == [128, 256]
    assert all(0 <= row["densest"] <= 1 for row in mine["rows"])
    text = " ".join(result.output.split())
    assert f"dense below {mine['dense_below']}" in text
    assert [row["tokens"] for row in mine["decode_rows"]] == [128, 256]
    assert f"decoding is dense below {mine['decode_dense_below']} cached tokens" in text


def test_crossover_learns_one_phase_and_keeps_the_other(tmp_path):
    out = tmp_path / "crossover.json"
    options = ("bench", "crossover", "--out", out, "--device", "cpu")
    measured = ("--tokens", 128, "--repeats", 1, "--block", 32, "--phase", "decode")
    alone = invoke(*options, *measured)
    assert alone.exit_code == 2
    assert "has no entry of" in alone.output
    assert not out.exists()
    step = tmp_path / "decode.json"
    made = ("--size", "1x256", "--size", "2x256", *STEP[2:], "--gate", "default", "--out", step)
    result = invoke("bench", "decode", *made, "--device", "cpu")
    assert result.exit_code == 0, result.output
    report = json.loads(step.read_text())
    entry = {"device_type": "cpu", "device": report["versions"]["device"], "dense_below": 7, "rows": []}
    entry |= {"backend": "gather", "gate": "default", "cudnn_from": None}
    out.write_text(json.dumps([entry]))
    result = invoke(*options, "--report", step)
    assert result.exit_code == 0, result.output
    (mine,) = json.loads(out.read_text())
    assert mine["dense_below"] == 7
    # Of two sequences there is no row.
    assert [row["tokens"] for row in mine["decode_rows"]] == [256]
    wrong = invoke(*options, "--phase", "both phases")
    assert "phase must be prefill, decode or both" in wrong.output


STEP = ("--size", "2x256", "--block", 32, "--repeats", 1, "--head-dim", 16, "--heads", 4, "--kv-heads", 2)


def test_decode_measures_steps_their_parts_and_peers(peers, tmp_path):
    out = tmp_path / "results" / "decode.json"
    more = ["--size", "1x512", "--page", 64, "--gate", "sub8", "--gate", "quest", "--peer", "my_peers:step"]
    result = invoke("bench", "decode", "--out", out, *STEP, *more, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "left out: triton: it needs a GPU" in result.output
    report = json.loads(out.read_text())
    assert report["density"] == 0.1
    assert report["shape"] == {"heads": 4, "kv_heads": 2, "head_dim": 16}
    assert [(r["batch"], r["tokens"]) for r in report["rows"][:: len(report["rows"]) // 2]] == [
        (2, 256),
        (1, 512),
    ]
    rows = {r["variant"]: r for r in report["rows"] if r["batch"] == 2}
    kinds = {name: row["kind"] for name, row in rows.items()}
    assert kinds == {
        "dense sdpa": "dense",
        "gather": "attention",
        "gather, pages of 64": "attention",
        "my_peers:step": "peer",
        **{f"{part}, {gate}": kind for gate in ("sub8", "quest") for part, kind in PARTS.items()},
    }
    for row in rows.values():
        assert row["range_ms"][0] <= row["ms"] <= row["range_ms"][1]
        assert row["speedup"] * row["ms"] == pytest.approx(rows["dense sdpa"]["ms"], rel=0.1, abs=1e-3)
    # One block of eight is read, and besides 8 bytes per key and head of Quest's minima and maxima.
    whole, few, step = (
        rows[n]["tb_s"] * rows[n]["ms"] * 1e9 for n in ("dense sdpa", "gather", "with choosing, quest")
    )
    assert whole == pytest.approx(2 * 2 * 2 * 256 * 16 * 4, rel=0.01)
    assert few == pytest.approx(whole / 8, rel=0.01)
    assert step == pytest.approx(few + whole / 32, rel=0.01)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


PARTS = {
    "update": "update",
    "update that finishes a block": "update",
    "choosing": "choosing",
    "with choosing": "step",
    "with update and choosing": "step",
}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--size", "256"], "a size must be BATCHxTOKENS, e.g. 8x131072, got '256'"),
        (["--size", "0x256"], "sizes must be a whole number >= 1, got 0"),
        (["--size", "1x100"], "100 tokens are no whole number of blocks or pages of 32"),
        (["--page", 48], "256 tokens are no whole number of blocks or pages of 48"),
        (["--density", 0], "densities must be in (0, 1], got 0"),
        (
            ["--gate", "best"],
            "gates must be default, sub<key tokens per summary>, e.g. sub16, or quest, got 'best'",
        ),
        (["--gate", "sub5"], "k_sub_block=5 must divide block_size=32"),
        (["--peers", "flex"], "peers must be one of cudnn, fa2, got 'flex'"),
        (["--peer", "flashinfer"], "peer flashinfer runs on GPUs alone, and this run is on the CPU"),
        (
            ["--peer", "my_peers:wrong_step"],
            "my_peers:wrong_step is wrong at 2 x 256 tokens and is not timed",
        ),
    ],
)
def test_what_bench_decode_refuses(peers, tmp_path, more, words):
    out = tmp_path / "new" / "decode.json"
    more = more if "--gate" in more else [*more, "--gate", "none"]
    result = invoke("bench", "decode", "--out", out, *STEP, "--device", "cpu", *more)
    assert result.exit_code == 2, result.output
    message = " ".join(result.output.split())
    assert words in message
    assert message.count("error:") == 1
    assert not out.parent.exists()


def test_flashinfer_is_asked_for_where_it_is_not_installed():
    from seerattention.bench.decode import peer_of

    with pytest.raises(ModuleNotFoundError, match="pip install flashinfer-python"):
        peer_of("flashinfer", "cuda")


def test_bench_alone_lists_its_commands():
    result = invoke("bench")
    for name in ("prefill", "decode", "crossover", "roofline"):
        assert name in result.output


def test_processes_that_share_a_prompt_are_timed(tmp_path):
    out = tmp_path / "parallel.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["seerattention.cli", "bench", "parallel", "--tokens", "500", "--tokens", "1"]
    command += ["--repeats", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"{out} has these numbers" in done.stdout
    report = json.loads(out.read_text())
    assert (report["benchmark"], report["model"], report["model_layers"]) == ("parallel", "small", 2)
    measured = [(row["tokens"], row["processes"]) for row in report["layers"]]
    assert measured == [(500, 1), (500, 2), (1, 1), (1, 2)]
    for row in report["layers"][:2]:
        assert min(row[f"{part}ms"] for part in ("", "choosing_", "exchange_", "attention_")) > 0
        # Two chunks of whole blocks for each; keys and values of the other's heads in fp32.
        assert row["bytes_received"] == (row["processes"] - 1) * 256 * 2 * 2 * 64 * 4
    shared = [(row["processes"], row["shared"], row["way"]) for row in report["first_tokens"]]
    assert shared == [(1, "", "gates"), (2, "context", "gates"), (2, "tensor", "gates")] * 2
    alone, *others = report["first_tokens"][:3]
    assert alone["speedup"] == alone["efficiency"] == 1
    for row in others:
        assert row["speedup"] == pytest.approx(alone["seconds"] / row["seconds"], rel=2e-2)
        assert row["efficiency"] == pytest.approx(row["speedup"] / 2, abs=1e-3)


def test_sharing_a_prompt_needs_processes():
    result = invoke("bench", "parallel", "--tokens", 500)
    assert result.exit_code == 2
    assert "torchrun --nproc-per-node 2 -m seerattention.cli bench" in " ".join(result.output.split())
