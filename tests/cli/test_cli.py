"""The command line as a person types it: exit codes, one clear sentence, nothing left behind."""

import io
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from seerattention import cli
from seerattention.cli import _show
from seerattention.measure import bundled


def test_an_output_that_cannot_be_written_is_refused(distil, invoke, tmp_path):
    (tmp_path / "file").write_text("")
    for command, _ in (
        distil(tmp_path / "file" / "out", "--steps", 1),
        invoke("demo", "--out", tmp_path / "file" / "out"),
        invoke("bench", "prefill", "--out", tmp_path / "file" / "out.json"),
    ):
        assert command.exit_code == 2, command.output
        assert "error:" in command.output
        assert str(tmp_path / "file") in command.output.replace("\n", "")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_installed_script_answers(invoke):
    script = f"{sys.prefix}/bin/seerattention"
    result = subprocess.run([script, "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    for name in cli.commands():
        assert name in result.stdout
    unknown, _ = invoke("fly")
    assert unknown.exit_code == 2
    assert "fly" in unknown.stderr


def test_a_setting_given_as_an_option_is_answered_with_the_way_to_give_it(invoke):
    for command, option, way in (
        (("distill", "base", "--lr", "1e-3"), "--lr", "--set lr=VALUE"),
        (("distill", "--block-size=16"), "--block-size", "--set gate.block_size=16"),
        (("finetune", "--gates-only"), "--gates-only", "--set gates_only=VALUE"),
    ):
        result, said = invoke(*command)
        assert result.exit_code == 2
        said = " ".join(said.replace("│", "").split())
        assert f"{option} is a setting, not an option; give {way}" in said
    result, said = invoke("distill", "--no-such-thing", 3)
    assert result.exit_code == 2
    assert "No such option: --no-such-thing" in said


def test_brackets_are_no_markup_wherever_names_are_shown():
    name = "a[/b][red]c"
    console = _show.console_of()
    console.file = out = io.StringIO()
    console.print(name)
    console.print(_show.table((name,), [[name]], name))
    assert out.getvalue().count(name) == 4
    terminal = Console(file=io.StringIO(), force_terminal=True, width=200)
    progress = _show.bar(terminal)
    progress.add_task(name, total=1, said=name)
    console.print(progress)
    assert out.getvalue().count(name) == 6


@pytest.mark.parametrize("name", ["é", "\udcff", "a[/b]"])
def test_a_name_that_the_terminal_cannot_show_costs_no_result(tmp_path, monkeypatch, name):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "argv", ["seerattention", "convert", str(bundled.GATES), str(tmp_path / name)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown.flush()
    assert ended.value.code == 0
    assert (tmp_path / name / "gates.safetensors").exists()
    assert str(tmp_path) in shown.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]


def test_a_full_disk_ends_in_one_sentence(distil, full_disk, tmp_path):
    with full_disk(20_000):
        result, said = distil(tmp_path / "out", "--steps", 1)
    assert result.exit_code == 2, said
    assert "error: cannot write" in said
    assert "free some space or choose another folder" in said
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    result, said = distil(tmp_path / "out", "--steps", 1)
    assert result.exit_code == 0, said


def test_a_gpu_without_memory_ends_in_one_sentence_and_our_own_faults_in_a_traceback(invoke, monkeypatch):
    for error, code in ((torch.OutOfMemoryError("CUDA out of memory."), 2), (RuntimeError("a fault"), 1)):

        def fail(folder, error=error):
            raise error

        monkeypatch.setattr("seerattention.hosts.transformers.load_gates", fail)
        result, said = invoke("convert", "a", "b")
        assert result.exit_code == code
        assert ("error: CUDA out of memory." in said) == (code == 2)


def test_numbers_are_never_cut(capsys):
    titles = ["tokens", *(f"seconds of the attention {n}" for n in range(8))]
    _show.console_of(110).print(_show.table(titles, [["32,768", *["1,234.5"] * 8]]))
    said = capsys.readouterr().out
    assert said.count("1,234.5") == 8
    assert "32,768" in said
    assert "…" not in said
