"""Generated pages equal what generates them, links lead somewhere, the README promises nothing that is not there."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import click
import pytest

from mlx_codellama import env
from mlx_codellama.cli.group import VERBS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md"), *ROOT.glob("csrc/*.md")]
)


def script(path: Path) -> ModuleType:
    """A file that is run, not installed, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATE = script(ROOT / "docs" / "generate.py")
TABLES = script(ROOT / "benchmarks" / "tables.py")


@pytest.mark.parametrize("name", sorted(GENERATE.PAGES))
def test_generated_page_is_up_to_date(name: str) -> None:
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == GENERATE.PAGES[name](), "run: make docs"


def test_the_page_of_commands_holds_every_verb_and_no_terminals_width(monkeypatch: pytest.MonkeyPatch) -> None:
    page = GENERATE.cli_page()
    assert all(f"## mlx-codellama {verb}" in page for verb in VERBS)
    monkeypatch.setenv("COLUMNS", "40")
    assert GENERATE.cli_page() == page


def test_environment_page_lists_every_variable() -> None:
    page = GENERATE.env_page()
    assert all(f"`{variable.name}`" in page for variable in env.VARIABLES)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_page_of_measurements_is_up_to_date() -> None:
    assert TABLES.MEASURED.read_text(encoding="utf-8") == TABLES.measured(), "run: make docs"


def test_the_tables_of_the_demo_models_card_are_up_to_date() -> None:
    text = TABLES.CARD.read_text(encoding="utf-8")
    assert "<!-- results: demo_quality -->" in text
    assert TABLES.filled(text) == text, "run: make docs"


def test_every_result_stands_once_on_the_page_of_measurements(tmp_path: Path) -> None:
    for name in ("decode-1b", "startup", "new_question"):
        result = {"question": f"{name}?", "command": "x", "machine": {}, "commit": "abc", "rows": []}
        (tmp_path / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")
    page = TABLES.measured(tmp_path)
    assert re.findall(r"^(?:## |\*\*)([\w ?-]+)", page, flags=re.MULTILINE) == [
        "Start", "startup?", "Generating", "decode-1b?", "More", "new_question?",
    ]  # fmt: skip


def test_a_changed_result_changes_the_table(tmp_path: Path) -> None:
    result = {
        "question": "How fast?",
        "command": "python benchmarks/x.py",
        "machine": {"cpu": "one", "cores": 2},
        "commit": "abc",
        "rows": [{"name": "ours", "unit": "MB/s", "median": 1234.5, "spread": [1200, 1300]}],
    }
    (tmp_path / "x.json").write_text(json.dumps(result), encoding="utf-8")
    page = TABLES.filled("a\n<!-- results: x -->\nold\n<!-- end -->\nb", tmp_path)
    assert "| ours | 1,234 | 1,200–1,300 | MB/s |" in page
    assert "old" not in page
    assert page.startswith("a\n")
    assert page.endswith("\nb")
    assert TABLES.filled(page, tmp_path) == page


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.01234, "0.0123"), (1.239, "1.24"), (9.999, "10.0"), (47.06, "47.1"), (1234567, "1,234,567")],
)
def test_numbers_have_three_digits_and_no_exponent(value: float, text: str) -> None:
    assert TABLES.number(value) == text


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_result_files_have_the_promised_keys(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    assert {"question", "command", "machine", "commit", "rows"} <= set(result)
    for row in result["rows"]:
        assert {"name", "unit", "median"} <= set(row)


def test_the_readme_is_short_and_shows_an_example_early() -> None:
    lines = README.splitlines()
    assert len(lines) <= 120
    assert any("mlx-codellama infill" in line for line in lines[:30])


def test_readme_uses_only_verbs_that_exist() -> None:
    from mlx_codellama.cli.group import VERBS

    used = set(re.findall(r"^\s*mlx-codellama ([a-z][\w-]*)", README, flags=re.MULTILINE))
    assert used
    assert used <= set(VERBS)


@pytest.mark.parametrize("line", re.findall(r"^mlx-codellama .*", README, flags=re.MULTILINE))
def test_command_lines_of_the_readme_parse(line: str) -> None:
    from mlx_codellama.cli.group import group

    _, verb, *words = shlex.split(line)
    command = group.get_command(click.Context(group), verb)
    assert command is not None
    command.make_context(verb, words)  # parses and checks, runs nothing


def test_readme_file_map_names_files_that_exist() -> None:
    section = README.partition("## File map")[2].partition("\n## ")[0]
    names = re.findall(r"^([\w./-]+)", section.partition("```")[2].partition("```")[0], flags=re.MULTILINE)
    assert len(names) > 10
    for name in names:
        assert (ROOT / name).exists(), name


def test_the_list_of_verbs_says_what_their_own_help_says() -> None:
    from mlx_codellama.cli.group import VERBS, group

    for verb, line in VERBS.items():
        command = group.get_command(click.Context(group), verb)
        assert command is not None
        assert (command.help or "").partition("\n")[0] == line


def test_files_that_the_makefile_and_the_workflow_name_exist() -> None:
    for name in ("Makefile", ".github/workflows/ci.yml", ".ci/run"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for path in re.findall(r"(?<![\w/.-])(?:examples|docs|benchmarks|csrc|tests|mlx_codellama)/[\w./-]*\w", text):
            assert (ROOT / path).exists() or path == "csrc/build", f"{name} names {path}"


def test_ci_runs_the_test_command_of_the_readme(tmp_path: Path) -> None:
    assert README.partition("<!-- test command -->")[2].lstrip().startswith("```\nmake test\n")
    stand_in = tmp_path / "make"
    stand_in.write_text("#!/bin/sh\necho ran make $*\n", encoding="utf-8")
    stand_in.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([ROOT / ".ci" / "run"], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "ran make test\n"), done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["demo", "test", "test-all", "lint", "ext", "docs", "clean"])
def test_makefile_knows_every_target_and_needs_no_path_of_a_machine(target: str) -> None:
    done = subprocess.run(["make", "-n", "-s", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
