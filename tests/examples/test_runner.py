"""examples.common.runner: what counts as done, and that one folder is made by one process."""

import sys

import pytest

from examples.common import runner as stages
from examples.common.runner import StageError
from examples.common.stage import Stage, fingerprint, option_words


def stage(tmp_path, text="1", **more):
    """Writes a file with the text, and beside it how often it was run."""
    program = "import pathlib, sys; (pathlib.Path(sys.argv[1]) / 'text').write_text(sys.argv[2])"
    command = [sys.executable, "-c", program, "{out}", text]
    return Stage("stage", command, tmp_path / "out" / "run", **more)


def made(a_stage, capsys):
    """Whether it was run, not found to be there."""
    stages.run(a_stage, "1/1", 1)
    return "already there" not in capsys.readouterr().out


def test_made_once(tmp_path, capsys):
    assert made(stage(tmp_path), capsys)
    assert (tmp_path / "out" / "run" / "text").read_text() == "1"
    assert not made(stage(tmp_path), capsys)
    assert made(stage(tmp_path, "2"), capsys)
    assert (tmp_path / "out" / "run" / "text").read_text() == "2"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run"]


def test_made_anew_when_a_file_that_it_reads_has_another_content(tmp_path, capsys):
    recipe, data, missing = (tmp_path / name for name in ("a.yaml", "train.tsv", "test.tsv"))
    recipe.write_text("lr: 1\nbatch: 8\n")
    data.write_text("row")
    of_files = stage(tmp_path, files=[recipe, data, missing])
    assert made(of_files, capsys) and not made(of_files, capsys)
    recipe.write_text("# another remark, another order\nbatch: 8\nlr: 1\n")
    assert not made(of_files, capsys)
    recipe.write_text("lr: 2\nbatch: 8\n")
    assert made(of_files, capsys) and not made(of_files, capsys)
    data.write_text("another")
    assert made(of_files, capsys) and not made(of_files, capsys)
    missing.write_text("is there now")
    assert made(of_files, capsys) and not made(of_files, capsys)


def test_made_anew_when_a_file_of_its_command_has_another_content(tmp_path, capsys):
    given, before = tmp_path / "questions.json", tmp_path / "earlier"
    given.write_text("1")
    before.mkdir()
    (before / "of_an_earlier_stage").write_text("1")
    reads = stage(tmp_path, inputs=[before])
    words = [*reads.command, str(given), str(before / "of_an_earlier_stage")]
    reads = reads._replace(command=words)
    assert made(reads, capsys) and not made(reads, capsys)
    given.write_text("2")
    assert made(reads, capsys) and not made(reads, capsys)
    (before / "of_an_earlier_stage").unlink()  # to save space; that stage's stamp counts
    assert not made(reads, capsys)


def test_words_of_an_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v.txt").write_text("")
    assert option_words("wordpiece-vocab=v.txt") == [
        "--wordpiece-vocab",
        str(tmp_path / "v.txt"),
    ]
    assert option_words("wordpiece-cased") == ["--wordpiece-cased"]
    assert option_words("max=a=b") == ["--max", "a=b"]


def test_the_name_that_python_was_started_by_makes_no_difference(tmp_path, monkeypatch):
    mark = fingerprint(stage(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3"))
    assert fingerprint(stage(tmp_path)) == mark


def test_a_stage_that_another_process_makes_is_left_alone(tmp_path, capsys):
    """Whatever its options are: its folder is not touched."""
    partial = tmp_path / "out" / "run.partial"
    partial.mkdir(parents=True)
    (partial / "checkpoint").write_text("of the other")
    with stages.locked(stage(tmp_path)):
        for text in "12":
            with pytest.raises(StageError, match="being made by another process"):
                stages.run(stage(tmp_path, text), "1/1", 1)
    assert (partial / "checkpoint").read_text() == "of the other"
    assert made(stage(tmp_path), capsys)


def test_what_was_measured_of_a_run_goes_with_it(tmp_path, capsys):
    made(stage(tmp_path), capsys)
    measured = tmp_path / "out" / "run-sharpness"
    measured.mkdir()
    made(stage(tmp_path), capsys)
    assert measured.is_dir()
    made(stage(tmp_path, "2"), capsys)
    assert not measured.exists()


def test_a_failed_stage_leaves_the_finished_one(tmp_path, capsys):
    made(stage(tmp_path), capsys)
    broken = stage(tmp_path)._replace(command=[sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(StageError, match="failed with code 3"):
        stages.run(broken, "1/1", 1)
    assert (tmp_path / "out" / "run" / "text").read_text() == "1"
    assert (tmp_path / "out" / "run.partial").is_dir()
