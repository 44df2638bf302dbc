"""Where an engine's settings come from, and what they may be."""

from types import SimpleNamespace

import pytest

from seerattention.hosts.vllm.settings import Settings


def config(extra=None, own=None, model="somewhere", device="cpu"):
    hf_config = SimpleNamespace() if own is None else SimpleNamespace(seerattention=own)
    return SimpleNamespace(
        additional_config={} if extra is None else {"seerattention": extra},
        model_config=SimpleNamespace(hf_config=hf_config, model=str(model)),
        device_config=SimpleNamespace(device_type=device),
    )


def test_an_engine_without_settings_has_none():
    assert Settings.of(config()) is None


def test_what_is_not_given_has_defaults():
    assert Settings.of(config({"gates": "here"})) == Settings(gates="here")
    assert Settings("here").summaries == "kept"


def test_summaries_are_made_where_none_can_be_kept():
    assert Settings.of(config({"gates": "here"}, device="cuda")) == Settings("here", summaries="made")
    assert Settings.of(config({"gates": "here", "summaries": "kept"}, device="cuda")) == Settings("here")


def test_what_the_engine_is_told_goes_before_the_model():
    given = config({"gates": "here"}, {"gates": "there", "policy": "top_k:0.1"})
    assert Settings.of(given) == Settings(gates="here")


def test_false_turns_off_what_a_model_brings():
    assert Settings.of(config(False, {"gates": "there"})) is None
    assert Settings.of(config(own=False)) is None


def test_a_models_own_gates_lie_in_its_folder(tmp_path, monkeypatch):
    # Where something of that name lies, too.
    (tmp_path / "elsewhere" / "gates").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "gates").mkdir()
    assert Settings.of(config(own={"gates": "gates"}, model=tmp_path)) == Settings(
        gates=str(tmp_path / "gates")
    )
    assert Settings.of(config(own={"gates": "someone/gates"}, model=tmp_path)) == Settings("someone/gates")
    assert Settings.of(config({"gates": "gates"}, model=tmp_path)) == Settings("gates")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"gates": "here", "polcy": "top_k:0.1"}, "did you mean policy"),
        ({"policy": "top_k:0.1"}, "gates"),
        ({"gates": 3}, "gates"),
        ({"gates": "here", "summaries": "both"}, "summaries"),
        ({"gates": "here", "aligned": "yes"}, "aligned"),
        ("here", "must be settings, e.g."),
        (True, "must be settings, e.g."),
    ],
)
def test_bad_settings(given, words):
    for where in (config(given), config(own=given)):
        with pytest.raises(ValueError, match=words):
            Settings.of(where)
