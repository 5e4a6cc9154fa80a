"""Lists the tools of `scripts/dev`, each with the first line of its module's docstring."""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
USAGE = "usage: scripts/dev NAME [ARGUMENTS]    (scripts/dev NAME --help says more)"


def summaries() -> dict[str, str]:
    """What each tool is for, in a line, by name."""
    return {
        path.stem: (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
        for path in sorted(TOOLS.glob("*.py"))
        if path.stem != "__main__"
    }


def main(arguments: Sequence[str]) -> int:
    tools = summaries()
    if arguments and arguments[0] not in ("-h", "--help"):
        near = difflib.get_close_matches(arguments[0], tools, n=1)
        hint = f"did you mean {near[0]}?" if near else "without arguments it lists them"
        print(f"scripts/dev: there is no tool {arguments[0]!r}; {hint}", file=sys.stderr)
        return 2
    print(USAGE, end="\n\n")
    width = max(map(len, tools))
    for name, summary in tools.items():
        print(f"{name:{width}}  {summary}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
