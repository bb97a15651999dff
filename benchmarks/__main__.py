"""``python -m benchmarks``: measure, print, draw."""

from __future__ import annotations

import sys

from benchmarks import draw, table
from benchmarks.measure import measure, parse


def main() -> int:
    """0 if everything was measured, 130 if the user stopped it; a target that is missed is no error."""
    options = parse()
    try:
        results = measure(options)
    except KeyboardInterrupt:
        print(f"interrupted: {options.output} is not written", file=sys.stderr)
        return 130
    picture = options.output.with_suffix(".png")
    draw.draw(results, picture)
    table.show(results)
    print(f"\nwritten: {options.output}, {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
