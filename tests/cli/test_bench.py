import sys

from vla_dist.cli import bench


def test_what_a_benchmark_starts_finds_its_parts(tmp_path, monkeypatch):
    """A replica of Ray Serve did not: No module named 'serve_parts'."""
    (tmp_path / "trial_parts").mkdir()
    (tmp_path / "trial_parts" / "part.py").write_text("VALUE = 7\n")
    (tmp_path / "trial.py").write_text(
        "import subprocess, sys\n"
        "code = 'import sys; from trial_parts.part import VALUE; sys.exit(VALUE)'\n"
        "assert subprocess.run([sys.executable, '-c', code]).returncode == 7\n"
    )
    monkeypatch.setattr(bench, "_FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["vla-dist"])
    monkeypatch.setenv("PYTHONPATH", "")
    bench.main(["trial"])
