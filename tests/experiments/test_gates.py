"""The gate experiment: many variants at once learn what each would alone, and a run measures all of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.gates import run as experiment
from seerattention.hosts.transformers import new_gates
from seerattention.measure import bundled
from seerattention.train import DistillConfig, Distiller

GROUPS = Path(experiment.__file__).parent


@pytest.fixture(scope="module")
def tokens():
    """Training and evaluation tokens of the bundled text."""
    return bundled.text_tokens(bundled.load_teacher()[1])


def test_variants_trained_together_are_those_trained_alone(tokens):
    model, _ = bundled.load_teacher()
    variants = (
        experiment.Variant("kl"),
        experiment.Variant("mean", {"q_pool": ["avg"], "k_sub_block": 16}, "sharp_kl", {}, 3e-3),
        experiment.Variant("coarse", {"q_sub_block": 16}),
    )

    def batches(step: int) -> np.ndarray:
        return tokens[0][512 * step : 512 * step + 512][None].astype(np.int64)

    together = experiment.Together(model, variants, steps=3, seed=5)
    list(together.run(batches))
    for variant, learned in zip(variants, together.gates, strict=True):
        torch.manual_seed(5)
        alone = new_gates(model, **variant.gate)
        start = {n: p.clone() for n, p in alone.state_dict().items()}
        config = DistillConfig(steps=3, lr=variant.lr, objective=variant.objective, target="max")
        list(Distiller(model, alone, batches, config, reach=512).run())
        for name, expected in alone.state_dict().items():
            assert torch.equal(learned.state_dict()[name], expected), (variant.name, name)
            assert not torch.equal(start[name], expected), (variant.name, name)


def test_a_run_trains_and_measures_every_method(run_script, tokens, tmp_path):
    (tmp_path / "tokens").mkdir()
    for name, part in zip(("books", "heldout"), tokens, strict=True):
        np.save(tmp_path / "tokens" / f"{name}.npy", part.astype(np.uint16))
    command = [
        *("experiments.gates.run", "run", "--device", "cpu"),
        *("--tokens", tmp_path / "tokens", "--out", tmp_path / "out", "--steps", "2"),
        *("--lengths", "512", "--batch", "512", "--eval-lengths", "512", "--densities", "0.5"),
        *("--documents", "1", "--text-tokens", "512", "--evaluators", "0", "--threads", "1"),
        *("--groups", tmp_path / "groups.json", "--only", "kept"),
    ]
    variants = [{"name": "kept", "gate": {"q_sub_block": 16}, "objective": "sharp_kl"}, {"name": "left out"}]
    groups = {"one": {"variants": variants, "shares": {"needles": 0.5, "repeats": 0.1}, "seed": 4}}
    (tmp_path / "groups.json").write_text(json.dumps(groups))
    printed = run_script(*command)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    methods = ["dense", *experiment.SCORERS, "kept"]
    assert sorted(r["method"] for r in report["rows"]) == sorted(methods), printed
    assert all(r["perplexity"] > 1 and 0 <= r["needle"] <= 1 for r in report["rows"])
    assert [r["step"] for r in report["training"][0]["rows"]] == [1, 2]
    with pytest.raises((SystemExit, ValueError), match="holds another run"):
        run_script(*command)


def test_cost_counts_the_products_of_sub_blocks():
    shape = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 64, "q_sub_block": 8, "k_sub_block": 8}
    shape["gate_dim"] = 64
    exact = experiment.cost(experiment.GateConfig(**shape), 2**40)
    assert exact == pytest.approx(1 / 128, rel=1e-6)
    half = experiment.GateConfig(**{**shape, "q_sub_block": 4, "gate_dim": 32})
    assert experiment.cost(half, 2**40) == pytest.approx(1 / 128, rel=1e-6)


@pytest.mark.parametrize("path", sorted(GROUPS.glob("*.json")), ids=lambda p: p.stem)
def test_what_is_shipped_to_train_can_be_made(path):
    for group in json.loads(path.read_text()).values():
        for variant in (experiment.Variant(**v) for v in group["variants"]):
            experiment.GateConfig(6, 2, 64, **variant.gate)
            if variant.objective in experiment.objectives.names():
                experiment.objectives.create(variant.objective, **variant.options)
            else:
                # Objectives that lost are gone; the file says what was compared.
                assert path.stem == "objectives"
                with pytest.raises(SystemExit, match=rf"{variant.name}: unknown objective .*--only"):
                    experiment.check({"one": experiment.Group((variant,))})
