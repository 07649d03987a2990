"""``python -m dpguard``."""

from __future__ import annotations

from dpguard.commands import main

if __name__ == "__main__":
    raise SystemExit(main())
