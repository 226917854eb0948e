"""Every Python and shell block of the documentation runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INSTALLS = re.compile(r"pip install|mkdocs serve")
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#]+)")


def blocks(page, language):
    return [code for kind, code in BLOCK.findall(page.read_text()) if kind == language]


def run(command, folder):
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PATH": paths}
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=280, check=False
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.usefixtures("phantom_home")
def test_python_blocks_of_a_page_run_in_order(page, tmp_path):
    code = "\n".join(blocks(page, "python"))
    if not code:
        pytest.skip("no Python on this page")
    script = tmp_path / "page.py"
    body = "\n".join(f"    {line}" if line else "" for line in code.splitlines())
    script.write_text(f"def page():\n{body}\n\n\nif __name__ == '__main__':\n    page()\n")
    done = run([sys.executable, script], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.usefixtures("phantom_home")
def test_shell_blocks_of_a_page_run(page, tmp_path):
    code = [block for block in blocks(page, "bash") if not INSTALLS.search(block)]
    if not code:
        pytest.skip("no shell on this page, or installs that CI runs")
    done = run(["bash", "-euo", "pipefail", "-c", "\n".join(code)], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    broken = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert broken == []
