"""The command line: what it prints, and exit code 2 with a sentence for what is wrong."""

import logging
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
import torch

from rewriter import cli, library, render
from rewriter.decisions import DECISIONS
from rewriter.pattern import Pattern, Reference
from rewriter.report import RegionReport, RewriteReport

REPORT = RewriteReport(
    rewrites=(),
    near_misses=(),
    regions=(RegionReport(("",), "model", 1, 0),),
    graph_breaks=(),
    fallbacks=(),
    notes=(),
    environment={"python": "3.12.3"},
)


class Plugin(Pattern):
    """What the plugin is for.

    And more.
    """

    name = "squared_relu"
    references = (Reference(lambda x: torch.relu(x) ** 2, {"x": (4, 8)}),)


@pytest.fixture
def installed(monkeypatch):
    """Call with entry points to have them installed."""

    def install(*entries):
        monkeypatch.setattr(library, "entry_points", lambda group: entries if group == library.ENTRY_POINTS else ())
        library.plugins.cache_clear()

    yield install
    library.plugins.cache_clear()


def entry(name, value):
    return EntryPoint(name, value, library.ENTRY_POINTS)


def test_env_names_versions(capsys):
    assert cli.main(["env"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["torch"] == torch.__version__
    assert {"python", "rewriter", "device"} <= set(rows)


def test_decisions_lists_the_table(installed, capsys):
    assert cli.main(["decisions"]) == 0
    head, *rows, rest = capsys.readouterr().out.splitlines()
    assert head.split() == ["pattern", "executor", "device", "apply", "from", "figures"]
    assert len(rows) == len(DECISIONS) and any(row.startswith("linear_4bit (a library's)") for row in rows)
    assert "not measured by itself" in rest


def test_patterns_lists_built_in_ones(installed, capsys):
    installed()
    assert cli.main(["patterns"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(lines) == set(library.BUILT_IN)
    for name, pattern in library.built_in().items():
        assert "built-in" in lines[name] and f" {len(pattern.references)} reference" in lines[name]
        assert cli.describe(pattern) and lines[name].endswith(cli.describe(pattern))


def test_patterns_lists_plugins(installed, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "some_plugin", sys.modules[__name__])
    installed(entry("squared_relu", "some_plugin:Plugin"))
    assert cli.main(["patterns"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("squared_relu")]
    assert "plugin" in line and "1 reference " in line and line.endswith("What the plugin is for.")


def test_patterns_says_which_plugin_is_broken(installed, capsys, caplog):
    installed(entry("broken", "no_such_module_anywhere:Nothing"))
    with caplog.at_level(logging.WARNING, "rewriter"):
        assert cli.main(["patterns"]) == 0
    assert "'broken' can't be loaded" in caplog.text
    assert "broken" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "view"),
    [([], render.text), (["--format", "text"], render.text), (["--format=md"], render.markdown),
     (["--format=html"], render.html)],
)  # fmt: skip
def test_report_prints_a_saved_report(tmp_path, capsys, options, view):
    REPORT.save(tmp_path / "r.json")
    assert cli.main(["report", str(tmp_path / "r.json"), *options]) == 0
    assert capsys.readouterr().out == view(REPORT) + "\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["report"], "the following arguments are required: FILE.json"),
        (["report", "no/such.json"], "can't read no/such.json: No such file"),
        (["report", "."], "can't read .: "),
        (["report", "x.json", "--format", "pdf"], "invalid choice: 'pdf'"),
        (["env", "more"], "unrecognized arguments: more"),
    ],
)
def test_bad_usage_is_exit_code_2_and_a_sentence(capsys, arguments, sentence):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert sentence in capsys.readouterr().err


def test_a_file_that_is_no_report_is_exit_code_2(tmp_path, capsys):
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(SystemExit) as caught:
        cli.main(["report", str(tmp_path / "r.json")])
    assert caught.value.code == 2
    assert "r.json is no report: RewriteReport has no rewrites" in capsys.readouterr().err


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "rewriter.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "COMMAND" in done.stdout
