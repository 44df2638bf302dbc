"""The command line as a person types it: exit codes, one clear sentence, nothing left behind."""

import subprocess
import sys

from seerattention import cli


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
