"""``python -m kdlib.eval``: lm-eval's own command line, which also knows the models of ``kdlib.eval``."""

from __future__ import annotations

import sys
from importlib import import_module

from kdlib.eval.harness import require_lm_eval


def main() -> None:
    """Registers our models (``--model kdlib``, ``kdlib-jacobi``, ``kdlib-diffusion``) and hands over to lm-eval."""
    try:
        require_lm_eval()
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    for module in ("kdlib.eval.models", "kdlib.eval.diffusion_lm"):
        import_module(module)  # imported for its registrations
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
