"""benchmarks/README.md: every script and every result is on it, and what it points at is there."""

import re
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "benchmarks"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")


def test_every_script_and_result_is_on_the_page():
    scripts = {path.name for path in FOLDER.glob("*.py")} - {"launching.py"}
    assert {name for name in scripts if f"| `{name}` |" not in PAGE} == set()
    assert {path.name for path in FOLDER.glob("results/*.json") if f"`{path.stem}" not in PAGE} == set()


def test_links_lead_somewhere():
    headings = {
        re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)", PAGE, re.M)
    }
    targets = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert {t for t in targets if t[0] == "#" and t[1:] not in headings} == set()
    assert {t for t in targets if t[0] != "#" and not (FOLDER / t).exists()} == set()
