"""``python -m kdlib.eval``: lm-eval's own command line, which also knows ``kdlib.eval.models``."""

from __future__ import annotations

import sys
from importlib import import_module

from kdlib.eval.harness import require_lm_eval


def main() -> None:
    """Registers our models (``--model kdlib``) and hands over to lm-eval."""
    try:
        require_lm_eval()
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    import_module("kdlib.eval.models")  # imported for its registrations
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
