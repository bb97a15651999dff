"""``python -m benchmarks``: measure, print, draw."""

import sys

from benchmarks import draw, markdown, table
from benchmarks.measure import measure, parse


def main() -> int:
    """0 if everything was measured, 1 if ours was not, 130 if the user stopped it; a missed target is no error."""
    options = parse()
    try:
        results = measure(options)
    except KeyboardInterrupt:
        print(f"interrupted: {options.output} is not complete", file=sys.stderr)
        return 130
    picture, text = options.output.with_suffix(".png"), options.output.with_suffix(".md")
    draw.draw(results, picture)
    text.write_text(markdown.document(results, options.output.name), encoding="utf-8")
    table.show(results)
    print(f"\nwritten: {options.output}, {picture}, {text}")
    return 1 if results.lacks_ours else 0


if __name__ == "__main__":
    sys.exit(main())
