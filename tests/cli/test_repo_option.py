"""--repo: other files of a project before the text."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_codellama import load
from mlx_codellama.tokenizer import Tokenizer

from .conftest import Run, document, write_checkpoint


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("roomy") / "model", small_tokenizer, context=400))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in {
        "near.py": "near = 1\n",
        "lib/used.py": "used = 2\n",
        "main.py": "import used\n\nx = \n",
    }.items():
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "project" / "latin.py").write_bytes(b"\xe9")
    return tmp_path / "project"


BEFORE = "# near.py\nnear = 1\n\n\n# lib/used.py\nused = 2\n\n\n# main.py\n"


def test_complete_continues_the_file_after_the_files_it_needs(run: Run, roomy: str, project: Path) -> None:
    result = run("complete", "-f", project / "main.py", "--repo", project, "-m", roomy, "-n", 4, "--json")
    assert result.exit_code == 0, result.stderr
    got = document(result)
    m = load(roomy)
    assert got["ids"] == m.complete(BEFORE + "import used\n\nx = \n", max_tokens=4).ids
    assert [(f["path"], f["why"]) for f in got["repository"]] == [
        ("near.py", "same folder"), ("lib/used.py", "imported")
    ]  # fmt: skip
    assert got["prompt"] == "import used\n\nx = \n"
    assert "repo: 2 files" in result.stderr
    assert "latin.py skipped: not UTF-8" in result.stderr


@pytest.mark.parametrize("order", ["psm", "spm"])
def test_infill_sees_the_files_before_the_prefix(run: Run, roomy: str, project: Path, order: str) -> None:
    result = run("infill", f"{project}/main.py:3", "--repo", project, "-m", roomy, "-n", 4, "--order", order, "--json")
    assert result.exit_code == 0, result.stderr
    m = load(roomy)
    assert document(result)["ids"] == m.infill(BEFORE + "import used\n\nx = ", "\n", order=order, max_tokens=4).ids


@pytest.mark.parametrize("limit", [30, 60, 10_000])
def test_the_prompt_never_exceeds_tokens_asked_for_or_context(run: Run, roomy: str, project: Path, limit: int) -> None:
    for n in range(40):
        (project / f"more{n}.py").write_text(f"value_{n} = {n}\n" * (n + 1))
    result = run("complete", "-f", project / "main.py", "--repo", project, "--repo-tokens", limit, "-m", roomy, "-n", 9,
                 "--json")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    got = document(result)
    assert got["stats"]["prompt_tokens"] + 9 <= 400
    assert sum(f["tokens"] for f in got["repository"]) <= limit
    assert limit < 60 or got["stats"]["prompt_tokens"] > min(limit, 300) - 40  # and it is used


def test_a_file_outside_the_repository_is_refused(run: Run, roomy: str, project: Path, tmp_path: Path) -> None:
    (tmp_path / "else.py").write_text("x")
    result = run("complete", "-f", tmp_path / "else.py", "--repo", project, "-m", roomy)
    assert result.exit_code == 1
    assert "is not inside" in result.stderr
    assert "hint:" in result.stderr


def test_secrets_and_odd_names_stay_out_of_the_prompt_and_are_said_once(run: Run, roomy: str, project: Path) -> None:
    for name in ("id_rsa", "prod.env", "deep/.netrc", "evil\nimport os\n.py", "a\x1b]0;b.py"):
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text("password\n")
    result = run("complete", "-f", project / "main.py", "--repo", project, "-m", roomy, "-n", 2, "--json")
    assert result.exit_code == 0, result.stderr
    assert [f["path"] for f in document(result)["repository"]] == ["near.py", "lib/used.py"]
    assert result.stderr.count("id_rsa, prod.env, deep/.netrc skipped: may hold secrets\n") == 1
    assert "note: a\\x1b]0;b.py, evil\\nimport os\\n.py skipped: its name is not one line of UTF-8" in result.stderr
    assert "\x1b" not in result.stderr


def test_a_prompt_without_a_file_takes_what_is_nearest_to_the_root(run: Run, roomy: str, project: Path) -> None:
    result = run("complete", "def f(", "--repo", project, "-m", roomy, "-n", 2, "--json")
    assert [f["path"] for f in document(result)["repository"]] == ["lib/used.py", "near.py", "main.py"]
    assert run("complete", "x", "--repo", project, "--literal-infill", "-m", roomy).exit_code == 2
