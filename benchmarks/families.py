"""Which family has which operators: the README's table, once every law held for each of them.

    python -m benchmarks.families     # runs tests/test_families.py; writes docs/results/families.json and the README
"""
import sys
from collections import Counter
from importlib.metadata import version

import pytest

from benchmarks.demo import ROOT, save_result, write_into
from puzzle_core.families import FAMILIES, SIZED, Family
from puzzle_core.spec import ATTENTION, FFN, SUBBLOCKS

OPERATORS = [(s, kind) for s in SUBBLOCKS for kind in (*SIZED[s], "linear", "no_op")]
TITLES = {
    (ATTENTION, "kv"): "fewer kv heads, `kvN`", (ATTENTION, "window"): "sliding window, `windowN`",
    (FFN, "w"): "narrower FFN, `wN`", (FFN, "e"): "fewer experts, `eN`",
}  # fmt: skip


class Laws:
    """A pytest plugin that counts the laws that held and failed, by family and operator."""

    def __init__(self):
        self.held, self.failed = Counter(), Counter()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        what = getattr(getattr(item, "callspec", None), "params", {})
        if "variant" in what and what["variant"] != "mixed" and (call.when == "call" or report.failed):
            family = item.module.PARENTS[what["name"]].get("model_type", "llama")
            cell = (family, what["subblock"], what["variant"].kind)
            (self.held if report.passed else self.failed)[cell] += 1
        return report


def has(family: Family, subblock: str, kind: str) -> bool:
    return kind in ("linear", "no_op") or kind in family.size_keys


def table() -> str:
    """One row a family, one column an operator, as FAMILIES says."""
    titles = [TITLES.get((s, kind), f"{'attention' if s == ATTENTION else 'FFN'} {kind}") for s, kind in OPERATORS]
    lines = ["| family | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for name, family in FAMILIES.items():
        lines.append(f"| {name} | " + " | ".join("✓" if has(family, s, kind) else "–" for s, kind in OPERATORS) + " |")
    return "\n".join(lines)


def main() -> None:
    laws = Laws()
    code = pytest.main([str(ROOT / "tests" / "test_families.py"), "-q", "-p", "no:warnings"], plugins=[laws])
    cells = [(name, *operator) for name, family in FAMILIES.items() for operator in OPERATORS if has(family, *operator)]
    if untested := [cell for cell in cells if not laws.held[cell]]:
        sys.exit(f"no law was tested for {untested}: see PARENTS in tests/test_families.py")
    if code or laws.failed:
        sys.exit(f"laws failed, so the README stays as it is: {dict(laws.failed)}")
    result = {
        "command": "python -m benchmarks.families",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "laws_held": {name: {f"{s} {k}": laws.held[f, s, k] for f, s, k in cells if f == name} for name in FAMILIES},
    }
    save_result("families", result)
    write_into("README.md", "families", table())


if __name__ == "__main__":
    main()
