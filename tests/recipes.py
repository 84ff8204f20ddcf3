"""The recipes of CONTRIBUTING: found by their titles, and applied to a copy of the repository as they are printed."""

import re

from tests import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
STEP = re.compile(r"`([\w/]+\.py)`:\n\n```(python|diff)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


def recipe(title):
    return TEXT.split(f"### {title}\n")[1].split("\n### ")[0].split("\n## ")[0]


def steps(title):
    """Each step's file, whether it is "python", a new file, or a "diff", and its text."""
    found = STEP.findall(recipe(title))
    assert found
    return found


def apply(tree, title):
    for name, kind, block in steps(title):
        path = tree / name
        if kind == "python":
            assert not path.exists()
            path.write_text(block, encoding="utf-8")
        else:
            path.write_text(patched(path.read_text(encoding="utf-8"), block, name), encoding="utf-8")


def patched(text, diff, name):
    """`text` with a diff applied whose hunks are separated by "@@" and have no line numbers."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        assert {line[0] for line in lines} <= set(" +-\n")
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] or "\n" for line in lines if line[0] in " +")
        assert text.count(old) == 1, f"{name} does not have these lines exactly once:\n{old}"
        text = text.replace(old, new)
    return text
