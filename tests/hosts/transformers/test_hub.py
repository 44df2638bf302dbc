"""What is uploaded can be loaded, and its card says what is known and what is not."""

from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard

from seerattention.hosts import transformers as host
from seerattention.hosts.transformers import checkpoint

ROWS = [
    {"tokens": 8192, "density": "10%", "perplexity": 30.5},
    {"tokens": 8192, "density": "100%", "perplexity": 29.9},
]


@pytest.fixture
def gates(tiny):
    model = tiny.make()
    model.config._name_or_path = "someone/base"
    return tiny.gates_for(model)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that is a folder, and the calls it got."""
    calls = []

    def create_repo(self, repo_id, **kwargs):
        calls.append(("create", repo_id, self.token, kwargs))
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        calls.append(("upload", repo_id, commit_message))
        folder_path.rename(tmp_path / "uploaded")
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return SimpleNamespace(calls=calls, folder=tmp_path / "uploaded")


def test_what_is_pushed_can_be_loaded(gates, hub):
    address = host.push_to_hub(gates, "me/gates", policy="top_k:0.1", private=True, token="secret")
    assert address == "https://hub/me/gates/commit/1"
    assert hub.calls == [
        ("create", "me/gates", "secret", {"private": True, "exist_ok": True}),
        ("upload", "me/gates", "Gates for someone/base"),
    ]
    assert {p.name for p in hub.folder.iterdir()} == {"README.md", "config.json", "gates.safetensors"}
    loaded = host.load_gates(hub.folder)
    assert loaded.policy == "top_k:0.1"
    for (_, one), (_, other) in zip(gates.items(), loaded.items(), strict=True):
        for name, value in one.state_dict().items():
            assert torch.equal(other.state_dict()[name], value)
    assert "secret" not in "".join(p.read_text() for p in hub.folder.glob("*.[mj]*"))


def test_a_card_says_what_gates_for_decoding_keep_per_key(tiny):
    card = host.model_card(tiny.gates_for(tiny.make(), phase="decode"), "me/gates")
    assert "blocks of 16 tokens, queries each alone, keys each alone, 16 numbers each." in card
    card = host.model_card(tiny.gates_for(tiny.make(), phase="decode", k_sub_block=None), "me/gates")
    assert "queries each alone, keys pooled by max, min, avg over 16 tokens, 16 numbers each." in card


def test_an_attached_model_pushes_what_it_uses(tiny, hub):
    model = tiny.make()
    host.attach(model, tiny.gates_for(model), "top_p:0.8")
    host.push_to_hub(model, "me/gates")
    assert host.load_gates(hub.folder).policy == "top_p:0.8"
    assert '"top_p:0.8")' in (hub.folder / "README.md").read_text()


def test_the_card_says_what_is_known(gates):
    card = ModelCard(
        host.model_card(
            gates,
            "me/gates",
            policy="top_k:0.1,sink_blocks=1",
            data="Books, 10 M tokens.",
            recipe={"steps": 500, "lr": 0.001},
            results=ROWS,
            license="mit",
        )
    )
    assert card.data.base_model == "someone/base"
    assert card.data.license == "mit"
    assert "seerattention" in card.data.tags
    for part in (
        f"`{gates.base.fingerprint}`",
        f"{sum(p.numel() for p in gates.parameters()):,} parameters",
        "Books, 10 M tokens.",
        "| steps | 500 |",
        "| tokens | density | perplexity |",
        "| 8192 | 10% | 30.5 |",
        'from_pretrained("someone/base")',
        'attach(model, load_gates("me/gates"), "top_k:0.1,sink_blocks=1")',
    ):
        assert part in card.text, part


def test_the_card_says_what_is_not_known(tiny):
    gates = tiny.gates_for(tiny.make())
    text = host.model_card(gates, "me/gates")
    assert "taught for positions" not in text
    gates.reach = 8192
    assert "; taught for positions up to 8,192.\n" in host.model_card(gates, "me/gates")
    assert text.count("Not recorded.") == 2
    assert "None recorded: measure them" in text
    assert "base_model" not in text


def test_what_the_card_says_to_do_works(tiny, gates, hub, monkeypatch):
    """The lines under 'Use', run."""
    host.push_to_hub(gates, "me/gates", policy="top_k:0.2")
    code = (hub.folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda name: tiny.make())
    monkeypatch.setattr(checkpoint, "snapshot_download", lambda *a, **k: hub.folder)
    names = {}
    exec(code, names)
    assert host.attached(names["model"])


@pytest.mark.parametrize("repo_id", ["gates", "", "a/b/c", "me/ga tes"])
def test_ids_that_are_none(gates, hub, repo_id):
    with pytest.raises(ValueError, match="repo_id must be owner/name, got"):
        host.push_to_hub(gates, repo_id)
    assert hub.calls == []


def test_nothing_is_uploaded_where_something_is_wrong(gates, hub):
    with pytest.raises(ValueError, match=r"the columns \['tokens', .* one has \['tokens'\]"):
        host.push_to_hub(gates, "me/gates", results=[*ROWS, {"tokens": 1}])
    with pytest.raises(ValueError, match="unknown policy"):
        host.push_to_hub(gates, "me/gates", policy="best:1")
    with torch.no_grad():
        next(gates.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinity"):
        host.push_to_hub(gates, "me/gates")
    assert hub.calls == []
