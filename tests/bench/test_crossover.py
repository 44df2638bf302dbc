"""From a prefill report to an entry of the crossover table."""

import pytest

from seerattention.bench.crossover import decode_of, entry_of, extended, merged


def attention_row(tokens, backend, asked, ms, kind="backend", mask="random", density=None, **more):
    density = asked if density is None else density
    row = {"tokens": tokens, "block": 64, "mask": mask, "kind": kind, "backend": backend, "asked": asked}
    return row | {"density": density, "ms": ms, "first_ms": 1.0, "speedup": 1.0} | more


def prefill_report():
    rows, layers = [], []
    # tokens: dense ms, selection ms, ms at 10, 30 and 100 %.
    times = {1024: (1, 1, 0.2, 0.5, 1), 2048: (4, 1, 0.5, 1.5, 5), 4096: (16, 1, 1, 3, 10)}
    for tokens, (dense, selection, *sparse) in times.items():
        rows.append(attention_row(tokens, "dense cudnn", 1.0, dense, "dense", "full", first_ms=50.0))
        rows.append(attention_row(tokens, "dense fa2", 1.0, 2 * dense, "dense", "full"))
        for asked, ms in zip((0.1, 0.3, 1.0), sparse, strict=True):
            mask = "full" if asked == 1 else "random"
            rows.append(attention_row(tokens, "gather", asked, ms, mask=mask))
            rows.append(attention_row(tokens, "flex", asked, ms / 2, mask=mask))
        layers.append({"tokens": tokens, "block": 64, "gate": "default", "selection_ms": selection})
    return {
        "device_type": "cuda",
        "capability": "9.0",
        "versions": {"device": "Some GPU"},
        "date": "2026-01-01",
        "dtype": "bfloat16",
        "shape": {},
        "rows": rows,
        "layers": layers,
    }


def test_crossover_from_a_report(monkeypatch):
    monkeypatch.setattr("seerattention.bench.crossover.ORDER", ("gather",))
    entry = entry_of(prefill_report(), "default", 64)
    assert entry["backend"] == "gather"
    assert entry["dense_below"] == 2048
    # 1k: nothing is left after selecting. 2k: 3 ms lie between 1.5 at 30 % and 5 at 100 %. 4k: always.
    assert [row["densest"] for row in entry["rows"]] == [0, 0.6, 1]
    # cuDNN saves 1, 4 and 16 ms a layer; its first call took 50, so 32 layers pay from 2k on.
    assert entry["cudnn_from"] == 2048
    with pytest.raises(ValueError, match="has no selection of gate 'sub16'"):
        entry_of(prefill_report(), "sub16", 64)


def test_crossover_takes_what_auto_takes(monkeypatch):
    monkeypatch.setattr("seerattention.bench.crossover.ORDER", ("not measured",))
    assert entry_of(prefill_report(), "default", 64)["backend"] == "flex"


def test_an_entry_replaces_its_device_and_guesses():
    def one(device_type, device, below=0):
        return {"device_type": device_type, "device": device, "dense_below": below}

    table = [one("cpu", "A"), one("cuda", None), one("cuda", "B"), one("cuda", "C", 1)]
    assert merged(table, one("cuda", "C", 2)) == [one("cpu", "A"), one("cuda", "B"), one("cuda", "C", 2)]


def decode_report():
    rows = []
    # tokens: dense kernels' ms, ms of a step of one and of two sequences.
    times = {1024: (3, 2, 2.5, 1), 2048: (4, 5, 3, 1), 4096: (9, 8, 3.5, 1)}
    for tokens, (cudnn, fa2, one, two) in times.items():
        rows += [
            {"batch": 1, "tokens": tokens, "kind": "dense", "variant": "dense cudnn", "ms": cudnn},
            {"batch": 1, "tokens": tokens, "kind": "dense", "variant": "dense fa2", "ms": fa2},
        ]
        step = {"tokens": tokens, "kind": "step", "variant": "with update and choosing, sub16"}
        rows += [step | {"batch": 1, "ms": one}, step | {"batch": 2, "ms": two}]
        rows.append(step | {"batch": 1, "variant": "with choosing, sub16", "ms": one / 2})
    return {"versions": {"device": "Some GPU"}, "device_type": "cuda", "density": 0.1, "rows": rows}


def test_a_step_counts_with_all_its_parts_for_one_sequence():
    part = decode_of(decode_report(), "sub16")
    assert part["decode_dense_below"] == 2048
    assert [(row["dense"], row["dense_ms"]) for row in part["decode_rows"]] == [
        ("dense fa2", 2),
        ("dense cudnn", 4),
        ("dense fa2", 8),
    ]
    for wrong in ({"density": 0.2}, {"rows": []}):
        with pytest.raises(ValueError, match="has no steps of one sequence by gate 'sub16'"):
            decode_of(decode_report() | wrong, "sub16")


def test_decoding_is_added_to_what_is_known_of_prefill():
    known = entry_of(prefill_report(), "default", 64)
    part = decode_of(decode_report(), "sub16")
    entry = extended([known | {"decode_dense_below": 5}], part)
    assert (entry["dense_below"], entry["decode_dense_below"]) == (2048, 2048)
    with pytest.raises(ValueError, match="no entry of Some GPU yet; measure prefill, too"):
        extended([], part)
