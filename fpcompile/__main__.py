"""``python -m fpcompile``: the ``fpcompile`` command, where the script is not on the path."""

from __future__ import annotations

from fpcompile.cli import main

if __name__ == "__main__":
    main()
