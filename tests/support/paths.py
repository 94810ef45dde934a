"""Where the repository lies, for tests that read its pages, scripts and configuration."""

from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
EXAMPLES = ROOT / "examples"
